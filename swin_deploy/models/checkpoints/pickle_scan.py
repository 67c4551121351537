"""Follows the instructions of a pickle without creating its objects, so that torch only loads what was checked.

torch.load(weights_only=True) runs no code, but a small file can make it allocate any amount of memory or compute for hours:
tensors that claim more than the file holds, texts that are decoded a million times, keys whose hashes collide.
"""

from __future__ import annotations

import contextlib
import pickle
import pickletools
import re
import struct
import sys
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from swin_deploy.errors import CheckpointError, shown

from .base import DAMAGED

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
LISTS = ("collections.deque",)
OTHER_CALLS = re.compile(r"INST|OBJ|EXT\d|PERSID|NEWOBJ_EX|STACK_GLOBAL")  # instructions that torch.save does not use

# Instructions in the pickles of a file. A training state with an optimizer has about 100,000, and one number for each loss of a
# training, which takes half the time of others and counts half.
MOST_STEPS = 500_000
MOST_OTHER_KEYS = 5000  # keys that are neither text nor small whole numbers, and whose hashes can collide
SMALL = range(-1, 1 << 20)
# Bytes of a number in torch's storages. Those of newer types are untyped.
ITEMS = {"Double": 8, "Float": 4, "Half": 2, "BFloat16": 2, "Long": 8, "Int": 4, "Short": 2, "Char": 1, "Byte": 1, "Bool": 1}
ITEMS |= {"ComplexDouble": 16, "ComplexFloat": 8, "Untyped": 1}


class Damaged(Exception):
    """The pickle is not one that torch.save writes; the message is the reason."""


class _Name(str):
    """A class or function, which is never imported."""


class _Object:
    """What a call returns, or a dictionary of `count` entries. `size` is that of a storage: bytes, and bytes of a number."""

    def __init__(self, kind: str, count: int = 0, size: tuple[int, int] = (0, 0)) -> None:
        self.kind, self.count, self.size = kind, count, size


