"""Plan a run over many images on many workers: measure one worker, then compute rate, time, cost, and what limits.

    python benchmarks/scale.py measure BUNDLE IMAGE [--batch 8] [--seconds 3] [--workers 1] [--backend auto] [--precision auto]
    python benchmarks/scale.py plan [--workers 1 10 100 1000] [--simulate] [--images N] [--decode-ms X] [--run-ms X]
        [--start-s X] [--image-kb X] [--bundle-mb X] [--task-images N] [--object-images N] [--latency-ms X]
        [--requests-at-once N] [--store-requests X] [--store-gbit X] [--node-gbit X] [--node-cores N]
        [--commit-ms X] [--core-hour-price X]
    python benchmarks/scale.py gpu BUNDLE [--gpu l4] [--decode-ms 6]

`measure` runs one worker, a process with one thread. Times of an image are the processor time of the fastest batch, which other
programs disturb least. `gpu` prints the roofline of the bundle's engines, which is no measurement.

`plan` is a closed formula. A worker takes a task of `--task-images` images and reads it while it computes the one before. It
reports each task that is done to a coordinator. All workers share the object store and the coordinator. With `--simulate`, the
table also has the time of a simulation of each task.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import math
import subprocess
import sys
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path

WORKER = """
import json, sys, time
start, bundle, image, batch, seconds, backend, precision = json.loads(sys.argv[1])
import swin_deploy
with swin_deploy.load(bundle, threads=1, backend=backend, precision=precision) as model:
    data = open(image, "rb").read()
    model.run({"pixel_values": model.preparation([data])})
    first = time.time() - start
    def fastest(call):
        end, best = time.perf_counter() + seconds, float("inf")
        while time.perf_counter() < end:
            begun = time.process_time()
            call()
            best = min(best, time.process_time() - begun)
        return 1e3 * best / batch
    decode = fastest(lambda: model.preparation([data] * batch))
    feeds = {"pixel_values": model.preparation([data] * batch)}
    out = model.run(feeds)
    run = fastest(lambda: model.run(feeds, out))
    about = model.describe()
print(json.dumps({"first": first, "decode_ms": decode, "run_ms": run, "image_kb": len(data) / 1e3,
                  "runs": f"{about.backend} {about.version} {about.precision}"}))
