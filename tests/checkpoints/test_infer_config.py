"""The architecture of files without config.json, and of timm's short one, from shapes, buffers and names."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import pickle
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_cases import DATA, check, state_dict
from safetensors.torch import load_file
from torch import Tensor

from swin_deploy.config import SwinConfig
from swin_deploy.errors import CheckpointError
from swin_deploy.models.checkpoints.recognise import recognise_checkpoint
from swin_deploy.models.checkpoints.state_dict_names import CanonicalStateDict
from swin_deploy.models.checkpoints.timm_config import config_from_timm
from swin_deploy.models.windows import relative_coordinates
from swin_deploy.variants import VARIANTS

V2_RECTANGLE, STRIP = "ms__SwinTransformerV2__rect_h_eq_window", "ms__SwinTransformer__strip_32x96"


def opened(weights: dict[str, Tensor], folder: Path, image_size: tuple[int, int] | None = None) -> Any:
    torch.save({"model": weights}, folder / "a.pth")
    return recognise_checkpoint(folder / "a.pth", image_size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("window", "pretrained"), [(8, 6), (16, 12), (24, 12), (12, 6), (6, 12), (8, 2), (7, 0), (24, 0)])
def test_pretrained_window_from_the_coordinates(window: int, pretrained: int, dtype: torch.dtype, tmp_path: Path) -> None:
    weights = state_dict(V2_RECTANGLE)
    side = 2 * window - 1
    table = torch.from_numpy(relative_coordinates((window, window), pretrained)).reshape(1, side, side, 2).to(dtype)
    for name in weights:
        if name.endswith("relative_coords_table"):
            weights[name] = table
    config = opened(weights, tmp_path).config
    assert config.window_size == (window, window)
    assert config.pretrained_window_sizes == (pretrained, pretrained)


def test_window_from_the_index_alone(tmp_path: Path) -> None:
    weights = state_dict(V2_RECTANGLE)
    weights["layers.0.blocks.0.attn.relative_coords_table"] *= 3
    with pytest.raises(CheckpointError, match="relative_coords_table of stage 0 holds values that Swin V2 never computes"):
        opened(weights, tmp_path)
    weights = {name: t for name, t in state_dict(V2_RECTANGLE).items() if not name.endswith("coords_table")}
    assert opened(weights, tmp_path).config.window_size == (8, 4)
    weights = {name: t for name, t in weights.items() if not name.endswith("position_index")}
    with pytest.raises(CheckpointError, match=r"The window size of .* is unknown: the weights of Swin V2 do not depend on it"):
        opened(weights, tmp_path)


def test_timm_v2_file_without_its_config(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").symlink_to(DATA / "timm__SwinTransformerV2__rect_h_eq_window" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"Pass the folder with config.json"):
        recognise_checkpoint(tmp_path)


def test_rows_and_columns_from_a_mask(tmp_path: Path) -> None:
    """The position of the first masked window determines which side of a rectangle is longer."""
    weights = state_dict(STRIP)
    assert opened(weights, tmp_path).config.image_size == (32, 96)
    mask = weights["layers.0.blocks.1.attn_mask"]
    assert mask.shape == (12, 16, 16)
    turned = mask.reshape(2, 6, 4, 4, 4, 4).permute(1, 0, 3, 2, 5, 4).reshape(12, 16, 16)
    weights["layers.0.blocks.1.attn_mask"] = turned
    assert opened(weights, tmp_path).config.image_size == (96, 32)
    weights["layers.0.blocks.1.attn_mask"] = torch.zeros(12, 16, 16)
    with pytest.raises(CheckpointError, match="attn_mask holds a mask that Swin never computes"):
        opened(weights, tmp_path)
    weights["layers.0.blocks.1.attn_mask"] = mask[:, :9, :9]
    with pytest.raises(CheckpointError, match=r"attn_mask has shape \[12, 9, 9\]. Expected 16 tokens per window"):
        opened(weights, tmp_path)


def test_image_size_that_only_one_side_is_known_of() -> None:
    assert recognise_checkpoint(DATA / V2_RECTANGLE).notes == (
        "image size 32x32 is assumed: the file shows only that the shorter side is 32",
    )
    source = recognise_checkpoint(DATA / V2_RECTANGLE, image_size=(32, 64))
    assert (source.config.image_size, source.notes) == ((32, 64), ())
    assert recognise_checkpoint(DATA / V2_RECTANGLE, image_size=(64, 64)).config.image_size == (32, 32)


def without_buffers() -> dict[str, Tensor]:
    return {n: t for n, t in state_dict(STRIP).items() if not n.endswith(("attn_mask", "position_index"))}


def test_image_size_that_nothing_tells(tmp_path: Path) -> None:
    weights = without_buffers()
    source = opened(weights, tmp_path)
    assert source.config.image_size == (224, 224)
    assert source.notes == (
        "image size 224x224 is assumed: the file does not contain it",
        "the file has no buffers, so the shifts of Microsoft's classifier are assumed; detectors: --always-partition",
    )
    assert opened(weights, tmp_path, (64, 128)).config.image_size == (64, 128)


def test_index_of_transformers_tells_no_image_size(tmp_path: Path) -> None:
    """transformers 4 saved the index but no masks, so missing masks do not mean that no stage shifts."""
    weights = state_dict("hf434__SwinForImageClassification__abspos_broken")
    assert any(name.endswith("relative_position_index") for name in weights)
    del weights["swin.embeddings.position_embeddings"]
    assert opened(weights, tmp_path).config.image_size == (224, 224)


def test_image_size_from_position_embeddings(tmp_path: Path) -> None:
    weights = without_buffers()
    weights["absolute_pos_embed"] = torch.zeros(1, 64, 16)
    source = opened(weights, tmp_path)
    assert (source.config.image_size, source.config.use_absolute_embeddings, len(source.notes)) == ((32, 32), True, 2)
    weights["absolute_pos_embed"] = torch.zeros(1, 32, 16)
    assert opened(weights, tmp_path, (16, 32)).config.image_size == (16, 32)
    for given in (None, (32, 32)):
        with pytest.raises(CheckpointError, match=r"embeddings for 32 patches.* Pass the image size"):
            opened(weights, tmp_path, given)


def test_image_size_from_a_training_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Microsoft's training checkpoints contain a yacs CfgNode, a subclass of dict."""
    yacs = types.ModuleType("yacs.config")
    yacs.CfgNode = type("CfgNode", (dict,), {"__module__": "yacs.config"})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
    monkeypatch.setitem(sys.modules, "yacs.config", yacs)
    weights = without_buffers()
    config = yacs.CfgNode({"DATA": yacs.CfgNode({"IMG_SIZE": 160})})
    torch.save({"model": weights, "config": config}, tmp_path / "a.pth")
    monkeypatch.undo()
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "a.pth", weights_only=True)
    assert recognise_checkpoint(tmp_path / "a.pth").config.image_size == (160, 160)


