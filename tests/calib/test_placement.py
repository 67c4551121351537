"""Where Q/DQ stands, and what ONNX Runtime and OpenVINO make of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx.reference import ReferenceEvaluator
from tiny_graphs import mlp_model, run, samples

from swin_deploy.exporters.quantization.equalization import Graph, channels_of, fold
from swin_deploy.exporters.quantization.for_cpu import Options, Quantized, norms_of_three_axes, quantize, small_layers
from swin_deploy.exporters.quantization.qdq import linear_layers
from swin_deploy.parity import sqnr


@pytest.fixture(scope="module")
def quantized() -> Quantized:
    return quantize(mlp_model(), samples())


def test_linear_layers_are_found_and_named() -> None:
    layers = linear_layers(mlp_model())
    assert [(layer.name, layer.input, layer.output, layer.bias) for layer in layers] == [
        ("fc1", "normed", "hidden", "b1"),
        ("fc2", "gelu", "update", None),
    ]


def test_quantise_stands_before_linear_layers_alone(quantized: Quantized) -> None:
    onnx.checker.check_model(quantized.model, full_check=True)
    operators = [node.op_type for node in quantized.model.graph.node]
    assert operators == (
        ["LayerNormalization", "QuantizeLinear"] + 3 * ["DequantizeLinear"] + ["Gemm", "Gelu", "QuantizeLinear"]
        + 3 * ["DequantizeLinear"] + ["Gemm", "Add"]
    )  # fmt: skip
    assert {node.domain for node in quantized.model.graph.node} == {""}


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_the_graph_means_what_the_standard_says(kind: str) -> None:
    model = quantize(mlp_model(), samples(), Options(kind=kind)).model
    feed = next(iter(samples()()))
    wanted = ReferenceEvaluator(model).run(None, feed)[0]
    assert sqnr(wanted, run(model, feed, exact=True)) > 80


def test_onnx_runtime_makes_one_node_of_each_layer(quantized: Quantized, tmp_path: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(quantized.model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    operators = [node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node]
    assert operators == ["LayerNormalization", "QuantizeLinear", "QGemm", "Gelu", "QuantizeLinear", "QGemm", "Add"]
    feed = next(iter(samples()()))
    assert sqnr(run(quantized.model, feed, exact=True), run(quantized.model, feed)) > 60


def test_openvino_computes_linear_layers_in_8_bits(quantized: Quantized, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    from swin_deploy.runtimes.openvino import openvino_core

    form = norms_of_three_axes(quantized.model, quantized.scales.keys())
    onnx.checker.check_model(form, full_check=True)
    feed = next(iter(samples()()))
    np.testing.assert_array_equal(run(form, feed), run(quantized.model, feed))
    (tmp_path / "model.onnx").write_bytes(form.SerializeToString())
    compiled = openvino_core().compile_model(str(tmp_path / "model.onnx"), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    kinds = [op.get_rt_info() for op in compiled.get_runtime_model().get_ops()]
    layers = [info["primitiveType"].astype(str) for info in kinds if info["layerType"].astype(str) == "FullyConnected"]
    assert len(layers) == 2
    assert all(layer.lower().endswith("i8") for layer in layers), layers
    found = np.array(compiled(feed)["y"])
    assert sqnr(run(quantized.model, feed, exact=True), found) > 40


def test_small_layers_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert small_layers(mlp_model()) == {"fc1", "fc2"}
    monkeypatch.setattr("swin_deploy.exporters.quantization.for_cpu.SMALL", 16 * 40)
    assert small_layers(mlp_model()) == frozenset()


def test_channels_are_balanced_and_the_network_stays() -> None:
    model = mlp_model()
    sets = {one.width: one for one in channels_of(Graph(model), linear_layers(model))}
    assert sets[16].written == {("scale", 0, 0, 16), ("shift", 0, 0, 16)}
    assert sets[16].read == {"w1"}
    assert sets[40].after == {"gelu"}  # nothing before a Gelu can take a factor: a Mul behind it
    feed = next(iter(samples()()))
    wanted = run(model, feed)
    for one in sets.values():
        fold(model, one, np.random.default_rng(1).uniform(0.2, 5, one.width).astype(np.float32))
    onnx.checker.check_model(model, full_check=True)
    np.testing.assert_allclose(run(model, feed), wanted, rtol=1e-4, atol=1e-5)
    assert [node.op_type for node in model.graph.node].count("Mul") == 1
