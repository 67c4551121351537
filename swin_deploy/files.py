"""Files: bounded reading, atomic exchange of folders, locks between processes, and scratch files removed even after a kill."""

from __future__ import annotations

import contextlib
import ctypes
import glob
import json
import math
import os
import platform
import re
import secrets
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from .errors import InputError, SwinDeployError, shown

JSON_BYTES = 1 << 26  # largest JSON file; one with a name for each of 1,000,000 classes fits
JSON_VALUES = 4_000_000  # each takes up to 100 bytes of memory
JSON_LEVELS = 64  # of nested lists and objects
JSON_DIGITS = 20  # of a whole number
ANOTHER = "Pass another file."


def open_regular(path: str | os.PathLike[str], error: type[SwinDeployError], advice: str = ANOTHER, name: str = "") -> BinaryIO:
    """Open a regular file for reading. A folder, FIFO, socket or device is refused, and reading it could never block.

    Args:
        path: The file; links are followed.
        error: Class of the error that is raised if the file cannot be opened.
        advice: What to do about it, as a sentence.
        name: How the error names the file; its path by default.
    """
    name = name or str(path)
    try:
        kind = Path(path).stat().st_mode  # opening a device could already have an effect
        if stat.S_ISREG(kind):
            flags = (getattr(os, flag, 0) for flag in ("O_NONBLOCK", "O_CLOEXEC", "O_BINARY", "O_NOCTTY"))
            file = os.fdopen(os.open(path, os.O_RDONLY | sum(flags)), "rb")
            if stat.S_ISREG(kind := os.fstat(file.fileno()).st_mode):
                return file
            file.close()
    except FileNotFoundError as cause:
        raise error(f"{name} does not exist. {advice}") from cause
    except (OSError, ValueError) as cause:  # ValueError: a NUL in the path
        raise error(f"{name} cannot be read: {getattr(cause, 'strerror', None) or cause}. {advice}") from cause
    what = "is a folder" if stat.S_ISDIR(kind) else "is not a regular file"
    raise error(f"{name} {what}. {advice}")


def read_regular(
    path: str | os.PathLike[str],
    limit: int,
    error: type[SwinDeployError] = InputError,
    advice: str = ANOTHER,
    name: str = "",
) -> bytes:
    """Return the content of a regular file of at most `limit` bytes; see open_regular for the other arguments."""
    name = name or str(path)
    with open_regular(path, error, advice, name) as file:
        size, pieces = os.fstat(file.fileno()).st_size, []
        try:
            while size <= limit and (piece := file.read(1 << 20)):  # a file of /proc has size 0
                pieces.append(piece)
                size = max(size, sum(map(len, pieces)))
        except OSError as cause:
            raise error(f"{name} cannot be read: {cause.strerror or cause}. {advice}") from cause
    if size > limit:
        raise error(f"{name} has more than {limit} bytes, which is the limit for such a file. {advice}")
    return b"".join(pieces)


def json_from(content: bytes, name: str, error: type[SwinDeployError] = InputError, advice: str = ANOTHER) -> Any:
    """Return the value of JSON text in UTF-8.

    Raises `error` for NaN, infinity, numbers that overflow, keys that occur twice, and text beyond the limits of this module.
    """
    try:
        if sum(content.count(sign) for sign in (b",", b"[", b"{")) > JSON_VALUES:
            raise ValueError(f"it has more than {JSON_VALUES} values")
        value = json.loads(
            content.decode("utf-8-sig"),
            parse_int=_whole_number,
            parse_float=_finite_number,
            parse_constant=_finite_number,
            object_pairs_hook=_without_duplicates,
        )
        level: list[Any] = [value]
        for _ in range(JSON_LEVELS + 1):
            level = [
                part
                for one in level
                if isinstance(one, list | dict)
                for part in (one.values() if isinstance(one, dict) else one)
            ]
        if level:
            raise RecursionError
    except UnicodeDecodeError as cause:
        raise error(f"{name} cannot be read as JSON (it is not UTF-8 text). {advice}") from cause
    except RecursionError as cause:
        raise error(f"{name} cannot be read as JSON (it is nested too deeply). {advice}") from cause
    except ValueError as cause:
        raise error(f"{name} cannot be read as JSON ({cause}). {advice}") from cause
    return value


def json_file(
    path: str | os.PathLike[str], error: type[SwinDeployError] = InputError, advice: str = ANOTHER, name: str = ""
) -> Any:
    """Read a JSON file; see read_regular and json_from."""
    return json_from(read_regular(path, JSON_BYTES, error, advice, name), name or str(path), error, advice)


def _whole_number(text: str) -> int:
    if len(text) > JSON_DIGITS + text.startswith("-"):
        raise ValueError(f"the number {text[:JSON_DIGITS]}... has more than {JSON_DIGITS} digits")
    return int(text)


def _finite_number(text: str) -> float:
    if not math.isfinite(number := float(text[:1000])):
        raise ValueError(f"{text[:40]} is not a finite number")
    return number


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {shown(twice)} occurs twice")
    return found


def exchanged(one: Path, other: Path) -> bool:
    """Exchange two folders atomically and return whether the system could do that."""
    if sys.platform != "linux":
        return False
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (OSError, AttributeError):  # a C library older than 2018, or musl
        return False
    at_fdcwd, rename_exchange = -100, 2
    return bool(renameat2(at_fdcwd, os.fsencode(one), at_fdcwd, os.fsencode(other), rename_exchange) == 0)


@contextlib.contextmanager
def locked(folder: Path, waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """Lock a folder against other processes inside the block, on systems that have such locks.

    Args:
        folder: An existing folder.
        waiting: Called once if another process holds the lock.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if waiting is not None:
                waiting()
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def scratch_folder(kind: str) -> Iterator[Path]:
    """Yield a temporary folder, removed at the end. Folders of this kind that killed processes left are removed first."""
    target = Path(tempfile.gettempdir(), f"swin-{kind}")
    sweep(target)
    folder = scratch_beside(target)
    folder.mkdir(0o700)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def scratch_beside(target: Path) -> Path:
    """Return an unused name beside `target` that contains machine and process, so that `sweep` can find leftovers."""
    return target.with_name(f".{target.name}.partial-{platform.node()}-{os.getpid()}-{secrets.token_hex(4)}")


def sweep(target: Path) -> None:
    """Remove scratch files and folders of `target` that killed processes of this machine left."""
    if os.name == "nt":  # os.kill(pid, 0) would end the process there
        return
    ours = f".{target.name}.partial-{platform.node()}-"
    for leftover in target.parent.glob(glob.escape(ours) + "*"):
        made = re.fullmatch(r"(\d+)-[0-9a-f]{8}", leftover.name.removeprefix(ours))
        if made is None:  # from a machine whose name begins like this one's
            continue
        try:
            os.kill(int(made[1]), 0)
        except (ProcessLookupError, OverflowError):
            with contextlib.suppress(OSError):  # it belongs to another user
                if leftover.is_dir():
                    shutil.rmtree(leftover, ignore_errors=True)
                else:
                    leftover.unlink(missing_ok=True)
        except OSError:
            pass  # the process runs and belongs to another user
