"""What 8 bits can hold: the grids of weights and of activations, and the scales that lose least on them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from swin_deploy.errors import UsageError
from swin_deploy.requires import require

from .placement import ActivationScale

Array = NDArray[Any]
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
