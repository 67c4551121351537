"""Swin V2's cosine attention: unit queries times unit keys -> queries times keys, divided by their lengths.

Divided first, query and key are written twice in fp32, by two kernels of their own. Divided last, the division takes place
inside the fused attention, which reads the squared lengths; one kernel before it computes these and adds the query's bias.

The products then are as large as queries and keys are, and the largest fp16 is 65504. Cosines do not change when all queries
or all keys of a head are multiplied by one number, so each head's weights are multiplied by a power of two, which rounds
nothing, such that no query or key can be longer than LONGEST: what a LayerNorm hands on is no longer than its weights
allow, and V2's tokens are sums of such. Zeros (padding's keys) stay zeros: 0 / FLOOR.
"""

from __future__ import annotations

from collections.abc import Set
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .attention import Attention, add_behind, attentions, constant
from .base import Graph, Pass
from .row_l2_norms import row_lengths

LONGEST = 128.0
FLOOR = 1e-30  # a product of two squared lengths; the least of two fp16 vectors that are not 0 is 1e-29


def rewrite(graph: Graph) -> int:
    """The number of attentions rewritten."""
    lengths = row_lengths(graph)
    count = 0
    for attention in attentions(graph):
        scaled = attention.product.i(0)
        longest = lengths.get(attention.qkv.inputs[0].name)
        if not attention.is_cosine or longest is None:
            continue
        for part, transpose in enumerate((attention.query, attention.key)):
            bias = _limit(attention, part, longest)
            if bias is not None and bias.any():
                add_behind(graph, transpose, constant(f"{attention.scope}/bias_{'qk'[part]}", bias))
        attention.qkv.inputs = attention.qkv.inputs[:2]
        _divide_last(graph, attention, scaled.inputs[1])
        count += 1
    return count


def islands(graph: Graph) -> Set[str]:
    """The names of the nodes that must stay fp32: all between the squares and the scaled cosines."""
    names: set[str] = set()
    for total in [node for node in graph.nodes if node.op == "ReduceSum"]:
        ahead = [total.i(), total]
        while ahead:
            node = ahead.pop()
            if node.op != "Add" and node.name not in names:
                names.add(node.name)
                ahead.extend(reader for tensor in node.outputs for reader in tensor.outputs if node is not total.i())
    return names


def _limit(attention: Attention, part: int, longest: float) -> NDArray[Any] | None:
    """Shrinks the weights of every head's queries or keys as far as needed; returns their bias [heads, 1, head width]."""
    weight, bias, heads = attention.weight(), attention.bias(), attention.heads
    channels = weight.shape[1]
    mine = weight[part * channels : (part + 1) * channels].reshape(heads, -1, channels)
    added = np.zeros(mine.shape[:2]) if bias is None else bias[part * channels : (part + 1) * channels].reshape(heads, -1)
    reach = np.sqrt(np.linalg.eigvalsh(mine @ mine.transpose(0, 2, 1))[:, -1]) * longest + np.linalg.norm(added, axis=1)
    factor = np.exp2(np.floor(np.minimum(np.log2(LONGEST / np.maximum(reach, 1e-30)), 0)))[:, None]
    mine *= factor[..., None]
    attention.qkv.inputs[1] = constant(attention.qkv.inputs[1].name + "_", weight)
    return np.asarray((added * factor)[:, None])


def _divide_last(graph: Graph, attention: Attention, scale: Any) -> None:
    import onnx_graphsurgeon as gs

    def layer(op: str, *inputs: Any, outputs: int = 1, **attributes: Any) -> Any:
        names = [f"{attention.scope}/cosine_{op}{len(graph.nodes)}_{index}" for index in range(outputs)]
        made = graph.layer(
            name=f"{attention.scope}/Cosine{op}{len(graph.nodes)}", op=op, inputs=list(inputs), attrs=attributes,
            outputs=[gs.Variable(name, np.dtype(np.float32)) for name in names],
        )  # fmt: skip
        return made if outputs > 1 else made[0]

    query, key = (_last(transpose).outputs[0] for transpose in (attention.query, attention.key))
    swapped = [0, 1, 2, 4, 3]
    both = layer("Concat", query, key, axis=2)
    squares = layer("ReduceSum", layer("Mul", both, both), gs.Constant(f"{attention.scope}/axis", np.array([-1])), keepdims=1)
    of_query, of_key = layer("Split", squares, outputs=2, axis=2, num_outputs=2)
    product = layer("MatMul", query, layer("Transpose", key, perm=swapped))
    area = layer("Mul", of_query, layer("Transpose", of_key, perm=swapped))
    length = layer("Sqrt", layer("Max", area, constant(f"{attention.scope}/floor", np.array(FLOOR))))
    cosine = layer("Mul", layer("Div", product, length), scale)
    attention.product.outputs[0].outputs[0].inputs[0] = cosine


def _last(transpose: Any) -> Any:
    """The node that writes what all others read: `transpose`, or the addition of its bias."""
    readers = transpose.outputs[0].outputs
    return readers[0] if len(readers) == 1 and readers[0].op == "Add" else transpose


COSINE_AFTER_PRODUCT = Pass("cosine_after_product", rewrite, lambda config: config.blocks if config.version == 2 else 0)
