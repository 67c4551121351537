"""The operators of the graphs that swin-deploy writes: their attributes, and the type and shape of what they compute.

`graph_check` applies these rules. They cover what the exporters write, not all of ONNX.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from swin_deploy.options import Array

RANK = 8  # most axes
MOST_ELEMENTS = 1 << 33  # of a value
MOST_PARTS = 64  # that Concat joins, or Split makes
FLOATS = ("float32", "float16", "bfloat16")
EIGHT_BITS = ("int8", "uint8", "float8_e4m3fn")
NUMBERS = (*FLOATS, "int64", "int32")
CAST = {1: "float32", 2: "uint8", 3: "int8", 6: "int32", 7: "int64", 9: "bool", 10: "float16", 16: "bfloat16"}


class Refused(Exception):
    """The graph is not one that swin-deploy writes; the message is a clause."""


@dataclass(frozen=True)
class Value:
    """Type and shape of a value.

    `data` are the integers of a constant, or of a shape that is computed. Those of an index are from 0 to `below` - 1.
    """

    dtype: str
    shape: tuple[int, ...]
    data: Array | None = None
    below: int = 0

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


@dataclass(frozen=True)
class Operator:
    """An operator: the numbers of inputs and outputs, the attributes, and the function that returns its outputs.

    An attribute is described by its smallest and largest integer, by the choices for a text, or by a type.
    """

    inputs: tuple[int, int]
    rule: Callable[..., Value | Sequence[Value]]
    attributes: Mapping[str, Any]
    outputs: tuple[int, int] = (1, 1)


def need(condition: object, why: str, *parts: object) -> None:
    """Raise Refused, with `parts` in the places of `why`, unless `condition` is true."""
    if not condition:
        raise Refused(why.format(*parts))


def inferred(nodes: Sequence[Mapping[str, Any]], values: dict[str, Value]) -> None:
    """Add what the nodes compute to `values`, which has the inputs and constants. Raises Refused for anything unknown."""
    for node in nodes:
        kind, name, domain = node.get("op_type", ""), node.get("name", ""), node.get("domain", "")
        operator = OPERATORS.get("" if domain else kind)
        if operator is None:
            raise Refused(f"it has the operator {domain}{'.' if domain else ''}{kind}, which swin-deploy does not write")
        given, made = node.get("input", ()), node.get("output", ())
        inside = operator.inputs[0] <= len(given) <= operator.inputs[1]
        need(inside and operator.outputs[0] <= len(made) <= operator.outputs[1], "{} has another number of values", name)
        need(all(given[: operator.inputs[0]]), "{} lacks an input", name)
        for value in given:
            need(not value or value in values, "{} reads {}, which no earlier node computes", name, value)
        found: Any
        try:
            attributes = _attributes(operator.attributes, node.get("attribute", ()))
            found = operator.rule(attributes, len(made), *(values[value] if value else None for value in given))
        except Refused as error:
            raise Refused(f"{name} ({kind}) {error}") from error
        except (ValueError, IndexError, TypeError) as error:
            raise Refused(f"{name} ({kind}) does not fit its inputs") from error
        for value, result in zip(made, (found,) if isinstance(found, Value) else found, strict=True):
            need(value and value not in values, "two nodes compute the value {}", value)
            need(len(result.shape) <= RANK and 0 < math.prod(result.shape) <= MOST_ELEMENTS, "{} computes {}", name, result)
            values[value] = result


def _attributes(known: Mapping[str, Any], given: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for one in given:
        name = one.get("name", "")
        need(name in known and name not in found, "has the attribute {}", name)
        wanted = known[name]
        field = "f" if wanted is float else "ints" if wanted is list else "s" if isinstance(wanted[0], str) else "i"
        need(one.keys() == {"name", "type", field} and one["type"] == _KINDS[field], "has another type of attribute {}", name)
        value = found[name] = one[field]
        if field == "i":
            valid = wanted[0] <= value <= wanted[1]
        elif field == "ints":
            valid = len(value) <= 2 * RANK and all(abs(size) < 1 << 31 for size in value)
        else:
            valid = math.isfinite(value) if field == "f" else value in wanted
        need(valid, "has the attribute {} {}", name, value)
    return found


_KINDS = {"f": 1, "i": 2, "s": 3, "ints": 7}
AXIS, FLAG = (-RANK, RANK - 1), (0, 1)


def _place(axis: int, rank: int) -> int:
    """Return `axis`, which may be negative, as a number from 0."""
    need(-rank <= axis < rank, "has the axis {} of {}", axis, rank)
    return axis % rank


def _broadcast(*shapes: Sequence[int]) -> tuple[int, ...]:
    rank = max(map(len, shapes))
    padded = [(1,) * (rank - len(shape)) + tuple(shape) for shape in shapes]
    found = tuple(map(max, zip(*padded, strict=True)))
    for shape in padded:
        need(all(size in (1, most) for size, most in zip(shape, found, strict=True)), "combines the shapes {}", shapes)
    return found


def _integers(value: Value | None) -> list[int]:
    """Return the integers of a constant with at most one axis."""
    data = None if value is None or value.dtype != "int64" else value.data
    if data is None or data.ndim > 1 or data.size > 2 * RANK:
        raise Refused("needs a few constant integers")
    return [int(one) for one in data.reshape(-1)]


def _map(*types: str) -> Callable[..., Value]:
    """Return the rule of an operator on the elements of one value."""

    def rule(attributes: Mapping[str, Any], made: int, x: Value) -> Value:
        need(x.dtype in types, "computes on {}", x.dtype)
        return Value(x.dtype, x.shape)

    return rule


def _combine(result: str = "") -> Callable[..., Value]:
    """Return the rule of an operator on the elements of several values of one type."""

    def rule(attributes: Mapping[str, Any], made: int, *parts: Value) -> Value:
        need(len({part.dtype for part in parts}) == 1 and parts[0].dtype in NUMBERS, "combines different types")
        return Value(result or parts[0].dtype, _broadcast(*(part.shape for part in parts)))

    return rule


def _clip(attributes: Mapping[str, Any], made: int, x: Value, low: Value | None = None, high: Value | None = None) -> Value:
    need(x.dtype in NUMBERS and all(one is None or (one.dtype == x.dtype and not one.shape) for one in (low, high)), "differs")
    return Value(x.dtype, x.shape)


def _where(attributes: Mapping[str, Any], made: int, condition: Value, x: Value, y: Value) -> Value:
    need(condition.dtype == "bool" and x.dtype == y.dtype, "selects from different types")
    return Value(x.dtype, _broadcast(condition.shape, x.shape, y.shape))


def _cast(attributes: Mapping[str, Any], made: int, x: Value) -> Value:
    need(attributes.get("to") in CAST, "casts to {}", attributes.get("to"))
    return Value(CAST[attributes["to"]], x.shape)


def _check_scale(x: Value, scale: Value, zero: Value | None, axis: int) -> None:
    need(scale.dtype in FLOATS and (zero is None or zero.shape == scale.shape), "has scales and zero points that differ")
    need(not scale.shape or scale.shape == (1,) or scale.shape == (x.shape[_place(axis, len(x.shape))],), "has other scales")


def _quantize(attributes: Mapping[str, Any], made: int, x: Value, scale: Value, zero: Value) -> Value:
    _check_scale(x, scale, zero, attributes.get("axis", 1))
    need(x.dtype in FLOATS and zero.dtype in EIGHT_BITS, "quantizes {} to {}", x.dtype, zero.dtype)
    return Value(zero.dtype, x.shape)


def _dequantize(attributes: Mapping[str, Any], made: int, x: Value, scale: Value, zero: Value | None = None) -> Value:
    _check_scale(x, scale, zero, attributes.get("axis", 1))
    kinds = ("int32",) if zero is None else (*EIGHT_BITS, "int32")
    need(x.dtype in kinds and (zero is None or zero.dtype == x.dtype), "dequantizes {}", x.dtype)
    return Value(scale.dtype, x.shape)


def _matmul(attributes: Mapping[str, Any], made: int, x: Value, y: Value) -> Value:
    need(x.dtype == y.dtype in FLOATS and min(len(x.shape), len(y.shape)) > 1, "multiplies other types")
    need(x.shape[-1] == y.shape[-2], "multiplies {} and {}", x, y)
    return Value(x.dtype, (*_broadcast(x.shape[:-2], y.shape[:-2]), x.shape[-2], y.shape[-1]))


def _gemm(attributes: Mapping[str, Any], made: int, x: Value, y: Value, bias: Value | None = None) -> Value:
    rows, inner = x.shape[::-1] if attributes.get("transA") else x.shape
    left, columns = y.shape[::-1] if attributes.get("transB") else y.shape
    need(x.dtype == y.dtype in FLOATS and inner == left, "multiplies {} and {}", x, y)
    if bias is not None:
        need(bias.dtype == x.dtype and _broadcast(bias.shape, (rows, columns)) == (rows, columns), "adds {}", bias)
    return Value(x.dtype, (rows, columns))


def _conv(attributes: Mapping[str, Any], made: int, x: Value, weight: Value, bias: Value | None = None) -> Value:
    count, channels, *size = x.shape
    filters, depth, *kernel = weight.shape
    strides, pads = attributes.get("strides", [1, 1]), attributes.get("pads", [0] * 4)
    need(x.dtype == weight.dtype in FLOATS and len(size) == len(kernel) == len(strides) == 2 and channels == depth, "differs")
    need(attributes.get("kernel_shape", kernel) == kernel and attributes.get("dilations", [1, 1]) == [1, 1], "differs")
    need(len(pads) == 4 and min(pads) >= 0 and max(pads) < 1 << 16 and min(strides) >= 1, "has other pads or strides")
    need(bias is None or bias == Value(x.dtype, (filters,)), "adds {}", bias)
    padded = [length + pads[axis] + pads[axis + 2] for axis, length in enumerate(size)]
    need(all(length >= part for length, part in zip(padded, kernel, strict=True)), "has a kernel that is too large")
    return Value(x.dtype, (count, filters, *((a - k) // s + 1 for a, k, s in zip(padded, kernel, strides, strict=True))))


def _norm(attributes: Mapping[str, Any], made: int, x: Value, weight: Value, bias: Value | None = None) -> Value:
    shape = x.shape[_place(attributes.get("axis", -1), len(x.shape)) :]
    need(x.dtype in FLOATS and weight == Value(x.dtype, shape) and bias in (None, Value(x.dtype, shape)), "differs")
    return Value(x.dtype, x.shape)


def _softmax(attributes: Mapping[str, Any], made: int, x: Value) -> Value:
    _place(attributes.get("axis", -1), len(x.shape))
    return _map(*FLOATS)(attributes, made, x)


def _reduce(attributes: Mapping[str, Any], made: int, x: Value, axes: Value | None = None) -> Value:
    listed = attributes.get("axes", []) if axes is None else _integers(axes)
    places = {_place(axis, len(x.shape)) for axis in listed}
    need(x.dtype in FLOATS and len(places) == len(listed) > 0, "reduces an axis twice, or none")
    kept = [1 if axis in places else size for axis, size in enumerate(x.shape)]
    if not attributes.get("keepdims", 1):
        kept = [size for axis, size in enumerate(x.shape) if axis not in places]
    return Value(x.dtype, tuple(kept))


def _reshape(attributes: Mapping[str, Any], made: int, x: Value, shape: Value) -> Value:
    wanted = _integers(shape)
    if not attributes.get("allowzero"):
        wanted = [x.shape[axis] if size == 0 else size for axis, size in enumerate(wanted)]
    need(all(size > 0 or size == -1 for size in wanted) and wanted.count(-1) <= 1, "reshapes to {}", wanted)
    count = math.prod(x.shape)
    free = count // math.prod(size for size in wanted if size > 0)
    found = tuple(free if size == -1 else size for size in wanted)
    need(math.prod(found) == count, "reshapes {} to {}", x, wanted)
    return Value(x.dtype, found, None if x.data is None else x.data.reshape(found))


def _unsqueeze(attributes: Mapping[str, Any], made: int, x: Value, axes: Value) -> Value:
    rank = len(x.shape) + len(_integers(axes))
    places = {_place(axis, rank) for axis in _integers(axes)}
    sizes = iter(x.shape)
    found = tuple(1 if axis in places else next(sizes) for axis in range(rank))
    need(len(places) + len(x.shape) == rank, "adds an axis twice")
    return Value(x.dtype, found, None if x.data is None else x.data.reshape(found))


def _transpose(attributes: Mapping[str, Any], made: int, x: Value) -> Value:
    order = attributes.get("perm", [])
    need(sorted(order) == list(range(len(x.shape))), "has the order {} of {} axes", order, len(x.shape))
    return Value(x.dtype, tuple(x.shape[axis] for axis in order))


def _slice(
    attributes: Mapping[str, Any], made: int, x: Value, starts: Value, ends: Value, axes: Value | None = None,
    steps: Value | None = None,
) -> Value:  # fmt: skip
    first, last = _integers(starts), _integers(ends)
    places = [_place(axis, len(x.shape)) for axis in (range(len(first)) if axes is None else _integers(axes))]
    need(len(set(places)) == len(places), "cuts an axis twice")
    index = [slice(None)] * len(x.shape)
    for start, end, axis, step in zip(
        first, last, places, [1] * len(first) if steps is None else _integers(steps), strict=True
    ):
        need(step != 0, "has a step of 0")
        index[axis] = slice(start, end, step)
    sizes = tuple(len(range(*one.indices(size))) for one, size in zip(index, x.shape, strict=True))
    return Value(x.dtype, sizes, None if x.data is None else x.data[tuple(index)])


def _split(attributes: Mapping[str, Any], made: int, x: Value, parts: Value | None = None) -> list[Value]:
    axis = _place(attributes.get("axis", 0), len(x.shape))
    size = x.shape[axis]
    need(parts is None or "num_outputs" not in attributes, "has two numbers of parts")
    if parts is None:
        need(attributes.get("num_outputs", made) == made, "has {} parts", made)
        each = -(-size // made)
        sizes = [each] * (made - 1) + [size - each * (made - 1)]
    else:
        sizes = _integers(parts)
    need(len(sizes) == made and min(sizes) > 0 and sum(sizes) == size, "splits {} into {}", size, sizes)
    return [Value(x.dtype, (*x.shape[:axis], part, *x.shape[axis + 1 :])) for part in sizes]


def _concat(attributes: Mapping[str, Any], made: int, *parts: Value) -> Value:
    need("axis" in attributes and len({part.dtype for part in parts}) == 1, "joins different types")
    axis = _place(attributes["axis"], len(parts[0].shape))
    others = {part.shape[:axis] + (0,) + part.shape[axis + 1 :] for part in parts}
    need(len(others) == 1, "joins {}", ", ".join(map(str, parts)))
    shape = (*parts[0].shape[:axis], sum(part.shape[axis] for part in parts), *parts[0].shape[axis + 1 :])
    known = [part.data for part in parts if part.data is not None]
    return Value(parts[0].dtype, shape, np.concatenate(known, axis) if len(known) == len(parts) else None)


def _gather(attributes: Mapping[str, Any], made: int, x: Value, index: Value) -> Value:
    axis = _place(attributes.get("axis", 0), len(x.shape))
    need(index.data is not None and index.data.size, "needs constant indices")
    assert index.data is not None
    size = x.shape[axis]
    need(-size <= int(index.data.min()) and int(index.data.max()) < size, "reads beyond the {} elements of an axis", size)
    data = None if x.data is None else np.take(x.data, index.data, axis)
    return Value(x.dtype, (*x.shape[:axis], *index.shape, *x.shape[axis + 1 :]), data)


def _top_k(attributes: Mapping[str, Any], made: int, x: Value, count: Value) -> list[Value]:
    axis, (most,) = _place(attributes.get("axis", -1), len(x.shape)), _integers(count)
    need(x.dtype in FLOATS and 0 < most <= x.shape[axis], "selects {} of {}", most, x)
    shape = (*x.shape[:axis], most, *x.shape[axis + 1 :])
    return [Value(x.dtype, shape), Value("int64", shape, below=x.shape[axis])]


def _gather_elements(attributes: Mapping[str, Any], made: int, x: Value, index: Value) -> Value:
    axis = _place(attributes.get("axis", 0), len(x.shape))
    others = [shape[:axis] + shape[axis + 1 :] for shape in (x.shape, index.shape)]
    need(0 < index.below <= x.shape[axis] and others[0] == others[1], "reads {} at {}", x, index)
    return Value(x.dtype, index.shape)


def _shape(attributes: Mapping[str, Any], made: int, x: Value) -> Value:
    part = np.array(x.shape[attributes.get("start", 0) : attributes.get("end", RANK)], np.int64)
    return Value("int64", part.shape, part)


def _expand(attributes: Mapping[str, Any], made: int, x: Value, shape: Value) -> Value:
    sizes = _integers(shape)
    need(all(size > 0 for size in sizes), "expands to {}", sizes)
    return Value(x.dtype, _broadcast(x.shape, sizes))


_NORM = {"axis": AXIS, "epsilon": float, "stash_type": FLAG}
_CONV = {"group": (1, 1), "auto_pad": ("NOTSET",), "pads": list, "strides": list, "dilations": list, "kernel_shape": list}
_CAST = {"to": (1, 17), "saturate": FLAG}
OPERATORS: dict[str, Operator] = {
    **{name: Operator((2, 2), _combine(), {}) for name in ("Add", "Div", "Mul", "Pow", "Sub")},
    **{name: Operator((1, 8), _combine(), {}) for name in ("Max", "Min")},
    **{
        name: Operator((1, 1), _map(*FLOATS), {})
        for name in ("Erf", "Floor", "HardSwish", "Mish", "Relu", "Sigmoid", "Softplus", "Sqrt", "Tanh")
    },
    **{
        name: Operator((1, 2), _reduce, {"axes": list, "keepdims": FLAG, "noop_with_empty_axes": FLAG})
        for name in ("ReduceL2", "ReduceMax", "ReduceMean", "ReduceSum")
    },
    "Cast": Operator((1, 1), _cast, _CAST),
    "Clip": Operator((1, 3), _clip, {}),
    "Concat": Operator((1, MOST_PARTS), _concat, {"axis": AXIS}),
    "Conv": Operator((2, 3), _conv, _CONV),
    "DequantizeLinear": Operator((2, 3), _dequantize, {"axis": AXIS}),
    "Expand": Operator((2, 2), _expand, {}),
    "Gather": Operator((2, 2), _gather, {"axis": AXIS}),
    "GatherElements": Operator((2, 2), _gather_elements, {"axis": AXIS}),
    "Gelu": Operator((1, 1), _map(*FLOATS), {"approximate": ("none", "tanh")}),
    "Gemm": Operator((2, 3), _gemm, {"alpha": float, "beta": float, "transA": FLAG, "transB": FLAG}),
    "Greater": Operator((2, 2), _combine("bool"), {}),
    "LayerNormalization": Operator((2, 3), _norm, _NORM),
    "LeakyRelu": Operator((1, 1), _map(*FLOATS), {"alpha": float}),
    "MatMul": Operator((2, 2), _matmul, {}),
    "QuantizeLinear": Operator((3, 3), _quantize, {"axis": AXIS, "saturate": FLAG}),
    "Reshape": Operator((2, 2), _reshape, {"allowzero": FLAG}),
    "Shape": Operator((1, 1), _shape, {"start": (0, RANK), "end": (0, RANK)}),
    "Slice": Operator((3, 5), _slice, {}),
    "Softmax": Operator((1, 1), _softmax, {"axis": AXIS}),
    "Split": Operator((1, 2), _split, {"axis": AXIS, "num_outputs": (1, MOST_PARTS)}, (1, MOST_PARTS)),
    "TopK": Operator((2, 2), _top_k, {"axis": AXIS, "largest": (1, 1), "sorted": (1, 1)}, (2, 2)),
    "Transpose": Operator((1, 1), _transpose, {"perm": list}),
    "Unsqueeze": Operator((2, 2), _unsqueeze, {}),
    "Where": Operator((3, 3), _where, {}),
}
