"""Processes that classify chunks of images. One that dies is replaced, and an image that kills again is left out.

The processes are those of `concurrent.futures`. What is added is which image each of them works on, in shared memory.
"""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import platform
import signal
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from swin_deploy.errors import BackendError

from .image_runner import Answers, ImageRunner, Job, parent_watched
from .image_sources import Image, Source

_LOG = logging.getLogger(__name__)
AHEAD = 4  # chunks for each process that are read ahead or wait to be written
CHUNK_SECONDS, MOST_BATCHES, CHUNK_BYTES = 0.25, 64, 1 << 23  # of a chunk: about, at most, at most
KILLS = 2  # of a process by one image, when it works on nothing else
FAILED_STARTS = 3
SECONDS, ENOUGH = 0.5, 0.97  # of a measurement; share of the highest rate that is enough
KILLED = "A process that {} ended without an error {} times. The image is damaged, or memory ran out."


@dataclass(frozen=True)
class Chunk:
    """Batches that one process classifies: keys of the images, shard, and the images of the shard up to its end."""

    keys: list[str]
    batches: list[list[Image]]
    shard: int
    end: int


@dataclass
class Pace:
    """How many batches the next chunk has, so that a chunk takes a part of a second. Results do not depend on it.

    `left` is the number of batches that are left, if it is known. The last chunks are small: all `workers` end together.
    """

    batches: int = 1
    left: int | None = None
    workers: int = 1

    @property
    def size(self) -> int:
        """The number of batches of the next chunk."""
        return self.batches if self.left is None else max(1, min(self.batches, self.left // (2 * self.workers)))

    def taken(self, chunk: Chunk) -> Chunk:
        """Count the batches of a chunk, and return it."""
        if self.left is not None:
            self.left -= len(chunk.batches)
        return chunk

    def measured(self, chunk: Chunk, seconds: float) -> None:
        """Adapt to the time that a chunk took."""
        one = max(seconds, 1e-6) / len(chunk.batches)
        self.batches = max(1, min(MOST_BATCHES, 2 * self.batches, int(CHUNK_SECONDS / one)))


def chunks_of(source: Source, batch: int, shard: int, skip: int, pace: Pace) -> Iterator[Chunk]:
    """Yield chunks from a shard on, after its first `skip` images. Batches are cut every `batch` images of a shard."""
    for number in range(shard, len(source.shards)):
        keys: list[str] = []
        batches: list[list[Image]] = []
        size, end = 0, skip
        for key, image in source.read(source.shards[number], skip):
            if not batches or len(batches[-1]) == batch:
                if batches and (len(batches) >= pace.size or size >= CHUNK_BYTES):
                    yield pace.taken(Chunk(keys, batches, number, end))
                    keys, batches, size = [], [], 0
                batches.append([])
            keys.append(key)
            batches[-1].append(image)
            size += len(image)
            end += 1
        if keys:
            yield pace.taken(Chunk(keys, batches, number, end))
        skip = 0


@dataclass(eq=False)
class _Task:
    chunk: Chunk
    slot: int
    future: Future[Answers]
    refused: dict[int, str] = field(default_factory=dict)


class WorkerPool:
    """Processes with one thread each, which end with this one. Use it as a context manager."""

    def __init__(self, job: Job, workers: int) -> None:
        self.job, self.workers = job, workers
        self._context = multiprocessing.get_context("spawn")  # a fork would copy the locks of running threads
        self._marks = self._context.RawArray("q", 1 + AHEAD * workers)  # whether to stop; the image of each chunk
        self._executor = self._opened(workers)
        self._starts = 0  # that failed one after the other

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *error: object) -> None:
        self._marks[0] = 1
        self._executor.shutdown(cancel_futures=True)

    def map(self, chunks: Iterator[Chunk]) -> Iterator[tuple[Chunk, Answers]]:
        """Yield chunks and their results in order."""
        tasks: deque[_Task] = deque()
        free = list(range(1, len(self._marks)))
        while True:
            while free and (chunk := next(chunks, None)) is not None:
                tasks.append(self._submitted(self._executor, chunk, free.pop()))
            if not tasks:
                return
            try:
                found = tasks[0].future.result()
            except BrokenProcessPool:
                self._recover(tasks)
                continue
            task, self._starts = tasks.popleft(), 0
            free.append(task.slot)
            yield task.chunk, found

    def measured(self, images: Sequence[Image], counts: Sequence[int]) -> dict[int, float]:
        """Return the images per second of so many processes at a time."""
        for seconds in (0.0, SECONDS / 5):  # the first makes every process load the model
            for future in [self._submit(self._executor, _rate, images, seconds) for _ in range(self.workers)]:
                future.result()
        return {
            count: sum(
                future.result() for future in [self._submit(self._executor, _rate, images, SECONDS) for _ in range(count)]
            )
            for count in counts
        }

    def _opened(self, workers: int) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(workers, self._context, _begin, (self.job, self._marks))

    def _submit(self, executor: ProcessPoolExecutor, work: Callable[..., Any], *arguments: Any) -> Future[Any]:
        with _without_interrupts():
            return executor.submit(work, *arguments)

    def _submitted(
        self,
        executor: ProcessPoolExecutor,
        chunk: Chunk,
        slot: int,
        refused: dict[int, str] | None = None,
        one_by_one: bool = False,
    ) -> _Task:
        self._marks[slot] = 0
        refused = refused or {}
        try:
            future = self._submit(executor, _answers, slot, chunk.batches, refused, one_by_one)
        except BrokenProcessPool as error:
            future = Future()
            future.set_exception(error)
        return _Task(chunk, slot, future, refused)

    def _recover(self, tasks: deque[_Task]) -> None:
        """Start the processes again. Chunks that were being worked on run alone, to find out which image kills."""
        lost = [task for task in tasks if not task.future.done() or task.future.exception() is not None]
        for task in lost:
            with suppress(BrokenProcessPool):
                task.future.exception()  # until the pool has ended, other errors stay in the future
        lost = [task for task in lost if isinstance(task.future.exception(), BrokenProcessPool)]
        suspects = [task for task in lost if self._marks[task.slot]]
        self._count_start(bool(suspects))
        _LOG.warning("Warning: A process ended without an error. Its images are tried again.")
        self._executor.shutdown()
        for task in suspects:
            self._run_alone(task)
        self._executor = self._opened(self.workers)
        for task in lost:
            if task not in suspects:
                task.future = self._submitted(self._executor, task.chunk, task.slot).future

    def _count_start(self, worked: bool) -> None:
        self._starts = 0 if worked else self._starts + 1
        if self._starts > FAILED_STARTS:
            raise BackendError(
                "The processes end before they read an image. Check the memory of this machine. In a script, put the call "
                'under: if __name__ == "__main__":'
            )

    def _run_alone(self, task: _Task) -> None:
        """Run a chunk in one process until it ends, and refuse images at which the process was killed twice."""
        kills: Counter[int] = Counter()
        while True:
            with self._opened(1) as executor:
                task.future = self._submitted(executor, task.chunk, task.slot, task.refused, one_by_one=True).future
                if not isinstance(task.future.exception(), BrokenProcessPool):
                    return  # `map` takes the result, or raises the error
            mark = self._marks[task.slot]
            self._count_start(bool(mark))
            kills[mark] += 1
            if mark and kills[mark] == KILLS:
                first = abs(mark) - 1
                size = 1 if mark > 0 else len(task.chunk.batches[first // max(1, len(task.chunk.batches[0]))])
                reason = KILLED.format("read this image" if mark > 0 else "ran the batch of this image", KILLS)
                task.refused |= dict.fromkeys(range(first, first + size), reason) | task.refused


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Block signals of the terminal: a process that is started inside never sees them, only this one."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_runner: ImageRunner | None = None
_marks: Any = None


def _begin(job: Job, marks: Any) -> None:
    global _runner, _marks
    _runner, _marks = ImageRunner(job), marks
    parent_watched()


def _answers(slot: int, batches: Sequence[Sequence[Image]], refused: dict[int, str], one_by_one: bool) -> Answers:
    assert _runner is not None

    def mark(number: int) -> None:
        if _marks[0]:
            raise InterruptedError("the pool was closed")
        _marks[slot] = number

    found = _runner.run(batches, refused, mark, one_by_one)
    _marks[slot] = 0
    return found


def _rate(images: Sequence[Image], seconds: float) -> float:
    """Classify the same images for some seconds, and return how many in a second."""
    assert _runner is not None
    begin, done = time.perf_counter(), 0
    while not done or time.perf_counter() - begin < seconds:
        _runner.run([images], {})
        done += len(images)
    return done / (time.perf_counter() - begin)


def fastest_workers(job: Job, images: Sequence[Image], facts: Any) -> int:
    """Return the number of processes that classify fastest on this machine, measured once for the same `facts`."""
    from swin_deploy.files import json_from
    from swin_deploy.machine import processor_name, usable_cores
    from swin_deploy.runtimes.user_cache import cache_folder, read_cached, write_cached

    cores = usable_cores()
    if cores == 1 or job.load["device"] != "cpu":
        return 1
    key = json.dumps([facts, processor_name(), platform.machine(), cores], sort_keys=True)
    folder = cache_folder("workers")
    file = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json" if folder else None
    with suppress(ValueError, TypeError, KeyError):
        if 1 <= (kept := int(json_from(read_cached(file), str(file))["workers"])) <= cores:
            return kept
    _LOG.info("Measuring once how many processes classify fastest, %d at most", cores)
    try:
        with WorkerPool(job, cores) as pool:
            rates = pool.measured(images, sorted({max(1, cores // 2), cores}))
    except BrokenProcessPool:  # one of the images kills processes
        return cores
    best = min(count for count, rate in rates.items() if rate >= ENOUGH * max(rates.values()))
    write_cached(file, json.dumps({"workers": best, "images_per_second": rates}).encode())
    return best
