"""The projection to query, key and value -> the same without a bias, so that the fused attention reads its output in place.

TensorRT makes one kernel of three products that share their input, and hands its three outputs on as they are; a bias
behind them is one more kernel for each, or, kept within the product, a copy of all three.

- The key's bias adds the same to all scores of a query, which softmax does not see: it goes.
- The value's bias is added to every value, and the probabilities of a query add up to 1: it goes into the next linear layer.
- The query's bias, in Swin V1, moves into the LayerNorm in front. What a LayerNorm hands on, before its weight and bias, adds
  up to 0, so that one channel can be told from the others. That channel is made a constant 1 (its weight becomes 0 and its
  bias 1), and the projection's weights for it become the bias; the other channels' weights make up for its absence.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .attention import Attention, add_behind, attentions, constant
from .base import Graph, Pass


def value_bias_in_projection(graph: Graph) -> int:
    """The number of attentions whose value bias, if they have one, is moved into the linear layer behind."""
    count = 0
    for attention in attentions(graph):
        count += 1
        bias = attention.bias()
        if bias is None:
            continue
        weight, *projected = (np.asarray(tensor.values, dtype=np.float64) for tensor in attention.projection.inputs[1:])
        value = bias[2 * len(bias) // 3 :]
        moved = sum(projected, weight @ value)  # a bias of zeros is not in the graph
        attention.projection.inputs = [*attention.projection.inputs[:2], constant(f"{attention.projection.name}_bias", moved)]
        value[:] = 0
        attention.qkv.inputs[2] = constant(f"{attention.qkv.name}_bias", bias)
    return count


def query_bias_in_norm(graph: Graph) -> int:
    """The number of attentions whose query bias, if they have one, is moved into the LayerNorm in front; the key's goes."""
    count = 0
    for attention in attentions(graph):
        if attention.is_cosine:
            continue
        count += 1
        bias, weight, norm = attention.bias(), attention.weight(), attention.qkv.i()
        if bias is None:
            continue
        keep = None
        if norm.op == "Reshape":  # padding is zeroed behind the norm: Reshape, Mul, Reshape
            keep, norm = norm.i().inputs[1].values, norm.i().i().i()
        scale, *shifts = (np.asarray(tensor.values, dtype=np.float64) for tensor in norm.inputs[1:3])
        channels = len(scale)
        shift = sum(shifts, np.zeros(channels))
        query = bias[:channels].copy()
        bias[channels:] = 0
        bias += weight @ shift
        weight *= scale
        one = int(np.argmin(np.linalg.norm(weight, axis=0)))  # the channel whose weights change the others' least
        weight -= weight[:, one : one + 1]
        weight[:, one] = bias
        unit = np.arange(channels) == one
        attention.qkv.inputs = [attention.qkv.inputs[0], constant(f"{attention.qkv.name}_weight", weight)]
        norm.inputs = [norm.inputs[0], constant(f"{norm.name}_scale", ~unit), constant(f"{norm.name}_bias", unit)]
        if keep is not None and attention.probabilities_are_read:
            _restore_padding(graph, attention, query, keep)
    return count


def _restore_padding(graph: Graph, attention: Attention, bias: NDArray[Any], keep: NDArray[Any]) -> None:
    """Gives the queries of padding their bias back: nothing but the attention probabilities depends on them."""
    windows, _, heads, tokens, width = attention.query.outputs[0].shape
    padding = (1 - keep).reshape(tokens, windows).T[:, None, None, :, None]
    lost = constant(f"{attention.scope}/padding_queries", padding * bias.reshape(heads, 1, width))
    add_behind(graph, attention.query, lost)


VALUE_BIAS_IN_PROJECTION = Pass("value_bias_in_projection", value_bias_in_projection, lambda config: config.blocks)
QUERY_BIAS_IN_NORM = Pass("query_bias_in_norm", query_bias_in_norm, lambda config: config.blocks if config.version == 1 else 0)
