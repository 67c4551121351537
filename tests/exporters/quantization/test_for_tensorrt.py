"""INT8 and FP8 graphs for TensorRT: what the rewrites change, the distance from fp32, and what the compiler makes of them."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from cli.exported import EXAMPLES, digits
from onnx import TensorProto, helper
from traced import CONFIGS, EVERYTHING, LOGITS, PADDED, V1, WHOLE
from traced import traced_once as fp32

from swin_deploy.bundle import PREPROCESSOR, Bundle
from swin_deploy.config import SwinConfig
from swin_deploy.dependencies import onnxruntime_session
from swin_deploy.errors import EngineError, ExportError, UsageError
from swin_deploy.exporters.engines.engine_from_onnx import engine_from_onnx
from swin_deploy.exporters.passes import attention
from swin_deploy.exporters.passes.layer_norms import norm_after_matmul
from swin_deploy.exporters.precision import typed_from_fp32
from swin_deploy.exporters.quantization.for_tensorrt import quantized_from_fp32, quantized_layers
from swin_deploy.exporters.quantization.qdq import TensorRTWriter
from swin_deploy.exporters.typed_graphs import config_and_task
from swin_deploy.machine import saturates
from swin_deploy.options import EngineSpec
from swin_deploy.parity import sqnr
from swin_deploy.preprocess import Preprocessor
from swin_deploy.runtimes.emulate import emulated
from swin_deploy.runtimes.openvino_rewrites import usable_features

ort = pytest.importorskip("onnxruntime", reason="ONNX Runtime runs the graphs")
openvino = pytest.importorskip("openvino", reason="so does OpenVINO")

BOTH = pytest.mark.parametrize("version", [1, 2])
FORMATS = pytest.mark.parametrize("precision", ["int8", "fp8"])


@cache
def trained(version: int) -> tuple[SwinConfig, Any, Any]:
    """Of the network in `examples/`: its config, its fp32 graph, and ten images."""
    bundle = Bundle.open(digits(version))
    model = onnx.shape_inference.infer_shapes(onnx.load(bundle.path / "onnx/model.onnx"))
    prepare = Preprocessor.from_dict(bundle.read_json(PREPROCESSOR))
    images = prepare([str(file) for file in sorted((EXAMPLES / "digits/images").glob("*.png"))])
    return config_and_task(bundle)[0], model, images


def noise(size: tuple[int, int]) -> Any:
    return np.random.default_rng(0).standard_normal((4, 3, *size), dtype=np.float32)


def answers(model: Any, pixels: Any = None, names: list[str] | None = None) -> dict[str, Any]:
    off = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime_session(model.SerializeToString(), threads=1, graph_optimization_level=off)
    names = names or [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {"pixel_values": noise(WHOLE) if pixels is None else pixels}), strict=True))


def extremes(model: Any, names: list[str], pixels: Any) -> dict[str, float]:
    """Of the images that the tests compare with: what is measured there is rounding, not the choice of a range."""
    return {name: float(np.abs(values).max()) for name, values in watched(model, names, pixels).items()}


def watched(model: Any, names: list[str], pixels: Any) -> dict[str, Any]:
    """The values of tensors inside the graph."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    copy.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in names)
    return answers(copy, pixels, names)


def quantized_inputs(model: Any, config: SwinConfig, precision: str) -> list[str]:
    """The tensors whose amax is needed, each once."""
    return list(dict.fromkeys(name for layer in quantized_layers(model, config, precision) for name in layer.inputs))


@cache
def amax(version: int, precision: str, size: tuple[int, int] = WHOLE) -> dict[str, float]:
    model = fp32(CONFIGS[version], size)
    return extremes(model, quantized_inputs(model, CONFIGS[version], precision), noise(size))


@cache
def quantized(version: int, precision: str, low: str = "fp16", size: tuple[int, int] = WHOLE) -> Any:
    ranges, config = amax(version, precision, size), CONFIGS[version]
    return quantized_from_fp32(fp32(config, size), config, LOGITS, precision, ranges, low)[0]


def relative(found: Any, wanted: Any) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


