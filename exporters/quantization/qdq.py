"""Write QuantizeLinear and DequantizeLinear (Q/DQ) nodes into graphs.

`TensorRTWriter` writes symmetric scales, as TensorRT needs them. `qdq_nodes` writes for CPU back ends, before each Gemm and
none after it: ONNX Runtime makes it an 8-bit matmul with bias and float results, and OpenVINO an 8-bit FullyConnected.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from swin_deploy.calib.calibrators import TYPE_MAX
from swin_deploy.dependencies import require
from swin_deploy.exporters.passes.base import Graph, Node, Tensor, add_node, constant, redirect
from swin_deploy.options import Array

if TYPE_CHECKING:
    import onnx

# (layer, weight [outputs, inputs], scale [outputs]) -> quantized values, or None for the nearest ones
Rounding = Callable[[str, Array, Array], Array | None]
INT32, INT8 = 6, 3  # onnx.TensorProto


class QdqWriter(ABC):
    """Writes Q/DQ nodes; a subclass adds nodes and constants to its kind of graph."""

    @abstractmethod
    def constant(self, name: str, values: Any) -> Any:
        """Add a constant and return what a node takes as its input."""

    @abstractmethod
    def node(self, name: str, op: str, inputs: list[Any], output: str, dtype: Any = np.float32, **attributes: Any) -> Any:
        """Add a node and return its output."""

    def quantize_dequantize(self, name: str, tensor: Any, scale: Any, zero_point: Any, after: Any = None) -> Any:
        """Write Q/DQ for an activation, `tensor`; `name` is the prefix of what is added. DQ has the zero point `after`."""
        parameters = [self.constant(f"{name}/scale", scale), self.constant(f"{name}/zero", zero_point)]
        inputs = [tensor, *parameters]
        quantized = self.node(f"{name}/QuantizeLinear", "QuantizeLinear", inputs, f"{name}/quantized", zero_point.dtype)
        if after is not None and after != zero_point:
            parameters[1] = self.constant(f"{name}/zero_after", after)
        return self.dequantize(name, quantized, parameters)

    def dequantize_constant(self, name: str, values: Array, scale: Any) -> Any:
        """Write DQ for quantized values; a scale with one axis is per channel of their first."""
        zero = np.zeros(np.shape(scale), values.dtype)
        parameters = [self.constant(f"{name}/scale", scale), self.constant(f"{name}/zero", zero)]
        attributes = {"axis": 0} if np.ndim(scale) else {}
        return self.dequantize(name, self.constant(f"{name}/quantized", values), parameters, **attributes)

    def dequantize(self, name: str, quantized: Any, parameters: list[Any], **attributes: Any) -> Any:
        """Write DQ for `quantized`; `parameters` are its scale and its zero point."""
        inputs = [quantized, *parameters]
        return self.node(f"{name}/DequantizeLinear", "DequantizeLinear", inputs, f"{name}/dequantized", **attributes)


@dataclass
class TensorRTWriter(QdqWriter):
    """Writes symmetric Q/DQ with scales of type `low`. `fallback` receives the names of nodes that must stay fp32."""

    graph: Graph
    format: str
    low: np.dtype[Any]
    scales: Mapping[str, Array] = field(default_factory=dict)
    rounding: Rounding = lambda *_: None
    fallback: set[str] = field(default_factory=set)

    @property
    def dtype(self) -> np.dtype[Any]:
        if self.format == "int8":
            return np.dtype(np.int8)
        import ml_dtypes

        float8: np.dtype[Any] = np.dtype(ml_dtypes.float8_e4m3fn)
        return float8

    @property
    def largest(self) -> float:
        """The largest quantized value."""
        return TYPE_MAX[self.format]

    def constant(self, name: str, values: Any) -> Tensor:
        return constant(name, values, values.dtype)

    def node(
        self, name: str, op: str, inputs: list[Any], output: str = "", dtype: Any = np.float32, **attributes: Any
    ) -> Tensor:
        return add_node(self.graph, name, op, inputs, output, dtype, **attributes)

    def scale(self, amax: Array | float) -> NDArray[np.float32]:
        """Return the scale for `amax`, exact in the low-precision type and not subnormal there."""
        scale = np.maximum(np.asarray(amax, np.float32) / self.largest, 2.0**-14)
        return np.asarray(scale.astype(self.low), np.float32)

    def activation(self, tensor: Tensor, amax: float) -> Tensor:
        """Write Q/DQ for `tensor` with the range +-`amax`."""
        return self.quantize_dequantize(tensor.name, tensor, self.scale(amax), np.zeros((), self.dtype))

    def after(self, tensor: Tensor, amax: float, readers: list[Node] | None = None) -> None:
        """Quantize `tensor` for `readers`, or for all its readers."""
        readers = list(tensor.outputs) if readers is None else readers
        redirect(readers, tensor, self.activation(tensor, amax))

    def in_epilogue(self, tensor: Tensor, amax: float) -> Tensor:
        """Same as `activation`, in operators that TensorRT fuses into the epilogue of the preceding GEMM. None rounds."""
        if self.format != "int8":
            return self.activation(tensor, amax)
        scale = self.scale(amax)

        def step(op: str, *inputs: Tensor, dtype: Any = np.float32, **attributes: Any) -> Tensor:
            name = f"{tensor.name}/Quantize{op}{len(self.graph.nodes)}"
            self.fallback.add(name)
            return self.node(name, op, list(inputs), dtype=dtype, **attributes)

        def number(name: str, value: float, dtype: Any = np.float32) -> Tensor:
            return constant(f"{tensor.name}/{name}", value, dtype)

        scaled = step("Mul", tensor, number("inverse", 1 / float(scale)))
        limited = step("Clip", scaled, number("least", -self.largest), number("largest", self.largest))
        whole = step("Cast", step("Add", limited, number("half", 128.5)), dtype=np.int32, to=INT32)
        shifted = step("Sub", whole, number("shift", 128, np.int32), dtype=np.int32)
        quantized = step("Cast", shifted, dtype=np.int8, to=INT8)
        zero = self.constant(f"{tensor.name}/zero", np.zeros((), self.dtype))
        return self.dequantize(tensor.name, quantized, [self.constant(f"{tensor.name}/scale", scale), zero])

    def weight(self, layer: str, values: Array, per_channel: bool, shared_amax: float | None = None) -> Tensor:
        """Write a weight [outputs, inputs] in 8 bits; `shared_amax` is the amax of several weights with one scale."""
        values = np.asarray(values, np.float32)
        trained = self.scales.get(layer) if shared_amax is None else None
        if trained is None:
            scale = self.scale(shared_amax or np.abs(values).max(axis=1))
        else:
            scale = self.scale(np.broadcast_to(np.ravel(trained), len(values)) * self.largest)
        lowest = -self.largest if trained is None or self.format == "fp8" else -128.0  # trained weights use it
        scale = scale if per_channel else scale.max()
        found = self.rounding(layer, values, np.broadcast_to(scale, values.shape[:1])) if trained is None else None
        limited = np.clip(values / (scale[:, None] if per_channel else scale) if found is None else found, lowest, self.largest)
        quantized = (np.rint(limited) if self.format == "int8" else limited).astype(self.dtype)
        return self.dequantize_constant(f"{layer}.weight", quantized, scale)


@dataclass(frozen=True)
class LinearLayer:
    """A Gemm: `output = input @ weight.T + bias`. All are names; `weight` [outputs, inputs] and `bias` are initializers."""

    name: str
    input: str
    output: str
    weight: str
    bias: str | None


@dataclass(frozen=True)
class ActivationScale:
    """An activation is `(quantized - zero_point) * scale` with uint8 values."""

    scale: float
    zero_point: int = 0


@dataclass(frozen=True)
class QuantizedLinear:
    """A linear layer in 8 bits: `weight = values * scale[:, None]`, `values` int8 [outputs, inputs]."""

    layer: LinearLayer
    values: Array
    scale: NDArray[np.float32]
    bias: NDArray[np.float32] | None
    activation: ActivationScale

    @property
    def weight(self) -> NDArray[np.float32]:
        """The dequantized weight [outputs, inputs]."""
        return np.asarray(self.values.astype(np.float32) * self.scale[:, None])

    def with_bias_in_range(self) -> QuantizedLinear:
        """Return the layer with larger scales for rows whose bias does not fit into int32, such as those of zeros."""
        least = 0.0 if self.bias is None else np.abs(self.bias.astype(np.float64)) / (2.0**30 * self.activation.scale)
        scale = np.maximum(self.scale, least).astype(np.float32)
        if (scale == self.scale).all():
            return self
        return replace(self, values=np.rint(self.values * (self.scale / scale)[:, None]).astype(np.int8), scale=scale)


def linear_layers(model: onnx.ModelProto) -> tuple[LinearLayer, ...]:
    """List the linear layers in the order of computation, named as their modules ("stages.0.steps.block0.fc1")."""
    constants = {tensor.name for tensor in model.graph.initializer}
    found = []
    for node in model.graph.node:
        if node.op_type != "Gemm" or node.input[1] not in constants:
            continue
        settings = {a.name: a for a in node.attribute}
        plain = all(settings[key].f == 1.0 for key in ("alpha", "beta") if key in settings)
        bias = node.input[2] if len(node.input) > 2 and node.input[2] else None
        if plain and "transB" in settings and settings["transB"].i == 1 and (bias is None or bias in constants):
            found.append(LinearLayer(node.name.removesuffix("/Gemm"), node.input[0], node.output[0], node.input[1], bias))
    return tuple(found)


class _NodeWriter(QdqWriter):
    """Collects ONNX nodes and constants."""

    def __init__(self) -> None:
        self.onnx = require("onnx", "write the quantized graph")
        self.nodes: list[Any] = []
        self.constants: dict[str, Any] = {}

    def constant(self, name: str, values: Any) -> str:
        self.constants[name] = self.onnx.numpy_helper.from_array(np.ascontiguousarray(values), name)
        return name

    def node(self, name: str, op: str, inputs: list[Any], output: str, dtype: Any = np.float32, **attributes: Any) -> str:
        self.nodes.append(self.onnx.helper.make_node(op, inputs, [output], name, **attributes))
        return output


def qdq_nodes(
    nodes: Iterable[Any], quantized: Iterable[QuantizedLinear], zero_in_bias: bool = False
) -> tuple[list[Any], dict[str, Any]]:
    """Write Q/DQ before the layers of `quantized`, once for each tensor. Returns all nodes, and the new constants by name.

    With `zero_in_bias`, DQ has no zero point: what it would subtract is in the bias. OpenVINO subtracts it in each output.
    """
    writer, scales = _NodeWriter(), dict[str, ActivationScale]()
    by_output = {layer.layer.output: layer for layer in quantized}
    for node in nodes:
        layer = by_output.get(node.output[0]) if node.op_type == "Gemm" else None
        if layer is None:
            writer.nodes.append(node)
            continue
        name, activation = layer.layer.input, layer.activation
        if scales.get(name, activation) != activation:
            raise ValueError(f"{name} has two scales")
        if name not in scales:
            scales[name] = activation
            zero = np.uint8(activation.zero_point)
            writer.quantize_dequantize(name, name, np.float32(activation.scale), zero, np.uint8(0) if zero_in_bias else None)
        inputs = [f"{name}/dequantized", writer.dequantize_constant(layer.layer.weight, layer.values, layer.scale)]
        shift = layer.values.sum(axis=1, dtype=np.float64) * activation.zero_point if zero_in_bias else np.zeros(())
        if layer.bias is not None or shift.any():
            scale = (np.float32(activation.scale) * layer.scale).astype(np.float32)
            bias = np.zeros(scale.shape) if layer.bias is None else np.rint(layer.bias.astype(np.float64) / scale)
            values = np.clip(bias - shift, -(2**31), 2**31 - 1).astype(np.int32)
            inputs.append(writer.dequantize_constant(f"{layer.layer.name}/bias", values, scale))
        node = type(node).FromString(node.SerializeToString())
        del node.input[:]
        node.input.extend(inputs)
        writer.nodes.append(node)
    return writer.nodes, writer.constants


def with_nodes(model: onnx.ModelProto, nodes: Iterable[Any], constants: Iterable[Any]) -> onnx.ModelProto:
    """Return `model` with other nodes and further constants, without the constants that no node reads."""
    from onnx import helper

    nodes, facts = list(nodes), {"ir_version": model.ir_version, "producer_name": model.producer_name}
    used = {name for node in nodes for name in node.input}
    kept = [tensor for tensor in (*model.graph.initializer, *constants) if tensor.name in used]
    graph = helper.make_graph(nodes, model.graph.name, model.graph.input, model.graph.output, kept)
    return helper.make_model(graph, opset_imports=model.opset_import, **facts)
