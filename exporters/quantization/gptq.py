"""Round weights such that each layer's output changes least: least squares, then GPTQ (Frantar and others, 2022).

The Hessian is the second moments of what the layer reads: for CPU layouts activations that are quantized already
(`LayerMoments`), for TensorRT fp32 activations, changed as the rewrites change them (`SecondMoments`, `InputChange`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from swin_deploy.calib.calibrators import round_to_fp8
from swin_deploy.calib.collect import session_for
from swin_deploy.errors import InputError
from swin_deploy.machine import PAIR_LIMIT
from swin_deploy.options import Array

from .equalization import ChannelStatistics
from .qdq import ActivationScale

if TYPE_CHECKING:
    import onnx

DAMPING = 0.01  # of the mean diagonal of the Hessian
BLOCK = 128  # columns
STEPS = {BLOCK: 16, 16: 1}  # columns of the blocks in a block
RETRIES = 20
ROWS = 4096  # of a layer's input, whose moments are added together
Result = TypeVar("Result")
SHRINK = np.linspace(0.3, 1, 29)  # candidates for a range, as a share of the observed one: values outside are clipped
SMALLEST = float(np.finfo(np.float32).tiny) * 1e6  # amax of a tensor of zeros


def int8_rounded(values: Array) -> Array:
    """Return the nearest symmetric INT8 number of each value, in the type of `values`."""
    return np.asarray(np.rint(np.clip(values, -127, 127)))


NEAREST: dict[str, Callable[[Array], Array]] = {"int8": int8_rounded, "fp8": round_to_fp8}


@dataclass(frozen=True)
class InverseFactor:
    """The inverse of a Hessian: `factor.T @ factor`, upper triangular, of the columns in `order`."""

    order: Array
    factor: Array

    @classmethod
    def of(cls, hessian: Array) -> InverseFactor:
        """Invert `hessian`. Raises LinAlgError if it is not positive definite."""
        order = np.argsort(-np.diag(hessian), kind="stable")
        return cls(order, np.ascontiguousarray(_inverse_of_cholesky(hessian[np.ix_(order[::-1], order[::-1])])[::-1, ::-1]))

    def times(self, right: Array) -> Array:
        """Return the inverse of the Hessian times `right`."""
        result = np.empty_like(right)
        result[self.order] = self.factor.T @ (self.factor @ right[self.order])
        return result


def _inverse_of_cholesky(matrix: Array) -> Array:
    """Invert the Cholesky factor of `matrix`, by halves: nearly all of the work is in matmuls, which LAPACK's is not."""
    half = len(matrix) // 2
    if half < BLOCK // 2:
        return np.asarray(np.linalg.inv(np.linalg.cholesky(matrix)))
    first = _inverse_of_cholesky(matrix[:half, :half])
    between = matrix[half:, :half] @ first.T
    last = _inverse_of_cholesky(matrix[half:, half:] - between @ between.T)
    result = np.zeros_like(matrix)
    result[:half, :half], result[half:, half:], result[half:, :half] = first, last, -last @ (between @ first)
    return result


def gptq(
    weight: Array,
    inverse: InverseFactor,
    scale: Array,
    nearest: Callable[[Array], Array] = int8_rounded,
    pair_limit: float | None = None,
) -> Array:
    """Quantize `weight` [outputs, inputs] with `scale` [outputs] and the inverse of its Hessian; returns floating point.

    With `pair_limit`, the sum of the values of inputs 2n and 2n + 1 is at most that far from zero if both have the same sign.
    """
    factor, work = inverse.factor, np.ascontiguousarray((weight / scale[:, None]).T[inverse.order])
    values, errors = np.empty_like(work), np.empty_like(work)
    position = np.argsort(inverse.order)

    def rounded(column: int) -> Array:
        partner = int(inverse.order[column]) ^ 1
        if pair_limit is None or partner >= len(position) or position[partner] > column:
            return nearest(work[column])
        other = values[position[partner]]
        return np.clip(nearest(work[column]), -pair_limit - np.minimum(other, 0), pair_limit - np.maximum(other, 0))

    def quantize(start: int, stop: int, size: int) -> None:  # and lets the columns up to `stop` make up for the error
        for first in range(start, stop, size):
            last = min(first + size, stop)
            if size > 1:
                quantize(first, last, STEPS[size])
            else:
                values[first] = rounded(first)
                errors[first] = (work[first] - values[first]) / factor[first, first]
            if last < stop:
                work[last:stop] -= factor[first:last, last:stop].T @ errors[first:last]

    quantize(0, len(work), BLOCK)
    result = np.empty_like(values)
    result[inverse.order] = values
    return np.ascontiguousarray(result.T)


def damping(gram: Array) -> float:
    """Return what is added to the diagonal of `gram` to make it positive definite."""
    return max(DAMPING * float(np.trace(gram)) / len(gram), 1e-12)


