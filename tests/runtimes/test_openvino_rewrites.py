"""Rewrites for the kernels of OpenVINO: the results stay the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="writes the graphs")
pytest.importorskip("openvino", reason="runs them")

from swin_deploy.machine import saturates  # noqa: E402 - after the checks
from swin_deploy.runtimes.openvino import openvino_core  # noqa: E402 - after the checks
from swin_deploy.runtimes.openvino_rewrites import (  # noqa: E402
    convolve_linear_layers,
    excluded_features,
    flatten_channels_last,
    fold_norms,
    norms_beside_residuals,
    pad_odd_windows,
    residuals_after_reshape,
    transpose_keys_in_matmul,
    usable_features,
)


def rewritten(rewrite: Callable[..., int], model: Any, *options: Any) -> int:
    changes = rewrite(model, *options)
    model.validate_nodes_and_infer_types()
    return changes


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
    assert rewritten(transpose_keys_in_matmul, model, bf16) == (bf16 or not scaled or tokens == 256)
    assert rewritten(transpose_keys_in_matmul, model, bf16) == 0
    feed = np.random.default_rng(0).standard_normal((2, 2, tokens, 3, 8), dtype=np.float32)
    found, wanted = (
        core.compile_model(one, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(list(feed))[0] for one in (model, plain)
    )
    np.testing.assert_allclose(found, wanted, atol=1e-6)


@pytest.mark.parametrize(
    ("tokens", "scores", "padded"),
    [
        (49, "biased = Add(product, bias) masked = Add(biased, mask) p = Softmax(masked)", True),
        (25, "scaled = Mul(product, scale) biased = Add(scaled, bias) p = Softmax(biased)", True),
        (49, "p = Softmax(product)", False),
        (49, "biased = Add(product, bias) p = Softmax<axis = 1>(biased)", False),
        (49, "biased = Mul(product, bias) p = Softmax(biased)", False),
        (16, "biased = Add(product, bias) p = Softmax(biased)", False),
        (9, "biased = Add(product, bias) p = Softmax(biased)", False),
    ],
)
def test_keys_of_windows_are_padded(tokens: int, scores: str, padded: bool) -> None:
    """Only if their number of tokens is odd, and if something is added to the scores."""
    text = f"""<ir_version: 9, opset_import: ["" : 19]>
        attention (float[2, {tokens}, 3, 8] query, float[2, {tokens}, 3, 8] key, float[2, {tokens}, 3, 8] value)
            => (float[2, 3, n, 8] y) <float scale = {{4.0}}> {{
        q = Transpose<perm = [0, 2, 1, 3]>(query)
        k = Transpose<perm = [0, 2, 3, 1]>(key)
        v = Transpose<perm = [0, 2, 1, 3]>(value)
        product = MatMul(q, k)
        {scores}
        y = MatMul(p, v)
    }}"""
    model, rng, core = onnx.parser.parse_model(text), np.random.default_rng(0), openvino_core()
    bias = rng.standard_normal((1, 3, tokens, tokens), dtype=np.float32)
    mask = np.where(rng.random((2, 1, tokens, tokens)) < 0.5, -100, 0).astype(np.float32)
    model.graph.initializer.extend(onnx.numpy_helper.from_array(*one) for one in ((bias, "bias"), (mask, "mask")))
    plain, changed = (core.read_model(model.SerializeToString()) for _ in range(2))
    for one in (plain, changed):
        rewritten(transpose_keys_in_matmul, one, True)
    assert rewritten(pad_odd_windows, changed) == padded
    feed = list(rng.standard_normal((3, 2, tokens, 3, 8), dtype=np.float32))
    for hint, limit in (("f32", 1e-6), ("bf16", 0.02)):
        config = {"INFERENCE_PRECISION_HINT": hint}
        wanted, found = (core.compile_model(one, "CPU", config)(feed)[0] for one in (plain, changed))
        np.testing.assert_allclose(found, wanted, atol=limit)


@pytest.mark.parametrize(
    ("rewrite", "changes", "body"),
    [
        (flatten_channels_last, 1, "flat = Reshape(image, map) y = Transpose<perm = [2, 0, 1]>(flat)"),
        (flatten_channels_last, 0, "flat = Reshape(image, map) y = Transpose<perm = [1, 0, 2]>(flat)"),
        (fold_norms, 1, "n = Norm(tokens, s, b) y = Gemm<transB = 1, alpha = 2.0>(n, w, s) z = Gemm<transB = 1>(n, w)"),
        (fold_norms, 0, "n = Norm(tokens, s, b) y = Gemm<transB = 1>(n, w, s) z = Relu(n)"),
        (norms_beside_residuals, 1, "n = Norm(tokens, s, b) y = Add(other, n) z = Relu(y)"),
        (norms_beside_residuals, 0, "n = Norm(tokens, s, b) y = Add(n, w) z = Relu(n)"),
        (residuals_after_reshape, 1, "t = Reshape(tokens, three) n = Norm(t, s, b) y = Identity(n) z = Add(tokens, other)"),
        (residuals_after_reshape, 0, "t = Reshape(tokens, three) n = Norm(t, s, b) y = Identity(n) z = Relu(t)"),
    ],
)  # fmt: skip
def test_rewrites_keep_the_results(rewrite: Callable[[Any], int], changes: int, body: str) -> None:
    shapes = {"image": (2, 6, 3, 4), "tokens": (6, 6), "other": (6, 6)}
    text = f"""<ir_version: 9, opset_import: ["" : 20]>
        network (float[2, 6, 3, 4] image, float[6, 6] tokens, float[6, 6] other) => (float[k, l, m] y, float[6, 6] z)
        <int64[3] map = {{2, 6, 12}}, int64[3] three = {{1, 6, 6}}> {{
            {body.replace("Norm", "LayerNormalization")} }}"""
    model, rng, core = onnx.parser.parse_model(text), np.random.default_rng(0), openvino_core()
    read = {name for node in model.graph.node for name in node.input}
    written = {name for node in model.graph.node for name in node.output}
    for kept, values in ((read, model.graph.input), (written, model.graph.output)):
        for value in [one for one in values if one.name not in kept]:
            values.remove(value)
    for output in model.graph.output:
        output.type.tensor_type.ClearField("shape")
    for name, shape in {"s": (6,), "b": (6,), "w": (6, 6)}.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name))
    plain, changed = (core.read_model(model.SerializeToString()) for _ in range(2))
    assert rewritten(rewrite, changed) == changes
    feed = {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items() if name in read}
    wanted, found = (core.compile_model(one, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(feed) for one in (plain, changed))
    for output in model.graph.output:
        np.testing.assert_allclose(found[output.name], wanted[output.name], atol=1e-5)


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
        assert rewritten(convolve_linear_layers, after, batch, 7 * batch + 1) == 0
        assert rewritten(convolve_linear_layers, after, batch, 7 * batch) == (5 if batch == 2 else 0)
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


@pytest.mark.parametrize(
    ("limit", "wanted"),
    [
        ("", ("AVX2", "AVX-512", "AVX-VNNI", "AVX-512 VNNI", "AVX-512 bf16", "AMX bf16")),
        ("avx512_core_vnni", ("AVX2", "AVX-512", "AVX-VNNI", "AVX-512 VNNI")),
        ("AVX2", ("AVX2",)),
        ("AVX2_VNNI", ("AVX2", "AVX-VNNI")),
        ("AVX512_CORE", ("AVX2", "AVX-512")),
        ("AVX512_CORE_AMX", ("AVX2", "AVX-512", "AVX-VNNI", "AVX-512 VNNI", "AVX-512 bf16", "AMX bf16")),
    ],
)
def test_features_that_onednn_may_use(limit: str, wanted: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenVINO reports bf16 whatever ONEDNN_MAX_CPU_ISA is, and is several times slower if it uses it then."""
    every = ("AVX2", "AVX-512", "AVX-VNNI", "AVX-512 VNNI", "AVX-512 bf16", "AMX bf16")
    monkeypatch.setattr("swin_deploy.runtimes.openvino_rewrites.processor_features", lambda: every)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    assert usable_features() == wanted
    assert bool(excluded_features()) == ("AMX bf16" not in wanted)  # also where the features of the processor are not known
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert saturates(usable_features()) == (limit in ("AVX2", "AVX512_CORE"))


def test_processors_whose_sums_saturate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "AMD64")
    monkeypatch.setattr("swin_deploy.machine._cpuinfo", lambda: "flags: sse4_1")
    assert saturates(("AVX2", "AVX-512"))
    assert saturates(())
    assert not saturates(("AVX2", "AVX-VNNI"))
    monkeypatch.setattr("swin_deploy.machine._cpuinfo", lambda: "")  # unknown, as on Windows
    assert not saturates(())
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert not saturates(("NEON",))
