"""Files in the cache folder of the user, which may be deleted at any time."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import mmap
import os
import re
import shutil
import stat
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from swin_deploy import __version__
from swin_deploy.bundle import cache_folder as cache_folder
from swin_deploy.bundle import sha256_of
from swin_deploy.dependencies import installed_versions
from swin_deploy.files import scratch, sweep_folder
from swin_deploy.machine import processor_features, processor_name, usable_cores

_LOG = logging.getLogger(__name__)
FORMAT = 2  # raised when the same file is compiled to a graph with other results
STORING = "swin-deploy: store compiled graphs"  # name of the thread
SMALLEST_STORED = 4 << 20  # bytes of a graph: smaller ones are compiled in no time
DAYS, MOST_FILES, MOST_BYTES = 90, 64, 2 << 30  # files of each kind that are kept, those used last
LARGEST = 1 << 30  # bytes
_OURS = re.compile(r"[0-9a-f]{32}[\w-]*\.(?:json|cache)")  # no other file is ever deleted


def stored_graph(library: str, *key: object) -> Path | None:
    """Return where a compiled graph is stored for the next load by the same library on the same machine."""
    if (folder := cache_folder(library)) is None:
        return None
    libraries = [__version__, *installed_versions((library, f"{library}-gpu")).values()]
    machine = [processor_name(), *processor_features(), usable_cores(), os.environ.get("ONEDNN_MAX_CPU_ISA", "")]
    text = json.dumps([FORMAT, *key, libraries, machine])
    return folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.cache"


def stored_weights(graph: Path) -> Path:
    """Return where the weights of a stored graph of ONNX Runtime are."""
    return graph.with_stem(f"{graph.stem}-weights")


def stored_files(backend: str, digest: str, batches: Sequence[int], threads: int, bf16: bool) -> list[Path]:
    """Return the large files that a back end reads if it has stored this graph on this machine."""
    if backend == "openvino":
        return [file for size in batches or (1,) if (file := stored_graph(backend, size, digest, threads, bf16)) is not None]
    file = stored_graph(backend, digest) if backend == "onnxruntime" else None
    return [stored_weights(file)] if file is not None else []


def file_identity(path: Path) -> tuple[int, ...] | None:
    """Return what changes when the file is written or replaced; None if it does not exist."""
    try:
        found = path.stat()
    except OSError:
        return None
    # A copy that keeps the times can get the number of the removed file. Only the time of the last change tells them apart.
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def read_cached(file: Path | None) -> bytes:
    """Return the content of a file and mark it as used now; empty if it cannot be read or somebody else can write it."""
    if file is None or not _trusted(file.parent):
        return b""
    with suppress(OSError):
        handle = os.open(file, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
        with os.fdopen(handle, "rb") as opened:
            facts = os.fstat(handle)
            if not stat.S_ISREG(facts.st_mode) or facts.st_size > LARGEST:
                return b""
            with suppress(OSError):
                os.utime(file)
            return opened.read()
    return b""


def write_cached(file: Path | None, content: bytes) -> None:
    """Write a file atomically and delete old files beside it; does nothing if the folder cannot be written."""
    if file is None:
        return
    with suppress(OSError):
        if not _opened(file.parent):
            return
        with scratch(file) as path:
            path.write_bytes(content)
            path.replace(file)
        _remove_old(file.parent)


def map_cached(file: Path | None, sha256: str) -> mmap.mmap | None:
    """Map a file and mark it as used; None if it has another sha256, or somebody else could have written it."""
    if file is None or not _trusted(file.parent):
        return None
    with suppress(OSError, ValueError):
        handle = os.open(file, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
        with os.fdopen(handle, "rb"):
            facts = os.fstat(handle)
            if not stat.S_ISREG(facts.st_mode) or (os.name != "nt" and (facts.st_uid != os.geteuid() or facts.st_mode & 0o022)):
                return None
            if sha256_of(file) != sha256:
                _LOG.warning("Warning: %s is damaged, so it is not used, and written again.", file)
                file.unlink()
                return None
            if facts.st_mtime < time.time() - 24 * 3600:
                os.utime(file)
            return mmap.mmap(handle, 0, access=mmap.ACCESS_READ)
    return None


def store_cached(file: Path, write: Callable[[Path], object], **facts: object) -> None:
    """Store files that `write(folder)` writes beside `file`, each atomically, and at last a record of `facts` and their sha256.

    Does nothing if the folder or the disk cannot hold them.
    """
    with suppress(OSError):
        if not _opened(file.parent):
            return
        with scratch(file) as folder:
            folder.mkdir(0o700)
            write(folder)
            written = [*folder.iterdir()]
            if sum(one.stat().st_size for one in written) > min(LARGEST, shutil.disk_usage(folder).free):
                return
            for one in written:
                one.chmod(0o600)
            facts["sha256"] = {one.name: sha256_of(one) for one in written}
            for one in written:
                one.replace(file.with_name(one.name))
        write_cached(file.with_suffix(".json"), json.dumps(facts).encode())


def _opened(folder: Path) -> bool:
    """Create a cache folder and remove what killed processes left in it; return whether only this user can write into it."""
    for place in (folder.parent, folder):
        place.mkdir(0o700, parents=True, exist_ok=True)
    if trusted := _trusted(folder):
        sweep_folder(folder)
    return trusted


def _trusted(folder: Path) -> bool:
    """Return whether only this user can write into a cache folder and the one that holds it.

    Earlier releases left the permissions to the umask: what others could write is emptied and closed to them.
    """
    if os.name == "nt":
        return True
    try:
        for place in (folder.parent, folder):
            facts = place.stat()
            if facts.st_uid != os.geteuid():
                _refuse(place)
                return False
            if facts.st_mode & 0o022:
                place.chmod(stat.S_IMODE(facts.st_mode) & ~0o022)
                for _, file in _ours(folder):
                    file.unlink(missing_ok=True)
    except OSError:
        return False
    return True


@functools.cache  # one line for each folder
def _refuse(folder: Path) -> None:
    _LOG.warning(
        "Warning: The cache folder %s belongs to another user, so it is not used. Change its owner, or set XDG_CACHE_HOME to "
        "another folder.",
        folder,
    )


def _ours(folder: Path) -> list[tuple[float, Path]]:
    """Return the files with our own names, and when they were last used."""
    times: list[tuple[float, Path]] = []
    for file in folder.iterdir():
        with suppress(OSError):  # another process has removed it
            if _OURS.fullmatch(file.name) and stat.S_ISREG((facts := file.lstat()).st_mode):
                times.append((facts.st_mtime, file))
    return times


def _remove_old(folder: Path) -> None:
    oldest, held = time.time() - DAYS * 24 * 3600, 0
    for number, (used, file) in enumerate(sorted(_ours(folder), reverse=True)):
        with suppress(OSError):
            held += file.stat().st_size
            if used < oldest or number >= MOST_FILES or held > MOST_BYTES:
                file.unlink()
