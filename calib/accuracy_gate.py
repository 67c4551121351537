"""Accuracy and speed gate for quantized graphs: rank layers by sensitivity, keep the worst in fp32, or refuse with figures."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any

import numpy as np

from swin_deploy.errors import GateError, MissingDependencyError
from swin_deploy.evaluation import GraphScorer, Score, Targets, evaluate_graphs
from swin_deploy.options import Array, Progress, Size, no_progress
from swin_deploy.parity import Runnable, sqnr
from swin_deploy.plots import BLUE, RED, Bar, bar_chart

_LOG = logging.getLogger(__name__)
OpenModel = Callable[[Any], AbstractContextManager[Runnable]]  # of a graph in memory
RANKING_SAMPLES = 16  # layers are ranked on the first samples
ROUNDS, SECONDS = 7, 0.6  # of a speed comparison: how often the graphs alternate, and how long each is timed


@dataclass(frozen=True)
class LayerSensitivity:
    """SQNR of the outputs in dB if only the layer `name` is quantized (see parity.sqnr)."""

    name: str
    sqnr_db: float

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as JSON values; infinity becomes None."""
        return {**asdict(self), "sqnr_db": round(self.sqnr_db, 2) if isfinite(self.sqnr_db) else None}


def rank_layers(
    names: Sequence[str], outputs: Callable[[Set[str]], Array], progress: Progress = no_progress
) -> tuple[LayerSensitivity, ...]:
    """Quantize each layer alone and sort the layers by the resulting SQNR, most sensitive first.

    `outputs` returns all outputs on a few samples as one vector, given the layers that stay in fp32.
    """
    everything = frozenset(names)
    reference = outputs(everything)
    found = []
    for number, name in enumerate(names):
        found.append(LayerSensitivity(name, sqnr(reference, outputs(everything - {name}))))
        progress("Ranking layers", number + 1, len(names))
    return tuple(sorted(found, key=lambda layer: layer.sqnr_db))


def fewest_fp32_layers(
    ranking: Sequence[LayerSensitivity], loss: Callable[[Set[str]], float], max_loss: float
) -> tuple[frozenset[str], float]:
    """Find the smallest set of the most sensitive layers to keep in fp32 so that the loss is at most `max_loss`.

    `loss` returns the loss, given the layers that stay in fp32, and is called about 2 log2(layers) times. If no set suffices,
    all layers are returned, with the loss if only the least sensitive one is quantized.
    """
    names = [layer.name for layer in ranking]
    losses: dict[int, float] = {}

    def enough(count: int) -> bool:
        losses[count] = loss(frozenset(names[:count]))
        return losses[count] <= max_loss

    low, high = -1, 0  # `low` layers are known to be too few
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


def sensitivity_svg(title: str, ranking: Sequence[LayerSensitivity], kept: Set[str]) -> bytes | None:
    """Draw one bar per layer, the layers in `kept` (which stay in fp32) in red. Returns None if matplotlib is missing."""
    largest = max((layer.sqnr_db for layer in ranking if isfinite(layer.sqnr_db)), default=1.0)
    bars = []
    for layer in ranking:
        note = f"{layer.sqnr_db:.1f}" if isfinite(layer.sqnr_db) else "no loss" if layer.sqnr_db > 0 else "not finite"
        length = max(0.0, min(layer.sqnr_db, largest))
        bars.append(Bar(layer.name, [(length, RED if layer.name in kept else BLUE)], note))
    axis = "SQNR of the outputs in dB if only this layer is quantized"
    try:
        return bar_chart(bars, title, axis, {BLUE: "quantized", RED: "kept in fp32"})
    except MissingDependencyError as error:
        _LOG.info("The sensitivity of the layers is not drawn. %s", error)
        return None


@dataclass(frozen=True)
class GateResult:
    """Layers that stay in fp32, the sensitivity of all layers, and the loss of the accepted graph in `unit`."""

    kept: frozenset[str]
    ranking: tuple[LayerSensitivity, ...]
    loss: float
    unit: str

    def to_dict(self) -> dict[str, Any]:
        """Return the entry for the manifest."""
        return {
            "sensitivity": [layer.to_dict() for layer in self.ranking],
            "gate": {"loss": self.loss, "unit": self.unit, "put_back": sorted(self.kept)},
        }


