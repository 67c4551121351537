"""An ONNX graph with Q/DQ of a bundle's network -> its ranges, layer by layer.

Exporters name layers in ways of their own, or not at all; the weights tell which layer is which, and that it is this network.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from swin_deploy.bundle import Bundle, sha256_of
from swin_deploy.config import SwinConfig
from swin_deploy.dependencies import require
from swin_deploy.errors import InputError
from swin_deploy.exporters.typed_graphs import config_and_task
from swin_deploy.qat_ranges import PARTS, RANGES, ActivationRange, LayerRanges, Ranges, largest, modules_of, softmax_scale
from swin_deploy.specs import Array

if TYPE_CHECKING:
    import onnx

MOVES = ("Cast", "Flatten", "Gather", "Identity", "Pad", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze")
CODES = {"uint8": (0, 255), "int8": (-128, 127)}
FLOAT8 = "float8_e4m3fn"
EQUAL = 1e-4  # of the largest weight


def ranges_for(bundle: Bundle, given: str | os.PathLike[str] | None) -> tuple[Ranges | None, str | None]:
    """The ranges that `bundle` is quantised with, and a sha256 of where they are; None where all are to be measured.

    `given` is an ONNX file, "none", or None for those that the checkpoint brought along. Raises InputError for a file that is
    no such graph, or of another network.
    """
    if given is None:
        there = RANGES in bundle.files
        return (Ranges.from_dict(bundle.read_json(RANGES)), bundle.files[RANGES]["sha256"]) if there else (None, None)
    if given == "none":
        return None, None
    onnx = require("onnx", "read ranges from a graph")
    path = Path(given)
    try:
        model, digest = onnx.load(str(path)), sha256_of(path)
    except Exception as error:  # protobuf's errors have no common base
        raise InputError(f"{path} cannot be read as an ONNX graph ({' '.join(str(error).split())[:200]}).") from error
    source = next(file for file, entry in bundle.graphs.items() if entry["precision"] == "fp32")
    config, _ = config_and_task(bundle)
    network = _weights(onnx.load(str(bundle.verified_path(source))), config)
    return Ranges(path.name, _ranges(_Graph(model, str(path)), network)), digest


@dataclass(frozen=True)
class _Product:
    """A linear layer of the graph that is read: `weight` [outputs, inputs], on a grid of `steps` [outputs] if `rounded`."""

    name: str
    weight: Array
    steps: Array | None
    rounded: bool
    input: ActivationRange | None


def _weights(model: onnx.ModelProto, config: SwinConfig) -> dict[str, Array]:
    """The weights [outputs, inputs] of a bundle's graph by canonical name, as the checkpoint had them."""
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


def _ranges(graph: _Graph, network: Mapping[str, Array]) -> dict[str, LayerRanges]:
    found: dict[str, LayerRanges] = {}
    for product in graph.products():
        names = _same(product, network, found)
        if not names:
            raise InputError(
                f"{graph.path} has a quantised layer, {product.name}, whose weights {list(product.weight.shape)} are none "
                f"of the bundle's. Expected the same network: export the bundle from the checkpoint of this graph."
            )
        steps = None if product.steps is None else np.split(product.steps, len(names))
        for number, name in enumerate(names):
            before = found.get(name, LayerRanges())
            weight = before.weight if steps is None else tuple(float(step) for step in steps[number])
            found[name] = LayerRanges(largest((before.input, product.input)), None, weight)
    if not found:
        raise InputError(
            f"{graph.path} has no QuantizeLinear and DequantizeLinear in 8 bits at a linear layer. Expected a graph as "
            f"torch.onnx.export writes it of a model with fake quantisation."
        )
    return found


def _same(product: _Product, network: Mapping[str, Array], taken: Mapping[str, Any]) -> tuple[str, ...]:
    """The layers of the network that the product is: one, or the three that a joined projection is; empty where there is none.

    Of several with the same weights, the first that is not `taken`.
    """
    groups: list[tuple[str, ...]] = [(name,) for name in network]
    attentions = [name.removesuffix("query") for name in network if name.endswith(".query")]
    groups += [tuple(f"{name}{part}" for part in PARTS) for name in attentions]
    fit = [group for group in groups if _equal(product, [network[name] for name in group])]
    return next((group for group in fit if not set(group) & taken.keys()), fit[0] if fit else ())


