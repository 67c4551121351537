"""fp16 and bf16 graphs: which values are in low precision, how far the outputs are from fp32, and emulation of types."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from cli.exported import copied
from onnx import TensorProto, numpy_helper
from small_graphs import model_from_text
from traced import CONFIGS, LOGITS, PADDED, WHOLE, answers_of_torch, traced_once

import swin_deploy
from swin_deploy.calib.collect import amax_of_values
from swin_deploy.config import SwinConfig
from swin_deploy.errors import ExportError, MissingKernelError, PassError
from swin_deploy.exporters.engines.engine_from_onnx import engine_from_onnx
from swin_deploy.exporters.passes import ENGINE_PASSES, PassRecord
from swin_deploy.exporters.passes.cosine_attention import cosine_fallback
from swin_deploy.exporters.precision import assign_types, typed_from_fp32
from swin_deploy.options import EngineSpec
from swin_deploy.parity import TOLERANCES, compare
from swin_deploy.runtimes.backends import runtime_from_onnx, runtime_to_check
from swin_deploy.runtimes.emulate import emulated_file

ort = pytest.importorskip("onnxruntime", reason="ONNX Runtime runs the graphs")

INPUT, OUTPUT = "pixel_values", "logits"
HALF = np.dtype(np.float16)
BF16 = 2.0**-8  # half a unit in the last place, relative
EACH = [(version, size) for version in (1, 2) for size in (WHOLE, PADDED)]


def fp32(version: int, size: tuple[int, int]) -> Any:
    return traced_once(CONFIGS[version], size)


@pytest.fixture(scope="module", params=EACH, ids=lambda p: f"V{p[0]}-{p[1][0]}")
def graphs(request: pytest.FixtureRequest) -> tuple[SwinConfig, tuple[int, int], Any, Any, tuple[PassRecord, ...]]:
    """The config, the image size, the fp32 graph, the fp16 graph, and the records of the rewrite."""
    version, size = request.param
    model = fp32(version, size)
    typed = typed_from_fp32(model, CONFIGS[version], LOGITS, "fp16")
    return CONFIGS[version], size, model, typed.model, typed.records


def answers(model: Any, size: tuple[int, int], batch: int = 3) -> Any:
    pixels = np.random.default_rng(batch).standard_normal((batch, 3, *size), dtype=np.float32)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run([OUTPUT], {INPUT: pixels})[0]


def test_answers_stay_close(graphs: Any) -> None:
    """Padded windows of V2 included, where half precision without the fp32 fallback is 0 / 0."""
    _, size, full, low, _ = graphs
    for batch in (1, 4):
        agreement = compare(answers(low, size, batch), answers(full, size, batch))
        assert agreement.within(1e-2), agreement
        assert agreement.relative_l2 > 0, "half precision rounds, so equal answers mean that nothing was typed"


def test_without_fp32_fallback_padding_is_not_a_number() -> None:
    imported = gs.import_onnx(fp32(2, PADDED))
    assign_types(imported, fallback=set(), low=HALF)
    model = gs.export_onnx(imported.cleanup().toposort())
    assert np.isnan(answers(model, PADDED)).all()


def test_graph_is_valid_and_its_ends_stay_float32(graphs: Any) -> None:
    *_, full, low, _ = graphs
    onnx.checker.check_model(low, full_check=True)
    onnx.shape_inference.infer_shapes(low, check_type=True, strict_mode=True, data_prop=True)
    assert list(low.graph.input) == list(full.graph.input)
    assert list(low.graph.output) == list(full.graph.output)


def fallback_nodes(model: Any) -> set[str]:
    """The nodes from the squares to the scaled cosines, found without the code under test."""
    nodes = [node for node in model.graph.node if "/Cosine" in node.name and node.op_type not in ("Concat", "MatMul")]
    # The Transpose before the matmul is none of them, that of the keys' squared L2 norms is one.
    return {node.name for node in nodes if node.op_type != "Transpose" or "Split" in node.input[0]}


def assert_float_weights_are_those_of(kept: set[str], model: Any, low: int) -> None:
    """Every other weight is of type `low`."""
    inside = {name for node in model.graph.node if node.name in kept for name in node.input}
    types = {t.name: t.data_type for t in model.graph.initializer if t.data_type in (TensorProto.FLOAT, low)}
    assert len(types) > 40
    assert {name for name, kind in types.items() if kind == TensorProto.FLOAT} == inside & types.keys()


def test_everything_outside_the_fallback_nodes_is_half(graphs: Any) -> None:
    asked, _, _, low, _ = graphs
    kept = fallback_nodes(low)
    assert len(kept) == (9 * asked.blocks if asked.version == 2 else 0)
    assert {name for name in cosine_fallback(gs.import_onnx(low)) if "/Cosine" in name and "Cast" not in name} == kept
    assert_float_weights_are_those_of(kept, low, TensorProto.FLOAT16)
    inferred = onnx.shape_inference.infer_shapes(low, strict_mode=True)
    types = {value.name: value.type.tensor_type.elem_type for value in inferred.graph.value_info}
    for node in low.graph.node:
        if node.op_type == "Cast" or node.output[0] == OUTPUT:
            continue
        wanted = TensorProto.FLOAT if node.name in kept else TensorProto.FLOAT16
        assert types[node.output[0]] == wanted, node.name


def test_casts_are_counted(graphs: Any) -> None:
    asked, _, _, low, records = graphs
    expected = 2 + (3 * asked.blocks if asked.version == 2 else 0)
    assert records[:-1] == tuple(PassRecord(step.name, step.expected(asked)) for step in ENGINE_PASSES)
    assert records[-1] == PassRecord("fp16_types", expected)
    found = [node.op_type for node in low.graph.node]
    assert found.count("Cast") == expected
    names = [node.name for node in low.graph.node]
    assert len(set(names)) == len(names)


def test_fp32_graph_is_left_alone(graphs: Any) -> None:
    asked, _, full, low, _ = graphs
    before = full.SerializeToString(deterministic=True)
    again = typed_from_fp32(full, asked, LOGITS, "fp16").model
    assert full.SerializeToString(deterministic=True) == before
    assert again.SerializeToString(deterministic=True) == low.SerializeToString(deterministic=True)


def test_a_weight_beyond_half_precision_and_another_config_are_errors() -> None:
    model = fp32(1, WHOLE)
    (weight,) = (tensor for tensor in model.graph.initializer if tensor.name == "classifier.weight")
    values = numpy_helper.to_array(weight).copy()
    values[2, 3] = -1e5
    weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    with pytest.raises(ExportError) as caught:
        typed_from_fp32(model, CONFIGS[1], LOGITS, "fp16")
    assert str(caught.value) == ("classifier.weight holds 1e+05, which float16 cannot represent. Build the engine with --fp32.")
    with pytest.raises(PassError, match=r'"query_bias_in_norm" found 3 places where this architecture has 0'):
        typed_from_fp32(fp32(1, WHOLE), CONFIGS[2], LOGITS, "fp16")


def test_a_value_that_two_nodes_read_is_cast_once() -> None:
    text = """test (float[2] x) => (float[2] y) {
        [fp32_1] a = Mul(x, c)
        [low_1] b = Add(a, c)
        [low_2] d = Mul(a, b)
        [fp32_2] e = Add(d, a)
        [fp32_3] y = Add(e, d)
    }"""
    small = onnx.shape_inference.infer_shapes(model_from_text(text, c=np.array([2.0, 0.1], np.float32)))
    imported = gs.import_onnx(small)
    # a is cast down for two readers, d up for two; the input is float32 already, and the output still is
    assert assign_types(imported, fallback={"fp32_1", "fp32_2", "fp32_3"}, low=HALF) == 2
    model = gs.export_onnx(imported.cleanup().toposort())
    onnx.checker.check_model(model, full_check=True)
    assert [node.op_type for node in model.graph.node].count("Cast") == 2
    assert {tensor.data_type for tensor in model.graph.initializer} == {TensorProto.FLOAT, TensorProto.FLOAT16}
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": np.array([1.5, -3.0], np.float32)})
    a = np.array([3.0, -0.3])
    np.testing.assert_allclose(found, a * (a + [2.0, 0.1]) * 2 + a, rtol=5e-3)


class Images:
    """Calibration samples."""

    fingerprint = "noise"

    def __len__(self) -> int:
        return 6

    def batches(self, size: int, start: int = 0) -> Any:
        for index in range(start, len(self), size):
            seeds = range(index, min(index + size, len(self)))
            images = [np.random.default_rng(seed).standard_normal((3, *WHOLE), dtype=np.float32) for seed in seeds]
            yield {INPUT: np.stack(images)}


@pytest.mark.parametrize("version", [1, 2])
def test_values_beyond_half_precision_on_samples_stay_fp32(version: int) -> None:
    """A residual stream that grows past 65504, as large Swins' do: without samples infinite, with them as good as any."""
    model = fp32(version, WHOLE)
    for name, factor in {1: {"fc1.weight": 100, "fc2.weight": 1e5}, 2: {"norm2.weight": 4e4}}[version].items():
        (weight,) = (tensor for tensor in model.graph.initializer if tensor.name == f"stages.0.steps.block0.{name}")
        weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(factor), weight.name))
    pixels = next(Images().batches(2, 1))
    wanted = answers_of_torch(model, pixels)[OUTPUT]
    assert not np.isfinite(
        answers_of_torch(typed_from_fp32(model, CONFIGS[version], LOGITS, "fp16").model, pixels)[OUTPUT]
    ).all()

    typed = typed_from_fp32(model, CONFIGS[version], LOGITS, "fp16", lambda full: amax_of_values(full, Images(), batch=2))
    assert compare(answers_of_torch(typed.model, pixels)[OUTPUT], wanted).within(1e-2)
    measured = {fallback.at: fallback.reason for fallback in typed.fallbacks if "calibration samples" in fallback.reason}
    assert any("stages.0" in name for name in measured)
    assert not any("stages.1" in name for name in measured), "after the norm of the merging all values are small again"
    assert all("and fp16 ends at 65504" in reason for reason in measured.values())
    cosine = {fallback.at: fallback.nodes for fallback in typed.fallbacks if fallback.at not in measured}
    names = [f"stages.{stage}.steps.block{block}.attention" for stage, block in ((0, 0), (0, 1), (1, 0))]
    assert cosine == (dict.fromkeys(names, 9) if version == 2 else {})