@pytest.mark.parametrize("name", ["timm__SwinTransformerV2__rect_h_eq_window", "timm__SwinTransformer__dynamic_72x56"])
def test_architecture_that_the_trainer_of_timm_states(name: str, tmp_path: Path) -> None:
    raw = json.loads((DATA / name / "config.json").read_text())
    weights = load_file(DATA / name / "model.safetensors")
    arguments = {"img_size": raw["pretrained_cfg"]["input_size"][1:]} | raw["model_args"]
    file = {"arch": raw["architecture"], "args": argparse.Namespace(model_kwargs=arguments), "state_dict": weights}
    torch.save(file, tmp_path / "a.pth")
    source, expected = recognise_checkpoint(tmp_path / "a.pth"), recognise_checkpoint(DATA / name).config
    assert dataclasses.replace(source.config, id2label=expected.id2label) == expected
    assert source.notes[-1] == f"the architecture is timm's {raw['architecture']}, which the file states"
    torch.save(file | {"arch": "swin_large_patch4_window7_224", "args": None}, tmp_path / "a.pth")  # another architecture
    if expected.version == 1:
        assert recognise_checkpoint(tmp_path / "a.pth", (64, 64)).notes == ()


def test_image_size_from_the_arguments_of_a_trainer(tmp_path: Path) -> None:
    for key, value, size in (("args", {"img_size": 96}, (96, 96)), ("hyper_parameters", {"input_size": [3, 64, 96]}, (64, 96))):
        torch.save({"state_dict": without_buffers(), key: argparse.Namespace(**value)}, tmp_path / "a.pth")
        source = recognise_checkpoint(tmp_path / "a.pth")
        assert source.config.image_size == size
        assert source.notes[0] == f"image size {size[0]}x{size[1]} is that of the training arguments in the file"
        assert recognise_checkpoint(tmp_path / "a.pth", (32, 32)).config.image_size == (32, 32)


