"""Checkpoints of transformers, timm, Microsoft's code, torchvision and TensorFlow are recognised and read correctly."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import datetime as dt
import functools
import json
import mmap
import re
import shutil
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
import transformers
from checkpoint_cases import CASES, DATA, SAME, Case, check, state_dict, tensor_pickle, write_legacy, write_zip
from safetensors.torch import load_file, save_file
from torch import Tensor

from swin_deploy.errors import CheckpointError
from swin_deploy.models.checkpoints.recognise import recognise_checkpoint
from swin_deploy.models.checkpoints.weight_files import open_weights

HF = "hf523__SwinForImageClassification__nonsquare_72x56"
MASKED = "hf523__SwinForMaskedImageModeling__basic"


def differing(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> list[str]:
    assert sorted(ours) == sorted(theirs)
    return [name for name in ours if not torch.equal(ours[name], theirs[name])]


@pytest.mark.parametrize("name", sorted(CASES))
def test_each_checkpoint_is_recognised_and_complete(name: str) -> None:
    source = recognise_checkpoint(DATA / name)
    config, case = source.config, CASES[name]
    fields = ("version", "image_size", "window_size", "embed_dim", "mlp_ratio", "num_labels")
    assert case == Case(source.writer, case.task, *(getattr(config, field) for field in fields), len(source.notes))
    stages = len(config.window_size)
    assert (config.patch_size, config.num_channels) == ((4, 4), 3)
    assert config.depths == (2,) * stages
    assert config.num_heads == tuple(2**stage for stage in range(stages))
    assert config.encoder_stride == (8 if case.task == "masked-image-modeling" else 32)
    assert source.framework == {"tf": "hf"}.get(source.writer, source.writer)
    assert source.patch_norm == (name != "ms__SwinTransformer__no_patch_norm")
    assert {name: tuple(tensor.shape) for name, tensor in source.tensors.items()} == dict(source.shapes)
    assert {tensor.dtype for tensor in source.tensors.values()} == {torch.float32}
    assert check(source, case.task)
    assert any("65 rows for 64 patches, a known bug" in n for n in source.notes) == name.endswith("abspos_broken")


@pytest.mark.parametrize(("first", "second"), SAME)
def test_systems_agree_on_the_same_weights(first: str, second: str) -> None:
    assert differing(recognise_checkpoint(DATA / first).tensors, recognise_checkpoint(DATA / second).tensors) == []


@pytest.mark.parametrize("original_format", [False, True])
@pytest.mark.parametrize("name", sorted(name for name in CASES if name.startswith("hf523")))
def test_transformers_loads_the_same(name: str, original_format: bool, tmp_path: Path) -> None:
    """transformers saves the same model under its older names, and under those of version 5."""
    raw = json.loads((DATA / name / "config.json").read_text())
    model = getattr(transformers, raw["architectures"][0]).from_pretrained(DATA / name)
    model.save_pretrained(tmp_path, save_original_format=original_format)
    assert differing(recognise_checkpoint(tmp_path).tensors, recognise_checkpoint(DATA / name).tensors) == []


TORCH_FILES = sorted(
    file.relative_to(DATA).as_posix()
    for file in (*DATA.glob("*/*.pth"), *DATA.glob("*/*.bin"))
    if "train_ckpt" not in file.parent.name  # torch refuses its CfgNode
)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("file", TORCH_FILES)
def test_torch_reads_the_same(file: str, legacy: bool, tmp_path: Path) -> None:
    theirs = state_dict(Path(file).parent.name)
    path = DATA / file
    if legacy:
        path = tmp_path / "weights.pth"
        torch.save(theirs, path, _use_new_zipfile_serialization=False)
    stored = {name.removeprefix("model."): part for name, part in open_weights(path).tensors.items()}
    assert differing({name: part.read() for name, part in stored.items()}, theirs) == []
    assert [str(theirs[name].dtype) for name in stored] == [f"torch.{part.dtype}" for part in stored.values()]


@pytest.mark.parametrize("legacy", [False, True])
def test_tensors_that_share_or_transpose_their_storage(legacy: bool, tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {
        "base": base,
        "turned": base.T,
        "part": base[1:3, 2:],
        "scalar": torch.tensor(3.0),
        "none": torch.empty(0, 3),
        "half": torch.ones(3).half(),
        "brain": torch.arange(5).bfloat16(),
        "parameter": torch.nn.Parameter(base),
        "double": base.double(),
        "index": torch.arange(4),
    }
    torch.save({"state_dict": tensors, "epoch": 3}, tmp_path / "a.pth", _use_new_zipfile_serialization=not legacy)
    file = open_weights(tmp_path / "a.pth")
    found = {name.removeprefix("state_dict."): part.read() for name, part in file.tensors.items()}
    assert differing(found, tensors) == []
    assert file.extras == {"epoch": 3}


def test_views_of_storages_from_before_torch_1_6(tmp_path: Path) -> None:
    """A view names its storage, its offset and its length: here both are 2."""
    code = tensor_pickle((2,), (1,), view=b"(X\x01\x00\x00\x001K\x02K\x02t")
    write_legacy(tmp_path / "a.pth", code, torch.arange(4.0).numpy().tobytes())
    assert open_weights(tmp_path / "a.pth").tensors["patch_embed.proj.weight"].read().tolist() == [2.0, 3.0]


def test_big_endian_numbers(tmp_path: Path) -> None:
    numbers = torch.arange(4.0).numpy().astype(">f4").tobytes()
    entries = {"a/data.pkl": tensor_pickle((4,), (1,)), "a/data/0": numbers, "a/byteorder": b"big"}
    write_zip(tmp_path / "a.pth", entries)
    assert open_weights(tmp_path / "a.pth").tensors["patch_embed.proj.weight"].read().tolist() == [0.0, 1.0, 2.0, 3.0]


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the memory of the process from /proc")
def test_tensors_stay_in_the_file_until_they_are_read(tmp_path: Path) -> None:
    """A zip file of 64 MiB takes no memory when it is opened, nor is any kept for a tensor that was dropped."""

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

    torch.save({f"layers.{i}": torch.ones(1 << 20) for i in range(16)}, tmp_path / "a.pth")
    before = resident()
    file = open_weights(tmp_path / "a.pth")
    assert resident() - before < 16 << 20
    assert file.tensors["layers.3"].read().sum() == 1 << 20


TRAINER = """
import dataclasses, enum
class ConfigDict(dict):
    pass
