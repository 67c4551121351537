"""An ONNX graph with everything computed that does not depend on the image, and the order of tokens in each of its tensors.

Both make graphs of any exporter comparable: constants are those that the network uses, however the exporter computes them, and
a tensor of tokens can be put into row-major order, however the graph arranges windows.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from swin_deploy.dependencies import onnxruntime_session, require
from swin_deploy.errors import BackendError, sentence, shown
from swin_deploy.options import Array

if TYPE_CHECKING:
    import onnx

Shapes = Mapping[str, tuple[int, ...]]
PAD = -1
# Operators whose output elements are elements of their first input.
LAYOUT = {
    "Reshape", "Transpose", "Gather", "Slice", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Expand", "Tile", "Split",
    "Concat", "Pad", "DepthToSpace", "SpaceToDepth", "GatherND",
}  # fmt: skip
COLUMNS = {"Transpose", "Mul", "Div", "Cast", "QuantizeLinear", "DequantizeLinear"}  # may write keys with tokens last
QUANTIZE = {"QuantizeLinear", "DequantizeLinear"}


class FoldedGraph:
    """A graph with fixed input shapes. `constants` holds its constants, `nodes` what depends on the image, in order."""

    def __init__(self, model: onnx.ModelProto, feeds: Mapping[str, Array]) -> None:
        self.onnx = require("onnx", "compare graphs")
        if model.functions:
            model = self.onnx.inliner.inline_local_functions(model)
        self.model = model
        self.inputs = {name: feed.shape for name, feed in feeds.items()}
        self._tensors = {tensor.name: tensor for tensor in model.graph.initializer}
        self._known: dict[str, Array] = {}
        self.opsets = model.opset_import
        self.nodes: list[Any] = []
        self._computed = self._shapes(feeds)
        for node in model.graph.node:
            if node.op_type == "Constant":
                self._known[node.output[0]] = self._evaluate(node, {})[0]
            elif all(name in self._computed for name in node.output):
                self._known |= {name: self._computed[name] for name in node.output}
            elif node.input and all(self.is_constant(name) for name in node.input if name):
                found = self._evaluate(node, {name: self.constant(name) for name in node.input if name})
                self._known |= dict(zip(node.output, found, strict=False))
            else:
                self.nodes.append(node)
        self.writer = {name: node for node in self.nodes for name in node.output if name}
        self.place = {name: place for place, node in enumerate(self.nodes) for name in node.output if name}
        self.readers: dict[str, list[Any]] = {}
        for node in self.nodes:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)

    def is_constant(self, name: str) -> bool:
        return name in self._known or name in self._tensors

    def constant(self, name: str) -> Array:
        if name not in self._known:
            self._known[name] = self._array(self._tensors[name])
        return self._known[name]

    def attribute(self, node: Any, name: str, default: Any = None) -> Any:
        for one in node.attribute:
            if one.name == name:
                value = self.onnx.helper.get_attribute_value(one)
                return value.decode() if isinstance(value, bytes) else value
        return default

    def data_inputs(self, node: Any) -> list[str]:
        """Return the inputs of `node` that depend on the image."""
        return [name for name in node.input if name and not self.is_constant(name)]

    def ancestors(self, name: str, until: Container[str] = ()) -> Iterator[Any]:
        """Yield the nodes that `name` is computed from, the nearest first, up to those that write a tensor of `until`."""
        seen, todo = set(), [name]
        while todo:
            node = self.writer.get(todo.pop(0))
            if node is None or node.output[0] in seen or node.output[0] in until:
                continue
            seen.add(node.output[0])
            yield node
            todo += self.data_inputs(node)

    def _array(self, tensor: Any) -> Array:
        array = self.onnx.numpy_helper.to_array(tensor)
        return np.asarray(array)

    def _evaluate(self, node: Any, feeds: Mapping[str, Array]) -> list[Array]:
        from onnx.reference import ReferenceEvaluator

        helper = self.onnx.helper
        read, made = (
            [helper.make_tensor_value_info(name, self.onnx.TensorProto.UNDEFINED, None) for name in names if name]
            for names in (dict.fromkeys(node.input), node.output)
        )
        alone = helper.make_model(helper.make_graph([node], "constant", read, made), opset_imports=self.opsets)
        if node.op_type == "DequantizeLinear" and not node.domain:
            return [self._dequantized(node, feeds)]
        return [np.asarray(one) for one in ReferenceEvaluator(alone).run(None, dict(feeds))]

    def _dequantized(self, node: Any, feeds: Mapping[str, Array]) -> Array:
        values, scale, *zero = (feeds[name].astype(np.float32) for name in node.input if name)
        axis = self.attribute(node, "axis", 1)
        shape = [1] * values.ndim
        if scale.ndim and scale.size > 1:
            shape[axis] = scale.size
        scale, shift = scale.reshape(shape), zero[0].reshape(shape) if zero else 0.0
        return np.asarray((values - shift) * scale, np.float32)

    def _shapes(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run the graph to compute the shapes that it reads; they are constants for one batch."""
        wanted = [node.output[0] for node in self.model.graph.node if node.op_type in ("Shape", "Size")]
        if not wanted:
            return {}
        names = {value.name for value in self.model.graph.input} - self._tensors.keys()
        return run_with_outputs(self.model, {name: feed for name, feed in feeds.items() if name in names}, wanted)

    # -- order of tokens ---------------------------------------------------------------------------------------------------

    @cached_property
    def tokens(self) -> dict[str, Array]:
        """Return for tensors of tokens, by name, the number of the token of each row: image * tokens + place; PAD for none.

        A row is all but the last axis. Places are row-major in the feature map of the stage.
        """
        return self._order.found

    @cached_property
    def columns(self) -> dict[str, Array]:
        """Return the same for tensors whose last axis is tokens: the number of the token of each column."""
        return self._order.columns

    @cached_property
    def broken_merges(self) -> tuple[str, ...]:
        """Return the tensors of patch merging whose four neighbors are not those of a square of tokens."""
        return tuple(self._order.broken)

    @cached_property
    def _order(self) -> _TokenOrder:
        return _TokenOrder(self)


