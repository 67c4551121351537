"""Weights as training scripts save them: in any dictionary, under any prefix, with other tensors and objects beside them."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import re
import types
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from checkpoint_cases import DATA, check, refused, state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from swin_deploy.config import SwinConfig
from swin_deploy.errors import CheckpointError, UsageError
from swin_deploy.exporters.checkpoint_from_request import spec_of_export
from swin_deploy.models.checkpoints import checkpoint_from_path
from swin_deploy.models.checkpoints.recognise import RecognisedCheckpoint, recognise_checkpoint
from swin_deploy.models.swin import SwinNetwork
from swin_deploy.tasks import TaskSpec

Weights = dict[str, Tensor]
DOCS = Path(__file__).parents[2] / "docs/reference/checkpoints.md"
STRIP = "ms__SwinTransformer__strip_32x96"
REPORTED = Path(__file__).parent / "reported"
NAMES = {
    "transformers": "hf523__SwinForImageClassification__sharded",
    "timm": "timm__SwinTransformer__bin_only",
    "Microsoft": STRIP,
    "torchvision": "tv__SwinTransformer__pad_52x68",
}
SECOND_BLOCK = re.compile(r"blocks\.1\.|features\.\d*[13579]\.1\.")  # leaving it out halves the time
# As nn.DataParallel, torch.compile, FSDP, LightningModules and networks around a backbone write them.
PREFIXES = ("", "module.", "model.", "net.backbone.", "module._orig_mod.", "encoder_q._fsdp_wrapped_module.")


def noise(weights: Weights) -> Weights:
    return {name: torch.randn_like(t) if t.is_floating_point() else t for name, t in weights.items()}


def lightning(weights: Weights) -> Any:
    return {
        "epoch": 3, "pytorch-lightning_version": "2.6.0", "loops": {"fit_loop": {"state_dict": {}}},
        "state_dict": weights | {"criterion.weight": torch.ones(10)}, "callbacks": {}, "lr_schedulers": [],
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(3)}}}],
        "hyper_parameters": {"lr": 0.1, "args": argparse.Namespace(img_size=32)},
    }  # fmt: skip


def averaged(weights: Weights) -> Any:
    return {"n_averaged": torch.tensor(5)} | {f"module.{name}": tensor for name, tensor in weights.items()}


WRAPPERS: dict[str, Callable[[Weights], Any]] = {
    "state dict": OrderedDict,
    "safetensors": lambda w: w,
    '`{"state_dict": ...}`': lambda w: {"state_dict": w, "arch": "swin", "partial": functools.partial(dict, a=1)},
    '`{"params": ...}`': lambda w: {"params": w, "meter": torch.tensor(0.5)},
    '`{"model": {"weights": ...}}`': lambda w: {"model": {"weights": w, "step": 3}},
    "Lightning": lightning,
    "DeepSpeed": lambda w: {"module": w, "ds_config": {"zero": 1}, "dp_world_size": 8, "param_shapes": [torch.Size([3])]},
    "`AveragedModel`": averaged,
    "timm's trainer with EMA": lambda w: {"arch": "swin", "state_dict": noise(w), "args": None, "state_dict_ema": w},
    "student and teacher": lambda w: {"student": noise(w), "teacher": w, "dino_loss": {"center": torch.zeros(1, 9)}},
    '`{"model": ..., "ema": ...}`': lambda w: {"model": noise(w), "ema": w, "optimizer": {"state": {}}},
    "numpy arrays": lambda w: {"model": {name: tensor.numpy() for name, tensor in w.items()}},
}


@cache
def original(name: str) -> tuple[Weights, Mapping[str, Tensor]]:
    """The weights of a case as in its files, and what is read from its folder; only the first block of each stage."""
    folder = DATA / NAMES[name]
    parts = [load_file(file) for file in sorted(folder.glob("*.safetensors"))] or [state_dict(folder.name)]
    weights = {key: tensor for part in parts for key, tensor in part.items() if not SECOND_BLOCK.search(key)}
    whole = recognise_checkpoint(folder if name == "timm" else next(iter(folder.glob("*.pth")), folder)).tensors
    return weights, {key: whole[key] for key in whole if not SECOND_BLOCK.search(key)}


def saved(content: Any, folder: Path) -> RecognisedCheckpoint:
    torch.save(content, folder / "a.pth")
    return recognise_checkpoint(folder / "a.pth")


def equal(ours: RecognisedCheckpoint, theirs: Mapping[str, Tensor]) -> bool:
    return sorted(ours.tensors) == sorted(theirs) and all(torch.equal(ours.tensors[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_every_wrapper_prefix_and_framework(wrapper: str, tmp_path: Path) -> None:
    cells = []
    for framework in NAMES:
        weights, expected = original(framework)
        good = 0
        for prefix in PREFIXES:
            content = WRAPPERS[wrapper]({prefix + name: tensor for name, tensor in weights.items()})
            path = tmp_path / ("a.safetensors" if wrapper == "safetensors" else "a.pth")
            (save_file if wrapper == "safetensors" else torch.save)(content, path)
            good += equal(recognise_checkpoint(path), expected)
        cells.append(f"{good} of {len(PREFIXES)}")
    row = f"| {wrapper} | {' | '.join(cells)} |"
    assert row in DOCS.read_text(encoding="utf-8")
    assert cells == ["6 of 6"] * 4


MICROSOFT, TIMM = original("Microsoft")[0], original("timm")[0]
WIDTH, CLASSES = MICROSOFT["head.weight"].shape[1], len(MICROSOFT["head.weight"])
BODY = {name: tensor for name, tensor in MICROSOFT.items() if not name.startswith("head.")}
AROUND = {f"model.backbone.{name}": tensor for name, tensor in BODY.items()}


def linear(name: str, outputs: int, inputs: int = WIDTH, bias: bool = True) -> Weights:
    weights = {f"{name}.weight": torch.randn(outputs, inputs)}
    return weights | ({f"{name}.bias": torch.randn(outputs)} if bias else {})


def two(first: str, second: str) -> Any:
    """Two copies of one network in a file, of which the one under `first` is the right one."""
    top: dict[str, Any] = {"epoch": 3}
    for name, weights in ((second, noise(MICROSOFT)), (first, MICROSOFT)):
        key, _, prefix = name.partition("/")
        top.setdefault(key, {}).update({prefix + n: t for n, t in weights.items()})
    return top


@pytest.mark.parametrize(
    ("first", "second", "averaged"),
    [
        ("state_dict_ema", "state_dict", True),  # timm
        ("state_dict/model_ema.module.", "state_dict/model.", True),
        ("state_dict/ema_model.", "state_dict/online_model.", True),  # ema-pytorch
        ("state_dict", "current_model_state", False),  # WeightAveraging of Lightning
        ("teacher", "student/backbone.", True),
        ("state_dict/module.encoder_q.", "state_dict/module.encoder_k.", False),  # MoCo
        ("model/online_encoder.", "model/target_encoder.", False),  # BYOL
    ],
)
def test_of_two_copies_the_averaged_one_is_loaded(first: str, second: str, averaged: bool, tmp_path: Path) -> None:
    found = saved(two(first, second), tmp_path)
    assert equal(found, original("Microsoft")[1])
    one, other = (name.replace("/", ".").rstrip(".") for name in (first, second))
    kind = "averaged weights (EMA)" if averaged else "weights"
    assert found.notes[0] == f"the {kind} under {one} are used, and not those under {other}; --weights-key chooses others"


@pytest.mark.parametrize("key", ["model", "state_dict", "state_dict.net", "net"])
def test_weights_key(key: str, tmp_path: Path) -> None:
    torch.save(two("state_dict/net.", "state_dict_ema/average."), tmp_path / "a.pth")
    assert not equal(recognise_checkpoint(tmp_path / "a.pth"), original("Microsoft")[1])
    found = recognise_checkpoint(tmp_path / "a.pth", weights_key=key)
    assert equal(found, original("Microsoft")[1])
    assert found.notes[0] == "the weights under state_dict.net are used, by --weights-key"
    with pytest.raises(UsageError, match=r"no Swin under gen. Expected one of state_dict_ema\.average, state_dict\.net"):
        recognise_checkpoint(tmp_path / "a.pth", weights_key="gen")


class Average:
    """Keeps averaged weights as the classes of many trainers do."""

    def __init__(self, weights: Weights) -> None:
        self.decay, self.shadow, self.backup = 0.99, weights, {}


def test_averages_in_objects_and_lists(tmp_path: Path) -> None:
    for content in ({"model": noise(MICROSOFT), "ema": Average(MICROSOFT)}, [{"lr": 0.1}, MICROSOFT]):
        assert equal(saved(content, tmp_path), original("Microsoft")[1])
    found = saved({"model": MICROSOFT, "ema": {"decay": 0.9, "shadow_params": list(noise(MICROSOFT).values())}}, tmp_path)
    assert "the averaged weights under ema have no names and are left out: copy them into the model first" in found.notes


def test_swins_of_which_none_is_meant_and_one_under_two_names(tmp_path: Path) -> None:
    sentence = r"holds 2 Swins: .*, .*\. Choose one with --weights-key"
    torch.save(two("rgb", "depth"), tmp_path / "a.pth")
    refused(tmp_path / "a.pth", sentence)
    torch.save({"student": MICROSOFT, "teacher": original("torchvision")[0]}, tmp_path / "a.pth")  # a larger teacher
    refused(tmp_path / "a.pth", sentence)
    twice = {f"{prefix}{name}": t for prefix in ("net.", "compiled._orig_mod.") for name, t in MICROSOFT.items()}
    found = saved(twice, tmp_path)
    assert equal(found, original("Microsoft")[1])
    assert not any("--weights-key" in note for note in found.notes)


def test_wrappers_of_blocks_and_whole_modules(tmp_path: Path) -> None:
    inside = {n.replace("blocks.0.", "_orig_mod.blocks.0._checkpoint_wrapped_module."): t for n, t in MICROSOFT.items()}
    assert equal(saved(inside, tmp_path), original("Microsoft")[1])
    model = transformers.SwinForImageClassification.from_pretrained(DATA / NAMES["transformers"])
    expected = recognise_checkpoint(DATA / NAMES["transformers"]).tensors
    for content in (model, {"epoch": 3, "model": nn.DataParallel(model), "ema": None}):
        assert equal(saved(content, tmp_path), expected)


def test_other_tensors_are_left_out_and_named(tmp_path: Path) -> None:
    others = {
        "loss_fn.weight": torch.ones(3), "head_dist.weight": torch.ones(CLASSES, WIDTH), "dino.center": torch.ones(1, 3),
        "layers.0.blocks.0.total_ops": torch.ones(1), "meter": torch.tensor(3),
    }  # fmt: skip
    found = saved({"net": MICROSOFT | others}, tmp_path)
    assert equal(found, original("Microsoft")[1])
    [note] = [note for note in found.notes if "left out" in note]
    some = "loss_fn.weight, head_dist.weight, dino.center, layers.0.blocks.0.total_ops, ..."
    assert note == f"5 tensors that are not part of the Swin are left out: {some}"
    for prefix in ("", "net."):  # what a Swin lacks or has changed is never left out
        missing = {prefix + n: t for n, t in MICROSOFT.items() if "layers.1.blocks.0.norm1" not in n}
        with pytest.raises(
            CheckpointError, match=r"lacks 2 of the 45 parameters.*encoder\.layers\.1\.blocks\.0\.layernorm_before"
        ):
            check(saved(missing, tmp_path), "image-classification")
        wrong = {prefix + n: t[:-1] if n == "norm.weight" else t for n, t in MICROSOFT.items()}
        with pytest.raises(CheckpointError, match=r"layernorm\.weight has shape \[31\], but the config asks for \[32\]"):
            check(saved(wrong, tmp_path), "image-classification")
        torch.save(
            {prefix + n: t for n, t in MICROSOFT.items()} | {f"{prefix}layers.0.gate": torch.ones(1)}, tmp_path / "a.pth"
        )
        refused(tmp_path / "a.pth", r"holds 1 tensors that no Swin has: layers\.0\.gate")


@pytest.mark.parametrize(
    ("weights", "name", "noted"),
    [
        (BODY | linear("head.1", 7), "head.1", False),
        (BODY | linear("head.fc.1", 7, bias=False), "head.fc.1", False),
        (BODY | linear("fc", 7), "fc", True),
        (BODY | linear("classifier", 7) | linear("aux_head", 9), "classifier", False),
        (AROUND | linear("model.fc", 7) | {"n_averaged": torch.tensor(3), "loss.weight": torch.ones(7)}, "model.fc", True),
        (AROUND | linear("head.last", 7) | linear("proj_head", 9), "head.last", True),
        ({f"0.{name}": tensor for name, tensor in BODY.items()} | linear("2", 7), "2", True),  # nn.Sequential
        ({"backbone": BODY, "head": {"weight": torch.ones(7, WIDTH)}}, "head", True),
    ],
)
def test_heads_of_one_linear_layer(weights: Any, name: str, noted: bool, tmp_path: Path) -> None:
    found = saved(weights, tmp_path)
    task, flat = TaskSpec(), weights if "head" not in weights else {"head.weight": weights["head"]["weight"]}
    tensors = checkpoint_from_path(tmp_path / "a.pth", task).tensors
    assert torch.equal(tensors["classifier.weight"], flat[f"{name}.weight"])
    assert torch.equal(tensors["classifier.bias"], flat.get(f"{name}.bias", torch.zeros(7)))
    assert (found.config.num_labels, any("the head is" in note for note in found.notes)) == (7, noted)
    encoder = checkpoint_from_path(tmp_path / "a.pth", TaskSpec("feature-extraction"))
    assert "the classification head of 7 classes is left out, because the task feature-extraction has none" in encoder.notes


@pytest.mark.parametrize(
    ("weights", "what"),
    [
        (
            BODY | linear("head.1", 7) | {"head.0.weight": torch.ones(WIDTH), "head.0.bias": torch.ones(WIDTH)},
            r"head\.1\.weight",
        ),
        (AROUND | linear("model.fc", 7) | {"model.bn.weight": torch.ones(WIDTH)}, r"model\.bn\.weight"),
        (AROUND | linear("color_head", 7) | linear("type_head", 9), "color_head, type_head"),
        (AROUND | linear("tower", 7), r"tower\.weight"),
        (BODY | linear("fc", 7) | {"bn.weight": torch.ones(WIDTH)}, r"bn\.weight"),
        (BODY | {"head.weight_g": torch.ones(7, 1), "head.weight_v": torch.ones(7, WIDTH)}, r"head\.weight_g"),
    ],
)
def test_heads_that_are_something_else(weights: Weights, what: str, tmp_path: Path) -> None:
    torch.save(weights, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=rf"has a head that cannot be exported \({what}.*--task feature-extraction"):
        checkpoint_from_path(tmp_path / "a.pth", TaskSpec())
    notes = checkpoint_from_path(tmp_path / "a.pth", TaskSpec("feature-extraction")).notes
    assert any(re.search(rf"the classification head \({what}.* is left out", note) for note in notes)


@pytest.mark.parametrize("activation", ["relu", "gelu", "linear"])
def test_heads_of_several_linear_layers(activation: str, tmp_path: Path) -> None:
    act = {"relu": nn.ReLU(), "gelu": nn.GELU(), "linear": nn.Identity()}[activation]
    head = nn.Sequential(nn.Linear(WIDTH, 12), act, nn.Dropout(), nn.Linear(12, 7)).eval()
    saved(BODY | {f"head.{name}": tensor for name, tensor in head.state_dict().items()}, tmp_path)
    path = tmp_path / "a.pth"
    with pytest.raises(CheckpointError, match=r"has a head of 2 linear layers, .* Pass --head-activation relu"):
        checkpoint_from_path(path, TaskSpec())
    found = checkpoint_from_path(path, TaskSpec(), head_activation=activation)
    pooled = checkpoint_from_path(path, TaskSpec("feature-extraction"))
    pixels = torch.randn(2, 3, 32, 32)
    logits = SwinNetwork(found.config, (32, 32), found.tensors).named(pixels)["logits"]
    encoder = SwinNetwork(pooled.config, (32, 32), pooled.tensors, TaskSpec("feature-extraction"))
    torch.testing.assert_close(logits, head(encoder.named(pixels)["pooler_output"]))
    assert SwinConfig.from_dict(found.config.to_dict()) == dataclasses.replace(found.config, backbone_maps=True)


@pytest.mark.parametrize(
    "weights",
    [
        AROUND | linear("model.fc1", 12) | linear("model.fc2", 7, 12),
        BODY | linear("head.fc1", 12) | linear("head.fc2", 7, 12),
        AROUND | linear("model.backbone.head", 12) | linear("classifier", 7, 12),
        {f"0.{name}": tensor for name, tensor in BODY.items()} | linear("1", 12) | linear("3", 7, 12),
    ],
)
def test_layers_that_continue_a_head_are_part_of_it(weights: Weights, tmp_path: Path) -> None:
    config = saved(weights, tmp_path).config
    assert (config.head_widths, config.num_labels) == ((12,), 7)
    with pytest.raises(CheckpointError, match=r"a head of 2 linear layers"):
        checkpoint_from_path(tmp_path / "a.pth", TaskSpec())


@pytest.mark.parametrize(
    ("file", "expected", "side"),
    [
        (DATA / "timm__features_only/model.pth", DATA / "timm__features_only/reference.npz", 48),
        (REPORTED / "timm_features_only.pth", REPORTED / "expected.npz", 32),
    ],
)
def test_features_only_of_timm(file: Path, expected: Path, side: int) -> None:
    """The maps of timm 1.0.31, which does not normalize them."""
    with np.load(expected) as recorded:
        arrays = dict(recorded)
    task = TaskSpec("backbone", out_features=("stage1", "stage2"))
    found = checkpoint_from_path(file, task, image_size=(side, side))
    maps = SwinNetwork(found.config, (side, side), found.tensors, task).named(torch.from_numpy(arrays["pixel_values"]))
    for name, features in maps.items():
        torch.testing.assert_close(features.detach(), torch.from_numpy(arrays[name]), rtol=1e-5, atol=1e-5)


def test_detectors_of_microsoft_shift_on_every_map(tmp_path: Path) -> None:
    """Their names and norms, no attn_mask, and the answers of transformers' backbone, which has the same rule."""
    config = transformers.SwinConfig(
        image_size=32, embed_dim=16, depths=[2, 2], num_heads=[1, 2], window_size=4, out_features=["stage1", "stage2"]
    )
    model = transformers.SwinBackbone(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    weights: Weights = {}
    names = {
        "swin.": "", "encoder.layers": "layers", "embeddings.patch_embeddings.projection": "patch_embed.proj",
        "embeddings.norm": "patch_embed.norm", "hidden_states_norms.stage1": "norm0", "hidden_states_norms.stage2": "norm1",
        "layernorm_before": "norm1", "layernorm_after": "norm2", "attention.o_proj": "attn.proj",
        "attention.relative_position_bias.": "attn.",
    }  # fmt: skip
    for name, tensor in model.state_dict().items():
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        weights[name] = tensor
    for prefix in sorted({name.split("attention.q_proj")[0] for name in weights if "attention.q_proj" in name}):
        for leaf in ("weight", "bias"):
            weights[f"{prefix}attn.qkv.{leaf}"] = torch.cat([weights.pop(f"{prefix}attention.{p}_proj.{leaf}") for p in "qkv"])
        weights[f"{prefix}attn.relative_position_index"] = torch.zeros(16, 16, dtype=torch.int64)
    task = TaskSpec("backbone", out_features=("stage1", "stage2"))
    pixels = torch.randn(1, 3, 32, 32)
    expected = model(pixels).feature_maps
    for kept in (weights, {n: t for n, t in weights.items() if "norm0" not in n and n != "norm1.weight" and n != "norm1.bias"}):
        torch.save({"model": kept}, tmp_path / "a.pth")
        found = checkpoint_from_path(tmp_path / "a.pth", task, image_size=(32, 32))
        assert found.config.always_partition
        assert "windows are shifted on maps of every size, as in detectors: the file has no attn_mask" in found.notes
        if kept is weights:
            maps = SwinNetwork(found.config, (32, 32), found.tensors, task)(pixels)
            for ours, theirs in zip(maps, expected, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    bare = {n: t for n, t in weights.items() if n.startswith(("layers", "patch_embed")) and not n.endswith("_index")}
    torch.save(bare, tmp_path / "a.pth")
    for always in (False, True):
        found = checkpoint_from_path(tmp_path / "a.pth", task, image_size=(32, 32), always_partition=always)
        assert found.config.always_partition is always
        assert any("the file has no buffers" in note for note in found.notes)


@pytest.mark.parametrize(
    ("extra", "sentence"),
    [
        ("attn.qkv.lora_A.default.weight", r"adapter weights .* not merged .* model\.merge_and_unload\(\)"),
        ("attn.qkv.base_layer.weight", r"adapter weights .* not merged .* model\.merge_and_unload\(\)"),
        ("attn.qkv.SCB", r"weights that bitsandbytes quantized .* model\.dequantize\(\)"),
        ("mlp.fc1.weight.quant_state.bitsandbytes__nf4", r"weights that bitsandbytes quantized .* model\.dequantize\(\)"),
    ],
)
def test_weights_that_need_more_than_a_swin(extra: str, sentence: str, tmp_path: Path) -> None:
    torch.save({"model": MICROSOFT | {f"layers.0.blocks.0.{extra}": torch.ones(3)}}, tmp_path / "a.pth")
    refused(tmp_path / "a.pth", sentence)


def test_peft_folders_and_fp8(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "microsoft/swin-tiny", "peft_type": "LORA"}')
    refused(
        tmp_path, r"is a PEFT adapter of microsoft/swin-tiny.* PeftModel\.from_pretrained\(model, '.*'\)\.merge_and_unload\(\)"
    )
    name = "layers.0.blocks.0.mlp.fc1.weight"
    fp8 = MICROSOFT | {name: MICROSOFT[name].to(torch.float8_e4m3fn)}
    torch.save(fp8, tmp_path / "a.pth")
    refused(tmp_path / "a.pth", r"is of type float8_e4m3fn; .* or its scale.* model\.to\(torch\.bfloat16\)\.save_pretrained")
    rows, columns = fp8[name].shape
    for shape in ((), (1,), (rows,), (rows, 1), (2, 1)):
        scale = torch.rand(shape) + 1
        found = saved(fp8 | {f"{name}_scale_inv": scale, "layers.0.blocks.0.mlp.fc1.input_scale": torch.ones(1)}, tmp_path)
        each = scale.reshape(-1, 1).expand(-1, columns).repeat_interleave(rows // max(scale.numel(), 1), 0)
        assert torch.equal(found.tensors["encoder.layers.0.blocks.0.intermediate.dense.weight"], fp8[name].float() * each)


@pytest.mark.parametrize(
    "name", ["lightning.ckpt", "timm_sd_backbone.pth", "timm_train_ema.pth.tar", "ms_ema_only.pth", "plain"]
)
def test_files_of_trainers_give_the_logits_of_timm(name: str) -> None:
    """The files were reported as refused or wrong. timm 1.0.31 computed the logits from the weights that it would load."""
    with np.load(REPORTED / "expected.npz") as file:
        pixels, logits = (torch.from_numpy(file[key]) for key in ("pixel_values", name))
    path = REPORTED / (name if name != "plain" else "timm_train_ema.pth.tar")
    found = checkpoint_from_path(path, TaskSpec(), image_size=(32, 32), weights_key="model" if name == "plain" else None)
    network = SwinNetwork(found.config, (32, 32), found.tensors)
    torch.testing.assert_close(network.named(pixels)["logits"], logits, rtol=1e-5, atol=1e-5)
    assert ("1 tensor that is not part of the Swin is left out: state_dict.loss.weight" in found.notes) == (
        name == "lightning.ckpt"
    )


def test_adapter_of_peft() -> None:
    folder = REPORTED / "peft_adapter"
    refused(folder, r"is a PEFT adapter of user/swin, .*merge_and_unload\(\)")
    refused(folder / "adapter_model.safetensors", r"adapter weights .* not merged .*lora_A.*merge_and_unload\(\)")


def test_config_of_a_trainer_beside_the_weights(tmp_path: Path) -> None:
    """PyTorchModelHubMixin writes the arguments of the class as config.json."""
    (tmp_path / "config.json").write_text('{"num_classes": 10, "hidden": 64}')
    save_file({f"backbone.{name}": tensor for name, tensor in MICROSOFT.items()}, tmp_path / "model.safetensors")
    found = recognise_checkpoint(tmp_path)
    assert equal(found, original("Microsoft")[1])
    assert found.notes[0] == "config.json states no Swin of transformers or timm, and is not used"


def test_later_commands_load_the_weights_that_were_exported() -> None:
    """`evaluate --weights` and `bench --weights` compare with the checkpoint, with the options of the export."""
    config = SwinConfig(1, head_widths=(12,), head_act="relu", always_partition=True)
    manifest = types.SimpleNamespace(semantics="timm", weights_key="model")
    bundle: Any = types.SimpleNamespace(manifest=manifest, config=config, task=TaskSpec())
    spec = spec_of_export(bundle, "a.pth", (64, 96))
    found = (spec.weights, spec.image_sizes, spec.framework, spec.weights_key, spec.head_activation, spec.always_partition)
    assert found == ("a.pth", ((64, 96),), "timm", "model", "relu", True)
