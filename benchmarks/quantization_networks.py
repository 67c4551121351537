"""The networks of `quantization.py`, the samples that they are calibrated with, and others to judge by."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
NETWORKS = ("swin-digits", "swinv2-digits", "swin-patches", "swinv2-patches", "swin-tiny", "swinv2-tiny")
CALIBRATED = 256  # samples of a trained network
TARGETS = ("onnxruntime", "tensorrt")


def write_network(name: str, folder: Path) -> None:
    """Writes the fp32 graph of the network for each of TARGETS, its config, and its samples, to `folder`.

    "data.npz" holds "calibration" and "test", both what the network takes, and "classes", empty where it is not trained.
    """
    from swin_deploy.exporters.external_data import embed_weights
    from swin_deploy.exporters.onnx_from_torch import onnx_from_torch
    from swin_deploy.models.checkpoints import checkpoint_from_path, random_checkpoint
    from swin_deploy.models.swin import SwinNetwork
    from swin_deploy.preprocess import Preprocessor
    from swin_deploy.tasks import TaskSpec
    from swin_deploy.variants import find_variant

    if name.endswith(("digits", "patches")):
        example = ROOT / "examples" / name.rpartition("-")[2]
        sys.path.insert(0, str(example))
        checkpoint = checkpoint_from_path(example / name, TaskSpec())
        assert checkpoint.preprocessor is not None
        preprocess, tensors = Preprocessor.from_dict(checkpoint.preprocessor), checkpoint.tensors
        calibration, test, classes = digits() if name.endswith("digits") else patches()
    else:
        checkpoint = random_checkpoint(find_variant(name).config(), TaskSpec(), 0)
        preprocess, tensors = Preprocessor.imagenet(checkpoint.config.image_size), heavy_tailed(dict(checkpoint.tensors))
        images = crops(32)
        calibration, test, classes = images[:16], images[16:], []
    size = checkpoint.config.image_size
    for target in TARGETS:
        traced = onnx_from_torch(SwinNetwork(checkpoint.config, size, tensors, TaskSpec(), target).eval(), size)
        embed_weights(traced.model, traced.weights)
        if target == "onnxruntime":
            del traced.model.graph.value_info[:]  # as export does
        (folder / f"{target}.onnx").write_bytes(traced.model.SerializeToString())
    (folder / "config.json").write_text(json.dumps(checkpoint.config.to_dict()))
    pixels = {"calibration": preprocess(calibration), "test": preprocess(test)}
    np.savez(folder / "data.npz", **pixels, classes=np.array(classes, np.int64))


def digits() -> tuple[list[Any], list[Any], Any]:
    """Images to calibrate with, held-out images, and the classes of these."""
    from digits import split

    data = split()
    return list(data.train_images[:CALIBRATED]), list(data.test_images), data.test_digits


def patches() -> tuple[list[Any], list[Any], Any]:
    """The same of the patches of photographs, the former evenly spread over those that the network was trained with."""
    from patches import LABELS, write
    from PIL import Image

    with tempfile.TemporaryDirectory(prefix="swin-quantization-") as folder:
        write(Path(folder))
        train, test = (sorted(Path(folder, part).glob("*/*.png")) for part in ("train", "test"))
        chosen = [train[index] for index in np.linspace(0, len(train) - 1, CALIBRATED).astype(int)]
        images = [[np.asarray(Image.open(path).convert("RGB")) for path in paths] for paths in (chosen, test)]
    return images[0], images[1], [LABELS.index(path.parent.name) for path in test]


def heavy_tailed(tensors: dict[str, Any]) -> dict[str, Any]:
    """`tensors` with what training does to a Swin: a few channels of each LayerNorm are 5 to 30 times larger than the rest.

    In V1 the layers behind a norm see them; in V2, which normalises what it adds to the stream, the stream does. The columns
    that read such a channel are smaller, by the root of a typical factor: otherwise attention would only see these channels.
    """
    import torch

    second = any(name.endswith("logit_scale") for name in tensors)

    def large(width: int) -> Any:  # the same channels wherever there are so many
        return np.random.default_rng([7, width]).choice(width, max(2, width // 100), replace=False)

    for name, value in tensors.items():
        changed = value.clone()
        if "norm" in name and name.endswith("weight") and name != "layernorm.weight":
            factors = np.random.default_rng([len(value), sum(name.encode())]).uniform(5, 30, len(large(len(value))))
            changed[large(len(value))] *= torch.from_numpy(factors.astype(np.float32))
        elif name.endswith(("query.weight", "key.weight", "value.weight", "intermediate.dense.weight", "reduction.weight")):
            parts = 4 if second and "reduction" in name else 1
            width = value.shape[1] // parts
            for part in range(parts):
                changed[:, large(width) + part * width] /= 3.5
        tensors[name] = changed
    return tensors


def crops(count: int) -> list[Any]:
    """Pieces of the photographs in examples/, uint8 [side, side, 3]."""
    from PIL import Image

    photos = [np.asarray(Image.open(path).convert("RGB")) for path in sorted((ROOT / "examples/photos").glob("*.jpg"))]
    rng, found = np.random.default_rng(0), []
    for number in range(count):
        photo = photos[number % len(photos)]
        side = int(rng.integers(120, min(photo.shape[:2])))
        top, left = (int(rng.integers(0, extent - side + 1)) for extent in photo.shape[:2])
        piece = photo[top : top + side, left : left + side]
        found.append(piece[:, ::-1] if rng.random() < 0.5 else piece)
    return [np.ascontiguousarray(piece) for piece in found]
