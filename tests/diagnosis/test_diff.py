"""`diff` aligns graphs of different exporters and layouts, and names the part of an injected fault."""

from __future__ import annotations

import base64
import dataclasses
import functools
import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from cli.exported import cli_here
from onnx import numpy_helper
from safetensors.torch import save_file

import swin_deploy
from swin_deploy.config import SwinConfig
from swin_deploy.diagnosis.canonical_weights import ParameterComparison
from swin_deploy.diagnosis.interchange import trex_from_profile
from swin_deploy.diagnosis.sides import give_images, side_from
from swin_deploy.exporters.external_data import embed_weights
from swin_deploy.exporters.onnx_from_torch import onnx_from_torch
from swin_deploy.models.checkpoints import random_checkpoint
from swin_deploy.models.swin import SwinNetwork
from swin_deploy.tasks import TaskSpec


@functools.cache
def config(version: int) -> SwinConfig:
    return SwinConfig(
        version=version, image_size=(32, 32), embed_dim=16, depths=(2, 1), num_heads=(2, 4), window_size=(4, 4),
        pretrained_window_sizes=(0, 0),
    )  # fmt: skip


@functools.cache
def tensors(version: int) -> dict[str, torch.Tensor]:
    """Random tensors, none of them 0 or 1."""
    generator = torch.Generator().manual_seed(version)
    found = dict(random_checkpoint(config(version), TaskSpec()).tensors)
    return {name: one + 0.1 * torch.randn(one.shape, generator=generator) for name, one in found.items()}


def graph(path: Path, version: int, target: str = "tensorrt", **changed: Any) -> Path:
    changes = {name.replace("__", "."): value for name, value in changed.items()}
    network = SwinNetwork(config(version), (32, 32), {**tensors(version), **changes}, None, target).eval()
    traced = onnx_from_torch(network, (32, 32), None)
    embed_weights(traced.model, traced.weights)
    onnx.save(traced.model, str(path))
    return path


@pytest.mark.parametrize("version", [1, 2])
def test_layouts_are_equal(version: int, tmp_path: Path) -> None:
    first = graph(tmp_path / "a.onnx", version)
    for target in ("onnxruntime", "openvino"):
        found = swin_deploy.diff(first, graph(tmp_path / "b.onnx", version, target))
        assert found.first is None
        assert max(point.relative_l2 for point in found.points) < 1e-4
        assert len(found.points) > 45


def test_weights_of_zero_are_equal(tmp_path: Path) -> None:
    zeros = {name.replace(".", "__"): one * 0 for name, one in tensors(1).items() if "dense" in name or "layernorm" in name}
    first = graph(tmp_path / "a.onnx", 1, "openvino", **zeros)
    assert swin_deploy.diff(first, graph(tmp_path / "b.onnx", 1, **zeros)).equal


def test_bias_that_keeps_the_mean_of_quantized_layers() -> None:
    side: Any = SimpleNamespace(quantized=True)
    before, after, weight = np.zeros(4), np.ones(4), np.eye(4)
    assert ParameterComparison._vectors_differ(side, before, after, weight)
    assert not ParameterComparison._vectors_differ(side, before, after, weight, correction=lambda: after - before)


def test_padded_backbone_is_equal(tmp_path: Path) -> None:
    """Padding has other values in each layout, and the norms of feature maps are no parts of blocks."""
    padded = dataclasses.replace(config(1), image_size=(36, 36), out_features=("stage1", "stage2"))
    task = TaskSpec("backbone")
    weights = {name: one + 0.1 for name, one in random_checkpoint(padded, task).tensors.items()}
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(padded.to_dict()))
    traced = onnx_from_torch(SwinNetwork(padded, (36, 36), weights, task, "openvino").eval(), (36, 36), None)
    embed_weights(traced.model, traced.weights)
    onnx.save(traced.model, str(tmp_path / "a.onnx"))
    found = swin_deploy.diff(tmp_path, tmp_path / "a.onnx")
    assert found.first is None
    assert len(found.points) > 45


