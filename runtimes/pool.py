"""Pool: things that serve one thread at a time, made as they are needed, up to a number."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

T = TypeVar("T")


class Pool(Generic[T]):
    """Hands out things that `make` makes, `most` at a time; who comes later waits. The one used last is taken first, so that
    one thread alone always has the same."""

    def __init__(self, make: Callable[[], T], most: int) -> None:
        self._make = make
        self._free: list[T] = []
        self._turn = threading.Semaphore(most)

    @contextmanager
    def taken(self) -> Iterator[T]:
        """One of them; with an error inside it is dropped, because nobody knows the state it is in."""
        with self._turn:
            try:
                item = self._free.pop()  # appending and popping are atomic
            except IndexError:
                item = self._make()
            yield item
            self._free.append(item)

    def drain(self) -> list[T]:
        """All that are not in use, taken out, to be freed."""
        free, self._free = self._free, []
        return free