def with_damping(hessian: Array, compute: Callable[[Array], Result]) -> Result:
    """Return what `compute` makes of `hessian` with a damped diagonal.

    The damping grows if rounding made the matrix indefinite, as for constant inputs.
    """
    added = damping(hessian)

    def damped() -> Array:
        result = hessian.copy()
        result.flat[:: len(result) + 1] += added
        return result

    for _ in range(RETRIES):
        try:
            return compute(damped())
        except np.linalg.LinAlgError:
            added *= 10
    return compute(damped())


@dataclass
class SecondMoments:
    """Over `rows` rows x of a tensor: sums of x and of its outer products [channels, channels], and amax."""

    total: Array
    gram: Array
    amax: Array
    rows: int

    @classmethod
    def empty(cls, channels: int) -> SecondMoments:
        return cls(np.zeros(channels), np.zeros((channels, channels), np.float32), np.zeros(channels, np.float32), 0)

    def add(self, values: Array) -> None:
        """Add `values` [..., channels]."""
        x = values.reshape(-1, values.shape[-1])
        self.total += x.sum(axis=0, dtype=np.float64)
        self.gram += x.T @ x
        self.amax = np.maximum(self.amax, np.abs(x).max(axis=0))
        self.rows += len(x)

    def divided(self, factors: Array) -> SecondMoments:
        """Return the moments of x / factors [channels]."""
        return SecondMoments(self.total / factors, self.gram / np.outer(factors, factors), self.amax / factors, self.rows)

    @property
    def statistics(self) -> ChannelStatistics:
        """The figures that equalization needs of each channel."""
        return ChannelStatistics(self.amax, np.diag(self.gram) / self.rows)


@dataclass(frozen=True)
class InputChange:
    """What rewrites made of the input x [rows, channels] of a layer: (x - shift) * factor, and some channels constant."""

    shift: Any = 0.0
    factor: Any = 1.0
    constants: Mapping[int, float] = field(default_factory=dict)

    def hessian(self, moments: SecondMoments) -> Array:
        """Return the mean outer product [channels, channels] of the changed input."""
        mean, gram = moments.total / moments.rows, moments.gram.astype(np.float64) / moments.rows
        shift, factor = (np.broadcast_to(np.asarray(a, np.float64), mean.shape) for a in (self.shift, self.factor))
        gram += np.outer(shift, shift) - np.outer(shift, mean) - np.outer(mean, shift)
        gram *= np.outer(factor, factor)
        mean = (mean - shift) * factor
        for channel, value in self.constants.items():
            mean[channel] = value
            gram[channel] = gram[:, channel] = value * mean
        return gram


def input_moments(
    model: Path | onnx.ModelProto, inputs: Mapping[str, str], feeds: Iterable[Mapping[str, Array]], threads: int = 0
) -> dict[str, SecondMoments]:
    """Measure the second moments of the tensors that layers read (`inputs`, by layer), in one pass over `feeds`."""
    names = sorted(set(inputs.values()))
    run, found = session_for(model, names, threads), dict[str, SecondMoments]()
    for feed in feeds:
        values = run(feed)
        for name in names:
            moments = found[name] = found.get(name) or SecondMoments.empty(values[name].shape[-1])
            moments.add(values[name])
            refuse_not_finite(moments.total, name)
    return {layer: found[name] for layer, name in inputs.items()}


def refuse_not_finite(values: Array, name: str) -> None:
    """Raise InputError if `values`, of the tensor `name`, are not all finite."""
    if not np.isfinite(values).all():
        raise InputError(f"With these samples, a value in {name} is not finite. Look for damaged images.")


@dataclass(frozen=True)
class GptqRounding:
    """Chooses the quantized values of weights by the second moments of what their layers read."""

    moments: Mapping[str, SecondMoments]
    format: str
    known: dict[tuple[str, bytes], Array] = field(default_factory=dict)

    def __call__(self, layer: str, weight: Array, scale: Array, change: InputChange) -> Array | None:
        """Return the quantized values of `weight` [outputs, channels] with `scale` [outputs]; None without moments."""
        moments = self.moments.get(layer)
        if moments is None:
            return None
        key = layer, hashlib.sha256(weight.tobytes() + scale.tobytes()).digest()
        if key not in self.known:
            exact, nearest = (weight.astype(np.float64), scale.astype(np.float64)), NEAREST[self.format]
            values = with_damping(
                change.hessian(moments), lambda hessian: gptq(exact[0], InverseFactor.of(hessian), exact[1], nearest)
            )
            self.known[key] = values.astype(np.float32)
        return self.known[key]


