"""OpenVINO beside signals: models that are closed in any order, on any thread, leave a process that survives Ctrl-C."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="writes the graphs")
pytest.importorskip("openvino", reason="runs them")

from swin_deploy.runtimes.openvino import (  # noqa: E402 - after the checks
    OpenVino,
    convolve_linear_layers,
    openvino_core,
    transpose_keys_in_matmul,
)

CODE = """
import signal, sys, threading
from pathlib import Path
import numpy as np
from swin_deploy.runtimes.openvino import OpenVino

file = Path(sys.argv[1])
caught = []
signal.signal(signal.SIGINT, signal.default_int_handler)  # it may be ignored, as by a shell in the background
signal.signal(signal.SIGTERM, lambda number, frame: caught.append(number))

def loaded(size):
    return OpenVino(file.with_name(f"relu{size}.onnx"), threads=1)

def run(model, *batches):
    for batch in batches:  # a batch of more than one compiles the graph again
        x = np.ones((batch, model.inputs[0].shape[1]), np.float32)
        assert np.array_equal(model.run({"x": x})["y"], x)

def elsewhere(work, *arguments):
    thread = threading.Thread(target=work, args=arguments)
    thread.start()
    thread.join()

def signals(step):
    try:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        print(step, len(caught), flush=True)

first, second, third = loaded(4), loaded(4), loaded(8)
signals("loaded")
run(first, 1, 2, 3)
run(third, 1, 3)
elsewhere(run, second, 1, 2)
signals("batches")
first.close()
del first
signals("closed in order")
elsewhere(second.close)
del second
signals("closed on another thread")
kept = []
elsewhere(lambda: kept.append(loaded(8)))  # a service loads the new model on a thread, and swaps it in
run(kept[0], 1, 2)
third.close()
third = kept.pop()
signals("swapped")
for size in (4, 8, 4):
    third.close()
    third = loaded(size)
    run(third, 2, 1)
elsewhere(third.close)
del third
signals("reloaded")
again = loaded(4)
try:
    while True:
        run(again, 1, 2)
        signal.raise_signal(signal.SIGINT)
except KeyboardInterrupt:
    run(again, 1, 2)