def test_mask_of_as_many_windows_as_heads() -> None:
    """timm adds a mask [1, windows, 1, tokens, tokens] to the scores of all images."""
    bias, mask = np.random.default_rng(0).standard_normal((4, 2, 2), np.float32), np.zeros((1, 4, 1, 2, 2), np.float32)
    mask[0, 3, 0, 0, 1] = -100
    constants = {"bias": bias, "mask": mask}
    side = SimpleNamespace(graph=SimpleNamespace(constant=constants.get), feeds={"x": np.zeros((2, 3, 4, 4))})
    ids = np.arange(16).reshape(8, 1, 2).repeat(4, axis=1)
    attention = SimpleNamespace(added=[(None, "bias"), (None, "mask")])
    found = ParameterComparison._reshaped(None, attention, side, ids)  # type: ignore[arg-type]
    np.testing.assert_array_equal(found, bias[None] + mask[0])


BLOCK = "encoder.layers.0.blocks.1."
TABLE = {1: "attention.self.relative_position_bias_table", 2: "attention.self.continuous_position_bias_mlp.2.weight"}


@pytest.mark.parametrize("target", ["tensorrt", "openvino"])
@pytest.mark.parametrize("version", [1, 2])
def test_faults_of_weights(version: int, target: str, tmp_path: Path) -> None:
    """With the layout of the first graph, every constant is compared; with another one, what they mean."""
    first = graph(tmp_path / "a.onnx", version)
    good = tensors(version)
    scaled = {
        "attention.self.query.weight": "attention.query", "attention.self.value.weight": "attention.value",
        "attention.output.dense.weight": "attention.output", "layernorm_before.weight": "norm1",
        "layernorm_before.bias": "norm1", "layernorm_after.bias": "norm2", "intermediate.dense.weight": "mlp.fc1",
        "output.dense.bias": "mlp.fc2", TABLE[version]: "attention.bias",
    }  # fmt: skip
    for name, part in scaled.items():
        bad = graph(tmp_path / "b.onnx", version, target, **{f"{BLOCK}{name}": good[f"{BLOCK}{name}"] * 1.3})
        found = swin_deploy.diff(first, bad).first
        assert found is not None, name
        assert (found.point.stage, found.point.block, found.point.part) == (0, 1, part), (name, found)


