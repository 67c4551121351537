"""Read the layers of a compiled engine: its kernels, how many are fused attention, and the bytes that they move.

The source is the compiler's description of the engine: its log (no GPU needed) or the JSON of the engine inspector. Figures
that cannot be read are None, never estimated.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

# Bits of each type name that the log and the inspector of the supported versions use.
_BITS = {
    "float": 32, "fp32": 32, "half": 16, "fp16": 16, "bfloat16": 16, "bf16": 16, "fp8": 8, "e8m0": 8, "fp4": 4,
    "int64": 64, "int32": 32, "int8": 8, "uint8": 8, "bool": 8, "int4": 4,
}  # fmt: skip

# Layers that launch nothing on the GPU: stream events, host arithmetic, and renamed tensors.
_NOT_KERNELS = {"signal", "wait", "noop", "constant", "shape_call"}

# The compiler's names for its fused softmax(Q K^T) V kernels.
_FUSED_ATTENTION = re.compile(r"gemm_mha|fused_mha|fmha")

# What a kernel does. The name of a generated kernel lists its operations in four letters each: __myl_ReshTranMove_myl0_8.
ROLES = ("attention", "product", "move", "other")
_MOVES = {"Cast", "Conc", "Copy", "Gath", "Move", "Padd", "Repl", "Resh", "Slic", "Tran"}
_MOVING_KINDS = {"concatenation", "copy", "gather", "reformat", "shuffle", "slice"}
_PRODUCT_KINDS = {"convolution", "correlation", "fullyconnected", "gemm", "matmul", "matrixmultiply"}

# A list of tensors ends at the first " }]" before another field or the end of the line. The next "]" is not enough, because
# dimensions and formats contain brackets, too ("Format with stride order = [1,0,2]").
_LIST = r"\[(?:\]|\s*(?P<{0}>\{{ Name: .*?)\s*\}}\s*\](?=,\s\w+:|\s*$))"
_INPUTS, _CONSTANTS, _OUTPUTS = map(_LIST.format, ("inputs", "constants", "outputs"))
_LAYER = re.compile(
    rf"Name: (?P<name>.*?), LayerType: (?P<kind>[^,]*), Inputs: {_INPUTS}(?P<listed>, Constants: {_CONSTANTS})?, "
    rf"Outputs: {_OUTPUTS}(?P<rest>.*)$"
)
_TENSOR = re.compile(r"\{ Name: (?P<name>.*?), (?:\w+: \w+, )*?Dimensions: \[(?P<dims>[-\d, ]*)\](?P<rest>.*)$")
_TACTIC = re.compile(r", TacticName: ([^,]*)")


@dataclass(frozen=True)
class EngineTensor:
    """A tensor that a kernel reads or writes; -1 in `dims` is a dynamic dimension."""

    name: str
    dims: tuple[int, ...]
    datatype: str

    @property
    def bytes(self) -> int | None:
        """Size without padding; None for a dynamic dimension or an unknown type."""
        bits = _BITS.get(self.datatype.lower())
        if bits is None or min(self.dims, default=0) < 0:
            return None
        return (math.prod(self.dims) * bits + 7) // 8


@dataclass(frozen=True)
class EngineLayer:
    """One layer of an engine; `constants` is None if the compiler does not list them."""

    name: str
    kind: str
    inputs: tuple[EngineTensor, ...]
    outputs: tuple[EngineTensor, ...]
    constants: tuple[EngineTensor, ...] | None
    tactic: str = ""

    @property
    def is_kernel(self) -> bool:
        """Whether the layer launches a kernel: it writes a tensor, and is not an event or host arithmetic."""
        # With a dynamic batch, the compiler computes offsets as host variables ("hvar"), which are single 64-bit integers.
        numbers = all(tensor.datatype == "Int64" and tensor.dims == (1,) for tensor in self.outputs)
        return not numbers and self.kind.lower() not in _NOT_KERNELS

    @property
    def role(self) -> str:
        """What the kernel does: one of ROLES; "move" if it only rearranges or converts data."""
        if _FUSED_ATTENTION.search(f"{self.name} {self.tactic}".lower()):
            return "attention"
        generated = re.match(r"__myl_([A-Za-z]+)_myl", self.name)
        steps = re.findall(r"[A-Z][a-z]*", generated[1]) if generated else []
        if self.kind.lower() in _PRODUCT_KINDS or "Fc" in steps:
            return "product"
        moves = _MOVES.issuperset(steps) if steps else self.kind.lower() in _MOVING_KINDS
        return "move" if moves else "other"


@dataclass(frozen=True)
class EngineReport:
    """The layers of an engine and their figures, which are None if `unread`, the number of unknown layers, is not 0."""

    layers: tuple[EngineLayer, ...]
    source: str  # "log", "inspector" or "none"
    unread: int = 0

    @property
    def kernels(self) -> int | None:
        """Number of kernels launched for one inference."""
        return self._total(lambda layer: 1)

    @property
    def fused_attention(self) -> int | None:
        """Number of kernels that compute a whole softmax(Q K^T) V, recognized by the compiler's names for them."""
        return self._total(lambda layer: int(layer.role == "attention"))

    @property
    def activation_bytes(self) -> int | None:
        """Bytes of the inputs and outputs of all kernels; None for a dynamic batch."""
        return self._total(lambda layer: _bytes(layer.inputs + layer.outputs))

    @property
    def constant_bytes(self) -> int | None:
        """Bytes of the weights, biases and tables of all kernels; None if the compiler does not list them."""
        return self._total(lambda layer: _bytes(layer.constants))

    @property
    def bytes_moved(self) -> int | None:
        """Bytes that the kernels read and write: the unpadded size of each tensor, once for each kernel that uses it."""
        return _sum((self.activation_bytes, self.constant_bytes))

    @property
    def roles(self) -> dict[str, dict[str, int | None]]:
        """For each of ROLES: the number of kernels, the bytes that they read (with weights), and the bytes that they write."""
        return {
            role: {
                "kernels": self._total(lambda layer: 1, role),
                "bytes_read": self._total(lambda layer: _sum((_bytes(layer.inputs), _bytes(layer.constants))), role),
                "bytes_written": self._total(lambda layer: _bytes(layer.outputs), role),
            }
            for role in ROLES
        }

    @property
    def types(self) -> dict[str, int]:
        """Number of kernels that write each type, by their first output."""
        return dict(Counter(layer.outputs[0].datatype for layer in self.layers if layer.is_kernel))

    def to_dict(self, layers: bool = True) -> dict[str, Any]:
        """Return the report as JSON values; without `layers` only the figures, as in a manifest."""
        names = ("source", "unread", "kernels", "fused_attention", "bytes_moved", "activation_bytes", "constant_bytes")
        figures: dict[str, Any] = {name: getattr(self, name) for name in (*names, "roles", "types")}
        if layers:
            figures["layers"] = [{**asdict(one), "role": one.role if one.is_kernel else None} for one in self.layers]
        return figures

    def _total(self, count: Callable[[EngineLayer], int | None], role: str | None = None) -> int | None:
        if self.unread or not self.layers:
            return None
        return _sum(count(layer) for layer in self.layers if layer.is_kernel and role in (None, layer.role))


