"""Error of INT8 and FP8 graphs of networks as transformers initialises them, and of the same with random vectors.

A network that was not trained has norms of ones and biases of zeros, which PyTorch's exporter stores once for many nodes.
Random numbers of a small deviation, added to all norms and biases, leave the network almost as it is without shared constants.

    python benchmarks/default_initialization.py [--seeds 3] [--deviation 0.001 0.02] [--image-size 64] [--embed-dim 32]

Prints the relative L2 distance from fp32 on crops of photographs that were not used for calibration (mean over the seeds), and
in parentheses the distance relative to what differs between images. ONNX Runtime's own quantization is the baseline.
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

GRAPHS = (("int8", "onnxruntime"), ("int8", "tensorrt"), ("fp8", "tensorrt"))


def network(version: int, seed: int, deviation: float, side: int, width: int) -> Any:
    """A classifier of transformers with its own initial weights; norms and biases get random numbers of this deviation."""
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
            if values.ndim == 1 and not name.endswith("logit_scale"):
                values += deviation * torch.randn(values.shape, generator=generator)
    return model


def errors(version: int, seed: int, deviation: float, side: int, width: int, folder: Path) -> list[tuple[float, float]]:
    """The relative L2 distance from fp32 of all that each graph of GRAPHS computes, and of what depends on the image."""
    network(version, seed, deviation, side, width).save_pretrained(folder / "checkpoint")
    images = crops(48)
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
    return float(noise / np.linalg.norm(fp32)), float(noise / np.linalg.norm(fp32 - fp32.mean(axis=0)))


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
    parser.add_argument("--deviation", type=float, nargs="+", default=[0.001, 0.02])
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--embed-dim", type=int, default=32)
    options = parser.parse_args()
    titles = ["ONNX Runtime static INT8", *(f"{precision.upper()} for {target}" for precision, target in GRAPHS)]
    print("| | " + " | ".join(titles) + " |")
    for version in (1, 2):
        means: list[Any] = []
        for deviation in (0.0, *options.deviation):
            rows = []
            for seed in range(options.seeds):
                with tempfile.TemporaryDirectory() as folder:
                    rows.append(errors(version, seed, deviation, options.image_size, options.embed_dim, Path(folder)))
            means.append(np.mean(rows, axis=0))
            cells = (f"{error:.4f} ({part:.4f})" for error, part in means[-1])
            print(f"| V{version}, deviation {deviation:g} | " + " | ".join(cells) + " |", flush=True)
            if deviation:
                cells = (f"{ratio:.2f} ({part:.2f})" for ratio, part in means[0] / means[-1])
                print(f"| V{version}, ratio | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
