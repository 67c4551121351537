"""Reads the QAT ranges that quantization-aware training leaves in a state dict, and assigns them to canonical layers.

torch.ao                LAYER.weight_fake_quant.scale      LAYER.activation_post_process.scale (the output of LAYER)
                        LAYER.quant.activation_post_process.scale beside LAYER.module.weight: the input of a QuantWrapper
pytorch-quantization    LAYER._weight_quantizer._amax      LAYER._input_quantizer._amax
NVIDIA ModelOpt         LAYER.weight_quantizer._amax       LAYER.input_quantizer._amax
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from swin_deploy.errors import CheckpointError
from swin_deploy.options import Array
from swin_deploy.qat_ranges import PARTS, ActivationRange, LayerRanges, QatRanges, largest

from .base import FLOATING
from .state_dict_names import BLOCK, CanonicalStateDict, QuantizerState

NEEDED = ("scale", "zero_point", "fake_quant_enabled", "min_val", "max_val", "_amax", "_pre_quant_scale")
FEWEST_STEPS = 40  # in the whole range; 5 bits have 31
LARGEST = 1 << 20  # numbers in a tensor of a quantizer
SMALLEST, HIGHEST = 1e-30, 3e38  # of scales and ranges in float32
INTEGERS = ((0, 255), (-128, 127), (0, 127), (-64, 63))  # the types of torch.ao, without and with reduce_range

# torch.ao observes the output of a module. These modules feed those layers; the norms only in V1, where they come first.
READERS_V1 = (
    (rf"({BLOCK})\.layernorm_before", tuple(rf"\1.attention.self.{part}" for part in PARTS)),
    (rf"({BLOCK})\.layernorm_after", (r"\1.intermediate.dense",)),
    (r"(encoder\.layers\.\d+\.downsample)\.norm", (r"\1.reduction",)),
)
# The activation function of the MLP, and the dropout that timm and torchvision have after it.
READERS = ((rf"({BLOCK})\.(?:intermediate\.intermediate_act_fn|mlp\.(?:act|activation_fn|drop1|1|2))", (r"\1.output.dense",)),)
LAYER = re.compile(
    rf"{BLOCK}\.(attention\.self\.(query|key|value)|attention\.output\.dense|intermediate\.dense|output\.dense)"
    r"|encoder\.layers\.\d+\.downsample\.reduction|classifier|decoder\.0"
)


def qat_ranges_from_state(
    state_dict: CanonicalStateDict, extras: Mapping[str, Any], where: str
) -> tuple[QatRanges | None, tuple[str, ...]]:
    """Read the QAT ranges of a checkpoint, None if no quantizer can be used, with notes on what is used and what is not.

    `extras`, saved beside the weights, hold the settings of ModelOpt's quantizers.
    """
    collector = _Collector(state_dict, quantizer_settings(extras), where)
    for quantizer in state_dict.quantizers:
        collector.add(quantizer)
    kept = dict(sorted(collector.layers.items()))
    notes = tuple(
        f"{len(names)} QAT {'range' if len(names) == 1 else 'ranges'} of the checkpoint {'is' if len(names) == 1 else 'are'} "
        f"not used ({', '.join(names[:2])}{', ...' if len(names) > 2 else ''}): {reason}"
        for reason, names in collector.unused.items()
    )
    if not kept:
        return None, notes
    inputs, weights = (sum(getattr(one, role) is not None for one in kept.values()) for role in ("input", "weight"))
    return QatRanges("checkpoint", kept), (
        f"the QAT ranges of the checkpoint are used, of {inputs} inputs and {weights} weights of linear layers",
        *notes,
    )


class NotUsable(Exception):
    """The range of a quantizer is not used; the message is the reason."""


class _Collector:
    def __init__(self, state_dict: CanonicalStateDict, settings: Mapping[str, Mapping[str, Any]], where: str) -> None:
        self.state_dict, self.settings, self.where = state_dict, settings, where
        self.readers = READERS + (READERS_V1 if not any(n.endswith(".logit_scale") for n in state_dict.tensors) else ())
        self.layers: dict[str, LayerRanges] = {}
        self.unused: dict[str, list[str]] = {}  # reason -> quantizers

    def add(self, quantizer: QuantizerState) -> None:
        try:
            self._assign(quantizer, self.settings.get(quantizer.name, {}))
        except NotUsable as reason:
            self.unused.setdefault(str(reason), []).append(quantizer.name)

    def _assign(self, quantizer: QuantizerState, settings: Mapping[str, Any]) -> None:
        if quantizer.role is None:
            raise NotUsable("their names do not identify a layer's input or weight")
        if not quantizer.tensors.keys() - {"fake_quant_enabled", "observer_enabled", "eps"}:
            return  # of a module that quantizes nothing
        names = self.state_dict.layers(quantizer.layer)
        layers = [name for name in names if LAYER.fullmatch(name) and self._has(name)]
        if quantizer.role == "weight":
            if not layers:
                raise NotUsable("only linear layers are quantized")
            self._add_weights(quantizer, settings, layers)
            return
        readers = self._readers(names) if quantizer.role == "output" else []
        if not layers and not readers:
            raise NotUsable("these tensors are not quantized")
        found = activation_range(quantizer, settings, self.where)
        for name in readers or layers:
            before = self.layers.get(name, LayerRanges())
            own = quantizer.role == "output" and not readers
            self.layers[name] = replace(before, **({"output": found} if own else {"input": largest((before.input, found))}))

    def _has(self, layer: str) -> bool:
        return f"{layer}.weight" in self.state_dict.tensors

    def _readers(self, names: tuple[str, ...]) -> list[str]:
        found = [
            re.sub(pattern, reader, name)
            for name in names
            for pattern, readers in self.readers
            if re.fullmatch(pattern, name)
            for reader in readers
        ]
        return [name for name in found if self._has(name)]

    def _add_weights(self, quantizer: QuantizerState, settings: Mapping[str, Any], layers: list[str]) -> None:
        rows = [(*self.state_dict.tensors[f"{name}.weight"].shape, 0)[0] for name in layers]
        scales = weight_scales(quantizer, settings, sum(rows), self.where)
        for place, name in enumerate(layers):
            first = sum(rows[:place])
            part = scales if len(scales) == 1 else scales[first : first + rows[place]]
            self.layers[name] = replace(self.layers.get(name, LayerRanges()), weight=part)


def activation_range(quantizer: QuantizerState, settings: Mapping[str, Any], where: str) -> ActivationRange:
    """Return the range of an input or output. `settings` are those of ModelOpt, if any. Raises NotUsable or CheckpointError."""
    values = _values(quantizer, settings, where)
    if "_amax" in values:
        amax = _single(values["_amax"])
        if amax < SMALLEST:
            raise NotUsable("it never saw a value but 0")
        unsigned = ActivationRange(float(np.float32(amax / 255)), 0, amax)
        return unsigned if settings.get("_unsigned") else ActivationRange.symmetric(amax)
    seen = [_single(values[name]) for name in ("min_val", "max_val")] if _seen(values) else None
    if "scale" not in values:
        if seen is None:
            raise NotUsable("it never saw a value")
        return _from_interval(min(seen[0], 0.0), max(seen[1], 0.0))
    scale, zero = _single(values["scale"]), round(_single(values.get("zero_point", np.zeros(1))))
    if seen is None and (scale, zero) == (1.0, 0):
        raise NotUsable("it never saw a value")
    return _from_scale(scale, zero, seen)


def weight_scales(quantizer: QuantizerState, settings: Mapping[str, Any], rows: int, where: str) -> tuple[float, ...]:
    """Return the scale of a weight with `rows` output channels, or one per channel. Raises as `activation_range` does."""
    values = _values(quantizer, settings, where)
    if "_amax" in values:
        scales = values["_amax"].astype(np.float32).reshape(-1) / np.float32(127)
    elif "scale" in values:
        scales = values["scale"].reshape(-1)
        if np.any(values.get("zero_point", np.zeros(1)) != 0):
            raise NotUsable("its weight is asymmetric, and only symmetric weights are supported")
        if _seen(values):
            span = 2 * np.maximum(np.abs(values["min_val"]), np.abs(values["max_val"])).reshape(-1)
            if span.shape == scales.shape and np.median(span / np.maximum(scales, 1e-30)) < FEWEST_STEPS:
                raise NotUsable("it has fewer than 6 bits")
        elif np.all(scales == 1):
            raise NotUsable("it never saw a value")
    else:
        raise NotUsable("it has no scale")
    if len(scales) not in (1, rows):
        raise NotUsable(f"it has {len(scales)} scales for {rows} output channels")
    return tuple(float(scale) for scale in scales)


def quantizer_settings(extras: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
    """Return the settings of ModelOpt's quantizers by name, as modelopt.torch.opt.save stores them; empty without ModelOpt."""
    state = extras.get("modelopt_state")
    found: Mapping[str, Mapping[str, Any]] = {}
    for step in (state.get("modelopt_state_dict") or ()) if isinstance(state, dict) else ():
        try:
            found = step[1]["metadata"].get("quantizer_state", found)
        except (TypeError, KeyError, IndexError, AttributeError):
            continue
    return found if isinstance(found, dict) else {}


