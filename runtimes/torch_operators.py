"""The ONNX operators of exported graphs in PyTorch; each rounds its result to its type in the graph.

`OPERATORS` maps an operator to a function that reads the attributes and constant integers (shapes, axes, sizes) of a node once.
It returns the function of the node, which takes all inputs as tensors, or None for one that is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, reduce
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from onnx import TensorProto
from torch import Tensor

_TYPE_NAMES = ("FLOAT", "FLOAT16", "BFLOAT16", "INT64", "INT32", "INT8", "UINT8", "BOOL")  # torch has the same ones
TYPES: dict[int, torch.dtype] = {TensorProto.DataType.Value(name): getattr(torch, name.lower()) for name in _TYPE_NAMES}
TYPES[TensorProto.FLOAT8E4M3FN] = torch.float8_e4m3fn

Numbers = Callable[[int], "list[int] | None"]  # position of an input -> its integers, or None if it is left out
Function = Callable[..., "Tensor | tuple[Tensor, ...]"]
Make = Callable[..., Function]  # (numbers, **attributes) -> the function of a node


def torch_type(number: int) -> torch.dtype:
    """Return the torch type of an onnx.TensorProto.DataType."""
    if number not in TYPES:
        raise TypeError(f"the type {TensorProto.DataType.Name(number)} is not supported")
    return TYPES[number]


def _plain(function: Function) -> Make:
    """Make an operator without attributes."""
    return lambda numbers: function


def _to(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast `x`; to fp8, values out of range saturate, as ONNX specifies."""
    if dtype == torch.float8_e4m3fn and x.dtype != dtype:
        top = torch.finfo(dtype).max
        x = x.float().clamp(-top, top)
    return x.to(dtype)


def _reshape(numbers: Numbers, *, allowzero: int = 0) -> Function:
    shape = list(enumerate(numbers(1) or []))
    return lambda x, _: x.reshape([x.shape[axis] if size == 0 and not allowzero else size for axis, size in shape])


def _unsqueeze(numbers: Numbers) -> Function:
    axes = numbers(1) or []
    return lambda x, _: reduce(torch.unsqueeze, sorted(axis % (x.ndim + len(axes)) for axis in axes), x)


def _slice(numbers: Numbers) -> Function:
    starts, ends = numbers(1) or [], numbers(2) or []
    axes, steps = numbers(3) or list(range(len(starts))), numbers(4) or [1] * len(starts)

    def part(x: Tensor, *_: Tensor) -> Tensor:
        index = [slice(None)] * x.ndim
        for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
            index[axis] = slice(start, end, step)
        return x[tuple(index)]

    return part


