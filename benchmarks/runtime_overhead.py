"""Measure the overhead of model.run over the session of ONNX Runtime, and whether memory grows over many calls.

    python benchmarks/runtime_overhead.py BUNDLE [--rounds 40] [--calls 200000] [--clock wall]

Overhead: the session, model.run, and model.run with `out` are called in turn in one process, a few calls at a time. A ratio is
that of the medians of all calls. On a busy machine, use --clock cpu, which measures the processor time of one thread. Memory:
resident memory (VmRSS) after the first tenth of `--calls` and after the last, for model.run with `out`. Use a tiny bundle for
it, such as that of examples/digits. Both run on the CPU with one image.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

import swin_deploy

CALLS = 5  # of each candidate in each round


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--calls", type=int, default=0)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: processor time of one thread")
    given = parser.parse_args(arguments)
    print(f"swin-deploy {version('swin-deploy')}, onnxruntime {version('onnxruntime')}, {given.bundle}")
    with swin_deploy.load(
        given.bundle, backend="onnxruntime", device="cpu", threads=1 if given.clock == "cpu" else 0, precision="fp32"
    ) as model:
        shape = (1, *(int(size) for size in model.inputs[0].shape[1:]))
        feeds = {model.inputs[0].name: np.random.default_rng(0).standard_normal(shape).astype(np.float32)}
        if given.rounds:
            race(model, feeds, given.rounds, time.process_time if given.clock == "cpu" else time.perf_counter)
        if given.calls:
            growth(model, feeds, given.calls)
    return 0


def race(model: Any, feeds: dict[str, Any], rounds: int, clock: Callable[[], float]) -> None:
    session = model._runtime(model.image_sizes[0])._session
    names, out = [spec.name for spec in model.outputs], dict(model.run(feeds))
    ways: dict[str, Callable[[], object]] = {
        "session.run": lambda: session.run(names, feeds),
        "model.run": lambda: model.run(feeds),
        "model.run with out": lambda: model.run(feeds, out),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 2):
        for name, call in ways.items():
            for _ in range(CALLS):
                begin = clock()
                call()
                if turn >= 2:
                    times[name].append((clock() - begin) * 1e3)
    base = statistics.median(times["session.run"])
    print("| | median ms | lowest ms | ratio of medians |\n|---|--:|--:|--:|")
    for name, taken in times.items():
        print(f"| {name} | {statistics.median(taken):.3f} | {min(taken):.3f} | {statistics.median(taken) / base:.4f} |")


def growth(model: Any, feeds: dict[str, Any], calls: int) -> None:
    out = dict(model.run(feeds))
    first = 0.0
    for call in range(calls):
        model.run(feeds, out)
        if call == calls // 10:
            first = resident_mb()
    last = resident_mb()
    print(f"{calls} calls: {first:.1f} MB after a tenth, {last:.1f} MB at the end ({last / first - 1:+.2%})")


def resident_mb() -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS:"))
    return float(line.split()[1]) / 1e3


if __name__ == "__main__":
    raise SystemExit(main())
