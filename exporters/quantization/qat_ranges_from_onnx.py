"""Read the QAT ranges of an ONNX graph with Q/DQ. Exporters name layers differently, so weights identify each layer."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from swin_deploy.bundle import Bundle, load_graph
from swin_deploy.config import SwinConfig
from swin_deploy.dependencies import require
from swin_deploy.errors import InputError
from swin_deploy.exporters.external_data import PROTOBUF_LIMIT
from swin_deploy.exporters.typed_graphs import config_and_task
from swin_deploy.files import open_regular
from swin_deploy.options import Array
from swin_deploy.qat_ranges import PARTS, ActivationRange, LayerRanges, QatRanges, largest, modules_of, softmax_scale

from .equalization import GraphIndex

if TYPE_CHECKING:
    import onnx

LAYOUT_OPERATORS = ("Cast", "Flatten", "Gather", "Identity", "Pad", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze")
INTEGERS = {"uint8": (0, 255), "int8": (-128, 127)}
FLOAT8 = "float8_e4m3fn"
SAME = 1e-4  # of the largest weight


def ranges_from_onnx(bundle: Bundle, path: Path) -> QatRanges:
    """Read the ranges of the graph at `path`. Raises InputError if it does not have the network of `bundle`."""
    require("onnx", "read ranges from a graph")
    with open_regular(path, InputError, "Pass an ONNX file.") as file:
        if (size := os.fstat(file.fileno()).st_size) > PROTOBUF_LIMIT:
            raise InputError(f"{path} has {size} bytes, and an ONNX file has at most {PROTOBUF_LIMIT}. Pass another file.")
    try:
        model = load_graph(path)
    except Exception as error:  # protobuf's errors have no common base
        raise InputError(f"{path} cannot be read as an ONNX graph ({' '.join(str(error).split())[:200]}).") from error
    source = next(iter(bundle.graphs_of("fp32")))
    config, _ = config_and_task(bundle)
    network = _weights(load_graph(bundle.verified_path(source)), config)
    return QatRanges(path.name, _ranges(_QdqGraph(model, str(path)), network))


@dataclass(frozen=True)
class _Linear:
    """A linear layer of the graph: `weight` [outputs, inputs], and its INT8 `scale` [outputs]; `rounded` if it is quantized."""

    name: str
    weight: Array
    scale: Array | None
    rounded: bool
    input: ActivationRange | None


@dataclass(frozen=True)
class _Weight:
    """Values, their INT8 scale in the same shape, and whether they are stored quantized."""

    values: Array
    scale: Array | None
    rounded: bool

    def each(self, change: Callable[[Array], Array]) -> _Weight:
        return _Weight(change(self.values), None if self.scale is None else change(self.scale), self.rounded)


def _weights(model: onnx.ModelProto, config: SwinConfig) -> dict[str, Array]:
    """The weights [outputs, inputs] of a bundle's graph, by canonical name, as the checkpoint had them."""
    import onnx

    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    found: dict[str, Array] = {}
    for node in model.graph.node:
        modules = modules_of(node.name.removesuffix("/Gemm")) if node.op_type == "Gemm" else ()
        if not modules:
            continue
        joined = np.asarray(onnx.numpy_helper.to_array(constants[node.input[1]]))
        for name, weight in zip(modules, np.split(joined, len(modules)), strict=True):
            found[name] = weight / np.float32(softmax_scale(name, config))
    return found


def _ranges(graph: _QdqGraph, network: Mapping[str, Array]) -> dict[str, LayerRanges]:
    found: dict[str, LayerRanges] = {}
    for linear in graph.linear_layers():
        names = _same(linear, network, found)
        if not names:
            raise InputError(
                f"{graph.path} has a quantized layer, {linear.name}, whose weights {list(linear.weight.shape)} are not in the "
                f"bundle. Expected the same network: export the bundle from the checkpoint of this graph."
            )
        scales = None if linear.scale is None else np.split(linear.scale, len(names))
        for number, name in enumerate(names):
            before = found.get(name, LayerRanges())
            weight = before.weight if scales is None else tuple(float(scale) for scale in scales[number])
            found[name] = LayerRanges(largest((before.input, linear.input)), None, weight)
    if not found:
        raise InputError(
            f"{graph.path} has no QuantizeLinear and DequantizeLinear in 8 bits at a linear layer. Expected a graph that "
            f"torch.onnx.export writes for a model with fake quantization."
        )
    return found


