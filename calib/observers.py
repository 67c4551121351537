"""Observation: what is known of one tensor after a pass over data, in a few hundred kilobytes however many values it had.

Histograms have bins whose width is a power of two, and grow by merging neighbours. So their counts are those of all values
at once, whatever the batches in which these came, and two observations can be merged without loss.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from swin_deploy.errors import InputError
from swin_deploy.specs import Array

from . import calibrators as ranges

HALF_BITS = 14
HALF = 1 << HALF_BITS  # bins on either side of zero
FINEST = -100  # the exponent of the narrowest bins: 2**-100, far below anything that a network computes with
PIECE = 1 << 17  # values that are counted at a time, so that they stay in the processor's cache


@dataclass(frozen=True, eq=False)
class Observation:
    """`counts` int64 [2 * HALF] of bins 2**exponent wide, bin HALF starting at zero; `values` is how many there were.

    The channels are those of the last axis: the least and the largest value of each float32, and its sum float64; all three
    are empty for a tensor whose last axis changed its size.
    """

    counts: Array
    exponent: int
    low: float
    high: float
    samples: int
    values: int
    channel_low: Array
    channel_high: Array
    channel_sum: Array

    @classmethod
    def of(cls, values: Array, samples: int, name: str = "the tensor") -> Observation:
        """What one batch shows; `values` [..., channels]. Raises InputError for NaN or infinity."""
        rows = np.ascontiguousarray(values, dtype=np.float32).reshape(-1, values.shape[-1] if values.ndim else 1)
        lows, highs = rows.min(axis=0), rows.max(axis=0)
        low, high = float(lows.min()), float(highs.max())
        if not (math.isfinite(low) and math.isfinite(high)):  # a NaN anywhere is the minimum, too
            raise InputError(f"{name} becomes NaN or infinite with this data. Check the network with swin-deploy verify.")
        exponent = _exponent(max(-low, high))
        sums = rows.sum(axis=0, dtype=np.float64)
        return cls(_counted(rows.reshape(-1), exponent), exponent, low, high, samples, rows.size, lows, highs, sums)

    def merged(self, other: Observation) -> Observation:
        """What both saw together."""
        exponent = max(self.exponent, other.exponent)
        same = len(self.channel_low) == len(other.channel_low)
        none = slice(None) if same else slice(0)
        return Observation(
            _widened(self.counts, exponent - self.exponent) + _widened(other.counts, exponent - other.exponent),
            exponent,
            min(self.low, other.low),
            max(self.high, other.high),
            self.samples + other.samples,
            self.values + other.values,
            np.minimum(self.channel_low[none], other.channel_low[none]) if same else self.channel_low[none],
            np.maximum(self.channel_high[none], other.channel_high[none]) if same else self.channel_high[none],
            self.channel_sum[none] + other.channel_sum[none] if same else self.channel_sum[none],
        )

    @property
    def largest(self) -> float:
        """The largest absolute value."""
        return max(-self.low, self.high, 0.0)

    @property
    def channels(self) -> Array:
        """The largest absolute value of each channel, float32."""
        return np.maximum(-self.channel_low, self.channel_high)

    @property
    def means(self) -> Array:
        """The mean of each channel, float64."""
        return np.asarray(self.channel_sum * (len(self.channel_sum) / self.values))

    @property
    def width(self) -> float:
        """How wide a bin is."""
        return math.ldexp(1.0, self.exponent)

    def amplitude(self, method: str, kind: str = "int8", percentile: float = ranges.PERCENTILE) -> float:
        """What the largest number of `kind` ("int8": 127, "fp8": 448) should stand for; 0 for a tensor that is always zero.

        `method` is one of ranges.METHODS. Raises UsageError for one that there is not.
        """
        return ranges.amplitude(self.counts, self.width, self.largest, method, kind, percentile)

    def interval(self, method: str, percentile: float = ranges.PERCENTILE) -> tuple[float, float]:
        """The range (lowest, highest) that uint8 with a zero point should cover; 0 is in it."""
        return ranges.interval(self.counts, self.width, self.low, self.high, method, percentile)


def to_arrays(observations: Mapping[str, Observation]) -> dict[str, Array]:
    """The observations as arrays that an .npz file holds; `from_arrays` reads them."""
    ones = list(observations.values())
    joined = {
        part: np.concatenate([getattr(one, part) for one in ones]) if ones else np.empty(0)
        for part in ("channel_low", "channel_high", "channel_sum")
    }
    return {
        "names": np.array(list(observations), dtype=np.str_),
        "counts": np.array([one.counts for one in ones], dtype=np.int64).reshape(-1, 2 * HALF),
        "whole": np.array([(one.exponent, one.samples, one.values, len(one.channel_low)) for one in ones], dtype=np.int64),
        "ends": np.array([(one.low, one.high) for one in ones], dtype=np.float64),
        **joined,
    }


def from_arrays(arrays: Mapping[str, Array]) -> dict[str, Observation]:
    """The observations that `to_arrays` wrote, to the bit."""
    found: dict[str, Observation] = {}
    place = 0
    for number, name in enumerate(arrays["names"]):
        exponent, samples, values, channels = (int(value) for value in arrays["whole"][number])
        low, high = (float(value) for value in arrays["ends"][number])
        part = slice(place, place + channels)
        place += channels
        found[str(name)] = Observation(
            arrays["counts"][number],
            exponent,
            low,
            high,
            samples,
            values,
            arrays["channel_low"][part],
            arrays["channel_high"][part],
            arrays["channel_sum"][part],
        )
    return found


def _exponent(largest: float) -> int:
    """The smallest exponent whose bins reach beyond `largest`."""
    return max(math.frexp(largest)[1] - HALF_BITS, FINEST)


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
    """`counts` of bins that are 2**octaves as wide."""
    if octaves == 0:
        return counts
    octaves = min(octaves, HALF_BITS)  # beyond that, two bins remain: below zero, and above
    merged = counts.reshape(-1, 1 << octaves).sum(axis=1)
    wide = np.zeros_like(counts)
    start = HALF - (HALF >> octaves)
    wide[start : start + len(merged)] = merged
    return wide
