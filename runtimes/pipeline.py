"""Prepare batches, run them and return their results concurrently and in order."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class _Channel(Generic[T]):
    """A bounded queue between two threads that can be closed, which wakes both."""

    def __init__(self, size: int) -> None:
        self._items: deque[T] = deque()
        self._size, self._closed, self._turn = size, False, threading.Condition()

    def put(self, item: T) -> bool:
        """Wait for a free place and add `item`. Returns False if the channel is closed."""
        with self._turn:
            self._turn.wait_for(lambda: self._closed or len(self._items) < self._size)
            if not self._closed:
                self._items.append(item)
                self._turn.notify_all()
            return not self._closed

    def __iter__(self) -> Iterator[T]:
        while True:
            with self._turn:
                self._turn.wait_for(lambda: self._closed or self._items)
                if self._closed:
                    return
                item = self._items.popleft()
                self._turn.notify_all()
            yield item

    def close(self) -> None:
        with self._turn:
            self._closed = True
            self._turn.notify_all()


def pipelined(
    frames: Iterable[Any],
    batch: int,
    prefetch: int,
    prepare: Callable[[list[Any]], Any],
    run: Callable[[Any, int], list[Any]],
    calls: int = 1,
) -> Iterator[Any]:
    """Yield the results of `run(prepare(frames), count)` in the order of the frames.

    One thread reads and prepares frames, others run them. Closing the iterator ends all threads, after the current frame was
    read. An error is raised in place of the result of its frame, after the results of all frames before it.

    Args:
        frames: Read one at a time.
        batch: Number of frames in each call.
        prefetch: At most twice as many batches wait, before and after `run`.
        prepare: Makes the input of `run`.
        run: Returns one result for each frame.
        calls: Number of threads that call `run`.
    """
    stream = iter(frames)
    results: _Channel[Future[list[Any]] | None] = _Channel(2 * prefetch + calls - 1)
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
                if not all(results.put(runners.submit(run, *one)) for one in ready):
                    return
            except RuntimeError as caught:  # no thread can be started
                failed = caught
            error = failed or error
            if len(taken) < batch:
                break
        last: Future[list[Any]] | None = None
        if error is not None:
            last = Future()
            last.set_exception(error)
        results.put(last)

    thread = threading.Thread(target=preparing, daemon=True, name="swin-deploy preparing")
    thread.start()
    try:
        for answer in results:
            if answer is None:
                return
            yield from answer.result()
    finally:
        results.close()
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
