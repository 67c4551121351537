"""Which other files an ONNX file refers to, found without the onnx package and before a runtime reads it."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Numbers of the fields of onnx.proto that lead to a tensor: message -> field -> message.
_FIELDS: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
}
_DEEPEST = 100  # protobuf's own limit
_KEY = b"location"


def external_data(path: Path) -> Iterator[dict[str, str]]:
    """Yield what each tensor of an ONNX file that is stored in another file says about it: location, offset, length.

    Raises ValueError for a file that is not a message of protobuf.
    """
    with path.open("rb") as file:
        try:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:  # an empty file, which is a valid message
            return
        with content:
            yield from _tensors(content, 0, len(content), "model", 0)


def _tensors(content: Any, start: int, end: int, message: str, depth: int) -> Iterator[dict[str, str]]:
    inner = _FIELDS[message]
    place: dict[str, str] = {}
    for number, low, high in _parts(content, start, end):
        kind = inner.get(number)
        if kind == "entry":
            texts = {field: content[a:b].decode("utf-8") for field, a, b in _parts(content, low, high)}
            if texts.get(1, "") in place:
                raise ValueError(f"a tensor states its {texts.get(1, '')} twice")
            place[texts.get(1, "")] = texts.get(2, "")
        # Searching the bytes of a small part is faster than reading it; a part that is read has no large values before.
        elif kind is not None and (kind != "node" or _KEY in content[low:high]):
            if depth == _DEEPEST:
                raise ValueError(f"it has more than {_DEEPEST} levels")
            yield from _tensors(content, low, high, kind, depth + 1)
    if place:
        yield place


def _parts(content: Any, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yield (number, start, end) of the fields between `start` and `end` that have a length."""
    while start < end:
        tag, start = _varint(content, start, end)
        kind, size = tag & 7, 0
        if not 8 <= tag < 1 << 32:  # some parsers drop the upper bits
            raise ValueError(f"it has a field with the tag {tag}")
        if kind == 0:
            _, start = _varint(content, start, end)
        elif kind == 2:
            size, start = _varint(content, start, end)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"it has a field of type {kind}")
        if start + size > end:
            raise ValueError("it ends early")
        if kind == 2:
            yield tag >> 3, start, start + size
        start += size


def _varint(content: Any, start: int, end: int) -> tuple[int, int]:
    value = 0
    for place in range(start, min(end, start + 10)):
        byte = content[place]
        value |= (byte & 0x7F) << 7 * (place - start)
        if byte < 0x80:
            return value, place + 1
    raise ValueError("it ends early")
