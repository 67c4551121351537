"""INT8 graphs for CPU back ends: Q/DQ in the right places, what the runtimes make of it, accuracy, resumed runs, refusals."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from cli.exported import digits, digits_split
from onnx.reference import ReferenceEvaluator
from tiny_mlp import Array, mlp_model, run, samples

from swin_deploy.bundle import PREPROCESSOR, Bundle
from swin_deploy.calib.accuracy_gate import rank_layers
from swin_deploy.dependencies import EXACT_SUMS
from swin_deploy.errors import InputError, UsageError
from swin_deploy.exporters.external_data import add_metadata
from swin_deploy.exporters.quantization import for_cpu, layerwise
from swin_deploy.exporters.quantization.for_cpu import CpuGraphs, norms_of_three_axes, quantize_for_cpu, small_layers
from swin_deploy.exporters.quantization.qdq import linear_layers
from swin_deploy.exporters.quantization.resume import ResumeState
from swin_deploy.parity import sqnr
from swin_deploy.preprocess import Preprocessor
from swin_deploy.reporting.activation_ranges import quantized_activations
from swin_deploy.runtimes.backends import runtime_from_onnx
from swin_deploy.runtimes.onnxruntime import OnnxRuntime
from swin_deploy.runtimes.openvino import openvino_core


@pytest.fixture(scope="module")
def quantized() -> CpuGraphs:
    return quantize_for_cpu(mlp_model(), "onnxruntime", samples())


def test_linear_layers_are_found_and_named() -> None:
    layers = linear_layers(mlp_model())
    assert [(layer.name, layer.input, layer.output, layer.bias) for layer in layers] == [
        ("fc1", "normed", "hidden", "b1"),
        ("fc2", "gelu", "update", None),
    ]


def test_only_the_inputs_of_linear_layers_are_quantized(quantized: CpuGraphs) -> None:
    model = quantized.model()
    onnx.checker.check_model(model, full_check=True)
    assert [node.op_type for node in model.graph.node] == (
        ["LayerNormalization", "QuantizeLinear"] + 3 * ["DequantizeLinear"] + ["Gemm", "Gelu", "QuantizeLinear"]
        + 3 * ["DequantizeLinear"] + ["Gemm", "Add"]
    )  # fmt: skip
    assert {node.domain for node in model.graph.node} == {""}
    feed = next(iter(samples()()))
    assert sqnr(ReferenceEvaluator(model).run(None, feed)[0], run(model, feed, exact=True)) > 80


def test_onnx_runtime_makes_one_node_of_each_layer(quantized: CpuGraphs, tmp_path: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    model = quantized.model()
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    operators = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert operators == ["LayerNormalization", "QuantizeLinear", "QGemm", "Gelu", "QuantizeLinear", "QGemm", "Add"]
    feed = next(iter(samples()()))
    assert sqnr(run(model, feed, exact=True), run(model, feed)) > 60


def test_openvino_computes_linear_layers_in_8_bits(quantized: CpuGraphs, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    model = replace(quantized, zero_in_bias=True).model()
    values = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    zeros = [values[node.input[2]] for node in model.graph.node if node.op_type == "DequantizeLinear"]
    assert not any(map(np.any, zeros))
    assert any(values[node.input[2]] for node in model.graph.node if node.op_type == "QuantizeLinear")
    assert quantized_activations(model, tmp_path) == quantized_activations(quantized.model(), tmp_path)
    reshaped = norms_of_three_axes(model, {layer.layer.input for layer in quantized.layers.values()})
    onnx.checker.check_model(reshaped, full_check=True)
    feed = next(iter(samples()()))
    np.testing.assert_array_equal(run(reshaped, feed), run(model, feed))
    assert sqnr(run(quantized.model(), feed, exact=True), run(model, feed, exact=True)) > 90
    (tmp_path / "model.onnx").write_bytes(reshaped.SerializeToString())
    compiled = openvino_core().compile_model(str(tmp_path / "model.onnx"), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    kinds = [op.get_rt_info() for op in compiled.get_runtime_model().get_ops()]
    layers = [info["primitiveType"].astype(str) for info in kinds if info["layerType"].astype(str) == "FullyConnected"]
    assert not any("DequantizationSubtract" in info["originalLayersNames"].astype(str) for info in kinds)
    assert len(layers) == 2
    assert all(layer.lower().endswith("i8") for layer in layers), layers
    found = np.array(compiled(feed)["y"])
    assert sqnr(run(model, feed, exact=True), found) > 40


def test_openvino_keeps_small_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    assert small_layers(mlp_model()) == {"fc1", "fc2"}
    monkeypatch.setattr(for_cpu, "SMALL", 16 * 40 - 1)
    assert small_layers(mlp_model()) == frozenset()


def test_sums_that_do_not_fit_into_16_bits_do_not_saturate(
    quantized: CpuGraphs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As they would on processors without VNNI: ONNX Runtime has slower kernels for them, and OpenVINO computes in fp32."""
    pytest.importorskip("openvino")
    fc1 = quantized.layers["fc1"]
    large = replace(fc1, values=np.where(fc1.values < 0, -127, 127).astype(np.int8), scale=fc1.scale / 2)
    too_large = replace(quantized, layers={**quantized.layers, "fc1": large}, zero_in_bias=True)
    assert quantized.fits_16_bits()
    assert not too_large.fits_16_bits()
    assert too_large.fits_16_bits({"fc1"})
    feed, path = next(iter(samples()())), tmp_path / "model.onnx"
    path.write_bytes(too_large.model().SerializeToString())
    wanted = run(too_large.model(), feed, exact=True)
    for backend in ("onnxruntime", "openvino"):
        with runtime_from_onnx(path, backend) as runtime:
            assert sqnr(wanted, runtime.run(feed)["y"]) > 40
    for bits, old, config in (("16", True, {EXACT_SUMS: "0"}), ("16", False, {}), ("", True, {})):
        monkeypatch.setattr("swin_deploy.runtimes.onnxruntime.saturates", lambda _, old=old: old)
        path.write_bytes(quantized.model().SerializeToString())
        add_metadata(path, {"sum_bits": bits})
        with OnnxRuntime(path) as runtime:
            assert runtime._config == config
            assert sqnr(run(quantized.model(), feed, exact=True), runtime.run(feed)["y"]) > 60


