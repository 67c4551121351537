"""The one logger of this process for each of TensorRT's modules, and who hears what it says.

TensorRT keeps the first logger that it is given for whatever is made later: compilers, runtimes, refitters. It holds a lock
while it logs, which it also takes to make and to free things; so nothing here waits for anybody.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from swin_deploy.errors import sentence

Hear = Callable[[str, str], None]  # severity ("verbose", "info", "warning", "error", "internal_error"), message


class Said(threading.local):
    """What TensorRT complained of in this thread since `clear`, outside of `heard`."""

    def __init__(self) -> None:
        self.errors: list[str] = []
        self.hear: Hear | None = None
        self.known = False  # whether this thread uses TensorRT, and is none of TensorRT's own

    def clear(self) -> None:
        self.errors.clear()
        self.known = True

    def sentence(self) -> str:
        return "; ".join(dict.fromkeys(map(sentence, self.errors))) or "it gave no reason"


_LOGGERS: dict[Any, tuple[Any, Said]] = {}
_MAKING = threading.Lock()
_HEARING: list[Hear] = []


def logger_of(trt: Any) -> tuple[Any, Said]:
    """The logger to give to whatever is made of the module `trt`, and what was said to it."""
    with _MAKING:
        if trt not in _LOGGERS:
            said = Said()

            # The base class comes from a module that may not be installed, so the class can only be made here.
            class Logger(trt.ILogger):  # type: ignore[misc]
                def log(self, severity: Any, message: str) -> None:
                    _dispatch(said, severity.name.lower(), message)

            _LOGGERS[trt] = (Logger(), said)
        return _LOGGERS[trt]


@contextmanager
def heard(trt: Any, hear: Hear) -> Iterator[Any]:
    """The logger for the module `trt`; while inside, `hear(severity, message)` gets what TensorRT says in this thread, and
    what it says in threads of its own."""
    logger, said = logger_of(trt)
    before, said.hear = said.hear, hear
    _HEARING.append(hear)
    try:
        yield logger
    finally:
        _HEARING.remove(hear)
        said.hear = before


def _dispatch(said: Said, severity: str, message: str) -> None:
    if said.hear is not None:
        said.hear(severity, message)
    elif said.known:
        if severity in ("error", "internal_error"):
            said.errors.append(message)
            del said.errors[:-8]
    else:
        for hear in tuple(_HEARING):
            hear(severity, message)
