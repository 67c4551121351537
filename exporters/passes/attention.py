"""Find the attention of every block, and prepare its projection to query, key and value for GPU compilers.

TensorRT makes one kernel of three matmuls that share their input, but only without biases and, in 8 bits, with one weight
scale. docs/design/engine-graphs.md says where the biases go. For one scale, rows get the same amax: a factor on a row of the
query is undone in the same row of the key, and one on a row of the value in the same column of the output projection.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from swin_deploy.options import Array

from .base import Graph, Node, Pass, add_after, blocks, constant

MAX_FACTOR = 64.0  # limits how much a row is scaled up or down


@dataclass(frozen=True)
class AttentionNodes:
    """The nodes of one attention. `query` and `key` are Transposes to [windows, batch, heads, tokens, head width]."""

    qkv: Node
    query: Node
    key: Node
    matmul: Node
    softmax: Node
    projection: Node

    @property
    def scope(self) -> str:
        """The attention's module, the prefix of the names of new nodes."""
        return str(self.matmul.name).rpartition("/")[0]

    @property
    def value(self) -> Node:
        """The Transpose of the values."""
        return next(node.i(1) for node in self.softmax.outputs[0].outputs if node.op == "MatMul")

    @property
    def heads(self) -> int:
        return int(self.query.outputs[0].shape[2])

    @property
    def is_cosine(self) -> bool:
        """Whether queries and keys are normalised, as in V2."""
        return bool(self.matmul.i(0).op == "Mul")

    def weight(self) -> Array:
        """[3 * channels, channels], float64."""
        return np.asarray(self.qkv.inputs[1].values, dtype=np.float64)

    def bias(self) -> Array | None:
        """[3 * channels], float64; None if the projection has none."""
        return np.asarray(self.qkv.inputs[2].values, dtype=np.float64) if len(self.qkv.inputs) == 3 else None

    def value_bias(self) -> Array | None:
        bias = self.bias()
        return None if bias is None else bias[2 * len(bias) // 3 :]


def attentions(graph: Graph) -> Iterator[AttentionNodes]:
    """Yield every attention of `graph` that has the nodes listed in `AttentionNodes`."""
    for softmax in [node for node in graph.nodes if node.op == "Softmax"]:
        matmul = softmax
        while matmul is not None and matmul.op != "MatMul":
            matmul = _writer(matmul)
        context = next((node for node in softmax.outputs[0].outputs if node.op == "MatMul"), None)
        projection = _only_reader(context, 0, "Transpose", "Reshape", "Gemm")
        value = None if context is None else _writer(context, 1)
        split = _writer(_writer(value))
        qkv = _writer(split)
        if [node.op if node else "" for node in (value, split, qkv)] != ["Transpose", "Split", "Gemm"] or matmul is None:
            continue
        query, key = (_only_reader(split, part, "Reshape", "Transpose") for part in (0, 1))
        if query is not None and key is not None and projection is not None:
            yield AttentionNodes(qkv, query, key, matmul, softmax, projection)


def _writer(node: Node | None, position: int = 0) -> Node | None:
    """The node that writes input `position` of `node`."""
    return node.inputs[position].inputs[0] if node is not None and node.inputs[position].inputs else None


def _only_reader(node: Node | None, output: int, *operators: str) -> Node | None:
    """The last of a chain of nodes with these operators, each the only reader of the one before."""
    for operator in operators:
        readers = [] if node is None else node.outputs[output].outputs
        node, output = (readers[0], 0) if len(readers) == 1 and readers[0].op == operator else (None, 0)
    return node


def value_bias_in_projection(graph: Graph) -> int:
    """Move the value bias of each attention into the output projection. Returns the number of attentions."""
    found = list(attentions(graph))
    for attention in found:
        if (bias := attention.bias()) is None:
            continue
        weight, *projected = (np.asarray(tensor.values, dtype=np.float64) for tensor in attention.projection.inputs[1:])
        value = bias[2 * len(bias) // 3 :]
        moved = sum(projected, weight @ value)  # a bias of zeros is not in the graph
        attention.projection.inputs = [*attention.projection.inputs[:2], constant(f"{attention.projection.name}_bias", moved)]
        value[:] = 0
        attention.qkv.inputs[2] = constant(f"{attention.qkv.name}_bias", bias)
    return len(found)


def query_bias_in_norm(graph: Graph) -> int:
    """Move the query bias of each V1 attention into the LayerNorm before. Returns the number of attentions."""

    def fold(weight: Array, bias: Array, scale: Array, shift: Array, name: str) -> tuple[Array, Array, Array]:
        bias = bias + weight @ shift
        weight = weight * scale
        one = int(np.argmin(np.linalg.norm(weight, axis=0)))  # the channel whose weights change the others' least
        weight -= weight[:, one : one + 1]
        weight[:, one] = bias
        unit = np.arange(len(scale)) == one
        return weight, ~unit, unit

    return _move_query_bias(graph, fold)


def query_bias_in_channel(graph: Graph, amax: Mapping[str, float]) -> int:
    """Move the query bias of each V1 attention, after the value's, into a constant channel. Returns the number of attentions.

    It is as large as the input's `amax`, by projection: that keeps the range, and the rounding error of its weights small.
    """

    def fold(weight: Array, bias: Array, scale: Array, shift: Array, name: str) -> tuple[Array, Array, Array]:
        value = amax.get(name, 1.0)
        one = int(np.argmin(np.abs(scale) * np.abs(weight).max(axis=0)))
        others = np.arange(len(scale)) != one
        share = np.divide(scale[one], scale, out=np.zeros_like(scale), where=others & (scale != 0))
        lost = weight[:, one].copy()
        weight -= lost[:, None] * share
        weight[:, one] = (bias + lost * (shift[one] + share @ shift)) / value
        return weight, np.where(others, scale, 0), np.where(others, shift, value)

    return _move_query_bias(graph, fold)


# (weight [3 * channels, channels], bias [3 * channels], scale and shift of the norm [channels], name of the projection) -> the
# weight of a projection without bias, and the scale and shift of the norm before it.
Fold = Callable[[Array, Array, Array, Array, str], tuple[Array, Array, Array]]


def _move_query_bias(graph: Graph, fold: Fold) -> int:
    found = [attention for attention in attentions(graph) if not attention.is_cosine]
    for attention in found:
        bias, norm, keep = attention.bias(), attention.qkv.i(), None
        if bias is None:
            continue
        if norm.op == "Reshape":  # padding is zeroed after the norm: Reshape, Mul, Reshape
            keep, norm = norm.i().inputs[1].values, norm.i().i().i()
        scale, *shifts = (np.asarray(tensor.values, np.float64) for tensor in norm.inputs[1:3])
        query = bias[: len(scale)].copy()
        bias[len(scale) :] = 0
        shift = sum(shifts, np.zeros(len(scale)))
        weight, new_scale, new_shift = fold(attention.weight(), bias, scale, shift, attention.qkv.name)
        attention.qkv.inputs = [attention.qkv.inputs[0], constant(f"{attention.qkv.name}_weight", weight)]
        scales = constant(f"{norm.name}_scale", new_scale), constant(f"{norm.name}_bias", new_shift)
        norm.inputs = [norm.inputs[0], *scales]
        if keep is not None and len(attention.softmax.outputs[0].outputs) > 1:  # probabilities are an output of the graph, too
            _restore_padding(graph, attention, query, keep)
    return len(found)


def _restore_padding(graph: Graph, attention: AttentionNodes, bias: Array, keep: Array) -> None:
    """Give the queries of padding their bias back: only the attention probabilities depend on them."""
    windows, _, heads, tokens, width = attention.query.outputs[0].shape
    padding = (1 - keep).reshape(tokens, windows).T[:, None, None, :, None]
    lost = constant(f"{attention.scope}/padding_queries", padding * bias.reshape(heads, 1, width))
    add_after(graph, attention.query, lost)


def equalized_attention(graph: Graph, values_by_row: bool) -> dict[str, float]:
    """Scale the rows of each V1 projection to one amax. Returns by `scope` how much larger the next input becomes."""
    factors: dict[str, float] = {}
    for attention in attentions(graph):
        if attention.is_cosine:
            continue
        weight, bias = attention.weight(), attention.bias()
        rows = np.maximum(np.abs(weight).max(axis=1).reshape(3, -1), 1e-12)
        even = _limited(np.sqrt(rows[1] / rows[0]))
        largest = max((rows[0] * even).max(), (rows[1] / even).max())
        grown = _limited(largest / (rows[2] if values_by_row else np.full_like(rows[2], rows[2].max())))
        factor = np.concatenate([even, 1 / even, grown])
        projection = attention.projection
        attention.qkv.inputs[1] = constant(f"{attention.qkv.name}_equalized", weight * factor[:, None])
        if bias is not None:
            attention.qkv.inputs[2] = constant(f"{attention.qkv.name}_equalized_bias", bias * factor)
        after = np.asarray(projection.inputs[1].values, np.float64) / grown
        projection.inputs[1] = constant(f"{projection.name}_equalized", after)
        factors[attention.scope] = 1.0 if values_by_row else float(grown[0])
    return factors


def _limited(factors: Any) -> Array:
    return np.asarray(np.clip(factors, 1 / MAX_FACTOR, MAX_FACTOR))


ATTENTIONS = Pass("attentions", lambda graph: sum(1 for _ in attentions(graph)), lambda config: config.blocks)
VALUE_BIAS_IN_PROJECTION = Pass("value_bias_in_projection", value_bias_in_projection, lambda config: config.blocks)
QUERY_BIAS_IN_NORM = Pass("query_bias_in_norm", query_bias_in_norm, blocks(1))


def unfused(model: Any) -> Any:
    """Return a copy of an ONNX model whose attention TensorRT does not fuse: a Relu, an identity here, reads each softmax."""
    from onnx import ModelProto, helper

    copy = ModelProto.FromString(model.SerializeToString())
    for index in reversed([index for index, node in enumerate(copy.graph.node) if node.op_type == "Softmax"]):
        softmax = copy.graph.node[index]
        probabilities, softmax.output[0] = softmax.output[0], f"{softmax.output[0]}/unfused"
        copy.graph.node.insert(
            index + 1, helper.make_node("Relu", [softmax.output[0]], [probabilities], f"{softmax.name}/unfused")
        )
    return copy
