"""Compare two networks point by point, and find the first point at which they differ and the likely cause."""

from __future__ import annotations

import logging
import math
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from swin_deploy.options import COMPILERS, Array
from swin_deploy.parity import decibels

from .folded_graph import FoldedGraph
from .sides import Side
from .swin_structure import Point

_LOG = logging.getLogger(__name__)
# Largest relative L2 distance at a point that the types of a graph explain.
EXPECTED = {"fp32": 1e-3, "fp16": 5e-2, "bf16": 0.2, "int8": 0.5, "fp8": 0.5}
MASKED = -30.0  # what is added to a score that counts as masked: exp(-30) is 1e-13
OF_SCORES = ("attention.scale", "attention.bias", "attention.mask", "attention.softmax")
# Points at which quantized and typed graphs have other scales and offsets of channels, which a later part undoes.
FOLDED = {
    "patch_embed", "norm1", "norm2", "attention.query", "attention.key", "attention.value", "residual1", "residual2",
    "mlp.activation", "merge.norm", "norm", "pooler",
}  # fmt: skip
INTEGER = {"uint8": (0, 255), "int8": (-128, 127)}
# In other back ends, a tensor inside attention would undo its fusion. Engines are compared with and without.
WHOLE = ("onnxruntime", *COMPILERS)
GROWN = "The relative L2 error grows"
OPERANDS = ("attention.query", "attention.key", "attention.value")


