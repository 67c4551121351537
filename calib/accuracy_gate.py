"""The gate: a quantised graph that loses no more and is as much faster as was asked for, or a refusal with numbers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass
from html import escape
from math import isfinite
from typing import Any

import numpy as np
from numpy.typing import NDArray

from swin_deploy.errors import GateError
from swin_deploy.evaluation import Graph, Score, evaluate_graphs
from swin_deploy.parity import Runnable, sqnr
from swin_deploy.specs import Array, Size

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


Open = Callable[[Any], AbstractContextManager[Runnable]]  # of a graph in memory
Batches = Callable[[], Iterator[Mapping[str, Array]]]
Progress = Callable[[str, int, int], None]
RANKED = 16  # samples by which layers are ranked
ROUNDS, SECONDS = 7, 0.6  # how often the two graphs take turns, and for how long


@dataclass(frozen=True)
class Judge:
    """Tells how much worse a graph is than `reference`, the fp32 one, on all samples.

    `batches()` yields feeds; `wanted` are class numbers of all samples, None where they are not known; `classes` is how many
    classes the network has, 0 where its outputs are no logits.
    """

    reference: Any
    batches: Batches
    samples: int
    size: Size
    wanted: Sequence[int] | None
    classes: int
    open_graph: Open
    progress: Progress

    @property
    def unit(self) -> str:
        """What a loss is counted in."""
        if not self.classes:
            return "% of distance from fp32 (relative L2)"
        return "points of top-1" if self.wanted is not None else "% of images classified otherwise than by fp32"

    def loss(self, model: Any) -> float:
        """By how many percentage points `model` is worse; see `unit`."""
        with ExitStack() as stack:
            graphs = [
                Graph(name, precision, self.size, stack.enter_context(self.open_graph(graph)))
                for name, precision, graph in (("fp32", "fp32", self.reference), ("quantised", "int8", model))
            ]
            feeds = ({self.size: batch} for batch in self.batches())
            scores = evaluate_graphs(graphs, feeds, self.wanted, self.classes, self._tell)
        return 100 * _loss(*scores)

    def answers(self, model: Any) -> Array:
        """All outputs of `model` on the first RANKED samples, as one vector."""
        outputs: list[Array] = []
        seen = 0
        with self.open_graph(model) as runtime:
            for batch in self.batches():
                outputs += runtime.run(batch).values()
                seen += len(next(iter(batch.values())))
                if seen >= RANKED:
                    break
        return flat(outputs)

    def _tell(self, done: int) -> None:
        self.progress("Judging", done, self.samples)


def _loss(reference: Score, found: Score) -> float:
    if found.not_finite:
        return 1.0
    if found.top1 is not None and reference.top1 is not None:
        return reference.top1 - found.top1
    return 1 - found.equal if found.equal is not None else float(found.relative_l2 or 0.0)


@dataclass(frozen=True)
class Admitted:
    """What passed: the layers that stay as they were, the ranking of all, and the loss."""

    kept: frozenset[str]
    ranking: tuple[Damage, ...]
    loss: float
    unit: str

    def facts(self) -> dict[str, Any]:
        """What a manifest should know."""
        return {
            "sensitivity": [damage.to_dict() for damage in self.ranking],
            "gate": {"loss": self.loss, "unit": self.unit, "put_back": sorted(self.kept)},
        }


def accurate(
    title: str,
    names: Sequence[str],
    graph: Callable[[Set[str]], Any],
    judge: Judge,
    max_drop: float,
    say: Callable[[str], None],
) -> Admitted:
    """The layers to leave as they were so that the others lose at most `max_drop`; `graph(kept)` makes the network.

    `title` names the precision. Raises GateError where all of them would have to be left.
    """
    say("Ranking the layers by the damage that they do")
    ranking = ranked(
        names, lambda keep: judge.answers(graph(keep)), lambda done, total: judge.progress("Ranking layers", done, total)
    )
    kept, loss = fewest(ranking, lambda keep: judge.loss(graph(keep)), max_drop)
    if len(kept) == len(names):
        raise GateError(
            f"{title} cannot be as accurate as asked for: with the most harmless of {len(names)} layers alone "
            f"({ranking[-1].name}) it loses {loss:.2f} {judge.unit} on {judge.samples} samples, and at most {max_drop:g} was "
            f"asked for. Use a graph that is not quantised, or allow more with --max-drop."
        )
    say(f"{len(names) - len(kept)} of {len(names)} layers quantised lose {loss:.2f} {judge.unit}")
    return Admitted(kept, ranking, loss, judge.unit)


@dataclass(frozen=True)
class Speed:
    """How long the graphs take, in seconds, and where that was found out; `ratio` is how many times as fast the new one is."""

    where: str
    than: str
    before: float
    after: float
    ratio: float

    def facts(self) -> dict[str, Any]:
        return {"where": self.where, "than": self.than, "before_ms": self.before * 1e3, "after_ms": self.after * 1e3,
                "speedup": self.ratio}  # fmt: skip

    def refuse_below(self, least: float, title: str, kept: int, of: int) -> None:
        """Raises GateError when it is not `least` times as fast."""
        if self.ratio < least:
            raise GateError(
                f"{title} is not as fast as asked for: with {of - kept} of {of} layers quantised it is {self.ratio:.2f} times "
                f"as fast as {self.than} ({self.after * 1e3:.2f} ms, not {self.before * 1e3:.2f}; {self.where}), and {least:g} "
                f"was asked for. Use {self.than}, or ask for less with --min-speedup."
            )


def measured(open_before: Callable[[], Any], open_after: Callable[[], Any], feeds: Mapping[str, Array], than: str) -> Speed:
    """The two runtimes timed in turns on the same feeds; one is loaded at a time: thread pools disturb each other."""
    ratios: list[float] = []
    times: tuple[list[float], list[float]] = ([], [])
    title = ""
    for _ in range(ROUNDS):
        for number, open_one in enumerate((open_before, open_after)):
            with open_one() as runtime:
                title = runtime.title
                times[number].append(_median_seconds(runtime, feeds))
        ratios.append(times[0][-1] / times[1][-1])
    before, after = (float(np.median(taken)) for taken in times)
    return Speed(f"measured here in {title}", than, before, after, float(np.median(ratios)))


def _median_seconds(runtime: Runnable, feeds: Mapping[str, Array]) -> float:
    for _ in range(3):
        runtime.run(feeds)
    taken: list[float] = []
    end = time.perf_counter() + SECONDS
    while len(taken) < 5 or time.perf_counter() < end:
        begin = time.perf_counter()
        runtime.run(feeds)
        taken.append(time.perf_counter() - begin)
    return float(np.median(taken))
