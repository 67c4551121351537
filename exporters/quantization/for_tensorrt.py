"""A fp32 graph and the ranges of its activations -> the same graph in INT8 or FP8 (E4M3), with fp16 or bf16 between.

The form is the one that TensorRT compiles to the fewest kernels that move the fewest bytes; docs/engines.md has the
experiments. In short: a product of quantised numbers is a kernel that can scale by one number and do nothing else, so what
comes behind it must fit into the kernel after it, and fc1, whose GELU would not, stays narrow and writes quantised numbers.

    projection to q, k, v   quantised; V1: one scale for all three, written narrow; V2: one for each row
    attention products      V2: quantised, because the kernel that adds the biases may as well write quantised numbers
    projection behind       quantised, and what it writes as well; V1 in INT8: narrow, or where that saves bytes its weight only
    fc1                     narrow, GELU and quantisation in one kernel; V1: the LayerNorm in front divides behind the product
    fc2                     quantised; and what it writes as well, except for V1 in FP8
    merging                 quantised
    classifier              its weight only
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from swin_deploy.config import SwinConfig
from swin_deploy.dependencies import require
from swin_deploy.errors import ExportError, UsageError
from swin_deploy.exporters.passes import run_passes
from swin_deploy.exporters.passes.attention import Attention, attentions, constant
from swin_deploy.exporters.passes.base import Graph, Pass, PassRecord
from swin_deploy.exporters.passes.cosine_after_matmul import COSINE_AFTER_PRODUCT, islands
from swin_deploy.exporters.passes.equalized_attention import balanced_attention, query_bias_in_channel
from swin_deploy.exporters.passes.gather_before_norm import GATHER_BEFORE_NORM
from swin_deploy.exporters.passes.norm_after_matmul import norm_behind_product
from swin_deploy.exporters.passes.qkv_without_bias import VALUE_BIAS_IN_PROJECTION
from swin_deploy.exporters.precision import BF16_OPSET, narrow_type, narrow_types, resizing
from swin_deploy.tasks import TaskSpec

from .qdq import FORMATS, Quantizer

if TYPE_CHECKING:
    import onnx

OPSET = 21  # the first whose QuantizeLinear is the one that every compiler and runtime here reads
HEAD = "classifier"
ATTENDED = {"int8": range(513), "fp8": range(32, 1 << 30)}  # tokens of a window for which quantised attention is one kernel


@dataclass(frozen=True)
class Layer:
    """What may be quantised, and the tensors of the fp32 graph whose ranges that takes; `name` is the module's.

    An attention's two products are one such layer, with the name of the attention.
    """

    name: str
    inputs: tuple[str, ...]


@dataclass(frozen=True)
class Changed:
    """What rewrites made of a layer's input x [rows, channels]: (x - shift) * factor, and some channels constant."""

    shift: Any = 0.0
    factor: Any = 1.0
    constants: Mapping[int, float] = field(default_factory=dict)


# (layer, weight [outputs, channels], step of each output [outputs], its input) -> the weight as numbers of the 8-bit type, or
# None for the nearest ones.
Rounding = Callable[[str, Any, Any, Changed], Any]


def quantized_layers(model: onnx.ModelProto, config: SwinConfig, quantization: str) -> tuple[Layer, ...]:
    """Everything in the graph that is quantised where nothing is kept, in the order of the network."""
    if quantization not in FORMATS:
        raise UsageError(f'There is no quantisation "{quantization}". There are: {", ".join(FORMATS)}.')
    gs = require("onnx_graphsurgeon", f"write the {quantization} graph")
    graph = gs.import_onnx(model)
    products = {}
    for attention in attentions(graph):
        if config.version == 2 and attention.query.outputs[0].shape[3] in ATTENDED[quantization]:
            products[attention.qkv.name] = Layer(attention.scope, tuple(_attended(attention).values()))
    layers = []
    for node in [node for node in graph.nodes if node.op == "Gemm"]:
        name, kind, (read, written) = _name(node), _kind(node), (node.inputs[0].name, node.outputs[0].name)
        if kind == "qkv" or kind == "reduction":
            layers.append(Layer(name, (read,)))
        elif kind == "fc2":
            layers.append(Layer(name, (read,) if config.version == 1 and quantization == "fp8" else (read, written)))
        elif kind == "proj" and not (config.version == 1 and quantization == "int8"):
            layers.append(Layer(name, (read, written)))
        elif name == HEAD or kind == "proj":
            layers.append(Layer(name, ()))
        if node.name in products:
            layers.append(products[node.name])
    return tuple(layers)


def quantized_inputs(model: onnx.ModelProto, config: SwinConfig, quantization: str) -> list[str]:
    """The tensors of the fp32 graph whose ranges `quantized_from_fp32` needs, each once."""
    return list(dict.fromkeys(name for layer in quantized_layers(model, config, quantization) for name in layer.inputs))


