"""An ONNX graph run by PyTorch, node by node, in the types that are written in the graph.

ONNX Runtime has few half-precision kernels on a CPU and computes the rest in float32 without rounding in between, so an
overflow could hide there. Here every node's result is rounded to its type, as on a GPU; like a GPU, PyTorch accumulates
matrix products, norms and sums in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import TensorProto, numpy_helper
from torch import Tensor

Arrays = dict[str, np.ndarray[Any, Any]]
Node = Callable[..., Tensor]

TYPES = {
    TensorProto.FLOAT: torch.float32,
    TensorProto.FLOAT16: torch.float16,
    TensorProto.BFLOAT16: torch.bfloat16,
    TensorProto.INT64: torch.int64,
    TensorProto.BOOL: torch.bool,
}


def run(model: onnx.ModelProto, feeds: Mapping[str, np.ndarray[Any, Any]]) -> Arrays:
    """The outputs of `model`, whose weights are inside it. Raises KeyError for an operator that Swin's graphs do not have."""
    values: dict[str, Any] = {"": None}
    for initializer in model.graph.initializer:
        values[initializer.name] = _tensor(initializer)
    for name, feed in feeds.items():
        values[name] = torch.from_numpy(np.ascontiguousarray(feed))
    with torch.no_grad():
        for node in model.graph.node:
            attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            inputs = [values[name] for name in node.input]
            results = OPERATORS[node.op_type](*inputs, **attributes)
            results = results if isinstance(results, tuple) else (results,)
            values.update(zip(node.output, results, strict=True))
    return {output.name: values[output.name].float().numpy() for output in model.graph.output}


def _tensor(initializer: onnx.TensorProto) -> Tensor:
    if initializer.data_type == TensorProto.BFLOAT16:
        return torch.from_numpy(numpy_helper.to_array(initializer).astype(np.float32)).to(torch.bfloat16)
    return torch.from_numpy(numpy_helper.to_array(initializer).copy())


def _reshape(x: Tensor, shape: Tensor, allowzero: int = 0) -> Tensor:
    sizes = [x.shape[i] if size == 0 and not allowzero else size for i, size in enumerate(shape.tolist())]
    return x.reshape(sizes)


def _slice(x: Tensor, start: Tensor, end: Tensor, axes: Tensor, steps: Tensor | None = None) -> Tensor:
    index = [slice(None)] * x.ndim
    every = [1] * len(start) if steps is None else steps.tolist()
    for begin, stop, axis, step in zip(start.tolist(), end.tolist(), axes.tolist(), every, strict=True):
        index[axis] = slice(begin, stop, step)
    return x[tuple(index)]


def _split(x: Tensor, sizes: Tensor | None = None, axis: int = 0, num_outputs: int = 0) -> tuple[Tensor, ...]:
    return torch.split(x, x.shape[axis] // num_outputs if sizes is None else sizes.tolist(), axis)


def _gather(x: Tensor, index: Tensor, axis: int = 0) -> Tensor:
    picked = x.index_select(axis, index.reshape(-1))
    axis %= x.ndim
    return picked.reshape(*x.shape[:axis], *index.shape, *x.shape[axis + 1 :])


def _gemm(a: Tensor, b: Tensor, c: Tensor | None = None, **attributes: Any) -> Tensor:
    assert attributes.get("alpha", 1.0) == attributes.get("beta", 1.0) == 1.0
    assert not attributes.get("transA", 0)
    return F.linear(a, b if attributes.get("transB", 0) else b.T, c)


def _conv(x: Tensor, weight: Tensor, bias: Tensor | None = None, **attributes: Any) -> Tensor:
    pads = attributes.get("pads", [0, 0, 0, 0])
    x = F.pad(x, (pads[1], pads[3], pads[0], pads[2]))
    return F.conv2d(x, weight, bias, stride=attributes.get("strides", 1), groups=attributes.get("group", 1))


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1) -> Tensor:
    assert axis in (-1, x.ndim - 1)
    assert stash_type == 1
    return F.layer_norm(x, weight.shape, weight, bias, epsilon)


def _reduce(function: Callable[..., Tensor]) -> Node:
    def reduced(x: Tensor, axes: Tensor, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Tensor:
        return function(x, dim=axes.tolist(), keepdim=bool(keepdims))

    return reduced


def _gelu(x: Tensor, approximate: bytes = b"none") -> Tensor:
    return F.gelu(x, approximate=approximate.decode())


OPERATORS: dict[str, Callable[..., Any]] = {
    "Add": torch.add,
    "Cast": lambda x, to, saturate=1: x.to(TYPES[to]),
    "Clip": lambda x, low=None, high=None: torch.clamp(x, low, high),
    "Concat": lambda *parts, axis: torch.cat(parts, axis),
    "Constant": lambda value: _tensor(value),
    "Conv": _conv,
    "Div": torch.div,
    "Erf": torch.erf,
    "Gather": _gather,
    "Gelu": _gelu,
    "Gemm": _gemm,
    "Identity": lambda x: x,
    "LayerNormalization": _layer_norm,
    "MatMul": torch.matmul,
    "Max": torch.maximum,
    "Mul": torch.mul,
    "Pow": torch.pow,
    "ReduceL2": _reduce(torch.linalg.vector_norm),
    "ReduceMean": _reduce(torch.mean),
    "ReduceSum": _reduce(torch.sum),
    "Reshape": _reshape,
    "Slice": _slice,
    "Softmax": lambda x, axis=-1: torch.softmax(x, axis),
    "Split": _split,
    "Sqrt": torch.sqrt,
    "Squeeze": lambda x, axes: x.squeeze(axes.tolist()),
    "Sub": torch.sub,
    "Transpose": lambda x, perm: x.permute(perm),
    "Unsqueeze": lambda x, axes: x.reshape(_unsqueezed(x, axes.tolist())),
    "Where": torch.where,
}  # fmt: skip


def _unsqueezed(x: Tensor, axes: list[int]) -> list[int]:
    rank = x.ndim + len(axes)
    rest = iter(x.shape)
    where = {axis % rank for axis in axes}
    return [1 if axis in where else next(rest) for axis in range(rank)]
