"""What is in a bundle, or would become of any ONNX file: the figures of its graphs and engines, ready to be compared."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swin_deploy.bundle import Bundle
from swin_deploy.errors import UsageError
from swin_deploy.exporters.engines.build import layers_file
from swin_deploy.exporters.engines.engine_from_onnx import engine_from_onnx, resolve_backend
from swin_deploy.exporters.engines.targets import target_gpu
from swin_deploy.gpus import cuda_devices
from swin_deploy.specs import Batch, EngineSpec, Progress, no_progress

from .flops import GraphCost, cost_from_onnx
from .roofline import GPUS, GpuPeaks, Roofline, find_gpu, roofline

PRECISION_OF = {"float": "fp32", "float16": "fp16", "bfloat16": "bf16", "int8": "int8", "float8e4m3fn": "fp8"}
TARGET = "sm_89"  # what a foreign file is compiled for where neither a GPU is named nor one is here


@dataclass(frozen=True)
class EngineCost:
    """One optimisation profile of an engine. `figures` are those of its EngineReport, the layers among them."""

    name: str
    precision: str
    image_size: tuple[int, ...]
    gpu: str
    batch: Batch
    figures: Mapping[str, Any]
    roofline: Roofline | None

    @property
    def key(self) -> tuple[Any, ...]:
        """What tells the engines of one bundle apart, but for the compiler's options."""
        return (self.precision, self.gpu, self.batch, self.image_size)

    def matches(self, other: EngineCost) -> bool:
        """Whether the two may be compared; an engine of a foreign file does not tell its image size."""
        sizes = self.image_size == other.image_size or not self.image_size or not other.image_size
        return sizes and self.key[:3] == other.key[:3]

    def bytes_of(self, direction: str) -> int | None:
        """The bytes that all kernels read or write; `direction` is "read" or "written"."""
        parts = [role[f"bytes_{direction}"] for role in self.figures["roles"].values()]
        return None if None in parts else sum(parts)

    def to_dict(self) -> dict[str, Any]:
        """The figures as plain JSON values."""
        return {
            "engine": self.name,
            "precision": self.precision,
            "image_size": list(self.image_size),
            "gpu": self.gpu,
            "roofline": None if self.roofline is None else self.roofline.to_dict(),
            **self.figures,
            "batch": list(self.batch),
        }


@dataclass(frozen=True)
class Inspection:
    """The graphs and engines of a bundle or of one ONNX file."""

    path: Path
    graphs: Mapping[str, GraphCost]
    engines: tuple[EngineCost, ...]

    def to_dict(self) -> dict[str, Any]:
        """The figures as plain JSON values."""
        return {
            "path": str(self.path),
            "graphs": {file: cost.to_dict() for file, cost in self.graphs.items()},
            "engines": [engine.to_dict() for engine in self.engines],
        }


def inspect_bundle(bundle: Bundle, gpu: str | None) -> Inspection:
    """The figures of a bundle. `gpu` names the GPU of the roofline; None is the first known one of each engine's kind."""
    named = None if gpu is None else find_gpu(gpu)
    graphs = {file: cost_from_onnx(bundle.verified_path(file)) for file in bundle.graphs}
    engines = []
    for file, entry in bundle.files.items():
        if not file.endswith(".engine"):
            continue
        layers = bundle.files.get(layers_file(file))
        if layers is not None and layers.get("parent") == entry["sha256"]:
            profiles = bundle.read_json(layers_file(file))["profiles"]
        else:  # a refitted engine has the layers of the one it was made from
            profiles = entry["profiles"]
        flops = graphs[entry["graph"]].flops if entry["graph"] in graphs else None
        for profile in profiles:
            engines.append(_engine(file, entry["precision"], tuple(entry["image_size"]), entry["gpu"], profile, flops, named))
    return Inspection(bundle.path, graphs, tuple(engines))


def inspect_onnx(path: Path, gpu: str | None, batch: int, backend: str, progress: Progress = no_progress) -> Inspection:
    """The figures of any ONNX file, which is compiled for them; the engine is not kept.

    It is compiled for the compute capability of `gpu`; None is the GPU of this machine, else sm_89.
    """
    named = None if gpu is None else find_gpu(gpu)
    chosen = resolve_backend(backend)
    here = chosen == "tensorrt" or bool(cuda_devices())
    target = target_gpu(chosen, named.capability if named is not None else "current" if here else TARGET)
    spec = EngineSpec(backend=chosen, gpus=target, batches=batch, progress=progress)
    cost = cost_from_onnx(path, batch)
    engine = engine_from_onnx(path, spec)
    flops = cost.flops or {}
    precision = PRECISION_OF.get(max(flops, key=lambda kind: flops[kind]), "unknown") if flops else "unknown"
    profile = {"batch": [batch] * 3, **engine.report.to_dict()}
    per_image = None if cost.flops is None else {kind: count / batch for kind, count in cost.flops.items()}
    described = _engine(path.name, precision, (), target, profile, per_image, named)
    return Inspection(path, {path.name: cost}, (described,))


def inspect_path(path: Path, gpu: str | None, batch: int, backend: str, progress: Progress = no_progress) -> Inspection:
    """The figures of the bundle in the folder `path`, or of the ONNX file `path`."""
    there = os.path.isfile(path)  # noqa: PTH113 - Path.is_file raises for a name that is too long
    if path.suffix == ".onnx" or there:
        if not there:
            raise UsageError(f"There is no ONNX file {path}. Expected the file of a graph, or the folder of a bundle.")
        return inspect_onnx(path, gpu, batch, backend, progress)
    bundle = Bundle.open(path)
    if batch != 1:
        raise UsageError(
            f"A batch of {batch} is for ONNX files, which are compiled for it, and the engines of the bundle {path} have their "
            f'own. Leave it out, or make engines with "swin-deploy build-engine --batch {batch}".'
        )
    return inspect_bundle(bundle, gpu)


def _engine(
    name: str,
    precision: str,
    size: tuple[int, ...],
    target: str,
    profile: Mapping[str, Any],
    flops: Mapping[str, float] | None,
    named: GpuPeaks | None,
) -> EngineCost:
    gpu = named or next((row for row in GPUS if row.capability == target), None)
    smallest, tuned, largest = profile["batch"]
    all_flops = None if flops is None else {kind: round(count * tuned) for kind, count in flops.items()}
    fits = gpu is not None and gpu.capability == target
    bound = roofline(gpu, profile["kernels"], profile["bytes_moved"], all_flops) if gpu is not None and fits else None
    return EngineCost(name, precision, size, target, (smallest, tuned, largest), profile, bound)