def test_measured_ranges_are_those_of_the_values() -> None:
    model = fp32(1, WHOLE)
    found = amax_of_values(model, Images(), batch=3)
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    watched.graph.output.extend(onnx.ValueInfoProto(name=name) for name in found if name != OUTPUT)
    session = ort.InferenceSession(watched.SerializeToString())
    runs = [session.run(list(found), feeds) for feeds in Images().batches(1)]
    assert len(found) > 50
    for number, name in enumerate(found):
        assert found[name] == pytest.approx(max(np.abs(run[number]).max() for run in runs), rel=1e-5), name


@pytest.fixture(scope="module", params=EACH, ids=lambda p: f"V{p[0]}-{p[1][0]}")
def bf16_graphs(request: pytest.FixtureRequest) -> tuple[int, tuple[int, int], Any, Any]:
    """The version, the image size, the fp32 graph and the bf16 graph."""
    version, size = request.param
    model = fp32(version, size)
    return version, size, model, typed_from_fp32(model, CONFIGS[version], LOGITS, "bf16").model


def pixels(size: tuple[int, int]) -> dict[str, np.ndarray[Any, Any]]:
    return {"pixel_values": np.random.default_rng(5).standard_normal((3, 3, *size), dtype=np.float32)}


def test_graph_is_valid_and_bf16_outside_fallback_nodes(bf16_graphs: Any) -> None:
    *_, low = bf16_graphs
    onnx.checker.check_model(low, full_check=True)
    assert_float_weights_are_those_of(fallback_nodes(low), low, TensorProto.BFLOAT16)