def _split(numbers: Numbers, *, axis: int = 0, num_outputs: int = 0) -> Function:
    sizes = numbers(1)
    # The last part may be smaller.
    return lambda x, *_: torch.split(x, -(-x.shape[axis] // num_outputs) if sizes is None else sizes, axis)


def _gather(numbers: Numbers, *, axis: int = 0) -> Function:
    def gathered(x: Tensor, index: Tensor) -> Tensor:
        at = axis % x.ndim
        picked = x.index_select(at, index.reshape(-1).remainder(x.shape[at]))  # -1 is the last element
        return picked.reshape(*x.shape[:at], *index.shape, *x.shape[at + 1 :])

    return gathered


def _gemm(numbers: Numbers, *, alpha: float = 1.0, beta: float = 1.0, transA: int = 0, transB: int = 0) -> Function:
    def product(a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
        a, b = a.T if transA else a, b if transB else b.T
        if c is None or alpha != 1 or beta != 1 or c.ndim != 1:
            found = alpha * F.linear(a, b)
            return found if c is None else found + beta * c
        return F.linear(a, b, c)

    return product


def _conv(
    numbers: Numbers, *, kernel_shape: Any = None, strides: Any = (1, 1), pads: Any = (0, 0, 0, 0), dilations: Any = (1, 1),
    group: int = 1, auto_pad: str = "NOTSET",
) -> Function:  # fmt: skip
    if auto_pad != "NOTSET" or len(strides) != 2:
        raise TypeError("only 2D convolutions with explicit padding are supported")
    top, left, bottom, right = pads

    def convolved(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        x = F.pad(x, (left, right, top, bottom)) if any(pads) else x
        # F.conv2d would use TF32 on a GPU unless a global setting is changed; the last argument here turns it off.
        return torch._convolution(
            x, weight, bias, list(strides), [0, 0], list(dilations), False, [0, 0], group, False, False, True, False
        )

    return convolved


def _reduced(function: Callable[..., Tensor]) -> Make:
    def make(numbers: Numbers, *, axes: Any = None, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Function:
        along = list(axes or numbers(1) or [])
        if not along:
            raise TypeError("only reductions over given axes are supported")
        return lambda x, *_: function(x, dim=along, keepdim=bool(keepdims))

    return make


def _quantize(numbers: Numbers, *, axis: int = 1, saturate: int = 1, output_dtype: int = 0) -> Function:
    default = torch_type(output_dtype or TensorProto.UINT8)

    def quantized(x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        dtype = default if zero is None else zero.dtype
        scaled = x.float() / _along(scale, axis, x).float()
        if dtype.is_floating_point:
            return _to(scaled, dtype)
        scaled = torch.round(scaled)  # half to even
        if zero is not None:
            scaled = scaled + _along(zero, axis, x)
        return scaled.clamp(torch.iinfo(dtype).min, torch.iinfo(dtype).max).to(dtype)

    return quantized


def _dequantize(numbers: Numbers, *, axis: int = 1) -> Function:
    def dequantized(x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        shifted = x.float() if zero is None else x.float() - _along(zero, axis, x).float()
        return (shifted * _along(scale, axis, x).float()).to(scale.dtype)

    return dequantized


def _along(values: Tensor, axis: int, x: Tensor) -> Tensor:
    """Reshape per-tensor or per-axis `values` so that they broadcast with `x`."""
    if values.numel() == 1:
        return values.reshape(())
    shape = [1] * x.ndim
    shape[axis] = len(values)
    return values.reshape(shape)


def _top_k(numbers: Numbers, *, axis: int = -1, largest: int = 1, sorted: int = 1) -> Function:
    (count,) = numbers(1) or (1,)

    def best(x: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
        values, index = torch.sort(x, dim=axis, descending=bool(largest), stable=True)
        return values.narrow(axis, 0, count), index.narrow(axis, 0, count)

    return best


_TORCH = ("Add", "Erf", "Floor", "Greater", "MatMul", "Mul", "Pow", "Sigmoid", "Sqrt", "Sub", "Tanh", "Where")
_FUNCTIONAL = ("HardSwish", "Mish", "Relu", "Softplus")
OPERATORS: dict[str, Make] = {
    **{name: _plain(getattr(torch, name.lower())) for name in _TORCH},
    **{name: _plain(getattr(F, name.lower())) for name in _FUNCTIONAL},
    "Cast": lambda numbers, *, to, saturate=1: partial(_to, dtype=torch_type(to)),
    "Clip": _plain(lambda x, low=None, high=None: torch.clamp(x, low, high)),
    "Concat": lambda numbers, *, axis: lambda *parts: torch.cat(parts, axis),
    "Conv": _conv,
    "DequantizeLinear": _dequantize,
    "Div": _plain(lambda a, b: torch.div(a, b, rounding_mode=None if a.is_floating_point() else "trunc")),
    "Expand": _plain(lambda x, shape: x.expand(np.broadcast_shapes(tuple(x.shape), tuple(shape.tolist())))),
    "Gather": _gather,
    "GatherElements": lambda numbers, *, axis=0: lambda x, index: torch.gather(x, axis, index),
    "Gelu": lambda numbers, *, approximate="none": lambda x: F.gelu(x, approximate=approximate),
    "Gemm": _gemm,
    "Identity": _plain(lambda x: x),
    "LayerNormalization": lambda numbers, *, axis=-1, epsilon=1e-5, stash_type=1: (
        lambda x, weight, bias=None: F.layer_norm(x, x.shape[axis:], weight, bias, epsilon)
    ),
    "LeakyRelu": lambda numbers, *, alpha=0.01: lambda x: F.leaky_relu(x, alpha),
    "Max": _plain(lambda *parts: reduce(torch.maximum, parts)),
    "Min": _plain(lambda *parts: reduce(torch.minimum, parts)),
    "QuantizeLinear": _quantize,
    "ReduceL2": _reduced(torch.linalg.vector_norm),
    "ReduceMax": _reduced(torch.amax),
    "ReduceMean": _reduced(torch.mean),
    "ReduceSum": _reduced(torch.sum),
    "Reshape": _reshape,
    "Shape": lambda numbers, *, start=0, end=None: lambda x: torch.tensor(x.shape[start:end], device=x.device),
    "Slice": _slice,
    "Softmax": lambda numbers, *, axis=-1: lambda x: torch.softmax(x, axis),
    "Split": _split,
    "TopK": _top_k,
    "Transpose": lambda numbers, *, perm: lambda x: x.permute(perm),
    "Unsqueeze": _unsqueeze,
}  # fmt: skip