def _equal(product: _Product, weights: list[Array]) -> bool:
    rows = sum(len(weight) for weight in weights)
    if (rows, weights[0].shape[1]) != product.weight.shape:
        return False
    first, wanted = 0, product.weight
    for weight in weights:
        ours = weight.astype(np.float64)
        theirs = wanted[first : first + len(weight)]
        allowed: Any = EQUAL * np.abs(ours).max()
        if product.rounded and product.steps is not None:
            steps = product.steps[first : first + len(weight), None]
            ours = np.clip(ours, -128 * steps, 127 * steps)
            allowed = allowed + 0.5 * steps
        if (np.abs(ours - theirs) > allowed).any():
            return False
        first += len(weight)
    return True


class _Graph:
    """The graph that is read."""

    def __init__(self, model: onnx.ModelProto, path: str) -> None:
        import onnx

        self.path, self.numpy = path, onnx.numpy_helper
        self.nodes = list(model.graph.node)
        self.maker = {name: node for node in self.nodes for name in node.output}
        self.constants = {tensor.name: tensor for tensor in model.graph.initializer}
        for node in self.nodes:
            values = [a.t for a in node.attribute if a.name == "value"]
            if node.op_type == "Constant" and values:
                self.constants[node.output[0]] = values[0]
            elif node.op_type == "Identity" and node.input[0] in self.constants:  # torch keeps equal constants once
                self.constants[node.output[0]] = self.constants[node.input[0]]

    def products(self) -> Iterator[_Product]:
        """Every linear layer that has a quantised weight or input."""
        for node in self.nodes:
            if node.op_type not in ("MatMul", "Gemm", "Conv") or len(node.input) < 2:
                continue
            found = self._weight(node.input[1])
            if found is None or found[0].ndim < 2:
                continue
            weight, steps, rounded = found
            if node.op_type == "Conv" and np.prod(weight.shape[2:]) != 1:  # the patch embedding, which is not quantised
                continue
            turned = node.op_type == "MatMul" or (node.op_type == "Gemm" and not self._attribute(node, "transB"))
            if not turned:  # a convolution's has further axes of length 1
                weight, steps = weight.reshape(weight.shape[:2]), None if steps is None else steps.reshape(weight.shape[:2])
            if weight.ndim != 2:
                continue
            if turned:
                weight, steps = weight.T, None if steps is None else steps.T
            if steps is not None and (steps != steps[:, :1]).any():
                raise InputError(
                    f"{self.path}: the weight of {node.name} has steps by input channel; expected them by output channel."
                )
            read = self._activation(node.input[0], node.name)
            if steps is not None or read is not None:
                yield _Product(node.name, weight, None if steps is None else steps[:, 0], rounded, read)

    def _weight(self, name: str) -> tuple[Array, Array | None, bool] | None:
        """(values, steps of the same shape or None, whether the values are rounded) of a constant; None for another tensor."""
        if name in self.constants:
            return self._constant(name).astype(np.float64), None, False
        node = self.maker.get(name)
        if node is None:
            return None
        if node.op_type == "DequantizeLinear":
            return self._dequantized(node)
        inner = self._weight(node.input[0]) if node.op_type in ("Cast", "Identity", "Transpose") else None
        if inner is None or node.op_type != "Transpose":
            return inner
        order = self._attribute(node, "perm") or tuple(reversed(range(inner[0].ndim)))
        return inner[0].transpose(order), None if inner[1] is None else inner[1].transpose(order), inner[2]

    def _dequantized(self, node: Any) -> tuple[Array, Array | None, bool] | None:
        quantizer = self._quantizer(node)
        source = quantizer.input[0] if quantizer is not None else node.input[0]
        inner = self._weight(source)
        if inner is None or node.input[1] not in self.constants:
            return None
        kind, zero = self._codes(node, quantizer)
        scale = self._scale(node)
        shape = [1] * inner[0].ndim
        if scale.size > 1:
            shape[self._attribute(node, "axis", 1)] = scale.size
        if scale.size > 1 and inner[0].shape[shape.index(scale.size)] != scale.size:
            raise InputError(
                f"{self.path}: {node.name} has steps by block of a weight; expected one step, or one for each output channel."
            )
        steps = np.broadcast_to(scale.reshape(shape), inner[0].shape)
        values = (
            inner[0]
            if quantizer is not None
            else (inner[0] - zero.reshape(shape if zero.size > 1 else [1] * len(shape))) * steps
        )
        usable = (kind == "int8" and not zero.any()) or (kind == "uint8" and (zero == 128).all()) or kind == FLOAT8
        return (
            values,
            (steps * (448 / 127) if kind == FLOAT8 else steps) if usable else None,
            quantizer is None and kind != FLOAT8,
        )

    def _activation(self, name: str, layer: str) -> ActivationRange | None:
        """The range of a tensor that is quantised in 8 bits, there or before it was only moved."""
        node = self.maker.get(name)
        while node is not None and node.op_type in MOVES:
            node = self.maker.get(node.input[0])
        if node is None or node.op_type != "DequantizeLinear":
            return None
        quantizer = self._quantizer(node)
        if quantizer is None or node.input[1] not in self.constants:
            return None
        (kind, zeros), scale = self._codes(node, quantizer), self._scale(node)
        if scale.size != 1:
            raise InputError(f"{self.path}: the input of {layer} has {scale.size} scales; expected one for the whole tensor.")
        step, zero = float(np.float32(scale.reshape(-1)[0])), int(zeros.reshape(-1)[0])
        if kind == FLOAT8:
            return ActivationRange.symmetric(448 * step)
        if kind not in CODES:
            return None
        lowest, highest = CODES[kind]
        clip = self.maker.get(node.input[0])
        if clip is not None and clip.op_type == "Clip":
            limits = [int(self._constant(bound)) for bound in clip.input[1:3] if bound in self.constants]
            lowest, highest = limits if len(limits) == 2 else (lowest, highest)
        amplitude = (highest - zero if 2 * zero == lowest + highest + 1 else max(zero - lowest, highest - zero)) * step
        return ActivationRange(step, zero + (128 if kind == "int8" else 0), amplitude)

    def _quantizer(self, node: Any) -> Any:
        """The QuantizeLinear in front of a DequantizeLinear; None where its codes are a constant."""
        before = self.maker.get(node.input[0])
        while before is not None and before.op_type in ("Clip", "Cast", "Identity"):
            before = self.maker.get(before.input[0])
        return before if before is not None and before.op_type == "QuantizeLinear" else None

    def _codes(self, node: Any, quantizer: Any) -> tuple[str, Array]:
        """The type of the codes, as NumPy calls it, and their zero point."""
        zeros = [n.input[2] for n in (node, quantizer) if n is not None and len(n.input) > 2 and n.input[2] in self.constants]
        if zeros:
            zero = self._constant(zeros[0])
            return str(zero.dtype), zero.astype(np.int64) if zero.dtype.kind in "iu" else np.zeros(zero.shape)
        codes = node.input[0]
        return (str(self._constant(codes).dtype) if codes in self.constants else "uint8"), np.zeros(1, np.int64)

    def _scale(self, node: Any) -> Array:
        scale = self._constant(node.input[1]).astype(np.float64)
        if not (np.isfinite(scale).all() and (scale >= 0).all()):
            raise InputError(
                f"{self.path}: the scale of {node.name} holds NaN, infinity or a negative number, which is no step."
            )
        return scale

    def _constant(self, name: str) -> Array:
        return np.asarray(self.numpy.to_array(self.constants[name]))

    def _attribute(self, node: Any, name: str, default: Any = None) -> Any:
        return next((tuple(a.ints) or a.i for a in node.attribute if a.name == name), default)
