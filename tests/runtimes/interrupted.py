"""Interrupt a call of the main thread at a chosen one of the points where Python handles signals."""

from __future__ import annotations

import _thread
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Stop(BaseException):
    """Raised by the handler, as KeyboardInterrupt is."""


class _Arming:
    # Called by a subscript, after which, unlike after a call, Python does not look for signals.
    __getitem__ = _thread.interrupt_main


@contextmanager
def interrupts() -> Iterator[Callable[[Callable[[], object], int], bool]]:
    """Yield a function `(call, point)` that runs `call`, interrupts it at that point, and returns whether it got so far.

    The handler asks for the next signal before it returns, so Python calls it at every point where it looks for signals.
    """
    arm, left = _Arming(), 0

    def handler(number: int, frame: object) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise Stop
        if left > 0:
            return arm[number]  # type: ignore[index]
        return None

    def interrupt(call: Callable[[], object], point: int) -> bool:
        nonlocal left
        left = point
        try:
            arm[signal.SIGINT]  # type: ignore[index]
            call()
        except Stop:
            return True
        finally:
            reached, left = left <= 0, 0
        return reached

    before = signal.signal(signal.SIGINT, handler)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, before)
