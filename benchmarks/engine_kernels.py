"""Compare our fp16 graphs with other exports of the same networks in TensorRT for RTX: kernels and bytes.

    python benchmarks/engine_kernels.py [--variants swin-tiny,swinv2-tiny] [--gpu sm_89]

Prints a table. Engines are compiled and not run, so no GPU is needed. The figures are read from the compiler's description of
each engine: its kernels, how many are fused attention, and the bytes that they read and write. Weights are random; no figure
depends on them. Needs the extras "export", "tensorrt-rtx" and "test", and no network. timm and torchvision are included if they
are installed and fit the installed torch.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version

import onnx
import torch
import transformers

from swin_deploy.bench.baselines import logits_network, torchscript_export
from swin_deploy.exporters.engines.engine_from_onnx import Engine, engine_from_onnx
from swin_deploy.exporters.external_data import embed_weights
from swin_deploy.exporters.onnx_from_torch import onnx_from_torch
from swin_deploy.exporters.precision import typed_from_fp32
from swin_deploy.models.checkpoints import random_checkpoint
from swin_deploy.models.swin import SwinNetwork
from swin_deploy.options import EngineSpec
from swin_deploy.tasks import TaskSpec
from swin_deploy.variants import Variant, find_variant

HEADER = (
    "| variant | graph | nodes | kernels | fused attention | moved | of that, activations | compiled in |\n"
    "|---|---|--:|--:|--:|--:|--:|--:|"
)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--variants", default="swin-tiny,swinv2-tiny", help="names, separated by commas")
    parser.add_argument("--gpu", default="sm_89", help="GPU to compile for")
    given = parser.parse_args(arguments)
    transformers.logging.set_verbosity_error()
    print(", ".join(f"{p} {version(p)}" for p in ("swin-deploy", "torch", "transformers", "tensorrt-rtx")))
    print(HEADER, flush=True)
    for name in given.variants.split(","):
        variant = find_variant(name)
        for title, make in (("swin-deploy", ours), *baselines()):
            graph = make(variant)
            engine = engine_from_onnx(graph.SerializeToString(), EngineSpec(backend="tensorrt-rtx", gpus=given.gpu))
            print(row(variant, title, graph, engine), flush=True)
    return 0


def row(variant: Variant, title: str, graph: onnx.ModelProto, engine: Engine) -> str:
    report = engine.report
    figures = (
        f"{len(graph.graph.node)}", f"{report.kernels}", f"{report.fused_attention}", megabytes(report.bytes_moved),
        megabytes(report.activation_bytes), f"{engine.seconds:.0f} s",
    )  # fmt: skip
    return f"| {variant.name} | {title} | {' | '.join(figures)} |"


def megabytes(count: int | None) -> str:
    return "not known" if count is None else f"{count / 1e6:.0f} MB"


def baselines() -> Iterator[tuple[str, Callable[[Variant], onnx.ModelProto]]]:
    """Yield the name and version of each baseline, and a function that exports a variant."""
    for name, network in {"transformers": of_transformers, "timm": of_timm, "torchvision": of_torchvision}.items():
        try:
            importlib.import_module(name)
        except (ImportError, RuntimeError):  # RuntimeError: built for another torch
            continue
        yield f"{name} {version(name)}", lambda variant, network=network: theirs(network(variant), variant.image_size)


def ours(variant: Variant) -> onnx.ModelProto:
    """Export a variant to fp16 for one image: bytes cannot be counted with a dynamic batch."""
    config, task = variant.config(), TaskSpec()
    network = SwinNetwork(config, config.image_size, random_checkpoint(config, task).tensors, task).eval()
    traced = onnx_from_torch(network, config.image_size)
    embed_weights(traced.model, traced.weights)
    model = typed_from_fp32(traced.model, config, task, "fp16").model
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    del model.graph.value_info[:]
    return model


def of_transformers(variant: Variant) -> torch.nn.Module:
    kind = transformers.SwinForImageClassification if variant.version == 1 else transformers.Swinv2ForImageClassification
    return logits_network(kind(kind.config_class.from_dict(variant.config().to_dict())))


def of_timm(variant: Variant) -> torch.nn.Module:
    network: torch.nn.Module = importlib.import_module("timm").create_model(variant.timm_name.split(".")[0])
    return network


def of_torchvision(variant: Variant) -> torch.nn.Module:
    """Build the variant in torchvision, whose windows are 7 (V1) and 8 (V2)."""
    letter = {(2, 2, 6, 2): "t", (2, 2, 18, 2): "s" if variant.embed_dim == 96 else "b"}[variant.depths]
    models = importlib.import_module("torchvision").models
    network: torch.nn.Module = getattr(models, f"swin_{'v2_' if variant.version == 2 else ''}{letter}")()
    return network


def theirs(network: torch.nn.Module, image_size: int) -> onnx.ModelProto:
    """Export a network in fp16 for one image with the TorchScript exporter of torch."""
    return onnx.load_from_string(torchscript_export(network, (1, 3, image_size, image_size), half=True))


if __name__ == "__main__":
    sys.exit(main())
