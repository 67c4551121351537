"""Keep weights outside of a graph while it is recorded and rewritten, then embed them or write them as ONNX external data.

Also writes the metadata of ONNX files. A graph without weights has a few hundred kilobytes, so passes copy nothing large. The
weights stay where they are, often memory-mapped from the checkpoint, until they are written one by one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import onnx

ALIGNMENT = 4096  # bytes, so that a runtime can memory-map a tensor
PROTOBUF_LIMIT = 2_000_000_000  # bytes; a protobuf message is limited to 2 GiB, and the graph itself needs some
SMALLEST = 1024  # bytes; smaller tensors, such as shapes and scalars, stay in the graph

Metadata = dict[str, str]
Weights = Mapping[str, Any]  # initializer -> torch tensor or numpy array


def embed_weights(model: onnx.ModelProto, weights: Weights) -> None:
    """Store the weights that `model` refers to inside it."""
    import onnx

    # Where protobuf gets no memory, it ends the process. numpy raises MemoryError instead, so it tries first: for all weights,
    # and once more for the one that is copied.
    sizes = [_array(weight).nbytes for weight in weights.values()]
    np.empty(sum(sizes) + max(sizes, default=0), np.uint8)
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            del tensor.external_data[:]
            tensor.data_location = onnx.TensorProto.DEFAULT
            tensor.raw_data = _array(weights[tensor.name]).tobytes()


def weight_bytes(weights: Weights) -> int:
    """Return the total size of the weights in bytes."""
    return sum(_array(weight).nbytes for weight in weights.values())


class WeightFile:
    """A file with the large tensors of several graphs. Equal tensors are stored once."""

    def __init__(self, path: Path, name: str | None = None) -> None:
        self.path, self.name = path, name or path.name  # `name`: location in the graphs, if it differs
        self._places: dict[bytes, tuple[int, int]] = {}
        self._end = 0

    def take(self, model: onnx.ModelProto, weights: Weights | None = None) -> None:
        """Move the large initializers of `model` into the file, and leave references to them (ONNX external data).

        `weights` holds those that the model only refers to; without it they are inside the model.
        """
        import onnx

        with self.path.open("ab") as file:
            for tensor in model.graph.initializer:
                if weights is not None and tensor.name in weights:
                    array = _array(weights[tensor.name])
                else:
                    array = onnx.numpy_helper.to_array(tensor)
                    if array.nbytes < SMALLEST:
                        continue
                self._refer(tensor, *self._place(file, array))

    def _place(self, file: Any, array: NDArray[Any]) -> tuple[int, int]:
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data  # numpy has no buffers of bfloat16 or float8
        key = hashlib.sha256(data).digest()
        if key not in self._places:
            gap = -self._end % ALIGNMENT
            file.write(bytes(gap))
            file.write(data)
            self._places[key] = (self._end + gap, len(data))
            self._end += gap + len(data)
        return self._places[key]

    def _refer(self, tensor: onnx.TensorProto, offset: int, length: int) -> None:
        import onnx

        for field in ("raw_data", "float_data", "int32_data", "int64_data"):
            tensor.ClearField(field)
        del tensor.external_data[:]
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for name, value in (("location", self.name), ("offset", offset), ("length", length)):
            entry = tensor.external_data.add()
            entry.key, entry.value = name, str(value)


def _array(weight: Any) -> NDArray[Any]:
    """Return `weight` as a numpy array that shares its memory."""
    array = weight if isinstance(weight, np.ndarray) else weight.detach().numpy()
    return np.asarray(array)


def graph_facts(entry: Mapping[str, Any], target: str) -> Metadata:
    """Return the metadata of one graph, from its entry in the manifest.

    The distance from PyTorch is only in the manifest: it differs between processors, and the file must not.
    """
    verified = entry["agreement"] != "not verified" and entry["agreement"]["verified"]
    verdict = "verified: agrees with PyTorch" if verified else "not verified"
    sums = {"sum_bits": str(entry["sum_bits"])} if "sum_bits" in entry else {}
    return {"precision": entry["precision"], "target": target, "verdict": verdict, **sums}


def add_metadata(path: Path, metadata: Mapping[str, str]) -> None:
    """Append metadata to the ONNX file at `path`, which has none: the fields of a message may be in any order."""
    import onnx

    fields = onnx.ModelProto()
    onnx.helper.set_model_props(fields, dict(metadata))
    with path.open("ab") as file:
        file.write(fields.SerializeToString())
