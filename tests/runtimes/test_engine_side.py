"""`diff` with an engine, on a simulated GPU: the compiler is simulated, and in some tests fuses attention wrongly."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
from cli.exported import cli_here, copied, refused
from engine_bundles import with_engines
from fake_gpu import simulated

import swin_deploy
from swin_deploy.exporters.engines import engine_from_onnx
from swin_deploy.options import EngineSpec


class Compiler:
    """Saves the graph. Nodes `wrong` give twice their values, unless these are outputs or fusion is off, or always."""

    def __init__(self, folder: Path, *wrong: str, always: bool = False) -> None:
        self.folder, self.wrong, self.always = folder, wrong, always
        self.number, self.compiled = itertools.count(), list[tuple[int, bool]]()

    def __call__(self, path: Path, spec: EngineSpec) -> Any:
        model = onnx.load(str(path))
        self.compiled.append((sum(node.op_type == "Softmax" for node in model.graph.node), spec.fused_attention))
        return SimpleNamespace(plan=self.plan(model, spec.batches, spec.fused_attention).encode())

    def plan(self, model: onnx.ModelProto, batches: Any, fused: bool = True) -> str:
        read = {name.removesuffix("/marked") for name in (value.name for value in model.graph.output)}
        for index, node in reversed(list(enumerate(model.graph.node))):
            if node.name in self.wrong and (self.always or (fused and node.output[0] not in read)):
                name, node.output[0] = node.output[0], f"{node.output[0]}/half"
                model.graph.node.insert(index + 1, onnx.helper.make_node("Sum", [node.output[0]] * 2, [name]))
        place = self.folder / f"{next(self.number)}.onnx"
        onnx.save(model, str(place))
        return json.dumps({"graph": str(place), "profiles": batches, "host_code": False})


@pytest.fixture
def bundle(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Make a bundle with an engine of this compiler."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with simulated(monkeypatch, "sm_89"):

        def make(*wrong: str, always: bool = False, batches: Any = ((1, 4, 8),), backend: str = "tensorrt") -> Any:
            path, compiler = copied(1, tmp_path / "b"), Compiler(tmp_path, *wrong, always=always)
            plan = compiler.plan(onnx.load(str(path / "onnx/model.onnx")), batches)
            with_engines(path, backend, profiles=batches, plan=plan)
            monkeypatch.setattr(engine_from_onnx, "engine_from_onnx", compiler)
            return path, compiler

        yield make


@pytest.mark.parametrize(("backend", "batches"), [("tensorrt", ((1, 1, 1),)), ("tensorrt-rtx", ((1, 4, 8), (16, 16, 16)))])
def test_right_engine(backend: str, batches: Any, bundle: Any) -> None:
    """It is compared at every point, and one further engine is compiled."""
    path, compiler = bundle(batches=batches, backend=backend)
    found = swin_deploy.diff(path, f"{path}@{backend}")
    assert found.first is None
    assert len(found.points) > 60
    assert max(point.relative_l2 for point in found.points) < 1e-5
    assert len(compiler.compiled) == 1


FUSED = ("stages.1.steps.block0.attention/Softmax", "stages.1.steps.block1.attention/Softmax")


@pytest.mark.parametrize(
    ("wrong", "always", "place", "cause", "compiled"),
    [
        (("stages.1.steps.block0.attention.proj/Gemm",), True, (1, 0, "attention.output"), "relative L2 error grows", 1),
        (FUSED, False, (1, 0, "attention.softmax"), "fused attention is wrong on this GPU", 10),
        (("stages.0.steps.block1/Gelu",), False, (0, 1, "mlp.fc2"), "compiler gets this part wrong on this GPU", 9),
    ],
)
def test_fault(wrong: Any, always: bool, place: Any, cause: str, compiled: int, bundle: Any) -> None:
    """A fault that the diagnostic engine shows, and faults that disappear in it."""
    path, compiler = bundle(*wrong, always=always)
    found = swin_deploy.diff(path, f"{path}@tensorrt")
    assert found.first is not None
    assert (found.first.point.stage, found.first.point.block, found.first.point.part) == place
    assert cause in found.first.cause
    assert ("--no-fused-attention" in found.first.cause) == (wrong == FUSED)
    assert found.others == ()
    assert len(compiler.compiled) == compiled


def test_refusals(tmp_path: Path) -> None:
    copied(1, tmp_path / "b")
    refused(cli_here("diff", "b", "b@tensorrt", cwd=tmp_path), "The back end tensorrt needs an NVIDIA GPU")
    refused(cli_here("diff", "b", "b/onnx/model.onnx@tensorrt-rtx", cwd=tmp_path), "runs the engines of a bundle")
