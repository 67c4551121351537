"""Where a network is quantised, and the graph that says so: the input and the weights of its linear layers, nothing else.

Attention products, softmax, mask and position bias, LayerNorm and residual adds stay as they are. The graph is standard ONNX:
QuantizeLinear and DequantizeLinear before each Gemm, none behind it, so that ONNX Runtime makes an 8-bit product with its
bias and float results of it, and OpenVINO an 8-bit FullyConnected.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from swin_deploy.dependencies import require
from swin_deploy.exporters.passes.attention import Node
from swin_deploy.exporters.passes.base import Graph
from swin_deploy.specs import Array

if TYPE_CHECKING:
    import onnx


FORMATS = ("int8", "fp8")
TOP = {"int8": 127.0, "fp8": 448.0}  # the largest number of each
Rounds = Callable[[str, NDArray[Any], NDArray[Any]], NDArray[Any] | None]  # (layer, weight, steps) -> numbers, or the nearest
FLOAT, INT32, INT8 = 1, 6, 3  # onnx.TensorProto


@dataclass
class Quantizer:
    """Writes quantised tensors into `graph`. `narrow` is the type that scales will have; `wide` names nodes that stay fp32."""

    graph: Graph
    format: str
    narrow: np.dtype[Any]
    scales: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    rounding: Rounds = lambda *_: None
    wide: set[str] = field(default_factory=set)

    @property
    def dtype(self) -> np.dtype[Any]:
        if self.format == "int8":
            return np.dtype(np.int8)
        import ml_dtypes

        float8: np.dtype[Any] = np.dtype(ml_dtypes.float8_e4m3fn)
        return float8

    def node(self, name: str, op: str, inputs: list[Any], dtype: Any = np.float32, **attributes: Any) -> Any:
        """The variable that a new node of this name writes."""
        import onnx_graphsurgeon as gs

        made = gs.Variable(f"{name}_output", np.dtype(dtype))
        self.graph.nodes.append(gs.Node(op, name, attributes, inputs, [made]))
        return made

    def scale(self, amplitude: NDArray[Any] | float) -> NDArray[np.float32]:
        """What one step stands for, such that it is exact in the narrow type and no subnormal number there."""
        steps = np.maximum(np.asarray(amplitude, np.float32) / TOP[self.format], 2.0**-14)
        return np.asarray(steps.astype(self.narrow), np.float32)

    def activation(self, tensor: Any, amplitude: float) -> Any:
        """`tensor`, quantised to the range of +-`amplitude` and back."""
        scale, zero = self._parameters(tensor.name, self.scale(amplitude))
        quantized = self.node(f"{tensor.name}/QuantizeLinear", "QuantizeLinear", [tensor, scale, zero], self.dtype)
        return self.node(f"{tensor.name}/DequantizeLinear", "DequantizeLinear", [quantized, scale, zero])

    def behind(self, tensor: Any, amplitude: float, readers: list[Node] | None = None) -> None:
        """Quantises `tensor` for `readers`, or for all who read it."""
        readers = list(tensor.outputs) if readers is None else readers
        quantized = self.activation(tensor, amplitude)
        for reader in readers:
            reader.inputs = [quantized if read is tensor else read for read in reader.inputs]

    def in_epilogue(self, tensor: Any, amplitude: float) -> Any:
        """The same, in operators that the compiler can compute in the kernel of the product in front of `tensor`.

        It has none that rounds, so the rounding is that of a conversion to integers, which cuts off, of a positive number.
        """
        if self.format != "int8":
            return self.activation(tensor, amplitude)
        scale, zero = self._parameters(tensor.name, self.scale(amplitude))

        def step(op: str, *inputs: Any, dtype: Any = np.float32, **attributes: Any) -> Any:
            name = f"{tensor.name}/Quantize{op}{len(self.graph.nodes)}"
            self.wide.add(name)
            return self.node(name, op, list(inputs), dtype, **attributes)

        def number(name: str, value: float) -> Any:
            return self.constant(f"{tensor.name}/{name}", np.array(value, np.float32))

        steps = step("Mul", tensor, number("inverse", 1 / float(scale.values)))
        limited = step("Clip", steps, number("least", -TOP["int8"]), number("largest", TOP["int8"]))
        whole = step("Cast", step("Add", limited, number("half", 128.5)), dtype=np.int32, to=INT32)
        shift = self.constant(f"{tensor.name}/shift", np.array(128, np.int32))
        quantized = step("Cast", step("Sub", whole, shift, dtype=np.int32), dtype=np.int8, to=INT8)
        return self.node(f"{tensor.name}/DequantizeLinear", "DequantizeLinear", [quantized, scale, zero])

    def weight(self, layer: str, values: NDArray[Any], by_channel: bool, shared: float | None = None) -> Any:
        """A weight [outputs, inputs], stored quantised; `shared` is the amplitude of several weights with one scale."""
        values = np.asarray(values, np.float32)
        own = self.scales.get(layer) if shared is None else None
        needed = (shared or np.abs(values).max(axis=1)) if own is None else np.broadcast_to(np.ravel(own), len(values))
        scale = self.scale(needed if own is None else needed * TOP[self.format])
        scale = scale if by_channel else scale.max()
        lowest = -128.0 if own is not None and self.format == "int8" else -TOP[self.format]  # trained weights use it
        found = self.rounding(layer, values, np.broadcast_to(scale, values.shape[:1])) if own is None else None
        steps = values / (scale[:, None] if by_channel else scale) if found is None else found
        limited = np.clip(steps, lowest, TOP[self.format])
        quantized = (np.rint(limited) if self.format == "int8" else limited).astype(self.dtype)
        number, zero = self._parameters(f"{layer}.weight", scale)
        stored = self.constant(f"{layer}.weight_{self.format}", quantized)
        attributes = {"axis": 0} if by_channel else {}
        return self.node(f"{layer}.weight/DequantizeLinear", "DequantizeLinear", [stored, number, zero], **attributes)

    def _parameters(self, name: str, scale: NDArray[Any]) -> tuple[Any, Any]:
        zero = self.constant(f"{name}_zero{len(self.graph.nodes)}", np.zeros(np.shape(scale), self.dtype))
        return self.constant(f"{name}_scale{len(self.graph.nodes)}", np.asarray(scale, np.float32)), zero

    @staticmethod
    def constant(name: str, values: NDArray[Any]) -> Any:
        import onnx_graphsurgeon as gs

        return gs.Constant(name, np.asarray(values, order="C"))  # of rank 0 where `values` is


@dataclass(frozen=True)
class LinearLayer:
    """A Gemm: `output = input @ weight.T + bias`; tensors by name, `weight` [outputs, inputs] and `bias` are initialisers."""

    name: str
    input: str
    output: str
    weight: str
    bias: str | None


@dataclass(frozen=True)
class ActivationScale:
    """An activation is `(code - zero_point) * scale`; codes are uint8 (INT8) or E4M3 (FP8, whose zero point is 0)."""

    scale: float
    zero_point: int = 0


@dataclass(frozen=True)
class QuantizedLinear:
    """What a linear layer becomes: `weight = codes * scale[:, None]`, `codes` int8 or E4M3 [outputs, inputs]."""

    layer: LinearLayer
    codes: Array
    scale: NDArray[np.float32]
    bias: NDArray[np.float32] | None
    activation: ActivationScale

    @property
    def weight(self) -> NDArray[np.float32]:
        """[outputs, inputs], on the grid."""
        values: NDArray[np.float32] = self.codes.astype(np.float32) * self.scale[:, None]
        return values


def linear_layers(model: onnx.ModelProto) -> tuple[LinearLayer, ...]:
    """Every linear layer, in the order in which they are computed; its name is the module's ("stages.0.steps.block0.fc1")."""
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


