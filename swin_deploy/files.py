"""Files: bounded reading of JSON and NumPy files from elsewhere, atomic exchange of folders, locks between processes, and
scratch files removed even after a kill.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import hashlib
import io
import json
import logging
import math
import os
import platform
import re
import secrets
import shutil
import stat
import struct
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, BinaryIO

from .errors import InputError, SwinDeployError, sentence, shown, system_limit

if TYPE_CHECKING:
    import zipfile

    import numpy as np

    from .options import Array

_LOG = logging.getLogger(__name__)
MANIFEST = "manifest.json"  # a folder that has one is a whole bundle
OLD = 7 * 24 * 3600  # s; after this time, scratch is removed even where locks prove nothing
SLOW = 10.0  # s of waiting for a lock, until a line names its holder
# Hidden names: of scratch, of the bundle that it replaces, and of its lock. Releases before 0.2 added machine and process, and
# had no locks: what they left is removed when it is old, since one of them may be running.
_SCRATCH = re.compile(r"\.(.+)\.(?:partial|replaced)-((?:.*-\d+-)?[0-9a-f]{8})(?:\.lock)?", re.DOTALL)
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
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
        raise _unreadable(error, name, cause, advice) from cause
    what = "is a folder" if stat.S_ISDIR(kind) else "is not a regular file"
    raise error(f"{name} {what}. {advice}")


def _unreadable(error: type[SwinDeployError], name: str, cause: Exception, advice: str) -> SwinDeployError:
    if (limit := system_limit(cause)) is not None:
        return error(f"{name} cannot be read. {limit}")
    return error(f"{name} cannot be read: {getattr(cause, 'strerror', None) or cause}. {advice}")


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
        size, content = os.fstat(file.fileno()).st_size, bytearray()
        try:
            while max(size, len(content)) <= limit and (piece := file.read(1 << 20)):  # a file of /proc has size 0
                content += piece
        except OSError as cause:
            raise _unreadable(error, name, cause, advice) from cause
    if max(size, len(content)) > limit:
        raise error(f"{name} has more than {limit} bytes, which is the limit for such a file. {advice}")
    return bytes(content)


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


def synced(path: Path) -> None:
    """Wait until the content of a file, or the names in a folder, are on the disk."""
    if os.name == "nt":
        return
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:  # a umask without read permission
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF):  # it has no fsync
            raise
    finally:
        os.close(handle)


@contextlib.contextmanager
def locked(folder: Path, waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """Lock a folder against other processes inside the block, on file systems that have such locks.

    Args:
        folder: An existing folder.
        waiting: Called once if another process holds the lock.
    """
    if os.name == "nt":
        yield
        return
    while True:
        handle = os.open(folder, os.O_RDONLY)
        try:
            if _lock(handle) is False:
                if waiting is not None:
                    waiting()
                _wait(handle, folder)
            if _is_at(handle, folder):  # otherwise it was replaced meanwhile
                yield
                return
        finally:
            os.close(handle)


def _lock(handle: int, wait: bool = False) -> bool | None:
    """Lock an open file or folder and return whether that succeeded; None if its file system has no locks."""
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        return None
    except BlockingIOError:
        return False
    except OSError as error:  # Lustre, some network file systems
        _no_locks(error.strerror)
        return None
    return True


@functools.cache  # one line for each process
def _no_locks(reason: str) -> None:
    _LOG.warning(
        "Warning: This file system has no file locks (%s), so commands on one bundle are not kept apart. Run one at a time.",
        sentence(reason),
    )


def _wait(handle: int, path: Path) -> None:
    """Wait for a lock. After ten seconds, log which process holds it."""
    timer = threading.Timer(SLOW, lambda: _LOG.warning("Still waiting for the lock of %s, held by %s", path, _holder(handle)))
    timer.daemon = True
    timer.start()
    try:
        _lock(handle, wait=True)
    finally:
        timer.cancel()
        timer.join()


def _holder(handle: int) -> str:
    """Return which process of this machine holds the lock, as far as Linux shows it to this process."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        inode = f":{os.fstat(handle).st_ino}"
        for line in Path("/proc/locks").read_text().splitlines():
            _, kind, _, _, pid, place = line.split()[:6]
            if kind == "FLOCK" and place.endswith(inode) and int(pid) > 0:
                command = Path(f"/proc/{pid}/cmdline").read_bytes().decode("utf-8", "replace").split("\0")
                shown = sentence("".join(filter(str.isprintable, " ".join(command))))[:200]
                return f"process {pid} on {platform.node()}: {shown}"
    return "a process of another container or machine"


