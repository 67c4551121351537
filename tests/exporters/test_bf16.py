"""bf16 graphs, and the emulation by which a runtime without kernels for a type compares them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="graphs are traced from torch networks")
onnx = pytest.importorskip("onnx", reason="graphs are ONNX graphs")
pytest.importorskip("onnxscript", reason="the exporter needs onnxscript")

from onnx import TensorProto  # noqa: E402
from test_precision import PADDED, TASK, WHOLE, config, fallback_nodes, fp32  # noqa: E402
from traced import answers_of_torch  # noqa: E402

import swin_deploy  # noqa: E402
from swin_deploy.errors import MissingKernelError  # noqa: E402
from swin_deploy.exporters.engines.engine_from_onnx import engine_from_onnx  # noqa: E402
from swin_deploy.exporters.precision import typed_from_fp32  # noqa: E402
from swin_deploy.parity import TOLERANCES, compare  # noqa: E402
from swin_deploy.runtimes.backends import runtime_from_onnx, runtime_to_check  # noqa: E402
from swin_deploy.specs import EngineSpec  # noqa: E402

DIGITS = Path(__file__).parents[2] / "examples" / "digits"
BF16 = 2.0**-8  # half a unit in the last place, relative


@pytest.fixture(scope="module", params=[(1, WHOLE), (1, PADDED), (2, WHOLE), (2, PADDED)], ids=lambda p: f"V{p[0]}-{p[1][0]}")
def graphs(request: pytest.FixtureRequest) -> tuple[int, tuple[int, int], Any, Any]:
    """The version, the image size, the fp32 graph and the bf16 graph."""
    version, size = request.param
    model = fp32(version, size)
    return version, size, model, typed_from_fp32(model, config(version), TASK, "bf16").model


def pixels(size: tuple[int, int]) -> dict[str, np.ndarray[Any, Any]]:
    return {"pixel_values": np.random.default_rng(5).standard_normal((3, 3, *size), dtype=np.float32)}


def test_graph_is_valid_and_bf16_outside_fallback_nodes(graphs: Any) -> None:
    *_, narrow = graphs
    onnx.checker.check_model(narrow, full_check=True)
    kept = fallback_nodes(narrow)
    inside = {name for node in narrow.graph.node if node.name in kept for name in node.input}
    types = {t.name: t.data_type for t in narrow.graph.initializer if t.data_type in (TensorProto.FLOAT, TensorProto.BFLOAT16)}
    assert len(types) > 40
    assert {name for name, kind in types.items() if kind == TensorProto.FLOAT} == inside & types.keys()


def test_answers_by_emulation_and_by_pytorch(graphs: Any, tmp_path: Path) -> None:
    """Padded windows of V2 included. Both round every node to bf16, and sum in another order."""
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    _, size, wide, narrow = graphs
    path = tmp_path / "model.onnx"
    onnx.save(narrow, str(path))
    exact = answers_of_torch(wide, pixels(size))["logits"]
    with pytest.raises(MissingKernelError, match=r"has no CPU kernel for a type in model\.onnx .* back end openvino"):
        runtime_from_onnx(path)
    with runtime_to_check(path) as runtime:
        assert runtime.title.endswith("types emulated")
        emulated = runtime.run(pixels(size))["logits"]
    typed = answers_of_torch(narrow, pixels(size))["logits"]
    for found in (emulated, typed):
        assert BF16 / 8 < compare(found, exact).relative_l2 < TOLERANCES["bf16"]
    assert compare(emulated, typed).relative_l2 < compare(emulated, exact).relative_l2


@pytest.mark.parametrize("version", [1, 2])
def test_emulated_fp16_is_what_pytorch_computes_in_fp16(version: int, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    from swin_deploy.runtimes.emulate import emulated_file

    wide = fp32(version, WHOLE)
    narrow = typed_from_fp32(wide, config(version), TASK, "fp16").model
    path = tmp_path / "model.onnx"
    onnx.save(narrow, str(path))
    with runtime_from_onnx(emulated_file(path, tmp_path)) as runtime:
        found = runtime.run(pixels(WHOLE))["logits"]
    typed, exact = (answers_of_torch(model, pixels(WHOLE))["logits"] for model in (narrow, wide))
    assert 0 < compare(found, exact).relative_l2 < TOLERANCES["fp16"]
    assert compare(found, typed).relative_l2 < compare(found, exact).relative_l2


def test_openvino_runs_it(graphs: Any, tmp_path: Path) -> None:
    pytest.importorskip("openvino", reason="openvino is not installed")
    _, size, wide, narrow = graphs
    onnx.save(narrow, str(tmp_path / "model.onnx"))
    with runtime_from_onnx(tmp_path / "model.onnx", "openvino") as runtime:
        found = runtime.run(pixels(size))["logits"]
    assert compare(found, answers_of_torch(wide, pixels(size))["logits"]).relative_l2 < TOLERANCES["bf16"]


@pytest.mark.parametrize("family", ["swin", "swinv2"])
def test_bundle_and_engine(family: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    bundle = swin_deploy.export(weights=DIGITS / f"{family}-digits", output=tmp_path / "bundle")
    (built,) = swin_deploy.build_engine(bundle.path, precision="bf16", gpus=["sm_89"])
    entry = swin_deploy.bundle.Bundle.open(bundle.path).files["onnx/model_bf16.onnx"]
    assert entry["opset"] >= 22
    assert entry["agreement"]["verified"]
    assert entry["agreement"]["backend"].endswith("types emulated")
    figures = built.entry["profiles"][0]
    assert figures["types"]["BFloat16"] > figures["kernels"] * 0.8
    assert figures["fused_attention"] == 4
    verdicts = {verdict.file: verdict for verdict in swin_deploy.verify(bundle.path)}
    assert verdicts["onnx/model_bf16.onnx"].verified


def test_engine_computes_in_bf16(graphs: Any) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    *_, narrow = graphs
    engine = engine_from_onnx(narrow.SerializeToString(), EngineSpec(backend="tensorrt-rtx", gpus="sm_89"))
    assert "Half" not in engine.reports[0].types
    assert engine.reports[0].types["BFloat16"] > 20
