"""Error of INT8 and FP8 graphs of networks as transformers initialises them, and of the same with random vectors.

A network that was not trained has norms of ones and biases of zeros, which the graph stores once for many nodes.
Random numbers, added to the scales of the norms alone or to all norms and biases, leave no constant that is shared.

    python benchmarks/default_initialization.py [--seeds 3] [--image-size 64] [--embed-dim 32]

Prints, for 64 crops of photographs that were not used for calibration (mean over the seeds), the error relative to the part of
the outputs that differs between images, and in parentheses relative to the whole outputs. The baseline is ONNX Runtime's own
quantization.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from onnxruntime import quantization
from quantization_networks import crops

import swin_deploy
from swin_deploy.preprocess import Preprocessor
from swin_deploy.runtimes.backends import runtime_from_onnx

CHANGES = (("norms", 0.1), ("norms and biases", 0.001), ("norms and biases", 0.02))  # what is random, and its deviation
GRAPHS = (("int8", "onnxruntime"), ("int8", "tensorrt"), ("fp8", "tensorrt"))


def network(version: int, seed: int, change: tuple[str, float], side: int, width: int) -> Any:
    """A classifier of transformers with its own initial weights, changed as CHANGES states."""
    where, deviation = change
    kind, config = (
        (transformers.SwinForImageClassification, transformers.SwinConfig)
        if version == 1
        else (transformers.Swinv2ForImageClassification, transformers.Swinv2Config)
    )
    torch.manual_seed(seed)
    model = kind(
        config(image_size=side, embed_dim=width, depths=[2, 2], num_heads=[2, 4], window_size=4, num_labels=100)
    ).eval()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, values in model.named_parameters():
            scale = "norm" in name and name.endswith("weight")
            if values.ndim == 1 and not name.endswith("logit_scale") and (scale or where != "norms"):
                values += deviation * torch.randn(values.shape, generator=generator)
    return model


def errors(
    version: int, seed: int, change: tuple[str, float], side: int, width: int, folder: Path
) -> list[tuple[float, float]]:
    """The error of each graph, relative to the part of the outputs that differs between images and to the whole outputs."""
    network(version, seed, change, side, width).save_pretrained(folder / "checkpoint")
    images = crops(96)
    bundle = swin_deploy.export(weights=folder / "checkpoint", output=folder / "bundle").path
    prepare = Preprocessor.imagenet((side, side))
    calibration, pixels = prepare(images[:32]), prepare(images[32:])
    found = [distances(bundle, static(bundle / "onnx/model.onnx", calibration, folder), pixels)]
    for precision, target in GRAPHS:
        swin_deploy.quantize(bundle, images[:32], precision=precision, target=target)
        found.append(distances(bundle, bundle / f"onnx/model_{precision}.onnx", pixels))
    return found


def distances(bundle: Path, graph: Path, pixels: Any) -> tuple[float, float]:
    fp32, test = (run(path, pixels) for path in (bundle / "onnx/model.onnx", graph))
    noise = np.linalg.norm(test - fp32)
    return float(noise / np.linalg.norm(fp32 - fp32.mean(axis=0))), float(noise / np.linalg.norm(fp32))


def run(path: Path, pixels: Any) -> Any:
    with runtime_from_onnx(path, "onnxruntime") as runtime:
        return np.asarray(runtime.run({"pixel_values": pixels})["logits"], np.float64)


def static(model: Path, pixels: Any, folder: Path) -> Path:
    """Quantize the linear layers with ONNX Runtime's own static quantization."""

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = iter([{"pixel_values": pixels}])

        def get_next(self) -> Any:
            return next(self.left, None)

    target = folder / "static.onnx"
    quantization.quantize_static(str(model), str(target), Reader(), op_types_to_quantize=["Gemm"], per_channel=True)
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--embed-dim", type=int, default=32)
    options = parser.parse_args()
    titles = ["ONNX Runtime static INT8", *(f"{precision.upper()} for {target}" for precision, target in GRAPHS)]
    print("| | " + " | ".join(titles) + " |")
    for version in (1, 2):
        means: list[Any] = []
        for change in (("ones and zeros", 0.0), *CHANGES):
            rows = []
            for seed in range(options.seeds):
                with tempfile.TemporaryDirectory() as folder:
                    rows.append(errors(version, seed, change, options.image_size, options.embed_dim, Path(folder)))
            means.append(np.mean(rows, axis=0))
            cells = (f"{error:.4f} ({whole:.4f})" for error, whole in means[-1])
            title = f"{change[0]} {change[1]:g}" if change[1] else change[0]
            print(f"| V{version}, {title} | " + " | ".join(cells) + " |", flush=True)
            if len(means) > 1:
                cells = (f"{ratio:.2f} ({whole:.2f})" for ratio, whole in means[0] / means[-1])
                print(f"| V{version}, ratio | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