def _is_at(handle: int, path: Path) -> bool:
    """Return whether an open file or folder is still the one at `path`."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def scratch_folder(kind: str) -> Iterator[Path]:
    """Yield a temporary folder, removed at the end. Folders that killed processes left are removed first."""
    with contextlib.ExitStack() as stack:
        place = None
        try:
            place = _temporary()
            sweep_temporary()
            folder = stack.enter_context(scratch(place / f"swin-{kind}"))
            make_folder(folder, 0o700)
            yield folder
        except OSError as error:
            if place is not None and error.errno not in _NO_SPACE and " requested and " not in str(error):  # of numpy
                raise
            where = place or f"any of the folders for temporary files: {error.strerror}"
            raise SwinDeployError(
                f"There is no space in {where}. Free some space, or set the environment variable TMPDIR to a folder with space."
            ) from error


def make_folder(path: Path, mode: int = 0o777) -> None:
    """Make a folder. Raises PermissionError at once if the umask leaves no permission to write into it."""
    path.mkdir(mode)
    if not os.access(path, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, "the umask takes the permissions of new folders; set it to 022", str(path))


@contextlib.contextmanager
def parents_of(path: Path) -> Iterator[None]:
    """Make the folders above `path`, and at the end remove those that are still empty."""
    missing = [folder for folder in path.parents if not os.path.lexists(folder)]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for folder in missing:
            with contextlib.suppress(OSError):
                folder.rmdir()


@contextlib.contextmanager
def scratch(target: Path) -> Iterator[Path]:
    """Yield an unused hidden path beside `target`, for a file or folder that is removed at the end unless it was moved away.

    Meanwhile, a file beside it is locked: `sweep` removes what is not locked, which a killed process left.
    """
    while True:
        path = target.with_name(f".{_stem(target)}.partial-{secrets.token_hex(4)}")
        handle = os.open(_lock_file(path), os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        if _lock(handle) is not False and _is_at(handle, _lock_file(path)):
            break
        os.close(handle)  # another process has just swept it
    try:
        with contextlib.suppress(OSError):  # a full disk
            os.write(handle, f"{_boot()}\n{platform.node()}\n{os.getpid()}\n".encode("utf-8", "replace"))
        yield path
    finally:
        _put_back(replaced_by(path), target)
        _discard(path)
        os.close(handle)
        with contextlib.suppress(OSError):
            _lock_file(path).unlink(missing_ok=True)


def move_scratch(path: Path, target: Path) -> None:
    """Move a scratch file to `target`, so that `sweep_folder` removes it there if this process is killed next."""
    with contextlib.suppress(OSError), _lock_file(path).open("a") as lock:  # a full disk
        lock.write(f"{path.stat().st_ino}\n")
    path.replace(target)


def replaced_by(path: Path) -> Path:
    """Return where the bundle is that the scratch folder `path` replaces, between the two renames."""
    stem, key = _parts(path.name)
    return path.with_name(f".{stem}.replaced-{key}")


def set_aside(path: Path, old: Path) -> None:
    """Rename a bundle, or copy and remove it where it cannot be renamed: in overlayfs, one of a lower layer."""
    try:
        path.replace(old)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        shutil.copytree(path, old, symlinks=True, ignore=lambda folder, names: {MANIFEST} if Path(folder) == path else set())
        for copy in old.rglob("*"):
            if not copy.is_symlink():
                synced(copy)
        shutil.copy2(path / MANIFEST, old / MANIFEST)  # last: from now on, it counts
        synced(old / MANIFEST)
        _discard(path)
        if path.exists():
            raise


def put_aside(folder: Path) -> set[str]:
    """Return the names of the bundles in a folder that were renamed away to be replaced."""
    return {_parts(name)[0] for name in _names(folder) if ".replaced-" in name}


def put_back(path: Path) -> None:
    """Put back the bundle at `path` if a killed command had renamed it away. A running command is waited for."""
    path = Path(os.path.realpath(path))
    for _ in range(3):
        aside = [path.with_name(name) for name in _names(path.parent, _stem(path)) if ".replaced-" in name]
        if not aside or (path / MANIFEST).exists():
            return
        sweep(path)
        for old in aside:
            with contextlib.suppress(OSError):  # it is gone, or read-only
                handle = os.open(_lock_file(old.with_name(old.name.replace(".replaced-", ".partial-"))), os.O_RDWR)
                try:
                    _wait(handle, path)
                finally:
                    os.close(handle)


def sweep(target: Path) -> None:
    """Remove what killed processes left beside `target`, and put back a bundle that they had renamed away."""
    _sweep(target.parent, _stem(target), target)


def sweep_folder(folder: Path, start: str = "", kept: Callable[[Path], bool] = lambda file: True) -> None:
    """Remove the scratch of killed processes in a folder, of every target whose name begins with `start`.

    Files that they had moved to their target are removed, too, unless they are to be `kept`.
    """
    for stem in {_parts(name)[0] for name in _names(folder)}:
        if stem.startswith(start):
            _sweep(folder, stem, None, kept)


def sweep_temporary() -> None:
    """Remove what killed processes left among temporary files."""
    with contextlib.suppress(OSError):
        sweep_folder(_temporary(), "swin-")


def _temporary() -> Path:
    """Return the folder that tempfile uses; tempfile itself writes a file to find it, which stays if it is killed there."""
    for place in (tempfile.tempdir, *map(os.environ.get, ("TMPDIR", "TEMP", "TMP")), "/tmp"):
        with contextlib.suppress(OSError):
            if place and os.access(place, os.W_OK | os.X_OK) and shutil.disk_usage(place).free:
                return Path(os.fsdecode(place))
    return Path(tempfile.gettempdir())


def _sweep(folder: Path, stem: str, target: Path | None, kept: Callable[[Path], bool] = lambda file: True) -> None:
    for key in {_parts(name)[1] for name in _names(folder, stem)}:
        path = folder / f".{stem}.partial-{key}"
        if "-" in key and not _is_old(path):
            continue
        with _unused(path) as unused:
            if unused is not False and target is not None:
                _put_back(replaced_by(path), target)
            if unused:
                with contextlib.suppress(OSError):
                    moved, file = _lock_file(path).read_text(errors="replace").split("\n")[3:4], folder / stem
                    if moved == [str(file.lstat().st_ino)] and not kept(file):
                        file.unlink()
                _discard(path)


def _is_old(path: Path) -> bool:
    with contextlib.suppress(OSError):
        return time.time() - path.lstat().st_mtime > OLD
    return False


@contextlib.contextmanager
def _unused(path: Path) -> Iterator[bool | None]:
    """Lock scratch and yield whether no process uses it; None if nobody knows, since there are no common locks."""
    file = _lock_file(path)
    without_lock = not os.path.lexists(file)  # so it was swept partly, or is of an earlier release
    try:
        handle = os.open(file, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0), 0o600)
    except OSError:  # it belongs to another user
        yield False
        return
    unused: bool | None = False
    try:
        held = _lock(handle)
        if held is not False and _is_at(handle, file):
            proven = (held and not _of_another_machine(handle)) or without_lock
            unused = True if proven or time.time() - os.fstat(handle).st_mtime > OLD else None
        yield unused
    finally:
        os.close(handle)
        if unused:
            with contextlib.suppress(OSError):
                file.unlink(missing_ok=True)


def _of_another_machine(handle: int) -> bool:
    """Return whether the lock was made by another machine, whose locks a shared file system may not show to this one."""
    lines = os.read(handle, 1000).decode("utf-8", "replace").split("\n")
    return len(lines) > 2 and lines[0] != _boot() and lines[1] != platform.node()


@functools.cache
def _boot() -> str:
    """Return what identifies the running kernel, in every container on it; empty if nothing does."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def _put_back(old: Path, path: Path) -> None:
    """Move a bundle that was renamed away back to `path`, or remove it if there is another one."""
    with contextlib.suppress(OSError):
        if (path / MANIFEST).exists() or not (old / MANIFEST).exists():
            _discard(old)
            return
        try:
            old.replace(path)
        except OSError:
            # It was copied, and its original partly removed: overlayfs. Anything else in that folder stays as it is.
            names = {file.relative_to(old) for file in old.rglob("*")}
            if not path.is_dir() or any(file.relative_to(path) not in names for file in path.rglob("*")):
                raise
            for name in sorted(names, key=lambda name: (name == Path(MANIFEST), len(name.parts))):
                if (old / name).is_dir() and not (old / name).is_symlink():
                    (path / name).mkdir(exist_ok=True)
                else:
                    (old / name).replace(path / name)
            _discard(old)
        _LOG.info("Restored %s: a command that was replacing it had been killed", path)


