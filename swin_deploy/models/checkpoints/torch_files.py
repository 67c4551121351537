"""Files that torch.save wrote, zip or legacy. torch loads them; classes it does not know become inert placeholders."""

from __future__ import annotations

import contextlib
import mmap
import os
import re
import struct
import tarfile
import threading
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor
from torch.serialization import add_safe_globals, clear_safe_globals, get_safe_globals

from swin_deploy.errors import CheckpointError, shown
from swin_deploy.files import open_regular
from swin_deploy.options import Array

from .base import LONGEST_NAME, Stored, StoredFile, unreadable
from .pickle_scan import DICTIONARIES, LISTS, RESTORED, Damaged, PickleScan

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # before torch 1.6: four pickles and the storages follow it

# Arguments of a training script. They can hold the model as it was before the training.
ARGUMENTS = ("hyper_parameters", "hparams", "datamodule_hyper_parameters", "args", "config", "cfg")
DEEPEST = 8  # dictionaries in dictionaries
_LOCK = threading.Lock()  # torch has one table of accepted classes per process


class Placeholder:
    """An object of a class that is never imported: it holds the arguments and the state, and does nothing."""

    name = ""  # of the class or function, with its module
    args: tuple[Any, ...] = ()
    state: Any = None

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Dictionary:  # torch fills only dict, OrderedDict and Counter
    def __new__(cls, *_: Any) -> Any:
        return OrderedDict()


class _List:
    def __new__(cls, *_: Any) -> Any:
        return []


def open_torch(path: Path) -> StoredFile:
    """Open a file that torch.save wrote, without running any code in it.

    Zip files are mapped, so a tensor takes memory only when it is read. Legacy files are read into memory.
    """
    with open_regular(path, CheckpointError) as file:
        zipped = file.read(4) == b"PK\x03\x04"
        try:
            names = _scan_zip(file, path) if zipped else _scan_legacy(file, path)
            top = _load(path, {name: _placeholder(name) for name in names if not RESTORED.fullmatch(name)}, zipped)
            found = dict(_tensors(top, set()))
        except CheckpointError:
            raise
        except Exception as error:  # torch documents none of its exceptions for damaged files
            reason = str(error).split("WeightsUnpickler error:")[-1].strip().partition("\n")[0].partition(". ")[0]
            kind = "" if isinstance(error, Damaged) else f"{type(error).__name__}: "
            raise unreadable(str(path), error, " as what torch.save writes", f"{kind}{shown(reason)}") from error
    if not found:
        raise CheckpointError(
            f"{path} holds no tensors by name. Expected a state dict, or a dictionary that contains one: save it with "
            f"torch.save(model.state_dict(), ...)."
        )
    extras = {}
    if isinstance(top, dict):
        weights = {id(value) for value in {id(value): value for value in top.values()}.values() if _is_state_dict(value)}
        extras = {key: value for key, value in top.items() if isinstance(key, str) and id(value) not in weights}
    return StoredFile(path, {name: _stored(tensor) for name, tensor in found.items()}, extras=_plain(extras, {}))


def _scan_zip(file: BinaryIO, path: Path) -> set[str]:
    """Check the structure and the checksums of a zip file, and return the names in its pickle."""
    size = os.fstat(file.fileno()).st_size
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
        entries = {info.filename.lower(): info for info in records}  # torch ignores case, too
        pickles = [name for name in entries if re.fullmatch(r"[^/]+/data\.pkl", name)]
        if len(pickles) != 1 or len(entries) != len(records):
            raise CheckpointError(f"{path} is a zip archive, and not one that torch.save wrote.")
        if pickles[0].replace("data.pkl", "constants.pkl") in entries:
            raise CheckpointError(
                f"{path} is a TorchScript program, and only its weights are needed. Save them: "
                f"torch.save(torch.jit.load({path.name!r}).state_dict(), 'weights.pth')"
            )
        for info in records:
            if info.compress_type != zipfile.ZIP_STORED or info.header_offset + info.file_size > size:
                raise CheckpointError(
                    f"{path}: {shown(info.filename)} is compressed or cut off. Expected what torch.save writes."
                )
    starts = _check_records(file, size, records)
    info = entries[pickles[0]]
    file.seek(starts[info.orig_filename])
    scan = PickleScan(file.read(info.file_size), path)
    scan.next()
    _check_sums(path, records, starts)
    folder = pickles[0].removesuffix("data.pkl")
    for key, (held, _) in scan.storages.items():
        record = entries.get(f"{folder}data/{key}".lower())
        if record is None or record.file_size != held:
            raise Damaged(
                f"storage {shown(key)} has {held} bytes, and its record {record.file_size if record else 'is missing'}"
            )
    return scan.names


