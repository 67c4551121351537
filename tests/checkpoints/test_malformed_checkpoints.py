"""Files that are damaged or hold another network. Each is refused with its own sentence."""

from __future__ import annotations

import io
import json
import pickle
import random
import re
import shutil
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_cases import DATA, check, refused, state_dict, tensor_pickle, write_zip
from safetensors.torch import load_file, save_file

from swin_deploy.errors import CheckpointError, MissingDependencyError
from swin_deploy.models.checkpoints.recognise import recognise_checkpoint
from swin_deploy.models.checkpoints.weight_files import open_weights

HF = DATA / "hf523__SwinForImageClassification__nonsquare_72x56"
TF = DATA / "tf434__TFSwinForMaskedImageModeling__basic"
STRIP = "ms__SwinTransformer__strip_32x96"


FILES = {
    "model.safetensors": HF / "model.safetensors",
    "zip.pth": DATA / STRIP / "model.pth",
    "legacy.pth": None,
    "tf_model.h5": TF / "tf_model.h5",
}


def bytes_of(name: str) -> bytes:
    file = FILES[name]
    if file is not None:
        return file.read_bytes()
    buffer = io.BytesIO()
    torch.save(state_dict(STRIP), buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


@pytest.mark.parametrize("kept", [1, 7, 100, 4000, 0.3, 0.7, 0.999])
@pytest.mark.parametrize("name", list(FILES))
def test_truncated(name: str, kept: float, tmp_path: Path) -> None:
    data = bytes_of(name)
    (tmp_path / name).write_bytes(data[: int(kept if kept >= 1 else kept * len(data))])
    with pytest.raises(CheckpointError) as error:
        recognise_checkpoint(tmp_path / name)
    assert str(tmp_path / name) in str(error.value)
    assert "fetch it again" in str(error.value).lower() or "is not a checkpoint" in str(error.value)


@pytest.mark.parametrize("name", ["model.safetensors", "zip.pth", "legacy.pth"])
def test_flipped_bytes_end_in_a_sentence_or_in_tensors(name: str, tmp_path: Path) -> None:
    data = bytearray(bytes_of(name))
    names = (
        range(20_000) if name == "model.safetensors" else [i for i in range(len(data)) if i < 12_000 or i > len(data) - 9_000]
    )
    rng = random.Random(0)
    sentences = 0
    for _ in range(75):
        changed = bytearray(data)
        for at in rng.choices(names, k=rng.choice((1, 1, 1, 8))):
            changed[at % len(data)] = rng.randrange(256)
        (tmp_path / name).write_bytes(changed)
        try:
            source = recognise_checkpoint(tmp_path / name)
            for key in source.tensors:
                source.tensors[key]
        except CheckpointError:
            sentences += 1
    assert sentences > 10


def patched(at: int, new: bytes) -> bytes:
    return ZIP[:at] + new + ZIP[at + len(new) :]


ZIP = bytes_of("zip.pth")
RECORDS = {info.filename.split("/", 1)[1]: info for info in zipfile.ZipFile(FILES["zip.pth"]).infolist()}
LARGEST = max(RECORDS.values(), key=lambda info: info.file_size)
INSIDE = LARGEST.header_offset + LARGEST.file_size // 2  # of the weights
ENTRY = ZIP.rindex(LARGEST.filename.encode()) - 46  # in the directory
NO_SUMS = re.sub(rb"(PK\x01\x02.{12}).{4}", rb"\g<1>\0\0\0\0", ZIP, flags=re.DOTALL)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        (patched(INSIDE, bytes(2048)), r"is damaged: 1 of its \d+ records do not have their checksum \(model/data/\d+\)"),
        (patched(INSIDE, bytes([ZIP[INSIDE] ^ 1])), "do not have their checksum"),
        (patched(ENTRY + 16, b"abcd"), "do not have their checksum"),
        (ZIP[:INSIDE] + ZIP[INSIDE + 4096 :], "its zip directory does not end the file|is damaged"),
        (ZIP + bytes(1), "its zip directory does not end the file"),
        (ZIP + ZIP[-22:], "cannot be read as what torch.save writes"),
        (patched(len(ZIP) - 66, b"\1\0"), "its zip directory does not end the file"),
        (patched(ENTRY + 42, (LARGEST.header_offset + 64).to_bytes(4, "little")), "record .* does not fit its directory"),
        (patched(ENTRY + 42, (RECORDS["data/0"].header_offset).to_bytes(4, "little")), "record .* does not fit"),
        (patched(ENTRY + 20, (8).to_bytes(4, "little") * 2), "do not have their checksum|has .* bytes, and its record 8"),
        (patched(ENTRY + 20, (8).to_bytes(4, "little")), "record .* does not fit its directory"),
        (patched(LARGEST.header_offset, b"PK\1\2"), "record .* does not fit its directory"),
        (patched(LARGEST.header_offset + 8, b"\x08"), "record .* does not fit its directory"),
        (patched(LARGEST.header_offset + 14, b"\1"), "record .* does not fit its directory"),
        (patched(LARGEST.header_offset + 30, b"x"), "record .* does not fit its directory"),
        (patched(LARGEST.header_offset + 28, b"\xff\xff"), "record .* does not fit its directory"),
        (patched(ENTRY + 38, b"\x10"), "record .* does not fit its directory"),  # a folder: torch.load would return noise
        (NO_SUMS, ""),  # torch.save can leave out all checksums
    ],
)
def test_damage_that_torch_loads(changed: bytes, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    path.write_bytes(changed)
    if sentence:
        refused(path, sentence)
    else:
        assert recognise_checkpoint(path).tensors.keys() == recognise_checkpoint(FILES["zip.pth"]).tensors.keys()


def test_archives_that_torch_did_not_save(tmp_path: Path) -> None:
    path, good = tmp_path / "a.pth", {"a/data.pkl": tensor_pickle((4,), (1,)), "a/data/0": bytes(16)}
    write_zip(path, good, zipfile.ZIP_DEFLATED)
    refused(path, "is compressed or cut off")
    write_zip(path, good | {"a/constants.pkl": b""})
    refused(path, r"is a TorchScript program.* torch\.save\(torch\.jit\.load\('a\.pth'\)\.state_dict\(\)")
    for entries in ({"weights.npy": b""}, good | {"a/DATA.pkl": b""}, good | {"b/data.pkl": b""}):
        write_zip(path, entries)
        refused(path, "is a zip archive, and not one that torch.save wrote")
    path.write_bytes(pickle.dumps({"a": 1}, 2))
    refused(path, "is a pickle, and not one that torch.save wrote")
    torch.save({"epoch": 3}, path)
    refused(path, "holds no tensors by name")
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("storages"))
    refused(path, "is a tar archive")


