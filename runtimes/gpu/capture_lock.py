"""Keep other GPU work out while ONNX Runtime captures a CUDA graph."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class ReadersWriterLock:
    """Readers-writer lock that prefers writers and never makes a writer wait for a long reader."""

    def __init__(self) -> None:
        self._condition, self._readers, self._long_readers, self._writers = threading.Condition(), 0, 0, 0

    @contextmanager
    def shared(self, long: bool = False) -> Iterator[None]:
        """Hold the lock together with other readers, not reentrantly; writers give up instead of waiting for a `long` one."""
        with self._condition:
            self._condition.wait_for(lambda: not self._writers)
            self._readers += 1
            self._long_readers += long
        try:
            yield
        finally:
            with self._condition:
                self._readers -= 1
                self._long_readers -= long
                self._condition.notify_all()

    @contextmanager
    def exclusive(self) -> Iterator[bool]:
        """Hold the lock alone; yield False, without holding it, while a long reader is active."""
        with self._condition:
            if self._long_readers:
                yield False
                return
            self._writers += 1
            try:
                self._condition.wait_for(lambda: not self._readers)
                yield True  # with the condition's own lock held
            finally:
                self._writers -= 1
                self._condition.notify_all()


# ONNX Runtime captures in CUDA's global mode, in which allocations of any other thread fail and spoil the capture.
CAPTURE_LOCK = ReadersWriterLock()
