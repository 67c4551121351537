"""Find the largest batch that keeps a latency budget, with few trials."""

from __future__ import annotations

import math
from collections.abc import Callable

MOST_IMAGES = 256  # largest batch that is tried
GROWTH = 8  # largest factor between a batch that keeps the budget and the next trial, for memory


def largest_batch(budget: float, milliseconds: Callable[[int], float]) -> tuple[int, float]:
    """Return the largest batch up to MOST_IMAGES whose time is within the budget, and its time.

    Each trial is at the batch where the line through the nearest two known times meets the budget. Every third one halves the
    interval, so that times far from a line also need few trials.

    Args:
        budget: Milliseconds.
        milliseconds: Returns the time of a batch; infinity if it does not run. It is called once for each trial.

    Returns:
        The batch and its time; 0 and the time of one image if that is over the budget.
    """
    times = {0: 0.0, 1: milliseconds(1)}
    if not times[1] <= budget:
        return 0, times[1]
    low, high = 1, MOST_IMAGES + 1
    while high - low > 1:
        if high in times and (math.isinf(times[high]) or len(times) % 3 == 0):
            guess = (low + high) // 2
        else:
            other = high if high in times else max(batch for batch in times if batch < low)
            slope = (times[other] - times[low]) / (other - low)
            guess = low + int(min((budget - times[low]) / slope, high)) if slope > 0 else high
        guess = min(max(guess, low + 1), high - 1, GROWTH * low)
        times[guess] = milliseconds(guess)
        low, high = (guess, high) if times[guess] <= budget else (low, guess)
    return low, times[low]
