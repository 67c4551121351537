"""How good the graphs of a bundle are on data: right answers, and how far each is from a reference in fp32."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from swin_deploy.parity import Runnable
from swin_deploy.specs import Array, Size

LOGITS = "logits"


@dataclass(frozen=True)
class Score:
    """One graph, over all samples; what could not be measured is None.

    `top1` and `top5` are shares of right answers, `equal` that of samples with the reference's best class. `relative_l2` is
    |test - reference| / |reference|, a mean over samples, and `sqnr_db` the power of the reference over that of the difference,
    in decibels; both are of `output`, the worst one. `not_finite` counts samples with NaN or infinity.
    """

    file: str
    precision: str
    image_size: Size
    backend: str
    samples: int
    top1: float | None
    top5: float | None
    equal: float | None
    relative_l2: float | None
    sqnr_db: float | None
    output: str
    not_finite: int

    def to_dict(self) -> dict[str, Any]:
        """The figures as JSON values; infinite ones become None."""
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(self).items()}


@dataclass(frozen=True)
class Evaluation:
    """The scores of a bundle's graphs. `rule` says how labels became class numbers; None where there were none.

    `against` is the reference, "the fp32 graph" or "PyTorch fp32", which is itself the first score of its image size.
    `left_out` are graphs that were not run, and why: of another image size than data that comes prepared for one, or in a
    form of which the back end makes other answers.
    """

    samples: int
    rule: str | None
    against: str
    scores: tuple[Score, ...]
    left_out: Mapping[str, str] = field(default_factory=dict)

    def score(self, precision: str) -> Score:
        """The score of the graph of that precision at the first image size. Raises KeyError where there is none."""
        return {score.precision: score for score in reversed(self.scores) if score.file}[precision]


@dataclass
class Graph:
    """A graph to be scored, and what is counted while it is: right answers, and powers by output."""

    file: str  # empty for PyTorch
    precision: str
    image_size: Size
    runtime: Runnable
    samples: int = 0
    right: int = 0
    right_of_five: int = 0
    equal: int = 0
    not_finite: int = 0
    distance: dict[str, float] = field(default_factory=dict)
    power: dict[str, float] = field(default_factory=dict)
    error: dict[str, float] = field(default_factory=dict)

    def count(self, found: Mapping[str, Array], wanted: Array | None, reference: Mapping[str, Array] | None) -> None:
        """Counts one batch: outputs by name, class numbers, and the reference's outputs; None for the reference itself."""
        flat = {name: array.reshape(len(array), -1).astype(np.float64) for name, array in found.items()}
        finite = np.logical_and.reduce([np.isfinite(array).all(axis=1) for array in flat.values()])
        self.samples += len(finite)
        self.not_finite += int((~finite).sum())
        if wanted is not None:
            places = _places(flat[LOGITS], wanted)
            self.right += int((finite & (places < 1)).sum())
            self.right_of_five += int((finite & (places < 5)).sum())
        if reference is None:
            return
        if LOGITS in flat:
            self.equal += int((finite & (flat[LOGITS].argmax(axis=1) == reference[LOGITS].argmax(axis=1))).sum())
        for name, array in flat.items():
            exact = reference[name].reshape(len(array), -1).astype(np.float64)
            square, error = np.square(exact).sum(axis=1), np.square(array - exact).sum(axis=1)
            distance = np.sqrt(error / np.maximum(square, np.finfo(np.float64).tiny))
            for sums, values in ((self.power, square), (self.error, error), (self.distance, distance)):
                sums[name] = sums.get(name, 0.0) + float(values.sum())

    def score(self, labelled: bool, classes: int) -> Score:
        """The score of what was counted."""
        compared = bool(self.power)
        decibels = {name: _decibels(self.power[name], self.error[name]) for name in self.power}
        worst = min(decibels, key=lambda name: decibels[name], default=self.runtime.outputs[0].name)
        return Score(
            self.file,
            self.precision,
            self.image_size,
            self.runtime.title,
            self.samples,
            top1=self.right / self.samples if labelled else None,
            top5=self.right_of_five / self.samples if labelled and classes > 5 else None,
            equal=self.equal / self.samples if compared and classes else None,
            relative_l2=self.distance[worst] / self.samples if compared else None,
            sqnr_db=decibels[worst] if compared else None,
            output=worst,
            not_finite=self.not_finite,
        )


def evaluate_graphs(
    graphs: Sequence[Graph],
    batches: Iterable[Mapping[Size, Mapping[str, Array]]],
    wanted: Sequence[int] | None,
    classes: int,
    progress: Callable[[int], None],
) -> tuple[Score, ...]:
    """The scores of `graphs` in one pass over `batches`, each with the feeds for every image size.

    `wanted` holds the class number of every sample; `classes` is how many there are, 0 where outputs are no logits, of which
    only distances are taken. Graphs are compared with the first one of their image size, if that is fp32.
    """
    done = 0
    for feeds in batches:
        count = len(next(iter(next(iter(feeds.values())).values())))
        truth = None if wanted is None else np.asarray(wanted[done : done + count])
        references: dict[Size, Mapping[str, Array]] = {}
        for graph in graphs:
            found = graph.runtime.run(feeds[graph.image_size])
            if classes:
                found = {LOGITS: found[LOGITS]}
            graph.count(found, truth, references.get(graph.image_size))
            if graph.precision == "fp32":
                references.setdefault(graph.image_size, found)
        done += count
        progress(done)
    return tuple(graph.score(wanted is not None, classes) for graph in graphs)


def _places(logits: Array, wanted: Array) -> Array:
    """How many classes come before the wanted one, best first; of equal ones the lower number is first."""
    mine = np.take_along_axis(logits, wanted[:, None], axis=1)
    earlier = np.arange(logits.shape[1]) < wanted[:, None]
    return np.asarray(((logits > mine) | ((logits == mine) & earlier)).sum(axis=1))


def _decibels(power: float, error: float) -> float:
    if not math.isfinite(error):
        return -math.inf
    if error == 0:
        return math.inf
    return 10 * math.log10(power / error) if power > 0 else -math.inf
