"""Train the two tiny checkpoints, one Swin V1 and one Swin V2, and write them as Hugging Face folders.

    python examples/digits/train.py                     # both, four to eight minutes each on one CPU core
    python examples/digits/train.py --version 2 --out /tmp/digits --epochs 20

The same library versions on the same kind of processor give the same weights.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from digits import LABELS, split
from PIL import Image
from torch.nn import functional as F
from transformers import (
    AutoModelForImageClassification,
    PreTrainedModel,
    SwinConfig,
    SwinForImageClassification,
    Swinv2Config,
    Swinv2ForImageClassification,
    ViTImageProcessorPil,
)
from transformers.utils.logging import disable_progress_bar

FOLDERS = {1: "swin-digits", 2: "swinv2-digits"}
KINDS = {1: (SwinConfig, SwinForImageClassification), 2: (Swinv2Config, Swinv2ForImageClassification)}

# 16x16 patches, then 8x8 after one merging: in both stages several windows of 4x4, and every second block shifted.
ARCHITECTURE = {
    "image_size": 32,
    "patch_size": 2,
    "num_channels": 3,
    "embed_dim": 32,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
    "drop_path_rate": 0.05,
    "initializer_range": 0.1,
    "id2label": dict(enumerate(LABELS)),
    "label2id": {label: index for index, label in enumerate(LABELS)},
}

# The processor of the original Swin checkpoints (bicubic, ImageNet's mean and deviation), for 32x32 pixels.
PROCESSOR = ViTImageProcessorPil(
    size={"height": 32, "width": 32},
    resample=Image.Resampling.BICUBIC,
    image_mean=[0.485, 0.456, 0.406],
    image_std=[0.229, 0.224, 0.225],
)


def preprocess(images: np.ndarray) -> torch.Tensor:
    """Return uint8 images [count, height, width, 3] as the model's input, float32 [count, 3, 32, 32]."""
    return PROCESSOR([Image.fromarray(image) for image in images], return_tensors="pt")["pixel_values"]


