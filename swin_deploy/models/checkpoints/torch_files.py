"""Files that torch.save wrote, zip or legacy. torch loads them; classes it does not know become inert placeholders."""

from __future__ import annotations

import io
import mmap
import pickletools
import re
import sys
import threading
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.serialization import add_safe_globals, clear_safe_globals, get_safe_globals

from swin_deploy.errors import CheckpointError

from .base import Stored, StoredFile

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # before torch 1.6: four pickles and the storages follow it
OTHER_CALLS = re.compile(r"INST|OBJ|EXT\d|PERSID|NEWOBJ_EX|STACK_GLOBAL")  # instructions that torch.save does not use

# Arguments of a training script. They can hold the model as it was before the training.
ARGUMENTS = ("hyper_parameters", "hparams", "datamodule_hyper_parameters", "args", "config", "cfg")
DEEPEST = 8  # dictionaries in dictionaries

# Names that torch itself restores. It accepts more, but some of them can allocate any amount of memory, such as bytearray.
RESTORED = re.compile(
    r"""collections\.(OrderedDict|Counter) | builtins\.(set|complex) | _codecs\.encode
    | torch\.(Size|device|bool|(b?float|complex|u?int)\d+\w*) | torch\.(storage\.)?(?!Q)\w+Storage
    | torch\.nn\.parameter\.Parameter | torch\.serialization\._get_layout
    | torch\._utils\._rebuild_(tensor(_v[23])?|parameter(_with_state)?)""",
    re.VERBOSE,
)
# Names of the standard library and of torch that become placeholders, as those of all other packages do.
HARMLESS = re.compile(
    r"""(argparse|collections|datetime|decimal|enum|fractions|pathlib|typing|uuid)\..+ | types\.SimpleNamespace
    | functools\.partial | copyreg\._reconstructor | re\._compile
    | builtins\.(object|type|frozenset|list|dict|tuple|slice|range|int|float|bool|str|bytes)
    | torch\.(nn|optim|amp|cuda\.amp|utils\.data|torch_version|_C\._nn)\..+""",
    re.VERBOSE,
)
DICTIONARIES = re.compile(r"(.+\.)?(\w*([Dd]ict|CfgNode)|Munch|Box)")  # usual names of dict subclasses
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
    with path.open("rb") as file:
        zipped = file.read(4) == b"PK\x03\x04"
        try:
            sizes, names = _scan_zip(file, path) if zipped else _scan_legacy(file, path)
            top = _load(path, {name: _placeholder(name) for name in names if not RESTORED.fullmatch(name)}, zipped)
            found = dict(_tensors(top, set()))
        except CheckpointError:
            raise
        except Exception as error:  # torch documents none of its exceptions for damaged files
            reason = str(error).split("WeightsUnpickler error:")[-1].strip().partition("\n")[0].partition(". ")[0]
            raise CheckpointError(
                f"{path} cannot be read as what torch.save writes ({type(error).__name__}: {reason}). It is truncated or "
                f"damaged; fetch it again."
            ) from error
    if not found:
        raise CheckpointError(
            f"{path} holds no tensors by name. Expected a state dict, or a dictionary that contains one: save it with "
            f"torch.save(model.state_dict(), ...)."
        )
    tensors = {name: _stored(name, tensor, sizes if mapped else None, path) for name, (tensor, mapped) in found.items()}
    beside = top.items() if isinstance(top, dict) else ()
    extras = {str(key): value for key, value in beside if not isinstance(value, Tensor) and not _is_state_dict(value)}
    return StoredFile(path, tensors, extras=_plain(extras, {}))


def _scan_zip(file: IO[bytes], path: Path) -> tuple[set[int], set[str]]:
    """The sizes of the records in a zip file, and the names in its pickle."""
    with zipfile.ZipFile(file) as archive:
        entries = {info.filename.lower(): info for info in archive.infolist()}  # torch ignores case, too
        pickles = [name for name in entries if re.fullmatch(r"[^/]+/data\.pkl", name)]
        if len(pickles) != 1 or len(entries) != len(archive.infolist()):
            raise CheckpointError(f"{path} is a zip archive, and not one that torch.save wrote.")
        if pickles[0].replace("data.pkl", "constants.pkl") in entries:
            raise CheckpointError(
                f"{path} is a TorchScript program, and only its weights are needed. Save them: "
                f"torch.save(torch.jit.load({path.name!r}).state_dict(), 'weights.pth')"
            )
        for info in entries.values():
            if info.compress_type != zipfile.ZIP_STORED or info.header_offset + info.file_size > path.stat().st_size:
                raise CheckpointError(f"{path}: {info.filename} is compressed or cut off. Expected what torch.save writes.")
        info = entries[pickles[0]]
        info.CRC = None  # type: ignore[assignment]  # torch.save can omit it, and torch.load ignores it
        return {info.file_size for info in entries.values()}, _names(io.BytesIO(archive.read(info)), path)


