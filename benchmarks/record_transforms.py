"""Record what the evaluation transforms of timm and torchvision make of awkward images, as checksums of the pixels.

    python benchmarks/record_transforms.py

Writes tests/recorded_transforms.json. Needs timm and torchvision, in an environment of their own. torchvision's compiled
operators may be missing: the transforms do not use them.
"""

from __future__ import annotations

import json
import sys
import zlib
from pathlib import Path
from typing import Any

import PIL
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from awkward_images import awkward_images, without_transparency  # noqa: E402

IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
HALF = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
TIMM: dict[str, dict[str, Any]] = {
    "center 0.9": {"input_size": [3, 64, 64], "crop_pct": 0.9, "crop_mode": "center", "interpolation": "bicubic", **IMAGENET},
    "center 0.875 bilinear": {"input_size": [3, 57, 57], "crop_pct": 0.875, "interpolation": "bilinear", **HALF},
    "center, not square": {"input_size": [3, 48, 65], "crop_pct": 0.95, "interpolation": "bicubic", **IMAGENET},
    "squash": {"input_size": [3, 64, 64], "crop_pct": 1.0, "crop_mode": "squash", "interpolation": "bicubic", **IMAGENET},
    "squash and crop": {"input_size": [3, 63, 48], "crop_pct": 0.9, "crop_mode": "squash", "interpolation": "lanczos", **HALF},
    "border": {"input_size": [3, 64, 64], "crop_pct": 1.0, "crop_mode": "border", "interpolation": "bicubic", **IMAGENET},
    "border and crop": {"input_size": [3, 49, 64], "crop_pct": 0.8, "crop_mode": "border", "interpolation": "nearest", **HALF},
    "defaults": {"input_size": [3, 64, 64]},
}


def main() -> None:
    """Write the checksums."""
    torch.library.Library("torchvision", "DEF").define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import timm
    import torchvision
    from timm.data import create_transform, resolve_data_config
    from torchvision.models import swin_transformer

    images = [without_transparency(image) for image in awkward_images().values()]
    found: dict[str, Any] = {"pillow": PIL.__version__, "timm": timm.__version__, "torchvision": torchvision.__version__}
    for name, config in TIMM.items():
        transform = create_transform(**resolve_data_config(pretrained_cfg=config), is_training=False)
        found[name] = {"config": config, "crc32": [checksum(transform, image) for image in images]}
    for name in ("Swin_T", "Swin_S", "Swin_B", "Swin_V2_T", "Swin_V2_S", "Swin_V2_B"):
        weights = getattr(swin_transformer, f"{name}_Weights")
        assert len({str(one.transforms()) for one in weights}) == 1
        found[name] = {"crc32": [checksum(weights.DEFAULT.transforms(), image) for image in images]}
    text = json.dumps(found).replace('], "', '],\n"').replace("}, ", "},\n")
    (ROOT / "tests/recorded_transforms.json").write_text(text + "\n")


def checksum(transform: Any, image: Any) -> int | None:
    """Return the CRC-32 of the pixels in float32; None where the transform fails."""
    try:
        return zlib.crc32(transform(image).contiguous().numpy().tobytes())
    except (ValueError, ZeroDivisionError):
        return None


if __name__ == "__main__":
    main()
