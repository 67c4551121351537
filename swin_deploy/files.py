"""What a folder can do that Python has no word for: take another's place in one step, be held against other processes, and be
swept of what killed processes left in it."""

from __future__ import annotations

import contextlib
import ctypes
import glob
import os
import platform
import re
import secrets
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path


def exchanged(one: Path, other: Path) -> bool:
    """Whether two folders took each other's place in one step, which not every system can: killed, none is missing."""
    if sys.platform != "linux":
        return False
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (OSError, AttributeError):  # a C library older than 2018, or musl
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0)


@contextlib.contextmanager
def locked(folder: Path, waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """Holds a folder against other processes that ask for it; where the system has no such locks, nothing."""
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
    """A folder in the system's place for temporary files, removed at the end; what the killed left of that kind goes first."""
    target = Path(tempfile.gettempdir(), f"swin-{kind}")
    sweep(target)
    folder = scratch_beside(target)
    folder.mkdir(0o700)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def scratch_beside(target: Path) -> Path:
    """A name beside `target` that nobody else uses; it tells who made it, so that leftovers can be swept."""
    return target.with_name(f".{target.name}.partial-{platform.node()}-{os.getpid()}-{secrets.token_hex(4)}")


def sweep(target: Path) -> None:
    """Removes what the making of `target`, a folder or a file, left when it was killed on this machine."""
    if os.name == "nt":  # where os.kill(pid, 0) is no question
        return
    ours = f".{target.name}.partial-{platform.node()}-"
    for leftover in target.parent.glob(glob.escape(ours) + "*"):
        made = re.fullmatch(r"(\d+)-[0-9a-f]{8}", leftover.name.removeprefix(ours))
        if made is None:  # of a machine whose name begins like this one's
            continue
        try:
            os.kill(int(made[1]), 0)
        except (ProcessLookupError, OverflowError):
            with contextlib.suppress(OSError):  # it is another user's, and stays
                if leftover.is_dir():
                    shutil.rmtree(leftover, ignore_errors=True)
                else:
                    leftover.unlink(missing_ok=True)
        except OSError:
            pass  # somebody else's process


def bytes_writer(data: bytes) -> Callable[[Path], None]:
    """Return a function that writes `data` to a path."""

    def write(path: Path) -> None:
        path.write_bytes(data)

    return write