def _scan_legacy(file: IO[bytes], path: Path) -> tuple[None, set[str]]:
    """None, because torch itself checks the sizes of storages in legacy files; and the names in its pickles."""
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        names = _names(cast("IO[bytes]", data), path)
        if LEGACY_MAGIC.to_bytes(10, "little") not in data[:32]:
            raise CheckpointError(
                f"{path} is a pickle, and not one that torch.save wrote. Load it and save the weights: "
                f"torch.save(weights, 'weights.pth')"
            )
        return None, names.union(*(_names(cast("IO[bytes]", data), path) for _ in range(4)))


def _names(file: IO[bytes], path: Path) -> set[str]:
    """The classes and functions in the next pickle, under the names that torch looks up. Refuses what could run code."""
    names = set()
    for op, argument, _ in pickletools.genops(file):
        if op.name == "PROTO" and cast(int, argument) > 2:
            raise CheckpointError(
                f"{path} was saved with pickle protocol {argument}, and torch loads only protocol 2 without running code. Save "
                f"it again with torch.save(model.state_dict(), ...) and its default protocol."
            )
        if op.name == "GLOBAL":
            module, name = str(argument).split(" ", 1)
            module, name = NAME_MAPPING.get((module, name)) or (IMPORT_MAPPING.get(module, module), name)
            names.add(f"{module}.{name}")
        elif OTHER_CALLS.fullmatch(op.name):
            raise _refusal(f"the instruction {op.name}", path)
    for name in names:
        top = name.split(".")[0]
        known = RESTORED.fullmatch(name) or HARMLESS.fullmatch(name)
        if not known and (top in sys.stdlib_module_names or top == "torch"):
            raise _refusal(name, path)
    return names


def _placeholder(name: str) -> type:
    if name == "collections.deque":
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


def _tensors(value: Any, seen: set[int], name: str = "", depth: int = 0) -> Iterator[tuple[str, tuple[Tensor, bool]]]:
    """Every tensor and numpy array by its path in nested dictionaries and modules, and whether it is a record of the file."""
    if isinstance(value, Tensor):
        yield name, (value.detach(), True)
        return
    if isinstance(value, Placeholder) and value.name.endswith(".multiarray._reconstruct"):
        yield name, (_array(value), False)
        return
    entries = _entries(value)
    if isinstance(entries, Placeholder):  # an object of a trainer, such as an average of weights
        entries = entries.state
    if isinstance(entries, list | tuple):
        entries = {str(place): part for place, part in enumerate(entries) if isinstance(part, dict)}
    if isinstance(entries, dict) and depth < 3 * DEEPEST and id(value) not in seen:
        seen.add(id(value))
        for key, inside in entries.items():
            if isinstance(key, str) and not (depth == 0 and key in ARGUMENTS):
                yield from _tensors(inside, seen, f"{name}.{key}" if name else key, depth + 1)


def _entries(value: Any) -> Any:
    """A dictionary itself, and the parameters, buffers and modules of a whole module."""
    state = value.state if isinstance(value, Placeholder) else None
    if not isinstance(state, dict) or not isinstance(state.get("_modules"), dict):
        return value
    parts = [state.get(part) for part in ("_parameters", "_buffers", "_modules")]
    return {key: inside for part in parts if isinstance(part, dict) for key, inside in part.items()}


def _is_state_dict(value: Any) -> bool:
    entries = _entries(value)
    parts = entries.values() if isinstance(entries, dict) else ()
    return any(isinstance(part, Tensor) or part is not _entries(part) for part in parts)


def _array(value: Placeholder) -> Tensor:
    """The tensor of a numpy array, from the parts that numpy pickles."""
    _, shape, kind, column_major, data = value.state
    code = f"{kind.state[1]}{kind.args[0]}"
    if not re.fullmatch(r"[<>|=][fiub][1248]", code):
        raise ValueError(f"numpy array of type {code}")
    array = np.frombuffer(data, np.dtype(code)).reshape(shape, order="F" if column_major else "C")
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))


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


def _stored(name: str, tensor: Tensor, sizes: set[int] | None, path: Path) -> Stored:
    held = tensor.untyped_storage().nbytes()
    numbers = held // tensor.itemsize if tensor.numel() else 1 << 20  # an empty tensor can have a huge axis
    # A stride of 0 repeats one number without end. A storage larger than its record contains other records.
    if max(tensor.numel(), *tensor.shape, 0) > numbers or (held and sizes is not None and held not in sizes):
        raise CheckpointError(
            f"{path}: {name} claims shape {list(tensor.shape)}, and the file holds {held // tensor.itemsize} numbers for it. "
            f"It is truncated or damaged; fetch it again."
        )
    return Stored(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), lambda: tensor)


def _refusal(what: str, path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path} asks for {what}, which weights do not need: it could run code, and nothing of it was run. "
        f"Expected tensors, numbers and names. Save the weights alone with torch.save(model.state_dict(), ...), or "
        f"get them as safetensors."
    )
