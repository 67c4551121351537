"""Observation of a tensor over a data set: extremes and a histogram, a few hundred kilobytes for any number of values.

The bin width is a power of two and grows by merging neighbouring bins. So the counts are independent of how the values were
split into batches, and observations can be merged without loss.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from swin_deploy.errors import InputError
from swin_deploy.options import Array

from . import calibrators

HALF_BITS = 14
HALF = 1 << HALF_BITS  # bins on either side of zero
FINEST = -100  # exponent of the narrowest bins: 2**-100 is far below anything that a network computes with
PIECE = 1 << 17  # values counted at a time, so that they stay in the processor's cache


@dataclass(frozen=True, eq=False)
class Observation:
    """Extremes, number and histogram of values: `counts` int64 [2 * HALF] of bins 2**exponent wide, bin HALF from zero on."""

    counts: Array
    exponent: int
    low: float
    high: float
    samples: int
    values: int

    @classmethod
    def of(cls, values: Array, samples: int, name: str = "the tensor") -> Observation:
        """Observe one batch of `samples` samples. Raises InputError if a value is NaN or infinite."""
        flat = np.ascontiguousarray(values, dtype=np.float32).reshape(-1)
        low, high = float(flat.min()), float(flat.max())
        if not (math.isfinite(low) and math.isfinite(high)):  # NaN anywhere makes the minimum NaN
            raise InputError(f"{name} contains NaN or infinity with this data. Check the network with swin-deploy verify.")
        exponent = max(math.frexp(max(-low, high))[1] - HALF_BITS, FINEST)  # the smallest whose bins reach beyond both
        return cls(_counted(flat, exponent), exponent, low, high, samples, flat.size)

    def merged(self, other: Observation) -> Observation:
        """Return the observation of both sets of values together."""
        exponent = max(self.exponent, other.exponent)
        return Observation(
            _widened(self.counts, exponent - self.exponent) + _widened(other.counts, exponent - other.exponent),
            exponent,
            min(self.low, other.low),
            max(self.high, other.high),
            self.samples + other.samples,
            self.values + other.values,
        )

    @property
    def amax(self) -> float:
        """The largest absolute value."""
        return max(-self.low, self.high, 0.0)

    @property
    def width(self) -> float:
        """Bin width."""
        return math.ldexp(1.0, self.exponent)

    def compute_amax(self, method: str, kind: str = "int8") -> float:
        """Return the calibrated amax for a symmetric type; 0 if all values are zero. See calibrators.compute_amax."""
        return calibrators.compute_amax(self.counts, self.width, self.amax, method, kind)

    def compute_range(self, method: str) -> tuple[float, float]:
        """Return the calibrated (lowest, highest) value for uint8 with a zero point. See calibrators.compute_range."""
        return calibrators.compute_range(self.counts, self.width, self.low, self.high, method)


def to_arrays(observations: Mapping[str, Observation]) -> dict[str, Array]:
    """Convert observations to arrays for an .npz file; `from_arrays` restores them."""
    ones = list(observations.values())
    return {
        "names": np.array(list(observations), dtype=np.str_),
        "counts": np.array([one.counts for one in ones], dtype=np.int64).reshape(-1, 2 * HALF),
        "whole": np.array([(one.exponent, one.samples, one.values) for one in ones], dtype=np.int64),
        "ends": np.array([(one.low, one.high) for one in ones], dtype=np.float64),
    }


def from_arrays(arrays: Mapping[str, Array]) -> dict[str, Observation]:
    """Restore what `to_arrays` converted, bit for bit. Raises ValueError or KeyError for anything else."""
    shapes = {"names": (len(arrays["names"]),), "counts": (len(arrays["names"]), 2 * HALF), "whole": (len(arrays["names"]), 3)}
    kinds = {"names": "U", "counts": "i", "whole": "i"}
    if len(arrays["names"]) == 0:
        return {}
    if any(arrays[key].shape != shape or arrays[key].dtype.kind != kinds[key] for key, shape in shapes.items()):
        raise ValueError("these are no observations")
    found: dict[str, Observation] = {}
    for name, counts, whole, ends in zip(*(arrays[key] for key in ("names", "counts", "whole", "ends")), strict=True):
        exponent, samples, values = map(int, whole)
        found[str(name)] = Observation(counts, exponent, float(ends[0]), float(ends[1]), samples, values)
    return found


def _counted(values: Array, exponent: int) -> Array:
    counts = np.zeros(2 * HALF, dtype=np.int64)
    scale = np.float32(math.ldexp(1.0, -exponent))  # a power of two: no value is rounded
    for start in range(0, len(values), PIECE):
        piece = values[start : start + PIECE] * scale
        np.floor(piece, out=piece)
        piece += np.float32(HALF)
        counts += np.bincount(piece.astype(np.intp), minlength=2 * HALF)
    return counts


def _widened(counts: Array, octaves: int) -> Array:
    """Merge bins into bins that are 2**octaves times as wide."""
    if octaves == 0:
        return counts
    octaves = min(octaves, HALF_BITS)  # beyond that, two bins remain: below zero and above
    merged = counts.reshape(-1, 1 << octaves).sum(axis=1)
    wide = np.zeros_like(counts)
    start = HALF - (HALF >> octaves)
    wide[start : start + len(merged)] = merged
    return wide
