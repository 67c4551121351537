"""Check that an ONNX file has the structure of a graph that swin-deploy writes, before a native parser reads it.

The parsers of ONNX Runtime and OpenVINO are C++ and do not survive every file. This check is written in Python, needs neither
onnx nor protobuf, and accepts only what is listed here: fields, operators, attributes, types and shapes.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from swin_deploy.errors import BundleError, shown

from .graph_shapes import RANK, Refused, Value, inferred
from .options import OPSETS

if TYPE_CHECKING:
    from swin_deploy.bundle import TensorSpec

IR_VERSIONS = range(8, 14)
MOST = 2_000_000  # fields of the file, which take about three seconds
LARGEST_AXIS = 1 << 31
BATCHES = (1, 2)  # for which the shapes are inferred

# numpy type name and bytes of an element, by the number that ONNX has for the type
TYPES = {
    **{1: ("float32", 4), 2: ("uint8", 1), 3: ("int8", 1), 6: ("int32", 4), 7: ("int64", 8), 9: ("bool", 1)},
    **{10: ("float16", 2), 16: ("bfloat16", 2), 17: ("float8_e4m3fn", 1)},
}

INT, FLOAT, TEXT, DATA = "int", "float", "text", "data"
# Fields that swin-deploy writes: number, name and type; a type with * may occur several times.
_FIELDS = {
    "ModelProto": (
        *((1, "ir_version", INT), (2, "producer_name", TEXT), (3, "producer_version", TEXT), (5, "model_version", INT)),
        *((6, "doc_string", TEXT), (7, "graph", "GraphProto"), (8, "opset_import", "OperatorSetIdProto*")),
        (14, "metadata_props", "StringStringEntryProto*"),
    ),
    "OperatorSetIdProto": ((1, "domain", TEXT), (2, "version", INT)),
    "GraphProto": (
        *((1, "node", "NodeProto*"), (2, "name", TEXT), (5, "initializer", "TensorProto*"), (10, "doc_string", TEXT)),
        *((11, "input", "ValueInfoProto*"), (12, "output", "ValueInfoProto*"), (13, "value_info", "ValueInfoProto*")),
    ),
    "NodeProto": (
        *((1, "input", "text*"), (2, "output", "text*"), (3, "name", TEXT), (4, "op_type", TEXT)),
        *((5, "attribute", "AttributeProto*"), (6, "doc_string", TEXT), (7, "domain", TEXT)),
    ),
    "AttributeProto": (
        *((1, "name", TEXT), (2, "f", FLOAT), (3, "i", INT), (4, "s", TEXT), (8, "ints", "int*")),
        (20, "type", INT),
    ),
    "TensorProto": (
        *((1, "dims", "int*"), (2, "data_type", INT), (8, "name", TEXT), (9, "raw_data", DATA)),
        *((13, "external_data", "StringStringEntryProto*"), (14, "data_location", INT)),
    ),
    "StringStringEntryProto": ((1, "key", TEXT), (2, "value", TEXT)),
    "ValueInfoProto": ((1, "name", TEXT), (2, "type", "TypeProto")),
    "TypeProto": ((1, "tensor_type", "Tensor"),),
    "Tensor": ((1, "elem_type", INT), (2, "shape", "TensorShapeProto")),
    "TensorShapeProto": ((1, "dim", "Dimension*"),),
    "Dimension": ((1, "dim_value", INT), (2, "dim_param", TEXT)),
}
_WIRE = {INT: 0, FLOAT: 5}  # all others are preceded by their length
# message -> key of a field -> name, type, whether it repeats
_MESSAGES = {
    message: {number << 3 | _WIRE.get(kind[:-1] if kind[-1] == "*" else kind, 2): (name, kind.rstrip("*"), kind[-1] == "*")
              for number, name, kind in fields}
    for message, fields in _FIELDS.items()
}  # fmt: skip


@dataclass(frozen=True)
class ExternalData:
    """The file that the graph's external data is in: its name as the graph gives it, and its path."""

    name: str
    path: Path


