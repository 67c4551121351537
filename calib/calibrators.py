"""From a histogram to the range that a quantised type should cover: minmax, percentile, entropy and mse.

A histogram has `counts` int64 [2 * n] of bins `width` wide: bin i holds the values from (i - n) * width on, up to the next
bin's. An amplitude is what the largest number of a symmetric type stands for: 127 of int8, 448 of float8 e4m3.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from swin_deploy.errors import UsageError
from swin_deploy.specs import Array

METHODS = ("minmax", "percentile", "entropy", "mse")
LARGEST = {"int8": 127.0, "fp8": 448.0}  # the largest number of each type
PERCENTILE = 99.99
ENTROPY_BINS = 2048  # as in TensorRT and pytorch-quantization
SMALLEST_NORMAL, MANTISSA = -6, 3  # of float8 e4m3: exponent, bits
COARSE, FINE = 12, 8  # steps of a search: so many in an octave, and so many between two of these


def amplitude(counts: Array, width: float, largest: float, method: str, kind: str, percentile: float) -> float:
    """The amplitude that `method` finds for type `kind`, at most `largest`, the largest value seen (absolute)."""
    _check(method, kind, percentile)
    folded = _folded(counts)
    used = np.flatnonzero(folded)
    if method == "minmax" or largest == 0:
        return largest
    folded = folded[: used[-1] + 1]
    if method == "percentile":
        return min(largest, _quantile(folded, percentile / 100) * width)
    if method == "entropy":
        return min(largest, _least_divergence(folded, kind) * width)
    centres, weights = (used + 0.5) * width, folded[used].astype(np.float64)

    def error(top: float) -> float:
        return float(weights @ _squares(centres, top, kind, width))

    return _searched(error, largest)


def interval(
    counts: Array, width: float, low: float, high: float, method: str, percentile: float = PERCENTILE
) -> tuple[float, float]:
    """The range (lowest, highest) that `method` finds for uint8 with a zero point; 0 is in it."""
    _check(method, "int8", percentile)
    low, high = min(low, 0.0), max(high, 0.0)
    if method == "minmax" or low == high:
        return low, high
    half = len(counts) // 2
    if method == "percentile":
        tail = (1 - percentile / 100) / 2
        lowest = (_quantile(counts, tail) - half) * width
        highest = (_quantile(counts, 1 - tail) - half) * width
        return max(low, min(lowest, 0.0)), min(high, max(highest, 0.0))
    if method == "entropy":
        top = amplitude(counts, width, max(-low, high), method, "int8", percentile)
        return max(low, -top), min(high, top)
    used = np.flatnonzero(counts)
    centres, weights = (used - half + 0.5) * width, counts[used].astype(np.float64)

    def error(bottom: float, top: float) -> float:
        step = (top - bottom) / 255
        kept = np.clip(centres, bottom, top)
        rounded = np.rint(kept / step) * step - kept if step >= 2 * width else step / np.sqrt(12)
        return float(weights @ ((kept - centres) ** 2 + rounded**2))

    # One side after the other, and once more, since each depends on the other.
    top = bottom = 0.0
    for _ in range(2):
        top = _searched(partial(error, bottom or low), high) if high > 0 else 0.0
        bottom = -_searched(partial(lambda top, low: error(-low, top), top), -low) if low < 0 else 0.0
    return bottom, top


def fp8_rounded(values: Array) -> Array:
    """`values` as float8 e4m3 holds them (no infinity, the largest 448): saturated, rounded to nearest, ties to even."""
    step = _fp8_steps(values)
    return np.asarray(np.clip(np.rint(values / step) * step, -448, 448))


def _fp8_steps(values: Array) -> Array:
    _, exponent = np.frexp(np.minimum(np.abs(values), 448.0))
    return np.asarray(np.ldexp(1.0, np.maximum(exponent - 1, SMALLEST_NORMAL) - MANTISSA))


def _check(method: str, kind: str, percentile: float) -> None:
    if method not in METHODS:
        raise UsageError(f'There is no method "{method}". There are: {", ".join(METHODS)}.')
    if kind not in LARGEST:
        raise UsageError(f'There is no quantised type "{kind}". There are: {", ".join(LARGEST)}.')
    if not 50 < percentile <= 100:
        raise UsageError(f"The percentile is {percentile}, and must be above 50 and at most 100, such as 99.99.")


def _folded(counts: Array) -> Array:
    """The histogram of absolute values."""
    half = len(counts) // 2
    return np.asarray(counts[half:] + counts[:half][::-1])


def _quantile(counts: Array, share: float) -> float:
    """The place, in bins, below which `share` of all values are; within a bin they count as evenly spread."""
    sums = np.cumsum(counts)
    wanted = share * sums[-1]
    place = min(int(np.searchsorted(sums, wanted)), len(counts) - 1)
    return float(place + 1 - (sums[place] - wanted) / max(counts[place], 1))


def _squares(centres: Array, top: float, kind: str, width: float) -> Array:
    """The squared error of values at `centres` of bins when `top` is the amplitude.

    Where the type's steps are finer than bins, the place within a bin decides, and the error is that of an evenly spread one.
    """
    scale = top / LARGEST[kind]
    kept = np.minimum(centres, top)
    steps = scale * (_fp8_steps(kept / scale) if kind == "fp8" else np.ones_like(kept))
    rounded = np.where(steps >= 2 * width, np.rint(kept / steps) * steps - kept, steps / np.sqrt(12))
    return np.asarray((kept - centres) ** 2 + rounded**2)


def _searched(error: Any, largest: float) -> float:
    """The value up to `largest` with the smallest error: over eight octaves, then closer around the best."""
    steps = np.arange(8 * COARSE + 1)
    best = int(np.argmin([error(largest * 2.0 ** (-step / COARSE)) for step in steps]))
    fine = best + np.arange(-FINE + 1, FINE) / FINE
    values = largest * 2.0 ** (-np.maximum(fine, 0) / COARSE)
    return float(values[int(np.argmin([error(value) for value in values]))])


def _least_divergence(counts: Array, kind: str) -> float:
    """The place, in bins, where clipping loses the least information (Kullback-Leibler) with the numbers of `kind`.

    The algorithm of TensorRT's entropy calibrator, as pytorch-quantization has it (`_compute_amax_entropy`): every cut of
    the histogram is merged to the type's numbers, spread again over the bins that were not empty, and compared.
    """
    group = -(-len(counts) // ENTROPY_BINS)
    bins = np.add.reduceat(counts, np.arange(0, len(counts), group)).astype(np.float64)
    if len(bins) > 1:
        bins[0] = bins[1]  # zeros would outweigh all else
    total, levels = bins.sum(), 128
    best, place = np.inf, len(bins)
    for cut in range(min(levels, len(bins)), len(bins) + 1):
        head = bins[:cut]
        starts = _cells(cut, levels, kind)
        filled = np.add.reduceat((head > 0).astype(np.int64), starts)
        means = np.add.reduceat(head, starts) / np.maximum(filled, 1)
        coarse = np.repeat(means, np.diff(starts, append=cut)) * (head > 0)
        reference = head.copy()
        reference[-1] += total - head.sum()
        divergence = _divergence(reference, coarse)
        if divergence <= best:  # of equals, the widest
            best, place = divergence, cut
    return place * group


def _cells(cut: int, levels: int, kind: str) -> Array:
    """Where, among `cut` bins, those begin that become one number of the type."""
    if kind == "int8":
        return np.unique(-(-np.arange(levels) * cut // levels))
    numbers = fp8_rounded((np.arange(cut) + 0.5) * (LARGEST["fp8"] / cut))
    return np.concatenate([[0], np.flatnonzero(np.diff(numbers)) + 1])


def _divergence(reference: Array, other: Array) -> float:
    there = reference > 0
    if (other[there] <= 0).any():
        return float("inf")
    p, q = reference[there] / reference.sum(), other[there] / other.sum()
    return float((p * np.log(p / q)).sum())
