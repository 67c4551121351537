"""What quantisation-aware training leaves in a state dict beside the weights: fake-quant modules, observers, quantisers.

torch.ao                LAYER.weight_fake_quant.scale      LAYER.activation_post_process.scale (of what LAYER writes)
                        LAYER.quant.activation_post_process.scale beside LAYER.module.weight: a QuantWrapper's input
pytorch-quantization    LAYER._weight_quantizer._amax      LAYER._input_quantizer._amax
NVIDIA ModelOpt         LAYER.weight_quantizer._amax       LAYER.input_quantizer._amax
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from swin_deploy.errors import CheckpointError
from swin_deploy.models.checkpoints.stored import FLOATING, Stored
from swin_deploy.qat_ranges import ActivationRange
from swin_deploy.specs import Array

ENTRY = re.compile(
    r"""(?:(?P<layer>.+?)\.)??
    (?P<what>weight_fake_quant | (?:quant\.)?activation_post_process(?:_\d+)? | _?\w+_quantizer)
    \.(?:activation_post_process\.)?(?P<field>[\w.]+)""",
    re.VERBOSE,
)
NEEDED = ("scale", "zero_point", "fake_quant_enabled", "min_val", "max_val", "_amax", "_pre_quant_scale")
ROLES = {"weight_fake_quant": "weight", "activation_post_process": "output", "quant.activation_post_process": "input"}
ROLES |= {f"{sign}{role}_quantizer": role for sign in ("", "_") for role in ("input", "output", "weight")}
FEWEST = 40  # steps from end to end; 5 bits have 31
CODES = ((0, 255), (-128, 127), (0, 127), (-64, 63))  # of torch.ao's types, and these with reduce_range


@dataclass
class Quantizer:
    """One module of these kinds: on `layer` (a name in the file), what it is of, and its tensors by name."""

    layer: str
    what: str
    tensors: dict[str, Stored] = field(default_factory=dict)

    @property
    def role(self) -> str | None:
        """Whether it is of the layer's "input", "output" or "weight"; None where its name does not tell."""
        return ROLES.get(self.what)

    @property
    def name(self) -> str:
        return f"{self.layer}.{self.what}" if self.layer else self.what


class NotUsable(Exception):
    """A quantiser whose range is left out, and why."""


def separated(tensors: Mapping[str, Stored]) -> tuple[Mapping[str, Stored], list[Quantizer]]:
    """`tensors` without those of quantisers, and these; names are as if no layer were in a QuantWrapper."""
    found: dict[tuple[str, str], Quantizer] = {}
    weights: dict[str, Stored] = {}
    for name, stored in tensors.items():
        match = ENTRY.fullmatch(name)
        if match is None:
            weights[name] = stored
            continue
        key = (match["layer"] or "", match["what"])
        found.setdefault(key, Quantizer(*key)).tensors[match["field"]] = stored
    wrapped = {one.layer for one in found.values() if one.what == "quant.activation_post_process"}
    for one in found.values():
        one.layer = _unwrapped(one.layer, wrapped)
    return {_unwrapped(name, wrapped): stored for name, stored in weights.items()}, list(found.values())


def _unwrapped(name: str, wrapped: set[str]) -> str:
    for layer in _beginnings(name):
        inside = f"{layer}.module" if layer else "module"
        if layer in wrapped and (name == inside or name.startswith(f"{inside}.")):
            return f"{layer}{name[len(inside) :]}".removeprefix(".")
    return name


def _beginnings(name: str) -> Iterator[str]:
    parts = name.split(".")
    return (".".join(parts[:count]) for count in range(len(parts)))


def activation_range(one: Quantizer, settings: Mapping[str, Any], where: str) -> ActivationRange:
    """The range of an input or output. Raises NotUsable, and CheckpointError for what is no range: NaN, a negative one.

    `settings` is ModelOpt's state of the quantiser, empty where it is not known.
    """
    values = _values(one, settings, where)
    if "_amax" in values:
        amax = _single(values["_amax"])
        if amax == 0:
            raise NotUsable("it never saw a value but 0")
        return ActivationRange(float(np.float32(amax / 255)), 0, amax) if settings.get("_unsigned") else _symmetric(amax)
    seen = [_single(values[name]) for name in ("min_val", "max_val")] if _seen(values) else None
    if "scale" not in values:
        if seen is None:
            raise NotUsable("it never saw a value")
        return _of_interval(min(seen[0], 0.0), max(seen[1], 0.0))
    scale, zero = _single(values["scale"]), round(_single(values.get("zero_point", np.zeros(1))))
    if seen is None and (scale, zero) == (1.0, 0):
        raise NotUsable("it never saw a value")
    return _of_codes(scale, zero, seen)


