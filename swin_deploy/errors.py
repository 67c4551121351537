"""Every error that swin-deploy raises on purpose.

    SwinDeployError
    ├── UsageError               an argument is invalid (unknown variant, unknown precision)
    ├── MissingDependencyError   a library is not installed; the message names the command that installs it
    ├── CheckpointError          weights or a config cannot be read, or do not match
    ├── BundleError              a bundle is missing, damaged, or not writable
    ├── InputError               the model does not accept an array or image
    ├── ExportError              the ONNX graph could not be created
    │   └── PassError            a graph pass did not find the pattern that it rewrites
    ├── EngineError              the TensorRT compiler refused the graph, or an engine does not fit this machine
    │   └── UntrustedEngineError an engine was compiled elsewhere, and its author is not trusted
    ├── BackendError             a back end failed while loading or running (its own error is the cause)
    │   └── MissingKernelError   the back end has no kernel for an operator in the type that the graph uses
    ├── VerificationError        a model runs, but its results differ from PyTorch's
    └── GateError                an INT8 or FP8 graph is less accurate or slower than requested

A message states what happened, what was expected, and what to do, in up to three short sentences. The command line prints
it without a traceback and exits with `exit_code`: 2 for what the user can correct, 1 for a failed verification, 3 for a
quantized graph that misses its accuracy or speed limit.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterable
from pathlib import Path

# Control characters, which a terminal obeys, and those that change the direction of text.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff]")
UNPRINTABLE = re.compile(_CONTROL.pattern.replace("\x00-\x1f", "\x00-\x08\x0b-\x1f"))  # all but tabs and line ends
_MEMORY = re.compile(
    r"bad_alloc|(?:cannot|can't|failed to|unable to) allocate memory|not enough memory|failed to map segment|start new thread",
    re.IGNORECASE,
)
_NO_TEXT = re.compile(r"[\ud800-\udfff]|\\udc[89a-f][0-9a-f]")  # of a path with bytes that are not UTF-8
GONE = "The current directory no longer exists. Change to another one, and run the command again."
SHOWN, LONGEST = 300, 8000  # characters: of one foreign text in a message, and of a message


class SwinDeployError(Exception):
    """Base class of all errors that swin-deploy raises on purpose. Control characters in its message are escaped."""

    exit_code = 2

    def __init__(self, *args: object) -> None:
        super().__init__(*(printable(shortened(one, LONGEST)) if isinstance(one, str) else one for one in args))


class UsageError(SwinDeployError):
    """An argument is invalid."""


class MissingDependencyError(SwinDeployError, ImportError):
    """A library that this step needs is not installed."""


class CheckpointError(SwinDeployError):
    """Weights or a config cannot be read, or do not match."""


class BundleError(SwinDeployError):
    """A bundle is missing, damaged, or not writable."""


class InputError(SwinDeployError, ValueError):
    """The model does not accept an array or image."""


class ExportError(SwinDeployError):
    """The ONNX graph could not be created."""


class PassError(ExportError):
    """A graph pass did not find the pattern that it rewrites."""


class EngineError(SwinDeployError):
    """The TensorRT compiler refused the graph or the target, or an engine does not fit this machine."""


class UntrustedEngineError(EngineError):
    """An engine was compiled elsewhere, and the caller does not say that its author is trusted."""


class BackendError(SwinDeployError):
    """A back end failed while loading or running a model; its own error is the cause."""


class MissingKernelError(BackendError):
    """The back end has no kernel for an operator in the type that the graph uses."""


class VerificationError(SwinDeployError):
    """A model runs, but its results differ from PyTorch's."""

    exit_code = 1


class GateError(SwinDeployError):
    """A quantized graph is less accurate or slower than requested."""

    exit_code = 3


def unknown(kind: str, value: object, choices: Iterable[str]) -> UsageError:
    """Return the error for a name that is not one of `choices`.

    Args:
        kind: What is chosen, in the singular, such as "precision" or "back end".
        value: What was given.
        choices: All valid names, in the order to list them.
    """
    return UsageError(f'Unknown {kind} "{shown(str(value))}". Choose one of: {", ".join(choices)}.')


def printable(text: str, pattern: re.Pattern[str] = UNPRINTABLE) -> str:
    """Return `text` with its control characters escaped as in Python (ESC as \\x1b), except tabs and line ends."""
    return pattern.sub(lambda sign: sign[0].encode("unicode_escape").decode(), text)


def shortened(text: str, limit: int = SHOWN) -> str:
    """Return at most `limit` characters of `text`."""
    return text if len(text) <= limit else text[: limit - 3] + "..."


def shown(value: object) -> str:
    """Return foreign text, or the repr of another value, for a message: one line of at most 300 printable characters."""
    try:
        text = value if isinstance(value, str) else repr(value)
    except (ValueError, RecursionError):  # a number with more than 4300 digits, or a deeply nested list
        text = f"<{type(value).__name__}>"
    return shortened(printable(shortened(text), _CONTROL))


def sentence(text: str) -> str:
    """Return `text` on one line and without its final period, to embed it in a sentence."""
    return " ".join(text.split()).rstrip(".")


def system_limit(error: BaseException) -> str | None:
    """Return the sentences for an error that the system caused: memory, open files, a removed directory, a path's encoding.

    Returns None for any other error.
    """
    text, what = str(error), f"{error.filename}: " if isinstance(error, OSError) and error.filename else ""
    if _is_of_memory(error):
        limit, reason = _limit_of("RLIMIT_AS"), f" ({shortened(shown(sentence(text)), 100)})" if text else ""
        if limit is None:
            return f"Memory ran out{reason}. Free some memory, or use a machine with more."
        allowed = f"This process is limited to {limit >> 20} MiB of address space"
        return f"Memory ran out{reason}. {allowed}. Raise this limit (ulimit -v)."
    if getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE) or "Too many open files" in text:
        limit = _limit_of("RLIMIT_NOFILE")
        allowed = "" if limit is None else f"; the limit is {limit}"
        return f"{what}Too many files are open{allowed}. Raise the limit (ulimit -n 1024)."
    if isinstance(error, TypeError | UnicodeError) and _NO_TEXT.search(text):
        return "A path is not valid UTF-8, and this library cannot open such files. Rename the file or folder."
    if isinstance(error, FileNotFoundError):
        try:
            Path.cwd()
        except OSError:
            return GONE
    return None


def _is_of_memory(error: BaseException | None) -> bool:
    """Return whether an error, or one that led to it, reports that memory ran out."""
    # With a limit, allocations of CPython itself that fail can end as a SystemError, and those of protobuf as an EncodeError.
    limited = _limit_of("RLIMIT_AS") is not None
    kinds = (MemoryError, SystemError) if limited else (MemoryError,)
    seen: set[int] = set()  # an error that was raised again may have led to itself
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        text = str(error)
        if isinstance(error, kinds) or (limited and "serialize proto" in text) or (_MEMORY.search(text) and "CUDA" not in text):
            return True
        error = error.__cause__ or error.__context__
    return False


def _limit_of(name: str) -> int | None:
    try:
        import resource
    except (ImportError, OSError):  # Windows, or no more files can be opened
        return None
    limit = resource.getrlimit(getattr(resource, name))[0]
    return None if limit == resource.RLIM_INFINITY else limit
