"""Reads what torch.save pickled, without unpickling it: no class or function is ever looked up, so none can be called.

A pickle is a program for a small stack machine, and `pickle` runs it. Here the machine only takes notes: a tensor becomes
a TensorRef, a harmless object becomes a Made, and a name that no checkpoint needs ends the reading. Two more reasons not
to use torch.load(weights_only=True): it refuses the CfgNode of Microsoft's training checkpoints (a dict subclass), and
the C unpickler lets a few bytes of a hostile file (LONG_BINPUT) ask for gigabytes.
"""

from __future__ import annotations

import pickletools
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import IO, Any, NamedTuple, Protocol, cast

from swin_deploy.errors import CheckpointError

# Python 2 names, which pickle protocol 2 (torch.save's) still writes.
RENAMED_MODULES = {"__builtin__": "builtins", "copy_reg": "copyreg"}

REBUILD_TENSOR = ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor")
REBUILD_PARAMETER = ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state")

# What the training scripts of Microsoft, timm, torchvision and transformers leave beside the weights. All stay inert.
HARMLESS = re.compile(
    r"""yacs\.config\.CfgNode | argparse\.Namespace | _codecs\.encode
    | collections\.(OrderedDict|defaultdict|Counter|deque)
    | builtins\.(set|frozenset|list|dict|tuple|bytearray|complex|slice|int|float|bool|str|bytes)
    | numpy\.(dtype|ndarray) | numpy\.(core|_core)\.multiarray\.(scalar|_reconstruct)
    | pathlib\.(Pure)?(Posix|Windows)?Path | datetime\.(date|datetime|timedelta)
    | torch\.(Size|device|Tensor) | torch\.nn\.parameter\.Parameter | torch\.serialization\._get_layout
    | torch\.(float|bfloat|complex|int|uint)\d+ | torch\.(bool|half|double|long) | torch\.\w+Storage
    | torch\._utils\._rebuild_(tensor(_v2)?|parameter(_with_state)?)""",
    re.VERBOSE,
)

PUSH_ARGUMENT = re.compile(
    r"INT|BININT[12]?|LONG[14]?|FLOAT|BINFLOAT|STRING|(SHORT_)?BINSTRING|UNICODE|(SHORT_)?BINUNICODE|BINUNICODE8"
    r"|(SHORT_)?BINBYTES|BINBYTES8|BYTEARRAY8"
)
PUSH_NEW: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": lambda: Made("builtins.set"),
}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class StorageRef(NamedTuple):
    """A block of numbers of one type, kept outside the pickle under `key`; `start` is where a view of it begins."""

    kind: str
    key: str
    start: int = 0


class TensorRef(NamedTuple):
    """Where a tensor's numbers are: its storage, and offset, shape and strides in elements."""

    storage: StorageRef
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class Global(NamedTuple):
    """The name of a class or function; only ever a name."""

    name: str


@dataclass
class Made:
    """An object that the pickle describes and nobody made: the class's name, its arguments, its entries and its state."""

    name: str
    args: tuple[Any, ...] = ()
    items: dict[Any, Any] = field(default_factory=dict)
    state: Any = None


class Readable(Protocol):
    """As much of a file as reading a pickle takes."""

    def read(self, count: int, /) -> bytes: ...

    def readline(self) -> bytes: ...

    def tell(self) -> int: ...


def read(file: Readable, where: str) -> Any:
    """What the next pickle in `file` describes, made of plain values, TensorRef and Made.

    Raises CheckpointError when it names something that no checkpoint needs, or when it is damaged.
    """
    machine = _Machine(where)
    try:
        for op, argument, _ in pickletools.genops(cast("IO[bytes]", file)):
            machine.step(op.name, argument)
    except (ValueError, IndexError, KeyError, TypeError, EOFError, struct.error, OverflowError, MemoryError) as error:
        raise CheckpointError(
            f"{where} cannot be read as what torch.save writes ({type(error).__name__}: {error}). It is truncated or "
            f"damaged; fetch it again."
        ) from error
    return machine.result