def weight_steps(one: Quantizer, settings: Mapping[str, Any], rows: int, where: str) -> tuple[float, ...]:
    """The steps of a weight with `rows` output channels, one or one for each. Raises as `activation_range` does."""
    values = _values(one, settings, where)
    if "_amax" in values:
        steps = values["_amax"].astype(np.float32).reshape(-1) / np.float32(127)
    elif "scale" in values:
        steps = values["scale"].reshape(-1)
        if np.any(values.get("zero_point", np.zeros(1)) != 0):
            raise NotUsable("its weight is asymmetric, and weights are quantised symmetrically")
        if _seen(values):
            span = 2 * np.maximum(np.abs(values["min_val"]), np.abs(values["max_val"])).reshape(-1)
            if span.shape == steps.shape and np.median(span / np.maximum(steps, 1e-30)) < FEWEST:
                raise NotUsable("it has fewer than 6 bits")
        elif np.all(steps == 1):
            raise NotUsable("it never saw a value")
    else:
        raise NotUsable("it has no scale")
    if len(steps) not in (1, rows):
        raise NotUsable(f"it has {len(steps)} steps for {rows} output channels")
    return tuple(float(step) for step in steps)


def quantizer_settings(extras: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
    """ModelOpt's settings by quantiser, from what modelopt.torch.opt.save keeps beside the weights; else empty."""
    state = extras.get("modelopt_state")
    found: Mapping[str, Mapping[str, Any]] = {}
    for step in (state.get("modelopt_state_dict") or ()) if isinstance(state, dict) else ():
        try:
            found = step[1]["metadata"].get("quantizer_state", found)
        except (TypeError, KeyError, IndexError, AttributeError):
            continue
    return found if isinstance(found, dict) else {}


def _values(one: Quantizer, settings: Mapping[str, Any], where: str) -> dict[str, Array]:
    """The numbers of a quantiser that is in use; those that never saw a value have infinite extremes."""
    if "_pre_quant_scale" in one.tensors:
        raise CheckpointError(
            f"{where}: {one.name} scales the channels of its layer's input (SmoothQuant or AWQ), so that the weights "
            f"alone are another network. Train and calibrate without that scale, or fold it into the weights, and save again."
        )
    if settings.get("_disabled"):
        raise NotUsable("it is switched off")
    bits = settings.get("_num_bits", 8)
    if bits != 8 and tuple(bits if isinstance(bits, list | tuple) else ()) != (4, 3):
        raise NotUsable(f"it has {bits} bits, and ranges of 8 are taken")
    if settings.get("_block_sizes") or settings.get("_dynamic"):
        raise NotUsable("its steps are by block or found while running")
    values = {}
    for name in NEEDED:
        stored = one.tensors.get(name)
        if stored is None or not np.prod(stored.shape):
            continue
        tensor = stored.read()
        floating = stored.dtype in FLOATING
        values[name] = (
            tensor.to(torch.float64 if stored.dtype == "float64" else torch.float32) if floating else tensor
        ).numpy()
    if "fake_quant_enabled" in values and not values["fake_quant_enabled"].any():
        raise NotUsable("its fake quantisation is switched off")
    for name in ("scale", "_amax"):
        if name in values and not (np.isfinite(values[name]).all() and (values[name] >= 0).all()):
            raise CheckpointError(
                f"{where}: {one.name}.{name} holds NaN, infinity or a negative number, which is no quantisation range. "
                f"The file is damaged, or its training diverged."
            )
    return values


def _seen(values: Mapping[str, Array]) -> bool:
    extremes = [values.get("min_val"), values.get("max_val")]
    return all(extreme is not None and np.isfinite(extreme).all() for extreme in extremes)


def _single(values: Array) -> float:
    if values.size != 1:
        raise NotUsable(f"it has {values.size} ranges for one activation, and one for the whole tensor is taken")
    return float(values.reshape(-1)[0])


def _symmetric(amplitude: float) -> ActivationRange:
    return ActivationRange.symmetric(amplitude)


def _of_interval(low: float, high: float) -> ActivationRange:
    """All 256 codes from `low` to `high`, as an observer's module would be quantised; 0 is among them."""
    if low == high:
        raise NotUsable("it never saw a value but 0")
    scale = float(np.float32((high - low) / 255))
    return ActivationRange(scale, min(max(round(-low / scale), 0), 255), max(-low, high))


def _of_codes(scale: float, zero: int, seen: list[float] | None) -> ActivationRange:
    """The range of torch.ao's scale and zero point, whose type the file does not tell: that which fits what was `seen`."""
    if scale == 0:
        raise NotUsable("its scale is 0")
    legal = [codes for codes in CODES if codes[0] <= zero <= codes[1]]
    if not legal:
        raise NotUsable(f"its zero point is {zero}, which 8 bits do not hold")
    lowest, highest = legal[0] if zero > 0 else next(codes for codes in legal if codes[0] < 0)
    if seen is not None:
        low, high = min(seen[0], 0.0), max(seen[1], 0.0)
        most = max(-low, high)
        if 2 * most / scale < FEWEST:
            raise NotUsable("it has fewer than 6 bits")

        def distance(codes: tuple[int, int]) -> float:
            ends = [(code - zero) * scale for code in codes]
            return min(max(abs(ends[0] - a), abs(ends[1] - b)) for a, b in ((low, high), (-most, most)))

        lowest, highest = min(legal, key=distance)
    middle = 2 * zero == lowest + highest + 1
    amplitude = (highest - zero if middle else max(zero - lowest, highest - zero)) * scale
    return ActivationRange(scale, zero + (0 if lowest == 0 else 128), amplitude)
