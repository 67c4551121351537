"""Channel equalization: the network computes the same, and 8 bits suit its channels better."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from small_graphs import model_from_text
from tiny_mlp import mlp_model, run, samples

from swin_deploy.exporters.quantization import for_cpu
from swin_deploy.exporters.quantization.equalization import GraphIndex, channels_of, equalize, equalized
from swin_deploy.exporters.quantization.for_cpu import quantize_for_cpu
from swin_deploy.exporters.quantization.gptq import input_moments
from swin_deploy.exporters.quantization.qdq import linear_layers
from swin_deploy.parity import sqnr

RNG = np.random.default_rng(0)


def test_any_factors_leave_the_network_as_it_is() -> None:
    model = mlp_model()
    sets = {one.width: one for one in channels_of(GraphIndex(model), linear_layers(model))}
    assert sets[16].written == {("scale", 0, 0, 16), ("shift", 0, 0, 16)}
    assert sets[16].read == {"w1"}
    assert sets[40].after == {"gelu"}  # nothing before a Gelu can take a factor: a Mul after it
    feed = next(iter(samples()()))
    wanted = run(model, feed)
    for one in sets.values():
        equalize(model, one, np.random.default_rng(1).uniform(0.2, 5, one.width).astype(np.float32))
    onnx.checker.check_model(model, full_check=True)
    np.testing.assert_allclose(run(model, feed), wanted, rtol=1e-4, atol=1e-5)
    assert [node.op_type for node in model.graph.node].count("Mul") == 1


def test_equalization_for_cpu_gains(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two channels are 20 times as large as the others: fc1 takes what LayerNormalization gives up."""
    feed = next(iter(samples()()))
    large = mlp_model(large=20)
    wanted = run(large, feed)
    quantized = quantize_for_cpu(large, "onnxruntime", samples(), keep={"fc2"})
    assert [node.op_type for node in quantized.base.graph.node] == [node.op_type for node in large.graph.node]
    assert sqnr(wanted, run(quantized.base, feed)) > 110
    monkeypatch.setattr(for_cpu, "equalized_for_cpu", lambda model, *_: (model, {}))
    without = quantize_for_cpu(large, "onnxruntime", samples(), keep={"fc2"})
    assert sqnr(wanted, run(quantized.model(), feed)) > 3 + sqnr(wanted, run(without.model(), feed))


def test_powers_of_two_leave_the_network_as_it_is_to_the_bit() -> None:
    """A norm with one channel 20 times larger, which two layers read, one of them not quantized."""
    scale, shift = RNG.uniform(0.5, 2, 8), RNG.standard_normal(8)
    scale[3] *= 20
    constants = {"scale": scale, "shift": shift, "w1": RNG.standard_normal((6, 8)), "w2": RNG.standard_normal((5, 8))}
    constants["w1"][:, 3] /= 4
    text = """g (float[n, 8] x) => (float[n, 6] a, float[n, 5] b) {
        normed = LayerNormalization <axis = -1> (x, scale, shift)
        ["qkv/Gemm"] a = Gemm <transB = 1> (normed, w1)
        ["other/Gemm"] b = Gemm <transB = 1> (normed, w2)
    }"""
    model = model_from_text(text, **{name: value.astype(np.float32) for name, value in constants.items()})
    x = RNG.standard_normal((400, 8)).astype(np.float32)
    before = input_moments(model, {"qkv": "normed"}, [{"x": x}], 1)
    made, after = equalized(model, before)
    for name in ("a", "b"):
        np.testing.assert_array_equal(run(model, {"x": x}, output=name), run(made, {"x": x}, output=name))
    amax = before["qkv"].amax, after["qkv"].amax
    factors = amax[0] / amax[1]
    np.testing.assert_array_equal(factors, np.exp2(np.rint(np.log2(factors))))
    assert factors[3] == factors.max() > 2
    assert amax[1].max() / np.median(amax[1]) < 0.5 * amax[0].max() / np.median(amax[0])
    again = input_moments(made, {"qkv": "normed"}, [{"x": x}], 1)["qkv"]
    np.testing.assert_allclose(after["qkv"].gram, again.gram, rtol=1e-5, atol=1e-2)
    np.testing.assert_allclose(after["qkv"].total, again.total, rtol=1e-4, atol=1e-3)
    np.testing.assert_array_equal(amax[1], again.amax)