def _values(quantizer: QuantizerState, settings: Mapping[str, Any], where: str) -> dict[str, Array]:
    """The tensors of an enabled quantizer. An observer that never saw a value has infinite extremes."""
    if "_pre_quant_scale" in quantizer.tensors:
        raise CheckpointError(
            f"{where}: {quantizer.name} scales the channels of its layer's input (SmoothQuant or AWQ), so the weights alone "
            f"are another network. Train and calibrate without that scale, or fold it into the weights, and save again."
        )
    if settings.get("_disabled"):
        raise NotUsable("it is disabled")
    bits = settings.get("_num_bits", 8)
    if bits != 8 and tuple(bits if isinstance(bits, list | tuple) else ()) != (4, 3):
        raise NotUsable(f"it has {bits} bits, and only 8 are supported")
    if settings.get("_block_sizes") or settings.get("_dynamic"):
        raise NotUsable("its scales are per block or dynamic")
    values = {}
    for name in NEEDED:
        stored = quantizer.tensors.get(name)
        if stored is None or not math.prod(stored.shape):
            continue
        if math.prod(stored.shape) > LARGEST or not (stored.dtype in FLOATING or re.fullmatch(r"u?int\d+|bool", stored.dtype)):
            raise NotUsable(f"its {name} has shape {list(stored.shape)} and type {stored.dtype}")
        exact = stored.dtype not in FLOATING or stored.dtype == "float64"
        values[name] = stored.read().to(torch.float64 if exact else torch.float32).numpy()
    if "fake_quant_enabled" in values and not values["fake_quant_enabled"].any():
        raise NotUsable("its fake quantization is disabled")
    for name, least in (("scale", 0), ("_amax", 0), ("zero_point", -HIGHEST)):
        if name in values and not ((values[name] >= least) & (values[name] <= HIGHEST)).all():
            raise CheckpointError(
                f"{where}: {quantizer.name}.{name} holds NaN, infinity or a negative number. Expected a quantization range. "
                f"The file is damaged, or its training diverged."
            )
    return values


