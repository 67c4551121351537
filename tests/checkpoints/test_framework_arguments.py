"""Every argument of timm's and torchvision's Swin classes, against what they computed (see record_arguments.py)."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from record_arguments import BOTH, HERE, ONLY, TIMM, TORCHVISION, ArgumentCase, cases, drawn

from swin_deploy.config import SwinConfig
from swin_deploy.errors import CheckpointError
from swin_deploy.exporters.external_data import embed_weights
from swin_deploy.exporters.onnx_from_torch import onnx_from_torch
from swin_deploy.models.checkpoints import checkpoint_from_path, resize_windows
from swin_deploy.models.checkpoints.state_dict_names import CanonicalStateDict
from swin_deploy.models.checkpoints.timm_config import config_from_timm
from swin_deploy.models.swin import SwinNetwork
from swin_deploy.options import ExportSpec
from swin_deploy.tasks import TaskSpec

SIGNATURES = json.loads((HERE / "signatures.json").read_text())
RECORD = dict(np.load(HERE / "networks.npz"))
CONFIGS = json.loads(RECORD["configs"].tobytes())

# Arguments that no checkpoint can show as anything but other tensors, and dtype, which weights have themselves
BY_TENSORS = {"timm": {"embed_layer", "norm_layer", "dtype"}, "torchvision": {"norm_layer", "block", "downsample_layer"}}
LAYOUTS = ("img_size", "window_size", "always_partition", "global_pool", "dynamic_img_size")


def checkpoint(case: ArgumentCase, folder: Path) -> Path:
    """Write the checkpoint of a network, as its framework does."""
    config, shapes = CONFIGS[case.name]
    state = {name: RECORD.get(f"{case.name}/{name}", drawn(name, tuple(shape))) for name, shape in shapes.items()}
    path = folder / ("pytorch_model.bin" if config else "model.pth")
    torch.save({name: torch.from_numpy(np.asarray(array)) for name, array in state.items()}, path)
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    return folder if config else path


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_argument_is_honoured(case: ArgumentCase, tmp_path: Path) -> None:
    found = checkpoint_from_path(checkpoint(case, tmp_path), TaskSpec(), image_size=case.image_size)
    config = SwinConfig.from_dict(json.loads(json.dumps(found.config.to_dict())))  # as a bundle keeps it
    assert config == dataclasses.replace(found.config, backbone_maps=config.backbone_maps)
    pixels = torch.from_numpy(drawn("pixel_values", (2, config.num_channels, *case.image_size)))
    wanted = RECORD[f"{case.name}/logits"]
    for target in ("tensorrt", "openvino") if case.argument in LAYOUTS else ("tensorrt",):
        network = SwinNetwork(config, case.image_size, found.tensors, target=target).eval().double()
        with torch.no_grad():  # in fp64: only the framework's fp32 answer is rounded
            logits = network(pixels.double())[0].numpy()
        assert logits.shape == wanted.shape
        assert np.abs(logits - wanted).max() < 1e-5 * max(1, np.abs(wanted).max())


def read(**raw: Any) -> SwinConfig:
    return config_from_timm(raw, CanonicalStateDict("timm", {}, {}), "config.json")[0]


@pytest.mark.parametrize("version", [1, 2])
def test_every_argument_of_timm_is_honoured_or_refused_by_name(version: int) -> None:
    names = set(SIGNATURES[f"timm SwinTransformer{'V2' if version == 2 else ''}"])
    assert names == {*BOTH, *ONLY[version]} | (names & BY_TENSORS["timm"])
    for name in ("embed_layer", "norm_layer", "unheard_of"):
        with pytest.raises(CheckpointError, match=f"model_args has {name} = 'x', which is not supported"):
            read(architecture=TIMM[version], model_args={name: "x"})
    wrong = {
        "head_dim": 7,
        "act_layer": "elu",
        "global_pool": "median",
        "window_size": [7, 0],
        "mlp_ratio": [1.0],
        "depths": [2],
    }
    for name, value in wrong.items():
        with pytest.raises(CheckpointError, match=name):
            read(architecture=TIMM[version], model_args={name: value})


def test_architectures_have_the_arguments_of_timm() -> None:
    for name, given in SIGNATURES["factories"].items():
        if not name.startswith("swinv2_cr"):
            assert read(architecture=name) == read(architecture=name, model_args=given), name


def test_global_pool_is_read_where_timm_wrote_it() -> None:
    """Before timm wrote model_args, config.json had only the pooling of the model; a pretrained_cfg may state it, too."""
    assert read(architecture=TIMM[1], global_pool="max").global_pool == "max"
    assert read(architecture=TIMM[1], global_pool="max", model_args={"global_pool": ""}).global_pool == ""
    assert read(architecture=TIMM[1], pretrained_cfg={"global_pool": "avgmax"}).global_pool == "avgmax"
    assert (
        read(architecture=TIMM[1], pretrained_cfg={"input_size": [1, 64, 32]}, model_args={"in_chans": None}).num_channels == 1
    )


def test_every_argument_of_torchvision_is_honoured_or_refused_by_name(tmp_path: Path) -> None:
    assert set(SIGNATURES["torchvision SwinTransformer"]) == {*TORCHVISION, *BY_TENSORS["torchvision"]}
    for factory in ("swin_t", "swin_s", "swin_b", "swin_v2_t", "swin_v2_s", "swin_v2_b"):
        assert set(SIGNATURES[f"torchvision {factory}"]) == {"weights", "progress", "kwargs"}
    case = next(case for case in cases() if case.system == "torchvision")
    path = checkpoint(case, tmp_path)
    state = torch.load(path, weights_only=True)
    others = {  # norms without biases, the patch merging of the other version, windows of one row and of one column
        "features.1.0.norm1.bias": (None, r"lacks 1 of the .*layernorm_before.bias"),
        "features.2.norm.weight": (torch.ones(16), r"downsample.norm.weight has shape \[16\]"),
        "features.1.0.attn.relative_position_index": (torch.arange(16), "stage 0 is not that of a square window"),
    }
    for name, (tensor, sentence) in others.items():
        torch.save({key: value for key, value in {**state, name: tensor}.items() if value is not None}, path)
        with pytest.raises(CheckpointError, match=sentence):
            checkpoint_from_path(path, TaskSpec())


def test_transformers_is_named_only_for_networks_that_it_can_build() -> None:
    plain = SwinConfig(version=1)
    assert SwinConfig.from_dict(plain.to_dict()).to_dict()["architectures"] == ["SwinForImageClassification"]
    changes = {"global_pool": "max", "always_partition": True, "window_size": ((4, 8),) * 4, "mlp_ratio": (2.0,) * 4}
    for name, value in changes.items():
        assert "architectures" not in dataclasses.replace(plain, **{name: value}).to_dict()


@pytest.mark.parametrize("given", ["4x8", [(4, 8)], [[4, 8]], ((4, 8), (4, 8)), "4x8,4X8"])
def test_windows_are_resized_to_rectangles(given: Any, tmp_path: Path) -> None:
    case = next(case for case in cases() if case.name == 'timm V1 window_size {"window_size": [8, 4]}')
    found = checkpoint_from_path(checkpoint(case, tmp_path), TaskSpec())
    wanted = ExportSpec(weights=str(tmp_path), window_size=given).window_size
    resized = resize_windows(found, window_size=wanted, image_size=(64, 128))
    assert resized.config.window_size == ((4, 8), (4, 8))
    assert any("resized from windows 8x4, 4 to window 4x8, linearly" in note for note in resized.notes)
    table = resized.tensors["encoder.layers.0.blocks.0.attention.self.relative_position_bias_table"]
    assert table.shape == (7 * 15, 2)


def test_the_graph_computes_the_same(tmp_path: Path) -> None:
    """Windows that are not square, and another pooling, through the exporter, the graph passes and ONNX Runtime."""
    ort = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    case = next(
        case
        for case in cases()
        if case.version == 2 and case.given.get("global_pool") == "catavgmax" and "depths" in case.given
    )
    found = checkpoint_from_path(checkpoint(case, tmp_path), TaskSpec())
    traced = onnx_from_torch(SwinNetwork(found.config, case.image_size, found.tensors).eval(), case.image_size)
    embed_weights(traced.model, traced.weights)
    session = ort.InferenceSession(traced.model.SerializeToString())
    (logits,) = session.run(None, {"pixel_values": drawn("pixel_values", (2, 3, *case.image_size))})
    assert np.abs(logits - RECORD[f"{case.name}/logits"]).max() < 1e-5


def test_maps_of_logits_are_not_classes() -> None:
    assert [SwinConfig(version=1, global_pool=pool).has_classes for pool in ("max", "")] == [True, False]
