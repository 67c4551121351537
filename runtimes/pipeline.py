"""pipelined: prepares, runs and hands over at the same time, in order, with a bounded number of things in hand."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class _Channel(Generic[T]):
    """A queue between two threads with room for `size`. Closed, it takes nothing more, and nobody waits for it."""

    def __init__(self, size: int) -> None:
        self._items: deque[T] = deque()
        self._size, self._closed, self._turn = size, False, threading.Condition()

    def put(self, item: T) -> bool:
        """Waits for room; False when the channel was closed."""
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
    """`run(prepare(frames), count)`, `batch` frames at a time, one result after the other, in the order of the frames.

    One thread takes frames and prepares them, `calls` others run; at most twice `prefetch` batches wait for these and for the
    caller together. An error is raised where the result of its frame would be; that of a frame that cannot be prepared comes
    after the results of those before it in its batch. When the iterator is closed all threads end, once the frame in hand is
    there.
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
            except BaseException as caught:  # noqa: BLE001 - raised where its result would be
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
    """The frames prepared together; where one of them cannot be, those before it alone, and its error."""
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