def report_from_log(messages: Iterable[str]) -> EngineReport:
    """Read the report from the compiler's VERBOSE messages; a repeated line counts once, because names are unique."""
    lines = (line.strip().removeprefix("Layers:").strip() for message in messages for line in message.split("\n"))
    announced = dict.fromkeys(line for line in lines if line.startswith("Name: ") and ", LayerType: " in line)
    layers = [layer for layer in map(_layer_from_line, announced) if layer is not None]
    return EngineReport(tuple(layers), "log" if announced else "none", len(announced) - len(layers))


def report_from_inspector(text: str) -> EngineReport:
    """Read the report from the JSON of `EngineInspector.get_engine_information`; layers without details count as unread."""
    try:
        announced = json.loads(text).get("Layers", [])
    except (ValueError, AttributeError):
        return EngineReport((), "none")
    layers = [layer for layer in map(_layer_from_json, announced) if layer is not None]
    return EngineReport(tuple(layers), "inspector" if announced else "none", len(announced) - len(layers))


def reports_by_profile(report: EngineReport, profiles: int) -> tuple[EngineReport, ...]:
    """Split a report by the number of the profile in the names of the kernels; without such numbers, no layers are left."""
    if profiles == 1:
        return (report,)
    layers: dict[int | None, list[EngineLayer]] = {}
    for layer in report.layers:
        match = re.search(r"_myl(\d+)_\d+$", layer.name)
        layers.setdefault(int(match[1]) if match else None, []).append(layer)
    numbered = {number for number, group in layers.items() if any(layer.is_kernel for layer in group)}
    if report.unread or numbered != set(range(profiles)):
        return (EngineReport((), report.source, report.unread),) * profiles
    return tuple(EngineReport(tuple(layers[number]), report.source) for number in range(profiles))