def refuse_unknown(layers: Iterable[Layer], names: Set[str]) -> None:
    """Raises UsageError for a name that none of `layers` has."""
    known = {layer.name for layer in layers}
    if unknown := sorted(names - known):
        raise UsageError(f'There is no layer "{unknown[0]}" to quantise. There are: {", ".join(sorted(known))}.')


def quantized_from_fp32(
    model: onnx.ModelProto,
    config: SwinConfig,
    task: TaskSpec,
    quantization: str,
    amplitudes: Mapping[str, float],
    narrow: str = "fp16",
    weight_scales: Mapping[str, Any] | None = None,
    keep: Set[str] = frozenset(),
    rounding: Rounding | None = None,
) -> tuple[onnx.ModelProto, tuple[PassRecord, ...]]:
    """The graph in INT8 or FP8, narrow elsewhere, and the rewrites' record. Input and output stay float32.

    `amplitudes` has the largest magnitude to represent of each tensor that `quantized_inputs` names; `weight_scales` may have,
    by layer, the steps of a weight (one, or one for each output channel; not for V1's projections to query, key and value,
    which are brought to one size); `keep` names the layers of `quantized_layers` that stay narrow; `rounding` chooses the
    numbers of a weight, instead of the nearest ones. Raises ExportError where a range is missing or no positive number, and
    where a weight does not fit into the narrow type.
    """
    layers = quantized_layers(model, config, quantization)
    for given in (keep, set(weight_scales or ())):
        refuse_unknown(layers, given)
    used = [layer for layer in layers if layer.name not in keep]
    ranges = {name: _range(amplitudes, name) for layer in used for name in layer.inputs}
    graph = require("onnx_graphsurgeon", f"write the {quantization} graph").import_onnx(model)
    plan = _Plan(config, graph, {layer.name: [ranges[name] for name in layer.inputs] for layer in used})
    quantizer = Quantizer(graph, quantization, narrow_type(narrow), dict(weight_scales or {}))
    if rounding is not None:
        quantizer.rounding = plan.rounding(rounding)
    steps = (
        *((Pass("balanced_attention", plan.balance(quantization), _blocks(1)),) if config.version == 1 else ()),
        VALUE_BIAS_IN_PROJECTION,
        Pass("query_bias_in_channel", lambda graph: query_bias_in_channel(graph, plan.constants), _blocks(1)),
        COSINE_AFTER_PRODUCT,
        GATHER_BEFORE_NORM,
        Pass("norm_behind_product", lambda graph: norm_behind_product(graph, quantizer), _blocks(1)),
        Pass(f"{quantization}_layers", lambda graph: plan.quantize(graph, quantizer), lambda config: len(used)),
        _narrow_types(quantizer, narrow, task, plan),
    )
    records = run_passes(graph, config, steps)
    typed = require("onnx_graphsurgeon", "write the graph").export_onnx(graph)
    for domain in typed.opset_import:
        if not domain.domain:
            domain.version = max(domain.version, BF16_OPSET if narrow == "bf16" else OPSET)
    typed.ir_version = max(typed.ir_version, 10)  # what opset 21 belongs to
    return typed, records