def qdq_from_fp32(model: onnx.ModelProto, quantized: Iterable[QuantizedLinear]) -> onnx.ModelProto:
    """`model` with the layers of `quantized` in 8 bits; the others are as they were.

    Layers that read the same tensor must agree on its scale: it is quantised once.
    """
    nodes, constants = qdq_nodes(model.graph.node, quantized)
    return with_nodes(model, nodes, constants.values())


def qdq_nodes(nodes: Iterable[Any], quantized: Iterable[QuantizedLinear]) -> tuple[list[Any], dict[str, Any]]:
    """`nodes` with Q/DQ before the layers of `quantized`, and the constants that these need, by name."""
    onnx = require("onnx", "write the quantised graph")
    by_output = {layer.layer.output: layer for layer in quantized}
    writer, result = _Writer(onnx), list[Any]()
    for node in nodes:
        layer = by_output.get(node.output[0]) if node.op_type == "Gemm" else None
        if layer is not None:
            result += writer.activation(layer) + writer.weights(layer)
            names = [f"{layer.layer.input}/dequantized", f"{layer.layer.weight}/dequantized"]
            if layer.bias is not None:
                names.append(f"{layer.layer.name}/bias")
            node = onnx.NodeProto.FromString(node.SerializeToString())
            del node.input[:]
            node.input.extend(names)
        result.append(node)
    return result, {tensor.name: tensor for tensor in writer.constants}