def test_command(tmp_path: Path) -> None:
    """Schema of --json, exit codes, and a mask element, an epsilon and an activation."""
    first = graph(tmp_path / "a.onnx", 1)
    save_file(tensors(1), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config(1).to_dict()))
    assert cli_here("diff", str(first), str(tmp_path), cwd=tmp_path).returncode == 0
    model = onnx.load(str(first))
    names = {node.name: node for node in model.graph.node}
    mask = next(one for one in model.graph.initializer if len(one.dims) == 5 and one.dims[0] > 1)
    whole = numpy_helper.to_array(mask).copy()
    values = whole.copy()
    values[-1, 0, 0, 0, -1] = 0
    mask.CopyFrom(numpy_helper.from_array(values, mask.name))
    onnx.save(model, str(tmp_path / "mask.onnx"))
    done = cli_here("diff", str(first), str(tmp_path / "mask.onnx"), "--json", cwd=tmp_path)
    found = json.loads(done.stdout)
    assert (done.returncode, found["equal"]) == (1, False)
    assert {key: found["first"][key] for key in ("stage", "block", "part")} == {
        "stage": 0,
        "block": 1,
        "part": "attention.mask",
    }
    assert found["points"][0].keys() == {"stage", "block", "part", "relative_l2", "sqnr_db", "cosine", "max_abs"}
    values = whole
    values[0, 0, 0, 0, -1] = -100  # excluded in every window
    mask.CopyFrom(numpy_helper.from_array(values, mask.name))
    onnx.save(model, str(tmp_path / "hidden.onnx"))
    sides = side_from(first), side_from(tmp_path / "hidden.onnx")
    give_images(sides, None, 1)
    assert [fault.point.part for fault in ParameterComparison(*sides).faults()] == ["attention.mask"]
    norm = next(node for name, node in names.items() if name.endswith("block0.norm2/LayerNormalization"))
    norm.attribute.append(onnx.helper.make_attribute("epsilon", 0.1)) if not norm.attribute else None
    for one in norm.attribute:
        if one.name == "epsilon":
            one.f = 0.1
    onnx.save(model, str(tmp_path / "epsilon.onnx"))
    found = swin_deploy.diff(tmp_path / "mask.onnx", tmp_path / "epsilon.onnx").first
    assert found is not None
    assert found.point.part == "norm2"
    assert "epsilon" in found.cause
    assert cli_here("diff", str(first), str(tmp_path / "none.onnx"), cwd=tmp_path).returncode == 2
    next(node for node in model.graph.node if node.op_type == "Gelu").op_type = "Nonsense"
    onnx.save(model, str(tmp_path / "operator.onnx"))
    del model.graph.node[20]
    onnx.save(model, str(tmp_path / "node.onnx"))
    for name, said in (("operator", "cannot run one of the graphs"), ("node", "which no node before it writes")):
        done = cli_here("diff", str(first), str(tmp_path / f"{name}.onnx"), cwd=tmp_path)
        assert (done.returncode, said in done.stderr) == (2, True), done.stderr
    assert np.isfinite(values).all()


def test_debug(tmp_path: Path) -> None:
    """With a bound between the errors of no layer and of all layers put back, some are, and the written graph has the rest."""
    save_file(tensors(1), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config(1).to_dict()))
    swin_deploy.export(weights=tmp_path, output=tmp_path / "b", target="onnxruntime")
    images = list(np.random.default_rng(0).standard_normal((4, 3, 32, 32), dtype=np.float32))
    every = swin_deploy.debug(tmp_path / "b", images, bound=1.0)
    assert every.kept == ()
    found = swin_deploy.debug(tmp_path / "b", images, bound=every.before * 0.7, output=tmp_path / "c.onnx")
    assert found.reached
    assert 0 < len(found.kept) < found.layers
    quantized = [node for node in onnx.load(str(tmp_path / "c.onnx")).graph.node if node.op_type == "QuantizeLinear"]
    assert quantized
    assert found.after <= found.bound < found.before == pytest.approx(every.before)
    assert swin_deploy.diff(tmp_path / "b", tmp_path / "c.onnx").equal


def test_files_for_other_tools(tmp_path: Path) -> None:
    """Polygraphy's classes and TREx's keys."""
    first = graph(tmp_path / "a.onnx", 1)
    swin_deploy.diff(first, first, polygraphy=tmp_path / "poly")
    [feeds] = json.loads((tmp_path / "poly/inputs.json").read_text())
    pixels = np.load(io.BytesIO(base64.b64decode(feeds["pixel_values"]["array"])))
    assert pixels.shape == (2, 3, 32, 32)
    results = json.loads((tmp_path / "poly/b.json").read_text())
    assert results["polygraphy_class"] == "RunResults"
    assert results["lst"][0][1][0]["outputs"]["logits"]["values"]["polygraphy_class"] == "ndarray"
    tensor = {"name": "x [profile 1]", "dims": [2, 4], "datatype": "FP16"}
    layer = {"name": "l", "kind": "gemm", "inputs": [tensor], "outputs": [tensor], "constants": [tensor]}
    made = trex_from_profile({"layers": [layer]}, ["x", "y"])
    assert made["Bindings"] == ["x"]
    assert made["Layers"][0]["Weights"] == {"Type": "Half", "Count": 8}
    assert made["Layers"][0]["Inputs"][0]["Format/Datatype"] == "Half"
