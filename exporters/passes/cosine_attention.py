"""Swin V2's cosine attention, in the layout that each target executes fastest.

TensorRT: query times key, divided by their L2 norms, so that the division is part of the fused attention. fp16 ends at 65504,
so the weights of each head are multiplied by a power of two, which rounds nothing and changes no cosine, such that no query or
key has an L2 norm above MAX_L2_NORM. Zeros (the keys of padding) stay zeros: 0 / FLOOR. OpenVINO: an RMS norm.
"""

from __future__ import annotations

import math
from collections.abc import Set
from typing import Any

import numpy as np

from swin_deploy.options import Array

from .attention import AttentionNodes, attentions
from .base import Graph, Node, Pass, Tensor, add_after, add_node, blocks, constant

MAX_L2_NORM = 128.0
FLOOR = 1e-30  # of a product of two squared L2 norms; the smallest of two nonzero fp16 vectors is 1e-29
MAX_PIXEL = 16.0  # no preprocessing in use gives larger values; ImageNet's gives 2.64 at most


def cosine_after_matmul(graph: Graph) -> int:
    """Divide by the L2 norms after query times key. Returns the number of attentions rewritten."""
    bounds = l2_norm_bounds(graph)
    count = 0
    for attention in attentions(graph):
        scaled = attention.matmul.i(0)
        longest = bounds.get(attention.qkv.inputs[0].name)
        if not attention.is_cosine or longest is None:
            continue
        for part, transpose in enumerate((attention.query, attention.key)):
            bias = _limit(attention, part, longest)
            if bias is not None and bias.any():
                add_after(graph, transpose, constant(f"{attention.scope}/bias_{'qk'[part]}", bias))
        attention.qkv.inputs = attention.qkv.inputs[:2]
        _divide_last(graph, attention, scaled.inputs[1])
        count += 1
    return count


def cosine_fallback(graph: Graph) -> Set[str]:
    """Return the names of the nodes that must stay fp32: all between the squares and the scaled cosines."""
    names: set[str] = set()
    for total in [node for node in graph.nodes if node.op == "ReduceSum"]:
        ahead = [total.i(), total]
        while ahead:
            node = ahead.pop()
            if node.op != "Add" and node.name not in names:
                names.add(node.name)
                ahead.extend(reader for tensor in node.outputs for reader in tensor.outputs if node is not total.i())
    return names


def _limit(attention: AttentionNodes, part: int, longest: float) -> Array | None:
    """Shrink the weights of every head's queries or keys as far as needed; returns their bias [heads, 1, head width]."""
    weight, bias, heads = attention.weight(), attention.bias(), attention.heads
    channels = weight.shape[1]
    mine = weight[part * channels : (part + 1) * channels].reshape(heads, -1, channels)
    added = np.zeros(mine.shape[:2]) if bias is None else bias[part * channels : (part + 1) * channels].reshape(heads, -1)
    reach = np.sqrt(np.linalg.eigvalsh(mine @ mine.transpose(0, 2, 1))[:, -1]) * longest + np.linalg.norm(added, axis=1)
    factor = np.exp2(np.floor(np.minimum(np.log2(MAX_L2_NORM / np.maximum(reach, 1e-30)), 0)))[:, None]
    mine *= factor[..., None]
    attention.qkv.inputs[1] = constant(f"{attention.qkv.name}_weight", weight)
    return np.asarray((added * factor)[:, None])


def _divide_last(graph: Graph, attention: AttentionNodes, scale: Tensor) -> None:
    import onnx_graphsurgeon as gs

    def node(op: str, *inputs: Tensor, **attributes: Any) -> Tensor:
        number = len(graph.nodes)
        output = f"{attention.scope}/cosine_{op}{number}_0"
        return add_node(graph, f"{attention.scope}/Cosine{op}{number}", op, inputs, output, **attributes)

    query, key = (_last(transpose).outputs[0] for transpose in (attention.query, attention.key))
    swapped = [0, 1, 2, 4, 3]
    both = node("Concat", query, key, axis=2)
    axis = constant(f"{attention.scope}/axis", [-1], np.int64)
    squares = node("ReduceSum", node("Mul", both, both), axis, keepdims=1)
    of_query = node("Split", squares, axis=2, num_outputs=2)
    of_key = gs.Variable(of_query.name[:-1] + "1", np.dtype(np.float32))
    of_query.inputs[0].outputs = [of_query, of_key]
    matmul = node("MatMul", query, node("Transpose", key, perm=swapped))
    area = node("Mul", of_query, node("Transpose", of_key, perm=swapped))
    l2_norms = node("Sqrt", node("Max", area, constant(f"{attention.scope}/floor", [FLOOR])))
    cosine = node("Mul", node("Div", matmul, l2_norms), scale)
    attention.matmul.outputs[0].outputs[0].inputs[0] = cosine


