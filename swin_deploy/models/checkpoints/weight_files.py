"""Finds and opens weight files: safetensors, torch.save and HDF5, single or sharded, in a local folder or from the hub."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from swin_deploy.dependencies import require
from swin_deploy.errors import CheckpointError, shown
from swin_deploy.files import json_file, json_from, open_regular

from .base import DAMAGED, LONGEST_NAME, Stored, StoredFile, unreadable
from .torch_files import open_torch

# In the order in which transformers looks for them.
STANDARD = ("model.safetensors", "pytorch_model.bin", "tf_model.h5")
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".h5", ".ckpt", ".tar")  # timm writes model_best.pth.tar, which is no tar

_NUMBERS = {"F": "float", "BF": "bfloat", "I": "int", "U": "uint"}
SAFETENSORS_DTYPES = {f"{short}{bits}": f"{name}{bits}" for short, name in _NUMBERS.items() for bits in (8, 16, 32, 64)}
SAFETENSORS_DTYPES["BOOL"] = "bool"

MOST_TENSORS = 20_000
MAPPED = 16 << 20  # bytes of a tensor in a safetensors file from which it is mapped, and not read
LARGEST_HEADER = 1 << 22  # bytes of the names, types and shapes in a safetensors file
DEEPEST_GROUP = 32  # groups in groups of an HDF5 file
FILTERS = (2, 3)  # of HDF5: shuffle and checksums, which do not compress
READ_ERRORS = (OSError, RuntimeError, KeyError, ValueError, TypeError, AttributeError, OverflowError, MemoryError)
AGAIN = "Fetch it again."

# The files of a repository. Those of OTHER_FORMATS are downloaded only if it has no safetensors.
CONFIGS = ["config.json", "preprocessor_config.json", "processor_config.json"]
SAFETENSORS = ["*.safetensors", "model.safetensors.index.json"]
OTHER_FORMATS = ["pytorch_model*.bin", "pytorch_model.bin.index.json", "tf_model*.h5", "tf_model.h5.index.json"]
INSTEAD = "Pass a local checkpoint with --weights FOLDER, or try the pipeline with --random-weights."


def folder_from_hub(repo_id: str) -> Path:
    """Return the folder with the files of a Hugging Face repository, downloaded unless the local cache has them."""
    hub = require("huggingface_hub", f"fetch {repo_id} from the Hugging Face hub")
    try:
        cached = Path(hub.snapshot_download(repo_id, allow_patterns=CONFIGS, local_files_only=True))
        if (cached / "config.json").exists() and _has_weights(cached):
            return cached
    except (OSError, ValueError):
        pass  # not in the cache
    try:
        folder = Path(hub.snapshot_download(repo_id, allow_patterns=CONFIGS + SAFETENSORS))
        if not _has_weights(folder):
            folder = Path(hub.snapshot_download(repo_id, allow_patterns=CONFIGS + OTHER_FORMATS))
    except Exception as error:
        reason = (str(error).strip().splitlines() or ["no message"])[0]
        raise CheckpointError(
            f"{repo_id} is not in the local Hugging Face cache and could not be fetched ({type(error).__name__}: {reason}). "
            f"{INSTEAD}"
        ) from error
    if not ((folder / "config.json").exists() and _has_weights(folder)):  # offline, an incomplete cache is no error
        raise CheckpointError(f"{repo_id} has no config.json with weights in the cache or on the hub. {INSTEAD}")
    return folder


def _has_weights(folder: Path) -> bool:
    return any(next(folder.glob(pattern), None) is not None for pattern in (*SAFETENSORS, *OTHER_FORMATS))


def open_weights(path: Path) -> StoredFile:
    """Open a weight file, a shard index, or the weights in a folder."""
    if not path.is_dir():
        return _open_shards(path) if path.name.endswith(".index.json") else _open_file(path)
    if (path / "adapter_config.json").is_file():
        base = read_json(path / "adapter_config.json").get("base_model_name_or_path")
        raise CheckpointError(
            f"{path} is a PEFT adapter of {base}, and not a whole model. Merge them and save the result: "
            f"PeftModel.from_pretrained(model, {path.name!r}).merge_and_unload().save_pretrained(FOLDER)"
        )
    for name in STANDARD:
        for candidate in (path / name, path / f"{name}.index.json"):
            if candidate.is_file():
                return open_weights(candidate)
    files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES and file.is_file())
    files = [file for file in files if "optim_states" not in file.name]  # of DeepSpeed
    if len(files) > 1:
        files = [file for file in files if file.stem == "model"] or files
    if len(files) == 1:
        return _open_file(files[0])
    if files:
        raise CheckpointError(
            f"{path} holds {len(files)} weight files ({', '.join(file.name for file in files[:4])}"
            f"{', ...' if len(files) > 4 else ''}), and none is named {', '.join(STANDARD)}. Pass the path of the file."
        )
    raise CheckpointError(
        f"{path} holds no weights. Expected {', '.join(STANDARD)}, their .index.json with shards, or one file that ends in "
        f"{', '.join(SUFFIXES)}."
    )


def read_json(path: Path) -> Mapping[str, Any]:
    """Read a JSON object. Raises CheckpointError if the file holds anything else."""
    value = json_file(path, CheckpointError, AGAIN)
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} does not hold a JSON object. {AGAIN}")
    return value


def _open_shards(index: Path) -> StoredFile:
    shards = read_json(index).get("weight_map")
    names = set(shards.values()) if isinstance(shards, dict) and all(isinstance(n, str) for n in shards.values()) else set()
    if not names or not all(name not in ("", "..") and Path(name).name == name and "\\" not in name for name in names):
        raise CheckpointError(f"{index} does not list the shards' file names. {AGAIN}")
    tensors: dict[str, Stored] = {}
    files = []
    for name in sorted(names):
        if not os.path.lexists(index.parent / name):
            raise CheckpointError(f"{index.parent} lacks {shown(name)}, which {index.name} lists. Fetch the checkpoint again.")
        file = _open_file(index.parent / name)
        if twice := tensors.keys() & file.tensors.keys():
            raise CheckpointError(f"{index.parent} holds {min(twice)} in two shards. Expected each tensor once.")
        tensors |= file.tensors
        files.append(file)
    if len({file.tensorflow for file in files}) > 1:
        raise CheckpointError(f"{index.parent}: some shards were written by TensorFlow and others were not.")
    return StoredFile(index.parent, tensors, files[0].tensorflow, shards=tuple(file.path for file in files))


def _open_file(path: Path) -> StoredFile:
    """Open a weight file of any format, and check names and shapes: messages contain names, and patterns search them."""
    file = _open_format(path)
    for name, stored in file.tensors.items():
        if not math.prod(stored.shape) and max(stored.shape) > 1 << 20:  # nothing limits the other axes of an empty tensor
            raise CheckpointError(f"{path}: {shown(name)} claims shape {shown(list(stored.shape))}, and is empty. {DAMAGED}")
    _check_names(path, file.tensors)
    return file


def _check_names(path: Path, names: Collection[str]) -> None:
    bad = next((name for name in names if len(name) > LONGEST_NAME or not name.isprintable()), None)
    if bad is not None or len(names) > MOST_TENSORS:
        raise CheckpointError(
            f"{path} holds {f'{len(names)} tensors' if bad is None else f'a tensor called {shown(bad)}'}. Expected at most "
            f"{MOST_TENSORS} tensors, with names of up to {LONGEST_NAME} printable characters."
        )


def _open_format(path: Path) -> StoredFile:
    with open_regular(path, CheckpointError, "Expected a checkpoint: a folder or a file.") as file:
        try:
            head = file.read(512)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read ({error}).") from error
    if not head:
        raise CheckpointError(f"{path} is empty. Fetch it again.")
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path} is a Git LFS pointer and not the weights. Run: git lfs pull")
    if head.lstrip().startswith(b"<"):
        raise CheckpointError(f"{path} is a web page and not the weights. Fetch it again, by its download link.")
    if head.startswith(b"\x89HDF\r\n\x1a\n"):
        return _open_hdf5(path)
    if head[257:262] == b"ustar":
        raise CheckpointError(f"{path} is a tar archive. Unpack it, or save the weights again with torch 1.0 or later.")
    if head[4:9] == b"\0\0\0\0{":  # the length of the header may begin as a pickle does
        return _open_safetensors(path)
    if head.startswith(b"PK\x03\x04") or re.match(rb"\x80[\x02-\x05]", head):
        return open_torch(path)
    if head[8:9] == b"{" or path.suffix == ".safetensors":
        return _open_safetensors(path)
    raise CheckpointError(f"{path} is not a checkpoint. Expected safetensors, a file of torch.save, or HDF5.")


def _open_safetensors(path: Path) -> StoredFile:
    safetensors = require("safetensors", "read checkpoints")
    with path.open("rb") as file:
        count = int.from_bytes(file.read(8), "little")
        if count > LARGEST_HEADER:
            raise CheckpointError(
                f"{path} cannot be read as safetensors (its header has {count} bytes, and at most {LARGEST_HEADER} are "
                f"expected). {DAMAGED}"
            )
        header = json_from(
            file.read(count), f"The header of {path}", CheckpointError, DAMAGED
        )  # without names that occur twice
    _check_names(path, header if isinstance(header, dict) else ())
    try:
        reader = safetensors.safe_open(str(path), framework="pt")
        found = {name: reader.get_slice(name) for name in reader.keys()}  # noqa: SIM118 (not iterable)
        kinds = {name: (tuple(part.get_shape()), str(part.get_dtype())) for name, part in found.items()}
        metadata = reader.metadata() or {}
    except (safetensors.SafetensorError, *READ_ERRORS) as error:
        raise unreadable(str(path), error, " as safetensors") from error

    def tensor(name: str) -> Tensor:
        # A new mapping for each tensor is freed with it. One mapping would keep all pages that were ever read. Each mapping
        # keeps the file open once more, so only large tensors are mapped.
        shape, dtype = kinds[name]
        start, end = header[name]["data_offsets"]
        try:
            if dtype not in SAFETENSORS_DTYPES:
                found: Tensor = safetensors.safe_open(str(path), framework="pt").get_tensor(name)
                return found
            kind = getattr(torch, SAFETENSORS_DTYPES[dtype])
            if start == end:
                return torch.empty(shape, dtype=kind)
            where, size = 8 + count + start, end - start
            if size < MAPPED:
                stored = np.fromfile(path, np.uint8, size, offset=where)
            else:
                stored = np.memmap(path, np.uint8, "c", where, size)
            found = torch.from_numpy(stored).view(kind).reshape(shape)
        except (safetensors.SafetensorError, *READ_ERRORS) as error:
            raise unreadable(f"{path}: {name}", error) from error
        return found if found.data_ptr() % found.itemsize == 0 else found.clone()

    def entry(name: str) -> Stored:
        shape, dtype = kinds[name]
        return Stored(shape, SAFETENSORS_DTYPES.get(dtype, dtype), lambda: tensor(name))

    return StoredFile(path, {name: entry(name) for name in kinds}, tensorflow=metadata.get("format") == "tf")


def _open_hdf5(path: Path) -> StoredFile:
    h5py = require("h5py", f"read {path.name}")
    try:
        datasets = dict(_datasets(h5py, h5py.File(path, "r")))
        tensors = {name: _dataset(name, dataset, path) for name, dataset in datasets.items()}
        claimed = sum(dataset.size * dataset.dtype.itemsize for dataset in datasets.values())
    except READ_ERRORS as error:
        raise unreadable(str(path), error, " as HDF5") from error
    if claimed > path.stat().st_size:
        raise CheckpointError(f"{path} claims {claimed} bytes of tensors, and has {path.stat().st_size}. {DAMAGED}")
    return StoredFile(path, tensors, tensorflow=True)


def _datasets(h5py: Any, file: Any) -> Iterator[tuple[str, Any]]:
    """Every dataset and its path, once. No link that leads out of the file is followed."""
    groups, seen = [("", file)], set()
    for prefix, group in groups:
        for key in group:
            if not isinstance(group.get(key, getlink=True), h5py.HardLink):
                continue
            name, entry = f"{prefix}{key}", group[key]
            at = h5py.h5o.get_info(entry.id).addr
            if at in seen:
                continue
            seen.add(at)
            if len(seen) > MOST_TENSORS or name.count("/") > DEEPEST_GROUP:
                raise ValueError(f"it has more than {MOST_TENSORS} entries, or more than {DEEPEST_GROUP} groups in each other")
            if isinstance(entry, h5py.Group):
                groups.append((f"{name}/", entry))
            elif isinstance(entry, h5py.Dataset):
                yield name, entry


def _dataset(name: str, dataset: Any, path: Path) -> Stored:
    # HDF5 can refer to other files, declare data that it does not contain, and compress a million zeros into one byte.
    if dataset.external or dataset.is_virtual:
        raise CheckpointError(f"{path}: {shown(name)} is stored in another file. Expected all weights in this one.")
    filters = dataset.id.get_create_plist()
    if any(filters.get_filter(place)[0] not in FILTERS for place in range(filters.get_nfilters())):
        raise CheckpointError(f"{path}: {shown(name)} is compressed. Decompress the file: h5repack -f NONE {path.name} FILE.h5")
    held, chunk = dataset.id.get_storage_size(), math.prod(dataset.chunks or ()) * dataset.dtype.itemsize
    if held < dataset.size * dataset.dtype.itemsize or chunk > path.stat().st_size:
        raise CheckpointError(
            f"{path}: {shown(name)} claims shape {list(dataset.shape)}, and the file holds {held} bytes for it. {DAMAGED}"
        )

    def read() -> Tensor:
        try:
            if dataset.dtype.kind not in "fiub":
                raise ValueError(f"its type is {dataset.dtype}")
            return torch.from_numpy(dataset[...].astype(dataset.dtype.newbyteorder("=")))
        except READ_ERRORS as error:
            raise unreadable(f"{path}: {shown(name)}", error) from error

    return Stored(tuple(dataset.shape), str(dataset.dtype.newbyteorder("=")), read)