def test_each_layer_can_be_left_out(quantized: CpuGraphs) -> None:
    feed = next(iter(samples(1)()))
    assert sqnr(run(mlp_model(), feed), run(quantized.model(set(quantized.layers)), feed)) > 100
    ranking = rank_layers(tuple(quantized.layers), lambda keep: run(quantized.model(keep), feed, exact=True))
    assert {layer.name for layer in ranking} == {"fc1", "fc2"}
    assert ranking[0].sqnr_db <= ranking[1].sqnr_db
    alone = quantize_for_cpu(mlp_model(), "onnxruntime", samples(), keep={"fc2"}).model()
    by_name = {layer.name: layer.sqnr_db for layer in ranking}
    assert by_name["fc1"] == pytest.approx(sqnr(run(mlp_model(), feed), run(alone, feed, exact=True)), abs=0.5)


def test_a_method_chooses_ranges(quantized: CpuGraphs) -> None:
    """minmax spans all values, and without a method the range is narrower."""
    by_extremes = quantize_for_cpu(mlp_model(), "onnxruntime", samples(), "minmax")
    for name, layer in by_extremes.layers.items():
        assert layer.activation.scale >= quantized.layers[name].activation.scale


@functools.cache
def digit_pixels() -> tuple[Array, Array, Array]:
    """Pixels of 64 digits to calibrate with and of the 450 held out, and the digits of these."""
    pytest.importorskip("sklearn", reason="scikit-learn brings the images of the digits")
    data = digits_split()
    prepare = Preprocessor.from_dict(Bundle.open(digits(1)).read_json(PREPROCESSOR))
    return prepare(list(data.train_images[:64])), prepare(list(data.test_images)), data.test_digits


