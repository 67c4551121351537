"""Prepare batches, run them and return their results concurrently and in order."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from queue import SimpleQueue
from typing import Any


def pipelined(
    frames: Iterable[Any],
    batch: int,
    prefetch: int,
    prepare: Callable[[list[Any]], Any],
    run: Callable[[Any, int], list[Any]],
    calls: int = 1,
) -> Iterator[Any]:
    """Yield the results of `run(prepare(frames), count)` in the order of the frames, `batch` of which are prepared together.

    One thread reads and prepares frames, `calls` threads run them, and at most `2 * prefetch` batches wait before and after
    `run`. Closing the iterator ends all threads, after the current frame was read. An error is raised in place of the result
    of its frame, after the results of all frames before it.
    """
    stream = iter(frames)
    results: SimpleQueue[Future[list[Any]] | BaseException | None] = SimpleQueue()
    places, closed = threading.Semaphore(2 * prefetch + calls - 1), threading.Event()
    runners = ThreadPoolExecutor(calls, "swin-deploy running")

    def preparing() -> None:
        error: BaseException | None = None
        while error is None:
            taken: list[Any] = []
            try:
                for frame in islice(stream, batch):
                    taken.append(frame)
            except BaseException as caught:  # noqa: BLE001 - raised in place of the result
                error = caught
            ready, failed = _prepared(taken, prepare) if taken else ([], None)
            try:
                for one in ready:
                    future = runners.submit(run, *one)
                    places.acquire()
                    if closed.is_set():
                        return
                    results.put(future)
            except RuntimeError as caught:  # no thread can be started
                failed = caught
            error = failed or error
            if len(taken) < batch:
                break
        results.put(error)

    thread = threading.Thread(target=preparing, daemon=True, name="swin-deploy preparing")
    thread.start()
    try:
        while isinstance(answer := results.get(), Future):
            places.release()
            yield from answer.result()
        if answer is not None:
            raise answer
    finally:
        closed.set()
        places.release()
        thread.join()
        runners.shutdown(cancel_futures=True)


def _prepared(taken: list[Any], prepare: Callable[[list[Any]], Any]) -> tuple[list[tuple[Any, int]], BaseException | None]:
    """Prepare frames together; if one of them fails, prepare those before it one by one, and return its error."""
    try:
        return [(prepare(taken), len(taken))], None
    except BaseException as error:  # noqa: BLE001 - as above
        if len(taken) == 1:
            return [], error
    ready: list[tuple[Any, int]] = []
    for frame in taken:
        try:
            ready.append((prepare([frame]), 1))
        except BaseException as error:  # noqa: BLE001 - as above
            return ready, error
    return ready, None
