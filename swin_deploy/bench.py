"""How fast a bundle is here: latency percentiles, throughput and peak memory, one process for each candidate.

Several sessions in one process disturb each other through their thread pools, so every candidate is measured in a process of
its own, and rounds of the candidates alternate so that a machine whose speed drifts does so for all alike.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from swin_deploy.errors import BackendError

PERCENTILES = (50, 90, 95, 99)


@dataclass(frozen=True)
class Candidate:
    """What is measured: a graph of the bundle, what runs it, and how many images at a time."""

    backend: str
    precision: str
    batch: int
    threads: int = 0


@dataclass(frozen=True)
class Measurement:
    """Milliseconds a call, images a second (from the median), and the process's peak memory in MB."""

    candidate: Candidate
    runs: int
    min_ms: float
    mean_ms: float
    percentiles_ms: dict[int, float]
    images_per_second: float
    load_seconds: float
    peak_memory_mb: float

    def to_dict(self) -> dict[str, Any]:
        """The figures as JSON values."""
        return asdict(self)


def bench(
    bundle: Path, candidates: Sequence[Candidate], seconds: float, rounds: int, say: Callable[[str], None]
) -> tuple[Measurement, ...]:
    """A measurement of every candidate, `seconds` long in all, spread over `rounds`.

    Raises what loading the bundle raises, and BackendError when a measuring process dies.
    """
    taken: dict[Candidate, list[dict[str, Any]]] = {candidate: [] for candidate in candidates}
    for turn in range(rounds):
        for candidate in candidates:
            say(f"Round {turn + 1} of {rounds}: {candidate.backend} {candidate.precision}, batch {candidate.batch}")
            taken[candidate].append(_in_own_process(bundle, candidate, seconds / rounds))
    return tuple(_summary(candidate, results) for candidate, results in taken.items())


def _in_own_process(bundle: Path, candidate: Candidate, seconds: float) -> dict[str, Any]:
    request = json.dumps({"bundle": str(bundle), "seconds": seconds, **asdict(candidate)})
    # Not with -m: the folder it is started in would come first in the search for modules, a checkout of this very package.
    code = "import sys; sys.path[:] = filter(None, sys.path); from swin_deploy.bench import main; main()"
    done = subprocess.run([sys.executable, "-c", code, request], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise BackendError(f"Measuring {candidate.backend} {candidate.precision} failed: {last}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _summary(candidate: Candidate, results: list[dict[str, Any]]) -> Measurement:
    times = np.concatenate([result["ms"] for result in results])
    return Measurement(
        candidate=candidate,
        runs=len(times),
        min_ms=float(times.min()),
        mean_ms=float(times.mean()),
        percentiles_ms={p: float(np.percentile(times, p)) for p in PERCENTILES},
        images_per_second=float(candidate.batch * 1000 / np.median(times)),
        load_seconds=min(float(result["load_seconds"]) for result in results),
        peak_memory_mb=max(float(result["peak_memory_mb"]) for result in results),
    )


def _measure(bundle: str, backend: str, precision: str, batch: int, threads: int, seconds: float) -> dict[str, Any]:
    """Runs in the measuring process: loads, warms up for a fifth of the time, then times single calls."""
    import swin_deploy

    begin = time.perf_counter()
    with swin_deploy.load(bundle, precision=precision, backend=backend, threads=threads) as model:
        loaded = time.perf_counter() - begin
        spec = model.inputs[0]
        shape = (batch, *(int(size) for size in spec.shape[1:]))
        feeds = {spec.name: np.random.default_rng(0).standard_normal(shape).astype(spec.dtype)}
        end = time.perf_counter() + seconds / 5
        while time.perf_counter() < end:
            model.run(feeds)
        times: list[float] = []
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or len(times) < 5:
            start = time.perf_counter()
            model.run(feeds)
            times.append((time.perf_counter() - start) * 1e3)
    return {"ms": times, "load_seconds": loaded, "peak_memory_mb": _peak_memory_mb()}


def _peak_memory_mb() -> float:
    try:
        # Not getrusage: on Linux its peak starts at what the process that started this one held at that moment.
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        return float(next(line for line in status.splitlines() if line.startswith("VmHWM:")).split()[1]) / 1e3
    except (OSError, StopIteration):
        pass
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak / 1e3


def main() -> None:
    """The measuring process: the request is its argument, the result is the last line that it prints."""
    print(json.dumps(_measure(**json.loads(sys.argv[1]))))
