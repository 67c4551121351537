"""How long the tokens of a graph can be, whatever the image: what weights and the arithmetic of LayerNorm allow."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .base import Graph

BRIGHTEST = 16.0  # no preprocessing that is in use makes a pixel larger; ImageNet's makes it 2.64 at most


def row_lengths(graph: Graph) -> dict[str, float]:
    """For tensors of tokens [..., channels], by name, a length that none of their rows exceeds; others are left out."""
    found: dict[str, float] = {}
    for node in graph.nodes:  # in topological order
        longest = _longest(node, [_length(tensor, found) for tensor in node.inputs])
        if longest is not None:
            found[node.outputs[0].name] = longest
    return found


def _longest(node: Any, inputs: list[float | None]) -> float | None:
    if node.op == "LayerNormalization":
        scale, *shift = (np.asarray(tensor.values, dtype=np.float64) for tensor in node.inputs[1:3])
        return float(np.abs(scale).max() * math.sqrt(len(scale)) + sum(np.linalg.norm(s) for s in shift))
    if node.op == "Conv":  # patches that do not overlap
        weight = np.asarray(node.inputs[1].values, dtype=np.float64).reshape(len(node.inputs[1].values), -1)
        bias = np.linalg.norm(node.inputs[2].values) if len(node.inputs) > 2 else 0.0
        return float(np.linalg.norm(weight, 2) * BRIGHTEST * math.sqrt(weight.shape[1]) + bias)
    if node.op in ("Reshape", "Transpose", "Gather"):
        return inputs[0]
    if node.op == "Where":
        return None if inputs[1] is None or inputs[2] is None else max(inputs[1], inputs[2])
    if node.op in ("Add", "Mul"):
        if inputs[0] is None or inputs[1] is None:
            return None
        return inputs[0] + inputs[1] if node.op == "Add" else inputs[0] * float(np.abs(node.inputs[1].values).max())
    return None


def _length(tensor: Any, found: dict[str, float]) -> float | None:
    values = getattr(tensor, "values", None)
    if isinstance(values, np.ndarray) and values.dtype == np.float32 and values.ndim:
        return float(np.linalg.norm(values, axis=-1).max())
    return found.get(tensor.name)
