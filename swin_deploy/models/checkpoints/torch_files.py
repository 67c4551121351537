"""Files that torch.save wrote, zip or older, as tensors that stay in the file until they are read."""

from __future__ import annotations

import math
import mmap
import re
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swin_deploy.errors import CheckpointError
from swin_deploy.models.checkpoints import inert_pickle
from swin_deploy.models.checkpoints.inert_pickle import StorageRef, TensorRef
from swin_deploy.models.checkpoints.stored import Stored, StoredFile

# torch/serialization.py, _legacy_save: three pickles stand before the one with the tensors' names.
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C

DTYPES = {
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.DoubleStorage": torch.float64,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}

# Under which key training scripts keep the weights: Microsoft and transformers' trainers "model", timm "state_dict".
WRAPPERS = ("model", "state_dict", "model_state_dict", "module", "net")

Places = dict[str, tuple[int, int]]  # storage key -> (first byte in the file, bytes there)


def open_torch(path: Path) -> StoredFile:
    """The tensors of a file that torch.save wrote. Nothing in it is run; numbers are read when they are asked for.

    Raises CheckpointError when the file is damaged, asks for code, or claims more numbers than it holds.
    """
    with path.open("rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # private: torch takes only buffers it may write to
    top, places = _zip(path, data) if data[:4] == b"PK\x03\x04" else _legacy(path, data)
    weights, extras = _weights(top, path)
    tensors = {name: _stored(name, ref, places, data, path) for name, ref in weights.items()}
    return StoredFile(path, tensors, extras=extras)


def _zip(path: Path, data: mmap.mmap) -> tuple[Any, Places]:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = {info.filename: info for info in archive.infolist()}
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}). It is truncated or damaged; fetch it again.") from error
    pickles = [name for name in entries if re.fullmatch(r"[^/]+/data\.pkl", name)]
    if len(pickles) != 1:
        raise CheckpointError(f"{path} is a zip archive, and not one that torch.save wrote: it has no data.pkl.")
    folder = pickles[0].removesuffix("data.pkl")
    if f"{folder}constants.pkl" in entries:
        raise CheckpointError(
            f"{path} is a TorchScript program. Expected weights: save them with torch.save(model.state_dict(), ...)."
        )

    def place(info: zipfile.ZipInfo) -> tuple[int, int]:
        names, extra = struct.unpack("<HH", data[info.header_offset + 26 : info.header_offset + 30])
        start = info.header_offset + 30 + names + extra
        if info.compress_type != zipfile.ZIP_STORED or start + info.file_size > len(data):
            raise CheckpointError(f"{path}: {info.filename} is compressed or cut off. Expected what torch.save writes.")
        return start, info.file_size

    prefix, order = f"{folder}data/", f"{folder}byteorder"
    try:
        if order in entries:
            start, size = place(entries[order])
            _refuse_big_endian(data[start : start + size] == b"big", path)
        places = {name.removeprefix(prefix): place(info) for name, info in entries.items() if name.startswith(prefix)}
        start, size = place(entries[pickles[0]])
    except struct.error as error:
        raise CheckpointError(f"{path} cannot be read ({error}). It is truncated or damaged; fetch it again.") from error
    data.seek(start)
    return inert_pickle.read(_Window(data, start + size), str(path)), places


class _Window:
    """The part of a mapped file before `end`, for a reader of pickles; reads stop there, whatever length they ask for."""

    def __init__(self, data: mmap.mmap, end: int) -> None:
        self.data, self.end = data, end

    def read(self, count: int) -> bytes:
        return self.data.read(max(0, min(count, self.end - self.data.tell())))

    def readline(self) -> bytes:
        stop = self.data.find(b"\n", self.data.tell(), self.end)
        return self.read((stop + 1 if stop >= 0 else self.end) - self.data.tell())

    def tell(self) -> int:
        return self.data.tell()


