"""Interrupt `run` and `stream`, fork loaded models, and call one a million times. BUNDLE is a bundle of a tiny network.

Run: python benchmarks/interrupts.py BUNDLE [--parts interrupts forks memory] [--runs 2000] [--streams 500] [--calls 1000000]
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from runtime_overhead import growth

import swin_deploy

BACKENDS = ("onnxruntime", "openvino", "torch")
LIMIT = 10.0  # seconds within which everything must answer


class Interrupt(BaseException):
    """Raised by the handler of SIGALRM, as KeyboardInterrupt is."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--parts", nargs="+", default=["interrupts", "forks", "memory"])
    parser.add_argument("--backends", nargs="+", default=list(BACKENDS))
    parser.add_argument("--runs", type=int, default=2000)
    parser.add_argument("--streams", type=int, default=500)
    parser.add_argument("--calls", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    failed = 0
    if "interrupts" in given.parts:
        failed += interrupts(given)
    if "forks" in given.parts:
        failed += forks(given.bundle, given.backends)
    if "memory" in given.parts:
        with swin_deploy.load(given.bundle, backend="onnxruntime", threads=1, precision="fp32", device="cpu") as model:
            growth(model, feeds_of(model), given.calls)
    return int(failed > 0)


def feeds_of(model: Any) -> dict[str, Any]:
    shape = (1, *(int(size) for size in model.inputs[0].shape[1:]))
    return {model.inputs[0].name: np.random.default_rng(0).standard_normal(shape).astype(np.float32)}


def interrupts(given: argparse.Namespace) -> int:
    """Interrupt at random instants; afterwards `run` must answer, and no thread and no iterator may be left."""
    print("| back end | call | interrupted | wrong or late answers | threads left | iterators left | slowest next run, ms |")
    print("|---|---|--:|--:|--:|--:|--:|", flush=True)
    failed = 0
    for backend in given.backends:
        with swin_deploy.load(given.bundle, backend=backend, precision="fp32", device="cpu") as model:
            feeds = feeds_of(model)
            right = {name: array.copy() for name, array in model.run(feeds).items()}
            model.warm_up()
            height, width = model.image_sizes[0]
            frame = np.zeros((height, width, 3), np.uint8)

            def stream(cameras: list[Any], model: Any = model, frame: Any = frame) -> None:
                def frames() -> Iterator[Any]:
                    while True:
                        yield frame

                camera = frames()
                cameras.append(weakref.ref(camera))
                results = model.stream(camera)
                del camera
                for _ in results:
                    pass

            def run(cameras: list[Any], model: Any = model, feeds: Any = feeds) -> None:
                while True:
                    model.run(feeds)

            for call, count in ((run, given.runs), (stream, given.streams)):
                worst, wrong, threads, iterators = 0.0, 0, 0, 0
                for instant in instants(given.seed, count, 0.005 if call is run else 0.02):
                    cameras: list[Any] = []
                    interrupted(call, cameras, instant)
                    begin = time.perf_counter()
                    found = answered(model, feeds)
                    worst = max(worst, time.perf_counter() - begin)
                    wrong += found is None or any(not np.array_equal(found[name], right[name]) for name in right)
                    while (left := left_over(cameras)) != (0, 0) and time.perf_counter() < begin + LIMIT:
                        time.sleep(0.001)
                    threads, iterators = threads + left[0], iterators + left[1]
                failed += wrong + threads + iterators
                print(f"| {backend} | `{call.__name__}` | {count} | {wrong} | {threads} | {iterators} | {worst * 1e3:.1f} |")
                sys.stdout.flush()
    return failed


def instants(seed: int, count: int, most: float) -> list[float]:
    chosen = random.Random(seed)
    return [chosen.uniform(2e-5, most) for _ in range(count)]


def interrupted(call: Callable[[list[Any]], None], cameras: list[Any], after: float) -> None:
    def handler(number: int, frame: object) -> None:
        raise Interrupt

    signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, after)
        call(cameras)
    except Interrupt:
        pass


def answered(model: Any, feeds: dict[str, Any]) -> Any:
    """Return what `model.run` returns, None if it takes too long."""
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(model.run(feeds)), daemon=True)
    thread.start()
    thread.join(LIMIT)
    return found[0] if found else None


def left_over(cameras: list[Any]) -> tuple[int, int]:
    names = [thread.name for thread in threading.enumerate()]
    return sum(name.startswith("swin-deploy") for name in names), sum(camera() is not None for camera in cameras)


FORK = """
import os, sys, time
import numpy as np, swin_deploy
bundle, backend, threads, act = sys.argv[1:]
if backend == "torch" and int(threads):
    import torch
    torch.set_num_threads(int(threads))
model = swin_deploy.load(bundle, backend=backend, threads=int(threads), precision="fp32", device="cpu")
feed = {model.inputs[0].name: np.zeros((1, *map(int, model.inputs[0].shape[1:])), np.float32)}
model.run(feed)
time.sleep(0.5)  # the threads of the back end are asleep
child = os.fork()
if not child:
    if act == "close":
        model.close()
        os._exit(0)
    if act == "run":
        try:
            model.run(feed)
        except swin_deploy.errors.BackendError as error:
            print("refused" if "in its fork" in str(error) else error, flush=True)
        os._exit(0)
    if act == "load":
        if backend == "torch":
            import torch
            torch.set_num_threads(1)
            threads = 0
        with swin_deploy.load(bundle, backend=backend, threads=int(threads), precision="fp32", device="cpu") as again:
            again.run(feed)
    sys.exit(0)
began = time.monotonic()
while time.monotonic() < began + 10:
    ended, status = os.waitpid(child, os.WNOHANG)
    if ended:
        if act != "run" or status:
            print("ends" if status == 0 else f"status {status}")
        break
    time.sleep(0.01)
else:
    print("hangs")
    os.kill(child, 9)
model.run(feed)
model.close()
"""


def forks(bundle: Path, backends: Sequence[str]) -> int:
    """Fork a loaded model; the child closes it, exits, runs it, or loads it again."""
    acts = ("close", "exit", "run", "load")
    print(f"| back end | threads | {' | '.join(acts)} |\n|---|--:|" + "---|" * len(acts), flush=True)
    failed = 0
    for backend in backends:
        for threads in ("0", "1", "2"):
            row = []
            for act in acts:
                command = [sys.executable, "-c", FORK, str(bundle), backend, threads, act]
                done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
                row.append(
                    done.stdout.strip() if done.returncode == 0 else (done.stderr.strip().splitlines() or ["failed"])[-1]
                )
                failed += row[-1] != ("refused" if act == "run" else "ends")
            print(f"| {backend} | {threads} | {' | '.join(row)} |", flush=True)
    return failed


if __name__ == "__main__":
    raise SystemExit(main())
