"""Quantisation ranges that a checkpoint brings along: the steps that its layers' inputs, outputs and weights were trained with.

Layers have canonical names, those of Hugging Face files on disk ("encoder.layers.0.blocks.0.intermediate.dense").
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from swin_deploy.config import SwinConfig
from swin_deploy.errors import UsageError

RANGES = "ranges.json"  # where a bundle keeps them
SMALLEST = np.float32(1e-30)  # what stands for the step of a channel whose weights are all 0
PARTS = ("query", "key", "value")
MODULES = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "proj": "attention.output.dense",
    "fc1": "intermediate.dense",
    "fc2": "output.dense",
}


@dataclass(frozen=True)
class ActivationRange:
    """Values are `(code - zero_point) * scale`, codes uint8; 128 is the zero point of symmetric signed codes.

    `amplitude` is the largest magnitude that they were trained to hold, which is what symmetric codes need to cover.
    """

    scale: float
    zero_point: int
    amplitude: float

    @classmethod
    def symmetric(cls, amplitude: float) -> ActivationRange:
        """127 steps on either side of 0."""
        return cls(float(np.float32(amplitude / 127)), 128, float(amplitude))


@dataclass(frozen=True)
class LayerRanges:
    """What is known of a layer. `weight` are steps of INT8 codes, one for all or one for each output channel."""

    input: ActivationRange | None = None
    output: ActivationRange | None = None
    weight: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Ranges:
    """By layer; `source` says where they came from."""

    source: str
    layers: Mapping[str, LayerRanges] = field(default_factory=dict)

    def to_json(self) -> str:
        layers = {name: _described(layer) for name, layer in self.layers.items()}
        lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(layer)}" for name, layer in layers.items())
        return f'{{"source": {json.dumps(self.source)}, "layers": {{\n{lines}\n}}}}\n'

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Ranges:
        return cls(str(values["source"]), {name: _layer(layer) for name, layer in values["layers"].items()})

    def input_of(self, modules: Iterable[str]) -> ActivationRange | None:
        """The range of the tensor that `modules` read: the largest that one of them has."""
        return largest(self.layers[name].input for name in modules if name in self.layers)

    def weight_of(self, layer: str, rows: int, config: SwinConfig) -> NDArray[np.float32] | None:
        """The steps [rows] of the weight of a layer of the graph, by channel; None where a part of it has none."""
        found = [self.layers.get(name, LayerRanges()).weight for name in modules_of(layer)]
        parts = []
        for name, steps in zip(modules_of(layer), found, strict=True):
            if steps is None:
                return None
            part = np.broadcast_to(np.asarray(steps, np.float32), rows // len(found))
            parts.append(np.maximum(part * np.float32(softmax_scale(name, config)), SMALLEST))
        return np.concatenate(parts) if parts else None

    def output_of(self, modules: Iterable[str]) -> ActivationRange | None:
        """The range of what `modules` write: the largest that one of them has."""
        return largest(self.layers[name].output for name in modules if name in self.layers)


def lacking(missing: list[str], source: str) -> UsageError:
    """The error that says what there is no range of, with neither `source` nor samples."""
    return UsageError(
        f"There is no range of {', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''} ({len(missing)} in all) in "
        f"{source or 'the bundle'}, and no samples to measure it on: name images like those of the application with --data."
    )


def largest(ranges: Iterable[ActivationRange | None]) -> ActivationRange | None:
    """The one with the largest amplitude; None where there is none."""
    return max((one for one in ranges if one is not None), key=lambda one: one.amplitude, default=None)


def softmax_scale(module: str, config: SwinConfig) -> float:
    """What the exported graph has multiplied the weight of a module by: Swin V1's query's by 1 / sqrt(head width)."""
    if config.version != 1 or not module.endswith(".query"):
        return 1.0
    stage = int(module.split(".")[2])
    return 1 / math.sqrt(config.width(stage) // config.num_heads[stage])


def modules_of(layer: str) -> tuple[str, ...]:
    """The canonical names of what a layer of the exported graph was made of: three for a joined projection.

    A layer of the graph has its module's name in swin.py ("stages.0.steps.block0.attention.qkv").
    """
    if match := re.fullmatch(r"stages\.(\d+)\.steps\.block(\d+)\.(?:attention\.)?(\w+)", layer):
        block = f"encoder.layers.{match[1]}.blocks.{match[2]}"
        parts = PARTS if match[3] == "qkv" else (match[3],)
        return tuple(f"{block}.{MODULES[part]}" for part in parts if part in MODULES)
    if match := re.fullmatch(r"merges\.(\d+)\.reduction", layer):
        return (f"encoder.layers.{match[1]}.downsample.reduction",)
    return {"classifier": ("classifier",), "decoder": ("decoder.0",)}.get(layer, ())


def _described(layer: LayerRanges) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, one in (("input", layer.input), ("output", layer.output)):
        if one is not None:
            found[name] = {"scale": one.scale, "zero_point": one.zero_point, "amplitude": one.amplitude}
    return found if layer.weight is None else {**found, "weight": list(layer.weight)}


def _layer(values: Mapping[str, Any]) -> LayerRanges:
    input, output = (ActivationRange(**values[name]) if name in values else None for name in ("input", "output"))
    return LayerRanges(input, output, tuple(values["weight"]) if "weight" in values else None)