@dataclass(frozen=True)
class PointError:
    """How far the second network is from the first at a point; `cosine` is that of the whole tensors."""

    point: Point
    relative_l2: float
    sqnr_db: float
    cosine: float
    max_abs: float

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as JSON values; what is not finite becomes None."""
        figures = {name: getattr(self, name) for name in ("relative_l2", "sqnr_db", "cosine", "max_abs")}
        place = {"stage": self.point.stage, "block": self.point.block, "part": self.point.part}
        return place | {name: value if math.isfinite(value) else None for name, value in figures.items()}


@dataclass(frozen=True)
class Fault:
    """A difference that the types do not explain: where, the tensor or node in the second graph, and the likely cause."""

    point: Point
    tensor: str
    cause: str

    def to_dict(self) -> dict[str, Any]:
        """Return the place and the cause as JSON values."""
        return {
            "stage": self.point.stage,
            "block": self.point.block,
            "part": self.point.part,
            "tensor": self.tensor,
            "cause": self.cause,
        }


@dataclass(frozen=True)
class Difference:
    """The result of a comparison. `first` is None if the networks are equal; `others` are faults after the first."""

    a: str
    b: str
    first: Fault | None
    points: tuple[PointError, ...]
    others: tuple[Fault, ...] = ()

    @property
    def equal(self) -> bool:
        return self.first is None

    def to_dict(self) -> dict[str, Any]:
        """Return the result as JSON values."""
        return {
            "a": self.a,
            "b": self.b,
            "equal": self.equal,
            "first": None if self.first is None else self.first.to_dict(),
            "others": [fault.to_dict() for fault in self.others],
            "points": [point.to_dict() for point in self.points],
        }


@dataclass(frozen=True)
class Quantizer:
    """Q/DQ of an activation: the tensors that it reads and writes, the scale before and after, and the integers."""

    values: str
    output: str
    scale: float
    back: float
    zero: float
    low: float
    high: float


def quantizers(graph: FoldedGraph) -> list[Quantizer]:
    """List the Q/DQ of integers in `graph`, also those whose quantization TensorRT computes with a matmul."""
    found = []
    for node in graph.nodes:
        if node.op_type != "DequantizeLinear" or not graph.is_constant(node.input[1]):
            continue
        back = graph.constant(node.input[1])
        zero = graph.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else np.zeros((), np.uint8)
        if back.size != 1 or zero.dtype.name not in INTEGER:
            continue
        low, high = INTEGER[zero.dtype.name]
        writer = graph.writer[node.input[0]]
        if writer.op_type == "QuantizeLinear" and graph.is_constant(writer.input[1]):
            given = graph.constant(writer.input[1])
            if given.size != 1:
                continue
            values, scale = writer.input[0], float(given.ravel()[0])
        else:
            while writer is not None and writer.op_type in ("Cast", "Sub", "Add", "Clip"):
                writer = graph.writer.get(graph.data_inputs(writer)[0])
            constants = [] if writer is None or writer.op_type != "Mul" else [n for n in writer.input if graph.is_constant(n)]
            if writer is None or not constants or graph.constant(constants[0]).size != 1:
                continue
            values, scale = graph.data_inputs(writer)[0], 1 / float(graph.constant(constants[0]).ravel()[0])
        found.append(Quantizer(values, node.input[0], scale, float(back.ravel()[0]), float(zero.ravel()[0]), low, high))
    return found


@dataclass(frozen=True)
class Values:
    """The tensors of a side at its points, in an order that both sides share."""

    side: Side
    raw: dict[str, Array]

    @classmethod
    def of(cls, side: Side) -> Values:
        inside = () if side.backend in WHOLE else (*OF_SCORES, *OPERANDS)
        names = {name for point, name in side.structure.tensors.items() if point.part not in ("input", *inside)}
        for attention in () if inside else side.structure.attentions.values():
            names |= {attention.query, attention.key, attention.value, *(add.output[0] for add, _ in attention.added)}
        for inner, outer in side.structure.activations.values():
            names |= {inner, outer}
        names |= set() if inside else {one.values for one in quantizers(side.graph)}
        names |= {value.name for value in side.model.graph.output}
        return cls(side, {name: array.astype(np.float32) for name, array in side.run(sorted(names)).items()})

    def at(self, point: Point) -> Array | None:
        """Return the tensor at `point` with its tokens and windows in row-major order; None if there is none."""
        structure, graph = self.side.structure, self.side.graph
        if point.part == "input":
            return next(iter(self.side.feeds.values())).astype(np.float32)
        attention = None if point.block is None else structure.attentions.get((point.stage or 0, point.block))
        if attention is not None and point.part in OPERANDS:
            name = getattr(attention, point.part.rpartition(".")[2])
            if name not in self.raw:
                return None
            array, ids = self.raw[name], graph.tokens.get(name)
            if name in graph.columns:
                array, ids = array.swapaxes(-1, -2), graph.columns[name]
            total, own = 1.0, 1.0
            for _, factor, where in attention.scales:
                total = total * (factor.reshape(-1)[0] if factor.size else 1.0)
                if where == point.part.rpartition(".")[2]:
                    own = own * factor.reshape(-1)[0]
            if ids is None or array.ndim < 3:
                return None
            if structure.version == 1:
                array = array * np.float32(total / own if point.part.endswith("query") else 1 / own)
            elif not point.part.endswith("value"):
                array = array / np.maximum(np.linalg.norm(array, axis=-1, keepdims=True), 1e-30)
            return by_window(ids, array)
        name = structure.tensors.get(point)
        if point.part == "attention.bias" and attention is not None:
            name = attention.added[0][0].output[0] if len(attention.added) > 1 else None
        if name is None or name not in self.raw:
            return None
        array = self.raw[name]
        if attention is not None and point.part in OF_SCORES:
            ids = graph.tokens.get(attention.query)
            if ids is None or array.shape[:-1] != ids.shape:
                return None
            return by_window(ids, array, both=True)
        ids = graph.tokens.get(name)
        return None if ids is None else by_token(ids, array)


def by_token(ids: Array, array: Array) -> Array | None:
    """Return rows [tokens of all images, channels] in row-major order, without padding."""
    if ids.ndim == array.ndim and ids.shape == array.shape:  # a convolution: channels are the second axis
        ids, array = ids[:, 0], np.moveaxis(array, 1, -1)
    if ids.shape != array.shape[:-1]:
        return None
    flat, rows = ids.reshape(-1), array.reshape(-1, array.shape[-1])
    order = np.argsort(flat, kind="stable")
    return rows[order[flat[order] >= 0]]


def by_window(ids: Array, array: Array, both: bool = False, alike: bool = False) -> Array | None:
    """Return rows [rows, heads, 1, ...] in the order of windows and tokens, without padding; `both` sorts the last axis.

    With `alike`, return [windows, heads, tokens, ...] with padding, and all windows are sorted as the first one, so that equal
    places stay equal: a shifted window may wrap around.
    """
    tokens = ids.shape[-1]
    flat, values = ids.reshape(-1, tokens), array.reshape(-1, tokens, array.shape[-1])
    order = np.argsort(flat, axis=1, kind="stable")
    if alike:
        order = np.broadcast_to(order[np.argmin(flat.max(axis=1))], order.shape)
    values = np.take_along_axis(values, order[..., None], 1)
    if both:
        if array.shape[-1] != tokens:
            return None
        values = np.take_along_axis(values, order[:, None], 2)
    keys = flat.max(axis=1)
    windows = len(np.unique(keys))
    if len(keys) % windows:
        return None
    where = np.argsort(keys, kind="stable")
    found = np.asarray(values[where].reshape(windows, -1, tokens, array.shape[-1]))
    if alike:
        return found
    real = np.sort(flat, axis=1)[where].reshape(windows, -1, tokens)[:, 0] >= 0  # what padding asks for, nobody reads
    return np.asarray(found.swapaxes(1, 2)[real][:, :, None])


def unfolded(a: Array, b: Array) -> Array:
    """Return `b` with the scale and the offset of each channel of `a`, by least squares."""
    axes = tuple(range(a.ndim - 1)) if a.ndim == 2 else (0, 2)
    x, y = a.astype(np.float64), b.astype(np.float64)
    mean = x.mean(axes, keepdims=True), y.mean(axes, keepdims=True)
    x, y = x - mean[0], y - mean[1]
    scale = (x * y).sum(axes, keepdims=True) / np.maximum((y * y).sum(axes, keepdims=True), 1e-30)
    near = np.abs(scale - 1) < 0.02  # rounding alone shrinks the factor
    return np.asarray(np.where(near, y, y * scale) + mean[0])


def windows_of(side: Side, at: tuple[int, int]) -> Array | None:
    """Return the numbers of the tokens of each window of the first image [windows, tokens], as the graph orders them."""
    ids = side.graph.tokens.get(side.structure.attentions[at].query)
    if ids is None:
        return None
    flat = ids.reshape(-1, ids.shape[-1])
    _, first = np.unique(flat.max(axis=1), return_index=True)
    windows = flat[np.sort(first)]
    images = next(iter(side.feeds.values())).shape[0]
    tokens = (flat.max() + 1) // images
    return np.asarray(windows[windows.max(axis=1) < tokens])


def point_error(point: Point, a: Array, b: Array) -> PointError:
    """Measure the distance of `b` from `a`. Scores are compared up to a constant for each query, as softmax does."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    if point.part in ("attention.scale", "attention.bias", "attention.mask"):
        with np.errstate(invalid="ignore"):
            masked = (a < a.max(-1, keepdims=True) + MASKED) & (b < b.max(-1, keepdims=True) + MASKED)
            masked &= np.full(a.shape, point.part == "attention.mask")
            count = (~masked).sum(-1, keepdims=True)
            a, b = (np.where(masked, 0, one - np.where(masked, 0, one).sum(-1, keepdims=True) / count) for one in (a, b))
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return PointError(point, math.inf, -math.inf, 0.0, math.inf)
    signal, noise = float(np.square(a).sum()), float(np.square(a - b).sum())
    size = math.sqrt(signal * float(np.square(b).sum()))
    cosine = float((a * b).sum()) / size if size else float(noise == 0)
    relative = math.sqrt(noise / signal) if signal else (0.0 if not noise else math.inf)
    return PointError(point, relative, decibels(signal, noise), cosine, float(np.abs(a - b).max(initial=0)))


