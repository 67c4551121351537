"""QAT ranges: the quantization ranges of inputs, outputs and weights with which a checkpoint was trained.

Layers have canonical names, those of Hugging Face files on disk ("encoder.layers.0.blocks.0.intermediate.dense").
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from swin_deploy.config import SwinConfig
from swin_deploy.errors import BundleError, UsageError, shown

RANGES = "ranges.json"  # their file in a bundle
SMALLEST_SCALE = np.float32(1e-30)  # of a channel whose weights are all 0
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
    """Values are `(quantized - zero_point) * scale`, uint8; symmetric signed INT8 has the zero point 128 here.

    `amplitude` is amax, the largest magnitude of the trained range, which symmetric values need to cover.
    """

    scale: float
    zero_point: int
    amplitude: float

    @classmethod
    def symmetric(cls, amplitude: float) -> ActivationRange:
        """Return the symmetric INT8 range with this amax."""
        return cls(float(np.float32(amplitude / 127)), 128, float(amplitude))


@dataclass(frozen=True)
class LayerRanges:
    """The ranges of a layer. `weight` are INT8 scales, one for all or one for each output channel."""

    input: ActivationRange | None = None
    output: ActivationRange | None = None
    weight: tuple[float, ...] | None = None


@dataclass(frozen=True)
class QatRanges:
    """The ranges of layers, by canonical name; `source` is where they come from."""

    source: str
    layers: Mapping[str, LayerRanges] = field(default_factory=dict)

    def to_json(self) -> str:
        layers = {name: {k: v for k, v in asdict(layer).items() if v is not None} for name, layer in self.layers.items()}
        lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(layer)}" for name, layer in layers.items())
        return f'{{"source": {json.dumps(self.source)}, "layers": {{\n{lines}\n}}}}\n'

    @classmethod
    def from_dict(cls, values: Any) -> QatRanges:
        """Read the content of ranges.json. Raises BundleError if it is invalid."""
        layers = values.get("layers") if isinstance(values, Mapping) else None
        if not isinstance(layers, Mapping):
            raise _invalid("content", values, 'an object with "layers"')
        return cls(str(values.get("source", "")), {name: _layer(name, layer) for name, layer in layers.items()})

    def input_of(self, modules: Iterable[str]) -> ActivationRange | None:
        """Return the range of the tensor that `modules` read: the largest that one of them has."""
        return largest(self.layers[name].input for name in modules if name in self.layers)

    def weight_of(self, layer: str, rows: int, config: SwinConfig) -> NDArray[np.float32] | None:
        """Return the scales [rows] of a graph layer's weight, one a channel; None if a part of it has none."""
        found = {name: self.layers.get(name, LayerRanges()).weight for name in modules_of(layer)}
        if not found or None in found.values():
            return None
        parts = []
        for name, scales in found.items():
            if len(scales or ()) not in (1, rows // len(found)):
                raise _invalid(f"weight of {name}", f"{len(scales or ())} scales", f"one, or {rows // len(found)}")
            part = np.broadcast_to(np.asarray(scales, np.float32), rows // len(found))
            parts.append(np.maximum(part * np.float32(softmax_scale(name, config)), SMALLEST_SCALE))
        return np.concatenate(parts)

    def output_of(self, modules: Iterable[str]) -> ActivationRange | None:
        """Return the range of what `modules` write: the largest that one of them has."""
        return largest(self.layers[name].output for name in modules if name in self.layers)


def missing_ranges(missing: list[str], source: str) -> UsageError:
    """Return the error for ranges that neither `source` has nor samples can give."""
    return UsageError(
        f"{source or 'The bundle'} has no range of {', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''} "
        f"({len(missing)} in all), and there are no samples to measure it on. Pass images like those of the application with "
        f"--data."
    )


def largest(ranges: Iterable[ActivationRange | None]) -> ActivationRange | None:
    """Return the range with the largest amax; None if there is none."""
    return max((one for one in ranges if one is not None), key=lambda one: one.amplitude, default=None)


def softmax_scale(module: str, config: SwinConfig) -> float:
    """Return the factor that the export folded into the weight of a module: 1 / sqrt(head width) for Swin V1's query."""
    if config.version != 1 or not module.endswith(".query"):
        return 1.0
    stage = int(module.split(".")[2])
    return 1 / math.sqrt(config.width(stage) // config.num_heads[stage])


def modules_of(layer: str) -> tuple[str, ...]:
    """Return the canonical names of the modules in a layer of the exported graph: three for a joined projection.

    A layer of the graph has its module's name in swin.py ("stages.0.steps.block0.attention.qkv").
    """
    if match := re.fullmatch(r"stages\.(\d+)\.steps\.block(\d+)\.(?:attention\.)?(\w+)", layer):
        block = f"encoder.layers.{match[1]}.blocks.{match[2]}"
        parts = PARTS if match[3] == "qkv" else (match[3],)
        return tuple(f"{block}.{MODULES[part]}" for part in parts if part in MODULES)
    if match := re.fullmatch(r"merges\.(\d+)\.reduction", layer):
        return (f"encoder.layers.{match[1]}.downsample.reduction",)
    return {"classifier": ("classifier",), "decoder": ("decoder.0",)}.get(layer, ())


def _layer(name: str, values: Any) -> LayerRanges:
    if not isinstance(values, Mapping):
        raise _invalid(name, values, "an object")
    input, output = (_range(f"{part} of {name}", values.get(part)) for part in ("input", "output"))
    weight = values.get("weight")
    if weight is None:
        return LayerRanges(input, output)
    if not isinstance(weight, list) or not weight or not all(map(_is_amount, weight)):
        raise _invalid(f"weight of {name}", weight, "a list of numbers of at least 0")
    return LayerRanges(input, output, tuple(map(float, weight)))


def _range(name: str, values: Any) -> ActivationRange | None:
    if values is None:
        return None
    given = values if isinstance(values, Mapping) else {}
    zero_point = given.get("zero_point")
    if type(zero_point) is int and 0 <= zero_point <= 255 and all(_is_amount(given.get(key)) for key in ("scale", "amplitude")):
        return ActivationRange(float(given["scale"]), zero_point, float(given["amplitude"]))
    raise _invalid(name, values, "a scale and an amplitude of at least 0, and a zero_point from 0 to 255")


def _is_amount(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e38


def _invalid(name: str, value: object, expected: str) -> BundleError:
    return BundleError(f"{RANGES}: Invalid {shown(name)}: {shown(value)}. Expected {expected}. Export the bundle again.")