def test_qkv_bias_and_patch_norm(tmp_path: Path) -> None:
    weights = {name: t for name, t in state_dict(STRIP).items() if not name.endswith("qkv.bias")}
    source = opened({n: t for n, t in weights.items() if not n.startswith("patch_embed.norm")}, tmp_path)
    assert (source.config.qkv_bias, source.patch_norm) == (False, False)


@pytest.mark.parametrize("ratio", [1.0, 2.7, 3.0, 4.0])
def test_mlp_ratio_is_truncated_as_the_systems_do(ratio: float, tmp_path: Path) -> None:
    weights = state_dict(STRIP)
    for name in weights:
        if ".mlp.fc1.weight" in name:
            width = weights[name].shape[1]
            weights[name] = torch.zeros(int(ratio * width), width)
    config = opened(weights, tmp_path).config
    assert [config.mlp_width(stage) for stage in range(2)] == [int(ratio * 16), int(ratio * 32)]


def test_shapes_that_contradict_each_other(tmp_path: Path) -> None:
    for change, sentence in (
        ({"layers.0.blocks.0.mlp.fc1.weight": torch.zeros(40, 16)}, "the MLPs have widths"),
        ({"layers.0.blocks.0.attn.relative_position_bias_table": torch.zeros(35, 1)}, "not that of a square window"),
        ({"layers.0.blocks.0.attn.relative_position_bias_table": torch.zeros(49, 3)}, "3 attention heads do not divide"),
        ({"layers.0.blocks.0.attn.relative_position_bias_table": torch.zeros(49)}, "expected 2 sizes"),
        ({"patch_embed.proj.weight": torch.zeros(16, 3, 4)}, "expected 4 sizes"),
        ({"patch_embed.proj.weight": torch.zeros(16, 0, 4, 4)}, "none of them 0"),
        ({"layers.0.blocks.0.attn.qkv.weight": torch.zeros(47, 16)}, "expected rows for query, key and value"),
        ({"layers.7.blocks.0.norm1.weight": torch.zeros(16)}, "lacks a stage or a block before the last one"),
        ({"decoder.0.weight": torch.zeros(17, 32, 1, 1)}, "Expected a square number for each of 3 channels"),
    ):
        with pytest.raises(CheckpointError, match=sentence):
            opened(state_dict(STRIP) | change, tmp_path)


def timm(**raw: Any) -> SwinConfig:
    return config_from_timm(raw, CanonicalStateDict("timm", {}, {}), "config.json")[0]


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v.timm_name], ids=lambda v: v.timm_name)
def test_timm_architecture_names_tell_everything(variant: Any) -> None:
    """A hub model of timm has no model_args."""
    architecture, tag = variant.timm_name.split(".")
    config = timm(architecture=architecture, num_classes=variant.num_labels, pretrained_cfg={"tag": tag})
    published = variant.config()
    if variant.version == 2 and "12to" not in architecture:
        assert config.pretrained_window_sizes == (0, 0, 0, 0)
    assert (config, config.num_labels) == (published, variant.num_labels)


