"""NumPy files (.npy and .npz) from elsewhere, read within limits and without pickle.

`numpy.load` checks no local header of an archive, allocates whatever a header declares, evaluates headers as Python code, and
advises to allow pickles.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import re
import struct
import sys
import zipfile
import zlib
from collections.abc import Iterator
from typing import IO, Any, BinaryIO

import numpy as np

from .errors import InputError, SwinDeployError, sentence, shown
from .files import open_regular
from .options import Array

MAGIC = b"\x93NUMPY"
MOST_MEMBERS = 10_000
DIRECTORY_BYTES = 1 << 22  # of an archive
HEADER_BYTES = 10_000  # of an array, as in NumPy
PIECE = 1 << 20
ADVICE = "Write it again with np.save or np.savez."

_VALUE = r"""'(?P<descr>[^'"\\]{1,40})'|(?P<order>True|False)|\((?P<shape>[0-9L,\s]*)\)"""
_ITEM = re.compile(rf"\s*'(?P<key>descr|fortran_order|shape)'\s*:\s*(?:{_VALUE})\s*(?:,|(?=\}}))")
_DAMAGE = (
    *(ValueError, TypeError, KeyError, IndexError, OverflowError, MemoryError, EOFError, OSError, RuntimeError),
    *(NotImplementedError, struct.error, zlib.error, zipfile.BadZipFile),
)


def read_arrays(
    path: str | os.PathLike[str],
    limit: int,
    error: type[SwinDeployError] = InputError,
    advice: str = ADVICE,
    name: str = "",
) -> dict[str, Array]:
    """Return the arrays of an .npz file by name, or that of an .npy file under the name "".

    Args:
        path: A regular file.
        limit: Most bytes of all arrays together, as they are in memory.
        error: Class of the error for a file that is damaged or exceeds a limit.
        advice: What to do about it, as a sentence.
        name: How the error names the file; its path by default.
    """
    name = name or str(path)
    with open_regular(path, error, advice, name) as file, numpy_errors(name, error, advice):
        if file.peek(len(MAGIC)).startswith(MAGIC):  # type: ignore[attr-defined]
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
def numpy_errors(name: str, error: type[SwinDeployError] = InputError, advice: str = ADVICE) -> Iterator[None]:
    """Turn whatever a damaged file raises inside the block into `error`."""
    try:
        yield
    except SwinDeployError:
        raise
    except _DAMAGE as cause:
        reason = sentence(shown(str(cause.args[0] if isinstance(cause, KeyError) else cause))) or type(cause).__name__
        raise error(f"{name} cannot be read as a NumPy file ({reason}). {advice}") from cause


@contextlib.contextmanager
def archive_of(file: BinaryIO) -> Iterator[tuple[zipfile.ZipFile, dict[str, zipfile.ZipInfo]]]:
    """Yield the archive in a file, and its arrays by name, after comparing both headers of each. Raises ValueError."""
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
    if (version & 0xFF) > 63 or flags & 0x2061 or method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
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
    if len(magic) < 8 or not magic.startswith(MAGIC) or tuple(magic[6:]) not in ((1, 0), (2, 0), (3, 0)):
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
    return shape, found["fortran_order"] == "True", np.dtype(found["descr"])


def _array(stream: IO[bytes], size: int, limit: int) -> Array:
    """Read the array of an .npy stream of `size` bytes."""
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
