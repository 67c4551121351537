"""The figures of the graphs and engines of a bundle, or of an ONNX file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swin_deploy.bundle import Bundle
from swin_deploy.exporters.engines.build import layers_file
from swin_deploy.exporters.engines.engine_from_onnx import engine_from_onnx, resolve_backend
from swin_deploy.exporters.engines.targets import for_target, target_gpu
from swin_deploy.gpus import cuda_devices
from swin_deploy.manifest import EngineProfile, profiles_from_json
from swin_deploy.options import EngineSpec, InspectSpec

from .flops import GraphCost, cost_from_onnx
from .roofline import GPUS, GpuPeaks, Roofline, find_gpu, roofline_of_profile

PRECISION_OF = {"float": "fp32", "float16": "fp16", "bfloat16": "bf16", "int8": "int8", "float8e4m3fn": "fp8"}
TARGET = "sm_89"  # what an ONNX file is compiled for if no GPU is named and this machine has none


@dataclass(frozen=True)
class EngineCost:
    """One optimization profile of an engine; `figures` are those of its EngineReport, with the layers."""

    name: str
    precision: str
    image_size: tuple[int, ...]
    gpu: str
    batch: tuple[int, ...]
    figures: EngineProfile
    roofline: Roofline | None

    @property
    def key(self) -> tuple[Any, ...]:
        """Identifies an engine in its bundle, apart from compiler options."""
        return (self.precision, self.gpu, self.batch, self.image_size)

    def matches(self, other: EngineCost) -> bool:
        """Whether two engines can be compared; the image size of an ONNX file is unknown."""
        sizes = self.image_size == other.image_size or not self.image_size or not other.image_size
        return sizes and self.key[:3] == other.key[:3]

    def bytes_of(self, direction: str) -> int | None:
        """Return the bytes that all kernels move; `direction` is "read" or "written"."""
        parts = [getattr(role, f"bytes_{direction}") for role in self.figures.roles.values()]
        return None if None in parts else sum(parts)

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as JSON values."""
        bound = None if self.roofline is None else self.roofline.to_dict()
        values = {"engine": self.name, **vars(self), "roofline": bound, **self.figures.to_dict()}
        del values["name"], values["figures"]
        return values


@dataclass(frozen=True)
class Inspection:
    """The graphs and engines of a bundle or of one ONNX file."""

    path: Path
    graphs: Mapping[str, GraphCost]
    engines: tuple[EngineCost, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as JSON values."""
        return {
            "path": str(self.path),
            "graphs": {file: cost.to_dict() for file, cost in self.graphs.items()},
            "engines": [engine.to_dict() for engine in self.engines],
        }

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values, for `from_json`."""
        engines = [
            {**vars(one), "figures": one.figures.to_dict(), "roofline": one.roofline and vars(one.roofline)}
            for one in self.engines
        ]
        return {"path": str(self.path), "graphs": {file: vars(cost) for file, cost in self.graphs.items()}, "engines": engines}

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Inspection:
        """Return the value from its fields as JSON values."""
        graphs = {file: GraphCost(**cost) for file, cost in raw["graphs"].items()}
        engines = tuple(
            EngineCost(
                **{
                    **one,
                    "image_size": tuple(one["image_size"]),
                    "batch": tuple(one["batch"]),
                    "figures": EngineProfile.read(one["figures"]),
                    "roofline": None if one["roofline"] is None else Roofline(**one["roofline"]),
                }
            )
            for one in raw["engines"]
        )
        return cls(Path(raw["path"]), graphs, engines)


def inspect_bundle(bundle: Bundle, gpu: str | None) -> Inspection:
    """Describe a bundle. `gpu` names the GPU of the roofline; None is the first known one with the engine's capability."""
    named = None if gpu is None else find_gpu(gpu)
    graphs = {file: cost_from_onnx(bundle.verified_path(file)) for file in bundle.graphs}
    engines = []
    for file, entry in bundle.engines.items():
        profiles = entry.profiles
        layers = bundle.files.get(layers_file(file))
        if layers is not None and layers.parent == entry.sha256:  # a refitted engine has the layers of the original
            profiles = profiles_from_json(bundle.read_json(layers_file(file)), bundle.place(layers_file(file)))
        flops = graphs[entry.graph].flops_per_image if entry.graph in graphs else None
        for profile in profiles:
            bound = _bound(entry.gpu, named, profile, flops)
            engines.append(EngineCost(file, entry.precision, entry.image_size, entry.gpu, profile.batch, profile, bound))
    return Inspection(bundle.path, graphs, tuple(engines))


def inspect_onnx(path: Path, spec: InspectSpec) -> Inspection:
    """Describe an ONNX file, and compile it for the named GPU, or the GPU of this machine, or sm_89."""
    named = None if spec.gpu is None else find_gpu(spec.gpu)
    chosen, batch = resolve_backend(spec.backend), spec.batch
    here = chosen == "tensorrt" or bool(cuda_devices())
    target = target_gpu(chosen, named.capability if named is not None else "current" if here else TARGET)
    cost = cost_from_onnx(path, batch)
    batch = cost.batch  # that of the graph, if it is fixed
    engine = engine_from_onnx(path, for_target(EngineSpec(batches=batch, progress=spec.progress), chosen, target))
    flops = cost.flops or {}
    precision = PRECISION_OF.get(max(flops, key=flops.__getitem__, default=""), "unknown")
    profile = EngineProfile.read({"batch": [batch] * 3, **engine.report.to_dict()})
    bound = _bound(target, named, profile, cost.flops_per_image)
    described = EngineCost(path.name, precision, (), target, (batch,) * 3, profile, bound)
    return Inspection(path, {path.name: cost}, (described,))


def _bound(target: str, named: GpuPeaks | None, profile: EngineProfile, flops: Mapping[str, float] | None) -> Roofline | None:
    """Return the roofline on the GPU that was named, or on the first known one; None if it does not fit `target`."""
    gpu = next((row for row in ((named,) if named else GPUS) if row.capability == target), None)
    if gpu is None or flops is None:
        return None
    return roofline_of_profile(gpu, profile, flops)