def compared(a: Side, b: Side) -> Difference:
    """Compare two sides that have the same images."""
    from .faults import edits, node_points, static_faults

    if a.structure.depths != b.structure.depths or a.structure.version != b.structure.version:
        return Difference(a.name, b.name, Fault(Point(None, None, "input"), b.input.name, other_network(a, b)), ())
    order = {point: place for place, point in enumerate(b.structure.points())}
    folded = a.precision != "fp32" or b.precision != "fp32"
    first, second = Values.of(a), Values.of(b)
    edited = edits(a, b)
    points, faults = [], list(static_faults(a, b, edited))
    for point in order:
        ours, theirs = first.at(point), second.at(point)
        if theirs is not None and not np.isfinite(theirs).all() and (ours is None or np.isfinite(ours).all()):
            faults.append(Fault(point, b.structure.tensors.get(point, ""), overflow(theirs, b)))
        if ours is not None and theirs is not None and ours.shape == theirs.shape:
            if folded and point.part in FOLDED and np.isfinite(theirs).all() and np.isfinite(ours).all():
                theirs = unfolded(ours, theirs)
            points.append(point_error(point, ours, theirs))
    if b.precision in ("int8", "fp8") and edited is None:
        where = node_points(b)
        scores = {name for name, point in where.items() if point.part == "attention.scale"}
        faults += [Fault(where[name], name, cause) for name, cause in wrong_quantizers(second.raw, b.graph, scores)]
    if not faults:
        faults += grown(points, a, b)
    faults.sort(key=lambda fault: (order.get(fault.point, len(order)), not fault.cause.startswith("Overflow")))
    return Difference(a.name, b.name, faults[0] if faults else None, tuple(points), tuple(faults[1:]))