class LayerMoments:
    """Moments of the input of linear layers, `seen` in 8 bits and `expected` in fp32."""

    def __init__(self, weight: Array) -> None:
        """Begin without rows; `weight` [outputs, channels] is that of all layers."""
        self._weight, self._rows = weight, 0
        self._projected = len(weight) < weight.shape[1]  # multiply by the weight first, which is less work
        self._waiting: list[tuple[Array, Array]] = []  # until there are `ROWS`, which are added together
        self._shift: Any = None  # near the mean: sums of squares around it lose nothing in fp32
        self._gram: Any = 0
        self._cross: Any = 0
        self._seen: Any = 0
        self._missing: Any = 0

    def add(self, seen: Array, expected: Array) -> None:
        """Add `seen` and `expected`, both [rows, channels]."""
        self._waiting.append((seen, expected))
        if sum(len(one) for one, _ in self._waiting) >= ROWS:
            self._add_waiting()

    def _add_waiting(self) -> None:
        seen, missing = (np.concatenate(parts) for parts in zip(*self._waiting, strict=True))
        self._waiting.clear()
        missing -= seen
        if self._shift is None:
            self._shift = seen.mean(axis=0)
        seen -= self._shift
        self._gram = self._gram + seen.T @ seen
        self._cross = self._cross + seen.T @ (missing @ self._weight.T if self._projected else missing)
        self._seen = self._seen + seen.sum(axis=0, dtype=np.float64)
        self._missing = self._missing + missing.sum(axis=0, dtype=np.float64)
        self._rows += len(seen)

    def centred(self) -> tuple[Array, Array, Array, Array]:
        """Return covariances and means over all rows.

        These are the covariance of `seen` [channels, channels], that of `seen` and `(expected - seen) @ weight.T`
        [channels, outputs], and the means of `seen` and `expected` [channels].
        """
        if self._waiting:
            self._add_waiting()
        seen, missing = (np.asarray(one / self._rows, self._gram.dtype) for one in (self._seen, self._missing))
        gram, cross = self._gram / self._rows, self._cross / self._rows
        gram -= np.outer(seen, seen)
        if self._projected:
            cross -= np.outer(seen, missing @ self._weight.T)
        else:
            cross -= np.outer(seen, missing)
            cross = cross @ self._weight.T
        seen = seen + self._shift
        return gram, cross, seen, seen + missing


def rounded_linear(
    weights: Sequence[Array], biases: Sequence[Array | None], moments: LayerMoments
) -> list[tuple[Array, Array, Array]]:
    """Quantize linear layers with the same input to INT8, so that they give the fp32 output from the input that they get.

    Returns the quantized values, the scale [outputs] and a bias [outputs] of each.
    """
    gram, change, seen, expected = moments.centred()
    wanted = np.concatenate(weights)

    def rounded(damped: Array) -> tuple[Array, Array]:
        # The weights that make of `seen` what `wanted` makes of `expected`; the damping draws them towards `wanted`.
        inverse = InverseFactor.of(damped)
        target = wanted + inverse.times(change).T
        scale = int8_scales(target, PAIR_LIMIT).astype(target.dtype)
        return gptq(target, inverse, scale, pair_limit=PAIR_LIMIT), scale

    values, scale = with_damping(gram, rounded)
    found = wanted @ expected - (values * scale[:, None]) @ seen
    parts = (np.split(part, np.cumsum([len(one) for one in weights[:-1]])) for part in (values, scale, found))
    return [
        (
            int8_rounded(one).astype(np.int8),
            each.astype(np.float32),
            (shift if bias is None else shift + bias).astype(np.float32),
        )
        for one, each, shift, bias in zip(*parts, biases, strict=True)
    ]


def int8_scales(weight: Array, pair_limit: float = np.inf) -> Array:
    """Return the INT8 scale [outputs] that spans each row of `weight` [outputs, inputs], and its `pair_sums`."""
    amax = np.maximum(np.abs(weight).max(axis=1), SMALLEST)
    return np.asarray(np.maximum(amax / 127.0, pair_sums(weight) / pair_limit).astype(np.float32), np.float64)


def pair_sums(weight: Array) -> Array:
    """Return the largest sum of inputs 2n and 2n + 1 of the same sign in each row of `weight` [outputs, inputs]."""
    even = np.asarray(weight[:, : weight.shape[1] // 2 * 2], np.float32)
    first, second = even[:, 0::2], even[:, 1::2]
    return np.asarray(np.where(first * second > 0, np.abs(first + second), 0).max(axis=1, initial=0))


def quantized_activation(values: Array, scale: ActivationScale) -> Array:
    """Return `values` after uint8 quantization and dequantization with `scale`."""
    quantized = np.clip(np.rint(values / np.float32(scale.scale)) + scale.zero_point, 0, 255)
    return np.asarray((quantized - scale.zero_point) * np.float32(scale.scale))


def scale_of_range(low: float, high: float) -> ActivationScale:
    """Return the asymmetric uint8 scale that spans `low` to `high`, and 0."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = max(high - low, SMALLEST) / 255
    return ActivationScale(float(np.float32(scale)), round(-low / scale))


def best_activation_scale(rows: Array, low: float, high: float, importance: Array) -> ActivationScale:
    """Search the scale with the least squared error in the next layer's output; `importance` weighs channels."""

    def damage(scale: ActivationScale) -> float:
        error = quantized_activation(rows, scale) - rows
        return float(np.einsum("rc,rc,c->", error, error, importance))

    best_high = min((high * factor for factor in SHRINK), key=lambda top: damage(scale_of_range(low, top)))
    return min((scale_of_range(low * factor, best_high) for factor in SHRINK), key=damage)