class _Plan:
    """What is done to each layer: `ranges` has, by layer, those of its inputs; a layer that is kept has none.

    `moved` is by how much, at most, values and what is made of them shift as the value's bias goes into the next layer.
    """

    def __init__(self, config: SwinConfig, graph: Graph, ranges: Mapping[str, list[float]]) -> None:
        self.version, self.ranges = config.version, ranges
        self.grown: Mapping[str, float] = {}
        self.moved = {attention.scope: _largest_value_bias(attention) for attention in attentions(graph)}
        self.changed: dict[str, Changed] = {}
        self.projections = {attention.scope: _projected(attention) for attention in attentions(graph)}
        self.epilogues = 0

    @property
    def constants(self) -> dict[str, float]:
        return {f"{name}/Gemm": ranges[0] for name, ranges in self.ranges.items() if name.endswith(".qkv")}

    def balance(self, quantization: str) -> Callable[[Graph], int]:
        def rewrite(graph: Graph) -> int:
            self.grown = balanced_attention(graph, values_by_row=quantization == "int8")
            return len(self.grown)

        return rewrite

    def rounding(self, given: Rounding) -> Callable[[str, Any, Any], Any]:
        """`given`, told what the layer reads now; a third of a projection reads what the whole does."""

        def rounded(layer: str, weight: Any, steps: Any) -> Any:
            module = layer[:-2] if layer.endswith((".q", ".k", ".v")) else layer
            return given(module, weight, steps, self.changed.get(module, Changed()))

        return rounded

    def quantize(self, graph: Graph, quantizer: Quantizer) -> int:
        done = 0
        quantizer.wide |= islands(graph) | resizing(graph)
        found = list(attentions(graph))
        products = [node for node in graph.nodes if node.op == "Gemm"]
        for attention in found:
            self._look(attention)
            done += self._attention(attention, quantizer) + self._qkv(attention, quantizer)
            done += self._projection(attention, quantizer)
        for node in products:
            name, kind = _name(node), _kind(node)
            if name not in self.ranges:
                continue
            if kind == "fc2":
                amplitude, *written = self.ranges[name]
                self.epilogues += 1
                node.inputs[0] = quantizer.in_epilogue(node.inputs[0], amplitude)
                _quantize_weight(quantizer, node, not written)
                if written:
                    _quantize_result(quantizer, node, written[0])
                done += 1
            elif kind == "reduction":
                node.inputs[0] = quantizer.activation(node.inputs[0], self.ranges[name][0])
                _quantize_weight(quantizer, node, self.version == 2)
                done += 1
            elif name == HEAD:
                _as_sum(quantizer, node)
                done += 1
        return done

    def _look(self, attention: Attention) -> None:
        """Takes down what the passes before did to what the attention's two linear layers read."""
        weight, shift = self.projections[attention.scope]
        lengths = [np.linalg.norm(np.asarray(w, np.float64), axis=0) for w in (weight, attention.projection.inputs[1].values)]
        factor = np.divide(lengths[0], lengths[1], out=np.ones_like(lengths[0]), where=lengths[1] > 0)
        self.changed[_name(attention.projection)] = Changed(shift, factor)
        norm = attention.qkv.i()
        norm = norm.i().i().i() if norm.op == "Reshape" and self.version == 1 else norm
        if self.version == 1 and len(norm.inputs) == 3:
            scale, bias = (tensor.values for tensor in norm.inputs[1:])
            constants = {int(one): float(bias[one]) for one in np.flatnonzero(scale == 0)}
            self.changed[_name(attention.qkv)] = Changed(constants=constants)

    def _attention(self, attention: Attention, quantizer: Quantizer) -> int:
        """V2's queries, keys and values, biases added, and the probabilities."""
        ranges = self.ranges.get(attention.scope)
        if ranges is None:
            return 0
        values = _values(attention)
        shifts = (0.0, 0.0, self.moved[attention.scope])
        for vectors, amplitude, shift in zip((attention.query, attention.key, values), ranges, shifts, strict=False):
            reader = vectors.outputs[0].outputs[0]
            last = reader if len(vectors.outputs[0].outputs) == 1 and reader.op == "Add" else vectors
            quantizer.behind(last.outputs[0], amplitude + shift)
        weighted = [node for node in attention.softmax.outputs[0].outputs if node.op == "MatMul"]
        quantizer.behind(attention.softmax.outputs[0], ranges[3], weighted)
        return 1

    def _qkv(self, attention: Attention, quantizer: Quantizer) -> int:
        name, node = _name(attention.qkv), attention.qkv
        if name not in self.ranges:
            return 0
        node.inputs[0] = quantizer.activation(node.inputs[0], self.ranges[name][0])
        if self.version == 2:
            _quantize_weight(quantizer, node, by_channel=True)
        else:
            _split(quantizer, node)
        return 1

    def _projection(self, attention: Attention, quantizer: Quantizer) -> int:
        name, node = _name(attention.projection), attention.projection
        if name not in self.ranges:
            return 0
        if quantizer.format == "fp8" or attention.scope in self.ranges:
            read, written = self.ranges[name]
            read = (read + self.moved[attention.scope]) * self.grown.get(attention.scope, 1.0)
            node.inputs[0] = quantizer.activation(node.inputs[0], read)
            _quantize_weight(quantizer, node, by_channel=False)
            _quantize_result(quantizer, node, written)
            return 1
        # Attention of fp16 that writes INT8 does not write it where a product can read it.
        windows, _, _, tokens, _ = attention.query.outputs[0].shape
        if self.version == 2 or len(node.inputs[1].values) > 2 * windows * tokens:  # else the residual in its kernel saves more
            _quantize_weight(quantizer, node, by_channel=True)
        return 1


def _quantize_weight(quantizer: Quantizer, node: Any, by_channel: bool) -> None:
    node.inputs[1] = quantizer.weight(_name(node), node.inputs[1].values, by_channel)


def _quantize_result(quantizer: Quantizer, node: Any, amplitude: float) -> None:
    """Quantises what the product writes, before its bias, which is added behind."""
    import onnx_graphsurgeon as gs

    result, product, biases = node.outputs[0], gs.Variable(f"{node.name}_product", np.dtype(np.float32)), node.inputs[2:]
    node.inputs, node.outputs = node.inputs[:2], [product]
    back = quantizer.activation(product, amplitude + sum(float(np.abs(bias.values).max()) for bias in biases))
    if biases:
        back = quantizer.node(f"{node.name}/Add", "Add", [back, biases[0]])
    back.inputs[0].outputs = [result]


