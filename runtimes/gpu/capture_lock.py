"""Keep other GPU work out while ONNX Runtime captures a CUDA graph."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any


class ReadersWriterLock:
    """Readers-writer lock that prefers writers and never makes a writer wait for a long reader.

    Readers hold locks of their own thread, which are implemented in C, because an interrupt cannot leave those locked. A
    writer holds the locks of all threads. Signals must not interrupt it: it runs in a thread of ONNX Runtime's executor.
    """

    def __init__(self) -> None:
        self._writing, self._of_thread = threading.RLock(), threading.local()
        self._short: weakref.WeakSet[Any] = weakref.WeakSet()
        self._long: weakref.WeakSet[Any] = weakref.WeakSet()

    def shared(self, long: bool = False) -> Any:
        """Hold the lock together with other readers, not reentrantly; writers give up instead of waiting for a `long` one."""
        with self._writing:  # until no writer is inside or waits
            held: tuple[Any, Any] | None = getattr(self._of_thread, "held", None)
            if held is None:
                held = threading.RLock(), threading.RLock()
                self._short.add(held[0])
                self._long.add(held[1])
                self._of_thread.held = held
        return held[long]

    @contextmanager
    def exclusive(self) -> Iterator[bool]:
        """Hold the lock alone; yield False, without holding it, while a long reader is active."""
        with ExitStack() as stack, self._writing:
            for lock in tuple(self._long):
                if not lock.acquire(blocking=False):
                    stack.close()
                    break
                stack.callback(lock.release)
            else:
                for lock in tuple(self._short):
                    stack.enter_context(lock)
                yield True
                return
        yield False


# ONNX Runtime captures in CUDA's global mode, in which allocations of any other thread fail and spoil the capture.
CAPTURE_LOCK = ReadersWriterLock()
if hasattr(os, "register_at_fork"):  # threads that are not in a fork hold no lock there
    os.register_at_fork(after_in_child=CAPTURE_LOCK.__init__)  # type: ignore[misc]