def _layer_from_line(line: str) -> EngineLayer | None:
    match = _LAYER.match(line)
    if match is None:
        return None
    try:
        inputs, outputs, constants = (_tensors_from_text(match[group] or "") for group in ("inputs", "outputs", "constants"))
    except ValueError:
        return None
    tactic = _TACTIC.search(match["rest"])
    listed = constants if match["listed"] else None
    return EngineLayer(match["name"], match["kind"], inputs, outputs, listed, tactic[1] if tactic else "")


def _tensors_from_text(text: str) -> tuple[EngineTensor, ...]:
    found = []
    for piece in filter(None, re.split(r"\s*\}, (?=\{ Name: )", text)):  # " }, { Name: " only occurs between two tensors
        match = _TENSOR.match(piece)
        if match is None:
            raise ValueError("a tensor in an unknown format")
        # "Format/Datatype: Half" up to TensorRT 10, "Datatype: Half, Format: (Linear) ..." since.
        datatype = re.search(r"Datatype: ([^,}]*)", match["rest"])
        dims = tuple(int(extent) for extent in match["dims"].split(",") if extent.strip())
        found.append(EngineTensor(match["name"], dims, _type_in(datatype[1] if datatype else "")))
    return tuple(found)


def _layer_from_json(layer: Any) -> EngineLayer | None:
    try:
        constants = _tensors_from_json(layer["Constants"]) if "Constants" in layer else None
        inputs, outputs = _tensors_from_json(layer["Inputs"]), _tensors_from_json(layer["Outputs"])
        tactic = str(layer.get("TacticName", ""))
        return EngineLayer(str(layer["Name"]), str(layer["LayerType"]), inputs, outputs, constants, tactic)
    except (KeyError, TypeError, ValueError):
        return None


def _tensors_from_json(tensors: Any) -> tuple[EngineTensor, ...]:
    return tuple(
        EngineTensor(
            str(tensor["Name"]),
            tuple(int(extent) for extent in tensor["Dimensions"]),
            _type_in(str(tensor.get("Datatype") or tensor.get("Format/Datatype") or tensor.get("Format") or "")),
        )
        for tensor in tensors
    )


def _type_in(text: str) -> str:
    """Find the type in `text`: a single word in newer versions, part of "Row major linear FP16 format" in older ones."""
    return next((word for word in re.findall(r"\w+", text) if word.lower() in _BITS), "unknown")


def _bytes(tensors: tuple[EngineTensor, ...] | None) -> int | None:
    return None if tensors is None else _sum(tensor.bytes for tensor in tensors)


def _sum(values: Iterable[int | None]) -> int | None:
    """Add up `values`; None if one of them is unknown."""
    total = 0
    for value in values:
        if value is None:
            return None
        total += value
    return total
