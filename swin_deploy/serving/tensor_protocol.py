"""Tensors of the Open Inference Protocol (KServe v2) over HTTP, as JSON or as binary data after the JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from swin_deploy.bundle import TensorSpec
from swin_deploy.errors import InputError
from swin_deploy.files import json_from
from swin_deploy.options import Array

HEADER = "Inference-Header-Content-Length"
BINARY = "binary_tensor_data"  # the extension's name in the metadata of a server
DATATYPES = {
    "bool": "BOOL", "uint8": "UINT8", "int8": "INT8", "int32": "INT32", "int64": "INT64",
    "float16": "FP16", "float32": "FP32", "float64": "FP64",
}  # fmt: skip
DTYPES = {datatype: name for name, datatype in DATATYPES.items()}
MOST_AXES = 16
_ADVICE = "Send a request of the Open Inference Protocol."


@dataclass(frozen=True)
class InferenceRequest:
    """The arrays of a request by name, its id, and the outputs that it names: None for all, else whether each is binary."""

    feeds: Mapping[str, Array]
    id: str | None
    outputs: Mapping[str, bool] | None
    binary: bool  # whether outputs that are not named are binary


def tensor_metadata(spec: TensorSpec) -> dict[str, Any]:
    """Return the description of an input or output; free axes are -1."""
    shape = [size if isinstance(size, int) else -1 for size in spec.shape]
    return {"name": spec.name, "datatype": DATATYPES[spec.dtype], "shape": shape}


def read_request(body: bytes, header: str | None) -> InferenceRequest:
    """Read the body of a request; `header` is the length of its JSON, if binary data follows. Raises InputError."""
    length = len(body)
    if header is not None:
        if not header.isascii() or not header.isdigit() or len(header) > 12 or int(header) > len(body):
            raise InputError(
                f"Invalid {HEADER}. Expected the number of bytes of JSON at the start of the body, as a whole number."
            )
        length = int(header)
    raw = json_from(body[:length], "The request", advice=_ADVICE)
    rest = memoryview(body)[length:]
    parameters = _parameters(raw, "The request")
    feeds: dict[str, Array] = {}
    for one in _entries(raw, "inputs"):
        name = one["name"]
        if name in feeds:
            raise InputError(f'The input "{name}" occurs twice. Send it once.')
        size = _parameters(one, f'The input "{name}"').get("binary_data_size")
        if size is None:
            feeds[name] = _from_json(one)
            continue
        if type(size) is not int or not 0 <= size <= len(rest):
            raise InputError(f'The binary_data_size of "{name}" does not match the body, which has {len(rest)} bytes left.')
        feeds[name], rest = _from_bytes(one, rest[:size]), rest[size:]
    if not feeds:
        raise InputError(f'The request has no "inputs". {_ADVICE}')
    if len(rest):
        raise InputError(f"The body has {len(rest)} bytes that belong to no input. Set binary_data_size and {HEADER}.")
    binary = parameters.get("binary_data_output") is True
    outputs = None
    if raw.get("outputs") is not None:
        outputs = {}
        for one in _entries(raw, "outputs"):
            wanted = _parameters(one, f'The output "{one["name"]}"')
            if unknown := wanted.keys() - {"binary_data"}:
                raise InputError(f'The output "{one["name"]}" has the parameter {min(unknown)}, which is not supported.')
            outputs[one["name"]] = wanted.get("binary_data", binary) is True
    given = raw.get("id")
    if given is not None and not isinstance(given, str):
        raise InputError('The "id" of the request is not text. Send text, or leave it out.')
    return InferenceRequest(feeds, given, outputs or None, binary)


def written_response(request: InferenceRequest, model: str, arrays: Mapping[str, Array]) -> tuple[bytes, dict[str, str]]:
    """Return the body and the headers of the answer. Raises InputError for an output that the model lacks."""
    names = request.outputs or dict.fromkeys(arrays, request.binary)
    if missing := [name for name in names if name not in arrays]:
        raise InputError(f'The model has no output "{missing[0]}". Its outputs are: {", ".join(arrays)}.')
    outputs, blobs = [], []
    for name, binary in names.items():
        array = np.ascontiguousarray(arrays[name])
        entry: dict[str, Any] = {"name": name, "datatype": DATATYPES[array.dtype.name], "shape": list(array.shape)}
        if binary:
            blobs.append(array.tobytes())
            entry["parameters"] = {"binary_data_size": len(blobs[-1])}
        else:
            if not np.isfinite(array).all():
                raise InputError(
                    f'The output "{name}" has values that JSON lacks (NaN or infinity). Request it as binary data.'
                )
            entry["data"] = array.ravel().tolist()
        outputs.append(entry)
    head = {"model_name": model, "model_version": "1", **({"id": request.id} if request.id else {}), "outputs": outputs}
    text = json.dumps(head).encode()
    if not blobs:
        return text, {"Content-Type": "application/json"}
    return b"".join((text, *blobs)), {"Content-Type": "application/octet-stream", HEADER: str(len(text))}


def _entries(raw: Any, key: str) -> Iterable[dict[str, Any]]:
    """Return the list of named objects under a key."""
    found = raw.get(key, []) if isinstance(raw, dict) else None
    if not isinstance(found, list) or not all(isinstance(one, dict) and isinstance(one.get("name"), str) for one in found):
        raise InputError(f'The request has no valid "{key}". Expected a list of objects with a "name". {_ADVICE}')
    return found


def _parameters(raw: Any, what: str) -> dict[str, Any]:
    found = raw.get("parameters") if isinstance(raw, dict) else None
    if found is not None and not isinstance(found, dict):
        raise InputError(f"{what} has invalid parameters. Expected an object.")
    return found or {}


def _shape(one: dict[str, Any]) -> tuple[np.dtype[Any], tuple[int, ...]]:
    name, shape, datatype = one["name"], one.get("shape"), one.get("datatype")
    if not isinstance(datatype, str) or datatype not in DTYPES:
        raise InputError(f'The input "{name}" has no supported datatype. Expected one of {", ".join(DTYPES)}.')
    if (
        not isinstance(shape, list)
        or len(shape) > MOST_AXES
        or not all(type(size) is int and 0 <= size < 1 << 31 for size in shape)
    ):
        raise InputError(f'The input "{name}" has no valid shape. Expected a list of sizes.')
    return np.dtype(DTYPES[datatype]), tuple(shape)


def _from_bytes(one: dict[str, Any], content: memoryview) -> Array:
    dtype, shape = _shape(one)
    if math.prod(shape) * dtype.itemsize != len(content):
        raise InputError(f'The input "{one["name"]}" has {len(content)} bytes, which does not match its shape and datatype.')
    array = np.frombuffer(content, dtype.newbyteorder("<")).reshape(shape)
    if dtype == np.bool_ and len(content) and np.frombuffer(content, np.uint8).max() > 1:
        raise InputError(f'The input "{one["name"]}" has bytes other than 0 and 1, which are no values of BOOL.')
    return np.ascontiguousarray(array, dtype)


def _from_json(one: dict[str, Any]) -> Array:
    (dtype, shape), name = _shape(one), one["name"]
    try:
        found = np.asarray(one.get("data"))
    except ValueError:  # rows of different lengths
        found = np.asarray(None)
    integers = dtype.kind in "iu" and found.dtype.kind in "iu"
    if integers and found.size:
        limits = np.iinfo(dtype)
        integers = bool(limits.min <= found.min() and found.max() <= limits.max)
    booleans = dtype.kind == "b" and found.dtype.kind == "b"
    if found.ndim == 0 or not (integers or booleans or (dtype.kind == "f" and found.dtype.kind in "iuf")):
        raise InputError(f'The "data" of the input "{name}" is not a list of {one["datatype"]} values.')
    if found.shape != shape and (found.ndim != 1 or found.size != math.prod(shape)):
        raise InputError(f'The "data" of the input "{name}" has {found.size} values, which does not match its shape.')
    with np.errstate(over="ignore"):
        array = found.astype(dtype).reshape(shape)
    if not np.isfinite(array).all():
        raise InputError(f'The "data" of the input "{name}" has values beyond the range of {one["datatype"]}.')
    return array
