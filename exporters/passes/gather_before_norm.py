"""LayerNorm (and, in Swin V2, the addition to the tokens), then another order of tokens -> first the order, then the rest.

A reduction and what follows it is one kernel only while every row stays where it is: with the gather behind, TensorRT writes
the rows once more, in fp32, between two kernels. Reading rows in another order costs nothing.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from swin_deploy.config import SwinConfig

from .base import Graph, Pass


def rewrite(graph: Graph) -> int:
    """The number of LayerNorms of patches and of V2's branches; behind none of them is a gather left that could go."""
    count = 0
    for norm in [node for node in graph.nodes if node.op == "LayerNormalization"]:
        add = _addition(norm)
        if add is None and not _is_of_patches(norm):
            continue
        count += 1
        end = norm if add is None else add
        chain = _gather_behind(end)
        if not chain:
            continue
        norm.inputs[0] = _copied(graph, chain, norm.inputs[0])
        norm.outputs[0].shape = chain[-1].outputs[0].shape
        if add is not None:
            tokens = 1 - add.inputs.index(norm.outputs[0])
            add.inputs[tokens] = _copied(graph, chain, add.inputs[tokens])
            add.outputs[0].shape = chain[-1].outputs[0].shape
        old, new = chain[-1].outputs[0], end.outputs[0]
        chain[0].inputs.clear()
        for reader in list(old.outputs):
            reader.inputs = [new if tensor is old else tensor for tensor in reader.inputs]
    return count


def _addition(norm: Any) -> Any:
    """The node that adds what `norm` writes to the tokens, if nothing else reads it; None where there is none."""
    reader, *others = norm.outputs[0].outputs or [None]
    if others or reader is None or reader.op != "Add":
        return None
    return None if any(isinstance(getattr(tensor, "values", None), np.ndarray) for tensor in reader.inputs) else reader


def _is_of_patches(norm: Any) -> bool:
    node = norm
    for op in ("Transpose", "Reshape", "Conv"):
        node = node.i() if node.inputs[0].inputs else None
        if node is None or node.op != op:
            return False
    return True


def _gather_behind(node: Any) -> list[Any]:
    """The Reshape, Gather and Reshape that alone read what `node` writes; empty where there are none."""
    chain = [node]
    for op in ("Reshape", "Gather", "Reshape"):
        readers = chain[-1].outputs[0].outputs
        if len(readers) != 1 or readers[0].op != op:
            return []
        chain.append(readers[0])
    return chain[1:]


def _copied(graph: Graph, chain: list[Any], tensor: Any) -> Any:
    """What `chain` makes of `tensor`, by nodes of its own."""
    import onnx_graphsurgeon as gs

    for node in chain:
        name = f"{node.name}_{len(graph.nodes)}"
        result = gs.Variable(f"{name}_output", node.outputs[0].dtype, node.outputs[0].shape)
        graph.nodes.append(gs.Node(node.op, name, dict(node.attrs), [tensor, *node.inputs[1:]], [result]))
        tensor = result
    return tensor


def expected(config: SwinConfig) -> int:
    return int(config.patch_norm) + (2 * config.blocks if config.version == 2 else 0)


GATHER_BEFORE_NORM = Pass("gather_before_norm", rewrite, expected)