def _seen(values: Mapping[str, Array]) -> bool:
    extremes = [values.get("min_val"), values.get("max_val")]
    return all(extreme is not None and (np.abs(extreme) <= HIGHEST).all() for extreme in extremes)


def _single(values: Array) -> float:
    if values.size != 1:
        raise NotUsable(f"it has {values.size} ranges for one activation, and only per-tensor ranges are supported")
    return float(values.reshape(-1)[0])


def _from_interval(low: float, high: float) -> ActivationRange:
    """256 quantized values from `low` to `high`, one of them exactly 0, as torch.ao converts an observer."""
    if high - low < SMALLEST:
        raise NotUsable("it never saw a value but 0")
    scale = float(np.float32((high - low) / 255))
    return ActivationRange(scale, min(max(round(-low / scale), 0), 255), max(-low, high))


def _from_scale(scale: float, zero: int, seen: list[float] | None) -> ActivationRange:
    """The range of torch.ao's scale and zero point. The integer type is not stored: take the one that fits what was `seen`."""
    if scale < SMALLEST:
        raise NotUsable("its scale is 0")
    legal = [ends for ends in INTEGERS if ends[0] <= zero <= ends[1]]
    if not legal:
        raise NotUsable(f"its zero point is {zero}, which does not fit into 8 bits")
    lowest, highest = legal[0] if zero > 0 else next(ends for ends in legal if ends[0] < 0)
    if seen is not None:
        low, high = min(seen[0], 0.0), max(seen[1], 0.0)
        most = max(-low, high)
        if 2 * most / scale < FEWEST_STEPS:
            raise NotUsable("it has fewer than 6 bits")

        def distance(integers: tuple[int, int]) -> float:
            ends = [(integer - zero) * scale for integer in integers]
            return min(max(abs(ends[0] - a), abs(ends[1] - b)) for a, b in ((low, high), (-most, most)))

        lowest, highest = min(legal, key=distance)
    middle = 2 * zero == lowest + highest + 1
    amax = (highest - zero if middle else max(zero - lowest, highest - zero)) * scale
    return ActivationRange(scale, zero + (0 if lowest == 0 else 128), amax)
