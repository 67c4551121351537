"""Distance of logits and stage features of typed graphs from fp32 PyTorch, with every node rounded to its type.

    python benchmarks/typed_parity.py [--variants swin-tiny,swinv2-tiny]

Detectors and segmenters read stage features, which unlike logits are not smoothed by averaging over tokens. Each graph runs
in ONNX Runtime with emulated types (runtimes/emulate.py) and in PyTorch with the types of the graph (runtimes/pytorch.py).
The weights are those of parity.py. Needs the extras "export", "onnxruntime" and "test", and no network.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx
import torch
from parity import CHECKPOINT, Cases, reference

from swin_deploy.exporters.external_data import embed_weights
from swin_deploy.exporters.onnx_from_torch import onnx_from_torch
from swin_deploy.exporters.precision import typed_from_fp32
from swin_deploy.models.checkpoints import checkpoint_from_path
from swin_deploy.models.swin import SwinNetwork
from swin_deploy.parity import compare
from swin_deploy.runtimes.backends import runtime_from_onnx
from swin_deploy.runtimes.emulate import emulated
from swin_deploy.tasks import TaskSpec, stage_names
from swin_deploy.variants import Variant, find_variant

IMAGES = Cases(seeds=1, batches=(2,))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--variants", default="swin-tiny,swinv2-tiny", help="names, separated by commas")
    given = parser.parse_args(arguments)
    print(", ".join(f"{p} {version(p)}" for p in ("swin-deploy", "torch", "transformers", "onnxruntime")))
    print(
        "\n| variant | precision | runtime | logits | stem | stage 1 | stage 2 | stage 3 | stage 4 |\n|---|---|---|"
        + "--:|" * 6
    )
    for name in given.variants.split(","):
        variant = find_variant(name)
        with tempfile.TemporaryDirectory(prefix="swin-typed-") as folder:
            reference(variant, Path(folder), IMAGES, torch.get_num_threads())
            graphs = [both(variant, Path(folder), task) for task in tasks(variant)]
        for precision in ("fp16", "bf16"):
            for where in ("ONNX Runtime, emulated", "PyTorch"):
                cells = [f"{value:.1e}" for found in graphs for value in found[precision, where]]
                print(f"| {variant.name} | {precision} | {where} | {' | '.join(cells)} |", flush=True)
    return 0


def tasks(variant: Variant) -> tuple[TaskSpec, ...]:
    return TaskSpec("image-classification"), TaskSpec("backbone", out_features=stage_names(variant.config()))


def both(variant: Variant, folder: Path, task: TaskSpec) -> dict[tuple[str, str], list[float]]:
    """Return the relative L2 distance of every output from fp32 PyTorch, by precision and runtime."""
    checkpoint = checkpoint_from_path(folder / CHECKPOINT, task)
    config = checkpoint.config
    network = SwinNetwork(config, config.image_size, checkpoint.tensors, task).eval()
    (pixels,) = IMAGES.images(variant)
    with torch.no_grad():
        wanted = {name: output.numpy() for name, output in network.named(torch.from_numpy(pixels)).items()}
    traced = onnx_from_torch(network, config.image_size)
    embed_weights(traced.model, traced.weights)
    result = {}
    for precision in ("fp16", "bf16"):
        model = typed_from_fp32(traced.model, config, task, precision).model
        for where, backend, graph in (
            ("ONNX Runtime, emulated", "onnxruntime", emulated(model)),
            ("PyTorch", "torch", model),
        ):
            path = folder / f"{backend}.onnx"
            onnx.save(graph, str(path))
            with runtime_from_onnx(path, backend) as runtime:
                found = runtime.run({"pixel_values": pixels})
            flat = {
                name: (found[name].reshape(len(pixels), -1), array.reshape(len(pixels), -1)) for name, array in wanted.items()
            }
            result[precision, where] = [compare(a.astype(np.float32), b).relative_l2 for a, b in flat.values()]
    return result


if __name__ == "__main__":
    sys.exit(main())