def _check_records(file: BinaryIO, size: int, records: list[zipfile.ZipInfo]) -> dict[str, int]:
    """Compare the directory of a zip file with the headers of its records, and return where each record starts.

    torch reads the headers, and zipfile the directory: where they differ, the wrong numbers would be loaded.
    """
    file.seek(max(size - 98, 0))
    tail = file.read().rjust(98, b"\0")
    mark, *_, count, length, at, comment = struct.unpack("<4s4H2LH", tail[-22:])
    end = size - 22
    if tail[-42:-38] == b"PK\x06\x07":  # zip64
        end = size - 98
        where = struct.unpack("<4xLQL", tail[-42:-22])[1]
        *_, count, length, at = struct.unpack("<4sQ2H2L4Q", tail[:56])
        mark = mark if where == end and tail.startswith(b"PK\x06\x06") else b""
    if mark != b"PK\x05\x06" or comment or count != len(records) or at + length != end:
        raise Damaged("its zip directory does not end the file")
    starts, before = {}, 0
    for info in sorted(records, key=lambda info: info.header_offset):
        file.seek(info.header_offset)
        sign, _, flags, method, _, _, *sums, named, extra = struct.unpack("<4s5H3L2H", file.read(30))
        name = file.read(named).decode("utf-8" if flags & 0x800 else "cp437", "replace")
        known = [info.CRC, info.file_size, info.file_size]
        same = (sign, flags, method, name) == (b"PK\x03\x04", info.flag_bits, 0, info.orig_filename) and name == info.filename
        same &= not flags & 1 and not info.external_attr & 0x10  # torch loads nothing of an entry that is marked as a folder
        same &= sums == known or (sums[0] == info.CRC and 0xFFFFFFFF in sums[1:]) or (flags & 8 > 0 and not any(sums))
        start = info.header_offset + 30 + named + extra
        if not same or info.compress_size != info.file_size or info.header_offset < before or start + info.file_size > at:
            raise Damaged(f"the header of its record {shown(info.filename)} does not fit its directory")
        starts[info.orig_filename], before = start, start + info.file_size
    return starts


def _check_sums(path: Path, records: list[zipfile.ZipInfo], starts: Mapping[str, int]) -> None:
    """Compare the checksums of all records. torch.load does not, and torch.save can leave out all of them."""
    if not any(info.CRC for info in records):
        return

    def is_damaged(info: zipfile.ZipInfo) -> bool:
        left, found = info.file_size, 0
        with path.open("rb", buffering=0) as file:
            file.seek(starts[info.orig_filename])
            while left and (piece := file.read(min(left, 1 << 20))):
                left, found = left - len(piece), zlib.crc32(piece, found)
        return found != info.CRC or left > 0

    with ThreadPoolExecutor(min(os.cpu_count() or 1, 4)) as threads:
        damaged = [info.filename for info, wrong in zip(records, threads.map(is_damaged, records), strict=True) if wrong]
    if damaged:
        raise CheckpointError(
            f"{path} is damaged: {len(damaged)} of its {len(records)} records do not have their checksum "
            f"({shown(', '.join(damaged[:3]))}). Fetch it again."
        )


