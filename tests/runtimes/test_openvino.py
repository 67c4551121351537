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

from swin_deploy.runtimes.openvino import OpenVino  # noqa: E402 - after the checks

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
