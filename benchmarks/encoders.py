"""Encoders of other models: distance from the models that have them, fp16 graphs, large images, and kernels.

    python benchmarks/encoders.py families              fp32 and fp16 of every family, as a table
    python benchmarks/encoders.py large NETWORK SIZE    time, memory and parity of one export: swin-tiny 800x1333
    python benchmarks/encoders.py kernels [--gpu sm_89] kernels of a Swin-T backbone at 800x1333, beside transformers' export

`families` builds the small models of tests/checkpoints/test_parent_models.py. NETWORK is a variant, `donut`, the Swin-B of
Donut (depths 2, 2, 14, 2, window 10), or `thin`, a network of 8 channels with these windows. Weights are random. Needs the
extras "export", "onnxruntime" and "test", for `kernels` also "tensorrt-rtx", and no network.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
import transformers
from torch import nn

from swin_deploy.bench.baselines import torchscript_export
from swin_deploy.exporters.bundle_from_checkpoint import bundle_from_checkpoint
from swin_deploy.exporters.engines.engine_from_onnx import engine_from_onnx
from swin_deploy.exporters.external_data import embed_weights
from swin_deploy.exporters.onnx_from_torch import onnx_from_torch
from swin_deploy.exporters.precision import typed_from_fp32
from swin_deploy.models.checkpoints import Checkpoint, random_checkpoint
from swin_deploy.models.swin import SwinNetwork
from swin_deploy.option_parsers import image_size
from swin_deploy.options import EngineSpec, ExportSpec, Size
from swin_deploy.parity import compare
from swin_deploy.runtimes.backends import runtime_from_onnx, runtime_to_check
from swin_deploy.runtimes.emulate import emulated
from swin_deploy.tasks import TaskSpec
from swin_deploy.variants import find_variant

TESTS = Path(__file__).parents[1] / "tests/checkpoints"
STAGES = ("stage1", "stage2", "stage3", "stage4")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("families")
    large = commands.add_parser("large")
    large.add_argument("network")
    large.add_argument("size")
    commands.add_parser("kernels").add_argument("--gpu", default="sm_89", help="GPU to compile for")
    given = parser.parse_args(arguments)
    transformers.logging.set_verbosity_error()
    print(", ".join(f"{p} {version(p)}" for p in ("swin-deploy", "torch", "transformers", "onnxruntime")), flush=True)
    if given.command == "families":
        families()
    elif given.command == "large":
        large_export(given.network, given.size)
    else:
        kernels(given.gpu)
    return 0


def families() -> None:
    sys.path[:0] = [str(TESTS), str(TESTS.parent)]
    import test_parent_models as tests
    from detector_swin import renamed

    print("| model | outputs | fp32 relative L2, three sizes | fp16 relative L2, worst output |\n|---|--:|--:|--:|")
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, (build, where)) in enumerate(tests.FAMILIES.items()):
            path = Path(folder) / str(number)
            model = tests.randomized(build())
            model.save_pretrained(path)
            encoder = model.get_submodule(where)
            family(name, tests.opened(path), lambda x, encoder=encoder: tests.outputs(encoder(x)), tests)
        for number, (name, (network, prefix, beside, _)) in enumerate(tests.FILES.items()):
            file = Path(folder) / f"{number}.pth"
            weights = tests.randomized(network).state_dict()
            content = {f"{prefix}{n}": t for n, t in (weights if network.unfold else renamed(weights)).items()}
            torch.save(content | {beside: torch.ones(4, 3, 1, 1)}, file)
            maps = lambda x, network=network: {f"feature_maps.{i}": one for i, one in enumerate(network(x))}  # noqa: E731
            family(name, tests.opened(file), maps, tests)


def family(name: str, checkpoint: Checkpoint, expected: Callable[[Any], dict[str, Any]], tests: Any) -> None:
    """Print a row: PyTorch at three sizes, and the fp16 graph with every node rounded to its type."""
    fp32 = tests.worst(checkpoint, expected)
    size = tests.SIZES[1]
    pixels = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = expected(pixels)
    network = SwinNetwork(checkpoint.config, size, checkpoint.tensors, checkpoint.task).eval()
    traced = onnx_from_torch(network, size)
    embed_weights(traced.model, traced.weights)
    typed = typed_from_fp32(traced.model, checkpoint.config, checkpoint.task, "fp16").model
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.onnx"
        onnx.save(emulated(typed), str(path))
        with runtime_from_onnx(path, "onnxruntime") as runtime:
            found = runtime.run({"pixel_values": pixels.numpy()})
    fp16 = max(compare(found[n].astype(np.float32), wanted[n].numpy()).relative_l2 for n in wanted)
    print(f"| {name} | {len(wanted)} | {fp32:.1e} | {fp16:.1e} |", flush=True)


def encoder(network: str, size: Size) -> Checkpoint:
    if network == "thin":  # Donut's windows with few channels, which shows what does not depend on them
        config = replace(find_variant("swin-tiny").config(), embed_dim=8, num_heads=(1, 2, 2, 4), depths=(1, 2, 1, 1))
        config = replace(config, image_size=size, window_size=(10,) * 4, final_norm=False)
        return random_checkpoint(config, TaskSpec("feature-extraction"))
    if network == "donut":
        config = replace(
            find_variant("swin-base").config(), image_size=size, depths=(2, 2, 14, 2), window_size=(10,) * 4, final_norm=False
        )
        return random_checkpoint(config, TaskSpec("feature-extraction"))
    return random_checkpoint(find_variant(network).config(), TaskSpec("backbone", out_features=STAGES))


def large_export(network: str, text: str) -> None:
    size = image_size("size", text)
    checkpoint = encoder(network, size)
    with tempfile.TemporaryDirectory() as folder:
        started, path = (time.perf_counter(), time.process_time()), Path(folder) / "b"
        spec = ExportSpec(weights="random", image_sizes=[size], task=checkpoint.task)
        bundle = bundle_from_checkpoint(checkpoint, path, spec, runtime_to_check)
        seconds, cpu = time.perf_counter() - started[0], time.process_time() - started[1]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        held = sum(file.stat().st_size for file in path.rglob("*.onnx*")) / 1e9
        (entry,) = bundle.graphs.values()
    print("| network | size | export, CPU time | peak memory | graph | relative L2 to PyTorch |\n|---|---|--:|--:|--:|--:|")
    print(f"| {network} | {text} | {seconds:.0f} s, {cpu:.0f} s | {peak:.1f} GB | {held:.2f} GB | {entry.relative_l2:.1e} |")


class Maps(nn.Module):
    def __init__(self, backbone: Any) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(self.backbone(pixel_values).feature_maps)


def kernels(gpu: str) -> None:
    size, task = (800, 1333), TaskSpec("backbone", out_features=STAGES)
    checkpoint = random_checkpoint(find_variant("swin-tiny").config(), task)
    network = SwinNetwork(checkpoint.config, size, checkpoint.tensors, task).eval()
    traced = onnx_from_torch(network, size)
    embed_weights(traced.model, traced.weights)
    ours = typed_from_fp32(traced.model, checkpoint.config, task, "fp16").model
    for value in (*ours.graph.input, *ours.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    del ours.graph.value_info[:]
    config = transformers.SwinConfig.from_dict(checkpoint.config.to_dict() | {"out_features": list(STAGES)})
    theirs = torchscript_export(Maps(transformers.SwinBackbone(config)), (1, 3, *size), half=True)
    print("| Swin-T backbone, fp16 | nodes | kernels | fused attention | moved | compiled in |\n|---|--:|--:|--:|--:|--:|")
    for title, graph in (("swin-deploy", ours.SerializeToString()), ("transformers", theirs)):
        engine = engine_from_onnx(graph, EngineSpec(backend="tensorrt-rtx", gpus=gpu))
        report, nodes = engine.report, len(onnx.load_from_string(graph).graph.node)
        moved = "-" if report.bytes_moved is None else f"{report.bytes_moved / 1e6:.0f} MB"
        print(
            f"| {title} | {nodes} | {report.kernels} | {report.fused_attention} | {moved} | {engine.seconds:.0f} s |",
            flush=True,
        )


if __name__ == "__main__":
    sys.exit(main())
