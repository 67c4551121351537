"""Small frozen values that several layers share, and the names of files in a bundle."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from swin_deploy.errors import UsageError

if TYPE_CHECKING:
    import onnx


Say = Callable[[str], None]


def silent(line: str) -> None:
    """Tells nobody."""


Array = NDArray[Any]
QUANTIZED = ("int8", "fp8")
PRECISIONS = ("fp32", "fp16", "bf16", *QUANTIZED)
TARGETS = ("tensorrt", "onnxruntime", "openvino")  # whose form a graph has; every graph runs on every back end
Size = tuple[int, int]
Batch = tuple[int, int, int]  # smallest, tuned for, largest
_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40}


def target_of(entry: Mapping[str, Any]) -> str:
    """Which of TARGETS a quantised graph was made for, by its entry in a manifest."""
    return str(entry.get("calibration", {}).get("target", TARGETS[0]))


@dataclass(frozen=True)
class TensorSpec:
    """A named input or output: numpy dtype name, and a shape whose free axes are names (`("batch", 3, 224, 224)`)."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    @property
    def image_size(self) -> Size:
        """(height, width) of the images of an input: uint8 frames have their channels last, prepared arrays first."""
        height, width = self.shape[1:3] if self.dtype == "uint8" else self.shape[2:4]
        return int(height), int(width)

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "dtype": self.dtype, "shape": list(self.shape)}

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> TensorSpec:
        return cls(str(raw["name"]), str(raw["dtype"]), tuple(raw["shape"]))

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype} [{', '.join(str(size) for size in self.shape)}]"


def specs_from_onnx(values: Iterable[onnx.ValueInfoProto]) -> tuple[TensorSpec, ...]:
    """Names, types and shapes of a graph's inputs or outputs, as it declares them; "?" for an axis of which it says nothing."""
    import onnx

    specs = []
    for value in values:
        tensor = value.type.tensor_type
        shape = tuple(d.dim_value if d.HasField("dim_value") else (d.dim_param or "?") for d in tensor.shape.dim)
        specs.append(TensorSpec(value.name, onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name, shape))
    return tuple(specs)


def size_from_text(text: str) -> Size:
    """(height, width) in pixels from "256x320", or from "256" for a square. Raises UsageError for anything else."""
    match = re.fullmatch(r"([1-9]\d{0,5})(?:[xX]([1-9]\d{0,5}))?", text.strip())
    if match is None:
        raise UsageError(f'"{text}" is no image size; expected HEIGHTxWIDTH in pixels such as 256x320, or 256 for a square.')
    return int(match[1]), int(match[2] or match[1])


def numbers_from_text(text: str | None, what: str) -> tuple[int, ...] | None:
    """(8, 8, 8, 4) from "8,8,8,4"; None for None. Raises UsageError for anything but whole numbers from 0 to 9999."""
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"[0-9]{1,4}", part) for part in parts):
        raise UsageError(f'"{text}" is no {what}; expected a whole number such as 8, or one for each stage such as 8,8,8,4.')
    return tuple(map(int, parts))


def size_text(size: Size) -> str:
    """ "256x320" for (256, 320)."""
    return f"{size[0]}x{size[1]}"


def graph_file(precision: str, size: Size | None = None) -> str:
    """Where a bundle keeps the ONNX graph of `precision`; `size` is for its further sizes, None for its first."""
    return "onnx/model" + (f"_{size_text(size)}" if size else "") + ("" if precision == "fp32" else f"_{precision}") + ".onnx"


def weights_file(precision: str) -> str:
    """Where the weights are that the graphs of `precision` share, when they are not inside the graph."""
    return graph_file(precision) + "_data"


def reference_file(size: Size | None = None) -> str:
    """Where PyTorch's answers for a size are; None for the first."""
    return "reference.npz" if size is None else f"reference_{size_text(size)}.npz"


def batch_from_text(text: str) -> Batch:
    """(1, 8, 32) from "1:8:32", (8, 8, 8) from "8". Raises UsageError for anything else."""
    match = re.fullmatch(r"(\d{1,10})(?::(\d{1,10}):(\d{1,10}))?", text.strip())
    if match is None:
        raise UsageError(f'"{text}" is no batch; expected one size, or MIN:OPT:MAX such as 1:8:32.')
    return int(match[1]), int(match[2] or match[1]), int(match[3] or match[1])


def bytes_from_text(text: str) -> int:
    """2147483648 from "2GiB", 500000000 from "500MB", 4096 from "4096". Raises UsageError for anything else."""
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,6})?)\s*([KMG]B|[KMGT]iB|)", text.strip(), re.IGNORECASE)
    size = int(float(match[1]) * _UNITS[match[2].lower()]) if match else 0
    if size < 1:
        raise UsageError(f'"{text}" is no size of memory; expected a number and a unit, such as 2GiB or 512MiB.')
    return size