def wrong_quantizers(raw: Mapping[str, Array], graph: FoldedGraph, scores: Container[str] = ()) -> Iterator[tuple[str, str]]:
    """Yield quantizers, by their output, whose scales do not fit each other or the values, and why.

    The ranges of `scores` depend more on the image than those of others.
    """
    gaps: dict[str, tuple[float, float, float]] = {}
    for one in quantizers(graph):
        if abs(one.scale / one.back - 1) > 2e-3:
            yield one.output, f"Wrong scale: values are divided by {one.scale:.4g} and multiplied by {one.back:.4g}."
            continue
        if one.values not in raw:
            continue
        values = raw[one.values].astype(np.float64).reshape(-1)
        values = values[:: max(1, len(values) // 50_000)]
        if not np.isfinite(values).all() or not values.any():
            continue

        def error(factor: float, values: Array = values, one: Quantizer = one) -> float:
            step = one.scale * factor
            found = (np.clip(np.rint(values / step) + one.zero, one.low, one.high) - one.zero) * step
            return float(np.square(found - values).mean())

        factors = 2.0 ** np.arange(-6, 7)
        best = min(factors, key=error)
        steps = values / one.scale + one.zero
        outside = float(((steps < one.low - 0.5) | (steps > one.high + 0.5)).mean())
        gaps[one.output] = 10 * math.log10(max(error(1.0), 1e-30) / max(error(best), 1e-30)), float(best), outside
    usual = float(np.median([gap for gap, *_ in gaps.values()])) if gaps else 0.0
    for name, (gap, best, outside) in gaps.items():
        # Images other than those of the calibration may exceed the range.
        if gap > (16 if best > 1 or name in scores else 10) + usual and not (best == 2 and outside < 0.02):
            yield name, f"Wrong scale: values would lose {gap:.0f} dB less if the scale were {best:.3g} times as large."


def other_network(a: Side, b: Side) -> str:
    """Return a sentence about two architectures."""
    named = [f"Swin V{one.structure.version} with blocks {one.structure.depths}" for one in (a, b)]
    return f"The graphs are different networks: {named[0]} and {named[1]}."


def overflow(values: Array, side: Side) -> str:
    """Return a sentence about values that are not finite."""
    kind = "NaN" if np.isnan(values).any() else "infinite"
    return f"Overflow: values are {kind}, because they exceed the range of {side.precision}."


def grown(points: Iterable[PointError], a: Side, b: Side) -> list[Fault]:
    """Return the first point whose error the types of the graphs do not explain."""
    limit = max(EXPECTED[a.precision], EXPECTED[b.precision])
    exact = limit == EXPECTED["fp32"]
    for one in points:
        if one.point.part in FOLDED and not exact:
            continue
        if not one.relative_l2 <= limit:
            tensor = b.structure.tensors.get(one.point, "")
            cause = f"{GROWN} to {one.relative_l2:.2g}, and {b.precision} explains {limit:.2g}."
            return [Fault(one.point, tensor, cause)]
    return []
