"""The quantisers of a state dict -> Ranges: each under the canonical name of the layer that it is of."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from swin_deploy.models.checkpoints.layouts import BLOCK, Layout, canonical_layers
from swin_deploy.models.checkpoints.qat_state import NotUsable, Quantizer, activation_range, quantizer_settings, weight_steps
from swin_deploy.qat_ranges import PARTS, ActivationRange, LayerRanges, Ranges, largest

# What these modules write is what those layers read; torch.ao observes a module's output. Of V1 only, whose norms stand first.
READERS_V1 = (
    (rf"({BLOCK})\.layernorm_before", tuple(rf"\1.attention.self.{part}" for part in PARTS)),
    (rf"({BLOCK})\.layernorm_after", (r"\1.intermediate.dense",)),
    (r"(encoder\.layers\.\d+\.downsample)\.norm", (r"\1.reduction",)),
)
# The activation function of the MLP, and timm's and torchvision's dropout behind it.
READERS = ((rf"({BLOCK})\.(?:intermediate\.intermediate_act_fn|mlp\.(?:act|activation_fn|drop1|1|2))", (r"\1.output.dense",)),)
LAYER = re.compile(
    rf"{BLOCK}\.(attention\.self\.(query|key|value)|attention\.output\.dense|intermediate\.dense|output\.dense)"
    r"|encoder\.layers\.\d+\.downsample\.reduction|classifier|decoder\.0"
)


def ranges_of(layout: Layout, extras: Mapping[str, Any], where: str) -> tuple[Ranges | None, tuple[str, ...]]:
    """The ranges that a checkpoint brings along, None where it has none, and notes on what is kept and what is left out.

    `extras` is what was saved beside the weights. Raises CheckpointError for a range that is none, such as NaN.
    """
    if not layout.quantizers:
        return None, ()
    collector = _Collector(layout, quantizer_settings(extras), where)
    for one in layout.quantizers:
        collector.take(one)
    kept = dict(sorted(collector.layers.items()))
    notes = tuple(
        f"{len(names)} of the checkpoint's quantisation ranges {'is' if len(names) == 1 else 'are'} left out "
        f"({', '.join(names[:2])}{', ...' if len(names) > 2 else ''}): {reason}"
        for reason, names in collector.left_out.items()
    )
    if not kept:
        return None, notes
    inputs, weights = (sum(getattr(one, role) is not None for one in kept.values()) for role in ("input", "weight"))
    return Ranges("checkpoint", kept), (
        f"the checkpoint's own quantisation ranges are kept, of {inputs} inputs and {weights} weights of linear layers",
        *notes,
    )


class _Collector:
    def __init__(self, layout: Layout, settings: Mapping[str, Mapping[str, Any]], where: str) -> None:
        self.layout, self.settings, self.where = layout, settings, where
        self.readers = READERS + (READERS_V1 if not any(n.endswith(".logit_scale") for n in layout.shapes) else ())
        self.layers: dict[str, LayerRanges] = {}
        self.left_out: dict[str, list[str]] = {}

    def take(self, one: Quantizer) -> None:
        """Puts the range of `one` where it belongs, or among what is left out."""
        try:
            self._place(one, self.settings.get(one.name, {}))
        except NotUsable as reason:
            self.left_out.setdefault(str(reason), []).append(one.name)

    def _place(self, one: Quantizer, settings: Mapping[str, Any]) -> None:
        if one.role is None:
            raise NotUsable("their names do not tell which layer's input or weight they are of")
        if not one.tensors.keys() - {"fake_quant_enabled", "observer_enabled", "eps"}:
            return  # of a module that quantises nothing
        names = canonical_layers(one.layer, self.layout.system)
        layers = [name for name in names if LAYER.fullmatch(name) and f"{name}.weight" in self.layout.parts]
        if one.role == "weight":
            if not layers:
                raise NotUsable("they belong to no linear layer, and others are not quantised")
            self._weights(one, settings, layers)
            return
        readers = self._readers(names) if one.role == "output" else []
        if not layers and not readers:
            raise NotUsable("they belong to tensors that are not quantised")
        found = activation_range(one, settings, self.where)
        for name in readers if readers else layers:
            self._add(name, "output" if one.role == "output" and not readers else "input", found)

    def _readers(self, names: tuple[str, ...]) -> list[str]:
        found = []
        for name in names:
            for pattern, readers in self.readers:
                if re.fullmatch(pattern, name):
                    found += [re.sub(pattern, reader, name) for reader in readers]
        return [name for name in found if f"{name}.weight" in self.layout.parts]

    def _weights(self, one: Quantizer, settings: Mapping[str, Any], layers: list[str]) -> None:
        rows = [self.layout.parts[f"{name}.weight"].shape[0] for name in layers]
        steps = weight_steps(one, settings, sum(rows), self.where)
        for place, name in enumerate(layers):
            first = sum(rows[:place])
            part = steps if len(steps) == 1 else steps[first : first + rows[place]]
            before = self.layers.get(name, LayerRanges())
            self.layers[name] = LayerRanges(before.input, before.output, part)

    def _add(self, name: str, role: str, found: ActivationRange) -> None:
        before = self.layers.get(name, LayerRanges())
        input, output = before.input, before.output
        if role == "input":
            input = largest((input, found))
        else:
            output = found
        self.layers[name] = LayerRanges(input, output, before.weight)
