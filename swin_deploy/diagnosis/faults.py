"""Differences between the constants, operators and windows of two graphs of one network, and what they mean."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from swin_deploy.options import Array

from .canonical_weights import parameter_faults
from .comparison import Fault, windows_of
from .sides import Side
from .swin_structure import Point, activation_kind

SAME_NAMES = 0.9  # share of tensors with the same names in two versions of one graph
REWRITTEN = 0.3  # share of nodes with other constants from which graphs are not two versions of one
CHANGED = 2e-6  # of a constant, relative to its amax


def static_faults(a: Side, b: Side, edited: list[Fault] | None) -> Iterator[Fault]:
    """Yield the differences that the graphs themselves show, in any order. `edited` is what `edits` returns."""
    yield from input_faults(a, b)
    swapped = swapped_windows(a, b)
    yield from swapped
    if edited is not None and swapped:  # what was changed in a gather is seen where it matters
        edited = [one for one in edited if not one.cause.startswith("Swapped windows")]
    yield from parameter_faults(a, b) if edited is None else edited


def swapped_windows(a: Side, b: Side) -> list[Fault]:
    """Return the windows and merges of `b` that read other tokens than those of `a`."""
    found = []
    for at in b.structure.attentions:
        ours, theirs = windows_of(a, at), windows_of(b, at)
        if ours is not None and theirs is not None and not np.array_equal(ours, theirs):
            part = "norm1" if b.structure.version == 1 else "attention.query"
            where = b.structure.attentions[at].query
            cause = "Swapped windows: the windows hold other tokens, or in another order."
            found.append(Fault(Point(*at, part), where, cause))
    before, after = (dict(_broken_merges(side)) for side in (a, b))
    for point in after.keys() - before.keys():
        found.append(Fault(point, after[point], "Swapped windows: the tokens that are merged are not neighbors."))
    return found


def _broken_merges(side: Side) -> Iterator[tuple[Point, str]]:
    """Yield the merges of tokens that are not neighbors, and their tensors."""
    part = "merge.norm" if side.structure.version == 1 else "merge.reduction"
    for point, linear in side.structure.linears.items():
        if point.part == "merge.reduction" and linear.node.output[0] in side.graph.broken_merges:
            yield Point(point.stage, None, part), linear.node.output[0]


def input_faults(a: Side, b: Side) -> Iterator[Fault]:
    """Yield the differences of the preprocessing that the two sides state or compute."""
    orders = [channel_order(side) for side in (a, b)]
    if None not in orders and orders[0] != orders[1]:
        cause = f"Other preprocessing: the channels of images are in the order {orders[1]} instead of {orders[0]}."
        yield Fault(Point(None, None, "input"), b.input.name, cause)
        return
    if a.preprocessing is None or b.preprocessing is None:
        return
    first, second = (one.preprocessing.to_dict() for one in (a, b))
    skip = ("do_", "size_divisor")
    for key in first:
        if key in second and first[key] != second[key] and not key.startswith(skip):
            cause = f"Other preprocessing: {key} is {second[key]} instead of {first[key]}."
            yield Fault(Point(None, None, "input"), b.input.name, cause)
            return


def channel_order(side: Side) -> tuple[int, ...] | None:
    """Return which channel of the image each channel is that the first convolution reads; None if that is unknown."""
    conv, (pixels, *others) = side.structure.conv, side.feeds.values()
    if conv is None or others or pixels.ndim != 4:
        return None
    names = {node.op_type for node in side.graph.ancestors(conv.input[0])}
    straight = tuple(range(pixels.shape[1]))
    if not names & {"Gather", "Slice", "Split", "Concat", "GatherND", "ScatterND", "MatMul", "Conv", "Einsum"}:
        return straight
    read = side.run([conv.input[0]]).get(conv.input[0])
    if read is None or read.shape != pixels.shape:
        return None
    first, second = (one.swapaxes(0, 1).reshape(len(straight), -1).astype(np.float64) for one in (pixels, read))
    alike = np.corrcoef(second, first)[: len(straight), len(straight) :]
    order = tuple(int(place) for place in alike.argmax(axis=1))
    return order if alike.max(axis=1).min() > 0.99 and sorted(order) == list(straight) else None


def edits(a: Side, b: Side) -> list[Fault] | None:
    """Return the differences between two versions of one graph; None if `b` is not an edited `a`."""
    first, second = a.graph, b.graph
    names, others = first.writer.keys(), second.writer.keys()
    shared = names & others
    if a.precision != b.precision or len(shared) < SAME_NAMES * max(len(names), len(others)):
        return None
    if len(a.model.graph.input) != len(b.model.graph.input) or len(a.model.graph.output) != len(b.model.graph.output):
        return None  # of other tasks
    before, after = node_points(a), node_points(b)
    if a.structure.joined.keys() != b.structure.joined.keys():
        return None
    other = [before[name] for name in names - others] + [after[name] for name in others - names]
    if len({(point.stage, point.block) for point in other}) > 2:
        return None
    found: list[Fault] = []
    floats = changed = moved = 0
    for name in first.writer:
        node = first.writer[name]
        if name in second.writer or name != node.output[0]:
            continue
        found.append(Fault(before[name], name, _missing(a, node, before[name])))
    for name, node in second.writer.items():
        if name != node.output[0]:
            continue
        if name not in first.writer:
            found.append(Fault(after[name], name, f"The graph has a further {node.op_type} here."))
            continue
        old = first.writer[name]
        if old.op_type != node.op_type:
            found.append(Fault(after[name], name, _other_operator(a, b, old, node, after[name])))
            continue
        found += [Fault(after[name], name, cause) for cause in _other_attributes(a, b, old, node, after[name])]
        if len(old.input) != len(node.input):
            found += _other_inputs(after[name], old, node)
            continue
        for position, (ours, theirs) in enumerate(zip(old.input, node.input, strict=True)):
            constant = ours and first.is_constant(ours), theirs and second.is_constant(theirs)
            if constant == (True, True):
                x, y = first.constant(ours), second.constant(theirs)
                floating = x.dtype.kind not in "iub" and x.size > 1
                floats += floating
                if not _same(x, y):
                    changed += floating
                    moved += node.op_type == "Gather"
                    found.append(_changed(b, after[name], node, position, x, y))
            elif constant[0] != constant[1] or (ours != theirs and ours in others and theirs in names):
                found.append(Fault(after[name], name, f"{node.op_type} reads {theirs or 'nothing'} instead of {ours}."))
    if changed > REWRITTEN * max(floats, 1):
        return None
    if moved > 1 and not swapped_windows(a, b):
        return None  # all windows are right, so that the tokens have another order in this layout
    return found


def node_points(side: Side) -> dict[str, Point]:
    """Return the point that each node belongs to, by its outputs: its own, or that of the first part that reads it."""
    graph, structure = side.graph, side.structure
    order = {point: place for place, point in enumerate(structure.points())}
    last = structure.points()[-1]
    found: dict[str, Point] = {}
    for point, linear in structure.linears.items():
        first = next((p for p, one in structure.linears.items() if one is linear), point)
        found[linear.node.output[0]] = first
        node = graph.writer.get(linear.output)
        while node is not None and node is not linear.node:
            found[node.output[0]] = first
            data = graph.data_inputs(node)
            node = graph.writer.get(data[0]) if data else None
    for point, norm in structure.norms.items():
        found |= {node.output[0]: point for node in norm.nodes}
    stop = {one.node.output[0] for one in structure.linears.values()}
    for at, attention in structure.attentions.items():
        for node in graph.ancestors(attention.softmax.input[0], {attention.matmul.output[0], *stop}):
            found.setdefault(node.output[0], Point(*at, "attention.scale"))
        found[attention.matmul.output[0]] = Point(*at, "attention.scale")
        for operand, part in ((attention.query, "query"), (attention.key, "key"), (attention.value, "value")):
            for node in graph.ancestors(operand, stop):
                scaled = part != "value" and node.op_type not in ("Transpose", "Reshape", "Split", "Add", "Gather", "Slice")
                place = "scale" if scaled else part
                if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
                    place = part
                if place == part or node.output[0] not in found:
                    found.setdefault(node.output[0], Point(*at, f"attention.{place}"))
        for node, constant in attention.added:
            part = "mask" if varies_by_window(side, at, constant) else "bias"
            found[node.output[0]] = Point(*at, f"attention.{part}")
        found[attention.softmax.output[0]] = Point(*at, "attention.softmax")
        found[attention.context.output[0]] = Point(*at, "attention.output")
    for point, (inner, outer) in structure.activations.items():
        for node in graph.ancestors(outer, {inner}):
            found[node.output[0]] = point
    for point, name in structure.tensors.items():
        if point.part in ("residual1", "residual2"):
            found[name] = point
    if structure.conv is not None:
        found[structure.conv.output[0]] = Point(None, None, "patch_embed")
    for node in reversed(graph.nodes):
        if any(name in found for name in node.output):
            point = next(found[name] for name in node.output if name in found)
        else:
            readers = [found[reader.output[0]] for name in node.output for reader in graph.readers.get(name, [])]
            point = min(readers, key=lambda one: order.get(one, 0), default=last)
        for name in node.output:
            found.setdefault(name, point)
    return found


def varies_by_window(side: Side, at: tuple[int, int], name: str) -> bool:
    """Whether a constant that is added to scores is a mask: large negative numbers in some windows."""
    values = side.graph.constant(name)
    return bool(values.ndim > 3 and values.min(initial=0) <= -50 and (values > -50).any() and max(values.shape[:2]) > 1)


def _same(x: Array, y: Array) -> bool:
    if x.shape != y.shape:
        return False
    if x.dtype.kind in "iub" and y.dtype.kind in "iub":
        return np.array_equal(x, y)
    x, y = x.astype(np.float64), y.astype(np.float64)
    if not np.isfinite(y).all():
        return bool(np.array_equal(x, y, equal_nan=True))
    return bool(np.abs(x - y).max(initial=0) <= CHANGED * np.abs(x).max(initial=0))


def _missing(a: Side, node: Any, point: Point) -> str:
    if point.part.endswith(("norm", "norm1", "norm2")) or node.op_type == "LayerNormalization":
        return "Missing norm: the graph has no LayerNormalization here."
    return f"The {node.op_type} of the other graph is missing."


def _other_operator(a: Side, b: Side, old: Any, node: Any, point: Point) -> str:
    if point.part == "mlp.activation":
        return other_activation(a, b, point)
    if old.op_type == "LayerNormalization":
        return f"Missing norm: {node.op_type} is in the place of LayerNormalization."
    return f"The operator is {node.op_type} instead of {old.op_type}."


def other_activation(a: Side, b: Side, point: Point) -> str:
    """Return a sentence about the activations of both sides."""
    ours, theirs = activation_kind(a.graph, a.structure, point), activation_kind(b.graph, b.structure, point)
    return f"Other activation: {theirs} instead of {ours}."


def _other_attributes(a: Side, b: Side, old: Any, node: Any, point: Point) -> Iterator[str]:
    helper = a.graph.onnx.helper
    first, second = ({one.name: helper.get_attribute_value(one) for one in x.attribute} for x in (old, node))
    for key in sorted(first.keys() | second.keys()):
        x, y = first.get(key), second.get(key)
        if x == y or (isinstance(x, float) and isinstance(y, float) and math.isclose(x, y, rel_tol=1e-6)):
            continue
        if key == "epsilon":
            yield f"Wrong epsilon: {_number(y)} instead of {_number(x)}."
        elif node.op_type == "Gelu":
            yield other_activation(a, b, point)
        elif not (hasattr(x, "SerializeToString") or hasattr(y, "SerializeToString")):
            yield f"{node.op_type} has {key} {_text(y)} instead of {_text(x)}."


def _other_inputs(point: Point, old: Any, node: Any) -> list[Fault]:
    bias = len(node.input) < len(old.input) and node.op_type in ("Gemm", "Conv", "LayerNormalization")
    cause = "Missing bias: the layer has none." if bias else f"{node.op_type} has other inputs."
    return [Fault(point, node.output[0], cause)]


def _changed(b: Side, point: Point, node: Any, position: int, x: Array, y: Array) -> Fault:
    """Return the fault of a constant that is `y` instead of `x`."""
    structure = b.structure
    name = node.input[position] or node.output[0]
    joined = next((one for p, one in structure.joined.items() if one.node is node or one.output == node.output[0]), None)
    if joined is not None and point.part == "attention.query" and x.shape == y.shape and x.ndim in (1, 2):
        count = len(joined.weight)
        axis = 0 if x.shape[0] == count else -1
        rows = np.moveaxis(x != y, axis, 0).reshape(count, -1).any(axis=1).reshape(3, -1).any(axis=1)
        if axis == 0 or x.shape[-1] == count:
            parts = ("query", "key", "value")
            first = int(np.argmax(rows))
            point = Point(point.stage, point.block, f"attention.{parts[first]}")
            if rows.sum() == 1:
                third = slice(first * (count // 3), (first + 1) * (count // 3))
                x, y = (np.moveaxis(one, axis, 0)[third] for one in (x, y))
    if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
        what = "zero point" if position == 2 else "scale"
        ratio = "" if position == 2 or not np.all(x) else f", {float(np.median(y / x)):.3g} times that of the other graph"
        return Fault(point, name, f"Wrong scale: the {what} of {node.op_type} is {_text(y)}{ratio}.")
    if node.op_type == "Gather":
        count = int((x != y).sum()) if x.shape == y.shape else y.size
        return Fault(point, name, f"Swapped windows: {count} tokens are gathered from other places.")
    if position > 0 and node.op_type == "Add" and point.part.startswith(("norm", "merge.norm")) and y.size == 1:
        return Fault(point, name, f"Wrong epsilon: {_number(y)} instead of {_number(x)}.")
    cause = describe(point, x, y)
    if point.part == "patch_embed" and cause.startswith("Other preprocessing"):
        point = Point(None, None, "input")
    return Fault(point, name, cause)


def describe(point: Point, x: Array, y: Array) -> str:
    """Return a sentence about a constant that is `y` instead of `x`."""
    kind = {"attention.mask": "mask", "attention.bias": "bias", "attention.scale": "scale"}.get(point.part, "weight")
    if point.part in ("mlp.activation",):
        return f"Other activation: its constant is {_number(y)} instead of {_number(x)}."
    if x.ndim == 1 and point.part not in ("attention.scale",):
        kind = "vector"
    if x.shape != y.shape:
        if x.T.shape == y.shape and np.allclose(x.T, y):
            return "Transposed weight."
        return f"The {kind} has shape {list(y.shape)} instead of {list(x.shape)}."
    x, y = x.astype(np.float64), y.astype(np.float64)
    if not np.isfinite(y).all():
        return f"Overflow: the {kind} holds values that are not finite."
    if x.ndim == 2 and x.shape[0] == x.shape[1] and np.allclose(x.T, y, rtol=1e-3, atol=1e-6 * np.abs(x).max()):
        return "Transposed weight."
    if x.ndim == 4 and point.part == "patch_embed":
        for order in ((2, 1, 0), (1, 0, 2), (0, 2, 1), (1, 2, 0), (2, 0, 1)):
            if x.shape[1] == 3 and np.allclose(x[:, order], y):
                return f"Other preprocessing: the channels of images are in the order {order}."
    if not y.any() and x.any():
        name = point.part.rpartition(".")[2]
        kind = f"bias of the {name}" if kind == "vector" and point.part.startswith(("attention.", "mlp.")) else kind
        return f"Missing {'bias' if kind == 'vector' else kind}: all values are 0."
    changed = np.abs(x - y) > CHANGED * np.abs(x).max(initial=0)
    count = int(changed.sum())
    where = np.argwhere(changed)
    factor = float((x * y).sum() / max(float((x * x).sum()), 1e-300))
    if count > 1 and np.linalg.norm(y - factor * x) <= 0.02 * np.linalg.norm(y) and abs(factor - 1) > 1e-4:
        return f"Scaled: the {kind} is {factor:.4g} times that of the other graph."
    wrong = {"mask": "Wrong mask", "bias": "Wrong bias", "scale": "Wrong scale"}.get(kind, f"Wrong {kind}")
    if count == 1:
        old, new = x[tuple(where[0])], y[tuple(where[0])]
        return f"{wrong}: element {where[0].tolist()} is {_number(new)} instead of {_number(old)}."
    rows = np.unique(where[:, :-1], axis=0) if x.ndim > 1 else where
    if x.ndim > 1 and len(rows) == 1:
        return f"{wrong} row: row {rows[0].tolist()} differs."
    return f"{wrong}: {count} of {x.size} elements differ."


def _number(value: Any) -> str:
    return f"{float(np.ravel(value)[0]):.6g}"


def _text(value: Any) -> str:
    if isinstance(value, bytes):
        return value.decode()
    array = np.asarray(value)
    return _number(array) if array.size == 1 and array.dtype.kind in "fiu" else f"{list(array.shape)} values"
