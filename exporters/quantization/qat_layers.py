"""Assign QAT ranges, of a checkpoint or of a graph with Q/DQ, to the tensors and layers of an exported graph."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from swin_deploy.config import SwinConfig
from swin_deploy.options import Array
from swin_deploy.qat_ranges import PARTS, ActivationRange, QatRanges, largest, missing_ranges, modules_of

from .qdq import ActivationScale, LinearLayer, QuantizedLinear

if TYPE_CHECKING:
    import onnx


@dataclass(frozen=True)
class QatLayers:
    """QAT ranges by tensor, INT8 scales [outputs] of weights by layer, and where they come from, for the manifest."""

    activations: Mapping[str, ActivationRange] = field(default_factory=dict)
    weights: Mapping[str, Array] = field(default_factory=dict)
    source: str = ""

    def covers(self, layers: Iterable[LinearLayer]) -> bool:
        """Whether no range and no scale of `layers` has to be measured."""
        return all(layer.input in self.activations and layer.name in self.weights for layer in layers)

    def prevents(self, layers: Iterable[LinearLayer], read: set[str], written: set[str]) -> bool:
        """Whether equalizing the columns of the weights `read` or the rows of those `written` would invalidate any range."""
        return any(
            (layer.name in self.weights and layer.weight in read | written)
            or (layer.input in self.activations and layer.weight in read)
            for layer in layers
        )

    def scale(self, tensor: str) -> ActivationScale | None:
        """The scale of a tensor, if it has a range."""
        found = self.activations.get(tensor)
        return None if found is None else ActivationScale(found.scale, found.zero_point)

    def quantized(self, layer: LinearLayer, weight: Array, bias: Array | None, scale: ActivationScale) -> QuantizedLinear:
        """Quantize `layer`, whose weight has a scale, to the nearest INT8 values, of which training uses -128, too."""
        scales = self.weights[layer.name]
        values = np.clip(np.rint(weight / scales[:, None]), -128, 127).astype(np.int8)
        return QuantizedLinear(layer, values, scales, bias, scale)

    def refuse_missing(self, layers: Iterable[LinearLayer]) -> None:
        """Raise UsageError with the names of what `layers` lack, for a run without samples."""
        layers = list(layers)
        missing = [f"the input of {layer.name}" for layer in layers if layer.input not in self.activations]
        missing += [f"the weight of {layer.name}" for layer in layers if layer.name not in self.weights]
        if missing:
            raise missing_ranges(missing, self.source)


def qat_layers(
    ranges: QatRanges, model: onnx.ModelProto, config: SwinConfig, tensors: Mapping[str, Sequence[str]]
) -> QatLayers:
    """Look up the ranges of the layers of `model`, and of their `tensors`: input and output, or query, key and value."""
    weights = {node.name.removesuffix("/Gemm"): node.input[1] for node in model.graph.node if node.op_type == "Gemm"}
    rows = {tensor.name: tensor.dims[0] for tensor in model.graph.initializer if tensor.dims}
    activations: dict[str, ActivationRange] = {}
    scales: dict[str, Array] = {}
    for layer, names in tensors.items():
        modules = modules_of(layer)
        if modules:
            found = [ranges.input_of(modules), ranges.output_of(modules)]
        else:
            found = [ranges.output_of(modules_of(f"{layer}.{part}")) for part in PARTS]
        for tensor, one in zip(names, found, strict=False):
            if one is not None and (one := largest((activations.get(tensor), one))) is not None:
                activations[tensor] = one
        scale = ranges.weight_of(layer, rows[weights[layer]], config) if layer in weights else None
        if scale is not None:
            scales[layer] = scale
    return QatLayers(activations, scales, ranges.source)