def _scan_legacy(file: BinaryIO, path: Path) -> set[str]:
    """Check the pickles of a legacy file, and that all storages which they name follow. Return the names in the pickles."""
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        scan = PickleScan(data, path)
        if LEGACY_MAGIC.to_bytes(10, "little") not in data[:32]:
            try:
                scan.next()
            except Damaged:
                if scan.at >= len(data):
                    raise
            raise CheckpointError(
                f"{path} is a pickle, and not one that torch.save wrote. Load it and save the weights: "
                f"torch.save(weights, 'weights.pth')"
            )
        with contextlib.suppress(tarfile.HeaderError):  # torch would read a file that begins like a tar archive as one
            tarfile.TarInfo.frombuf(data[:512], "utf-8", "surrogateescape")
            raise Damaged("it begins like a tar archive")
        _, _, _, _, keys = (scan.next() for _ in range(5))
        if not isinstance(keys, list) or sorted(keys) != sorted(scan.storages):
            raise Damaged("the list of its storages does not name those of its tensors")
        for key in keys:
            held, item = scan.storages[key]
            if data[scan.at : scan.at + 8] != (held // item).to_bytes(8, "little"):
                raise Damaged(f"storage {shown(key)} is cut off, or of another size than its tensors")
            scan.at += 8 + held
        if scan.at != len(data):
            raise Damaged(f"it has {len(data)} bytes, and its tensors end at {scan.at}")
        return scan.names


def _placeholder(name: str) -> type:
    if name in LISTS:
        return _List
    return _Dictionary if DICTIONARIES.fullmatch(name) else type("Placeholder", (Placeholder,), {"name": name})


def _load(path: Path, placeholders: Mapping[str, type], zipped: bool) -> Any:
    """Load the file with `placeholders` as the only classes that torch accepts beside its own."""
    with _LOCK:
        before = get_safe_globals()
        clear_safe_globals()
        try:
            add_safe_globals([(made, name) for name, made in placeholders.items()])
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
        finally:
            clear_safe_globals()
            add_safe_globals(before)


def _tensors(value: Any, seen: set[int], name: str = "", depth: int = 0) -> Iterator[tuple[str, Tensor | Array]]:
    """Every tensor and numpy array by its path in nested dictionaries and modules."""
    if len(name) > LONGEST_NAME:
        raise Damaged(f"the name of a tensor has more than {LONGEST_NAME} characters")
    if isinstance(value, Tensor):
        yield name, value.detach()
        return
    if isinstance(value, Placeholder) and value.name.endswith(".multiarray._reconstruct"):
        yield name, _array(value)
        return
    if id(value) in seen or depth >= 3 * DEEPEST or not isinstance(value, dict | list | tuple | Placeholder):
        return
    seen.add(id(value))
    entries = _entries(value)
    if isinstance(entries, Placeholder):  # an object of a trainer, such as an average of weights
        entries = entries.state
    if isinstance(entries, list | tuple):
        entries = {str(place): part for place, part in enumerate(entries) if isinstance(part, dict)}
    if isinstance(entries, dict):
        for key, inside in entries.items():
            if isinstance(key, str) and not (depth == 0 and key in ARGUMENTS):
                yield from _tensors(inside, seen, f"{name}.{key}" if name else key, depth + 1)


def _is_module(value: Any) -> bool:
    state = value.state if isinstance(value, Placeholder) else None
    return isinstance(state, dict) and isinstance(state.get("_modules"), dict)


def _entries(value: Any) -> Any:
    """A dictionary itself, and the parameters, buffers and modules of a whole module."""
    if not _is_module(value):
        return value
    parts = [value.state.get(part) for part in ("_parameters", "_buffers", "_modules")]
    return {key: inside for part in parts if isinstance(part, dict) for key, inside in part.items()}


def _is_state_dict(value: Any) -> bool:
    entries = _entries(value)
    parts = entries.values() if isinstance(entries, dict) else ()
    return any(isinstance(part, Tensor) or _is_module(part) for part in parts)


def _array(value: Placeholder) -> Array:
    """A numpy array, from the parts that numpy pickles. It shares the memory of its bytes."""
    _, shape, kind, column_major, data = value.state
    code = f"{kind.state[1]}{kind.args[0]}"
    if not re.fullmatch(r"[<>|=][fiub][1248]", code):
        raise ValueError(f"numpy array of type {code}")
    array: Array = np.frombuffer(data, np.dtype(code)).reshape(shape, order="F" if column_major else "C")
    return array


def _plain(value: Any, known: dict[int, Any], depth: int = 0) -> Any:
    """`value` without tensors. Objects become dictionaries of their fields (Namespace, OmegaConf), or lists of arguments."""
    if not isinstance(value, Placeholder | dict | list | tuple) or depth > 2 * DEEPEST:
        return None if isinstance(value, Tensor | Placeholder | dict | list | tuple) else value
    if id(value) not in known:
        known[id(value)] = None  # of an object in itself
        inside = value
        if isinstance(value, Placeholder):
            inside = value.state if isinstance(value.state, dict) else value.args
            if isinstance(inside, dict):
                inside = next((inside[name] for name in ("_content", "_val") if name in inside), inside)  # OmegaConf
        if isinstance(inside, dict):
            known[id(value)] = {key: _plain(part, known, depth + 1) for key, part in inside.items()}
        elif isinstance(inside, list | tuple):
            known[id(value)] = [_plain(part, known, depth + 1) for part in inside]
        else:
            known[id(value)] = _plain(inside, known, depth + 1)
    return known[id(value)]


def _stored(found: Tensor | Array) -> Stored:
    if isinstance(found, Tensor):
        aligned = found.data_ptr() % found.itemsize == 0  # torch.save aligns its records, other programs do not
        return Stored(tuple(found.shape), str(found.dtype).removeprefix("torch."), lambda: found if aligned else found.clone())
    native = found.dtype.newbyteorder("=")
    return Stored(tuple(found.shape), native.name, lambda: torch.from_numpy(found.astype(native)))
