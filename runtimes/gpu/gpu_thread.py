"""Worker: a thread that does one thing after the other for all others."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Generic, TypeVar

T = TypeVar("T")


class Job(Generic[T]):
    """`call`, to be done in another thread."""

    def __init__(self, call: Callable[[], T]) -> None:
        self._call, self._done = call, threading.Lock()
        self._done.acquire()
        self._found: list[T] = []
        self._error: BaseException | None = None

    def do(self) -> None:
        try:
            self._found.append(self._call())
        except BaseException as error:  # noqa: BLE001 - it is raised where the result is asked for
            self._error = error
        self._done.release()

    def wait(self) -> None:
        """Returns when it is done."""
        with self._done:
            pass

    def result(self) -> T:
        """What came of it, once it is done; raises what it raised."""
        self.wait()
        error, self._error = self._error, None
        if error is not None:
            try:
                raise error
            finally:
                del error, self  # else the error and this frame would keep each other
        return self._found[0]


class Worker:
    """Does jobs in a thread of its own, in order, until it is to `leave`."""

    def __init__(self, name: str) -> None:
        self._jobs: SimpleQueue[Job[object] | None] = SimpleQueue()
        self._thread = threading.Thread(target=_work, args=(self._jobs,), daemon=True, name=name)
        self._thread.start()

    def start(self, call: Callable[[], T]) -> Job[T]:
        job = Job(call)
        self._jobs.put(job)  # type: ignore[arg-type]
        return job

    def leave(self, call: Callable[[], object]) -> None:
        """Does that at last. A finalizer may call it, wherever the garbage collector finds it: it takes no lock."""
        self._jobs.put(Job(call))
        self._jobs.put(None)

    def join(self) -> None:
        """Waits for its end."""
        self._thread.join()


def _work(jobs: SimpleQueue[Job[object] | None]) -> None:
    while (job := jobs.get()) is not None:
        job.do()
        del job  # else it would be kept until the next one comes