def _same(linear: _Linear, network: Mapping[str, Array], taken: Mapping[str, Any]) -> tuple[str, ...]:
    """The layers of the network with these weights, first those not `taken`: one, three of a joined projection, or none."""
    groups: list[tuple[str, ...]] = [(name,) for name in network]
    attentions = [name.removesuffix("query") for name in network if name.endswith(".query")]
    groups += [tuple(f"{name}{part}" for part in PARTS) for name in attentions]
    fit = [group for group in groups if _equal(linear, [network[name] for name in group])]
    return next((group for group in fit if not set(group) & taken.keys()), fit[0] if fit else ())


def _equal(linear: _Linear, weights: list[Array]) -> bool:
    if (sum(map(len, weights)), weights[0].shape[1]) != linear.weight.shape:
        return False
    ours = np.concatenate(weights).astype(np.float64)
    allowed = np.concatenate([np.full((len(weight), 1), SAME * float(np.abs(weight).max())) for weight in weights])
    if linear.rounded and linear.scale is not None:
        scale = linear.scale[:, None]
        ours = np.clip(ours, -128 * scale, 127 * scale)
        allowed = allowed + 0.5 * scale
    return not (np.abs(ours - linear.weight) > allowed).any()


class _QdqGraph(GraphIndex):
    def __init__(self, model: onnx.ModelProto, path: str) -> None:
        super().__init__(model)
        self.path = path
        for node in self.nodes:
            values = [a.t for a in node.attribute if a.name == "value"]
            if node.op_type == "Constant" and values:
                self.constants[node.output[0]] = values[0]
            elif node.op_type == "Identity" and node.input[0] in self.constants:  # torch keeps equal constants once
                self.constants[node.output[0]] = self.constants[node.input[0]]

    def linear_layers(self) -> Iterator[_Linear]:
        """Yield every linear layer that has a quantized weight or input."""
        for node in self.nodes:
            if node.op_type not in ("MatMul", "Gemm", "Conv") or len(node.input) < 2:
                continue
            found = self._weight(node.input[1])
            if found is None or found.values.ndim < 2:
                continue
            if node.op_type == "Conv" and np.prod(found.values.shape[2:]) != 1:  # the patch embedding, which is not quantized
                continue
            transposed = node.op_type == "MatMul" or (node.op_type == "Gemm" and not self.attribute(node, "transB"))
            if not transposed:  # a convolution's has further axes of length 1
                found = found.each(lambda array: array.reshape(array.shape[:2]))
            if found.values.ndim != 2:
                continue
            if transposed:
                found = found.each(np.transpose)
            if found.scale is not None and (found.scale != found.scale[:, :1]).any():
                raise InputError(
                    f"{self.path}: the weight of {node.name} has a scale for each input channel. Expected one for each output "
                    f"channel."
                )
            read = self._activation(node.input[0], node.name)
            if found.scale is not None or read is not None:
                scale = None if found.scale is None else found.scale[:, 0]
                yield _Linear(node.name, found.values, scale, found.rounded, read)

    def _weight(self, name: str) -> _Weight | None:
        """The weight `name`; None for a tensor that is not constant."""
        if name in self.constants:
            return _Weight(self.constant(name).astype(np.float64), None, False)
        node = self.writer.get(name)
        if node is None:
            return None
        if node.op_type == "DequantizeLinear":
            return self._dequantized(node)
        inner = self._weight(node.input[0]) if node.op_type in ("Cast", "Identity", "Transpose") else None
        if inner is None or node.op_type != "Transpose":
            return inner
        order = self.attribute(node, "perm") or tuple(reversed(range(inner.values.ndim)))
        return inner.each(lambda array: array.transpose(order))

    def _dequantized(self, node: Any) -> _Weight | None:
        quantizer = self._quantizer(node)
        inner = self._weight(node.input[0] if quantizer is None else quantizer.input[0])
        if inner is None or node.input[1] not in self.constants:
            return None
        kind, zero = self._type_and_zero_point(node, quantizer)
        scale = self._scale(node)
        shape = [1] * inner.values.ndim
        if scale.size > 1:
            axis = self.attribute(node, "axis", 1)
            if inner.values.shape[axis] != scale.size:
                raise InputError(
                    f"{self.path}: {node.name} has a scale for each block of a weight. Expected one scale, or one for each "
                    f"output channel."
                )
            shape[axis] = scale.size
        scales = np.broadcast_to(scale.reshape(shape), inner.values.shape)
        values = inner.values
        if quantizer is None:
            values = (values - zero.reshape(shape if zero.size > 1 else [1] * len(shape))) * scales
        usable = (kind == "int8" and not zero.any()) or (kind == "uint8" and (zero == 128).all()) or kind == FLOAT8
        int8_scale = scales * (448 / 127) if kind == FLOAT8 else scales
        return _Weight(values, int8_scale if usable else None, quantizer is None and kind != FLOAT8)

    def _activation(self, name: str, layer: str) -> ActivationRange | None:
        """The range of a tensor that is quantized in 8 bits, directly or before operators that only change its layout."""
        node = self.writer.get(name)
        while node is not None and node.op_type in LAYOUT_OPERATORS:
            node = self.writer.get(node.input[0])
        if node is None or node.op_type != "DequantizeLinear":
            return None
        quantizer = self._quantizer(node)
        if quantizer is None or node.input[1] not in self.constants:
            return None
        (kind, zeros), scale = self._type_and_zero_point(node, quantizer), self._scale(node)
        if scale.size != 1:
            raise InputError(f"{self.path}: the input of {layer} has {scale.size} scales. Expected one for the whole tensor.")
        step, zero = float(np.float32(scale.reshape(-1)[0])), int(zeros.reshape(-1)[0])
        if kind == FLOAT8:
            return ActivationRange.symmetric(448 * step)
        if kind not in INTEGERS:
            return None
        lowest, highest = INTEGERS[kind]
        clip = self.writer.get(node.input[0])
        if clip is not None and clip.op_type == "Clip":
            limits = [int(self.constant(bound)) for bound in clip.input[1:3] if bound in self.constants]
            lowest, highest = limits if len(limits) == 2 else (lowest, highest)
        amplitude = (highest - zero if 2 * zero == lowest + highest + 1 else max(zero - lowest, highest - zero)) * step
        return ActivationRange(step, zero + (128 if kind == "int8" else 0), amplitude)

    def _quantizer(self, node: Any) -> Any:
        """The QuantizeLinear before a DequantizeLinear; None if the quantized values are a constant."""
        before = self.writer.get(node.input[0])
        while before is not None and before.op_type in ("Clip", "Cast", "Identity"):
            before = self.writer.get(before.input[0])
        return before if before is not None and before.op_type == "QuantizeLinear" else None

    def _type_and_zero_point(self, node: Any, quantizer: Any) -> tuple[str, Array]:
        """The numpy name of the quantized type, and the zero point."""
        zeros = [n.input[2] for n in (node, quantizer) if n is not None and len(n.input) > 2 and n.input[2] in self.constants]
        if zeros:
            zero = self.constant(zeros[0])
            return str(zero.dtype), zero.astype(np.int64) if zero.dtype.kind in "iu" else np.zeros(zero.shape)
        values = node.input[0]
        return (str(self.constant(values).dtype) if values in self.constants else "uint8"), np.zeros(1, np.int64)

    def _scale(self, node: Any) -> Array:
        scale = self.constant(node.input[1]).astype(np.float64)
        if not (np.isfinite(scale).all() and (scale >= 0).all()):
            raise InputError(
                f"{self.path}: the scale of {node.name} holds NaN, infinity or a negative number. Expected positive numbers."
            )
        return scale