@pytest.mark.parametrize("name", list(FILES))
def test_a_checkpoint_needs_few_open_files(name: str, tmp_path: Path) -> None:
    """However many tensors are held. Where none is left, the limit is named, and the file is not called damaged."""
    resource = pytest.importorskip("resource", reason="this system has no limits of a process")
    (tmp_path / name).write_bytes(bytes_of(name))
    file = open_weights(tmp_path / name)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len([*Path("/dev/fd").iterdir()]) + 3, limits[1]))
    try:
        assert [stored.read() for stored in file.tensors.values()]
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
        with pytest.raises((OSError, CheckpointError), match=r"Too many (open )?files"):
            [stored.read() for stored in open_weights(tmp_path / name).tensors.values()]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_files_that_are_no_weights(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    for content, sentence in (
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "is a Git LFS pointer.* git lfs pull"),
        (b"<!DOCTYPE html><html></html>", "is a web page and not the weights"),
    ):
        path.write_bytes(content)
        refused(path, sentence)
    (tmp_path / "a.pth").write_bytes(b"\x08\x07onnx")
    refused(tmp_path / "a.pth", "is not a checkpoint. Expected safetensors, a file of torch.save, or HDF5")
    refused(tmp_path / "absent", "does not exist")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "holds no weights")


def copied(folder: Path, target: Path, **config: Any) -> Path:
    """Copy `folder` to `target` and change entries of its config.json."""
    shutil.copytree(folder, target, dirs_exist_ok=True)
    if config:
        raw = json.loads((target / "config.json").read_text()) | config
        (target / "config.json").write_text(json.dumps(raw))
    return target


