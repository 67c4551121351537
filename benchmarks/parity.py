"""Compare exported graphs with transformers for the architecture of every published classifier, as a table.

    python benchmarks/parity.py [--variants swin-tiny,swinv2-tiny]

Each network is built by transformers with every parameter random (so that no bias, table or scale hides behind a zero or a
one), written by save_pretrained, exported as a user would export it, and run by ONNX Runtime on the CPU. The model of
transformers is the reference, on the same images. Needs the extras "export", "onnxruntime" and "test", and no network.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from swin_deploy.parity import compare
from swin_deploy.variants import VARIANTS, Variant, find_variant

CHECKPOINT, BUNDLE, LOGITS = "checkpoint", "bundle", "logits.npz"
HEADER = (
    "| variant | parameters | ONNX | fp32, relative L2 | fp16, relative L2 | fp16, same top-1 | images | export | memory |\n"
    "|---|--:|--:|--:|--:|--:|--:|--:|--:|"
)

Result = TypeVar("Result")


@dataclass(frozen=True)
class Cases:
    """The batches that are compared: one of each size for each seed."""

    seeds: int
    batches: tuple[int, ...]

    def images(self, variant: Variant) -> list[NDArray[np.float32]]:
        shape = (3, variant.image_size, variant.image_size)
        return [
            np.random.default_rng([seed, batch]).standard_normal((batch, *shape), dtype=np.float32)
            for seed in range(self.seeds)
            for batch in self.batches
        ]


@dataclass(frozen=True)
class Agreement:
    """The worst of all cases; `top1` counts the images whose best class is the same, out of `images`."""

    relative_l2: float
    top1: int
    images: int


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--variants", help="names with commas between (default: every classifier on the hub)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of torch and ONNX Runtime")
    given = parser.parse_args(arguments)
    chosen = [find_variant(name) for name in given.variants.split(",")] if given.variants else published()
    print(", ".join(f"{p} {version(p)}" for p in ("swin-deploy", "torch", "transformers", "onnxruntime")))
    print(HEADER, flush=True)
    failed = False
    for variant in chosen:
        try:
            print(row(variant, given.threads), flush=True)
        except Exception as error:  # noqa: BLE001 -- the others are measured all the same, and the exit code tells
            failed = True
            print(f"| {variant.name} | failed: {type(error).__name__}: {error} |", flush=True)
    return int(failed)


def published() -> list[Variant]:
    return [v for v in VARIANTS if v.hub_id is not None and v.task == "image-classification"]


def row(variant: Variant, threads: int) -> str:
    # At 384 pixels an image costs three times as much, and tells nothing that fewer do not.
    cases = Cases(3, (1, 2, 5)) if variant.image_size < 384 else Cases(1, (1, 2))
    with tempfile.TemporaryDirectory(prefix="swin-parity-") as scratch:
        folder = Path(scratch)
        parameters = alone(reference, variant, folder, cases, threads)
        seconds, peak = alone(export, folder, threads)
        fp32 = alone(agreement, variant, folder, "fp32", cases, threads)
        alone(write_fp16, folder)
        fp16 = alone(agreement, variant, folder, "fp16", cases, threads)
        size = (folder / BUNDLE / "onnx" / "model.onnx").stat().st_size
    figures = (
        f"{parameters / 1e6:.2f} M", f"{size / 1e6:.0f} MB", f"{fp32.relative_l2:.1e}", f"{fp16.relative_l2:.1e}",
        f"{fp16.top1} of {fp16.images}", f"{fp32.images}", f"{seconds:.0f} s", f"{peak / 1e9:.1f} GB",
    )  # fmt: skip
    return f"| {variant.name} | {' | '.join(figures)} |"


def alone(step: Callable[..., Result], *arguments: Any) -> Result:
    """What `step(*arguments)` returns in a process of its own, which gives all its memory back and has its own peak."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(step, *arguments).result()


def reference(variant: Variant, folder: Path, cases: Cases, threads: int) -> int:
    """The number of parameters of transformers' network; its weights and its logits are left in `folder`."""
    import torch
    import transformers

    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    kind = transformers.SwinForImageClassification if variant.version == 1 else transformers.Swinv2ForImageClassification
    model = kind(kind.config_class.from_dict(variant.config().to_dict())).eval()
    randomise(model)
    model.save_pretrained(folder / CHECKPOINT)
    with torch.no_grad():
        logits = [model(torch.from_numpy(images)).logits.numpy() for images in cases.images(variant)]
    np.savez(folder / LOGITS, *logits)
    return sum(parameter.numel() for parameter in model.parameters())


def randomise(model: Any) -> None:
    """Fills every parameter with reproducible random values of a size that keeps activations near one.

    One head of Swin V2 gets a scale above its clamp of ln(100). One, because with random weights such a head only magnifies
    rounding: with one in every block, half precision is 6e-3 away, and fp32 itself 3e-6.
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    clamped = False
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            if name.endswith("logit_scale"):
                values = 2.3 + 0.5 * values
                if not clamped:
                    values[0], clamped = 5.0, True
            elif "norm" in name:
                values = 0.1 * values + float(name.endswith("weight"))
            elif name.endswith("bias"):
                values = 0.1 * values
            elif not name.endswith("table"):
                values = values / values[0].numel() ** 0.5
            parameter.copy_(values)


def export(folder: Path, threads: int) -> tuple[float, int]:
    """Seconds, and the largest resident memory in bytes, of an export into `folder`, its comparison included."""
    import torch

    import swin_deploy

    torch.set_num_threads(threads)
    begun = time.perf_counter()
    swin_deploy.export(weights=folder / CHECKPOINT, output=folder / BUNDLE)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return time.perf_counter() - begun, peak * (1 if sys.platform == "darwin" else 1024)


def write_fp16(folder: Path) -> None:
    from swin_deploy.bundle import Bundle
    from swin_deploy.exporters.typed_graphs import with_typed_graphs
    from swin_deploy.runtimes.backends import runtime_from_onnx

    with_typed_graphs(Bundle.open(folder / BUNDLE), "fp16", runtime_from_onnx)


def agreement(variant: Variant, folder: Path, precision: str, cases: Cases, threads: int) -> Agreement:
    """How far the graph of `precision` is from the logits in `folder`."""
    import swin_deploy

    expected = np.load(folder / LOGITS)
    distance, equal, images = 0.0, 0, 0
    with swin_deploy.load(folder / BUNDLE, precision=precision, backend="onnxruntime", threads=threads) as model:
        for name, batch in zip(expected.files, cases.images(variant), strict=True):
            found = compare(model.run({"pixel_values": batch})["logits"], expected[name])
            distance = max(distance, found.relative_l2)
            equal += round(found.top1 * len(batch))
            images += len(batch)
    return Agreement(distance, equal, images)


if __name__ == "__main__":
    sys.exit(main())
