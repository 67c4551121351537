"""Where the parts of every block's attention stand in a graph, for the rewrites that change it.

Every export counts them, so that a graph that no engine could be made of is known as such from the beginning.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .base import Graph, Pass

Node = Any  # onnx_graphsurgeon.Node


@dataclass(frozen=True)
class Attention:
    """The nodes of one attention: Gemm, Split, then for each part Reshape and Transpose, two products, and Gemm.

    `query` and `key` are the Transposes behind the Split, to [windows, batch, heads, tokens, head width]; `product` is query
    times key.
    """

    qkv: Node
    query: Node
    key: Node
    product: Node
    softmax: Node
    projection: Node

    @property
    def scope(self) -> str:
        """The attention's module, with which the names of new nodes start."""
        return str(self.product.name).rpartition("/")[0]

    @property
    def heads(self) -> int:
        return int(self.query.outputs[0].shape[2])

    @property
    def probabilities_are_read(self) -> bool:
        """Whether they are also an output of the graph."""
        return len(self.softmax.outputs[0].outputs) > 1

    @property
    def is_cosine(self) -> bool:
        """Whether queries and keys are normalised, as V2 does it."""
        return bool(self.product.i(0).op == "Mul")

    def weight(self) -> NDArray[np.float64]:
        """[3 * channels, channels], in double precision because it is to be computed with."""
        return np.asarray(self.qkv.inputs[1].values, dtype=np.float64)

    def bias(self) -> NDArray[np.float64] | None:
        """[3 * channels]; None when the projection has none."""
        return np.asarray(self.qkv.inputs[2].values, dtype=np.float64) if len(self.qkv.inputs) == 3 else None


def attentions(graph: Graph) -> Iterator[Attention]:
    """Every attention of `graph` that has the form described there."""
    for softmax in [node for node in graph.nodes if node.op == "Softmax"]:
        product = softmax
        while product is not None and product.op != "MatMul":
            product = _before(product)
        context = next((node for node in softmax.outputs[0].outputs if node.op == "MatMul"), None)
        projection = _behind(context, 0, "Transpose", "Reshape", "Gemm")
        value = None if context is None else _before(context, 1)
        split = _before(_before(value))
        qkv = _before(split)
        if [node.op if node else "" for node in (value, split, qkv)] != ["Transpose", "Split", "Gemm"] or product is None:
            continue
        query, key = (_behind(split, part, "Reshape", "Transpose") for part in (0, 1))
        if query is not None and key is not None and projection is not None:
            yield Attention(qkv, query, key, product, softmax, projection)


def _before(node: Node | None, position: int = 0) -> Node | None:
    """The node that writes input `position` of `node`."""
    return node.inputs[position].inputs[0] if node is not None and node.inputs[position].inputs else None


def _behind(node: Node | None, output: int, *operators: str) -> Node | None:
    """The last of the nodes of these operators, each the only reader of the one before."""
    for operator in operators:
        readers = [] if node is None else node.outputs[output].outputs
        node, output = (readers[0], 0) if len(readers) == 1 and readers[0].op == operator else (None, 0)
    return node


def constant(name: str, values: NDArray[Any]) -> Any:
    """A float32 constant."""
    import onnx_graphsurgeon as gs

    return gs.Constant(name, np.ascontiguousarray(values, dtype=np.float32))


def add_behind(graph: Graph, node: Node, values: Any) -> None:
    """Adds the constant `values` to what `node` writes, for all who read it."""
    import onnx_graphsurgeon as gs

    before = node.outputs[0]
    after = gs.Variable(f"{values.name}_added", before.dtype, before.shape)
    for reader in list(before.outputs):
        reader.inputs = [after if tensor is before else tensor for tensor in reader.inputs]
    graph.nodes.append(gs.Node("Add", f"{values.name}/Add", {}, [before, values], [after]))


ATTENTIONS = Pass("attentions", lambda graph: sum(1 for _ in attentions(graph)), lambda config: config.blocks)