def test_answers_by_emulation_and_by_pytorch(bf16_graphs: Any, tmp_path: Path) -> None:
    """Padded windows of V2 included. Both round every node to bf16, and sum in another order."""
    _, size, full, low = bf16_graphs
    path = tmp_path / "model.onnx"
    onnx.save(low, str(path))
    exact = answers_of_torch(full, pixels(size))["logits"]
    with pytest.raises(MissingKernelError, match=r"has no CPU kernel for a type in model\.onnx .* back end openvino"):
        runtime_from_onnx(path)
    with runtime_to_check(path) as runtime:
        assert runtime.title.endswith("types emulated")
        emulated = runtime.run(pixels(size))["logits"]
    typed = answers_of_torch(low, pixels(size))["logits"]
    for found in (emulated, typed):
        assert BF16 / 8 < compare(found, exact).relative_l2 < TOLERANCES["bf16"]
    assert compare(emulated, typed).relative_l2 < compare(emulated, exact).relative_l2


@pytest.mark.parametrize("version", [1, 2])
def test_emulated_fp16_is_what_pytorch_computes_in_fp16(version: int, tmp_path: Path) -> None:
    full = fp32(version, WHOLE)
    low = typed_from_fp32(full, CONFIGS[version], LOGITS, "fp16").model
    path = tmp_path / "model.onnx"
    onnx.save(low, str(path))
    with runtime_from_onnx(emulated_file(path, tmp_path)) as runtime:
        found = runtime.run(pixels(WHOLE))["logits"]
    typed, exact = (answers_of_torch(model, pixels(WHOLE))["logits"] for model in (low, full))
    assert 0 < compare(found, exact).relative_l2 < TOLERANCES["fp16"]
    assert compare(found, typed).relative_l2 < compare(found, exact).relative_l2


