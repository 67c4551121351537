"""Make the INT8 or FP8 (E4M3) graph for TensorRT, with fp16 or bf16 between the quantized layers.

A matmul of quantized values is a kernel that can scale by one number and do nothing else; what follows must fit into the next
kernel. This layout gives the fewest kernels that move the fewest bytes (docs/design/engine-graphs.md has the experiments):

    projection to q, k, v   quantized; V1: one scale for all three, output in low precision; V2: one scale for each row
    attention matmuls       V2: quantized, because the kernel that adds the biases can write quantized values
    output projection       quantized, and its output as well; V1 in INT8: low precision, or only its weight if that saves bytes
    fc1                     low precision, GELU and quantization in one kernel; V1: the division of the LayerNorm is after fc1
    fc2                     quantized, and its output as well, except for V1 in FP8
    merging                 quantized
    classifier              its weight only
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from swin_deploy.calib.calibrators import TYPE_MAX
from swin_deploy.config import SwinConfig
from swin_deploy.dependencies import require
from swin_deploy.errors import ExportError, UsageError, unknown
from swin_deploy.exporters.passes import run_passes
from swin_deploy.exporters.passes.attention import (
    VALUE_BIAS_IN_PROJECTION,
    AttentionNodes,
    attentions,
    equalized_attention,
    query_bias_in_channel,
)
from swin_deploy.exporters.passes.base import Graph, NetworkCheck, Node, Pass, PassRecord, Tensor, blocks, constant
from swin_deploy.exporters.passes.cosine_attention import COSINE_AFTER_MATMUL, cosine_fallback
from swin_deploy.exporters.passes.layer_norms import GATHER_BEFORE_NORM, norm_after_matmul
from swin_deploy.exporters.precision import BF16_OPSET, QDQ_OPSETS, low_precision, raise_opset, resize_nodes, types_pass
from swin_deploy.exporters.typed_graphs import NewGraph, config_and_task, left_out, network_check, scratch_graph
from swin_deploy.options import QUANTIZED, Array, InspectSpec
from swin_deploy.tasks import TaskSpec

from .equalization import equalized
from .gptq import GptqRounding, InputChange, input_moments
from .qdq import TensorRTWriter, linear_layers

if TYPE_CHECKING:
    import onnx

    from swin_deploy.bundle import Bundle
    from swin_deploy.calib.accuracy_gate import SpeedComparison
    from swin_deploy.calib.data import Samples
    from swin_deploy.options import QuantSpec
    from swin_deploy.qat_ranges import QatRanges

HEAD = "classifier"
ATTENDED = {"int8": range(513), "fp8": range(32, 1 << 30)}  # tokens of a window for which quantized attention is one kernel
OF_ZEROS = 1e-6  # amax of a tensor of zeros; its scale is the smallest
GPTQ_SAMPLES = 512  # more samples change the rounding of a weight little


@dataclass(frozen=True)
class LayerTensors:
    """A layer (a module, or an attention's two matmuls), and the tensors of the fp32 graph whose ranges it needs."""

    name: str
    inputs: tuple[str, ...]


# (layer, weight [outputs, channels], scale [outputs], its input) -> quantized values, or None for the nearest ones
RoundingOfChanged = Callable[[str, Array, Array, InputChange], Array | None]


class TensorRTLayout:
    """A calibrated fp32 graph, from which quantized graphs are made. Without `feeds`, `ranges` must have every range."""

    def __init__(
        self, bundle: Bundle, source: str, model: Any, spec: QuantSpec, feeds: Samples | None, ranges: QatRanges | None
    ) -> None:
        from swin_deploy.calib.collect import CACHE, collect
        from swin_deploy.calib.data import evenly_spread

        self._model, self._precision, self._keep = model, spec.precision, frozenset(spec.keep)
        self._config, self._task = config_and_task(bundle)
        self.check = network_check(bundle, source, model)
        layers = quantized_layers(model, self._config, spec.precision)
        refuse_unknown(layers, self._keep)
        self._layers = [layer for layer in layers if layer.name not in self._keep]
        self.names = tuple(layer.name for layer in self._layers)
        self._rounding: GptqRounding | None = None
        self._source, self._qat_amax, self._weight_scales = "", dict[str, float](), dict[str, Array]()
        if ranges is not None:
            self._source = ranges.source
            self._qat_amax, self._weight_scales = _qat(ranges, model, self._config, spec.precision, layers)
        self._amax = self._qat_amax
        # With samples, the tensors of all layers are measured: it is one pass, and serves other options as well.
        missing = [name for layer in self._layers for name in layer.inputs if name not in self._amax]
        if not missing:
            return
        if feeds is None:
            from swin_deploy.qat_ranges import missing_ranges

            raise missing_ranges(missing, self._source)
        file = bundle.place(source)
        if ranges is None:  # QAT weights were trained with rounding to nearest, and with the channels as they are
            read = {layer.name: layer.input for layer in linear_layers(model) if layer.name in self.names}
            few = replace(feeds, chosen=evenly_spread(feeds.chosen, GPTQ_SAMPLES))
            self._model, moments = equalized(model, input_moments(file, read, _reported(few, spec)), self.check)
            self._rounding = GptqRounding(moments, spec.precision)
        seen = collect(
            file if ranges is not None else self._model, [name for layer in layers for name in layer.inputs], feeds,
            batch=spec.batch, cache=bundle.place(CACHE), progress=spec.progress,
        )  # fmt: skip
        measured = {name: one.compute_amax(spec.method or "mse", spec.precision) or OF_ZEROS for name, one in seen.items()}
        self._amax = {**measured, **self._qat_amax}

    def graph(self, keep: Set[str]) -> NewGraph:
        """Return the quantized graph; the layers `keep` and those of the spec stay in low precision."""
        keep = keep | self._keep
        scales = {name: scale for name, scale in self._weight_scales.items() if name not in keep}
        made, records = quantized_from_fp32(
            self._model, self._config, self._task, self._precision, self._amax, "fp16", scales, keep, self._rounding, self.check
        )
        layers = [
            {
                "name": layer.name,
                "ranges_from": {name: self._source if name in self._qat_amax else "samples" for name in layer.inputs},
                "weight_from": self._source if layer.name in self._weight_scales else "weights",
            }
            for layer in self._layers
            if layer.name not in keep
        ]
        measured = f"{len(layers)} layers are in 8 bits, and {self.check or 'rewrites were not compared'}"
        return NewGraph(made, records, {"amplitudes": self._amax, "layers": layers, **left_out(self.check)}, measured)

    def speed(self, model: Any, gpu: str | None) -> SpeedComparison:
        """Compare `model` with the fp16 graph by the roofline of `gpu`, from the compiler's reports of both."""
        from swin_deploy.calib.accuracy_gate import SpeedComparison
        from swin_deploy.exporters.inspection.costs import inspect_onnx
        from swin_deploy.exporters.precision import typed_from_fp32

        fp16 = typed_from_fp32(self._model, self._config, self._task, "fp16").model
        seconds, where = [], ""
        for graph in (fp16, model):
            with scratch_graph(graph) as path:
                cost = inspect_onnx(path, InspectSpec(gpu=gpu)).engines[0]
            if cost.roofline is None:
                raise UsageError(
                    f"The published peaks of a {cost.gpu} GPU are not known, so the gain of {self._precision} cannot be "
                    f"estimated. Name another one with --gpu, such as rtx-4090, or leave out --min-speedup."
                )
            where = f"roofline of {cost.roofline.gpu}, from the compiler's report"
            seconds.append(cost.roofline.seconds)
        before, after = seconds
        return SpeedComparison(where, "fp16", before, after, before / after)


def _qat(
    ranges: QatRanges, model: Any, config: SwinConfig, precision: str, layers: Iterable[LayerTensors]
) -> tuple[dict[str, float], dict[str, Array]]:
    """Amax by tensor and weight scales by layer, without those of V1's attention, whose weights are equalized."""
    from .qat_layers import qat_layers

    found = qat_layers(ranges, model, config, {layer.name: layer.inputs for layer in layers})
    amax = {tensor: one.amplitude for tensor, one in found.activations.items()}
    factor, unused = np.float32(TYPE_MAX["int8"] / TYPE_MAX[precision]), (".qkv", ".proj") if config.version == 1 else ()
    return amax, {name: scale * factor for name, scale in found.weights.items() if not name.endswith(unused)}


def _reported(samples: Samples, spec: QuantSpec) -> Iterator[dict[str, Any]]:
    done = 0
    for feeds in samples.batches(spec.batch):
        yield feeds
        done += len(next(iter(feeds.values())))
        spec.progress("Measuring channels", done, len(samples))


def quantized_layers(model: onnx.ModelProto, config: SwinConfig, precision: str) -> tuple[LayerTensors, ...]:
    """List all that "int8" or "fp8" quantizes if nothing is kept, in the order of the network."""
    if precision not in QUANTIZED:
        raise unknown("quantized precision", precision, QUANTIZED)
    graph = require("onnx_graphsurgeon", f"write the {precision} graph").import_onnx(model)
    attended = {}
    for attention in attentions(graph):
        if config.version == 2 and attention.query.outputs[0].shape[3] in ATTENDED[precision]:
            tensors = [node.outputs[0].name for node in (attention.query, attention.key, attention.value, attention.softmax)]
            attended[attention.qkv.name] = LayerTensors(attention.scope, tuple(map(str, tensors)))
    layers = []
    for node in [node for node in graph.nodes if node.op == "Gemm"]:
        name, kind, (read, written) = _name(node), _kind(node), (node.inputs[0].name, node.outputs[0].name)
        if kind == "qkv" or kind == "reduction":
            layers.append(LayerTensors(name, (read,)))
        elif kind == "fc2":
            layers.append(LayerTensors(name, (read,) if config.version == 1 and precision == "fp8" else (read, written)))
        elif kind == "proj" and not (config.version == 1 and precision == "int8"):
            layers.append(LayerTensors(name, (read, written)))
        elif (name == HEAD and config.global_pool) or kind == "proj":  # without pooling, it has as many rows as other layers
            layers.append(LayerTensors(name, ()))
        if node.name in attended:
            layers.append(attended[node.name])
    return tuple(layers)


def refuse_unknown(layers: Iterable[LayerTensors], names: Set[str]) -> None:
    """Raise UsageError for a name that none of `layers` has."""
    known = {layer.name for layer in layers}
    for name in sorted(names - known):
        raise unknown("layer", name, sorted(known))


def quantized_from_fp32(
    model: onnx.ModelProto,
    config: SwinConfig,
    task: TaskSpec,
    precision: str,
    amax: Mapping[str, float],
    low: str = "fp16",
    weight_scales: Mapping[str, Any] | None = None,
    keep: Set[str] = frozenset(),
    rounding: RoundingOfChanged | None = None,
    check: NetworkCheck | None = None,
) -> tuple[onnx.ModelProto, tuple[PassRecord, ...]]:
    """Make the "int8" or "fp8" graph, with `low` for what is not quantized; its inputs and outputs stay float32.

    `amax` has each tensor that `quantized_layers` names, `weight_scales` the scale of a layer's weight, or one for each output;
    V1's attention has none. Layers of `keep` are not quantized. `check` compares the rewritten fp32 network with `model`.
    Raises ExportError for an amax that is not a positive number.
    """
    layers = quantized_layers(model, config, precision)
    refuse_unknown(layers, keep | set(weight_scales or ()))
    used = [layer for layer in layers if layer.name not in keep]
    ranges = {layer.name: [_checked_amax(amax, name) for name in layer.inputs] for layer in used}
    gs = require("onnx_graphsurgeon", f"write the {precision} graph")
    graph = gs.import_onnx(model)
    plan = _Plan(config, graph, ranges, TensorRTWriter(graph, precision, low_precision(low), dict(weight_scales or {})))
    writer = plan.writer
    if rounding is not None:
        writer.rounding = plan.rounding(rounding)
    qkv_amax = {f"{name}/Gemm": ranges[0] for name, ranges in plan.ranges.items() if name.endswith(".qkv")}
    exact = (
        *((Pass("equalized_attention", plan.equalize, blocks(1)),) if config.version == 1 else ()),
        VALUE_BIAS_IN_PROJECTION,
        Pass("query_bias_in_channel", lambda graph: query_bias_in_channel(graph, qkv_amax), blocks(1)),
        COSINE_AFTER_MATMUL,
        GATHER_BEFORE_NORM,
        Pass("norm_after_matmul", lambda graph: norm_after_matmul(graph, writer.fallback), blocks(1)),
    )
    records = run_passes(graph, config, exact, check)
    counted = not (check and check.left_out)
    records += run_passes(
        graph,
        config,
        (
            Pass(f"{precision}_layers", plan.quantize, lambda config: len(used)),
            types_pass(task, low, writer.fallback, counted, plan.further_casts),
        ),
    )
    typed = gs.export_onnx(graph)
    raise_opset(typed, BF16_OPSET if low == "bf16" else QDQ_OPSETS[precision])
    typed.graph.name += f"_{precision}_for_tensorrt"  # other runtimes show it
    typed.doc_string = (
        f"{precision.upper()} graph for TensorRT. ONNX Runtime computes it as well. OpenVINO computes INT8 only with "
        f"INFERENCE_PRECISION_HINT f32; in bf16, its default on some processors, it gives wrong results."
    )
    return typed, records


class _Plan:
    """What is done to each layer: `ranges` has the amax of its tensors, by layer; a layer that is kept has none."""

    def __init__(self, config: SwinConfig, graph: Graph, ranges: Mapping[str, list[float]], writer: TensorRTWriter) -> None:
        self.version, self.ranges, self.writer = config.version, ranges, writer
        self.grown: Mapping[str, float] = {}
        self.changes: dict[str, InputChange] = {}
        self.epilogues = 0
        # By attention: how far values shift at most as their bias moves into the next layer, and the original projection.
        self.moved: dict[str, float] = {}
        self.projections: dict[str, tuple[Any, Any]] = {}
        for attention in attentions(graph):
            bias = attention.value_bias()
            self.moved[attention.scope] = 0.0 if bias is None else float(np.abs(bias).max())
            self.projections[attention.scope] = attention.projection.inputs[1].values, 0.0 if bias is None else bias

    def equalize(self, graph: Graph) -> int:
        self.grown = equalized_attention(graph, values_by_row=self.writer.format == "int8")
        return len(self.grown)

    def rounding(self, given: RoundingOfChanged) -> Callable[[str, Array, Array], Array | None]:
        """Return `given` with what the layer reads now; a third of a projection reads what the whole does."""

        def rounded(layer: str, weight: Array, scale: Array) -> Array | None:
            module = layer[:-2] if layer.endswith((".q", ".k", ".v")) else layer
            return given(module, weight, scale, self.changes.get(module, InputChange()))

        return rounded

    def further_casts(self, config: SwinConfig) -> int:
        """The number of Casts around each deviation (V1) and before each rounding in an epilogue (INT8)."""
        return (2 * config.blocks if self.version == 1 else 0) + (self.epilogues if self.writer.format == "int8" else 0)

    def quantize(self, graph: Graph) -> int:
        done = 0
        self.writer.fallback |= cosine_fallback(graph) | resize_nodes(graph)
        gemms = [node for node in graph.nodes if node.op == "Gemm"]
        for attention in list(attentions(graph)):
            self._record_changes(attention)
            done += self._attention(attention) + self._qkv(attention) + self._projection(attention)
        for node in gemms:
            name, kind = _name(node), _kind(node)
            if name not in self.ranges or not (kind in ("fc2", "reduction") or name == HEAD):
                continue
            done += 1
            if kind == "fc2":
                read, *written = self.ranges[name]
                self.epilogues += 1
                node.inputs[0] = self.writer.in_epilogue(node.inputs[0], read)
                self._weight(node, not written)
                if written:
                    self._output(node, written[0])
            elif kind == "reduction":
                node.inputs[0] = self.writer.activation(node.inputs[0], self.ranges[name][0])
                self._weight(node, self.version == 2)
            else:
                self._head(node)
        return done

    def _record_changes(self, attention: AttentionNodes) -> None:
        """Note what the passes before did to the inputs of the attention's two linear layers."""
        weight, shift = self.projections[attention.scope]
        norms = [np.linalg.norm(np.asarray(w, np.float64), axis=0) for w in (weight, attention.projection.inputs[1].values)]
        factor = np.divide(norms[0], norms[1], out=np.ones_like(norms[0]), where=norms[1] > 0)
        self.changes[_name(attention.projection)] = InputChange(shift, factor)
        norm = attention.qkv.i()
        norm = norm.i().i().i() if norm.op == "Reshape" and self.version == 1 else norm
        if self.version == 1 and len(norm.inputs) == 3:
            scale, bias = (tensor.values for tensor in norm.inputs[1:])
            constants = {int(one): float(bias[one]) for one in np.flatnonzero(scale == 0)}
            self.changes[_name(attention.qkv)] = InputChange(constants=constants)

    def _attention(self, attention: AttentionNodes) -> int:
        """Quantize V2's queries, keys and values, biases added, and the probabilities."""
        ranges = self.ranges.get(attention.scope)
        if ranges is None:
            return 0
        shifts = (0.0, 0.0, self.moved[attention.scope])
        vectors = (attention.query, attention.key, attention.value)
        for node, amax, shift in zip(vectors, ranges, shifts, strict=False):
            reader = node.outputs[0].outputs[0]
            # Not after the Transpose: OpenVINO would give all rows the scale of the first one.
            biased = len(node.outputs[0].outputs) == 1 and reader.op == "Add"
            self.writer.after(reader.outputs[0] if biased else node.i().inputs[0], amax + shift)
        weighted = [node for node in attention.softmax.outputs[0].outputs if node.op == "MatMul"]
        self.writer.after(attention.softmax.outputs[0], ranges[3], weighted)
        return 1

    def _qkv(self, attention: AttentionNodes) -> int:
        name, node = _name(attention.qkv), attention.qkv
        if name not in self.ranges:
            return 0
        node.inputs[0] = self.writer.activation(node.inputs[0], self.ranges[name][0])
        if self.version == 2:
            self._weight(node, per_channel=True)
        else:
            self._split(node)
        return 1

    def _projection(self, attention: AttentionNodes) -> int:
        name, node = _name(attention.projection), attention.projection
        if name not in self.ranges:
            return 0
        if self.writer.format == "fp8" or attention.scope in self.ranges:
            read, written = self.ranges[name]
            read = (read + self.moved[attention.scope]) * self.grown.get(attention.scope, 1.0)
            node.inputs[0] = self.writer.activation(node.inputs[0], read)
            self._weight(node, per_channel=False)
            self._output(node, written)
            return 1
        # INT8 that fp16 attention writes is not in the layout that a matmul reads.
        windows, _, _, tokens, _ = attention.query.outputs[0].shape
        if self.version == 2 or len(node.inputs[1].values) > 2 * windows * tokens:  # else the residual in its kernel saves more
            self._weight(node, per_channel=True)
        return 1

    def _weight(self, node: Node, per_channel: bool) -> None:
        node.inputs[1] = self.writer.weight(_name(node), node.inputs[1].values, per_channel)

    def _output(self, node: Node, amax: float) -> None:
        """Quantize the output of a matmul before its bias, which is added after."""
        import onnx_graphsurgeon as gs

        result, biases = node.outputs[0], node.inputs[2:]
        matmul = gs.Variable(f"{node.name}_matmul", np.dtype(np.float32))
        node.inputs, node.outputs = node.inputs[:2], [matmul]
        back = self.writer.activation(matmul, amax + sum(float(np.abs(bias.values).max()) for bias in biases))
        if biases:
            back = self.writer.node(f"{node.name}/Add", "Add", [back, biases[0]])
        back.inputs[0].outputs = [result]

    def _split(self, node: Node) -> None:
        """Replace a matmul whose output is split into three by three with one scale, which the compiler joins its own way."""
        import onnx_graphsurgeon as gs

        (split,) = node.outputs[0].outputs
        results, weight = list(split.outputs), np.asarray(node.inputs[1].values)
        for part, (result, values) in enumerate(zip(results, np.split(weight, 3), strict=True)):
            name = f"{_name(node)}.{'qkv'[part]}"
            inputs = [node.inputs[0], self.writer.weight(name, values, False, shared_amax=float(np.abs(weight).max()))]
            if node.inputs[2:]:
                inputs.append(constant(f"{name}.bias", np.split(np.asarray(node.inputs[2].values), 3)[part]))
            result.inputs.clear()
            self.writer.graph.nodes.append(gs.Node("Gemm", f"{name}/Gemm", {"transB": 1}, inputs, [result]))
        node.inputs.clear()

    def _head(self, node: Node) -> None:
        """Write a matmul with few rows as sums in fp32: the kernel that adds the bias then reads the quantized weights."""
        writer, (classes, columns) = self.writer, node.inputs[1].values.shape
        weight = writer.weight(HEAD, node.inputs[1].values, per_channel=True)
        integers = {"shape": [-1, 1, columns], "axis": [2], "flat": [-1, classes]}
        shape, axis, flat = (constant(f"{node.name}/{name}", values, np.int64) for name, values in integers.items())
        rows = writer.node(f"{node.name}/Reshape", "Reshape", [node.inputs[0], shape])
        result, biases = node.outputs[0], node.inputs[2:]
        scaled = writer.node(f"{node.name}/Mul", "Mul", [rows, weight])
        summed = writer.node(f"{node.name}/ReduceSum", "ReduceSum", [scaled, axis], keepdims=1)
        # The Reshape keeps OpenVINO from adding the bias in the ReduceSum, where it adds a wrong one from batch 2 on.
        total: Tensor = writer.node(f"{node.name}/Flatten", "Reshape", [summed, flat])
        if biases:
            total = writer.node(f"{node.name}/Add", "Add", [total, biases[0]])
        writer.fallback |= {weight.inputs[0].name, *(f"{node.name}/{op}" for op in ("Mul", "ReduceSum", "Flatten", "Add"))}
        node.inputs.clear()
        node.outputs.clear()
        total.inputs[0].outputs = [result]


def _name(node: Node) -> str:
    return str(node.name).rpartition("/")[0]


def _kind(node: Node) -> str:
    return _name(node).rpartition(".")[2]


def _checked_amax(amax: Mapping[str, float], name: str) -> float:
    value = float(amax.get(name, np.nan))
    if not (np.isfinite(value) and value > 0):
        raise ExportError(
            f'The amax of "{name}" is {amax.get(name, "missing")}. Expected a positive number for each tensor that '
            f"`quantized_layers` names. Measure the ranges on images like those of the application."
        )
    return value
