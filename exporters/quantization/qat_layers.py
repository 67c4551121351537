"""A network's own ranges, of its checkpoint or of a graph with Q/DQ, as an exported graph's tensors and layers have them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from swin_deploy.config import SwinConfig
from swin_deploy.qat_ranges import PARTS, ActivationRange, Ranges, lacking, largest, modules_of
from swin_deploy.specs import Array

from .for_tensorrt import Layer
from .gptq import Grid
from .qdq import TOP, ActivationScale, LinearLayer, QuantizedLinear, linear_layers

if TYPE_CHECKING:
    import onnx


@dataclass(frozen=True)
class OwnLayers:
    """`amplitudes` by tensor and `steps` by layer, as `quantized_from_fp32` takes them; `source` is whose they are."""

    amplitudes: dict[str, float]
    steps: dict[str, NDArray[Any]]
    source: str

    def records(self, layers: Iterable[Layer]) -> list[dict[str, Any]]:
        """For a manifest: where the ranges that each of `layers` needs come from, and the steps of its weight."""
        return [
            {
                "name": layer.name,
                "ranges_from": {name: self.source if name in self.amplitudes else "samples" for name in layer.inputs},
                "weight_from": self.source if layer.name in self.steps else "weights",
            }
            for layer in layers
        ]


def own_layers(
    ranges: Ranges | None, layers: Iterable[Layer], model: onnx.ModelProto, config: SwinConfig, quantization: str
) -> OwnLayers:
    """What `ranges` have of `layers` (those of `quantized_layers`), the layers of `model`, in INT8 or FP8.

    Of Swin V1's attention the steps are not used: its weights are brought to other sizes (passes/balanced_attention.py).
    """
    amplitudes: dict[str, float] = {}
    steps: dict[str, NDArray[Any]] = {}
    if ranges is None:
        return OwnLayers(amplitudes, steps, "")
    weights = {node.name: node.input[1] for node in model.graph.node if node.op_type == "Gemm"}
    rows = {tensor.name: tensor.dims[0] for tensor in model.graph.initializer if tensor.dims}
    for layer in layers:
        for tensor, found in zip(layer.inputs, _of_inputs(ranges, layer), strict=False):
            if found is not None:
                amplitudes[tensor] = found.amplitude
        weight = weights.get(f"{layer.name}/Gemm")
        if weight is None or (config.version == 1 and layer.name.endswith((".qkv", ".proj"))):
            continue
        found_steps = ranges.weight_of(layer.name, rows[weight], config)
        if found_steps is not None:
            steps[layer.name] = found_steps * np.float32(TOP["int8"] / TOP[quantization])
    return OwnLayers(amplitudes, steps, ranges.source)


def _of_inputs(ranges: Ranges, layer: Layer) -> list[ActivationRange | None]:
    """The ranges of the layer's tensors, in their order: what it reads and writes, or what attention's products read."""
    modules = modules_of(layer.name)
    if modules:
        return [ranges.input_of(modules), ranges.output_of(modules)]
    return [ranges.output_of(modules_of(f"{layer.name}.{part}")) for part in PARTS]


LOWEST = -128.0  # of INT8's codes; weights with steps of their own use it, as they did while they were trained


@dataclass(frozen=True)
class Own:
    """By the names of a graph: ranges of tensors that layers read, and steps [outputs] of layers' weights."""

    activations: Mapping[str, ActivationRange] = field(default_factory=dict)
    steps: Mapping[str, Array] = field(default_factory=dict)
    source: str = ""

    def covers(self, layers: Iterable[LinearLayer]) -> bool:
        """Whether nothing of `layers` has to be found."""
        return all(layer.input in self.activations and layer.name in self.steps for layer in layers)

    def origin(self, layer: LinearLayer) -> dict[str, str]:
        """For a manifest: where the layer's range and the steps of its weight come from."""
        return {
            "range_from": self.source if layer.input in self.activations else "samples",
            "weight_from": self.source if layer.name in self.steps else "samples",
        }

    def touches(self, layers: Iterable[LinearLayer], read: set[str], written: set[str]) -> bool:
        """Whether factors for the columns of the weights `read`, or the rows of those `written`, would spoil any of it."""
        for layer in layers:
            if layer.weight in read and (layer.name in self.steps or layer.input in self.activations):
                return True
            if layer.weight in written and layer.name in self.steps:
                return True
        return False

    def scale(self, tensor: str, kind: Grid) -> ActivationScale | None:
        """The scale of a tensor, if it has one of its own."""
        found = self.activations.get(tensor)
        if found is None:
            return None
        if kind.dtype != np.int8:
            return ActivationScale(float(np.float32(found.amplitude / kind.top)))
        return ActivationScale(found.scale, found.zero_point)

    def layer(
        self, layer: LinearLayer, weight: Array, bias: Array | None, scale: ActivationScale, kind: Grid
    ) -> QuantizedLinear:
        """`layer` with the codes that its own steps give its `weight` [outputs, inputs], rounded to nearest."""
        steps = self.steps[layer.name] if kind.dtype == np.int8 else self.steps[layer.name] * np.float32(127 / kind.top)
        values = weight / steps[:, None]
        codes = np.clip(np.rint(values), LOWEST, 127).astype(np.int8) if kind.dtype == np.int8 else kind.codes(values)
        return QuantizedLinear(layer, codes, steps, bias, scale)


def own_of(ranges: Ranges | None, model: onnx.ModelProto, config: SwinConfig) -> Own:
    """What `ranges` have of the linear layers of `model`: for a tensor that several read, the largest."""
    activations: dict[str, ActivationRange] = {}
    steps: dict[str, Array] = {}
    if ranges is None:
        return Own()
    rows = {tensor.name: tensor.dims[0] for tensor in model.graph.initializer if tensor.dims}
    for layer in linear_layers(model):
        found = largest((activations.get(layer.input), ranges.input_of(modules_of(layer.name))))
        if found is not None:
            activations[layer.input] = found
        weight = ranges.weight_of(layer.name, rows[layer.weight], config)
        if weight is not None:
            steps[layer.name] = weight
    return Own(activations, steps, ranges.source)


def refuse_missing(own: Own, layers: Iterable[LinearLayer], source: str) -> None:
    """Raises UsageError, naming what is missing, where something of `layers` has to be found and there are no samples."""
    layers = list(layers)
    missing = [f"the input of {layer.name}" for layer in layers if layer.input not in own.activations]
    missing += [f"the weight of {layer.name}" for layer in layers if layer.name not in own.steps]
    if missing:
        raise lacking(missing, source)
