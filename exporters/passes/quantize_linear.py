"""QuantizeLinear and DequantizeLinear in a graph: symmetric, one scale for a tensor or one for each output channel of a weight.

They are written into the fp32 graph; `assign_types` then makes scales, and what DequantizeLinear writes, as narrow as the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .attention import Node
from .base import Graph

FORMATS = ("int8", "fp8")
TOP = {"int8": 127.0, "fp8": 448.0}  # the largest number of each
Rounds = Callable[[str, NDArray[Any], NDArray[Any]], NDArray[Any] | None]  # (layer, weight, steps) -> numbers, or the nearest
FLOAT, INT32, INT8 = 1, 6, 3  # onnx.TensorProto


@dataclass
class Quantizer:
    """Writes quantised tensors into `graph`. `narrow` is the type that scales will have; `wide` names nodes that stay fp32."""

    graph: Graph
    format: str
    narrow: np.dtype[Any]
    scales: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    rounding: Rounds = lambda *_: None
    wide: set[str] = field(default_factory=set)

    @property
    def dtype(self) -> np.dtype[Any]:
        if self.format == "int8":
            return np.dtype(np.int8)
        import ml_dtypes

        float8: np.dtype[Any] = np.dtype(ml_dtypes.float8_e4m3fn)
        return float8

    def node(self, name: str, op: str, inputs: list[Any], dtype: Any = np.float32, **attributes: Any) -> Any:
        """The variable that a new node of this name writes."""
        import onnx_graphsurgeon as gs

        made = gs.Variable(f"{name}_output", np.dtype(dtype))
        self.graph.nodes.append(gs.Node(op, name, attributes, inputs, [made]))
        return made

    def scale(self, amplitude: NDArray[Any] | float) -> NDArray[np.float32]:
        """What one step stands for, such that it is exact in the narrow type and no subnormal number there."""
        steps = np.maximum(np.asarray(amplitude, np.float32) / TOP[self.format], 2.0**-14)
        return np.asarray(steps.astype(self.narrow), np.float32)

    def activation(self, tensor: Any, amplitude: float) -> Any:
        """`tensor`, quantised to the range of +-`amplitude` and back."""
        scale, zero = self._parameters(tensor.name, self.scale(amplitude))
        quantized = self.node(f"{tensor.name}/QuantizeLinear", "QuantizeLinear", [tensor, scale, zero], self.dtype)
        return self.node(f"{tensor.name}/DequantizeLinear", "DequantizeLinear", [quantized, scale, zero])

    def behind(self, tensor: Any, amplitude: float, readers: list[Node] | None = None) -> None:
        """Quantises `tensor` for `readers`, or for all who read it."""
        readers = list(tensor.outputs) if readers is None else readers
        quantized = self.activation(tensor, amplitude)
        for reader in readers:
            reader.inputs = [quantized if read is tensor else read for read in reader.inputs]

    def in_epilogue(self, tensor: Any, amplitude: float) -> Any:
        """The same, in operators that the compiler can compute in the kernel of the product in front of `tensor`.

        It has none that rounds, so the rounding is that of a conversion to integers, which cuts off, of a positive number.
        """
        if self.format != "int8":
            return self.activation(tensor, amplitude)
        scale, zero = self._parameters(tensor.name, self.scale(amplitude))

        def step(op: str, *inputs: Any, dtype: Any = np.float32, **attributes: Any) -> Any:
            name = f"{tensor.name}/Quantize{op}{len(self.graph.nodes)}"
            self.wide.add(name)
            return self.node(name, op, list(inputs), dtype, **attributes)

        def number(name: str, value: float) -> Any:
            return self.constant(f"{tensor.name}/{name}", np.array(value, np.float32))

        steps = step("Mul", tensor, number("inverse", 1 / float(scale.values)))
        limited = step("Clip", steps, number("least", -TOP["int8"]), number("largest", TOP["int8"]))
        whole = step("Cast", step("Add", limited, number("half", 128.5)), dtype=np.int32, to=INT32)
        shift = self.constant(f"{tensor.name}/shift", np.array(128, np.int32))
        quantized = step("Cast", step("Sub", whole, shift, dtype=np.int32), dtype=np.int8, to=INT8)
        return self.node(f"{tensor.name}/DequantizeLinear", "DequantizeLinear", [quantized, scale, zero])

    def weight(self, layer: str, values: NDArray[Any], by_channel: bool, shared: float | None = None) -> Any:
        """A weight [outputs, inputs], stored quantised; `shared` is the amplitude of several weights with one scale."""
        values = np.asarray(values, np.float32)
        own = self.scales.get(layer) if shared is None else None
        needed = (shared or np.abs(values).max(axis=1)) if own is None else np.broadcast_to(np.ravel(own), len(values))
        scale = self.scale(needed if own is None else needed * TOP[self.format])
        scale = scale if by_channel else scale.max()
        lowest = -128.0 if own is not None and self.format == "int8" else -TOP[self.format]  # trained weights use it
        found = self.rounding(layer, values, np.broadcast_to(scale, values.shape[:1])) if own is None else None
        steps = values / (scale[:, None] if by_channel else scale) if found is None else found
        limited = np.clip(steps, lowest, TOP[self.format])
        quantized = (np.rint(limited) if self.format == "int8" else limited).astype(self.dtype)
        number, zero = self._parameters(f"{layer}.weight", scale)
        stored = self.constant(f"{layer}.weight_{self.format}", quantized)
        attributes = {"axis": 0} if by_channel else {}
        return self.node(f"{layer}.weight/DequantizeLinear", "DequantizeLinear", [stored, number, zero], **attributes)

    def _parameters(self, name: str, scale: NDArray[Any]) -> tuple[Any, Any]:
        zero = self.constant(f"{name}_zero{len(self.graph.nodes)}", np.zeros(np.shape(scale), self.dtype))
        return self.constant(f"{name}_scale{len(self.graph.nodes)}", np.asarray(scale, np.float32)), zero

    @staticmethod
    def constant(name: str, values: NDArray[Any]) -> Any:
        import onnx_graphsurgeon as gs

        return gs.Constant(name, np.asarray(values, order="C"))  # of rank 0 where `values` is
