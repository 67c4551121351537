"""A graph of two layers and small images, shared by the tests of calibration."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from PIL import Image
from small_graphs import model_from_text

from swin_deploy.bundle import TensorSpec
from swin_deploy.preprocess import Preprocessor

SIDE = 8
INPUTS = (TensorSpec("pixel_values", "float32", ("batch", 3, SIDE, SIDE)),)
PREPROCESSOR = Preprocessor.imagenet(SIDE)
TENSORS = ("pixel_values", "flat", "hidden", "gelu")


def network(seed: int = 0) -> onnx.ModelProto:
    """pixel_values [batch, 3, 8, 8] -> flat [batch, 192] -> hidden, gelu [batch, 16] -> logits [batch, 4]."""
    rng = np.random.default_rng(seed)
    weights = {
        "w1": rng.standard_normal((3 * SIDE * SIDE, 16)).astype(np.float32) / 8,
        "w2": rng.standard_normal((16, 4)).astype(np.float32),
        "shape": np.array([-1, 3 * SIDE * SIDE]),
    }
    text = f"""tiny (float[batch, 3, {SIDE}, {SIDE}] pixel_values) => (float[batch, 4] logits) {{
        flat = Reshape(pixel_values, shape)
        hidden = Gemm(flat, w1)
        gelu = Gelu(hidden)
        logits = Gemm(gelu, w2)
    }}"""
    return model_from_text(text, **weights)


def images(count: int, seed: int = 0) -> np.ndarray:
    """uint8 [count, 8, 8, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (count, SIDE, SIDE, 3), dtype=np.uint8)


def folder(path: Path, classes: dict[str, int], suffix: str = ".png") -> Path:
    """Write images into a folder per class; the class "" is `path` itself."""
    number = 0
    for name, count in classes.items():
        (path / name).mkdir(parents=True, exist_ok=True)
        for place in range(count):
            Image.fromarray(images(1, seed=number)[0]).save(path / name / f"{place}{suffix}")
            number += 1
    return path
