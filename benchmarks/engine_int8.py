"""Compare INT8 and FP8 graphs with fp16 in TensorRT for RTX, for every published architecture.

    python benchmarks/engine_int8.py [--variants swin-tiny,...] [--quantizations int8,fp8] [--gpu sm_89] [--batches 1,8,32]

Prints a table: kernels and bytes for one image, then the kernels of one engine with an optimization profile for each of
`--batches`. Engines are compiled and not run, so no GPU is needed. Weights are random and activation ranges are made up; no
figure depends on them. Needs the extras "export" and "tensorrt-rtx", and no network.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import version

import onnx
from every_engine import architectures

from swin_deploy.config import SwinConfig
from swin_deploy.errors import EngineError
from swin_deploy.exporters.engines.engine_from_onnx import engine_from_onnx
from swin_deploy.exporters.engines.layer_report import EngineReport
from swin_deploy.exporters.external_data import embed_weights
from swin_deploy.exporters.onnx_from_torch import onnx_from_torch
from swin_deploy.exporters.precision import typed_from_fp32
from swin_deploy.exporters.quantization.for_tensorrt import quantized_from_fp32, quantized_layers
from swin_deploy.models.checkpoints import random_checkpoint
from swin_deploy.models.swin import SwinNetwork
from swin_deploy.options import EngineSpec
from swin_deploy.tasks import TaskSpec

HEADER = (
    "| variant | graph | kernels | fused attention | moved | to fp16 | of that, weights | kernels by batch | compiled in |\n"
    "|---|---|--:|--:|--:|--:|--:|--:|--:|"
)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--variants", default="", help="names, separated by commas; default: all")
    parser.add_argument("--quantizations", default="int8,fp8")
    parser.add_argument("--gpu", default="sm_89", help="GPU to compile for")
    parser.add_argument("--batches", default="1,8,32", help="empty: without that column")
    given = parser.parse_args(arguments)
    batches = [int(size) for size in given.batches.split(",") if size]
    print(f"{given.gpu}: " + ", ".join(f"{p} {version(p)}" for p in ("swin-deploy", "torch", "tensorrt-rtx")))
    print(HEADER, flush=True)
    failed = 0
    for variants in architectures([name for name in given.variants.split(",") if name]):
        config = variants[0].config()
        task = TaskSpec("feature-extraction" if variants[0].task == "masked-image-modeling" else "image-classification")
        network = SwinNetwork(config, config.image_size, random_checkpoint(config, task).tensors, task).eval()
        traced = onnx_from_torch(network, config.image_size)
        embed_weights(traced.model, traced.weights)
        del network
        half = None
        for title in ("fp16", *given.quantizations.split(",")):
            try:
                cells, report = row(traced.model, config, task, title, given.gpu, batches, half)
            except EngineError as error:
                cells, report, failed = f"failed: {error}", None, failed + 1
            half = report if title == "fp16" else half
            print(f"| {variants[0].name} | {title} | {cells} |", flush=True)
    return int(failed > 0)


def row(
    wide: onnx.ModelProto,
    config: SwinConfig,
    task: TaskSpec,
    title: str,
    gpu: str,
    batches: Sequence[int],
    half: EngineReport | None,
) -> tuple[str, EngineReport]:
    """Return the cells, and the report for one image."""
    if title == "fp16":
        model = typed_from_fp32(wide, config, task, title).model
    else:
        ranges = {name: 4.0 for layer in quantized_layers(wide, config, title) for name in layer.inputs}
        model, _ = quantized_from_fp32(wide, config, task, title, ranges)
    by_batch: list[str] = []
    if batches:
        spec = EngineSpec(backend="tensorrt-rtx", gpus=gpu, batches=tuple((size,) * 3 for size in batches))
        for report in engine_from_onnx(model.SerializeToString(), spec).reports:
            fused = "" if report.fused_attention == config.blocks else f" ({report.fused_attention} fused)"
            by_batch.append(f"{report.kernels}{fused}")
    for value in (*model.graph.input, *model.graph.output):  # bytes cannot be counted with a dynamic batch
        value.type.tensor_type.shape.dim[0].dim_value = 1
    del model.graph.value_info[:]
    engine = engine_from_onnx(model.SerializeToString(), EngineSpec(backend="tensorrt-rtx", gpus=gpu))
    report = engine.report
    moved, whole = report.bytes_moved or 0, (half.bytes_moved or 0) if half else 0
    cells = (
        f"{report.kernels}", f"{report.fused_attention} of {config.blocks}", f"{moved / 1e6:.1f} MB",
        f"{moved / whole:.3f}" if whole else "1", f"{(report.constant_bytes or 0) / 1e6:.1f} MB", " / ".join(by_batch),
        f"{engine.seconds:.0f} s",
    )  # fmt: skip
    return " | ".join(cells), report


if __name__ == "__main__":
    sys.exit(main())
