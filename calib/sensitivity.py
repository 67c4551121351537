"""Which layers 8 bits hurt most, and how few of them must stay as they were for the answers to be good enough."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from dataclasses import asdict, dataclass
from html import escape
from math import isfinite
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .quantize import sqnr

Answers = Callable[[Set[str]], NDArray[Any]]  # layers that are not quantised -> all outputs on some samples, as one vector
Tell = Callable[[int, int], None]


@dataclass(frozen=True)
class Damage:
    """The layer `name` alone in 8 bits leaves the outputs at `sqnr_db`: infinite where nothing changes, minus infinity where
    the outputs are not finite.
    """

    name: str
    sqnr_db: float

    def to_dict(self) -> dict[str, Any]:
        """The figures as JSON values; infinity becomes None."""
        return {**asdict(self), "sqnr_db": round(self.sqnr_db, 2) if isfinite(self.sqnr_db) else None}


def ranked(names: Sequence[str], answers: Answers, tell: Tell = lambda done, total: None) -> tuple[Damage, ...]:
    """Each of the layers `names` quantised alone, the most damaging one first; a few samples are enough for that."""
    everything = frozenset(names)
    reference = answers(everything)
    found = []
    for number, name in enumerate(names):
        found.append(Damage(name, sqnr(reference, answers(everything - {name}))))
        tell(number + 1, len(names))
    return tuple(sorted(found, key=lambda damage: damage.sqnr_db))


def fewest(ranking: Sequence[Damage], drop: Callable[[Set[str]], float], most: float) -> tuple[frozenset[str], float]:
    """The fewest of the most damaging layers without which the others lose at most `most`, and what they lose.

    `drop` is asked for the loss with some layers left as they were: about twice the logarithm of their number of times. Where
    no number is enough, that is all layers, and the loss with only the most harmless one quantised.
    """
    names = [damage.name for damage in ranking]
    losses: dict[int, float] = {}

    def enough(count: int) -> bool:
        losses[count] = drop(frozenset(names[:count]))
        return losses[count] <= most

    low, high = -1, 0  # as many as `low` are known to be too few
    while not enough(high):
        low, high = high, max(1, 2 * high)
        if high >= len(names):
            high = len(names) - 1
            if high <= low or not enough(high):
                return frozenset(names), losses[max(losses)]
            break
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return frozenset(names[:high]), losses[high]


def svg_from_damages(title: str, ranking: Sequence[Damage], kept: Set[str]) -> str:
    """A picture: one bar for each layer, the shorter the more it damages; those in `kept`, which stay as they were, in red."""
    row, left, right = 18, 330, 60
    largest = max((damage.sqnr_db for damage in ranking if isfinite(damage.sqnr_db)), default=1.0)
    height, width = row * len(ranking) + 60, 900
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="system-ui, sans-serif" font-size="12" fill="#222">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="20" y="24" font-weight="bold">{escape(title)}</text>',
        '<text x="20" y="42">Signal to noise of the outputs in dB when this layer alone is quantised; red ones are not</text>',
    ]
    for number, damage in enumerate(ranking):
        y = 54 + row * number
        value = max(0.0, min(damage.sqnr_db, largest))
        bar = value / max(largest, 1e-9) * (width - left - right)
        colour = "#ee6677" if damage.name in kept else "#4477aa"
        shown = f"{damage.sqnr_db:.1f}" if isfinite(damage.sqnr_db) else "no damage" if damage.sqnr_db > 0 else "not finite"
        lines.append(f'<text x="{left - 8}" y="{y + 12}" text-anchor="end">{escape(damage.name)}</text>')
        lines.append(f'<rect x="{left}" y="{y + 2}" width="{bar:.1f}" height="{row - 5}" fill="{colour}"/>')
        lines.append(f'<text x="{left + bar + 6:.1f}" y="{y + 12}">{shown}</text>')
    return "\n".join([*lines, "</svg>", ""])


def flat(outputs: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """Arrays of any shapes as one vector."""
    return np.concatenate([np.asarray(output).reshape(-1) for output in outputs])
