"""The projection to query, key and value, prepared for one scale for all its weights, and without a bias.

The compiler hands the outputs of the projection to the attention in place only where all three have one scale and no bias. So
their weights are brought to one size: what makes a query's row larger makes the same row of the key smaller, which leaves
their products as they are, and what makes a value's row larger makes the same column of the next projection smaller.

The query's bias, in Swin V1, moves into the LayerNorm in front, as in `qkv_without_bias.py`, with two differences: the other
channels keep their norm's weight and bias, for which their range was measured, and the constant channel is that range, not 1,
so that what its weight is rounded by counts least.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .attention import Attention, attentions, constant
from .base import Graph
from .qkv_without_bias import _restore_padding

LARGEST_FACTOR = 64.0  # no row is made this many times larger or smaller, or more


def balanced_attention(graph: Graph, values_by_row: bool) -> dict[str, float]:
    """By the name of each rewritten attention's scope, the factor by which what enters its projection grew.

    With `values_by_row` each row of the values has its own factor, and then there is no single one: the result is 1.
    """
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
        attention.qkv.inputs[1] = constant(f"{attention.qkv.name}_balanced", weight * factor[:, None])
        if bias is not None:
            attention.qkv.inputs[2] = constant(f"{attention.qkv.name}_balanced_bias", bias * factor)
        after = np.asarray(projection.inputs[1].values, np.float64) / grown
        projection.inputs[1] = constant(f"{projection.name}_balanced", after)
        factors[attention.scope] = 1.0 if values_by_row else float(grown[0])
    return factors


def query_bias_in_channel(graph: Graph, amplitudes: Mapping[str, float]) -> int:
    """The number of attentions of V1 whose query bias, if there is one, is now a weight of a constant channel.

    `amplitudes` has the range of each projection's input, by the projection's name; 1 where it has none. The value's
    bias is gone already (`value_bias_in_projection`); the key's goes.
    """
    count = 0
    for attention in attentions(graph):
        if attention.is_cosine:
            continue
        count += 1
        bias, norm, keep = attention.bias(), attention.qkv.i(), None
        if bias is None:
            continue
        if norm.op == "Reshape":  # padding is zeroed behind the norm: Reshape, Mul, Reshape
            keep, norm = norm.i().inputs[1].values, norm.i().i().i()
        channels = len(bias) // 3
        query, bias[channels:] = bias[:channels].copy(), 0
        _constant_channel(attention, norm, bias, amplitudes.get(attention.qkv.name, 1.0))
        if keep is not None and attention.probabilities_are_read:
            _restore_padding(graph, attention, query, keep)
    return count


def _constant_channel(attention: Attention, norm: Any, bias: NDArray[Any], value: float) -> None:
    """What a LayerNorm hands on adds up to 0 before its weight and bias, so that one channel can be told from the others."""
    weight = attention.weight()
    scale, *shifts = (np.asarray(tensor.values, np.float64) for tensor in norm.inputs[1:3])
    shift = sum(shifts, np.zeros(len(scale)))
    one = int(np.argmin(np.abs(scale) * np.abs(weight).max(axis=0)))
    others = np.arange(len(scale)) != one
    share = np.divide(scale[one], scale, out=np.zeros_like(scale), where=others & (scale != 0))
    lost = weight[:, one].copy()
    weight -= lost[:, None] * share
    weight[:, one] = (bias + lost * (shift[one] + share @ shift)) / value
    attention.qkv.inputs = [attention.qkv.inputs[0], constant(f"{attention.qkv.name}_weight", weight)]
    norm.inputs = [
        norm.inputs[0],
        constant(f"{norm.name}_scale", np.where(others, scale, 0)),
        constant(f"{norm.name}_bias", np.where(others, shift, value)),
    ]


def _limited(factors: NDArray[Any]) -> NDArray[Any]:
    return np.asarray(np.clip(factors, 1 / LARGEST_FACTOR, LARGEST_FACTOR))