@pytest.mark.parametrize("version", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_digits_keep_their_answers(version: int) -> None:
    """The best of the baselines with their defaults reaches 36 dB: benchmarks/quantization.py."""
    calibration, test, wanted = digit_pixels()

    def feeds() -> Iterator[dict[str, Array]]:
        return ({"pixel_values": calibration[i : i + 32]} for i in (0, 32))

    model = onnx.load(digits(version) / "onnx/model.onnx")
    quantized = quantize_for_cpu(model, "onnxruntime", feeds)
    assert set(quantized.layers) == {layer.name for layer in linear_layers(model)} - {"classifier"}
    assert [record["name"] for record in quantized.records] == list(quantized.layers)
    reference, found = run(model, {"pixel_values": test}), run(quantized.model(), {"pixel_values": test})
    assert sqnr(reference, found) > 44
    right = [(outputs.argmax(1) == wanted).mean() for outputs in (reference, found)]
    assert right[1] >= right[0] - 0.003


@pytest.mark.parametrize(
    ("feeds", "keep", "error", "part"),
    [
        (lambda: iter(()), frozenset(), InputError, "no samples"),
        (lambda: iter([{"x": np.full((4, 16), np.nan, np.float32)}]), frozenset(), InputError, "not finite"),
        (lambda: pytest.fail("samples were read"), {"fc3"}, UsageError, 'Unknown layer "fc3". Choose one of: fc1, fc2'),
    ],
)
def test_refusals(feeds: Any, keep: set[str], error: type[Exception], part: str) -> None:
    with pytest.raises(error, match=part):
        quantize_for_cpu(mlp_model(), "onnxruntime", feeds, keep=keep)


def test_an_interrupted_run_resumes_and_gives_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calibration, _, _ = digit_pixels()
    model = onnx.load(digits(2) / "onnx/model.onnx")
    quantized = functools.partial(
        quantize_for_cpu, model, "onnxruntime", lambda: ({"pixel_values": calibration[i : i + 16]} for i in (0, 16))
    )
    rounded: list[int] = []
    real = for_cpu.rounded_linear
    stop_after = 1000

    def rounded_linear(*given: Any) -> Any:
        if len(rounded) == stop_after:
            raise KeyboardInterrupt
        rounded.append(1)
        return real(*given)

    monkeypatch.setattr(for_cpu, "rounded_linear", rounded_linear)
    whole = quantized()
    groups, layers = len(rounded), len(whole.layers)
    stop_after = groups + 5
    with pytest.raises(KeyboardInterrupt):
        quantized(resume=ResumeState.for_run(tmp_path, model, "a"))
    [folder] = tmp_path.iterdir()
    kept = sorted(folder.iterdir())
    assert 5 <= len(kept) < layers
    kept[0].write_bytes(kept[0].read_bytes()[:-40])  # damaged: its layer is quantized again, and no other
    rounded.clear()
    stop_after = 1000
    resumed = quantized(resume=ResumeState.for_run(tmp_path, model, "a"))
    assert len(rounded) == groups - 5 + 1
    assert resumed.model().SerializeToString(deterministic=True) == whole.model().SerializeToString(deterministic=True)
    assert resumed.records == whole.records
    assert not folder.exists()
    monkeypatch.setattr(layerwise, "HELD", 1 << 16)  # most arrays are kept in files
    assert quantized().model().SerializeToString(deterministic=True) == whole.model().SerializeToString(deterministic=True)
    layer = linear_layers(model)[0]
    ResumeState.for_run(tmp_path, model, "a").save(whole.layers[layer.name])
    assert ResumeState.for_run(tmp_path, model, "b").read([layer]) is None