"""


@dataclass(frozen=True)
class Plan:
    """The inputs. Times of an image are those of one worker on one core."""

    images: int = 1_000_000
    decode_ms: float = 5.7  # read from memory, decode, resize, normalize
    run_ms: float = 31.1
    start_s: float = 60.0  # a node starts, pulls the image of the container, and loads the bundle
    image_kb: float = 196.7
    bundle_mb: float = 115.0
    task_images: int = 1000  # images that a worker takes at a time
    object_images: int = 1  # images in an object of the store; 1000 for tar shards
    latency_ms: float = 30.0  # from a request to the first byte
    requests_at_once: int = 8  # by each worker
    store_requests: float = 5500.0  # per second, of the whole store
    store_gbit: float = 100.0
    node_gbit: float = 10.0
    node_cores: int = 16  # one worker for each
    commit_ms: float = 5.0  # of a task, at the coordinator
    core_hour_price: float = 0.0

    @property
    def image_s(self) -> float:
        """Time of an image on one core."""
        return (self.decode_ms + self.run_ms) / 1e3

    @property
    def tasks(self) -> int:
        return math.ceil(self.images / self.task_images)

    def start(self, workers: int) -> float:
        """Seconds until every node has the bundle."""
        nodes = math.ceil(workers / self.node_cores)
        gbit = min(self.store_gbit / nodes, self.node_gbit)
        return self.start_s + self.bundle_mb * 8e-3 / gbit

    def read(self, workers: int) -> tuple[float, float, str, str]:
        """Seconds of a task: of a worker alone, and that the store is busy; with the name of what limits each."""
        objects = math.ceil(self.task_images / self.object_images)
        gbit = self.task_images * self.image_kb * 8e-6
        alone = {
            "latency": objects * self.latency_ms / 1e3 / self.requests_at_once,
            "node network": gbit / self.node_gbit * min(workers, self.node_cores),
        }
        store = {"store requests": objects / self.store_requests, "store bandwidth": gbit / self.store_gbit}
        slow, busy = max(alone, key=lambda name: alone[name]), max(store, key=lambda name: store[name])
        return sum(alone.values()), store[busy], slow, busy

    def time(self, workers: int) -> tuple[float, str]:
        """Seconds of the whole run, and what limits it."""
        alone, store, slow, busy = self.read(workers)
        task, start, commit = self.task_images * self.image_s, self.start(workers), self.commit_ms / 1e3
        first = max(alone, min(workers, self.tasks) * store)  # until the last worker has a task
        rounds = math.ceil(self.tasks / workers)
        if first > max(alone, rounds * task):
            own = busy
        elif rounds * workers > 1.25 * self.tasks:
            own = "few tasks"  # many workers wait for the last ones
        else:
            own = "cores" if task >= alone else slow
        seconds, limit = max(
            (first + (rounds - 1) * max(task, alone) + task, own),
            (max(alone, self.tasks * store) + task, busy),
            (max(alone, store) + task + self.tasks * commit, "commits"),
        )
        return start + seconds + commit, "start-up" if start > seconds else limit

    def simulated(self, workers: int) -> float:
        """Seconds of the whole run, by a simulation of each task."""
        alone, store, *_ = self.read(workers)
        begun, left = self.start(workers), self.tasks
        store_free = coordinator_free = begun
        # (time, tie, worker has computed until): a worker begins to read a task, or reports one (None).
        order = itertools.count()
        events: list[tuple[float, int, float | None]] = [(begun, next(order), begun) for _ in range(workers)]
        while events:
            now, _, computed = heapq.heappop(events)
            if computed is None:
                coordinator_free = max(now, coordinator_free) + self.commit_ms / 1e3
            elif left:
                left -= 1
                store_free = max(now, store_free) + store
                begun = max(now + alone, store_free, computed)
                done = begun + self.task_images * self.image_s
                heapq.heappush(events, (done, next(order), None))
                heapq.heappush(events, (begun, next(order), done))
        return coordinator_free


def measured(given: argparse.Namespace) -> dict[str, object]:
    """Measure workers that run at the same time, three times: the slowest worker of each time, the fastest of these."""
    found = []
    for _ in range(3):
        argument = [
            time.time(),
            str(given.bundle),
            str(given.image),
            given.batch,
            given.seconds,
            given.backend,
            given.precision,
        ]
        command = [sys.executable, "-c", WORKER, json.dumps(argument)]
        workers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(given.workers)]
        rows = [json.loads(worker.communicate()[0]) for worker in workers]
        found.append({name: max(row[name] for row in rows) for name in rows[0]})
    best = {name: min(one[name] for one in found) for name in found[0]}
    files = [file for file in given.bundle.rglob("*") if file.is_file() and file.suffix != ".engine"]
    best["bundle_mb"] = sum(file.stat().st_size for file in files) / 1e6
    return {name: round(value, 3) if isinstance(value, float) else value for name, value in best.items()}


def table(plan: Plan, workers: list[int], simulate: bool) -> str:
    """Return the table of a plan."""
    rows = []
    for count in workers:
        seconds, limit = plan.time(count)
        rate, hours = plan.images / seconds, count * seconds / 3600
        row = {
            "workers": f"{count:,}",
            "images/s": f"{rate:,.0f}",
            "time": clock(seconds),
            "cores busy": f"{rate * plan.image_s / count:.0%}",
            "images per core-hour": f"{plan.images / hours:,.0f}",
            "limit": limit,
            "requests/s": f"{rate / plan.object_images:,.0f}",
            "read Gbit/s": f"{rate * plan.image_kb * 8e-6:.2f}",
        }
        row |= {"simulated": clock(plan.simulated(count))} if simulate else {}
        row |= {"price": f"{hours * plan.core_hour_price:,.2f}"} if plan.core_hour_price else {}
        rows.append(row)
    return markdown(rows)


def clock(seconds: float) -> str:
    """Return "1:02:03" for 3723 seconds."""
    return f"{round(seconds) // 3600}:{round(seconds) // 60 % 60:02}:{round(seconds) % 60:02}"


def markdown(rows: list[dict[str, str]]) -> str:
    """Return a table with the keys of the rows as its head."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def gpu_table(bundle: Path, gpu: str | None, decode_ms: float) -> str:
    """Return the roofline of the engines of a bundle, and the cores that decode as fast."""
    import swin_deploy

    rows = []
    for engine in swin_deploy.inspect(bundle, gpu=gpu).engines:
        if engine.roofline is not None:
            image_s = engine.roofline.seconds / engine.batch[1]
            rows.append(
                {
                    "GPU": engine.roofline.gpu,
                    "batch": str(engine.batch[1]),
                    "roofline ms per image": f"{1e3 * image_s:.3f}",
                    "images/s, at most": f"{1 / image_s:,.0f}",
                    "images per GPU-hour, at most": f"{3600 / image_s:,.0f}",
                    "cores that decode as fast": f"{decode_ms / 1e3 / image_s:.0f}",
                }
            )
    return markdown(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    verbs = parser.add_subparsers(dest="verb", required=True)
    measure = verbs.add_parser("measure")
    measure.add_argument("bundle", type=Path)
    measure.add_argument("image", type=Path)
    measure.add_argument("--batch", type=int, default=8)
    measure.add_argument("--seconds", type=float, default=3.0)
    measure.add_argument("--workers", type=int, default=1, help="Workers that run at the same time.")
    measure.add_argument("--backend", default="auto")
    measure.add_argument("--precision", default="auto")
    planned = verbs.add_parser("plan")
    planned.add_argument("--workers", type=int, nargs="+", default=[1, 10, 100, 1000])
    planned.add_argument("--simulate", action="store_true")
    engines = verbs.add_parser("gpu")
    engines.add_argument("bundle", type=Path)
    engines.add_argument("--gpu")
    engines.add_argument("--decode-ms", type=float, default=Plan.decode_ms)
    for one in fields(Plan):
        planned.add_argument(f"--{one.name.replace('_', '-')}", type=type(one.default), default=one.default)
    given = parser.parse_args()
    if given.verb == "measure":
        print(json.dumps(measured(given), indent=2))
    elif given.verb == "gpu":
        print(gpu_table(given.bundle, given.gpu, given.decode_ms))
    else:
        plan = replace(Plan(), **{one.name: getattr(given, one.name) for one in fields(Plan)})
        print(table(plan, given.workers, given.simulate))
    return 0


if __name__ == "__main__":
    sys.exit(main())