def _legacy(path: Path, data: mmap.mmap) -> tuple[Any, Places]:
    """The format before torch 1.6: pickles, then for each storage its count (8 bytes) and its numbers."""
    file, where = _Window(data, len(data)), str(path)
    magic = inert_pickle.read(file, where)
    if magic != LEGACY_MAGIC:
        raise CheckpointError(f"{path} is a pickle, and not one that torch.save wrote. Expected weights of Swin.")
    _, system, top, keys = (inert_pickle.read(file, where) for _ in range(4))
    _refuse_big_endian(isinstance(system, dict) and system.get("little_endian") is False, path)
    widths = {key: DTYPES[kind].itemsize for key, kind in _storage_kinds(top).items() if kind in DTYPES}
    places: Places = {}
    for key in keys if isinstance(keys, list) else []:
        at = data.tell()
        if at + 8 > len(data) or key not in widths:
            raise CheckpointError(f"{path} ends before its tensors do, or lists one that it never names. Fetch it again.")
        size = struct.unpack("<q", data.read(8))[0] * widths[key]
        if size < 0 or at + 8 + size > len(data):
            raise CheckpointError(f"{path} claims {size} bytes for one tensor and does not hold them. Fetch it again.")
        places[key] = (at + 8, size)
        data.seek(at + 8 + size)
    return top, places


def _storage_kinds(top: Any) -> dict[str, str]:
    """Storage key -> its type, of every tensor anywhere below `top`; each container is looked at once."""
    kinds: dict[str, str] = {}
    waiting, seen = [top], set()
    while waiting:
        value = waiting.pop()
        if isinstance(value, TensorRef):
            kinds[value.storage.key] = value.storage.kind
            continue
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, inert_pickle.Made):
            waiting += [value.args, value.items, value.state]
        elif isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, list | tuple):
            waiting += value
    return kinds


def _weights(top: Any, path: Path) -> tuple[dict[str, TensorRef], Mapping[str, Any]]:
    """The tensors by name, from the state dict itself or from where a training script put it, and what lies beside it."""
    if isinstance(top, dict):
        for wrapper in (*WRAPPERS, None):  # None: `top` is the state dict itself
            inside = top if wrapper is None else top.get(wrapper)
            if isinstance(inside, dict):
                found = {name: v for name, v in inside.items() if isinstance(name, str) and isinstance(v, TensorRef)}
                if found:
                    return found, {} if wrapper is None else {str(k): v for k, v in top.items() if k != wrapper}
    raise CheckpointError(
        f"{path} holds no tensors by name. Expected a state dict, or a checkpoint with one under "
        f"{', '.join(WRAPPERS)}: save it with torch.save(model.state_dict(), ...)."
    )


def _stored(name: str, ref: TensorRef, places: Places, data: mmap.mmap, path: Path) -> Stored:
    storage: StorageRef = ref.storage
    dtype = DTYPES.get(storage.kind)
    if dtype is None:
        raise CheckpointError(f"{path}: {name} is kept in a {storage.kind}. Expected floating-point tensors.")
    last = sum((size - 1) * step for size, step in zip(ref.shape, ref.stride, strict=False))
    needed = 0 if 0 in ref.shape else storage.start + ref.offset + last + 1
    start, held = places.get(storage.key, (0, 0))
    # A stride of 0 would repeat one number without end; torch.save writes contiguous tensors and transposed ones.
    repeats = any(step == 0 and size > 1 for size, step in zip(ref.shape, ref.stride, strict=False))
    if len(ref.shape) != len(ref.stride) or repeats or max(ref.shape, default=0) >> 40 or needed * dtype.itemsize > held:
        raise CheckpointError(
            f"{path}: {name} claims shape {list(ref.shape)}, and the file holds {held // dtype.itemsize} numbers for it. It "
            f"is truncated or damaged; fetch it again."
        )
    first = start + (storage.start + ref.offset) * dtype.itemsize

    def read() -> Tensor:
        if not math.prod(ref.shape):
            return torch.empty(ref.shape, dtype=dtype)
        flat = torch.frombuffer(data, dtype=torch.uint8, count=(last + 1) * dtype.itemsize, offset=first)
        if first % dtype.itemsize:  # the older format does not align its tensors
            flat = flat.clone()
        return flat.view(dtype).as_strided(ref.shape, ref.stride)

    return Stored(ref.shape, str(dtype).removeprefix("torch."), read)


def _refuse_big_endian(big: bool, path: Path) -> None:
    if big:
        raise CheckpointError(f"{path} was written on a big-endian machine. Expected little-endian numbers; save it anew.")
