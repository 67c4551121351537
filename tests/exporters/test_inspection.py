"""The figures of graphs and engines, against the compiler and sums by hand. test_pipeline.py has the counter of torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from cli.exported import copied
from engine_graphs import SM89, attention, linear
from plotted import bar_widths
from small_graphs import model_from_text

import swin_deploy
from swin_deploy.cli.inspect import ROLE_COLOURS, engine_chart
from swin_deploy.errors import UsageError
from swin_deploy.exporters.engines.engine_from_onnx import engine_from_onnx
from swin_deploy.exporters.engines.layer_report import ROLES, EngineLayer, EngineTensor
from swin_deploy.exporters.inspection.flops import cost_from_onnx, cost_of_model
from swin_deploy.exporters.inspection.roofline import GPUS, LAUNCH, find_gpu, roofline


def conv() -> onnx.ModelProto:
    text = """g (float16[batch, 4, 10, 12] x) => (float16[batch, 8, 10, 12] y) {
        y = Conv <group = 2, pads = [1, 2, 1, 2]> (x, w)
    }"""
    return model_from_text(text, 17, w=np.zeros((8, 2, 3, 5), np.float16))


def gemm() -> onnx.ModelProto:
    text = "g (float16[6, 10] x) => (float16[10, 7] y) { y = Gemm <transA = 1, transB = 1> (x, w) }"
    return model_from_text(text, 17, w=np.zeros((7, 6), np.float16))


@pytest.mark.parametrize(
    ("model", "operations"),
    [
        (linear(), 2 * 64 * 64 * 64),
        (attention(), 2 * 2 * 3 * 64 * 64 * 32),
        (conv(), 2 * 8 * 10 * 12 * (2 * 3 * 5)),
        (gemm(), 2 * 10 * 7 * 6),
    ],
    ids=["MatMul", "attention", "Conv in groups", "transposed Gemm"],
)
def test_operations_by_hand(model: onnx.ModelProto, operations: int) -> None:
    assert cost_of_model(model).flops == {"float16": operations}


def test_a_dynamic_batch_is_set() -> None:
    assert cost_of_model(linear(), 8).flops == {"float16": 8 * 2 * 64 * 64 * 64}
    assert cost_of_model(linear(), 8).batch == 8
    assert cost_of_model(linear(4), 8).flops == {"float16": 4 * 2 * 64 * 64 * 64}  # fixed


def test_a_matmul_of_quantized_values() -> None:
    text = """quantized (int8[batch, 16] xq) => (float[batch, 32] y) {
        xf = DequantizeLinear(xq, s, z)
        wf = DequantizeLinear(wq, s, z)
        y = MatMul(xf, wf)
    }"""
    cost = cost_of_model(model_from_text(text, 17, wq=np.zeros((16, 32), np.int8), s=np.float32(1), z=np.int8(0)))
    assert cost.flops == {"int8": 2 * 16 * 32}
    assert (cost.parameters, cost.parameter_bytes) == (16 * 32 + 2, 16 * 32 + 1 + 4)


def test_computed_shapes_are_folded_and_nothing_is_estimated() -> None:
    text = """shapes (float16[batch, 4, 16] x) => (float16[batch, 8] y) {
        shape = Shape(x)
        first = Gather(shape, zero)
        one = Unsqueeze(first, zeros)
        wanted = Concat <axis = 0> (one, minus)
        flat = Reshape(x, wanted)
        y = MatMul(flat, w)
    }"""
    tables = {"zero": np.int64(0), "zeros": np.array([0]), "minus": np.array([-1]), "w": np.zeros((64, 8), np.float16)}
    assert cost_of_model(model_from_text(text, 17, **tables), 2).flops == {"float16": 2 * 2 * 64 * 8}
    text = 'g (float16[1, 4] x) => (float16[1, 4] y) { y = Einsum <equation = "bi,io->bo"> (x, w) }'
    whole = model_from_text(text, 17, w=np.eye(4, dtype=np.float16))
    assert (cost_of_model(whole).flops, cost_of_model(whole).total_flops) == (None, None)
    free = model_from_text("g (float16[1, n, n] x) => (float16[1, n, n] y) { y = MatMul(x, x) }", 17)
    assert cost_of_model(free).flops is None


TWICE = [onnx.helper.make_node("Relu", ["x"], ["y"])] * 2
ONE_VALUE_TWICE = onnx.helper.make_model(onnx.helper.make_graph(TWICE, "g", [], [])).SerializeToString()


@pytest.mark.parametrize("content", [b"", b"not a graph", json.dumps({}).encode(), ONE_VALUE_TWICE])
def test_a_file_that_is_not_a_graph(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.onnx").write_bytes(content)
    with pytest.raises(UsageError, match=r"x\.onnx is not an ONNX graph"):
        cost_from_onnx(tmp_path / "x.onnx")


def layer(name: str, kind: str = "kgen", tactic: str = "") -> EngineLayer:
    tensor = EngineTensor("t", (2, 4), "Half")
    return EngineLayer(name, kind, (tensor,), (tensor,), (), tactic)


@pytest.mark.parametrize(
    ("name", "kind", "role"),
    [
        ("_gemm_mha_v2_myl0_3", "kgen", "attention"),
        ("__myl_FcAddAdd_myl0_7", "runtime_fusion", "product"),
        ("stages.0/MatMul_myl0_7", "gemm", "product"),
        ("embeddings/Conv_myl0_1", "correlation", "product"),
        ("__myl_ReshTranSlicReshMove_myl0_4", "kgen", "move"),
        ("__myl_CastConc_myl0_0", "kgen", "move"),
        ("Reformatting CopyNode for Input", "Reformat", "move"),
        ("__myl_AddReshTranReshMove_myl0_9", "kgen", "other"),
        ("__myl_ReshTranReshGathReshCastMeanSub_myl0_5", "kgen", "other"),
        ("softmax", "SoftMax", "other"),
    ],
)
def test_roles_of_kernels(name: str, kind: str, role: str) -> None:
    assert layer(name, kind).role == role


def test_the_roles_of_an_engine_add_up() -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX compiles the graphs of these tests")
    report = engine_from_onnx(attention(blocks=2).SerializeToString(), SM89).report
    figures = report.to_dict()
    assert set(report.roles) == set(ROLES)
    assert sum(role["kernels"] or 0 for role in report.roles.values()) == report.kernels
    moved = sum((role["bytes_read"] or 0) + (role["bytes_written"] or 0) for role in report.roles.values())
    assert moved == report.bytes_moved
    assert report.roles["attention"]["kernels"] == report.fused_attention == 2
    assert [entry["role"] for entry in figures["layers"]].count("attention") == 2


def test_the_roofline() -> None:
    gpu = find_gpu("rtx-4090")
    assert gpu is find_gpu("SM_89")
    bound = roofline(gpu, 100, 1_008_000, {"float16": 1})
    assert bound is not None
    assert bound.memory == pytest.approx(1e-6)
    assert bound.seconds == pytest.approx(1e-6 + 100 * LAUNCH)
    bound = roofline(gpu, 0, 0, {"float16": 330_300_000_000, "float": 82_600_000_000})
    assert bound is not None
    assert bound.seconds == bound.compute == pytest.approx(2e-3)
    assert roofline(gpu, None, 1, {}) is roofline(gpu, 1, None, {}) is roofline(gpu, 1, 1, None) is None
    assert roofline(find_gpu("t4"), 1, 1, {"float8e4m3fn": 1}) is None  # no FP8
    assert roofline(gpu, 1, 1, {"complex64": 1}) is None
    with pytest.raises(UsageError, match=r'Unknown GPU "rtx4090"\..*rtx-4090 \(sm_89\)'):
        find_gpu("rtx4090")


def test_the_published_figures_are_plausible() -> None:
    """Against wrong digits or units: each tensor-core peak is a small multiple of the next."""
    assert len({gpu.name for gpu in GPUS}) == len(GPUS)
    for gpu in GPUS:
        assert 200 <= gpu.bandwidth <= 10_000
        assert 3 <= gpu.fp16 / gpu.fp32 <= 20
        assert gpu.int8 / gpu.fp16 == pytest.approx(2, rel=0.01)
        assert gpu.fp8 in (0, gpu.int8)
        assert gpu.source.startswith("NVIDIA ")


@pytest.fixture(scope="module")
def inspected(tmp_path_factory: pytest.TempPathFactory) -> Any:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX compiles the engines of these tests")
    path = copied(2, tmp_path_factory.mktemp("inspected") / "b")
    swin_deploy.build_engine(path, gpus=["sm_89", "sm_86"], batches=[(2, 2, 2), (1, 4, 8)])
    swin_deploy.build_engine(path, precision="fp32", gpus=["sm_89"])
    return swin_deploy.inspect(path)


def test_a_bundle_with_engines(inspected: Any) -> None:
    assert list(inspected.graphs) == ["onnx/model.onnx", "onnx/model_fp16.onnx"]
    fp32, fp16 = inspected.graphs.values()
    assert fp32.flops["float"] == fp16.flops["float16"]
    assert [(cost.precision, cost.gpu, cost.batch) for cost in inspected.engines] == [
        ("fp16", "sm_89", (2, 2, 2)),
        ("fp16", "sm_89", (1, 4, 8)),
        ("fp16", "sm_86", (2, 2, 2)),
        ("fp16", "sm_86", (1, 4, 8)),
        ("fp32", "sm_89", (1, 1, 1)),
    ]
    two, free, ampere, _, single = inspected.engines
    assert two.roofline.gpu == "rtx-4090"
    assert ampere.roofline.gpu == "rtx-3090"
    assert two.roofline.compute == pytest.approx(2 * fp16.flops["float16"] / 330.3e12)
    assert single.roofline.compute == pytest.approx(fp32.flops["float"] / 82.6e12)
    assert two.bytes_of("read") + two.bytes_of("written") == two.figures["bytes_moved"]
    assert (free.roofline, free.bytes_of("read")) == (None, None)
    assert free.figures["kernels"] > 0
    assert len(two.figures["layers"]) >= two.figures["kernels"]
    assert json.loads(json.dumps(inspected.to_dict()))["engines"][0]["batch"] == [2, 2, 2]


def test_no_roofline_for_a_gpu_that_does_not_fit_the_engine(inspected: Any) -> None:
    described = swin_deploy.inspect(inspected.path, gpu="l4").engines
    assert [cost.roofline and cost.roofline.gpu for cost in described] == ["l4", None, None, None, "l4"]


def test_a_plot_is_to_scale(inspected: Any) -> None:
    assert tuple(ROLE_COLOURS) == ROLES
    known = [(f"<{number}>", cost) for number, cost in enumerate(inspected.engines) if cost.roofline is not None]
    for engines, unit in ((known, "Bytes moved"), ([("all", cost) for cost in inspected.engines], "Kernels")):
        svg = engine_chart(engines, "svg")
        assert f"{unit} by role" in svg.decode()
        widths = [sum(parts) for parts in bar_widths(svg)]
        amounts = [cost.figures["bytes_moved" if unit == "Bytes moved" else "kernels"] for _, cost in engines]
        assert [width / max(widths) for width in widths] == pytest.approx([a / max(amounts) for a in amounts], abs=2e-3)
