"""Channel equalization: move what makes some channels of an activation large into the weights that read it.

Channels are divided by a factor where a LayerNorm or a linear layer writes them, and the columns of the layers that read them
multiplied by it: SmoothQuant and cross-layer equalization. The network computes the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from swin_deploy.dependencies import require
from swin_deploy.options import Array

from .qdq import LinearLayer, linear_layers

if TYPE_CHECKING:
    import onnx

    from swin_deploy.exporters.passes.base import NetworkCheck

    from .gptq import SecondMoments

STRENGTHS = tuple((a, b) for a in np.linspace(0, 1, 11) for b in (0.0, 1.0 - a))
WRITTEN = ("LayerNormalization", "Gemm")  # nodes whose constants are changed
MAX_INSERTED = 2  # Mul nodes, where a node that cannot take a factor reads or writes the channels


@dataclass
class Channels:
    """Tensors that have the same channels, or several copies of these side by side, and so share factors.

    `written` is what is divided: (initializer, axis, first channel, length); `read` are the weights to multiply. A Mul must be
    inserted after the tensors `after`, and before the (tensor, node) `before`.
    """

    width: int
    tensors: set[str] = field(default_factory=set)
    written: set[tuple[str, int, int, int]] = field(default_factory=set)
    read: set[str] = field(default_factory=set)
    after: set[str] = field(default_factory=set)
    before: set[tuple[str, str]] = field(default_factory=set)


@dataclass(frozen=True)
class ChannelStatistics:
    """Amax and mean square of the channels of an activation; both [channels]."""

    amax: Array
    square: Array


class GraphIndex:
    """Index of an ONNX graph: constants, and the writer, the readers and the number of channels of each tensor."""

    def __init__(self, model: onnx.ModelProto) -> None:
        onnx = require("onnx", "quantize a model")
        self.model, self.numpy = model, onnx.numpy_helper
        self.nodes = list(model.graph.node)
        self.constants = {tensor.name: tensor for tensor in model.graph.initializer}
        self.writer = {name: node for node in self.nodes for name in node.output}
        self.readers: dict[str, list[Any]] = {}
        for node in self.nodes:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        self.outputs = {value.name for value in model.graph.output}

    @cached_property
    def widths(self) -> dict[str, int]:
        dims = {value.name: value.type.tensor_type.shape.dim for value in inferred_values(self.model)}
        return {name: dim[-1].dim_value for name, dim in dims.items() if len(dim) and dim[-1].HasField("dim_value")}

    def attribute(self, node: Any, name: str, default: Any = None) -> Any:
        return next((tuple(a.ints) or a.i for a in node.attribute if a.name == name), default)

    def constant(self, name: str) -> Array:
        return np.asarray(self.numpy.to_array(self.constants[name]))

    def passes(self, node: Any) -> bool:
        """Whether the node keeps the order of channels, so that its first input and its output share factors."""
        if node.op_type == "Transpose":
            order = self.attribute(node, "perm")
            return bool(order and order[-1] == len(order) - 1)
        if node.op_type == "Mul":  # of tokens, by a constant
            return node.input[1] in self.constants and list(self.constants[node.input[1]].dims)[-1:] == [1]
        return node.op_type == "Reshape" or (node.op_type == "Gather" and not self.attribute(node, "axis"))


def with_own_constants(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return `model` with a copy of each constant of a norm or a linear layer that other nodes read, too.

    The graph stores equal constants once, such as the weights of ones of all LayerNorms.
    """
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    seen = {name for node in model.graph.node if node.op_type not in WRITTEN for name in node.input}
    result = type(model)()
    result.CopyFrom(model)
    for node in result.graph.node:
        for position, name in enumerate(node.input) if node.op_type in WRITTEN else ():
            if name in seen and name in constants:
                node.input[position] = f"{name}/{node.name}/{position}"
                result.graph.initializer.add().CopyFrom(constants[name])
                result.graph.initializer[-1].name = node.input[position]
            seen.add(name)
    return result


def channels_of(graph: GraphIndex, layers: tuple[LinearLayer, ...]) -> list[Channels]:
    """Find the sets of tensors that share factors. The input of each layer is in at most one of them."""
    found: list[Channels] = []
    for layer in layers:
        if any(layer.input in one.tensors for one in found):
            continue
        one = _values_of_attention(graph, layer) or _connected(graph, layer)
        if len(one.after) + len(one.before) <= MAX_INSERTED:
            found.append(one)
    return found