class PickleScan:
    """The classes and functions (`names`, as torch looks them up) and the storages in the pickles of a file."""

    def __init__(self, data: Any, path: Path) -> None:
        self.data, self.path, self.at = data, path, 0
        self.names: set[str] = set()
        self.storages: dict[str, tuple[int, int]] = {}  # key -> bytes, bytes of a number
        self.views: dict[str, tuple[str, int, int]] = {}  # key of a part -> storage, its start and its size in numbers
        self.steps, self.other_keys, self.copied, self.encoded = 0.0, 0, 0, 0

    def next(self) -> Any:
        """Check the next pickle, and return its value: numbers, texts, and lists and tuples of them as they are.

        Raises CheckpointError for what could run code, and Damaged.
        """
        try:
            return self._run()
        except (IndexError, struct.error) as error:
            raise Damaged("pickle exhausted before seeing STOP, or without the values that an instruction needs") from error
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise Damaged("an instruction does not fit the values before it") from error

    def _run(self) -> Any:
        stack: list[Any] = []
        marks: list[list[Any]] = []
        memo: dict[int, Any] = {}
        while True:
            op = self._take(1)
            self.steps += 0.5 if op in b"GJKM" else 1
            if self.steps > MOST_STEPS:
                raise self._too_large(f"more than {MOST_STEPS} instructions")
            match op:
                case b"q":
                    memo[self._take(1)[0]] = stack[-1]
                case b"r":
                    memo[self._number("<I")] = stack[-1]
                case b"h":
                    stack.append(memo[self._take(1)[0]])
                case b"j":
                    stack.append(memo[self._number("<I")])
                case b"X":
                    stack.append(str(self._take(self._number("<I")), "utf-8", "surrogatepass"))
                case b"U":  # SHORT_BINSTRING
                    stack.append(str(self._take(self._take(1)[0]), "utf-8"))
                case b"K":
                    stack.append(self._take(1)[0])
                case b"M":
                    stack.append(self._number("<H"))
                case b"J":
                    stack.append(self._number("<i"))
                case b"\x8a":  # LONG1
                    stack.append(pickle.decode_long(self._take(self._take(1)[0])))
                case b"G":
                    stack.append(self._number(">d"))
                case b"N" | b"\x88" | b"\x89":
                    stack.append({b"N": None, b"\x88": True, b"\x89": False}[op])
                case b"(":
                    marks.append(stack)
                    stack = []
                case b"t":
                    stack, items = marks.pop(), stack
                    stack.append(tuple(items))
                case b")":
                    stack.append(())
                case b"\x85" | b"\x86" | b"\x87":  # TUPLE1, TUPLE2, TUPLE3
                    count = op[0] - 0x84
                    stack[-count:] = [tuple(stack[-count:])] if len(stack) >= count else [stack[-count]]
                case b"]":
                    stack.append([])
                case b"}":
                    stack.append(_Object("dictionary"))
                case b"\x8f":  # EMPTY_SET
                    stack.append(_Object("other"))
                case b"a":
                    item = stack.pop()
                    self._list(stack[-1]).append(item)
                case b"e":
                    stack, items = marks.pop(), stack
                    self._list(stack[-1]).extend(items)
                case b"s":
                    key = stack[-2]
                    del stack[-2:]
                    self._set(stack[-1], [key])
                case b"u":
                    stack, items = marks.pop(), stack
                    if len(items) % 2:
                        raise Damaged("a key without a value")
                    self._set(stack[-1], items[::2])
                case b"c":
                    stack.append(self._named())
                case b"R" | b"\x81":  # REDUCE, NEWOBJ
                    arguments, name = stack.pop(), stack.pop()
                    if type(name) is not _Name or type(arguments) is not tuple:
                        raise Damaged("a call of what is not a class or function")
                    stack.append(self._called(name, arguments))
                case b"b":
                    state = stack.pop()
                    if not isinstance(stack[-1], _Object) or stack[-1].kind not in ("other", "dictionary"):
                        raise Damaged("state for what has none")
                    self._copy(state.count if isinstance(state, _Object) else 1)
                case b"Q":
                    stack.append(self._storage(stack.pop()))
                case b"\x80":
                    if (protocol := self._take(1)[0]) > 2:
                        raise CheckpointError(
                            f"{self.path} was saved with pickle protocol {protocol}, and torch loads only protocol 2 without "
                            f"running code. Save it again with torch.save(model.state_dict(), ...) and its default protocol."
                        )
                case b".":
                    return stack.pop()
                case _:
                    raise self._unsupported(op)

    def _unsupported(self, op: bytes) -> Exception:
        """The error for an instruction that torch does not load. It may be, or come before, one that could run code."""
        found: list[str] = []
        with contextlib.suppress(Exception):  # pickletools documents none of its own
            found.extend(known.name for known, *_ in pickletools.genops(self.data[self.at - 1 : self.at + 4096]))
        calls = [name for name in found if OTHER_CALLS.fullmatch(name)]
        return _refusal(f"the instruction {calls[0]}", self.path) if calls else Damaged(f"Unsupported operand {op[0]}")

    def _too_large(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path} has {what} in its pickle, which would take too long to load. Save the weights alone with "
            f"torch.save(model.state_dict(), ...)."
        )

    def _take(self, count: int) -> bytes:
        taken: bytes = self.data[self.at : self.at + count]
        self.at += count
        if len(taken) < count:
            raise Damaged(f"pickle exhausted before seeing STOP: expected {count} bytes, found {len(taken)}")
        return taken

    def _number(self, kind: str) -> Any:
        return struct.unpack(kind, self._take(struct.calcsize(kind)))[0]

    def _named(self) -> _Name:
        """The next class or function, under the name that torch looks up. Refuses what could run code."""
        lines = []
        for _ in range(2):
            end = self.data.find(b"\n", self.at, self.at + 500)
            if end < 0:
                raise Damaged("a name without an end")
            lines.append(self._take(end - self.at).decode())
            self.at += 1
        module, name = lines
        module, name = NAME_MAPPING.get((module, name)) or (IMPORT_MAPPING.get(module, module), name)
        full, top = f"{module}.{name}", module.split(".")[0]
        known = RESTORED.fullmatch(full) or HARMLESS.fullmatch(full)
        if not known and (top in sys.stdlib_module_names or top == "torch"):
            raise _refusal(shown(full), self.path)
        self.names.add(full)
        return _Name(full)

    def _list(self, value: Any) -> list[Any]:
        if type(value) is not list:
            raise Damaged("Can only append to lists")
        return value

    def _set(self, value: Any, keys: list[Any]) -> None:
        if not isinstance(value, _Object) or value.kind != "dictionary":
            raise Damaged("Can only set items of dictionaries")
        value.count += len(keys)
        self._check_keys(keys)

    def _check_keys(self, keys: Iterable[Any]) -> None:
        """Python's hashes of other keys than text can be made to collide, which makes a dictionary quadratic."""
        for key in keys:
            if type(key) is str or (type(key) is int and key in SMALL):
                continue
            self.other_keys += 1
            if self.other_keys > MOST_OTHER_KEYS:
                raise self._too_large(f"more than {MOST_OTHER_KEYS} keys that are neither text nor small numbers")
            if not _is_flat(key):
                raise Damaged("tuples in tuples in tuples as a key")

    def _copy(self, count: int) -> None:
        """Count what calls copy. torch.save never lets two calls copy the same list."""
        self.copied += count
        if self.copied > MOST_STEPS:
            raise Damaged("its calls copy the same values again and again")

    def _called(self, name: str, arguments: tuple[Any, ...]) -> Any:
        self._copy(len(arguments))
        first = arguments[0] if arguments else None
        if not RESTORED.fullmatch(name):
            if name in LISTS:
                return []
            return _Object("dictionary" if DICTIONARIES.fullmatch(name) else "other")
        leaf = name.rpartition(".")[2]
        if leaf.startswith("_rebuild_tensor"):
            return self._tensor(leaf, arguments)
        if leaf.startswith("_rebuild_parameter") or leaf == "Parameter":
            if not isinstance(first, _Object) or first.kind != "tensor":
                raise Damaged("a parameter without a tensor")
            return first
        match leaf, arguments:
            case "encode", (str(text), "latin1"):
                self.encoded += len(text)
                if self.encoded > len(self.data):
                    raise Damaged("its calls copy the same text again and again")
                return _Object("bytes")
            case "OrderedDict" | "Counter", ():
                return _Object("dictionary")
            case "Counter", (_Object(kind="dictionary") as counted,):
                self._copy(counted.count)
                return _Object("dictionary", counted.count)
            case "set", (list(items),):
                self._copy(len(items))
                self._check_keys(items)
                return _Object("other")
            case "Size", (tuple(sizes),):
                self._copy(len(sizes))
                return _sizes(sizes)
            case ("complex", (int() | float(), int() | float())) | ("device" | "_get_layout", (str(), *_)):
                return _Object("value")
        raise Damaged(f"a call of {shown(name)} with arguments that torch.save does not write")

    def _storage(self, identity: tuple[Any, ...]) -> _Object:
        """A storage. Its identity is ("storage", type, key, device, numbers), and in legacy files None or a view."""
        what, kind, key, device, count, *view = identity
        match = re.fullmatch(r"torch\.(?:storage\.)?(\w+)Storage", kind)
        plain = type(kind) is _Name and type(key) is str and type(device) is str and type(count) is int
        if what != "storage" or not plain or match is None or match[1] not in ITEMS or not 0 <= count < 1 << 48:
            raise Damaged("a storage that torch.save does not write")
        size = count * ITEMS[match[1]], ITEMS[match[1]]
        if self.storages.setdefault(key, size) != size:
            raise Damaged(f"storage {shown(key)} has two sizes")
        if any(view):  # of torch before 0.4
            ((name, offset, part),) = view
            view_of = self.views.setdefault(name, (key, offset, part))
            if view_of != (key, offset, part) or name in self.storages or min(offset, part) < 0 or offset + part > count:
                raise Damaged(f"a part of storage {shown(key)} that it does not have")
            size = part * size[1], size[1]
        return _Object("storage", size=size)

    def _tensor(self, function: str, arguments: tuple[Any, ...]) -> _Object:
        storage, offset, shape, strides, *rest = arguments
        if not isinstance(storage, _Object) or storage.kind != "storage" or type(offset) is not int:
            raise Damaged("a tensor without a storage")
        shape, strides = _sizes(shape), _sizes(strides)
        hooks = rest[1] if len(rest) > 1 else None
        if len(shape) != len(strides) or offset < 0 or not (hooks is None or isinstance(hooks, _Object)):
            raise Damaged("a tensor with other arguments than torch.save writes")
        held, item = storage.size
        if function.endswith("_v3"):
            item = _item_of(rest[2])
        numbers, wanted = held // item, 1
        for size in shape:
            wanted = min(wanted * size, 1 << 60)
        last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        if wanted > numbers or (wanted and last >= numbers):  # a stride of 0 repeats one number without end
            raise CheckpointError(
                f"{self.path}: a tensor claims shape {shown(list(shape))}, and the file holds {numbers} numbers for it. "
                f"{DAMAGED}"
            )
        return _Object("tensor")


def _is_flat(key: Any, levels: int = 2) -> bool:
    """Whether a key has few parts: the hash of a tuple of the same tuples of the same tuples takes for ever."""
    return type(key) is not tuple or (levels > 0 and len(key) < 32 and all(_is_flat(part, levels - 1) for part in key))


def _sizes(values: Any) -> tuple[int, ...]:
    if type(values) is not tuple or len(values) > 64 or any(type(v) is not int or not 0 <= v < 1 << 62 for v in values):
        raise Damaged("sizes that are not whole numbers")
    return values


def _item_of(dtype: Any) -> int:
    """Bytes of a number of the type that `dtype` names, such as torch.float8_e4m3fn."""
    import torch

    found = getattr(torch, str(dtype).removeprefix("torch."), None) if type(dtype) is _Name else None
    if not isinstance(found, torch.dtype):
        raise Damaged("a tensor of an unknown type")
    return found.itemsize


def _refusal(what: str, path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path} asks for {what}, which weights do not need: it could run code, and nothing of it was run. "
        f"Expected tensors, numbers and names. Save the weights alone with torch.save(model.state_dict(), ...), or "
        f"get them as safetensors."
    )