def test_shards(tmp_path: Path) -> None:
    folder = copied(DATA / "hf523__SwinForImageClassification__sharded", tmp_path)
    index = folder / "model.safetensors.index.json"
    whole = json.loads(index.read_text())
    first = "model-00001-of-00004.safetensors"
    (folder / first).rename(folder / "away")
    refused(folder, f"lacks {first}, which model.safetensors.index.json lists")
    shutil.copy(folder / "model-00002-of-00004.safetensors", folder / first)
    refused(folder, "in two shards. Expected each tensor once")
    names = (3, "b/c", "..", "../../secret", "..\\secret", "/etc/passwd", "")
    for weight_map in ({}, [], *({"a": name} for name in names)):
        index.write_text(json.dumps(whole | {"weight_map": weight_map}))
        refused(folder, "does not list the shards' file names")
    for text in ("{", "[]", "[" * 100_000):
        index.write_text(text)
        refused(folder, "cannot be read as JSON|does not hold a JSON object")


def test_missing_and_unexpected_tensors(tmp_path: Path) -> None:
    weights = load_file(HF / "model.safetensors")
    folder = copied(HF, tmp_path)

    def saved(tensors: dict[str, torch.Tensor]) -> Path:
        save_file(tensors, folder / "model.safetensors")
        return folder

    some = {name: tensor for name, tensor in weights.items() if ".query." not in name}
    source = recognise_checkpoint(saved(some))
    with pytest.raises(CheckpointError, match=r"lacks 8 of the 79 parameters that its config asks for: encoder\.layers\.0"):
        check(source, "image-classification")
    saved(weights | {"swin.encoder.layers.0.blocks.0.attention.self.query.gate": torch.zeros(1)})
    refused(folder, "holds 1 tensors that no Swin has: swin.encoder.layers.0.blocks.0.attention.self.query.gate")
    saved(weights | {"layernorm.weight": torch.zeros(32)})
    refused(folder, "holds layernorm.weight twice, as ")
    source = recognise_checkpoint(saved(weights | {"swin.layernorm.weight": torch.zeros(33)}))
    with pytest.raises(CheckpointError, match=r"layernorm.weight has shape \[33\], but the config asks for \[32\]"):
        check(source, "image-classification")


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.uint8, torch.float8_e4m3fn])
def test_wrong_types(dtype: torch.dtype, tmp_path: Path) -> None:
    weights = load_file(HF / "model.safetensors")
    weights["classifier.weight"] = torch.zeros(10, 32, dtype=dtype)
    save_file(weights, copied(HF, tmp_path) / "model.safetensors")
    refused(tmp_path, "classifier.weight is of type .*; expected a floating-point tensor")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none(value: float, tmp_path: Path) -> None:
    weights = state_dict(STRIP)
    weights["head.bias"][3] = value
    torch.save(weights, tmp_path / "a.pth")
    source = recognise_checkpoint(tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"head.bias holds NaN or infinity"):
        source.tensors["classifier.bias"]


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"model_type": "swin2sr"}, "Swin2SR, an image super-resolution network"),
        ({"model_type": "clap", "audio_config": {"model_type": "clap_audio_model"}}, "audio_config is HTSAT"),
        ({"model_type": "upernet"}, "is not a Swin"),
        ({"model_type": "upernet", "backbone_config": {"model_type": "resnet"}}, "its backbone_config is 'resnet'"),
        ({"model_type": "vit"}, "model_type 'vit' is a Vision Transformer"),
        ({"architecture": "swinv2_cr_tiny_224"}, "config.json was written by timm, and the weights have the names of transf"),
        ({"depths": [10**9, 2]}, "1000000002 blocks, and the limit is 1000"),
        ({"depths": [500, 2]}, "has 79 tensors for 502 blocks in its config"),
        ({"depths": [1] * 100_000}, "expected a list of at most 100 whole numbers"),
        ({"id2label": None, "num_labels": 10**12}, "num_labels: expected 0 to 1000000"),
        ({"out_features": ["stage2"], "out_indices": [1]}, "out_features names stage2, but out_indices .* name others"),
    ],
)
def test_configs_that_are_refused(config: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    refused(copied(HF, tmp_path, **config), sentence)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"window_size": 2**63}, "window_size: expected a whole number, got 9223372036854775808"),
        ({"window_size": 10**9}, "it contains 1000000000, and the limit is"),
        ({"depths": [10**9, 2]}, "1000000002 blocks, and the limit is"),
        ({"embed_dim": 1e308}, "embed_dim|limit"),
        ({"mlp_ratio": 1e308}, "mlp_ratio"),
        ({"img_size": [[224]]}, "img_size: expected a number or two, got"),
        ({"depths": "\x1b" * 999}, r"depths: invalid literal.*\\x1b"),
        ({"num_classes": 1e9}, "num_classes is 1000000000"),
    ],
)
def test_arguments_of_timm_beyond_every_limit(arguments: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    folder = DATA / "timm__SwinTransformer__dynamic_72x56"
    raw = json.loads((folder / "config.json").read_text())
    count = {} if "num_classes" not in arguments else {"num_classes": None}
    refused(copied(folder, tmp_path, model_args=raw["model_args"] | arguments, **count), sentence)


@pytest.mark.parametrize(
    ("name", "shape", "what"),
    [
        ("layers.0.blocks.0.attn.meta_mlp.fc1.weight", (384, 2), "timm's swinv2_cr, a different network from Swin V2"),
        ("conv_first.weight", (16, 3, 3, 3), "SwinIR or Swin2SR"),
        ("layers.0.residual_group.blocks.0.norm1.weight", (16,), "SwinIR or Swin2SR"),
        ("swin2sr.conv_after_body.weight", (16, 16, 3, 3), "Swin2SR, an image super-resolution network"),
        ("layers.0.blocks.0.spatial_mlp.weight", (16, 16, 1), "Swin-MLP"),
        ("layers.0.blocks.1.mlp._moe_layer.experts.batched_fc1_w", (2, 16, 16), "Swin-MoE"),
        ("patch_embed.proj.weight", (16, 3, 2, 4, 4), "Video Swin"),
        ("swinViT.patch_embed.proj.weight", (16, 1, 2, 2, 2), "Swin UNETR"),
        ("tscam_conv.weight", (9, 16, 2, 3), "HTSAT or CLAP, an audio encoder: a Swin with a batch norm"),
        ("cls_token", (1, 1, 16), "a Vision Transformer"),
    ],
)
def test_other_networks_are_named(name: str, shape: tuple[int, ...], what: str, tmp_path: Path) -> None:
    torch.save({"state_dict": state_dict(STRIP) | {name: torch.zeros(shape)}}, tmp_path / "a.pth")
    refused(tmp_path / "a.pth", f"is {what}.* swin-deploy supports image encoders and classifiers of Swin V1 and V2")


def test_h5py_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "h5py", None)
    refused(TF, r"h5py is needed to read tf_model.h5, .*Run: pip install .*swin-deploy\[tensorflow\]", MissingDependencyError)
