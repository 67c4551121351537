"""The gate: a quantised graph that loses no more and is as much faster as was asked for, or a refusal with numbers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from swin_deploy.errors import GateError
from swin_deploy.evaluation import Graph, Score, evaluate_graphs
from swin_deploy.reference import Runnable
from swin_deploy.specs import Size

from .sensitivity import Damage, fewest, flat, ranked

Array = NDArray[Any]
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
