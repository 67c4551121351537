"""Accuracy of a bundle's graphs on images, and their distance from an fp32 reference."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from swin_deploy.options import Array, Size
from swin_deploy.parity import Runnable, decibels, json_figures
from swin_deploy.tasks import scores_from_logits

LOGITS = "logits"


@dataclass(frozen=True)
class Targets:
    """What a network is measured by: the kind of its predictions, and what they should be.

    Attributes:
        prediction: "classes", "labels" or "values" (see SwinConfig.prediction); None if the outputs are not logits.
        classes: Number of logits.
        values: Class number of each sample; bool [samples, labels]; or float [samples, outputs]. None if unknown.
        rule: How labels were matched to classes; None without labels.
        activation: What turns logits into scores.
        threshold: Score above which a label is predicted.
    """

    prediction: str | None = None
    classes: int = 0
    values: Array | None = None
    rule: str | None = None
    activation: str = "softmax"
    threshold: float = 0.5


@dataclass(frozen=True)
class Score:
    """Result of one graph over all samples. A figure that could not be measured is None.

    Attributes:
        file: The graph's file in the bundle; empty for PyTorch.
        top1: Fraction of samples whose best class is the labelled one.
        top5: Fraction of samples whose labelled class is among the best five.
        top1_agreement: Fraction of samples with the same best class as the reference; of a network that predicts several
            labels, the fraction of all predicted and not predicted labels that are equal.
        relative_l2: |test - reference| / |reference| of `output`, averaged over samples.
        sqnr_db: Energy of the reference over the energy of the difference of `output`, in dB.
        output: The output with the lowest SQNR.
        not_finite: Number of samples with NaN or infinity in an output.
        mean_average_precision: Mean over the labels that occur of their average precision.
        f1: F1 of all labels together, which are predicted if their score is above the threshold.
        mae: Mean absolute error of a regression.
        outputs: `relative_l2` and `sqnr_db` of every output, such as the feature maps of a backbone, by name; empty for logits.
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
    mean_average_precision: float | None = None
    f1: float | None = None
    mae: float | None = None
    outputs: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as JSON values; infinity becomes None."""
        outputs = {
            name: {key: value if math.isfinite(value) else None for key, value in figures.items()}
            for name, figures in self.outputs.items()
        }
        return {**json_figures(self), "outputs": outputs}


@dataclass(frozen=True)
class Evaluation:
    """Scores of a bundle's graphs.

    Attributes:
        rule: How labels were matched to class numbers; None without labels.
        against: The reference: "the fp32 graph", or "PyTorch fp32", which is then the first score of each image size.
        left_out: Graphs that were not run, with the reason.
        failed: Samples that could not be read, with the reason.
    """

    samples: int
    rule: str | None
    against: str
    scores: tuple[Score, ...]
    left_out: Mapping[str, str] = field(default_factory=dict)
    failed: Mapping[str, str] = field(default_factory=dict)

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
    agreements: float = 0.0
    not_finite: int = 0
    logits: list[Array] = field(default_factory=list)  # of labels and values, which are scored together
    distance: dict[str, float] = field(default_factory=dict)
    power: dict[str, float] = field(default_factory=dict)
    error: dict[str, float] = field(default_factory=dict)

    def add(
        self, outputs: Mapping[str, Array], rows: Sequence[int], targets: Targets, reference: Mapping[str, Array] | None
    ) -> None:
        """Add the outputs of the samples `rows`, by name. `reference` is None for the reference itself."""
        # Attention weights have a row for each window of a sample.
        flat = {name: array.reshape(len(rows), -1).astype(np.float64) for name, array in outputs.items()}
        finite = np.logical_and.reduce([np.isfinite(array).all(axis=1) for array in flat.values()])
        self.samples += len(finite)
        self.not_finite += int((~finite).sum())
        if targets.values is not None and targets.prediction == "classes":
            ranks = _ranks(flat[LOGITS], targets.values[list(rows)])
            self.hits += int((finite & (ranks < 1)).sum())
            self.hits_in_five += int((finite & (ranks < 5)).sum())
        elif targets.values is not None:
            self.logits.append(flat[LOGITS].astype(np.float32))
        if reference is None:
            return
        if targets.prediction == "classes":
            self.agreements += int((finite & (flat[LOGITS].argmax(axis=1) == reference[LOGITS].argmax(axis=1))).sum())
        elif targets.prediction == "labels":
            equal = _predicted(flat[LOGITS], targets) == _predicted(reference[LOGITS].reshape(len(finite), -1), targets)
            self.agreements += float((finite * equal.mean(axis=1)).sum())
        for name, array in flat.items():
            exact = reference[name].reshape(len(array), -1).astype(np.float64)
            square, error = np.square(exact).sum(axis=1), np.square(array - exact).sum(axis=1)
            distance = np.sqrt(error / np.maximum(square, np.finfo(np.float64).tiny))
            for sums, values in ((self.power, square), (self.error, error), (self.distance, distance)):
                sums[name] = sums.get(name, 0.0) + float(values.sum())

    def score(self, targets: Targets, rows: Sequence[int]) -> Score:
        """Return the score of all batches added so far, which are the samples `rows`."""
        compared = bool(self.power)
        sqnr_db = {name: decibels(self.power[name], self.error[name]) for name in self.power}
        worst = min(sqnr_db, key=lambda name: sqnr_db[name], default=self.runtime.outputs[0].name)
        ranked = targets.values is not None and targets.prediction == "classes"
        figures: dict[str, float] = {}
        samples = max(self.samples, 1)
        if self.logits and targets.values is not None:
            figures = _figures(np.concatenate(self.logits), targets.values[list(rows)], targets)
        return Score(
            self.file,
            self.precision,
            self.image_size,
            self.runtime.title,
            self.samples,
            top1=self.hits / samples if ranked else None,
            top5=self.hits_in_five / samples if ranked and targets.classes > 5 else None,
            top1_agreement=self.agreements / samples if compared and targets.prediction in ("classes", "labels") else None,
            relative_l2=self.distance[worst] / samples if compared else None,
            sqnr_db=sqnr_db[worst] if compared else None,
            output=worst,
            not_finite=self.not_finite,
            outputs={
                name: {"relative_l2": self.distance[name] / samples, "sqnr_db": sqnr_db[name]}
                for name in (sqnr_db if targets.prediction is None else ())
            },
            **figures,
        )


def evaluate_graphs(
    graphs: Sequence[GraphScorer],
    batches: Iterable[tuple[Sequence[int], Mapping[Size, Mapping[str, Array]]]],
    targets: Targets,
    progress: Callable[[int], None],
) -> tuple[Score, ...]:
    """Run all graphs in one pass over the data and score them against the first fp32 graph of their image size.

    For each image size, an fp32 graph comes first. `batches` are sample numbers with feeds by image size. `progress` is called
    with the number of samples done.
    """
    done: list[int] = []
    for rows, feeds in batches:
        references: dict[Size, Mapping[str, Array]] = {}
        for graph in graphs:
            outputs = graph.runtime.run(feeds[graph.image_size])
            if targets.prediction is not None:
                outputs = {LOGITS: outputs[LOGITS]}
            graph.add(outputs, rows, targets, references.get(graph.image_size))
            if graph.precision == "fp32":
                references.setdefault(graph.image_size, outputs)
        done.extend(rows)
        progress(done[-1] + 1)
    return tuple(graph.score(targets, done) for graph in graphs)


def _ranks(logits: Array, labels: Array) -> Array:
    """Return how many classes rank before the labelled one; of equal logits, the lower class number ranks first."""
    own = np.take_along_axis(logits, labels[:, None], axis=1)
    earlier = np.arange(logits.shape[1]) < labels[:, None]
    return np.asarray(((logits > own) | ((logits == own) & earlier)).sum(axis=1))


def _predicted(logits: Array, targets: Targets) -> Array:
    return np.asarray(scores_from_logits(logits, targets.activation) > targets.threshold)


def _figures(logits: Array, wanted: Array, targets: Targets) -> dict[str, float]:
    """Return the figures of a Score that are defined for all samples together."""
    if targets.prediction == "values":
        error = np.abs(scores_from_logits(logits, targets.activation) - wanted)
        return {"mae": float(np.nan_to_num(error, nan=np.inf).mean())}
    found = _predicted(logits, targets)
    precisions = [_average_precision(logits[:, label], wanted[:, label]) for label in np.flatnonzero(wanted.any(axis=0))]
    both, either = int((found & wanted).sum()), int(found.sum()) + int(wanted.sum())
    return {"mean_average_precision": float(np.mean(precisions or [0.0])), "f1": 2 * both / either if either else 0.0}


def _average_precision(logits: Array, wanted: Array) -> float:
    """Sum the precision at every distinct score, weighted by the recall that it adds; NaN ranks last."""
    keys = np.where(np.isnan(logits), -np.inf, logits)
    order = np.argsort(-keys, kind="stable")
    last = np.append(np.flatnonzero(keys[order][1:] != keys[order][:-1]), len(order) - 1)
    hits = np.cumsum(wanted[order])[last]
    return float((np.diff(hits, prepend=0) / hits[-1] * hits / (last + 1)).sum())
