"""Calibrators: choose the range of a quantized type from a histogram by minmax, percentile, entropy or mse.

A histogram has `counts` int64 [2 * n] of bins `width` wide; bin i starts at (i - n) * width. The amax of a symmetric type is
the value that its largest number represents: 127 for int8, 448 for float8 E4M3.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from swin_deploy.errors import unknown
from swin_deploy.options import Array

METHODS = ("minmax", "percentile", "entropy", "mse")
TYPE_MAX = {"int8": 127.0, "fp8": 448.0}  # largest number of each type
PERCENTILE = 99.99
ENTROPY_BINS = 2048  # as in TensorRT and pytorch-quantization
SMALLEST_NORMAL, MANTISSA = -6, 3  # of float8 E4M3: exponent, bits
COARSE, FINE = 12, 8  # steps of a search per octave, and between two of these


def compute_amax(counts: Array, width: float, amax: float, method: str, kind: str) -> float:
    """Choose the amax of the symmetric type "int8" or "fp8", at most `amax`, the largest absolute value seen."""
    if method not in METHODS:
        raise unknown("method", method, METHODS)
    if kind not in TYPE_MAX:
        raise unknown("quantized type", kind, TYPE_MAX)
    if method == "minmax" or amax == 0:
        return amax
    half = len(counts) // 2
    folded = counts[half:] + counts[:half][::-1]  # the histogram of absolute values
    used = np.flatnonzero(folded)
    folded = folded[: used[-1] + 1]
    if method == "percentile":
        return min(amax, _quantile(folded, PERCENTILE / 100) * width)
    if method == "entropy":
        return min(amax, _least_divergence(folded, kind) * width)
    centres, weights = (used + 0.5) * width, folded[used].astype(np.float64)
    return _searched(lambda top: float(weights @ _squares(centres, top, kind, width)), amax)


def compute_range(counts: Array, width: float, low: float, high: float, method: str) -> tuple[float, float]:
    """Choose the (lowest, highest) value of uint8 with a zero point, within those seen, `low` and `high`, and 0."""
    if method not in METHODS:
        raise unknown("method", method, METHODS)
    low, high = min(low, 0.0), max(high, 0.0)
    if method == "minmax" or low == high:
        return low, high
    half = len(counts) // 2
    if method == "percentile":
        tail = (1 - PERCENTILE / 100) / 2
        lowest, highest = ((_quantile(counts, share) - half) * width for share in (tail, 1 - tail))
        return max(low, min(lowest, 0.0)), min(high, max(highest, 0.0))
    if method == "entropy":
        top = compute_amax(counts, width, max(-low, high), method, "int8")
        return max(low, -top), min(high, top)
    used = np.flatnonzero(counts)
    centres, weights = (used - half + 0.5) * width, counts[used].astype(np.float64)

    def error(bottom: float, top: float) -> float:
        step = (top - bottom) / 255
        kept = np.clip(centres, bottom, top)
        rounded = np.rint(kept / step) * step - kept if step >= 2 * width else step / np.sqrt(12)
        return float(weights @ ((kept - centres) ** 2 + rounded**2))

    # Each side depends on the other, so both are searched twice.
    top = bottom = 0.0
    for _ in range(2):
        top = _searched(partial(error, bottom or low), high) if high > 0 else 0.0
        bottom = -_searched(partial(lambda top, low: error(-low, top), top), -low) if low < 0 else 0.0
    return bottom, top


def round_to_fp8(values: Array) -> Array:
    """Round to float8 E4M3 (without infinity; largest number 448): saturated, to nearest, ties to even."""
    step = _fp8_steps(values)
    return np.asarray(np.clip(np.rint(values / step) * step, -448, 448))


def _fp8_steps(values: Array) -> Array:
    _, exponent = np.frexp(np.minimum(np.abs(values), 448.0))
    return np.asarray(np.ldexp(1.0, np.maximum(exponent - 1, SMALLEST_NORMAL) - MANTISSA))


def _quantile(counts: Array, share: float) -> float:
    """Return the position, in bins, below which `share` of all values lie, assumed to be uniform within a bin."""
    sums = np.cumsum(counts)
    wanted = share * sums[-1]
    place = min(int(np.searchsorted(sums, wanted)), len(counts) - 1)
    return float(place + 1 - (sums[place] - wanted) / max(counts[place], 1))


def _squares(centres: Array, top: float, kind: str, width: float) -> Array:
    """Return the squared error of the bins at `centres` for the amax `top`; values are uniform within a bin."""
    scale = top / TYPE_MAX[kind]
    kept = np.minimum(centres, top)
    steps = scale * (_fp8_steps(kept / scale) if kind == "fp8" else np.ones_like(kept))
    rounded = np.where(steps >= 2 * width, np.rint(kept / steps) * steps - kept, steps / np.sqrt(12))
    return np.asarray((kept - centres) ** 2 + rounded**2)


def _searched(error: Any, amax: float) -> float:
    """Return the value up to `amax` with the smallest error: search eight octaves, then refine around the best."""
    steps = np.arange(8 * COARSE + 1)
    best = int(np.argmin([error(amax * 2.0 ** (-step / COARSE)) for step in steps]))
    fine = best + np.arange(-FINE + 1, FINE) / FINE
    values = amax * 2.0 ** (-np.maximum(fine, 0) / COARSE)
    return float(values[int(np.argmin([error(value) for value in values]))])


def _least_divergence(counts: Array, kind: str) -> float:
    """Return the position, in bins, at which clipping has the smallest Kullback-Leibler divergence.

    This is the algorithm of TensorRT's entropy calibrator as implemented by pytorch-quantization (`_compute_amax_entropy`):
    each clipped histogram is merged to the numbers of the type, expanded to its non-empty bins, and compared.
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
        if divergence <= best:  # of equal ones, the widest
            best, place = divergence, cut
    return place * group


def _cells(cut: int, levels: int, kind: str) -> Array:
    """Return the first bin of each group, among `cut` bins, that becomes one number of the type."""
    if kind == "int8":
        return np.unique(-(-np.arange(levels) * cut // levels))
    numbers = round_to_fp8((np.arange(cut) + 0.5) * (TYPE_MAX["fp8"] / cut))
    return np.concatenate([[0], np.flatnonzero(np.diff(numbers)) + 1])


def _divergence(reference: Array, other: Array) -> float:
    there = reference > 0
    if (other[there] <= 0).any():
        return float("inf")
    p, q = reference[there] / reference.sum(), other[there] / other.sum()
    return float((p * np.log(p / q)).sum())
