"""Raw float frames: the error of normalization in the graph, and that of one factor for all channels outside it.

    python benchmarks/raw_frames.py [CHECKPOINT ...]

A checkpoint is a folder or a hub id. Default: Swin-T and SwinV2-T with random weights, and the digits models. The reference is
transformers: its image processor and its model, on photos. DeepStream's nvinfer computes net-scale-factor * (pixel - offset)
with offsets for each channel, but one factor; 0.0173520735728 is that of its samples, 1 / (255 * 0.226). Needs the extras
"export" and "onnxruntime", and transformers.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification, SwinConfig, Swinv2Config

import swin_deploy
from swin_deploy.parity import compare, sqnr

ROOT = Path(__file__).resolve().parents[1]
FACTOR = 0.0173520735728
RANDOM = {"swin-tiny": SwinConfig(num_labels=1000), "swinv2-tiny": Swinv2Config(image_size=256, window_size=8, num_labels=1000)}


def main() -> int:
    photos = [Image.open(path).convert("RGB") for path in sorted(ROOT.glob("examples/photos/*.jpg"))]
    print("| checkpoint | raw frames, normalized in the graph: relative L2 | one factor: relative L2 | one factor: SQNR |")
    print("|---|--:|--:|--:|")
    with tempfile.TemporaryDirectory() as scratch:
        digits = [str(ROOT / "examples/digits" / name) for name in ("swin-digits", "swinv2-digits")]
        for checkpoint in sys.argv[1:] or [*random_checkpoints(Path(scratch)), *digits]:
            wanted, raw, factor = logits_of(checkpoint, photos, Path(scratch))
            inside, outside = compare(raw, wanted).relative_l2, compare(factor, wanted).relative_l2
            print(f"| {Path(checkpoint).name} | {inside:.1e} | {outside:.1e} | {sqnr(wanted, factor):.1f} dB |", flush=True)
    return 0


def random_checkpoints(folder: Path) -> list[str]:
    """Write the networks of RANDOM as checkpoints, and return their folders."""
    for name, config in RANDOM.items():
        torch.manual_seed(0)
        AutoModelForImageClassification.from_config(config).save_pretrained(folder / name)
    return [str(folder / name) for name in RANDOM]


def logits_of(checkpoint: str, photos: list[Image.Image], scratch: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the logits of transformers, of the graph for raw frames, and of prepared arrays with one factor."""
    options = {"weights": checkpoint, "output": scratch / f"{Path(checkpoint).name}-raw", "force": True}
    bundle = swin_deploy.export(**options, embed_preprocess=True, input_layout="nchw")
    model = AutoModelForImageClassification.from_pretrained(checkpoint, config=AutoConfig.from_pretrained(bundle.path)).eval()
    processor = AutoImageProcessor.from_pretrained(bundle.path, do_rescale=True, do_normalize=True)
    pixels = processor(photos, return_tensors="pt")["pixel_values"]
    bare = AutoImageProcessor.from_pretrained(bundle.path)(photos, return_tensors="np")["pixel_values"].astype(np.float32)
    mean = 255 * np.array(processor.image_mean, np.float32).reshape(1, -1, 1, 1)
    with torch.no_grad():
        wanted = model(pixels).logits.numpy()
        factor = model(torch.from_numpy((bare - mean) * np.float32(FACTOR))).logits.numpy()
    with swin_deploy.load(bundle.path, backend="onnxruntime", precision="fp32") as raw:
        return wanted, raw.run({"pixel_values": bare})["logits"], factor


if __name__ == "__main__":
    sys.exit(main())
