"""Weights on a grid such that the layer still answers as before: least squares, then rounding that repairs itself.

Both look at what the layer really gets as input: 8-bit activations from layers that are quantised already. The rounding is
GPTQ's (Frantar and others, 2022): column by column, what one column's rounding breaks the columns not yet rounded repair.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from swin_deploy.calib.collect import session_for
from swin_deploy.dependencies import require
from swin_deploy.errors import InputError, UsageError
from swin_deploy.specs import Array

from .equalization import ChannelStatistics, Graph, best_factors, channels_of, fold
from .qdq import ActivationScale, linear_layers

if TYPE_CHECKING:
    import onnx


@dataclass
class InputMoments:
    """Sums over `rows` rows x of a tensor: of x [channels], and of the outer products of x with itself [channels, channels];
    and the largest magnitude [channels]."""

    total: Array
    gram: Array
    largest: Array
    rows: int

    @classmethod
    def empty(cls, channels: int) -> InputMoments:
        """Of no rows."""
        return cls(np.zeros(channels), np.zeros((channels, channels), np.float32), np.zeros(channels, np.float32), 0)

    def add(self, values: Array) -> None:
        """Takes in `values` [..., channels]."""
        x = values.reshape(-1, values.shape[-1])
        self.total += x.sum(axis=0, dtype=np.float64)
        self.gram += x.T @ x
        self.largest = np.maximum(self.largest, np.abs(x).max(axis=0))
        self.rows += len(x)

    def divided(self, factors: Array) -> InputMoments:
        """Of x / factors [channels]."""
        return InputMoments(self.total / factors, self.gram / np.outer(factors, factors), self.largest / factors, self.rows)

    @property
    def statistics(self) -> ChannelStatistics:
        """What balancing asks of each channel."""
        return ChannelStatistics(self.largest, np.diag(self.gram) / self.rows)


class Change(Protocol):
    """What became of a tensor x before it is read: (x - shift) * factor, and some channels constant."""

    @property
    def shift(self) -> Array | float: ...
    @property
    def factor(self) -> Array | float: ...
    @property
    def constants(self) -> Mapping[int, float]: ...


def input_moments(
    model: str | os.PathLike[str] | onnx.ModelProto,
    read: Mapping[str, str],
    feeds: Iterable[Mapping[str, Array]],
    threads: int = 0,
) -> dict[str, InputMoments]:
    """By layer, the moments of the tensor of `model`, a file or a loaded graph, that `read` says it reads, over all `feeds`.

    Memory is that of the model, one batch, and 4 bytes times the square of each tensor's channels. Raises InputError where
    samples make a value that is not finite.
    """
    names = sorted(set(read.values()))
    run, found = session_for(model, names, threads), dict[str, InputMoments]()
    for feed in feeds:
        values = run(feed)
        for name in names:
            moments = found[name] = found.get(name) or InputMoments.empty(values[name].shape[-1])
            moments.add(values[name])
            if not np.isfinite(moments.total).all():
                raise InputError(f"The samples make a value in {name} that is not finite; look for damaged images.")
    return {layer: found[name] for layer, name in read.items()}


def balanced(model: onnx.ModelProto, moments: Mapping[str, InputMoments]) -> tuple[onnx.ModelProto, dict[str, InputMoments]]:
    """`model` (weights inside) with the channels that the layers of `moments` read brought to sizes that suit 8 bits, and what
    the moments then are.

    Only where all factors go into weights (see folding.py), and by powers of two: nothing is rounded, and the network stays
    what it was.
    """
    from onnx import numpy_helper

    layers = tuple(layer for layer in linear_layers(model) if layer.name in moments)
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    statistics = {layer.input: moments[layer.name].statistics for layer in layers}
    read = {layer.weight: (layer.input, numpy_helper.to_array(weights[layer.weight])) for layer in layers}
    result, found = type(model)(), dict(moments)
    result.CopyFrom(model)
    for one in channels_of(Graph(model), layers):
        factors = None if one.after or one.before else best_factors(one, read, statistics, powers_of_two=True)
        if factors is None:
            continue
        fold(result, one, factors)
        for layer in layers:
            if layer.weight in one.read:
                found[layer.name] = found[layer.name].divided(np.tile(factors, len(found[layer.name].total) // one.width))
    return result, found


@dataclass(frozen=True)
class Repaired:
    """A way of rounding the weights of layers: what the rounding of one column breaks the columns not yet rounded repair."""

    moments: Mapping[str, InputMoments]
    kind: str
    known: dict[tuple[str, bytes], Array] = field(default_factory=dict)  # what was rounded already

    def __call__(self, layer: str, weight: Array, steps: Array, change: Change) -> Array | None:
        """The numbers of the 8-bit type for `weight` [outputs, channels], whose steps [outputs] are; None without moments."""
        moments = self.moments.get(layer)
        if moments is None:
            return None
        key = layer, hashlib.sha256(weight.tobytes() + steps.tobytes()).digest()
        if key not in self.known:
            gram = changed_gram(moments, change)
            gram[np.diag_indices_from(gram)] += max(DAMPING * float(np.trace(gram)) / len(gram), 1e-12)
            codes = gptq(weight.astype(np.float64), gram, steps.astype(np.float64), grid(self.kind))
            self.known[key] = codes.astype(np.float32)
        return self.known[key]


def changed_gram(moments: InputMoments, change: Change) -> Array:
    """[channels, channels]: the mean of the outer products of what became of x."""
    mean, gram = moments.total / moments.rows, moments.gram.astype(np.float64) / moments.rows
    shift, factor = (np.broadcast_to(np.asarray(a, np.float64), mean.shape) for a in (change.shift, change.factor))
    gram += np.outer(shift, shift) - np.outer(shift, mean) - np.outer(mean, shift)
    gram *= np.outer(factor, factor)
    mean = (mean - shift) * factor
    for channel, value in change.constants.items():
        mean[channel] = value
        gram[channel] = gram[:, channel] = value * mean
    return gram


SHRINK = np.linspace(0.3, 1, 29)  # of the range: what is outside is clipped


@dataclass(frozen=True)
class Grid:
    """The codes of one kind of 8 bits: symmetric around 0 up to `top`; `dtype` holds them."""

    name: str
    top: float
    dtype: np.dtype[Any]

    def nearest(self, values: Array) -> Array:
        """The code next to each value, in the type of `values`; values beyond the largest code become that."""
        inside = np.clip(values, -self.top, self.top)
        result: Array = np.rint(inside) if self.dtype == np.int8 else inside.astype(self.dtype).astype(values.dtype)
        return result

    def codes(self, values: Array) -> Array:
        """As `nearest`, in the type that a graph keeps."""
        return self.nearest(values).astype(self.dtype)


def grid(name: str) -> Grid:
    """The grid of "int8" or "fp8" (E4M3). Raises UsageError for another name."""
    if name == "int8":
        return Grid(name, 127.0, np.dtype(np.int8))
    if name == "fp8":
        return Grid(name, 448.0, np.dtype(require("ml_dtypes", "quantise to FP8").float8_e4m3fn))
    raise UsageError(f'There is no 8-bit type "{name}". There are: int8, fp8.')


def quantized_activation(values: Array, scale: ActivationScale, kind: Grid) -> Array:
    """`values` as a graph with this scale sees them."""
    if kind.dtype != np.int8:
        rounded: Array = kind.nearest(values / np.float32(scale.scale)) * np.float32(scale.scale)
        return rounded
    codes = np.clip(np.rint(values / np.float32(scale.scale)) + scale.zero_point, 0, 255)
    result: Array = (codes - scale.zero_point) * np.float32(scale.scale)
    return result


def scale_of_range(low: float, high: float, kind: Grid, symmetric: bool) -> ActivationScale:
    """The scale that spans `low` to `high`, and 0. INT8 uses all 256 codes where it may be asymmetric."""
    low, high = min(low, 0.0), max(high, 0.0)
    amplitude = max(-low, high, float(np.finfo(np.float32).tiny) * 1e6)
    if kind.dtype != np.int8:
        return ActivationScale(float(np.float32(amplitude / kind.top)))
    if symmetric:
        return ActivationScale(float(np.float32(amplitude / 127)), 128)
    step = max(high - low, amplitude) / 255
    return ActivationScale(float(np.float32(step)), round(-low / step))


def best_activation_scale(
    rows: Array, low: float, high: float, importance: Array, kind: Grid, symmetric: bool
) -> ActivationScale:
    """The scale with the least squared error of what the next layer makes of `rows` [rows, channels].

    `low` and `high` are the extremes of all rows, `importance` [channels] how much of a channel's squared error arrives.
    """

    def damage(scale: ActivationScale) -> float:
        error = quantized_activation(rows, scale, kind) - rows
        return float(np.einsum("rc,rc,c->", error, error, importance))

    both = symmetric or kind.dtype != np.int8
    tried = [(low * factor, high * factor if both else high) for factor in SHRINK]
    if not both:
        best_high = min((high * factor for factor in SHRINK), key=lambda top: damage(scale_of_range(low, top, kind, False)))
        tried = [(low * factor, best_high) for factor in SHRINK]
    scales = [scale_of_range(*pair, kind, symmetric) for pair in tried]
    return min(scales, key=damage)


def weight_scales(weight: Array, kind: Grid) -> Array:
    """[outputs]: the scale at which the largest weight of each row of `weight` [outputs, inputs] has the largest code."""
    largest = np.maximum(np.abs(weight).max(axis=1), np.finfo(np.float32).tiny * 1e6)
    scales: Array = (largest / kind.top).astype(np.float32).astype(np.float64)
    return scales


DAMPING = 0.01  # of the mean diagonal
BLOCK = 128  # columns


@dataclass
class Moments:
    """What is known of a layer's input over all rows: `seen` as the quantised network gives it, `meant` as fp32 does.

    `gram` is the sum of seen.T @ seen, `cross` of seen.T @ meant, both [channels, channels].
    """

    gram: Array
    cross: Array
    seen: Array
    meant: Array
    rows: int = 0

    @classmethod
    def empty(cls, channels: int) -> Moments:
        square = (channels, channels)
        return cls(np.zeros(square), np.zeros(square), np.zeros(channels), np.zeros(channels))

    def add(self, seen: Array, meant: Array) -> None:
        """Takes in `seen` and `meant`, both [rows, channels]."""
        self.gram += seen.T @ seen
        self.cross += seen.T @ meant
        self.seen += seen.sum(axis=0, dtype=np.float64)
        self.meant += meant.sum(axis=0, dtype=np.float64)
        self.rows += len(seen)

    def centred(self) -> tuple[Array, Array, Array, Array]:
        """Gram and cross around the means, per row, and the means."""
        seen, meant = self.seen / self.rows, self.meant / self.rows
        return self.gram / self.rows - np.outer(seen, seen), self.cross / self.rows - np.outer(seen, meant), seen, meant


def rounded_linear(weight: Array, bias: Array | None, moments: Moments, kind: Grid) -> tuple[Array, Array, Array]:
    """(codes [outputs, inputs], scale [outputs], bias [outputs]) for `weight` [outputs, inputs].

    The bias takes up the mean error of every output, so that a layer without one gets one.
    """
    gram, cross, seen, meant = moments.centred()
    wanted = weight.astype(np.float64)
    damped = gram + np.eye(len(gram)) * max(DAMPING * float(np.trace(gram)) / len(gram), 1e-12)
    # The weights that make of `seen` what `weight` makes of `meant`; the damping draws them towards `weight`.
    target = np.linalg.solve(damped, (cross + damped - gram) @ wanted.T).T
    scale = weight_scales(target, kind)
    codes = gptq(target, damped, scale, kind)
    found = wanted @ meant - (codes * scale[:, None]) @ seen
    if bias is not None:
        found = found + bias
    return kind.codes(codes), scale.astype(np.float32), found.astype(np.float32)


def gptq(weight: Array, gram: Array, scale: Array, kind: Grid) -> Array:
    """`weight` [outputs, inputs] / `scale` [outputs] as codes, such that inputs with this `gram` see little of it."""
    order = np.argsort(-np.diag(gram), kind="stable")
    work = (weight / scale[:, None])[:, order]
    inverse = np.linalg.inv(gram[np.ix_(order, order)])
    factor = np.linalg.cholesky((inverse + inverse.T) / 2).T  # upper
    codes = np.empty_like(work)
    for start in range(0, len(gram), BLOCK):
        stop = min(start + BLOCK, len(gram))
        errors = np.empty((len(work), stop - start))
        for column in range(start, stop):
            codes[:, column] = kind.nearest(work[:, column])
            error = (work[:, column] - codes[:, column]) / factor[column, column]
            work[:, column + 1 : stop] -= np.outer(error, factor[column, column + 1 : stop])
            errors[:, column - start] = error
        work[:, stop:] -= errors @ factor[start:stop, stop:]
    result = np.empty_like(codes)
    result[:, order] = codes
    return result
