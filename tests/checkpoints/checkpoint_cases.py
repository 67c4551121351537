"""The checkpoints in data/ and their expected properties. Each was saved by the framework that it is named after."""

from __future__ import annotations

import dataclasses
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from swin_deploy.errors import CheckpointError
from swin_deploy.models.checkpoints.base import tensors_for_task
from swin_deploy.models.checkpoints.recognise import RecognisedCheckpoint, recognise_checkpoint
from swin_deploy.models.parameters import LazyTensors
from swin_deploy.tasks import TaskSpec

DATA = Path(__file__).parent / "data"


def check(source: RecognisedCheckpoint, task: str) -> LazyTensors:
    """Select the tensors that `task` needs. Raises CheckpointError if some are missing, as an export does."""
    config = dataclasses.replace(source.config, patch_norm=source.patch_norm)
    return tensors_for_task(config, TaskSpec(task), source.shapes, source.tensors, str(source.path))


class Case(NamedTuple):
    """The expected result. Every checkpoint has 4x4 patches and, if it classifies, 10 classes."""

    writer: str
    task: str
    version: int
    image_size: tuple[int, int]
    window_size: tuple[int, ...]
    embed_dim: int
    mlp_ratio: float = 2.0
    num_labels: int = 10
    notes: int = 0


CLASSES, MASKED = "image-classification", "masked-image-modeling"

CASES = {
    "hf434__SwinForImageClassification__abspos_broken": Case("hf", CLASSES, 1, (32, 32), (4,), 16, notes=1),
    "hf523__SwinBackbone__new_names": Case("hf", "backbone", 1, (32, 32), (4, 4), 16),
    "hf523__SwinForImageClassification__nonsquare_72x56": Case("hf", CLASSES, 1, (64, 64), (4, 4), 16),
    "hf523__SwinForImageClassification__pad_50x66": Case("hf", CLASSES, 1, (64, 64), (4, 4, 4), 8),
    "hf523__SwinForImageClassification__sharded": Case("hf", CLASSES, 1, (32, 32), (4, 4), 16, mlp_ratio=4.0),
    "hf523__SwinForMaskedImageModeling__basic": Case("hf", MASKED, 1, (32, 32), (4, 4), 16),
    "hf523__Swinv2ForImageClassification__pad_50x66": Case("hf", CLASSES, 2, (64, 64), (4, 4, 4), 8),
    "hf523__Swinv2ForImageClassification__rect_image_h_eq_window": Case("hf", CLASSES, 2, (32, 64), (8, 8), 16),
    "ms__SimMIM__v1": Case("microsoft", MASKED, 1, (32, 32), (4, 4), 16, num_labels=0),
    "ms__SwinTransformerV2__rect_h_eq_window": Case("microsoft", CLASSES, 2, (32, 32), (8, 4), 16, notes=1),
    "ms__SwinTransformer__no_patch_norm": Case("microsoft", CLASSES, 1, (32, 32), (4, 4), 16),
    "ms__SwinTransformer__strip_32x96": Case("microsoft", CLASSES, 1, (32, 96), (4, 4), 16),
    "ms__SwinTransformer__train_ckpt": Case("microsoft", CLASSES, 1, (32, 32), (4, 4), 16),
    "tf434__TFSwinForImageClassification__sharded_h5": Case("tf", CLASSES, 1, (32, 32), (4, 4), 16, mlp_ratio=4.0),
    "tf434__TFSwinForMaskedImageModeling__basic": Case("tf", MASKED, 1, (32, 32), (4, 4), 16),
    "timm0613__SwinTransformer__v06_layout": Case("timm", CLASSES, 1, (32, 32), (4, 4), 16),
    "timm__SwinTransformerV2__rect_h_eq_window": Case("timm", CLASSES, 2, (32, 64), (8, 8), 16),
    "timm__SwinTransformer__bin_only": Case("timm", CLASSES, 1, (32, 32), (4, 4), 16),
    "timm__SwinTransformer__dynamic_72x56": Case("timm", CLASSES, 1, (64, 64), (4, 4), 16),
    "tv__SwinTransformerV2__pad_52x68": Case("torchvision", CLASSES, 2, (256, 256), (4, 4, 4), 8, notes=1),
    "tv__SwinTransformer__pad_52x68": Case("torchvision", CLASSES, 1, (224, 224), (4, 4, 4), 8, notes=1),
}

# The same weights, drawn from the same seed and saved by several systems.
SAME = (
    ("hf523__SwinForImageClassification__pad_50x66", "tv__SwinTransformer__pad_52x68"),
    ("hf523__SwinForImageClassification__nonsquare_72x56", "timm__SwinTransformer__dynamic_72x56"),
    ("hf523__SwinForImageClassification__sharded", "tf434__TFSwinForImageClassification__sharded_h5"),
    ("hf523__SwinForMaskedImageModeling__basic", "ms__SimMIM__v1"),
    ("hf523__SwinForMaskedImageModeling__basic", "tf434__TFSwinForMaskedImageModeling__basic"),
    ("hf523__Swinv2ForImageClassification__pad_50x66", "tv__SwinTransformerV2__pad_52x68"),
    ("hf523__Swinv2ForImageClassification__rect_image_h_eq_window", "ms__SwinTransformerV2__rect_h_eq_window"),
    ("hf523__Swinv2ForImageClassification__rect_image_h_eq_window", "timm__SwinTransformerV2__rect_h_eq_window"),
    ("timm0613__SwinTransformer__v06_layout", "timm__SwinTransformer__bin_only"),
)


def state_dict(case: str) -> dict[str, Any]:
    """Load a torch.save file in data/ with torch.load."""
    (file,) = (f for f in (DATA / case).iterdir() if f.suffix in (".pth", ".bin"))
    loaded = torch.load(file, weights_only=True)
    return dict(loaded.get("model", loaded))


def refused(path: Path, sentence: str, error: type[Exception] = CheckpointError) -> None:
    """Assert that opening `path` raises `error` with a matching message."""
    with pytest.raises(error, match=sentence):
        recognise_checkpoint(path)


def write_zip(path: Path, entries: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> None:
    """Write a zip archive of `entries`, and the version record that torch.load asks for, to `path`."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in ({"a/version": b"3\n"} | entries).items():
            archive.writestr(name, data)


def write_legacy(path: Path, code: bytes, numbers: bytes) -> None:
    """Write a file as torch before 1.6 does: the pickle `code`, and one storage of float32 `numbers`."""
    heads = [pickle.dumps(head, 2) for head in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    path.write_bytes(b"".join([*heads, code, pickle.dumps(["0"], 2), struct.pack("<q", len(numbers) // 4), numbers]))


def tensor_pickle(
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    key: str = "0",
    storage: str = "FloatStorage",
    view: bytes = b"",
    names: tuple[str, ...] = ("patch_embed.proj.weight",),
) -> bytes:
    """Return the pickle of torch.save for one tensor under `names`, with any sizes; `view` follows the count."""

    def integers(values: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(pickle.dumps(v, 2)[2:-1] for v in values) + b"t"

    text = b"X" + struct.pack("<I", len(key)) + key.encode()
    kind = b"ctorch\n" + storage.encode() + b"\n"
    identity = b"(X\x07\x00\x00\x00storage" + kind + text + b"X\x03\x00\x00\x00cpuK\x04" + view + b"tQ"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + identity + b"K\x00" + integers(shape) + integers(stride) + b"\x89NtR"
    items = (b"X" + struct.pack("<I", len(name)) + name.encode() + tensor + b"s" for name in names)
    return b"\x80\x02}" + b"".join(items) + b"."