def _last(transpose: Node) -> Node:
    """The node whose output all others read: `transpose`, or the addition of its bias."""
    readers = transpose.outputs[0].outputs
    return readers[0] if len(readers) == 1 and readers[0].op == "Add" else transpose


def l2_norm_bounds(graph: Graph) -> dict[str, float]:
    """Bound the L2 norm of the rows of tensors of tokens, by name, whatever the image: weights and LayerNorm limit it."""
    found: dict[str, float] = {}
    for node in graph.nodes:  # in topological order
        bound = _l2_norm_bound(node, [_known_bound(tensor, found) for tensor in node.inputs])
        if bound is not None:
            found[node.outputs[0].name] = bound
    return found


def _l2_norm_bound(node: Node, inputs: list[float | None]) -> float | None:
    if node.op == "LayerNormalization":
        scale, *shift = (np.asarray(tensor.values, dtype=np.float64) for tensor in node.inputs[1:3])
        return float(np.abs(scale).max() * math.sqrt(len(scale)) + sum(np.linalg.norm(s) for s in shift))
    if node.op == "Conv":  # patches do not overlap
        weight = np.asarray(node.inputs[1].values, dtype=np.float64).reshape(len(node.inputs[1].values), -1)
        bias = np.linalg.norm(node.inputs[2].values) if len(node.inputs) > 2 else 0.0
        return float(np.linalg.norm(weight, 2) * MAX_PIXEL * math.sqrt(weight.shape[1]) + bias)
    if node.op in ("Reshape", "Transpose", "Gather"):
        return inputs[0]
    if node.op == "Where":
        return None if inputs[1] is None or inputs[2] is None else max(inputs[1], inputs[2])
    if node.op in ("Add", "Mul"):
        if inputs[0] is None or inputs[1] is None:
            return None
        return inputs[0] + inputs[1] if node.op == "Add" else inputs[0] * float(np.abs(node.inputs[1].values).max())
    return None


def _known_bound(tensor: Tensor, found: dict[str, float]) -> float | None:
    values = getattr(tensor, "values", None)
    if isinstance(values, np.ndarray) and values.dtype == np.float32 and values.ndim:
        return float(np.linalg.norm(values, axis=-1).max())
    return found.get(tensor.name)


def l2_norm_as_rms_norm(graph: Graph) -> int:
    """Turn divisions by the L2 norm into divisions by the root mean square. A zero stays zero.

    Returns the number of operands of matmuls that are divided. Equal queries and keys are one tensor with one division.
    """
    count = 0
    for divide in [node for node in graph.nodes if node.op == "Div"]:
        x, chain = divide.inputs[0], _writers(divide.inputs[1], "Clip", "Sqrt", "ReduceSum", "Mul")
        if not chain or any(tensor is not x for tensor in chain[-1].inputs):
            continue
        clip, width = chain[0], x.shape[-1]
        least = float(clip.inputs[1].values) ** 2 / width
        count += _operands(divide.outputs[0])

        def node(op: str, *inputs: Tensor, name: str = divide.name, **attributes: int) -> Tensor:
            return add_node(graph, f"{name}/{op}", op, inputs, f"{name}/{op}", **attributes)

        square = node("Pow", x, constant(f"{divide.name}/two", [2]))
        mean = node("ReduceMean", square, constant(f"{divide.name}/axis", [-1], np.int64), keepdims=1)
        root = node("Sqrt", node("Add", mean, constant(f"{divide.name}/least", [least])))
        inverse = node("Div", constant(f"{divide.name}/one", [1]), root)
        even = constant(f"{divide.name}/even", np.full(width, width**-0.5))
        divide.op, divide.inputs = "Mul", [node("Mul", x, inverse), even]
    return count


def _writers(tensor: Tensor, *operators: str) -> list[Node]:
    """The nodes with these operators that compute `tensor`, the last one first; empty if others do."""
    nodes: list[Node] = []
    for operator in operators:
        if not tensor.inputs or tensor.inputs[0].op != operator:
            return []
        nodes.append(tensor.inputs[0])
        tensor = nodes[-1].inputs[0]
    return nodes


def _operands(tensor: Tensor) -> int:
    """The number of operands of matmuls that are made of `tensor`; 1 for an output of the graph."""
    total = 0
    for reader in tensor.outputs:
        total += sum(one is tensor for one in reader.inputs) if reader.op == "MatMul" else _operands(reader.outputs[0])
    return total or 1


COSINE_AFTER_MATMUL = Pass("cosine_after_matmul", cosine_after_matmul, blocks(2))
L2_NORM_AS_RMS_NORM = Pass("l2_norm_as_rms_norm", l2_norm_as_rms_norm, lambda config: 2 * blocks(2)(config))