@FORMATS
@BOTH
def test_trained_networks_stay_close_to_fp32(version: int, precision: str) -> None:
    """The digits' networks on ten drawn digits. Random networks, which the tests below run, are 10 dB and more worse."""
    config, model, pixels = trained(version)
    wanted = answers(model, pixels)["logits"]
    names = quantized_inputs(model, config, precision)
    made, _ = quantized_from_fp32(model, config, LOGITS, precision, extremes(model, names, pixels))
    # Every node rounded, and by the runtime's own half-precision kernels.
    every = [answers(graph, pixels)["logits"] for graph in (emulated(made), made)]
    if precision == "int8" and not saturates(usable_features()):  # in bf16 its roundings are wrong
        core, hint = openvino.Core(), {"INFERENCE_PRECISION_HINT": "f32"}
        every.append(core.compile_model(core.read_model(made.SerializeToString()), "CPU", hint)([pixels])["logits"])
    for found in every:
        print(f"V{version} {precision}: {sqnr(wanted, found):.1f} dB")
        assert sqnr(wanted, found) >= {"int8": 36, "fp8": 27}[precision]
        assert np.array_equal(found.argmax(axis=1), wanted.argmax(axis=1))


@FORMATS
@BOTH
def test_padding_costs_nothing(version: int, precision: str) -> None:
    config, found = CONFIGS[version], []
    for size in (WHOLE, PADDED):
        wanted = answers(fp32(config, size), noise(size))["logits"]
        found.append(sqnr(wanted, answers(emulated(quantized(version, precision, size=size)), noise(size))["logits"]))
    assert found[1] >= found[0] - 3


@FORMATS
@BOTH
def test_what_is_kept_is_not_quantized(version: int, precision: str) -> None:
    config = CONFIGS[version]
    model, wanted = fp32(config), answers(fp32(config))["logits"]
    layers = {layer.name for layer in quantized_layers(model, config, precision)}
    none, _ = quantized_from_fp32(model, config, LOGITS, precision, {}, keep=layers)
    assert not {"QuantizeLinear", "DequantizeLinear"} & {node.op_type for node in none.graph.node}
    assert relative(answers(emulated(none))["logits"], wanted) < 1e-2
    kept = {name for name in layers if name.endswith((".qkv", "attention"))}
    some, _ = quantized_from_fp32(model, config, LOGITS, precision, amax(version, precision), keep=kept)
    every = emulated(quantized(version, precision))
    assert sqnr(wanted, answers(emulated(some))["logits"]) > sqnr(wanted, answers(every)["logits"])


@FORMATS
@BOTH
def test_layers_and_the_tensors_that_they_need(version: int, precision: str) -> None:
    config, model = CONFIGS[version], fp32(CONFIGS[version])
    layers = quantized_layers(model, config, precision)
    names = quantized_inputs(model, config, precision)
    assert len(names) == len(set(names))
    assert set(names) <= {name for node in model.graph.node for name in node.output}
    kinds = [layer.name.rpartition(".")[2] for layer in layers]
    for kind, count in {"qkv": 3, "proj": 3, "fc2": 3, "reduction": 1, "classifier": 1, "fc1": 0}.items():
        assert kinds.count(kind) == count, kind
    assert kinds.count("attention") == (3 if version == 2 else 0)
    stored = [node for node in quantized(version, precision).graph.node if node.op_type == "DequantizeLinear"]
    weights = [node for node in stored if ".weight" in node.input[0]]
    unquantized = 3 if (version, precision) == (1, "int8") else 0  # projections, whose residual saves more bytes
    assert len(weights) == 11 + (6 if version == 1 else 0) - unquantized


@FORMATS
@BOTH
def test_the_graph_is_valid_and_the_fp32_one_left_alone(version: int, precision: str) -> None:
    wide = fp32(CONFIGS[version])
    before = wide.SerializeToString(deterministic=True)
    model = quantized(version, precision)
    assert wide.SerializeToString(deterministic=True) == before
    onnx.checker.check_model(model, full_check=True)
    assert model.graph.name.endswith(f"_{precision}_for_tensorrt")
    assert "in bf16, its default on some processors, it gives wrong results" in model.doc_string
    assert (list(model.graph.input), list(model.graph.output)) == (list(wide.graph.input), list(wide.graph.output))
    names = [node.name for node in model.graph.node]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(("case", "by_row"), [("whole", True), ("padded", False), ("every output", True), ("no bias", True)])