def check_structure(
    path: Path, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], weights: ExternalData | None = None
) -> None:
    """Check the structure of the ONNX file at `path`.

    Args:
        path: The file.
        inputs: The inputs that the manifest states for the graph.
        outputs: The outputs that the manifest states.
        weights: The file of its external data, if the manifest lists one.

    Raises:
        BundleError: The file is not a graph as swin-deploy writes it.
    """
    try:
        with _mapped(path) as data:
            model = _parsed(data, 0, len(data), "ModelProto", [MOST])
            _check_model(model, inputs, outputs, weights)
    except (Refused, IndexError, ValueError, OverflowError, KeyError, struct.error) as error:
        why = str(error) if isinstance(error, Refused) else "it is not an ONNX file, or damaged"
        raise BundleError(
            f"{path} is not a graph as swin-deploy writes it: {shown(why)}. Export the checkpoint again, or get the bundle "
            f"again from its author."
        ) from error


class _mapped:
    """A file in memory that is paged in where it is read; nothing keeps it open after the block."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> memoryview:
        with self._path.open("rb") as file:
            try:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except ValueError:  # an empty file
                return memoryview(b"")
        return memoryview(self._map)

    def __exit__(self, *error: object) -> None:
        """The last array that refers to the memory frees it."""


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
        if shift > 63:
            raise Refused("it has a number of more than 64 bits")


def _parsed(data: memoryview, at: int, end: int, message: str, left: list[int]) -> dict[str, Any]:
    """Return the fields of a message; every field must be one of _FIELDS. `left` counts how many more the file may have."""
    fields = _MESSAGES[message]
    found: dict[str, Any] = {}
    while at < end:
        key = data[at]
        at += 1
        if key > 127:
            key, at = _varint(data, at - 1)
        if key not in fields:
            raise Refused(f"a {message} has field {key >> 3} of wire type {key & 7}, which swin-deploy does not write")
        name, kind, repeats = fields[key]
        left[0] -= 1
        if left[0] < 0:
            raise Refused(f"it has more than {MOST} fields")
        value: Any
        if kind == INT:
            value, at = _varint(data, at)
            value -= (value >> 63) << 64
        elif kind == FLOAT:
            (value,), at = struct.unpack_from("<f", data, at), at + 4
        else:
            size, at = _varint(data, at)
            start, at = at, at + size
            if at > end:
                raise Refused(f"the {name} of a {message} goes beyond its end")
            if kind == TEXT:
                value = str(data[start:at], "utf-8")
            elif kind == DATA:
                value = data[start:at]
            else:
                value = _parsed(data, start, at, kind, left)
        if repeats:
            found.setdefault(name, []).append(value)
        elif name in found:
            raise Refused(f"a {message} has two {name}")
        else:
            found[name] = value
    if at != end:
        raise Refused(f"a {message} goes beyond its end")
    return found


def _check_model(
    model: Mapping[str, Any], inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], weights: ExternalData | None
) -> None:
    if model.get("ir_version") not in IR_VERSIONS:
        raise Refused(f"it has IR version {model.get('ir_version')}; expected {IR_VERSIONS[0]} to {IR_VERSIONS[-1]}")
    opsets = [(one.get("domain", ""), one.get("version")) for one in model.get("opset_import", ())]
    if len(opsets) != 1 or opsets[0][0] or opsets[0][1] not in OPSETS:
        named = ", ".join(f"{domain or 'ai.onnx'} {version}" for domain, version in opsets)
        raise Refused(f"it uses the operator sets {named or 'none'}; expected ai.onnx {OPSETS[0]} to {OPSETS[-1]}")
    graph = model.get("graph", {})
    if not graph.get("node"):
        raise Refused("it has no nodes")
    constants: dict[str, Value] = {}
    external = _ExternalBytes(weights)
    for tensor in graph.get("initializer", ()):
        name, value = _constant(tensor, external)
        if name in constants:
            raise Refused(f"it has two tensors {name}")
        constants[name] = value
    for side, declared, wanted in (("inputs", "input", inputs), ("outputs", "output", outputs)):
        found = [_declared(value) for value in graph.get(declared, ())]
        if found != [(spec.name, spec.dtype, tuple(spec.shape)) for spec in wanted]:
            named = ", ".join(f"{name}: {kind} {list(shape or ())}" for name, kind, shape in found)
            raise Refused(f"its {side} are {named or 'none'}; the manifest has {', '.join(map(str, wanted))}")
    nodes = graph["node"]
    names = [node.get("name", "") for node in nodes]
    if len(set(names)) != len(names):
        raise Refused("two of its nodes have the same name")
    known = [(one["name"], *_declared(one)[1:]) for one in graph.get("value_info", ())]
    for batch in BATCHES:
        values = dict(constants)
        for spec in inputs:
            if spec.name in values:
                raise Refused(f"its input {spec.name} is also a tensor")
            values[spec.name] = Value(spec.dtype, tuple(batch if isinstance(axis, str) else axis for axis in spec.shape))
        inferred(nodes, values)
        _check_declared(known + [(spec.name, spec.dtype, tuple(spec.shape)) for spec in outputs], values)


def _check_declared(known: Sequence[tuple[str, str, tuple[int | str, ...] | None]], values: Mapping[str, Value]) -> None:
    """Compare the declared types and shapes with those that were inferred."""
    for name, kind, shape in known:
        if name not in values:
            raise Refused(f"nothing computes its value {name}")
        found = values[name]
        if kind != found.dtype or (
            shape is not None
            and (
                len(shape) != len(found.shape)
                or any(isinstance(axis, int) and axis != size for axis, size in zip(shape, found.shape, strict=True))
            )
        ):
            raise Refused(f"its value {name} is declared as {kind} {list(shape or ())} and is {found}")


def _declared(value: Mapping[str, Any]) -> tuple[str, str, tuple[int | str, ...] | None]:
    """Return name, type and shape of a declared value; None where it declares no shape."""
    tensor = value.get("type", {}).get("tensor_type", {})
    if tensor.get("elem_type") not in TYPES:
        raise Refused(f"its value {value.get('name')} has the type {tensor.get('elem_type')}")
    shape = None
    if "shape" in tensor:
        axes = tensor["shape"].get("dim", ())
        if len(axes) > RANK:
            raise Refused(f"its value {value.get('name')} has {len(axes)} axes")
        shape = tuple(_axis(axis) for axis in axes)
    return value.get("name", ""), TYPES[tensor["elem_type"]][0], shape


def _axis(axis: Mapping[str, Any]) -> int | str:
    if len(axis) > 1 or not 0 < axis.get("dim_value", 1) < LARGEST_AXIS:
        raise Refused(f"a shape has the axis {dict(axis)}")
    return axis.get("dim_value") or axis.get("dim_param") or "?"


class _ExternalBytes:
    """The content of the file with the weights, opened when it is needed."""

    def __init__(self, weights: ExternalData | None) -> None:
        self._weights = weights
        self._content: memoryview | None = None

    def part(self, tensor: Mapping[str, Any]) -> memoryview:
        """Return the bytes that a tensor refers to."""
        keys = [(entry.get("key"), entry.get("value", "")) for entry in tensor["external_data"]]
        place = dict(keys)
        if [key for key, _ in keys] != ["location", "offset", "length"]:
            raise Refused(f"the tensor {tensor.get('name')} does not state location, offset and length of its data")
        if self._weights is None or place["location"] != self._weights.name:
            raise Refused(f"its data is in {place['location']}, which the manifest does not list for it")
        if not all(place[key].isdecimal() and place[key].isascii() and len(place[key]) < 16 for key in ("offset", "length")):
            raise Refused(f"the tensor {tensor.get('name')} has an invalid offset or length")
        if self._content is None:
            self._content = _mapped(self._weights.path).__enter__()
        start, size = int(place["offset"]), int(place["length"])
        if start + size > len(self._content):
            raise Refused(f"the tensor {tensor.get('name')} goes beyond the end of {self._weights.name}")
        return self._content[start : start + size]


def _constant(tensor: Mapping[str, Any], external: _ExternalBytes) -> tuple[str, Value]:
    name, dims, kind = tensor.get("name", ""), tuple(tensor.get("dims", ())), tensor.get("data_type")
    if not name:
        raise Refused("a tensor has no name")
    if kind not in TYPES:
        raise Refused(f"the tensor {name} has the type {kind}")
    if len(dims) > RANK or not all(0 <= size < LARGEST_AXIS for size in dims):
        raise Refused(f"the tensor {name} has the shape {list(dims)}")
    location = tensor.get("data_location", 0)
    if location not in (0, 1) or (location == 1) != ("external_data" in tensor) or (location == 1) == ("raw_data" in tensor):
        raise Refused(f"the tensor {name} has no data, or two")
    content = external.part(tensor) if location else tensor["raw_data"]
    dtype, width = TYPES[kind]
    if len(content) != math.prod(dims) * width:
        raise Refused(f"the tensor {name} of {dtype} {list(dims)} has {len(content)} bytes")
    data = np.frombuffer(content, dtype).reshape(dims) if dtype in ("int64", "int32") else None
    return name, Value(dtype, dims, data)
