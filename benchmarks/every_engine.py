"""Compile every published architecture with TensorRT for RTX, in each precision and for each GPU.

    python benchmarks/every_engine.py [--variants swin-tiny,...] [--precisions fp16,bf16] [--gpus sm_86,sm_89,sm_120]

Prints a table. Each engine has three optimization profiles, for batches of 1, 8 and 32; a cell has the kernels of each, and
a remark if not every attention block is one fused kernel. Nothing is run, so no GPU is needed. Weights are random; no figure
depends on them. Needs the extras "export" and "tensorrt-rtx", and no network.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from importlib.metadata import version

from swin_deploy.config import SwinConfig
from swin_deploy.errors import EngineError
from swin_deploy.exporters.engines.engine_from_onnx import engine_from_onnx
from swin_deploy.exporters.external_data import embed_weights
from swin_deploy.exporters.onnx_from_torch import onnx_from_torch
from swin_deploy.exporters.precision import typed_from_fp32
from swin_deploy.models.checkpoints import random_checkpoint
from swin_deploy.models.swin import SwinNetwork
from swin_deploy.options import EngineSpec
from swin_deploy.tasks import TaskSpec
from swin_deploy.variants import VARIANTS, Variant

BATCHES = (1, 8, 32)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--variants", default="", help="names, separated by commas; default: all")
    parser.add_argument("--precisions", default="fp16,bf16")
    parser.add_argument("--gpus", default="sm_86,sm_89,sm_120")
    given = parser.parse_args(arguments)
    gpus, failed = given.gpus.split(","), 0
    print(", ".join(f"{p} {version(p)}" for p in ("swin-deploy", "torch", "tensorrt-rtx")))
    print(
        f"\n| architecture | blocks | precision | {' | '.join(gpus)} | compiled in |\n|---|--:|---|{'---|' * len(gpus)}--:|",
        flush=True,
    )
    for variants in architectures([name for name in given.variants.split(",") if name]):
        config, task = variants[0].config(), TaskSpec("feature-extraction")
        network = SwinNetwork(config, config.image_size, random_checkpoint(config, task).tensors, task).eval()
        traced = onnx_from_torch(network, config.image_size)
        embed_weights(traced.model, traced.weights)
        del network
        for precision in given.precisions.split(","):
            graph = typed_from_fp32(traced.model, config, task, precision).model.SerializeToString()
            cells, seconds = [], 0.0
            for gpu in gpus:
                cell, took = compiled(graph, gpu, config.blocks)
                failed += "(" in cell
                cells.append(cell)
                seconds += took
            names = ", ".join(variant.name for variant in variants)
            print(f"| {names} | {config.blocks} | {precision} | {' | '.join(cells)} | {seconds:.0f} s |", flush=True)
    return int(failed > 0)


def architectures(names: Sequence[str]) -> list[list[Variant]]:
    """Group the variants that differ only in their labels, which do not change the kernels."""
    found: dict[SwinConfig, list[Variant]] = {}
    for variant in VARIANTS:
        if not names or {variant.name, *variant.aliases} & set(names):
            found.setdefault(dataclasses.replace(variant.config(), id2label=()), []).append(variant)
    return list(found.values())


def compiled(graph: bytes, gpu: str, blocks: int) -> tuple[str, float]:
    """Return the kernels for each batch, and the seconds of compilation."""
    spec = EngineSpec(backend="tensorrt-rtx", gpus=gpu, batches=tuple((batch,) * 3 for batch in BATCHES))
    try:
        engine = engine_from_onnx(graph, spec)
    except EngineError as error:
        return f"(failed: {error})", 0.0
    cell = " / ".join(f"{report.kernels}" for report in engine.reports)
    fused = [report.fused_attention for report in engine.reports]
    return (cell if fused == [blocks] * len(BATCHES) else f"{cell} ({fused} fused)"), engine.seconds


if __name__ == "__main__":
    sys.exit(main())
