"""A network's own ranges as the layers of a graph for TensorRT have them (see quantized.py for the form)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from swin_deploy.config import SwinConfig
from swin_deploy.ranges import PARTS, ActivationRange, Ranges, modules_of

from .passes.quantize_linear import TOP
from .quantized import Layer

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
