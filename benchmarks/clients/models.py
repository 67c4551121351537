"""The models that clients run: our bundle, the export of transformers, images, and the logits of transformers."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
MODELS = ("swin-digits", "swinv2-digits", "swin-tiny", "swinv2-tiny")
FILES = ("config.json", "preprocessor_config.json")


def softmax(logits: np.ndarray) -> np.ndarray:
    odds = np.exp(logits - logits.max(1, keepdims=True))
    return np.asarray(odds / odds.sum(1, keepdims=True))


def made(name: str, folder: Path, images: int) -> None:
    """Write a model to `folder`, unless there is one that this version of the package wrote.

    It has `ours`, `opset17` and `theirs`, `images`, `pixels.npy`, which are the images as the networks read them, and
    `logits.npy` of transformers. The images have the size of the network, so that no client resizes them.
    """
    sources = [Path(__file__), *(file for part in ("exporters", "swin_deploy") for file in sorted((ROOT / part).rglob("*.py")))]
    version = hashlib.sha256(b"".join(file.read_bytes() for file in sources) + f"{images}".encode()).hexdigest()
    if (folder / "version").exists() and (folder / "version").read_text() == version:
        return
    import swin_deploy
    from swin_deploy.bench.baselines import torchscript_export, transformers_network

    shutil.rmtree(folder, ignore_errors=True)
    (folder / "theirs/onnx").mkdir(parents=True)
    source = ROOT / "examples/digits" / name
    shown = pictures(name, images)
    if not source.is_dir():
        source = folder / "checkpoint"
        write_checkpoint(name, source, to_pixels(shown))
    bundle = swin_deploy.export(weights=source, output=folder / "ours")
    swin_deploy.export(weights=source, output=folder / "opset17", opset=17)
    swin_deploy.publish(bundle.path, target="triton", output=folder / "triton")
    shutil.move(folder / "triton", folder / "ours/triton")  # a client gets one folder
    network, pixels = transformers_network(source), to_pixels(shown)
    # Its batch is fixed, so clients run one image at a time.
    (folder / "theirs/onnx/model.onnx").write_bytes(torchscript_export(network, (1, *pixels.shape[1:])))
    for file in FILES:
        shutil.copy(source / file, folder / "theirs")
    (folder / "images").mkdir()
    for number, picture in enumerate(shown):
        picture.save(folder / "images" / f"{number:03}.png")
    np.save(folder / "pixels.npy", pixels)
    np.save(folder / "logits.npy", outputs(network, pixels))
    (folder / "version").write_text(version)


def pictures(name: str, count: int) -> list[Any]:
    """Return images of Pillow in the size of the network: handwritten digits, or pieces of photographs in many colors."""
    from PIL import Image, ImageOps

    if name.endswith("digits"):
        sys.path.append(str(ROOT / "examples/digits"))
        from digits import split

        return [Image.fromarray(image).resize((32, 32), Image.Resampling.BICUBIC) for image in split().test_images[:count]]
    sys.path.append(str(ROOT / "benchmarks"))
    from quantization_networks import crops

    rng, found, side = np.random.default_rng(0), [], 256 if name == "swinv2-tiny" else 224
    for piece in crops(count):
        image = Image.fromarray(piece).resize((side, side), Image.Resampling.BICUBIC)
        planes = [image.getchannel(int(plane)) for plane in rng.permutation(3)]
        planes = [ImageOps.invert(plane) if rng.random() < 0.5 else plane for plane in planes]
        found.append(Image.merge("RGB", planes))
    return found


def to_pixels(images: list[Any]) -> np.ndarray:
    mean, std = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])
    values = (np.stack([np.asarray(image) for image in images]).astype(np.float32) / 255 - mean) / std
    return np.ascontiguousarray(values.transpose(0, 3, 1, 2))


def outputs(network: Any, pixels: np.ndarray) -> np.ndarray:
    import torch

    with torch.no_grad():
        return np.concatenate([network(torch.from_numpy(part)).numpy() for part in np.split(pixels, range(4, len(pixels), 4))])


def write_checkpoint(name: str, folder: Path, pixels: np.ndarray) -> None:
    """Write a network with random weights, no parameter 0 or 1, whose classes differ from image to image.

    The logits of random heads are nearly the same for all images. So the head reads the main components of the pooled features
    of `pixels`, each with the same variance.
    """
    import torch
    from transformers import SwinConfig, SwinForImageClassification, Swinv2Config, Swinv2ForImageClassification

    torch.manual_seed(0)
    network: Any = (
        SwinForImageClassification(SwinConfig(num_labels=1000))
        if name == "swin-tiny"
        else Swinv2ForImageClassification(Swinv2Config(num_labels=1000, image_size=256, window_size=8))
    )
    with torch.no_grad():
        for values in network.parameters():
            values += 0.02 * torch.randn_like(values)
        base = getattr(network, network.base_model_prefix).eval()
        features = torch.cat([base(torch.from_numpy(image[None])).pooler_output for image in pixels])
        mean = features.mean(0)
        _, spread, axes = torch.linalg.svd(features - mean, full_matrices=False)
        axes = axes[:12] / spread[:12, None] * len(pixels) ** 0.5  # each component has the variance 1
        head = torch.randn(1000, len(axes)) @ axes
        network.classifier.weight.copy_(head)
        network.classifier.bias.copy_(-head @ mean)
    network.save_pretrained(folder)
    side = pixels.shape[-1]
    steps = json.loads((ROOT / "examples/digits/swin-digits/preprocessor_config.json").read_text(encoding="utf-8"))
    steps["size"] = {"height": side, "width": side}
    (folder / "preprocessor_config.json").write_text(json.dumps(steps), encoding="utf-8")