class _Machine:
    def __init__(self, where: str) -> None:
        self.where = where
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.result: Any = None

    def step(self, op: str, argument: Any) -> None:
        stack = self.stack
        if PUSH_ARGUMENT.fullmatch(op):
            stack.append(argument)
        elif op in PUSH_NEW:
            stack.append(PUSH_NEW[op]())
        elif op in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self.memo[len(self.memo) if op == "MEMOIZE" else int(argument)] = stack[-1]
        elif op in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self.memo[int(argument)])
        elif op == "MARK":
            self.marks.append(stack)
            self.stack = []
        elif op in TUPLES:
            count = TUPLES[op]
            stack[-count:] = [tuple(stack[-count:])]
        elif op in ("TUPLE", "LIST", "DICT", "FROZENSET"):
            self.gather(op)
        elif op in ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS"):
            self.fill(op)
        elif op == "GLOBAL":
            stack.append(self.named(*argument.split(" ", 1)))
        elif op == "STACK_GLOBAL":
            name, module = stack.pop(), stack.pop()
            stack.append(self.named(str(module), str(name)))
        elif op in ("REDUCE", "NEWOBJ"):
            arguments, target = stack.pop(), stack.pop()
            stack.append(self.made(target, arguments))
        elif op == "BUILD":
            state = stack.pop()
            if isinstance(stack[-1], Made):
                stack[-1].state = state
        elif op == "BINPERSID":
            stack.append(self.storage(stack.pop()))
        elif op == "POP":
            stack.pop()
        elif op == "DUP":
            stack.append(stack[-1])
        elif op == "STOP":
            self.result = stack.pop()
        elif op not in ("PROTO", "FRAME"):
            raise self.refusal(f"the instruction {op}")

    def gather(self, op: str) -> None:
        items, self.stack = self.stack, self.marks.pop()
        if op == "DICT":
            self.stack.append({})
            _store(self.stack[-1], items)
        else:
            self.stack.append(tuple(items) if op == "TUPLE" else items if op == "LIST" else Made("builtins.frozenset"))

    def fill(self, op: str) -> None:
        """Puts items into the list, dict or Made below them; those of a set are dropped, as nobody needs them."""
        if op in ("APPEND", "SETITEM"):
            count = 1 if op == "APPEND" else 2
            items, self.stack[-count:] = self.stack[-count:], []
        else:
            items, self.stack = self.stack, self.marks.pop()
        target = self.stack[-1]
        if op in ("APPEND", "APPENDS"):
            if isinstance(target, list):
                target.extend(items)
            elif not isinstance(target, Made):
                raise ValueError(f"items appended to a {type(target).__name__}")
        elif op != "ADDITEMS":
            if not isinstance(target, dict | Made):
                raise ValueError(f"entries set in a {type(target).__name__}")
            _store(target if isinstance(target, dict) else target.items, items)

    def named(self, module: str, name: str) -> Global:
        full = f"{RENAMED_MODULES.get(module, module)}.{name}"
        if not HARMLESS.fullmatch(full):
            raise self.refusal(full)
        return Global(full)

    def made(self, target: Any, arguments: Any) -> Any:
        """What calling `target` would make, as a plain value or a Made; nothing is called."""
        if not isinstance(target, Global) or not isinstance(arguments, tuple):
            raise ValueError(f"a call of a {type(target).__name__}")
        if target.name in REBUILD_TENSOR:
            storage, offset, shape, stride = arguments[:4]
            if not isinstance(storage, StorageRef):
                raise ValueError("a tensor without a storage")
            return TensorRef(storage, _count(offset), _counts(shape), _counts(stride))
        if target.name in REBUILD_PARAMETER:
            return arguments[0]
        if target.name == "torch.Size":
            return arguments[0]
        if target.name == "collections.OrderedDict":
            pairs = arguments[0] if arguments else []
            entries: dict[Any, Any] = {}
            _store(entries, [value for pair in pairs for value in pair])
            return entries
        return Made(target.name, arguments)

    def storage(self, identity: Any) -> StorageRef:
        """("storage", type, key, device, count) and, from torch before 1.6, a view of it (key, start, count)."""
        tag, kind, key, _, _, *view = identity
        if tag != "storage" or not isinstance(kind, Global) or not isinstance(key, str):
            raise ValueError("a storage without type or key")
        start = _count(view[0][1]) if view and view[0] is not None else 0
        return StorageRef(kind.name, key, start)

    def refusal(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self.where} asks for {what}, which weights do not need: it could run code, and nothing of it was run. "
            f"Expected tensors, numbers and names. Save the weights alone with torch.save(model.state_dict(), ...), or "
            f"get them as safetensors."
        )


def _store(target: dict[Any, Any], items: list[Any]) -> None:
    """Entries under other keys than names and numbers are dropped: hashing a nested tuple can be made to take forever."""
    for key, value in zip(items[::2], items[1::2], strict=True):
        if isinstance(key, str | int | float | bytes):
            target[key] = value


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{str(value)[:40]!r} in place of a size")
    return value


def _counts(value: Any) -> tuple[int, ...]:
    if not isinstance(value, tuple | list):
        raise ValueError(f"a {type(value).__name__} in place of a shape")
    return tuple(_count(v) for v in value)