def augment(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Rotate, scale and shear images slightly, shift them by up to 3 pixels, and add noise."""
    count = len(pixels)

    def uniform(limit: float) -> torch.Tensor:
        return (torch.rand(count, generator=generator) * 2 - 1) * limit

    angle, slant = uniform(math.radians(12)), uniform(0.15)
    scale_x, scale_y = 1 + uniform(0.12), 1 + uniform(0.12)
    row_x = torch.stack([scale_x * angle.cos(), slant - angle.sin(), uniform(3 / 16)], dim=1)
    row_y = torch.stack([angle.sin(), scale_y * angle.cos(), uniform(3 / 16)], dim=1)
    grid = F.affine_grid(torch.stack([row_x, row_y], dim=1), list(pixels.shape), align_corners=False)
    black = preprocess(np.zeros((1, 8, 8, 3), np.uint8))  # what moves in from outside is background
    moved = F.grid_sample(pixels - black, grid, align_corners=False) + black
    noise = torch.randn(count, 1, *pixels.shape[2:], generator=generator)
    return moved + noise * (0.2 * torch.rand(count, 1, 1, 1, generator=generator))


def parameter_groups(model: PreTrainedModel, rate: float) -> list[dict]:
    """Return the optimizer's groups: no decay for vectors, and a faster rate where gradients are small.

    Position biases and logit scales start at constants; at the common rate they would hardly leave them.
    """
    groups: dict[str, list[torch.nn.Parameter]] = {"matrix": [], "vector": [], "attention": []}
    for name, parameter in model.named_parameters():
        if "relative_position_bias" in name or "logit_scale" in name:
            groups["attention"].append(parameter)
        else:
            groups["vector" if parameter.ndim < 2 else "matrix"].append(parameter)
    return [
        {"params": groups["matrix"], "max_lr": rate, "weight_decay": 0.05},
        {"params": groups["vector"], "max_lr": rate, "weight_decay": 0.0},
        {"params": groups["attention"], "max_lr": rate * 5, "weight_decay": 0.0},
    ]


def train(version: int, epochs: int, seed: int, batch: int = 48, rate: float = 2e-3) -> PreTrainedModel:
    """Return a model of this Swin version, trained from random weights on the training part only."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    config, kind = KINDS[version]
    model = kind(config(**ARCHITECTURE)).train()
    for name, parameter in model.named_parameters():
        if name.endswith(("key.bias", "k_proj.bias")):  # softmax cancels it: without a gradient it would stay at zero
            torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    data = split()
    pixels, digits = preprocess(data.train_images), torch.from_numpy(data.train_digits)
    groups = parameter_groups(model, rate)
    optimizer = torch.optim.AdamW(groups, lr=rate)
    steps = epochs * math.ceil(len(pixels) / batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=[group["max_lr"] for group in groups], total_steps=steps, pct_start=0.15, cycle_momentum=False
    )
    for epoch in range(1, epochs + 1):
        total = 0.0
        for chosen in torch.randperm(len(pixels), generator=generator).split(batch):
            logits = model(pixel_values=augment(pixels[chosen], generator)).logits
            loss = F.cross_entropy(logits, digits[chosen], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total += loss.item() * len(chosen)
        if epoch % 10 == 0 or epoch == epochs:
            print(f"version {version}, epoch {epoch} of {epochs}: loss {total / len(pixels):.4f}", flush=True)
    return model.eval()


def save(model: PreTrainedModel, folder: Path) -> None:
    """Write the weights, the config and the preprocessing."""
    model.save_pretrained(folder)
    PROCESSOR.save_pretrained(folder)
    processor = json.loads((folder / "preprocessor_config.json").read_text())
    if processor["image_processor_type"] != "ViTImageProcessor":
        raise SystemExit(f"{folder}: unexpected image_processor_type {processor['image_processor_type']}")


def probabilities(folder: Path, images: np.ndarray) -> np.ndarray:
    """Return the probability of each digit, float32 [count, 10], by the checkpoint loaded from its folder."""
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    with torch.inference_mode():
        return model(pixel_values=preprocess(images)).logits.softmax(-1).numpy()


def write_images(folders: list[Path], target: Path) -> None:
    """Write one held-out image per digit: the one with the highest lower probability of the two checkpoints."""
    data = split()
    every = np.arange(len(data.test_digits))
    least = np.minimum.reduce([probabilities(folder, data.test_images)[every, data.test_digits] for folder in folders])
    target.mkdir(parents=True, exist_ok=True)
    for digit in range(10):
        best = int(np.argmax(np.where(data.test_digits == digit, least, -1)))
        if least[best] <= 0.5:
            print(f"{target / f'{digit}.png'}: not written, no held-out {digit} is recognised by every checkpoint")
            continue
        Image.fromarray(data.test_images[best][..., 0]).save(target / f"{digit}.png")
        print(f"{target / f'{digit}.png'}: held-out image {best}, probability {least[best]:.3f} or more")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", choices=["1", "2", "both"], default="both", help="the Swin version to train")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="where the folders are written")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    disable_progress_bar()
    torch.set_num_threads(1)  # the order of additions, and so the weights, would depend on the number of cores
    torch.use_deterministic_algorithms(True)
    data = split()
    for version in [1, 2] if options.version == "both" else [int(options.version)]:
        start = time.perf_counter()
        model = train(version, options.epochs, options.seed)
        folder = options.out / FOLDERS[version]
        save(model, folder)
        correct = int((probabilities(folder, data.test_images).argmax(1) == data.test_digits).sum())
        print(
            f"{folder}: {model.num_parameters()} parameters, {time.perf_counter() - start:.0f} s, "
            f"held-out accuracy {correct / len(data.test_digits):.4f} ({correct} of {len(data.test_digits)})"
        )
    folders = [options.out / name for name in FOLDERS.values()]
    if all(folder.is_dir() for folder in folders):
        write_images(folders, options.out / "images")


if __name__ == "__main__":
    main()