def run_with_outputs(model: onnx.ModelProto, feeds: Mapping[str, Array], names: list[str], **options: Any) -> dict[str, Array]:
    """Run `model` in ONNX Runtime without optimizations, and return the tensors `names`."""
    onnx = require("onnx", "compare graphs")
    ort = require("onnxruntime", "compare graphs")
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    del copy.graph.output[:]
    copy.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in dict.fromkeys(names))
    off = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = onnxruntime_session(copy.SerializeToString(), graph_optimization_level=off, **options)
        found = session.run(None, dict(feeds))
    except Exception as error:
        why = shown(sentence(str(error)))
        raise BackendError(f"ONNX Runtime cannot run one of the graphs: {why}. Check it with onnx.checker.") from error
    return dict(zip(dict.fromkeys(names), found, strict=True))


class _TokenOrder:
    """Follows the numbers of tokens through the nodes that move them."""

    def __init__(self, graph: FoldedGraph) -> None:
        self.graph = graph
        self.values: dict[str, Array] = {}
        self.found: dict[str, Array] = {}
        self.columns: dict[str, Array] = {}
        self.broken: list[str] = []
        self.grid = (0, 0)  # of the current stage
        self.images = 1
        last = {name: place for place, node in enumerate(graph.nodes) for name in node.input}
        for place, node in enumerate(graph.nodes):
            made = self._outputs(node)
            for name, value in zip(node.output, made, strict=False):
                if value is not None:
                    self.values[name] = value
                    self.found[name] = value[..., 0] if value.ndim > 1 and node.op_type != "Conv" else value
                    if value.ndim > 2 and node.op_type in COLUMNS and (value[..., :1] != value).any():
                        self.columns[name] = value[..., 0, :]
            for name in node.input:
                if last[name] == place:
                    self.values.pop(name, None)

    def _outputs(self, node: Any) -> list[Array | None]:
        op, graph = node.op_type, self.graph
        read = [self.values.get(name) for name in node.input]
        if op == "Conv":
            return [self._patches(node)]
        if all(one is None for one in read):
            return [None] * len(node.output)
        first = next(one for one in read if one is not None)
        if op in LAYOUT:
            return self._moved(node, read, first)
        if op == "Gemm" or (op == "MatMul" and graph.is_constant(node.input[1])):
            weight = graph.constant(node.input[1])
            width = weight.shape[0 if graph.attribute(node, "transB", 0) else -1]
            rows = first[..., :1]
            if first.shape[-1] % 4 == 0 and (merged := self._merged(first, node.output[0])) is not None:
                rows = merged
            return [np.broadcast_to(rows, (*first.shape[:-1], width))]
        if op == "MatMul" and len(read) == 2 and read[1] is not None:
            left, right = read[0], read[1]
            if left is None:
                return [None]
            return [np.broadcast_to(left[..., :1], (*left.shape[:-1], right.shape[-1]))]
        if op.startswith("Reduce"):
            axes = graph.attribute(node, "axes")
            if axes is None and len(node.input) > 1 and node.input[1]:
                axes = graph.constant(node.input[1]).tolist()
            if axes is None:
                return [None]
            keep = graph.attribute(node, "keepdims", 1)
            value = first
            for axis in sorted((a % first.ndim for a in axes), reverse=True):
                value = value.take([0], axis) if keep else value.take(0, axis)
            return [value]
        if op in ("Add", "Sub", "Mul", "Div", "Pow", "Max", "Min", "Where"):
            shapes = [
                one.shape if one is not None else graph.constant(name).shape
                for name, one in zip(node.input, read, strict=True)
                if one is not None or graph.is_constant(name)
            ]
            return [np.broadcast_to(max((one for one in read if one is not None), key=lambda one: one.size),
                                    np.broadcast_shapes(*shapes))]  # fmt: skip
        return [first if place == 0 else None for place in range(len(node.output))]

    def _gathered(self, node: Any, first: Array) -> Array:
        """Gather. Padding is a copy of some token that a later node multiplies by zero."""
        graph = self.graph
        index, axis = graph.constant(node.input[1]), graph.attribute(node, "axis", 0)
        found = first.take(index, axis=axis)
        if index.ndim == 1 and len(np.unique(index)) < len(index):
            start = graph.place[node.output[0]]
            for later in graph.nodes[start : start + 400]:
                keep = [graph.constant(name) for name in later.input if later.op_type == "Mul" and graph.is_constant(name)]
                if keep and keep[0].size in (len(index), len(index) / 4) and not keep[0].all():
                    shape = [1] * found.ndim
                    shape[axis] = len(index)
                    kept = keep[0].reshape(-1).repeat(len(index) // keep[0].size)  # four tokens that are merged into one
                    return np.where(kept.reshape(shape) == 0, PAD, found)
        return found

    def _patches(self, node: Any) -> Array:
        graph = self.graph
        weight = graph.constant(node.input[1])
        images, _, *sides = next(shape for shape in graph.inputs.values() if len(shape) == 4)
        if sides[-1] in (1, 3):  # frames with channels last
            sides = [_, sides[0]]
        strides = graph.attribute(node, "strides", [1, 1])
        rows, columns = (-(-side // step) for side, step in zip(sides, strides, strict=True))
        self.images, self.grid = images, (rows, columns)
        order = np.arange(images * rows * columns).reshape(images, 1, rows, columns)
        return np.broadcast_to(order, (images, len(weight), rows, columns))

    def _merged(self, first: Array, name: str) -> Array | None:
        """Return the numbers of tokens of the next stage, if rows are four neighbors side by side."""
        rows = first[..., :: first.shape[-1] // 4]
        if (rows == rows[..., :1]).all():
            return None
        count, columns = math.prod(self.grid), self.grid[1]
        first_row, first_column = np.divmod(rows[..., 0] % count, columns)
        image, place = np.divmod(rows.max(axis=-1), count)
        row, column = np.divmod(place, columns)
        for quarter, (down, right) in enumerate(((0, 0), (1, 0), (0, 1), (1, 1))):
            inside = (rows[..., quarter] >= 0) & (rows[..., 0] >= 0)
            wanted = rows[..., 0] + down * columns + right
            fits = (first_row % 2 == 0) & (first_column % 2 == 0) & (rows[..., quarter] == wanted)
            if (inside & ~fits).any():
                self.broken.append(name)
                break
        self.grid = -(-self.grid[0] // 2), -(-self.grid[1] // 2)
        number = image * math.prod(self.grid) + row // 2 * self.grid[1] + column // 2
        return np.where(rows.max(axis=-1) < 0, PAD, number)[..., None]

    def _moved(self, node: Any, read: list[Array | None], first: Array) -> list[Array | None]:
        graph, op = self.graph, node.op_type
        if op == "Identity":
            return [first]
        if op == "Transpose":
            return [first.transpose(graph.attribute(node, "perm", list(range(first.ndim))[::-1]))]
        if op == "Reshape":
            if not graph.is_constant(node.input[1]):
                return [None]
            shape = graph.constant(node.input[1]).tolist()
            shape = [first.shape[axis] if side == 0 else side for axis, side in enumerate(shape)]
            return [first.reshape(shape)]
        if op == "Flatten":
            axis = graph.attribute(node, "axis", 1)
            return [first.reshape(math.prod(first.shape[:axis]), -1)]
        if op == "Gather" and graph.is_constant(node.input[1]) and read[0] is not None:
            return [self._gathered(node, first)]
        feeds = {}
        for name, one in zip(node.input, read, strict=True):
            if name and one is None and not graph.is_constant(name):
                return [None] * len(node.output)
            if name:
                feeds[name] = one if one is not None else graph.constant(name)
        if op == "Concat":
            shapes = {one.ndim for one in feeds.values()}
            if len(shapes) > 1:
                return [None]
            parts = [one if place is not None else np.full(one.shape, PAD)
                     for one, place in zip(feeds.values(), [self.values.get(n) for n in feeds], strict=True)]  # fmt: skip
            if len(parts) != len(node.input):  # the same tensor twice
                parts = [feeds[name] for name in node.input]
            return [np.concatenate(parts, axis=graph.attribute(node, "axis", 0))]
        if op == "Pad":
            pads = feeds[node.input[1]].tolist() if len(node.input) > 1 else graph.attribute(node, "pads")
            half = len(pads) // 2
            axes = feeds[node.input[3]].tolist() if len(node.input) > 3 and node.input[3] else range(half)
            widths = [(0, 0)] * first.ndim
            for place, axis in enumerate(axes):
                widths[axis] = (max(pads[place], 0), max(pads[half + place], 0))
            return [np.pad(first, widths, constant_values=PAD)]
        found = graph._evaluate(node, feeds)
        return list(found)
