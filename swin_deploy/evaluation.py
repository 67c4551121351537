"""Accuracy of a bundle's graphs on images, and their distance from an fp32 reference."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from swin_deploy.options import Array, Size
from swin_deploy.parity import Runnable, decibels, json_figures

LOGITS = "logits"


@dataclass(frozen=True)
class Score:
    """Result of one graph over all samples. A figure that could not be measured is None.

    Attributes:
        file: The graph's file in the bundle; empty for PyTorch.
        top1: Fraction of samples whose best class is the labelled one.
        top5: Fraction of samples whose labelled class is among the best five.
        top1_agreement: Fraction of samples with the same best class as the reference.
        relative_l2: |test - reference| / |reference| of `output`, averaged over samples.
        sqnr_db: Energy of the reference over the energy of the difference of `output`, in dB.
        output: The output with the lowest SQNR.
        not_finite: Number of samples with NaN or infinity in an output.
    """

    file: str
    precision: str
    image_size: Size
    backend: str
    samples: int
    top1: float | None
    top5: float | None
    top1_agreement: float | None
    relative_l2: float | None
    sqnr_db: float | None
    output: str
    not_finite: int

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as JSON values; infinity becomes None."""
        return json_figures(self)


@dataclass(frozen=True)
class Evaluation:
    """Scores of a bundle's graphs.

    Attributes:
        rule: How labels were matched to class numbers; None without labels.
        against: The reference: "the fp32 graph", or "PyTorch fp32", which is then the first score of each image size.
        left_out: Graphs that were not run, with the reason.
    """

    samples: int
    rule: str | None
    against: str
    scores: tuple[Score, ...]
    left_out: Mapping[str, str] = field(default_factory=dict)

    def score(self, precision: str) -> Score:
        """Return the score of the graph with this precision and the first image size. Raises KeyError if there is none."""
        return {score.precision: score for score in reversed(self.scores) if score.file}[precision]


@dataclass
class GraphScorer:
    """A graph to run, and the sums from which its score is computed: hits, and energies by output."""

    file: str  # empty for PyTorch
    precision: str
    image_size: Size
    runtime: Runnable
    samples: int = 0
    hits: int = 0
    hits_in_five: int = 0
    agreements: int = 0
    not_finite: int = 0
    distance: dict[str, float] = field(default_factory=dict)
    power: dict[str, float] = field(default_factory=dict)
    error: dict[str, float] = field(default_factory=dict)

    def add(self, outputs: Mapping[str, Array], labels: Array | None, reference: Mapping[str, Array] | None) -> None:
        """Add the outputs of one batch, by name. `reference` is None for the reference itself."""
        flat = {name: array.reshape(len(array), -1).astype(np.float64) for name, array in outputs.items()}
        finite = np.logical_and.reduce([np.isfinite(array).all(axis=1) for array in flat.values()])
        self.samples += len(finite)
        self.not_finite += int((~finite).sum())
        if labels is not None:
            ranks = _ranks(flat[LOGITS], labels)
            self.hits += int((finite & (ranks < 1)).sum())
            self.hits_in_five += int((finite & (ranks < 5)).sum())
        if reference is None:
            return
        if LOGITS in flat and outputs[LOGITS].ndim == 2:  # not the map of a checkpoint without pooling
            self.agreements += int((finite & (flat[LOGITS].argmax(axis=1) == reference[LOGITS].argmax(axis=1))).sum())
        for name, array in flat.items():
            exact = reference[name].reshape(len(array), -1).astype(np.float64)
            square, error = np.square(exact).sum(axis=1), np.square(array - exact).sum(axis=1)
            distance = np.sqrt(error / np.maximum(square, np.finfo(np.float64).tiny))
            for sums, values in ((self.power, square), (self.error, error), (self.distance, distance)):
                sums[name] = sums.get(name, 0.0) + float(values.sum())

    def score(self, labelled: bool, classes: int) -> Score:
        """Return the score of all batches added so far."""
        compared = bool(self.power)
        sqnr_db = {name: decibels(self.power[name], self.error[name]) for name in self.power}
        worst = min(sqnr_db, key=lambda name: sqnr_db[name], default=self.runtime.outputs[0].name)
        return Score(
            self.file,
            self.precision,
            self.image_size,
            self.runtime.title,
            self.samples,
            top1=self.hits / self.samples if labelled else None,
            top5=self.hits_in_five / self.samples if labelled and classes > 5 else None,
            top1_agreement=self.agreements / self.samples if compared and classes else None,
            relative_l2=self.distance[worst] / self.samples if compared else None,
            sqnr_db=sqnr_db[worst] if compared else None,
            output=worst,
            not_finite=self.not_finite,
        )


def evaluate_graphs(
    graphs: Sequence[GraphScorer],
    batches: Iterable[Mapping[Size, Mapping[str, Array]]],
    labels: Sequence[int] | None,
    classes: int,
    progress: Callable[[int], None],
) -> tuple[Score, ...]:
    """Run all graphs in one pass over the data and score them against the first fp32 graph of their image size.

    For each image size, an fp32 graph comes first. `batches` are feeds by image size, and `labels` the class numbers of all
    samples. `classes` is 0 if the outputs are not logits. `progress` is called with the number of samples done.
    """
    done = 0
    for feeds in batches:
        count = len(next(iter(next(iter(feeds.values())).values())))
        truth = None if labels is None else np.asarray(labels[done : done + count])
        references: dict[Size, Mapping[str, Array]] = {}
        for graph in graphs:
            outputs = graph.runtime.run(feeds[graph.image_size])
            if classes:
                outputs = {LOGITS: outputs[LOGITS]}
            graph.add(outputs, truth, references.get(graph.image_size))
            if graph.precision == "fp32":
                references.setdefault(graph.image_size, outputs)
        done += count
        progress(done)
    return tuple(graph.score(labels is not None, classes) for graph in graphs)


def _ranks(logits: Array, labels: Array) -> Array:
    """Return how many classes rank before the labelled one; of equal logits, the lower class number ranks first."""
    own = np.take_along_axis(logits, labels[:, None], axis=1)
    earlier = np.arange(logits.shape[1]) < labels[:, None]
    return np.asarray(((logits > own) | ((logits == own) & earlier)).sum(axis=1))
