"""Route TensorRT's messages: to the caller that compiles, into the error that a failed call raises, and to Python's logging.

TensorRT keeps the first logger of a process for everything that is created later, so there is one logger for each of its
Python modules. It calls the logger while it holds a lock that it also takes to create and free objects; nothing here may block.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from swin_deploy.errors import sentence

LogCallback = Callable[[str, str], None]  # severity ("verbose", "info", "warning", "error", "internal_error"), message

_LOG = logging.getLogger("swin_deploy.tensorrt")
_LEVELS = {"verbose": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING}
_KEPT_ERRORS = 8


class ErrorLog(threading.local):
    """TensorRT's errors in the current thread since `clear`, outside of `log_callback`."""

    def __init__(self) -> None:
        self.errors: list[str] = []
        self.callback: LogCallback | None = None
        self.is_ours = False  # False in the threads that TensorRT starts itself

    def clear(self) -> None:
        self.errors.clear()
        self.is_ours = True

    def route(self, severity: str, message: str) -> None:
        if self.callback is not None:
            self.callback(severity, message)
        elif _CALLBACKS and not self.is_ours:
            for callback in tuple(_CALLBACKS):
                callback(severity, message)
        elif severity in _LEVELS:
            _LOG.log(_LEVELS[severity], "%s", message)
        else:  # the caller gets errors in the exception
            self.errors = [*self.errors, message][-_KEPT_ERRORS:]
            _LOG.debug("%s", message)

    def sentence(self) -> str:
        """Return the errors in one line, for the middle of a sentence."""
        return "; ".join(dict.fromkeys(map(sentence, self.errors))) or "it gave no reason"


_LOGGERS: dict[Any, tuple[Any, ErrorLog]] = {}
_CREATING = threading.Lock()
_CALLBACKS: list[LogCallback] = []


def logger_of(trt: Any) -> tuple[Any, ErrorLog]:
    """Return the logger to pass to every object of the module `trt`, and the errors that it receives."""
    with _CREATING:
        if trt not in _LOGGERS:
            errors = ErrorLog()

            # The base class comes from a module that may not be installed.
            class Logger(trt.ILogger):  # type: ignore[misc]
                def log(self, severity: Any, message: str) -> None:
                    errors.route(severity.name.lower(), message)

            _LOGGERS[trt] = (Logger(), errors)
        return _LOGGERS[trt]


@contextmanager
def log_callback(trt: Any, callback: LogCallback) -> Iterator[Any]:
    """Yield the logger of the module `trt`; inside, `callback` receives the messages of this thread and of TensorRT's own."""
    logger, errors = logger_of(trt)
    before, errors.callback = errors.callback, callback
    _CALLBACKS.append(callback)
    try:
        yield logger
    finally:
        _CALLBACKS.remove(callback)
        errors.callback = before