again.close()
del again
signals("interrupted")
"""
STEPS = ("loaded", "batches", "closed in order", "closed on another thread", "swapped", "reloaded", "interrupted")


def test_signals_between_models(tmp_path: Path) -> None:
    """Of two sizes, with batches, closed in order and on another thread, swapped and loaded again."""
    value = onnx.helper.make_tensor_value_info
    node = onnx.helper.make_node("Relu", ["x"], ["y"])
    for size in (4, 8):
        ends = [value(name, onnx.TensorProto.FLOAT, ["batch", size]) for name in ("x", "y")]
        graph = onnx.helper.make_graph([node], "relu", ends[:1], ends[1:])
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)])
        onnx.save(model, tmp_path / f"relu{size}.onnx")
    done = subprocess.run([sys.executable, "-c", CODE, str(tmp_path / "relu.onnx")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{step} {number}" for number, step in enumerate(STEPS, 1)], done.stderr


@pytest.mark.parametrize(("tokens", "snippets"), [(4, False), (16, True)])
def test_windows_of_2x2_tokens_are_compiled_without_snippets(tokens: int, snippets: bool, tmp_path: Path) -> None:
    """OpenVINO 2026 crashes while it compiles some of them."""
    shape = ["batch", tokens, tokens]
    values = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name in ("x", "y")]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Softmax", ["x"], ["y"])], "g", values[:1], values[1:])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 19)], ir_version=9)
    onnx.save(model, tmp_path / "m.onnx")
    with OpenVino(tmp_path / "m.onnx") as runtime:
        assert ("SNIPPETS_MODE" not in runtime._facts.config) is snippets


@pytest.mark.parametrize(
    ("scaled", "bf16", "tokens"), [(False, False, 5), (False, True, 5), (True, False, 5), (True, True, 5), (True, False, 256)]
)
def test_matmuls_transpose_keys(scaled: bool, bf16: bool, tokens: int, tmp_path: Path) -> None:
    text = f"""<ir_version: 9, opset_import: ["" : 19]>
        attention (float[2, {tokens}, 3, 8] query, float[2, {tokens}, 3, 8] key) => (float[2, 3, n, n] y)
        <float scale = {{4.0}}> {{
        q = Transpose<perm = [0, 2, 1, 3]>(query)
        k = Transpose<perm = [0, 2, 3, 1]>(key)
        product = MatMul(q, k)
        cosine = {"Mul(product, scale)" if scaled else "Identity(product)"}
        y = Softmax(cosine)
    }}"""
    onnx.save(onnx.parser.parse_model(text), tmp_path / "m.onnx")
    core = openvino_core()
    plain, model = (core.read_model(str(tmp_path / "m.onnx")) for _ in range(2))
    assert transpose_keys_in_matmul(model, bf16) == (bf16 or not scaled or tokens == 256)
    assert transpose_keys_in_matmul(model, bf16) == 0
    feed = np.random.default_rng(0).standard_normal((2, 2, tokens, 3, 8), dtype=np.float32)
    found, wanted = (
        core.compile_model(one, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(list(feed))[0] for one in (model, plain)
    )
    np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_convolutions_compute_linear_layers() -> None:
    """All layers of tokens, with bias, GELU, both or neither, and in 8 bits, but not the classifier; also for a later batch."""
    text = """<ir_version: 9, opset_import: ["" : 20]>
        network (float[batch, 7, 8] x) => (float[n, 8] plain, float[n, 5] last, float[n, 8] eight, float[batch, 3] logits)
        <int64[2] rows = {-1, 8}, int64[1] axis = {1}, float scale = {0.05}, uint8 zero = {128}> {
        tokens = Reshape(x, rows)
        wide = Gemm<transB = 1>(tokens, w, b)
        hidden = Gelu(wide)
        plain = Gemm<transB = 1>(hidden, v)
        active = Gelu<approximate = "tanh">(plain)
        last = Gemm<transB = 1, alpha = 2.0>(active, w, b)
        seen = QuantizeLinear(tokens, scale, zero)
        input = DequantizeLinear(seen, scale, zero)
        of_first = DequantizeLinear<axis = 0>(w8, scales, zeros)
        first = Gemm<transB = 1>(input, of_first, b)
        bent = Gelu(first)
        between = QuantizeLinear(bent, scale, zero)
        output = DequantizeLinear(between, scale, zero)
        of_second = DequantizeLinear<axis = 0>(v8, more_scales, more_zeros)
        eight = Gemm<transB = 1>(output, of_second)
        best = ReduceMax<keepdims = 0>(x, axis)
        logits = Gemm<transB = 1>(best, c)
    }"""
    model, rng, core = onnx.parser.parse_model(text), np.random.default_rng(0), openvino_core()
    arrays = {name: rng.standard_normal(shape) for name, shape in {"w": (5, 8), "b": (5,), "v": (8, 5), "c": (3, 8)}.items()}
    arrays |= {"scales": np.full(5, 0.02), "more_scales": np.full(8, 0.02)}
    constants = {name: array.astype(np.float32) for name, array in arrays.items()}
    constants |= {"w8": (arrays["w"] * 40).astype(np.int8), "v8": (arrays["v"] * 40).astype(np.int8)}
    constants |= {"zeros": np.zeros(5, np.int8), "more_zeros": np.zeros(8, np.int8)}
    model.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in constants.items())
    before, after = (core.read_model(model.SerializeToString()) for _ in range(2))
    for batch in (2, 3):
        for one in (before, after):
            one.reshape([batch, 7, 8])
        assert convolve_linear_layers(after, batch) == (5 if batch == 2 else 0)
        x, config = rng.standard_normal((batch, 7, 8), dtype=np.float32), {"INFERENCE_PRECISION_HINT": "f32"}
        wanted, found = (core.compile_model(one, "CPU", config)([x]) for one in (before, after))
        for name, limit in (
            ("plain", 1e-5),
            ("last", 1e-5),
            ("logits", 1e-5),
            ("eight", 0.2),
        ):  # 8 bits may be rounded otherwise
            np.testing.assert_allclose(found[name], wanted[name], atol=limit)
        assert np.abs(wanted["eight"]).max() > 1


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="the system does not say which processors a thread may use")
def test_a_thread_keeps_its_processors(tmp_path: Path) -> None:
    """OpenVINO binds threads to the first processors while they compute: models with one thread would share a single one."""
    shape = [64, 64]
    values = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name in ("x", "y")]
    nodes = [
        onnx.helper.make_node("MatMul", ["x" if n == 0 else f"t{n}"] * 2, [f"t{n + 1}" if n < 19 else "y"]) for n in range(20)
    ]
    model = onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", values[:1], values[1:]), ir_version=9)
    onnx.save(model, tmp_path / "m.onnx")
    allowed, seen = os.sched_getaffinity(0), list[set[int]]()
    with OpenVino(tmp_path / "m.onnx", threads=1) as runtime:
        feeds = {"x": np.zeros(shape, np.float32)}
        worker = threading.Thread(target=lambda: [runtime.run(feeds) for _ in range(200)])
        worker.start()
        assert worker.native_id is not None
        while worker.is_alive():
            with contextlib.suppress(ProcessLookupError):
                seen.append(os.sched_getaffinity(worker.native_id))
    assert all(one == allowed for one in seen)