def test_rewrites_of_v1_change_no_answer(case: str, by_row: bool) -> None:
    config = replace(V1, qkv_bias=False) if case == "no bias" else V1
    size, task = (WHOLE if case == "whole" else PADDED), (EVERYTHING if case == "every output" else LOGITS)
    graph = gs.import_onnx(fp32(config, size, task))
    assert len(attention.equalized_attention(graph, by_row)) == 3
    assert attention.value_bias_in_projection(graph) == 3
    assert attention.query_bias_in_channel(graph, {node.name: 5.0 for node in graph.nodes}) == 3
    assert norm_after_matmul(graph, set()) == 3
    rewritten = gs.export_onnx(graph.cleanup().toposort())
    wanted, found = (answers(model, noise(size)) for model in (fp32(config, size, task), rewritten))
    for name in wanted:
        assert relative(found[name], wanted[name]) < 2e-5, name
    if not by_row:
        return
    for node in graph.nodes:  # rows of query and key are of one size, pair by pair, and those of the values of the largest
        if node.name.endswith("qkv/Gemm"):
            assert len(node.inputs) == 2 or not np.any(node.inputs[2].values)


def test_rows_are_brought_to_one_size() -> None:
    graph = gs.import_onnx(fp32(V1))
    attention.equalized_attention(graph, values_by_row=True)
    rows = [np.abs(n.inputs[1].values).max(axis=1).reshape(3, -1) for n in graph.nodes if n.name.endswith("qkv/Gemm")]
    assert len(rows) == 3
    for query, key, value in rows:
        np.testing.assert_allclose(query, key, rtol=1e-5)
        np.testing.assert_allclose(value, max(query.max(), key.max()), rtol=1e-5)


def test_the_quantization_in_an_epilogue_is_that_of_onnx() -> None:
    """Against ONNX Runtime's QuantizeLinear, values beyond the range included; ties, which it rounds to even, left out."""
    values = np.random.default_rng(0).uniform(-5, 5, 10000).astype(np.float32)
    limit = 127 / 32.0
    values = values[np.abs(np.abs(values * 32) % 1 - 0.5) > 1e-4]
    found = []
    for method in ("in_epilogue", "activation"):
        read = gs.Variable("x", np.float32, values.shape)
        graph = gs.Graph([], [read], [], opset=21, ir_version=10)
        written = getattr(TensorRTWriter(graph, "int8", np.dtype(np.float16)), method)(read, limit)
        written.shape = values.shape
        graph.outputs = [written]
        session = ort.InferenceSession(gs.export_onnx(graph.toposort()).SerializeToString(), providers=["CPUExecutionProvider"])
        found.append(session.run(None, {"x": values})[0])
    found[1] = np.maximum(found[1], -limit)  # ONNX has one more negative number, which a symmetric range leaves out
    np.testing.assert_array_equal(*found)
    assert (np.abs(found[0]).max(), len(np.unique(found[0]))) == (limit, 255)


def test_scales_of_weights_that_are_given_are_used() -> None:
    layer, step = "stages.0.steps.block0.fc2", 2.0**-9
    given = {layer: step}
    model, _ = quantized_from_fp32(fp32(V1), V1, LOGITS, "int8", amax(1, "int8"), weight_scales=given)
    (node,) = [n for n in model.graph.node if n.name == f"{layer}.weight/DequantizeLinear"]
    tables = {table.name: onnx.numpy_helper.to_array(table) for table in model.graph.initializer}
    assert np.all(tables[node.input[1]] == np.float16(step))
    (wanted,) = [onnx.numpy_helper.to_array(t) for t in fp32(V1).graph.initializer if t.name == f"{layer}.weight"]
    np.testing.assert_array_equal(tables[node.input[0]], np.clip(np.rint(wanted / step), -128, 127))


@pytest.mark.parametrize("value", [None, 0.0, -1.0, float("nan"), float("inf")])
def test_an_invalid_amax_is_refused(value: float | None) -> None:
    ranges = dict(amax(1, "int8"))
    name = next(iter(ranges))
    del ranges[name]
    if value is not None:
        ranges[name] = value
    with pytest.raises(ExportError, match=rf'amax of "{name}" is .*Expected a positive number'):
        quantized_from_fp32(fp32(V1), V1, LOGITS, "int8", ranges)