def _split(quantizer: Quantizer, node: Any) -> None:
    """One product whose result is split into three -> three products with one scale, which the compiler joins its own way."""
    import onnx_graphsurgeon as gs

    (split,) = node.outputs[0].outputs
    results, weight = list(split.outputs), np.asarray(node.inputs[1].values)
    for part, (result, values) in enumerate(zip(results, np.split(weight, 3), strict=True)):
        name = f"{_name(node)}.{'qkv'[part]}"
        inputs = [node.inputs[0], quantizer.weight(name, values, by_channel=False, shared=float(np.abs(weight).max()))]
        biases = (
            [constant(f"{name}.bias", half) for half in np.split(np.asarray(node.inputs[2].values), 3)]
            if node.inputs[2:]
            else []
        )
        result.inputs.clear()
        quantizer.graph.nodes.append(gs.Node("Gemm", f"{name}/Gemm", {"transB": 1}, inputs + biases[part : part + 1], [result]))
    node.inputs.clear()


def _as_sum(quantizer: Quantizer, node: Any) -> None:
    """A product with few rows as sums in fp32: a form that reads quantised weights in the kernel that adds the bias."""
    weight = quantizer.weight(HEAD, node.inputs[1].values, by_channel=True)
    shape = Quantizer.constant(f"{node.name}/shape", np.array([-1, 1, node.inputs[1].values.shape[1]]))
    rows = quantizer.node(f"{node.name}/Reshape", "Reshape", [node.inputs[0], shape])
    result, biases, axis = node.outputs[0], node.inputs[2:], Quantizer.constant(f"{node.name}/axis", np.array([2]))
    scaled = quantizer.node(f"{node.name}/Mul", "Mul", [rows, weight])
    total = quantizer.node(f"{node.name}/ReduceSum", "ReduceSum", [scaled, axis], keepdims=0)
    if biases:
        total = quantizer.node(f"{node.name}/Add", "Add", [total, biases[0]])
    quantizer.wide |= {weight.inputs[0].name, *(f"{node.name}/{op}" for op in ("Mul", "ReduceSum", "Add"))}
    node.inputs.clear()
    node.outputs.clear()
    total.inputs[0].outputs = [result]


def _narrow_types(quantizer: Quantizer, narrow: str, task: TaskSpec, plan: _Plan) -> Pass:
    """As in every narrow graph, and a Cast in front of each deviation and behind it, and in front of each rounding."""
    plain = narrow_types(task, narrow, quantizer.wide)
    rounding = quantizer.format == "int8"
    return Pass(
        plain.name,
        plain.rewrite,
        lambda config: plain.expected(config) + (2 * config.blocks if config.version == 1 else 0) + rounding * plan.epilogues,
    )


def _attended(attention: Attention) -> dict[str, str]:
    """The names of the tensors that the two products of an attention read: query, key, value and probabilities."""
    vectors = {"query": attention.query, "key": attention.key, "value": _values(attention)}
    found = {part: str(node.outputs[0].name) for part, node in vectors.items()}
    return {**found, "probabilities": str(attention.softmax.outputs[0].name)}


def _largest_value_bias(attention: Attention) -> float:
    bias = attention.bias()
    return 0.0 if bias is None else float(np.abs(bias[2 * len(bias) // 3 :]).max())


def _projected(attention: Attention) -> tuple[Any, Any]:
    """The weight of the projection, and the part of its input that is the values' bias."""
    bias = attention.bias()
    return attention.projection.inputs[1].values, 0.0 if bias is None else bias[2 * len(bias) // 3 :]


def _values(attention: Attention) -> Any:
    """The Transpose of the values."""
    return next(node.i(1) for node in attention.softmax.outputs[0].outputs if node.op == "MatMul")


def _name(node: Any) -> str:
    return str(node.name).rpartition("/")[0]


def _kind(node: Any) -> str:
    return _name(node).rpartition(".")[2]


def _blocks(version: int) -> Callable[[SwinConfig], int]:
    return lambda config: config.blocks if config.version == version else 0


def _range(amplitudes: Mapping[str, float], name: str) -> float:
    """The amplitude of a tensor, checked."""
    amplitude = float(amplitudes.get(name, np.nan))
    if not (np.isfinite(amplitude) and amplitude > 0):
        raise ExportError(
            f'The amplitude of "{name}" is {amplitudes.get(name, "missing")}. Expected a positive number for each tensor that '
            f"`quantized_inputs` names; measure the ranges on images that the network is meant for."
        )
    return amplitude
