"""Train a tiny Swin V1 and a tiny Swin V2 to recognize the photograph of a patch, and save them as Hugging Face folders.

    python examples/patches/patches.py FOLDER
    python examples/patches/train.py FOLDER                       # both; minutes each on one CPU core
    python examples/patches/train.py FOLDER --version 2 --out /tmp/patches --epochs 5

The same library versions on the same kind of processor give the same weights.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
from patches import LABELS
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

FOLDERS = {1: "swin-patches", 2: "swinv2-patches"}
KINDS = {1: (SwinConfig, SwinForImageClassification), 2: (Swinv2Config, Swinv2ForImageClassification)}

# 16x16 patches, then 8x8 after one merging: in both stages several windows of 4x4, and every second block shifted.
ARCHITECTURE = {
    "image_size": 48,
    "patch_size": 3,
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
PROCESSOR = ViTImageProcessorPil(
    size={"height": 48, "width": 48},
    resample=Image.Resampling.BICUBIC,
    image_mean=[0.485, 0.456, 0.406],
    image_std=[0.229, 0.224, 0.225],
)


def load(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the model's input, float32 [count, 3, 48, 48], and the classes, int64 [count], of an image folder."""
    files = sorted(folder.glob("*/*.png"))
    pixels = PROCESSOR([Image.open(file).convert("RGB") for file in files], return_tensors="pt")["pixel_values"]
    return pixels, torch.tensor([LABELS.index(file.parent.name) for file in files])


def augment(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Rotate patches by right angles, mirror and shift them by up to 4 pixels, and change brightness and noise."""
    moved = []
    for patch in pixels:
        turns, mirror, down, right = (int(torch.randint(n, (), generator=generator)) for n in (4, 2, 9, 9))
        patch = torch.rot90(patch, turns, (1, 2))
        patch = patch.flip(2) if mirror else patch
        moved.append(F.pad(patch[None], (4, 4, 4, 4), mode="reflect")[0, :, down : down + 48, right : right + 48])
    batch = torch.stack(moved)
    light, contrast, noise = (torch.rand(len(batch), 1, 1, 1, generator=generator) for _ in range(3))
    batch = batch * (0.9 + 0.2 * contrast) + (light - 0.5) * 0.4
    return batch + torch.randn(batch[:, :1].shape, generator=generator) * (0.08 * noise)


def train(version: int, folder: Path, epochs: int, seed: int, batch: int = 32, rate: float = 2e-3) -> PreTrainedModel:
    """Return a model of this Swin version, trained from random weights on the training part only."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    config, kind = KINDS[version]
    model = kind(config(**ARCHITECTURE)).train()
    pixels, labels = load(folder / "train")
    vectors = [p for p in model.parameters() if p.ndim < 2]
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}], lr=rate
    )
    steps = epochs * math.ceil(len(pixels) / batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=rate, total_steps=steps, pct_start=0.15, cycle_momentum=False
    )
    for epoch in range(1, epochs + 1):
        total = 0.0
        for chosen in torch.randperm(len(pixels), generator=generator).split(batch):
            logits = model(pixel_values=augment(pixels[chosen], generator)).logits
            loss = F.cross_entropy(logits, labels[chosen], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total += loss.item() * len(chosen)
        if epoch % 5 == 0 or epoch == epochs:
            print(f"version {version}, epoch {epoch} of {epochs}: loss {total / len(pixels):.4f}", flush=True)
    return model.eval()


def right(folder: Path, data: Path) -> tuple[int, int]:
    """Return the number of test patches that the checkpoint in `folder` classifies correctly, and their total."""
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    pixels, labels = load(data / "test")
    with torch.inference_mode():
        best = np.concatenate([model(pixel_values=part).logits.argmax(1).numpy() for part in pixels.split(64)])
    return int((best == labels.numpy()).sum()), len(labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="what patches.py wrote")
    parser.add_argument("--version", choices=["1", "2", "both"], default="both", help="the Swin version to train")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="where the folders are written")
    parser.add_argument("--epochs", type=int, default=42)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    disable_progress_bar()
    torch.set_num_threads(1)  # the order of additions, and so the weights, would depend on the number of cores
    torch.use_deterministic_algorithms(True)
    for version in [1, 2] if options.version == "both" else [int(options.version)]:
        start = time.process_time()
        model = train(version, options.data, options.epochs, options.seed)
        folder = options.out / FOLDERS[version]
        model.save_pretrained(folder)
        PROCESSOR.save_pretrained(folder)
        good, count = right(folder, options.data)
        print(
            f"{folder}: {model.num_parameters()} parameters, {time.process_time() - start:.0f} s of processor time, "
            f"test accuracy {good / count:.4f} ({good} of {count})",
            flush=True,
        )


if __name__ == "__main__":
    main()
