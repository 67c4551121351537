"""How fast things are here: latency, throughput, memory and cold start, one process for each candidate.

Several sessions in one process disturb each other through their thread pools, so every candidate is loaded in a process of
its own. These then take turns, a few calls at a time, so that a machine whose speed drifts does so for all alike.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from swin_deploy.bench.worker import Child
from swin_deploy.errors import BackendError
from swin_deploy.files import scratch_folder
from swin_deploy.machine import this_machine
from swin_deploy.parity import compare

PERCENTILES = (50, 90, 95, 99)

Request = Mapping[str, Any]
Progress = Callable[[str, int, int], None]
Rounds = Sequence[Sequence[float]]  # milliseconds of every call


@dataclass(frozen=True)
class Candidate:
    """What is measured: whose network ("swin-deploy", "transformers", "timm"), what runs it and where, the batch."""

    model: str
    backend: str
    precision: str
    batch: int
    same_weights: bool = True  # as the bundle's; others have random ones, and their answers are not compared
    device: str = "cpu"

    def __str__(self) -> str:
        ours = "" if self.model == "swin-deploy" else f" ({self.model})"
        where = "" if self.device == "cpu" else f" on {self.device}"
        return f"{self.backend} {self.precision}{ours}{where}, batch {self.batch}"


@dataclass(frozen=True)
class Ratio:
    """Time relative to the reference of that batch and device: the median of the rounds' own ratios, and their quartiles."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Measurement:
    """Milliseconds a call, images a second (from the median), peak memory in MB of 10^6 bytes.

    `round_ms` is the median of each round. `cold_start_seconds` is the time from the start of the process to its first answer.
    `relative_l2` is the distance of that answer from the reference row's to the same input; None where weights, inputs or
    outputs are others. `run_by` is what the back end calls itself.
    """

    candidate: Candidate
    run_by: str
    runs: int
    min_ms: float
    mean_ms: float
    percentiles_ms: dict[int, float]
    round_ms: tuple[float, ...]
    images_per_second: float
    cold_start_seconds: float
    peak_memory_mb: float
    ratio: Ratio
    relative_l2: float | None

    def to_dict(self) -> dict[str, Any]:
        """The figures as JSON values."""
        rest = asdict(self)
        far = self.relative_l2 if self.relative_l2 is not None and math.isfinite(self.relative_l2) else None
        return {**rest.pop("candidate"), **rest, "round_ms": list(self.round_ms), "relative_l2": far}


@dataclass(frozen=True)
class LeftOut:
    """A candidate that was not measured, and why."""

    candidate: Candidate
    reason: str


@dataclass(frozen=True)
class Raced:
    """What was measured, in the order of the candidates, and what was not."""

    rows: tuple[Measurement, ...]
    left_out: tuple[LeftOut, ...]


def race(
    requests: Mapping[Candidate, Request],
    seconds: float,
    rounds: int,
    progress: Progress,
    check: Callable[[Sequence[LeftOut]], None],
) -> Raced:
    """Every candidate measured for `seconds` in all, in `rounds` in which they take turns; those that do not load are left out.

    What a process loads is said by its request, which `api.bench.serve` understands. `check` gets what was left out before
    anything is measured, to raise what is wrong with it. Raises BackendError where one that had loaded fails, and where
    memory does not hold all of them at once.
    """
    left_out: list[LeftOut] = []
    running: dict[Candidate, Child] = {}
    answers: dict[Candidate, dict[str, NDArray[Any]]] = {}
    with contextlib.ExitStack() as stack, scratch_folder("bench") as folder:
        for number, (candidate, request) in enumerate(requests.items()):
            progress("Loading", number, len(requests))
            answer = folder / f"{number}.npz"
            try:
                child = stack.enter_context(Child({**request, "batch": candidate.batch, "answer": str(answer)}))
            except BackendError as error:
                left_out.append(LeftOut(candidate, str(error)))
                continue
            running[candidate] = child
            with np.load(answer) as saved:
                answers[candidate] = dict(saved)
            _leave_room(running, len(requests) - number - 1)
        check(left_out)
        for number, child in enumerate(running.values()):
            progress("Warming up", number, len(running))
            child.milliseconds(seconds / 5)
        taken: dict[Candidate, list[list[float]]] = {candidate: [] for candidate in running}
        order = list(running)
        for turn in range(rounds):
            progress("Measuring, round", turn + 1, rounds)
            first = turn % len(order)
            for candidate in order[first:] + order[:first]:
                taken[candidate].append(running[candidate].milliseconds(seconds / rounds))
    rows = []
    for candidate, child in running.items():
        reference = reference_of(candidate, running)
        alike = candidate.same_weights and child.inputs == running[reference].inputs  # frames are other noise than pixels
        far = _distance(answers[candidate], answers[reference]) if alike else None
        rows.append(_summary(candidate, child, taken[candidate], taken[reference], far))
    return Raced(tuple(rows), tuple(left_out))


def _leave_room(running: Mapping[Candidate, Child], more: int) -> None:
    free, largest = this_machine().free_memory, max(child.peak_memory for child in running.values())
    if more and free is not None and free < 1.5 * largest:
        raise BackendError(
            f"{len(running)} of {len(running) + more} candidates are loaded, and {free / 1e9:.1f} GB of memory are left, too "
            "little for another one. Measure fewer at once: name them with --backend, --precision or --batch."
        )


def reference_of(candidate: Candidate, measured: Iterable[Candidate]) -> Candidate:
    """PyTorch in fp32 at the same batch on the same device, or what comes first there."""
    same = [other for other in measured if (other.batch, other.device) == (candidate.batch, candidate.device)]
    return next((other for other in same if other.backend == "pytorch"), same[0])


def _distance(ours: Mapping[str, NDArray[Any]], theirs: Mapping[str, NDArray[Any]]) -> float | None:
    """The largest relative L2 distance of an output, where outputs are those of the reference."""
    if any(name not in ours or ours[name].shape != theirs[name].shape for name in theirs):
        return None
    return max(compare(ours[name], theirs[name]).relative_l2 for name in theirs)


def _summary(candidate: Candidate, child: Child, rounds: Rounds, reference: Rounds, relative_l2: float | None) -> Measurement:
    times = np.concatenate([np.asarray(turn) for turn in rounds])
    medians = np.asarray([np.median(turn) for turn in rounds])
    quotients = medians / np.asarray([np.median(turn) for turn in reference])
    low, middle, high = (float(value) for value in np.quantile(quotients, (0.25, 0.5, 0.75)))
    return Measurement(
        candidate=candidate,
        run_by=child.title,
        runs=len(times),
        min_ms=float(times.min()),
        mean_ms=float(times.mean()),
        percentiles_ms={p: float(np.percentile(times, p)) for p in PERCENTILES},
        round_ms=tuple(medians.tolist()),
        images_per_second=float(candidate.batch * 1000 / np.median(times)),
        cold_start_seconds=child.cold_start,
        peak_memory_mb=child.peak_memory / 1e6,
        ratio=Ratio(middle, low, high),
        relative_l2=relative_l2,
    )
