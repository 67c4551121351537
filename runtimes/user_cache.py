"""Files in the cache folder of the user, which may be deleted at any time."""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress
from pathlib import Path

from swin_deploy.files import scratch_beside

DAYS, MOST_FILES = 90, 64  # files of each kind that are kept, those used last


def cache_folder(kind: str) -> Path | None:
    """The folder for one kind of file; None where there is no home for it. It need not exist yet."""
    if given := os.environ.get("XDG_CACHE_HOME"):
        folder = Path(given)
    elif sys.platform == "win32":
        folder = Path(os.environ.get("LOCALAPPDATA", ""))
    else:
        try:
            folder = Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")
        except RuntimeError:
            return None
    return folder / "swin-deploy" / kind if folder.is_absolute() else None


def read_cached(file: Path | None) -> bytes:
    """Return the content of a file and mark it as used now; empty if it cannot be read."""
    if file is not None:
        with suppress(OSError):
            os.utime(file)
        with suppress(OSError):
            return file.read_bytes()
    return b""


def write_cached(file: Path | None, content: bytes) -> None:
    """Write a file atomically and delete old files beside it; does nothing if the folder cannot be written."""
    if file is None:
        return
    scratch = scratch_beside(file)
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            scratch.write_bytes(content)
            scratch.replace(file)
        finally:
            scratch.unlink(missing_ok=True)
        _remove_old(file.parent)


def _remove_old(folder: Path) -> None:
    times: list[tuple[float, Path]] = []
    for file in folder.iterdir():
        with suppress(OSError):  # another process has removed it
            times.append((file.stat().st_mtime, file))
    oldest = time.time() - DAYS * 24 * 3600
    for number, (used, file) in enumerate(sorted(times, reverse=True)):
        if used < oldest or number >= MOST_FILES:
            with suppress(OSError):
                file.unlink()