@BOTH
@FORMATS
def test_a_rounding_is_told_what_each_layer_reads(version: int, precision: str) -> None:
    """The inputs of the linear layers of the new graph are those of the fp32 graph, changed as the rounding was told."""
    config, model, images = trained(version)
    told: dict[str, Any] = {}

    def rounding(layer: str, weight: Any, steps: Any, change: Any) -> None:
        assert len(steps) == len(weight)
        told[layer] = change

    ranges = extremes(model, quantized_inputs(model, config, precision), images)
    made, _ = quantized_from_fp32(model, config, LOGITS, precision, ranges, rounding=rounding)
    layers = quantized_layers(model, config, precision)
    assert {layer.name for layer in layers if layer.inputs and not layer.name.endswith("attention")} <= told.keys()
    told.pop("classifier")
    before, after = (
        {n.name.rpartition("/")[0]: n.input[0] for n in m.graph.node if n.op_type == "Gemm"} for m in (model, made)
    )
    after |= {name[:-2]: tensor for name, tensor in after.items() if name.endswith(".q")}
    old, new = (watched(m, sorted({names[layer] for layer in told}), images) for m, names in ((model, before), (made, after)))
    for layer, change in told.items():
        wanted = (old[before[layer]] - change.shift) * change.factor
        for channel, value in change.constants.items():
            wanted[..., channel] = value
        found = new[after[layer]].reshape(wanted.shape).astype(np.float32)
        assert np.linalg.norm(found - wanted) < 0.1 * np.linalg.norm(wanted), layer


def test_names_that_do_not_exist_are_refused() -> None:
    with pytest.raises(UsageError, match=r'Unknown quantized precision "int4". Choose one of: int8, fp8'):
        quantized_layers(fp32(V1), V1, "int4")
    with pytest.raises(UsageError, match=r'Unknown layer "head". Choose one of: classifier,'):
        quantized_from_fp32(fp32(V1), V1, LOGITS, "int8", amax(1, "int8"), keep={"head"})
    with pytest.raises(UsageError, match='Unknown layer "fc9"'):
        quantized_from_fp32(fp32(V1), V1, LOGITS, "int8", amax(1, "int8"), weight_scales={"fc9": 1.0})


def compiled(model: Any, gpu: str = "sm_89") -> Any:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for value in (*copy.graph.input, *copy.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    del copy.graph.value_info[:]
    return engine_from_onnx(copy.SerializeToString(), EngineSpec(backend="tensorrt-rtx", gpus=gpu)).report


@BOTH
def test_the_compiler_makes_no_more_kernels_than_in_fp16_and_moves_less(version: int) -> None:
    config = CONFIGS[version]
    half = compiled(typed_from_fp32(fp32(config), config, LOGITS, "fp16").model)
    for precision in ("int8", "fp8"):
        report = compiled(quantized(version, precision))
        assert report.kernels <= half.kernels
        assert report.fused_attention == half.fused_attention == config.blocks
        assert report.bytes_moved < 0.85 * half.bytes_moved  # a small network: a third of it is the image
        written = {"int8": "Int8", "fp8": "FP8"}[precision]
        assert report.types[written] >= 2 * config.blocks
    assert compiled(quantized(version, "int8", "bf16")).kernels <= half.kernels
    assert compiled(quantized(version, "int8"), "sm_86").kernels <= half.kernels


def test_fp8_is_refused_for_a_gpu_without_it() -> None:
    with pytest.raises(EngineError, match="sm86, because the model contains HW-specific datatypes: fp8_e4m3"):
        compiled(quantized(1, "fp8"), "sm_86")


@pytest.mark.parametrize(("precision", "window"), [("fp8", 5), ("int8", 24)])
def test_windows_without_a_quantized_attention_keep_it_in_low_precision(precision: str, window: int) -> None:
    size = (4 * window, 4 * window)
    config = replace(
        CONFIGS[2], image_size=size, depths=(1,), num_heads=(2,), window_size=(window,), pretrained_window_sizes=(0,)
    )
    model = fp32(config, size)
    layers = quantized_layers(model, config, precision)
    assert not [layer for layer in layers if layer.name.endswith("attention")]
    ranges = dict.fromkeys(quantized_inputs(model, config, precision), 4.0)
    report = compiled(quantized_from_fp32(model, config, LOGITS, precision, ranges)[0])
    assert report.fused_attention == 1


def test_integers_of_a_graph_stay_integers_where_it_is_emulated() -> None:
    kinds = {node.attribute[0].i for node in emulated(quantized(1, "int8")).graph.node if node.op_type == "Cast"}
    assert {TensorProto.INT8, TensorProto.INT32} <= kinds
