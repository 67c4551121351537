"""Pillow's resampling as a product with constants: the numbers that `Image.resize` itself computes with, per axis.

Pillow resizes 8-bit images along one axis, then along the other, each time as sums of whole numbers (weights in units of
2^-22), rounded and cut to 0..255. The weights follow from the two lengths and the filter alone (src/libImaging/Resample.c).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from swin_deploy.errors import UsageError
from swin_deploy.preprocess import Preprocessor
from swin_deploy.specs import Size

Weights = NDArray[np.int64]

PRECISION = 22  # bits behind the point
UNIT = 1 << PRECISION
NEAREST = 0


def _box(x: float) -> float:
    return 1.0 if -0.5 < x <= 0.5 else 0.0


def _bilinear(x: float) -> float:
    return max(1.0 - abs(x), 0.0)


def _hamming(x: float) -> float:
    x = abs(x) * math.pi
    if x == 0:
        return 1.0
    return 0.0 if x >= math.pi else math.sin(x) / x * (0.54 + 0.46 * math.cos(x))


def _bicubic(x: float) -> float:
    a, x = -0.5, abs(x)
    if x < 1:
        return ((a + 2) * x - (a + 3)) * x * x + 1
    return (((x - 5) * x + 8) * x - 4) * a if x < 2 else 0.0


def _lanczos(x: float) -> float:
    def sinc(x: float) -> float:
        return 1.0 if x == 0 else math.sin(x * math.pi) / (x * math.pi)

    return sinc(x) * sinc(x / 3) if -3 <= x < 3 else 0.0


# by Pillow's number: the filter, and how far it reaches
FILTERS: dict[int, tuple[Callable[[float], float], float]] = {
    1: (_lanczos, 3.0),
    2: (_bilinear, 1.0),
    3: (_bicubic, 2.0),
    4: (_box, 0.5),
    5: (_hamming, 1.0),
}


def axis_weights(length: int, target: int, resample: int) -> Weights:
    """[target, length]: what each of `length` pixels adds to each of `target` ones, in units of 2^-22."""
    result = np.zeros((target, length), dtype=np.int64)
    if length == target:
        np.fill_diagonal(result, UNIT)
        return result
    if resample == NEAREST:
        result[np.arange(target), _nearest(length, target)] = UNIT
        return result
    function, support = FILTERS[resample]
    scale = length / target
    stretch = max(scale, 1.0)
    support *= stretch
    for row in range(target):
        center = (row + 0.5) * scale
        first, end = max(int(center - support + 0.5), 0), min(int(center + support + 0.5), length)
        values = [function((place - center + 0.5) * (1.0 / stretch)) for place in range(first, end)]
        total = sum(values)
        for place, value in enumerate(values, start=first):
            scaled = (value / total if total else value) * UNIT
            result[row, place] = int(scaled - 0.5 if value < 0 else scaled + 0.5)
    return result


def frame_weights(preprocessor: Preprocessor, frame_size: Size) -> tuple[Weights, Weights]:
    """Of the rows and of the columns of a frame, what `preprocessor` does to them: resize and crop (outside it is black)."""
    resized = preprocessor.resized_to(*frame_size)
    both = [axis_weights(length, target, preprocessor.resample) for length, target in zip(frame_size, resized, strict=True)]
    if preprocessor.do_center_crop and preprocessor.crop_size is not None:
        both = [_cropped(weights, side) for weights, side in zip(both, preprocessor.crop_size, strict=True)]
    return both[0], both[1]


def rows_first(preprocessor: Preprocessor, frame_size: Size) -> bool:
    """Whether Pillow resizes such a frame along its height first; newer releases choose, so the installed one is asked."""
    from PIL import Image

    height, width = preprocessor.resized_to(*frame_size)
    kind = Image.Resampling(preprocessor.resample)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, frame_size, dtype=np.uint8))
    made = noise.resize((width, height), kind)
    columns_first = noise.resize((width, noise.height), kind).resize((width, height), kind)
    return not np.array_equal(np.asarray(made), np.asarray(columns_first))


def split_exactly(weights: Weights) -> tuple[NDArray[np.float32], NDArray[np.float32], int]:
    """(high, low, shift) with weights = high * 2^shift + low, such that float32 sums them over pixels without rounding.

    Their products with 8-bit pixels add up to whole numbers below 2^24 in any order; 11 bits hold each of them, so that TF32
    is exact, too.
    """
    for shift in range(12, 0, -1):
        half = 1 << (shift - 1)
        low = (weights + half) % (2 * half) - half
        high = (weights - low) >> shift
        # Whatever is added first, a sum lies between those of all negative and of all positive terms.
        signs = (np.clip(sign * part, 0, None) for part in (high, low) for sign in (1, -1))
        if max(255 * int(part.sum(axis=1).max()) for part in signs) < 1 << 24 and int(np.abs(high).max()) <= 1 << 11:
            return high.astype(np.float32), low.astype(np.float32), shift
    raise UsageError(
        f"A frame of {weights.shape[1]} pixels cannot be resized to {len(weights)} in float32. Make it smaller outside, and "
        f"export without --embed-resize."
    )


def _nearest(length: int, target: int) -> list[int]:
    step = length / target
    place, places = step * 0.5, []
    for _ in range(target):
        places.append(min(int(place), length - 1))
        place += step
    return places


def _cropped(weights: Weights, side: int) -> Weights:
    first = (len(weights) - side) // 2
    result = np.zeros((side, weights.shape[1]), dtype=np.int64)
    inside = [row for row in range(side) if 0 <= first + row < len(weights)]
    result[inside] = weights[[first + row for row in inside]]
    return result