def test_timm_arguments() -> None:
    config = timm(
        architecture="swin_tiny_patch4_window7_224",
        model_args={"img_size": [64, 96], "window_size": [4, 4], "depths": [1, 2], "num_heads": [1, 2], "embed_dim": 8}
        | {"qkv_bias": False, "in_chans": 1, "mlp_ratio": 3, "patch_size": 2, "act_layer": "gelu_tanh", "num_classes": 3},
        pretrained_cfg={"input_size": [3, 224, 224], "label_names": ["a", "b", "c"]},
    )
    assert config == SwinConfig(
        version=1, image_size=(64, 96), patch_size=(2, 2), num_channels=1, embed_dim=8, depths=(1, 2), num_heads=(1, 2),
        window_size=(4, 4), mlp_ratio=3.0, qkv_bias=False, hidden_act="gelu_pytorch_tanh", id2label={0: "a", 1: "b", 2: "c"},
    )  # fmt: skip
    sizes = {"architecture": "swin_tiny_patch4_window7_224", "num_classes": 2}
    assert timm(**sizes, pretrained_cfg={"input_size": [3, 448, 320]}).image_size == (448, 320)
    assert timm(**sizes, pretrained_cfg={"input_size": [3, 9, 9], "fixed_input_size": False}).image_size == (224, 224)
    assert timm(**sizes, input_size=[3, 64, 64]).image_size == (64, 64)  # before timm 0.9: one object for all
    assert timm(**sizes, model_args={"window_size": [7, 7, 14, 7]}).window_size == (7, 7, 14, 7)


def test_timm_window_that_is_as_small_as_its_feature_map(tmp_path: Path) -> None:
    """timm reduces V1's window and table to the map: a window of 7 becomes 4 and 2 on 4x4 and 2x2 patches."""
    folder = DATA / "timm__SwinTransformer__bin_only"
    weights = state_dict(folder.name)
    for name in weights:
        if name.startswith("layers.1.") and name.endswith("bias_table"):
            weights[name] = weights[name][:9]
    torch.save(weights, tmp_path / "pytorch_model.bin")
    raw = json.loads((folder / "config.json").read_text())
    raw["model_args"] |= {"img_size": 16, "window_size": 7}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    source = recognise_checkpoint(tmp_path)
    assert source.config.window_size == (4, 2)
    assert source.notes[0] == "the window of stage 0 is 4, the size of its bias table, and not 7"
    check(source, "image-classification")


@pytest.mark.parametrize(
    ("raw", "sentence"),
    [
        ({"architecture": "swinv2_cr_tiny_224"}, "timm's swinv2_cr, a different network from Swin V2"),
        ({"architecture": "resnet50"}, 'No Swin variant is named "timm/resnet50"'),
        ({"model_args": {"window_size": [7, 8, 9]}}, "window_size: expected|4 stages, but windows for 3"),
        ({"model_args": {"head_dim": 16}}, "head_dim is 16, and only"),
        ({"model_args": [1]}, "are not objects"),
        ({"model_args": {"depths": [2, 2, "x"]}}, "invalid literal"),
        ({"model_args": {"act_layer": "tanhshrink"}}, "tanhshrink"),
        ({"num_classes": 10**12}, "num_classes is 1000000000000"),
        ({"num_classes": math.inf}, "cannot convert float infinity"),
    ],
)
def test_timm_configs_that_are_refused(raw: dict[str, Any], sentence: str) -> None:
    with pytest.raises(CheckpointError, match=sentence):
        timm(**({"architecture": "swin_tiny_patch4_window7_224"} | raw))