class Options:
    def __init__(self, **fields):
        self.__dict__ = fields
class Mode(enum.Enum):
    EVAL = "eval"
@dataclasses.dataclass(slots=True)
class Slots:
    rate: float
"""


@pytest.mark.parametrize("legacy", [False, True])
def test_what_training_scripts_save_beside_the_weights(legacy: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Objects of any class are read as placeholders; nothing is imported or called for them."""
    trainer: Any = types.ModuleType("trainer")
    monkeypatch.setitem(sys.modules, "trainer", trainer)
    exec(TRAINER, trainer.__dict__)
    beside = {
        "args": argparse.Namespace(lr=0.1),
        "hyper_parameters": trainer.ConfigDict(depth=3, inner=trainer.ConfigDict(size=4)),
        "omega": trainer.Options(_metadata=1, _content={"size": trainer.Options(_val=4)}),
        "options": trainer.Options(mode=trainer.Mode.EVAL, slots=trainer.Slots(0.5)),
        "schedule": torch.optim.lr_scheduler.LambdaLR,
        "metric": np.float64(0.75),
        "array": np.arange(3),
        "path": Path("runs"),
        "date": dt.date(2024, 5, 6),
        "queue": collections.deque([1, 2]),
        "counts": collections.defaultdict(int, a=2),
        "types": [Any, type(None), dict, re.compile("head")],
        "partial": functools.partial(dict, a=3),
        "dtype": torch.float16,
        "epoch": 3,
    }
    if not legacy:
        beside["criterion"] = torch.nn.CrossEntropyLoss()
    weights = state_dict("ms__SwinTransformer__strip_32x96")
    torch.save({"state_dict": weights} | beside, tmp_path / "a.pth", _use_new_zipfile_serialization=not legacy)
    monkeypatch.delitem(sys.modules, "trainer")
    known = torch.serialization.get_safe_globals()
    found = open_weights(tmp_path / "a.pth").extras
    assert ("trainer" in sys.modules, set(found)) == (False, set(beside))
    assert (found["args"], found["path"]) == ({"lr": 0.1}, ["runs"])
    assert (found["hyper_parameters"]["depth"], found["hyper_parameters"]["inner"]) == (3, {"size": 4})
    assert (found["options"]["mode"], found["omega"]) == (["eval"], {"size": 4})
    assert (found["queue"], found["counts"], found["dtype"], found["epoch"]) == ([1, 2], {"a": 2}, torch.float16, 3)
    assert set(torch.serialization.get_safe_globals()) == set(known)