def best_factors(
    one: Channels,
    weights: Mapping[str, tuple[str, Array]],  # by initializer: the input of the layer, and the weight [outputs, inputs]
    statistics: Mapping[str, ChannelStatistics],
    powers_of_two: bool = False,
) -> Array | None:
    """Choose the divisors [width] that reduce the expected quantization error most; None if that is hardly worth it."""
    groups: dict[str, list[Array]] = {}
    for name in sorted(one.read & weights.keys()):
        groups.setdefault(weights[name][0], []).append(np.abs(weights[name][1], dtype=np.float32))
    stacked = [(np.concatenate(matrices), statistics[name]) for name, matrices in groups.items() if name in statistics]
    parts = [(matrix, np.square(matrix, dtype=np.float64).sum(axis=0), s) for matrix, s in stacked]
    if not parts:
        return None
    tiny = 1e-12

    def shared(values: Array) -> Array:  # the largest of the channels that share a factor
        return np.asarray(values.reshape(-1, one.width).max(axis=0))

    amax = np.max([shared(s.amax) / max(float(s.amax.mean()), tiny) for *_, s in parts], axis=0) + 1e-6
    columns = np.max([shared(w.max(axis=0)) / max(float(w.max()), tiny) for w, *_ in parts], axis=0) + 1e-6

    def damage(factors: Array) -> float:
        total = 0.0
        for matrix, squares, s in parts:
            f = np.tile(factors, matrix.shape[1] // one.width)
            square = s.square / (f * f)
            energy = float(squares @ s.square) + tiny
            rounding = (2 * float((s.amax / f).max()) / 255) ** 2 * float(squares @ (f * f))
            rows = (matrix * f.astype(np.float32)).max(axis=1).astype(np.float64)
            total += (rounding + float(np.square(rows / 127).sum() * square.sum())) / energy
        return total

    candidates = [amax**a / columns**b for a, b in STRENGTHS]
    candidates = [factors / np.exp(np.log(factors).mean()) for factors in candidates]
    if powers_of_two:
        candidates = [np.exp2(np.rint(np.log2(factors))) for factors in candidates]
    best = min(candidates, key=damage)
    if damage(best) > (0.5 if one.after or one.before else 0.99) * damage(np.ones(one.width)):
        return None
    return np.asarray(best, np.float32)


def equalize(model: onnx.ModelProto, one: Channels, factors: Array) -> None:
    """Divide channels of `model`, in place, by `factors` [width]. The network computes the same as before."""
    onnx = require("onnx", "quantize a model")
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    changed = one.read | {name for name, *_ in one.written}
    readers = [name for node in model.graph.node for name in node.input if name in changed]
    if len(readers) > len(set(readers)):
        raise ValueError("Several nodes read one of the constants to change. Give each its own: with_own_constants.")

    def change(name: str, axis: int, first: int, length: int, by: Array) -> None:
        values = onnx.numpy_helper.to_array(constants[name]).copy()
        part = np.moveaxis(values, axis, -1)[..., first : first + length]
        part *= np.tile(by, length // len(by))
        constants[name].CopyFrom(onnx.numpy_helper.from_array(values, name))

    for written in sorted(one.written):
        change(*written, 1 / factors)
    for name in sorted(one.read):
        change(name, 1, 0, constants[name].dims[1], factors)
    if not one.after and not one.before:
        return
    nodes = []
    for node in model.graph.node:
        for position, name in enumerate(node.input):
            if (name, node.name) in one.before:
                nodes.append(_mul(onnx, model, name, f"{name}/unequalized", factors))
                node.input[position] = f"{name}/unequalized"
        nodes.append(node)
        for position, name in enumerate(node.output):
            if name in one.after:
                node.output[position] = f"{name}/unequalized"
                nodes.append(_mul(onnx, model, f"{name}/unequalized", name, 1 / factors))
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def equalize_all(
    model: onnx.ModelProto, chosen: Iterable[tuple[Channels, Array]], check: NetworkCheck | None
) -> tuple[onnx.ModelProto, list[tuple[Channels, Array]]]:
    """Return a copy of `model` with the `chosen` channels divided by their factors, and which of these `check` accepted."""
    result, chosen = type(model)(), list(chosen)
    result.CopyFrom(model)
    for pair in chosen:
        equalize(result, *pair)
    if check is None or not chosen or check.accepts(result, "", "channel equalization"):
        return result, chosen
    result.CopyFrom(model)
    kept = []
    for one, factors in chosen:
        trial = type(model)()
        trial.CopyFrom(result)
        equalize(trial, one, factors)
        if check.accepts(trial, f"channel equalization of {min(one.tensors)}"):
            result = trial
            kept.append((one, factors))
    return result, kept


def equalized(
    model: onnx.ModelProto, moments: Mapping[str, SecondMoments], check: NetworkCheck | None = None
) -> tuple[onnx.ModelProto, dict[str, SecondMoments]]:
    """Equalize, bit-exactly by powers of two, the inputs of the layers of `moments`. Returns the graph and its moments."""
    from onnx import numpy_helper

    model = with_own_constants(model)
    layers = tuple(layer for layer in linear_layers(model) if layer.name in moments)
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    statistics = {layer.input: moments[layer.name].statistics for layer in layers}
    read = {layer.weight: (layer.input, numpy_helper.to_array(weights[layer.weight])) for layer in layers}
    chosen = (
        (one, factors)
        for one in channels_of(GraphIndex(model), layers)
        if not one.after and not one.before
        if (factors := best_factors(one, read, statistics, powers_of_two=True)) is not None
    )
    result, accepted = equalize_all(model, chosen, check)
    found = dict(moments)
    for one, factors in accepted:
        for layer in layers:
            if layer.weight in one.read:
                found[layer.name] = found[layer.name].divided(np.tile(factors, len(found[layer.name].total) // one.width))
    return result, found


def _mul(onnx: Any, model: onnx.ModelProto, source: str, target: str, factors: Array) -> Any:
    model.graph.initializer.append(onnx.numpy_helper.from_array(factors.astype(np.float32), f"{target}/factors"))
    return onnx.helper.make_node("Mul", [source, f"{target}/factors"], [target], f"{target}/Mul")


def _connected(graph: GraphIndex, layer: LinearLayer) -> Channels:
    """Everything that shares the channels of the layer's input through sums, gathers and reshapes."""
    width = graph.constants[layer.weight].dims[1]
    one = Channels(width)
    todo = [layer.input]
    while todo:
        name = todo.pop()
        if name in one.tensors:
            continue
        one.tensors.add(name)
        todo += _written(graph, one, name)
        for node in graph.readers.get(name, []):
            if node.op_type == "Gemm" and node.input[0] == name and node.input[1] in graph.constants:
                one.read.add(node.input[1])
            elif ((graph.passes(node) and node.input[0] == name) or node.op_type == "Add") and _fits(
                graph, one, node.output[0]
            ):
                todo.append(node.output[0])
            else:
                one.before.add((name, node.name))
        if name in graph.outputs:
            one.before |= {(name, ""), (name, "output"), (name, "of the graph")}  # more than can be inserted
    return one


def _written(graph: GraphIndex, one: Channels, name: str) -> list[str]:
    """Add the writer of the tensor `name` to `one`; returns the tensors that it reads and that share its channels."""
    node, length = graph.writer.get(name), graph.widths.get(name, one.width)
    if node is not None and node.op_type in WRITTEN and not set(node.input[1:]) - graph.constants.keys():
        one.written |= {(constant, 0, 0, length) for constant in node.input[1:]}
        return []
    if node is not None and node.op_type == "Add" and not set(node.input) & graph.constants.keys():
        return list(node.input)
    if node is not None and graph.passes(node) and _fits(graph, one, node.input[0]):
        return [node.input[0]]
    one.after.add(name)
    return []


def _fits(graph: GraphIndex, one: Channels, name: str) -> bool:
    return graph.widths.get(name, 1) % one.width == 0


def _values_of_attention(graph: GraphIndex, layer: LinearLayer) -> Channels | None:
    """For the projection after attention: the channels of its input are those of the values, which a linear layer wrote."""
    width, name, steps = graph.constants[layer.weight].dims[1], layer.input, []
    for _ in range(6):
        if len(graph.readers[name]) > 1 or name in graph.outputs:  # equal queries, keys and values are one tensor
            return None
        node = graph.writer.get(name)
        if node is None or node.op_type not in ("Reshape", "Transpose", "MatMul", "Split"):
            break
        steps.append(node.op_type)
        if node.op_type == "Split":
            first = list(node.output).index(name) * width
            node = graph.writer.get(node.input[0])
            break
        first, name = 0, node.input[1 if node.op_type == "MatMul" else 0]
    if node is None or node.op_type != "Gemm" or steps[:5] != ["Reshape", "Transpose", "MatMul", "Transpose", "Reshape"]:
        return None
    written = {(constant, 0, first, width) for constant in node.input[1:] if constant}
    return Channels(width, {layer.input}, written, {layer.weight})


def inferred_values(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    """Infer the types and shapes of all tensors of `model`. Large constants are declared as inputs: they would not fit."""
    onnx = require("onnx", "quantize a model")
    shapes = [tensor for tensor in model.graph.initializer if tensor.data_type == onnx.TensorProto.INT64]
    large = [tensor for tensor in model.graph.initializer if tensor.data_type != onnx.TensorProto.INT64]
    inputs = [onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)) for tensor in large]
    graph = onnx.helper.make_graph(model.graph.node, "shapes", [*model.graph.input, *inputs], model.graph.output, shapes)
    light = onnx.helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    inferred = onnx.shape_inference.infer_shapes(light).graph
    return [*inferred.value_info, *inferred.input, *inferred.output]