@dataclass(frozen=True)
class AccuracyGate:
    """Measures how much accuracy quantized graphs lose against the fp32 graph `reference` on all samples.

    `targets` are what the network predicts, with the labels of the samples if they are known. `rewrites` is a clause about the
    rewritten fp32 network, for a refusal.
    """

    reference: Any
    batches: Callable[[], Iterator[Mapping[str, Array]]]
    samples: int
    image_size: Size
    targets: Targets
    open_model: OpenModel
    progress: Progress = no_progress
    rewrites: str = "rewrites were not compared"

    @property
    def unit(self) -> str:
        """Unit of a loss."""
        labelled = self.targets.values is not None
        return {
            "classes": "points of top-1" if labelled else "% of images with another best class than in fp32",
            "labels": "points of mAP" if labelled else "% of labels predicted differently than in fp32",
            "values": "% more mean absolute error than fp32" if labelled else "% relative L2 distance from fp32",
        }.get(str(self.targets.prediction), "% relative L2 distance from fp32 (of the worst output)")

    def loss(self, model: Any) -> float:
        """Return how many percentage points `model` is worse than fp32, in `unit`."""
        with ExitStack() as stack:
            fp32, test = (
                GraphScorer(name, name, self.image_size, stack.enter_context(self.open_model(graph)))
                for name, graph in (("fp32", self.reference), ("int8", model))
            )
            scores = evaluate_graphs(
                [fp32, test], self._feeds(), self.targets, lambda n: self.progress("Measuring accuracy", n, self.samples)
            )
        return 100 * _loss(*scores)

    def _feeds(self) -> Iterator[tuple[range, dict[Size, Mapping[str, Array]]]]:
        done = 0
        for batch in self.batches():
            count = len(next(iter(batch.values())))
            yield range(done, done + count), {self.image_size: batch}
            done += count

    def outputs(self, model: Any, scales: Mapping[str, float] | None = None) -> Array:
        """Return all outputs of `model` on the first RANKING_SAMPLES samples as one vector, each divided by its scale."""
        found = self._by_output(model)
        return np.concatenate([found[name] / ((scales or {}).get(name) or 1.0) for name in found])

    def _by_output(self, model: Any) -> dict[str, Array]:
        parts: dict[str, list[Array]] = {}
        seen = 0
        with self.open_model(model) as runtime:
            for batch in self.batches():
                for name, output in runtime.run(batch).items():
                    parts.setdefault(name, []).append(np.asarray(output).reshape(-1))
                seen += len(next(iter(batch.values())))
                if seen >= RANKING_SAMPLES:
                    break
        return {name: np.concatenate(found) for name, found in parts.items()}

    def select_layers(self, title: str, names: Sequence[str], graph: Callable[[Set[str]], Any], max_drop: float) -> GateResult:
        """Choose the layers to keep in fp32 so that the loss is at most `max_drop`; `graph` builds a graph with these kept.

        Raises GateError if the loss is larger even with a single quantized layer. `title` names the precision.
        """
        _LOG.info("Ranking the layers by sensitivity")
        # Every stage of a backbone counts equally, however large its map is.
        fp32 = self._by_output(self.reference)
        scales = {name: float(np.linalg.norm(output)) for name, output in fp32.items()} if len(fp32) > 1 else {}
        ranking = rank_layers(names, lambda keep: self.outputs(graph(keep), scales), self.progress)
        kept, loss = fewest_fp32_layers(ranking, lambda keep: self.loss(graph(keep)), max_drop)
        if len(kept) == len(names):
            alone = ", ".join(f"{layer.name} {layer.sqnr_db:.1f}" for layer in ranking[:3])
            raise GateError(
                f"The {title} graph is less accurate than requested: with only the least sensitive of {len(names)} layers "
                f"quantized ({ranking[-1].name}) it loses {loss:.2f} {self.unit} on {self.samples} samples, and the limit is "
                f"{max_drop:g}. Measured: SQNR in dB with one quantized layer, at worst {alone}; {self.rewrites}. Use a graph "
                f"that is not quantized, or raise --max-drop."
            )
        _LOG.info("%d of %d layers quantized lose %.2f %s", len(names) - len(kept), len(names), loss, self.unit)
        return GateResult(kept, ranking, loss, self.unit)


def _loss(reference: Score, test: Score) -> float:
    if test.not_finite:
        return 1.0
    if test.top1 is not None and reference.top1 is not None:
        return reference.top1 - test.top1
    if test.mean_average_precision is not None and reference.mean_average_precision is not None:
        return reference.mean_average_precision - test.mean_average_precision
    if test.mae is not None and reference.mae is not None:
        return (test.mae - reference.mae) / max(reference.mae, float(np.finfo(np.float32).tiny))
    if test.top1_agreement is not None:
        return 1 - test.top1_agreement
    return max((one["relative_l2"] for one in test.outputs.values()), default=float(test.relative_l2 or 0.0))


@dataclass(frozen=True)
class SpeedComparison:
    """Seconds per call before and after quantization, the name of the graph before, and how they were obtained."""

    where: str
    baseline: str
    before: float
    after: float
    ratio: float

    def to_dict(self) -> dict[str, Any]:
        """Return the entry for the manifest."""
        times = {"before_ms": self.before * 1e3, "after_ms": self.after * 1e3}
        return {"where": self.where, "than": self.baseline, **times, "speedup": self.ratio}

    def require(self, min_speedup: float, title: str, kept: int, layers: int) -> None:
        """Raise GateError if the speedup is below `min_speedup`; `kept` of `layers` layers stay in fp32."""
        if self.ratio < min_speedup:
            raise GateError(
                f"The {title} graph is slower than requested: with {layers - kept} of {layers} layers quantized it is "
                f"{self.ratio:.2f} times as fast as {self.baseline} ({self.after * 1e3:.2f} ms instead of "
                f"{self.before * 1e3:.2f}; {self.where}), and the minimum is {min_speedup:g}. Use {self.baseline}, or lower "
                f"--min-speedup."
            )


def compare_speed(
    open_before: Callable[[], Any], open_after: Callable[[], Any], feeds: Mapping[str, Array], baseline: str
) -> SpeedComparison:
    """Time two runtimes alternately on the same feeds. Only one is open at a time: thread pools disturb each other."""
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
    return SpeedComparison(f"measured on this machine in {title}", baseline, before, after, float(np.median(ratios)))


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