def test_training_checkpoint_of_microsoft() -> None:
    """Everything beside the weights is read as plain values, including the yacs CfgNode."""
    file = open_weights(DATA / "ms__SwinTransformer__train_ckpt")
    assert sorted(file.extras) == ["config", "epoch", "lr_scheduler", "max_accuracy", "optimizer", "scaler"]
    assert file.extras["config"]["DATA"] == {"IMG_SIZE": 32}
    assert file.extras["epoch"] == 3


def test_key_bias_of_torchvision_v2_is_left_out() -> None:
    source = recognise_checkpoint(DATA / "tv__SwinTransformerV2__pad_52x68")
    raw = state_dict("tv__SwinTransformerV2__pad_52x68")
    rows = raw["features.1.0.attn.qkv.bias"]
    assert rows[8:16].abs().min() > 0  # in the file, and zeroed by torchvision whenever it runs
    name = "encoder.layers.0.blocks.0.attention.self"
    assert f"{name}.key.bias" not in source.tensors
    assert torch.equal(source.tensors[f"{name}.query.bias"], rows[:8])
    assert torch.equal(source.tensors[f"{name}.value.bias"], rows[16:])


@pytest.mark.parametrize("name", ["tf_swin_for_masked_image_modeling", "my_model_3/tf_swin_for_masked_image_modeling"])
def test_tensorflow_safetensors(name: str, tmp_path: Path) -> None:
    """TFSwin's save_pretrained(safe_serialization=True): the names of the h5 file, marked as format "tf"."""
    folder = "tf434__TFSwinForMaskedImageModeling__basic"
    tensors: dict[str, Tensor] = {}

    def visit(path: str, entry: object) -> None:
        if isinstance(entry, h5py.Dataset):
            tensors[f"{name}/{path.split('/', 2)[2]}"] = torch.from_numpy(entry[...])

    with h5py.File(DATA / folder / "tf_model.h5") as file:
        file.visititems(visit)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "tf"})
    shutil.copy(DATA / folder / "config.json", tmp_path)
    source = recognise_checkpoint(tmp_path)
    assert source.writer == "tf"
    assert differing(source.tensors, recognise_checkpoint(DATA / folder).tensors) == []


def test_sharded_bin(tmp_path: Path) -> None:
    weights = load_file(DATA / HF / "model.safetensors")
    home = {name: f"pytorch_model-0000{i % 2 + 1}-of-00002.bin" for i, name in enumerate(sorted(weights))}
    for file in set(home.values()):
        torch.save({name: weights[name] for name in weights if home[name] == file}, tmp_path / file)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": home}))
    shutil.copy(DATA / HF / "config.json", tmp_path)
    assert differing(recognise_checkpoint(tmp_path).tensors, recognise_checkpoint(DATA / HF).tensors) == []


