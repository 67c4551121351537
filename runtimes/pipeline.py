"""Prepare batches, run them and return their results concurrently and in order."""

from __future__ import annotations

import os
import threading
from _thread import start_new_thread
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from queue import SimpleQueue
from typing import Any

from swin_deploy.errors import BackendError

# The results of one batch, and the error in place of the next result: in a list, so that it is removed before it is raised.
Answer = tuple[list[Any], list[BaseException]]


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
    `run`. Closing the iterator, or an interrupt, ends all threads, after the current frame was read. An error is raised in
    place of the result of its frame, after the results of all frames before it.
    """
    pipeline = _Pipeline(iter(frames), batch, prepare, run, calls)
    del frames  # a traceback may keep this frame, and the camera is free once the threads have ended
    for _ in range(2 * prefetch + calls - 1):
        pipeline.places.put(None)
    process, begun = os.getpid(), None
    # Whatever may be interrupted uses only queues, which are implemented in C. `Thread.start`, executors and futures use locks
    # that an interrupt could leave locked, so a thread calls them.
    try:
        begun = start_new_thread(pipeline.run_thread, ())
        while True:
            if os.getpid() != process:
                raise BackendError("This stream was started before the process was forked. Start a new one.")
            found, errors = pipeline.answers.get().get()
            pipeline.places.put(None)
            yield from found
            if errors:
                raise errors.pop()
            if not found:
                return
    finally:
        pipeline.closed = True
        pipeline.places.put(None)
        if begun is not None and os.getpid() == process:
            pipeline.ended.get()


class _Pipeline:
    """The threads of a stream, and the queues between them and the caller."""

    def __init__(
        self,
        stream: Iterator[Any],
        batch: int,
        prepare: Callable[[list[Any]], Any],
        run: Callable[[Any, int], list[Any]],
        calls: int,
    ) -> None:
        self._stream: Iterator[Any] | None = stream
        self._batch, self._prepare, self._run, self._calls = batch, prepare, run, calls
        self.closed = False
        self.places: SimpleQueue[None] = SimpleQueue()  # one item for each batch that may be prepared ahead
        self.answers: SimpleQueue[SimpleQueue[Answer]] = SimpleQueue()  # in the order of the frames; ([], []) is the end
        self.ended: SimpleQueue[None] = SimpleQueue()

    def run_thread(self) -> None:
        """Start the thread that prepares frames, and wait for its end."""
        thread = threading.Thread(target=self._prepare_all, daemon=True, name="swin-deploy preparing")
        try:
            thread.start()
            thread.join()
        except RuntimeError as error:  # no thread can be started
            self._end([error])
        del thread  # its end runs code in Python, which would hide an interrupt of the main thread
        self.ended.put(None)

    def _prepare_all(self) -> None:
        stream, self._stream = self._stream, None
        assert stream is not None
        with ThreadPoolExecutor(self._calls, "swin-deploy running") as runners:
            self._end(self._submit_all(stream, runners))

    def _submit_all(self, stream: Iterator[Any], runners: ThreadPoolExecutor) -> list[BaseException]:
        """Submit batches until the stream ends, fails, or is closed; return the error."""
        errors: list[BaseException] = []
        while not errors:
            taken: list[Any] = []
            try:
                for frame in islice(stream, self._batch):
                    taken.append(frame)
            except BaseException as error:  # noqa: BLE001 - raised in place of the result
                errors.append(error)
            ready, failed = _prepared(taken, self._prepare) if taken else ([], [])
            errors[:0] = failed
            try:
                for feeds, count in ready:
                    answer: SimpleQueue[Answer] = SimpleQueue()
                    runners.submit(self._answer, answer, feeds, count)
                    self.places.get()
                    if self.closed:
                        return []
                    self.answers.put(answer)
            except RuntimeError as error:  # no thread can be started
                errors.insert(0, error)
            if len(taken) < self._batch:
                break
        return errors[:1]

    def _answer(self, answer: SimpleQueue[Answer], feeds: Any, count: int) -> None:
        try:
            answer.put(([] if self.closed else self._run(feeds, count), []))
        except BaseException as error:  # noqa: BLE001 - as above
            answer.put(([], [error]))

    def _end(self, errors: list[BaseException]) -> None:
        answer: SimpleQueue[Answer] = SimpleQueue()
        answer.put(([], errors))
        self.answers.put(answer)


def _prepared(taken: list[Any], prepare: Callable[[list[Any]], Any]) -> tuple[list[tuple[Any, int]], list[BaseException]]:
    """Prepare frames together; if one of them fails, prepare those before it one by one, and return its error."""
    try:
        return [(prepare(taken), len(taken))], []
    except BaseException as error:  # noqa: BLE001 - as above
        if len(taken) == 1:
            return [], [error]
    ready: list[tuple[Any, int]] = []
    for frame in taken:
        try:
            ready.append((prepare([frame]), 1))
        except BaseException as error:  # noqa: BLE001 - as above
            return ready, [error]
    return ready, []
