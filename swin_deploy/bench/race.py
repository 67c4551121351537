"""Measure candidates in interleaved rounds, so that a change of the machine's speed affects all of them alike.

Each has its own process, because thread pools of several sessions in one process slow each other down.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from swin_deploy.errors import BackendError
from swin_deploy.files import scratch_folder
from swin_deploy.machine import memory_sizes
from swin_deploy.options import Array, Progress
from swin_deploy.parity import compare, json_figures

from .worker import Child

PERCENTILES = (50, 90, 95, 99)

Request = Mapping[str, Any]  # what a measuring process loads; see worker.open_request
Rounds = Sequence[Sequence[float]]  # milliseconds of every call


@dataclass(frozen=True)
class BenchCase:
    """What is measured. `same_weights` is False for a baseline with random weights, whose outputs are not compared."""

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
    """The figures of one case; `round_ms` has the median time of each round, and `ratio` compares them with the reference.

    `relative_l2` is the distance from the outputs of the reference; None if weights, inputs or outputs differ.
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
        figures = json_figures(self)
        return {**figures.pop("case"), **figures}


def race(
    requests: Mapping[BenchCase, Request],
    seconds: float,
    rounds: int,
    progress: Progress,
    check: Callable[[Mapping[BenchCase, str]], None],
) -> tuple[tuple[Measurement, ...], dict[BenchCase, str]]:
    """Measure every case for `seconds` over all rounds; also return the cases that did not load, with the reasons.

    `check` is called with the latter before anything is measured, and may raise. Raises BackendError if a process fails after
    it has loaded, or if memory is too small for all of them.
    """
    skipped: dict[BenchCase, str] = {}
    running: dict[BenchCase, Child] = {}
    outputs: dict[BenchCase, dict[str, Array]] = {}
    with contextlib.ExitStack() as stack, scratch_folder("bench") as folder:
        for number, (case, request) in enumerate(requests.items()):
            progress("Loading", number, len(requests))
            file = folder / f"{number}.npz"
            try:
                running[case] = stack.enter_context(Child({**request, "batch": case.batch, "answer": str(file)}))
            except BackendError as error:
                skipped[case] = str(error)
                continue
            with np.load(file) as saved:
                outputs[case] = dict(saved)
            _check_memory(running, len(requests) - number - 1)
        check(skipped)
        for number, child in enumerate(running.values()):
            progress("Warming up", number, len(running))
            child.milliseconds(seconds / 5)
        times: dict[BenchCase, list[list[float]]] = {case: [] for case in running}
        order = deque(running)
        for turn in range(rounds):
            progress("Measuring, round", turn + 1, rounds)
            for case in order:
                times[case].append(running[case].milliseconds(seconds / rounds))
            order.rotate(-1)
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


def reference_of(case: BenchCase, measured: Iterable[BenchCase], same_batch: bool = True) -> BenchCase:
    """Return PyTorch in fp32 with the same device and, if wanted, the same batch, or else the first case with them."""
    same = [other for other in measured if other.device == case.device and (other.batch == case.batch or not same_batch)]
    return next((other for other in same if other.backend == "pytorch"), same[0])


def _distance(ours: Mapping[str, Array], theirs: Mapping[str, Array]) -> float | None:
    if any(name not in ours or ours[name].shape != theirs[name].shape for name in theirs):
        return None
    return max(compare(ours[name], theirs[name]).relative_l2 for name in theirs)


def _summary(case: BenchCase, child: Child, rounds: Rounds, reference: Rounds, distance: float | None) -> Measurement:
    times = np.concatenate(rounds)
    medians, usual = (np.asarray([np.median(turn) for turn in one]) for one in (rounds, reference))
    low, middle, high = np.quantile(medians / usual, (0.25, 0.5, 0.75)).tolist()
    return Measurement(
        case=case,
        run_by=child.model,
        runs=len(times),
        percentiles_ms={p: float(np.percentile(times, p)) for p in PERCENTILES},
        round_ms=tuple(medians.tolist()),
        images_per_second=float(case.batch * 1000 / np.median(times)),
        cold_start_seconds=child.cold_start,
        peak_memory_mb=child.peak_memory / 1e6,
        ratio={"median": middle, "low": low, "high": high},
        relative_l2=distance,
    )