def with_nodes(model: onnx.ModelProto, nodes: Iterable[Any], constants: Iterable[Any]) -> onnx.ModelProto:
    """`model` with other nodes and further constants; constants that no node reads are left out."""
    nodes = list(nodes)
    result = type(model)(ir_version=model.ir_version, producer_name=model.producer_name)
    result.opset_import.extend(model.opset_import)
    graph = result.graph
    graph.name = model.graph.name
    graph.node.extend(nodes)
    graph.input.extend(model.graph.input)
    graph.output.extend(model.graph.output)
    used = {name for node in nodes for name in node.input}
    graph.initializer.extend(tensor for tensor in (*model.graph.initializer, *constants) if tensor.name in used)
    return result


class _Writer:
    """Makes the nodes and constants of quantised layers; an activation that several layers read is quantised once."""

    def __init__(self, onnx: Any) -> None:
        self.onnx, self.constants, self.seen = onnx, list[Any](), dict[str, ActivationScale]()

    def activation(self, layer: QuantizedLinear) -> list[Any]:
        name, scale = layer.layer.input, layer.activation
        if name in self.seen:
            if self.seen[name] != scale:
                raise ValueError(f"{name} is given two scales")
            return []
        self.seen[name] = scale
        zero = np.array(scale.zero_point, np.uint8 if layer.codes.dtype == np.int8 else layer.codes.dtype)
        scales = [self.constant(f"{name}/scale", np.array(scale.scale, np.float32)), self.constant(f"{name}/zero", zero)]
        make = self.onnx.helper.make_node
        return [
            make("QuantizeLinear", [name, *scales], [f"{name}/quantized"], f"{name}/QuantizeLinear"),
            make("DequantizeLinear", [f"{name}/quantized", *scales], [f"{name}/dequantized"], f"{name}/DequantizeLinear"),
        ]

    def weights(self, layer: QuantizedLinear) -> list[Any]:
        name, make = layer.layer.weight, self.onnx.helper.make_node
        inputs = [
            self.constant(f"{name}/quantized", layer.codes),
            self.constant(f"{name}/scale", layer.scale),
            self.constant(f"{name}/zero", np.zeros(len(layer.scale), layer.codes.dtype)),
        ]
        nodes = [make("DequantizeLinear", inputs, [f"{name}/dequantized"], f"{name}/DequantizeLinear", axis=0)]
        if layer.bias is None:
            return nodes
        name = f"{layer.layer.name}/bias"
        if layer.codes.dtype != np.int8:
            self.constant(name, layer.bias)
            return nodes
        step = (np.float32(layer.activation.scale) * layer.scale).astype(np.float32)
        codes = np.clip(np.rint(layer.bias.astype(np.float64) / step), -(2**31), 2**31 - 1).astype(np.int32)
        inputs = [self.constant(f"{name}/quantized", codes), self.constant(f"{name}/scale", step)]
        inputs.append(self.constant(f"{name}/zero", np.zeros(len(step), np.int32)))
        return nodes + [make("DequantizeLinear", inputs, [name], f"{name}/DequantizeLinear", axis=0)]

    def constant(self, name: str, array: Array) -> str:
        self.constants.append(self.onnx.numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name