def _discard(path: Path) -> None:
    """Remove a file or folder that may not exist; of a folder the manifest first, so that none with a manifest lacks files."""
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            if not os.access(path, os.W_OK | os.X_OK):
                path.chmod(0o700)
            (path / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _names(folder: Path, stem: str | None = None) -> list[str]:
    """Return the names of scratch in a folder; empty if it cannot be read."""
    with contextlib.suppress(OSError):
        found = [path.name for path in folder.iterdir() if path.name.startswith(".") and _SCRATCH.fullmatch(path.name)]
        return [name for name in found if stem is None or _parts(name)[0] == stem]
    return []


def _parts(name: str) -> tuple[str, str]:
    """Return target and key of the name of scratch."""
    match = _SCRATCH.fullmatch(name)
    assert match is not None
    return match[1], match[2]


def _stem(target: Path) -> str:
    """Return the name of `target`, or a digest of a name so long that nothing can be added to it."""
    name = os.fsencode(target.name)
    return target.name if len(name) < 200 else hashlib.sha256(name).hexdigest()[:32]


def _lock_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.lock")


NUMPY_MAGIC = b"\x93NUMPY"
MOST_MEMBERS = 10_000  # of a NumPy archive
DIRECTORY_BYTES = 1 << 22  # of a NumPy archive
HEADER_BYTES = 10_000  # of an array, as in NumPy
PIECE = 1 << 20
NUMPY_ADVICE = "Write it again with np.save or np.savez."

_VALUE = r"""'(?P<descr>[^'"\\]{1,40})'|(?P<order>True|False)|\((?P<shape>[0-9L,\s]*)\)"""
_ITEM = re.compile(rf"\s*'(?P<key>descr|fortran_order|shape)'\s*:\s*(?:{_VALUE})\s*(?:,|(?=\}}))")
_DAMAGE = (ValueError, TypeError, LookupError, ArithmeticError, EOFError, OSError, RuntimeError, struct.error, zlib.error)


def read_arrays(
    path: str | os.PathLike[str],
    limit: int,
    error: type[SwinDeployError] = InputError,
    advice: str = NUMPY_ADVICE,
    name: str = "",
) -> dict[str, Array]:
    """Return the arrays of an .npz file by name, or that of an .npy file under the name "".

    `numpy.load` checks no local header of an archive, allocates whatever a header declares, evaluates headers as Python code,
    and advises to allow pickles.

    Args:
        path: A regular file.
        limit: Most bytes of all arrays together, as they are in memory.
        error: Class of the error for a file that is damaged or exceeds a limit.
        advice: What to do about it, as a sentence.
        name: How the error names the file; its path by default.
    """
    name = name or str(path)
    with open_regular(path, error, advice, name) as file, numpy_errors(name, error, advice):
        if file.peek(len(NUMPY_MAGIC)).startswith(NUMPY_MAGIC):  # type: ignore[attr-defined]
            return {"": _array(file, os.fstat(file.fileno()).st_size, limit)}
        with archive_of(file) as (archive, members):
            if (total := sum(member.file_size for member in members.values())) > limit:
                raise ValueError(f"its arrays take {total} bytes, and the limit is {limit}")
            found = {}
            for key, member in members.items():
                with archive.open(member) as stream:
                    found[key] = _array(stream, member.file_size, limit)
                    if stream.read(1):  # and its CRC-32 is checked at the end
                        raise ValueError(f"{key} has more bytes than its shape needs")
            return found


@contextlib.contextmanager
def numpy_errors(name: str, error: type[SwinDeployError] = InputError, advice: str = NUMPY_ADVICE) -> Iterator[None]:
    """Turn whatever a damaged file raises inside the block into `error`."""
    import zipfile  # it takes 5 ms to load

    try:
        yield
    except SwinDeployError:
        raise
    except (*_DAMAGE, MemoryError, zipfile.BadZipFile) as cause:
        if (limit := system_limit(cause)) is not None:
            raise error(f"{name} cannot be read. {limit}") from cause
        reason = sentence(shown(str(cause.args[0] if isinstance(cause, KeyError) else cause))) or type(cause).__name__
        raise error(f"{name} cannot be read as a NumPy file ({reason}). {advice}") from cause


@contextlib.contextmanager
def archive_of(file: BinaryIO) -> Iterator[tuple[zipfile.ZipFile, dict[str, zipfile.ZipInfo]]]:
    """Yield the archive in a file, and its arrays by name, after comparing both headers of each. Raises ValueError."""
    import zipfile

    bounded = _Bounded(file.raw)  # type: ignore[attr-defined]
    with zipfile.ZipFile(bounded) as archive:
        bounded.limit = sys.maxsize  # samples can be larger than a directory
        listed = sorted(archive.infolist(), key=lambda one: one.header_offset)
        members = {one.filename.removesuffix(".npy"): one for one in listed if one.filename.endswith(".npy")}
        if len(listed) > MOST_MEMBERS or len({one.filename for one in listed}) < len(listed):
            raise ValueError(f"it has more than {MOST_MEMBERS} arrays, or two of the same name")
        starts = [*(one.header_offset for one in listed), archive.start_dir]
        if starts[0]:
            raise ValueError("it does not start with what its directory lists")
        for member, end in zip(listed, starts[1:], strict=True):
            _compare_headers(archive, member, end)
        yield archive, members


class _Bounded(io.BufferedReader):
    """A file that reads only so much at once; `zipfile` reads a directory as long as the file declares."""

    limit = DIRECTORY_BYTES

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or size < 0:
            size = self.limit  # the end of an archive
        if size > self.limit:
            raise ValueError(f"its directory has more than {self.limit} bytes")
        return super().read(size)


def _compare_headers(archive: zipfile.ZipFile, member: zipfile.ZipInfo, end: int) -> None:
    """Raise ValueError if the local header of a member differs from the directory, or its data does not end at `end`."""
    file = archive.fp
    assert file is not None
    file.seek(member.header_offset)
    head = file.read(30)
    signature, version, flags, method, _, _, crc, packed, size, name, extra = struct.unpack("<4s5H3L2H", head)
    if signature != b"PK\x03\x04":
        raise ValueError(f"{shown(member.filename)} is not where the directory says")
    if (version & 0xFF) > 63 or flags & 0x2061 or method not in (0, 8):  # stored and deflated
        raise ValueError(f"{shown(member.filename)} is encrypted, or stored in a way that NumPy does not use")
    named = file.read(name).decode("utf-8" if flags & 0x800 else "cp437")
    beyond = file.read(extra)
    if 0xFFFFFFFF in (size, packed) and beyond[:4] == b"\x01\0\x10\0" and len(beyond) >= 20:
        size, packed = struct.unpack_from("<2Q", beyond, 4)
    if flags & 0x08 and not (crc or packed or size):  # they follow the data
        crc, packed, size = member.CRC, member.compress_size, member.file_size
    stated = (member.orig_filename, member.flag_bits, member.compress_type)
    if (named, flags, method) != stated or (crc, packed, size) != (member.CRC, member.compress_size, member.file_size):
        raise ValueError(f"{shown(member.filename)} has two headers that differ")
    gap = end - (member.header_offset + 30 + name + extra + packed)
    if not 0 <= gap <= (24 if flags & 0x08 else 0):  # a member that the directory does not list, or that overlaps another
        raise ValueError(f"what follows {shown(member.filename)} is not what the directory says")


def read_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Read the header of an .npy stream: shape, whether in Fortran order, and type. Raises ValueError."""
    magic = stream.read(8)
    if len(magic) < 8 or not magic.startswith(NUMPY_MAGIC) or tuple(magic[6:]) not in ((1, 0), (2, 0), (3, 0)):
        raise ValueError("it does not start like an array of NumPy")
    width = 2 if magic[6] == 1 else 4
    length = int.from_bytes(stream.read(width), "little")
    if length > HEADER_BYTES:
        raise ValueError(f"its header has {length} bytes, and the limit is {HEADER_BYTES}")
    text = stream.read(length).decode("latin-1").strip().replace('"', "'")
    place, found = 1, dict[str, str]()
    while item := _ITEM.match(text, place):
        found[item["key"]] = next(value for value in item.group("descr", "order", "shape") if value is not None)
        place = item.end()
    if found.keys() != {"descr", "fortran_order", "shape"} or text[:1] != "{" or text[place:].strip() != "}":
        raise ValueError("its header does not describe an array of one type")
    if "O" in found["descr"]:
        raise ValueError("it contains Python objects, which are not loaded")
    if not re.fullmatch(r"[<>|=]?[?biufcSU][0-9]{0,9}", found["descr"]):
        raise ValueError(f"its type {shown(found['descr'])} is not one of numbers or text")
    sizes = found["shape"].replace("L", "").split(",")
    shape = tuple(int(size) for size in sizes if size.strip())
    if len(shape) > 32 or any(len(size.strip()) > 18 for size in sizes):
        raise ValueError(f"its shape ({shown(found['shape'])}) is too large")
    import numpy as np

    return shape, found["fortran_order"] == "True", np.dtype(found["descr"])


def _array(stream: IO[bytes], size: int, limit: int) -> Array:
    """Read the array of an .npy stream of `size` bytes."""
    import numpy as np

    shape, fortran, dtype = read_header(stream)
    needed = math.prod(shape) * dtype.itemsize
    if needed > min(left := size - stream.tell(), limit):
        what = f"it has {left}" if needed > left else f"the limit is {limit}"
        raise ValueError(f"its shape {list(shape)} needs {needed} bytes, and {what}")
    array: Array = np.empty(shape[::-1] if fortran else shape, dtype)
    if needed:
        filled, place = array.reshape(-1).view(np.uint8).data, 0
        while place < needed:
            piece = stream.read(min(PIECE, needed - place))
            if not piece:
                raise ValueError(f"it ends after {place} of {needed} bytes")
            filled[place : place + len(piece)] = piece
            place += len(piece)
    return array.T if fortran else array