def test_one_file_is_enough(tmp_path: Path) -> None:
    """A weight file uses the config.json beside it, unless that is of another framework."""
    folder = DATA / HF
    assert recognise_checkpoint(folder / "model.safetensors").config == recognise_checkpoint(folder).config
    shutil.copy(folder / "model.safetensors", tmp_path / "renamed.bin")
    alone = recognise_checkpoint(tmp_path)
    beside = dataclasses.replace(recognise_checkpoint(folder).config, out_features=())  # no tensor tells these
    assert dataclasses.replace(alone.config, image_size=(64, 64)) == beside
    assert (alone.raw_config, len(alone.notes)) == (None, 2)
    assert any("there is no config.json" in note for note in alone.notes)
    assert recognise_checkpoint(tmp_path, image_size=(64, 64)).config == beside

    shutil.copy(folder / "config.json", tmp_path)
    shutil.copy(DATA / "ms__SwinTransformer__strip_32x96" / "model.pth", tmp_path / "other.pth")
    assert recognise_checkpoint(tmp_path / "other.pth").writer == "microsoft"
    with pytest.raises(CheckpointError, match=r"holds 2 weight files \(other.pth, renamed.bin\).* Pass the path of the file"):
        recognise_checkpoint(tmp_path)
    (tmp_path / "renamed.bin").unlink()
    with pytest.raises(
        CheckpointError, match=r"config\.json was written by transformers, and the weights have the names of Microsoft"
    ):
        recognise_checkpoint(tmp_path)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_of_wrappers(prefix: str, tmp_path: Path) -> None:
    weights = state_dict("ms__SwinTransformer__strip_32x96")
    torch.save({"model": {prefix + name: tensor for name, tensor in weights.items()}}, tmp_path / "a.pth")
    ours = recognise_checkpoint(tmp_path / "a.pth")
    assert differing(ours.tensors, recognise_checkpoint(DATA / "ms__SwinTransformer__strip_32x96").tensors) == []


def test_simmim_files_say_rpe_mlp(tmp_path: Path) -> None:
    weights = state_dict("ms__SwinTransformerV2__rect_h_eq_window")
    torch.save({name.replace("cpb_mlp", "rpe_mlp"): tensor for name, tensor in weights.items()}, tmp_path / "a.pth")
    theirs = recognise_checkpoint(DATA / "ms__SwinTransformerV2__rect_h_eq_window").tensors
    assert differing(recognise_checkpoint(tmp_path / "a.pth").tensors, theirs) == []


def test_timm_inside_transformers(tmp_path: Path) -> None:
    """transformers' TimmWrapper stores timm's config with its own, and prefixes names with timm_model."""
    folder = DATA / "timm__SwinTransformer__dynamic_72x56"
    weights = load_file(folder / "model.safetensors")
    save_file({f"timm_model.{name}": tensor for name, tensor in weights.items()}, tmp_path / "model.safetensors")
    raw = json.loads((folder / "config.json").read_text()) | {"model_type": "timm_wrapper"}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    source = recognise_checkpoint(tmp_path)
    assert (source.writer, source.config) == ("timm", recognise_checkpoint(folder).config)


def test_config_and_preprocessor_are_kept(tmp_path: Path) -> None:
    shutil.copytree(DATA / HF, tmp_path, dirs_exist_ok=True)
    (tmp_path / "preprocessor_config.json").write_text('{"size": 64}')
    source = recognise_checkpoint(tmp_path)
    assert source.preprocessor == {"size": 64}
    assert source.raw_config == json.loads((tmp_path / "config.json").read_text())


def test_what_is_missing_is_named() -> None:
    for name in (MASKED, "hf523__SwinBackbone__new_names"):
        with pytest.raises(CheckpointError, match=r"has no classifier: it was saved by .* Choose another --task"):
            check(recognise_checkpoint(DATA / name), "image-classification")
    source = recognise_checkpoint(DATA / HF)
    with pytest.raises(CheckpointError, match="has no decoder: it was saved by a class without one"):
        check(source, "masked-image-modeling")
    more = dataclasses.replace(source.config, id2label={i: str(i) for i in range(11)})
    with pytest.raises(CheckpointError, match=r"classifier.weight has shape \[10, 32\], but the config asks for \[11, 32\]"):
        check(dataclasses.replace(source, config=more), "image-classification")
    foreign = {**source.shapes, "encoder.layers.9.gate": (1,)}
    with pytest.raises(CheckpointError, match=r"holds 1 tensors that no Swin V1 has: encoder.layers.9.gate"):
        check(dataclasses.replace(source, shapes=foreign), "image-classification")
