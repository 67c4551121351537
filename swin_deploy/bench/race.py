"""Measure candidates in turn, each in its own process.

Thread pools of several sessions in one process slow each other down, so every candidate has its own. Rounds are interleaved, so
that a change of the machine's speed affects all candidates alike.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from swin_deploy.errors import BackendError
from swin_deploy.files import scratch_folder
from swin_deploy.machine import memory_sizes
from swin_deploy.parity import compare
from swin_deploy.specs import Array, Progress

from .worker import Child

PERCENTILES = (50, 90, 95, 99)

Request = Mapping[str, Any]  # what a measuring process loads; see worker.open_request
Rounds = Sequence[Sequence[float]]  # milliseconds of every call


@dataclass(frozen=True)
class BenchCase:
    """What is measured: a model ("swin-deploy", "transformers" or "timm"), its back end, precision, batch size and device.

    `same_weights` is False for a baseline with random weights, whose outputs are not compared.
    """

    model: str
    backend: str
    precision: str
    batch: int
    same_weights: bool = True
    device: str = "cpu"

    def __str__(self) -> str:
        model = "" if self.model == "swin-deploy" else f" ({self.model})"
        device = "" if self.device == "cpu" else f" on {self.device}"
        return f"{self.backend} {self.precision}{model}{device}, batch {self.batch}"


@dataclass(frozen=True)
class Measurement:
    """The figures of one case: times in milliseconds for each call, memory in MB of 10^6 bytes.

    `round_ms` has the median of each round. The cold start lasts from the start of the process to its first result. `ratio` is
    the time relative to the reference: its median, and the quartiles `low` and `high`, over the rounds. `relative_l2` is the
    distance of the outputs from those of the reference; None if weights, inputs or outputs differ.
    """

    case: BenchCase
    run_by: str
    runs: int
    percentiles_ms: dict[int, float]
    round_ms: tuple[float, ...]
    images_per_second: float
    cold_start_seconds: float
    peak_memory_mb: float
    ratio: dict[str, float]
    relative_l2: float | None

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as JSON values."""
        rest = asdict(self)
        distance = self.relative_l2 if self.relative_l2 is not None and math.isfinite(self.relative_l2) else None
        return {**rest.pop("case"), **rest, "round_ms": list(self.round_ms), "relative_l2": distance}


def race(
    requests: Mapping[BenchCase, Request],
    seconds: float,
    rounds: int,
    progress: Progress,
    check: Callable[[Mapping[BenchCase, str]], None],
) -> tuple[tuple[Measurement, ...], dict[BenchCase, str]]:
    """Load every case in its own process, and measure them in interleaved rounds.

    Args:
        requests: What the process of each case loads.
        seconds: Time for each case, over all rounds.
        rounds: Number of rounds.
        progress: Called with a phase, the steps done and the steps in all.
        check: Called with the cases that did not load and the reasons, before anything is measured; may raise.

    Returns:
        The measurements in the order of the cases, and the cases that did not load with the reasons.

    Raises:
        BackendError: A process failed after it had loaded, or memory is too small for all of them.
    """
    skipped: dict[BenchCase, str] = {}
    running: dict[BenchCase, Child] = {}
    outputs: dict[BenchCase, dict[str, Array]] = {}
    with contextlib.ExitStack() as stack, scratch_folder("bench") as folder:
        for number, (case, request) in enumerate(requests.items()):
            progress("Loading", number, len(requests))
            file = folder / f"{number}.npz"
            try:
                child = stack.enter_context(Child({**request, "batch": case.batch, "answer": str(file)}))
            except BackendError as error:
                skipped[case] = str(error)
                continue
            running[case] = child
            with np.load(file) as saved:
                outputs[case] = dict(saved)
            _check_memory(running, len(requests) - number - 1)
        check(skipped)
        for number, child in enumerate(running.values()):
            progress("Warming up", number, len(running))
            child.milliseconds(seconds / 5)
        times: dict[BenchCase, list[list[float]]] = {case: [] for case in running}
        order = list(running)
        for turn in range(rounds):
            progress("Measuring, round", turn + 1, rounds)
            first = turn % len(order)
            for case in order[first:] + order[:first]:
                times[case].append(running[case].milliseconds(seconds / rounds))
    measurements = []
    for case, child in running.items():
        reference = reference_of(case, running)
        comparable = case.same_weights and child.inputs == running[reference].inputs  # frames are other noise than pixels
        distance = _distance(outputs[case], outputs[reference]) if comparable else None
        measurements.append(_summary(case, child, times[case], times[reference], distance))
    return tuple(measurements), skipped


def _check_memory(running: Mapping[BenchCase, Child], more: int) -> None:
    (_, free), largest = memory_sizes(), max(child.peak_memory for child in running.values())
    if more and free is not None and free < 1.5 * largest:
        raise BackendError(
            f"{len(running)} of {len(running) + more} candidates are loaded, and the remaining {free / 1e9:.1f} GB of memory "
            "are not enough for another one. Measure fewer at once with --backend, --precision or --batch."
        )


def reference_of(case: BenchCase, measured: Iterable[BenchCase]) -> BenchCase:
    """Return PyTorch in fp32 with the same batch and device, or else the first case with them."""
    same = [other for other in measured if (other.batch, other.device) == (case.batch, case.device)]
    return next((other for other in same if other.backend == "pytorch"), same[0])


def _distance(ours: Mapping[str, Array], theirs: Mapping[str, Array]) -> float | None:
    if any(name not in ours or ours[name].shape != theirs[name].shape for name in theirs):
        return None
    return max(compare(ours[name], theirs[name]).relative_l2 for name in theirs)


def _summary(case: BenchCase, child: Child, rounds: Rounds, reference: Rounds, distance: float | None) -> Measurement:
    times = np.concatenate([np.asarray(turn) for turn in rounds])
    medians = np.asarray([np.median(turn) for turn in rounds])
    quotients = medians / np.asarray([np.median(turn) for turn in reference])
    low, middle, high = (float(value) for value in np.quantile(quotients, (0.25, 0.5, 0.75)))
    return Measurement(
        case=case,
        run_by=child.title,
        runs=len(times),
        percentiles_ms={p: float(np.percentile(times, p)) for p in PERCENTILES},
        round_ms=tuple(medians.tolist()),
        images_per_second=float(case.batch * 1000 / np.median(times)),
        cold_start_seconds=child.cold_start,
        peak_memory_mb=child.peak_memory / 1e6,
        ratio={"median": middle, "low": low, "high": high},
        relative_l2=distance,
    )
