"""Atomic exchange of folders, locks between processes, and scratch files that are removed even after a kill."""

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