def test_openvino_runs_it(bf16_graphs: Any, tmp_path: Path) -> None:
    pytest.importorskip("openvino", reason="openvino is not installed")
    _, size, full, low = bf16_graphs
    onnx.save(low, str(tmp_path / "model.onnx"))
    with runtime_from_onnx(tmp_path / "model.onnx", "openvino") as runtime:
        found = runtime.run(pixels(size))["logits"]
    assert compare(found, answers_of_torch(full, pixels(size))["logits"]).relative_l2 < TOLERANCES["bf16"]


@pytest.mark.parametrize("version", [1, 2])
def test_bundle_and_engine(version: int, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    path = copied(version, tmp_path / "bundle")
    (built,) = swin_deploy.build_engine(path, precision="bf16", gpus=["sm_89"])
    entry = swin_deploy.bundle.Bundle.open(path).files["onnx/model_bf16.onnx"]
    assert entry["opset"] >= 22
    assert entry["agreement"]["verified"]
    assert entry["agreement"]["backend"].endswith("types emulated")
    figures = built.entry["profiles"][0]
    assert figures["types"]["BFloat16"] > figures["kernels"] * 0.8
    assert figures["fused_attention"] == 4
    verdicts = {verdict.file: verdict for verdict in swin_deploy.verify(path)}
    assert verdicts["onnx/model_bf16.onnx"].verified


def test_engine_computes_in_bf16(bf16_graphs: Any) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    *_, low = bf16_graphs
    engine = engine_from_onnx(low.SerializeToString(), EngineSpec(backend="tensorrt-rtx", gpus="sm_89"))
    assert "Half" not in engine.reports[0].types
    assert engine.reports[0].types["BFloat16"] > 20
