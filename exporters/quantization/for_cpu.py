"""Quantize a network to INT8 for ONNX Runtime or OpenVINO, layer by layer; each makes up for the error of those before."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import partial, reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from swin_deploy.calib.collect import session_for
from swin_deploy.calib.data import evenly_spread
from swin_deploy.calib.observers import Observation
from swin_deploy.dependencies import require
from swin_deploy.errors import InputError, unknown
from swin_deploy.exporters.typed_graphs import NewGraph, config_and_task, left_out, network_check, scratch_graph
from swin_deploy.files import scratch_folder
from swin_deploy.machine import PAIR_LIMIT
from swin_deploy.options import Array
from swin_deploy.parity import sqnr

from .equalization import (
    ChannelStatistics,
    GraphIndex,
    best_factors,
    channels_of,
    equalize_all,
    with_own_constants,
)
from .gptq import (
    LayerMoments,
    best_activation_scale,
    pair_sums,
    quantized_activation,
    refuse_not_finite,
    rounded_linear,
    scale_of_range,
)
from .layerwise import ArrayStore, Kept, LayerwiseRun
from .qat_layers import QatLayers, qat_layers
from .qdq import ActivationScale, LinearLayer, QuantizedLinear, linear_layers, qdq_nodes, with_nodes
from .resume import ResumeState

if TYPE_CHECKING:
    import onnx

    from swin_deploy.bundle import Bundle
    from swin_deploy.calib.accuracy_gate import SpeedComparison
    from swin_deploy.calib.data import Samples
    from swin_deploy.exporters.passes.base import NetworkCheck
    from swin_deploy.options import QuantSpec
    from swin_deploy.qat_ranges import QatRanges

_LOG = logging.getLogger(__name__)
NO_SAMPLES = "There are no samples to calibrate with. Expected at least one batch."
SampleFeeds = Callable[[], Iterable[Mapping[str, Array]]]  # yields the samples batch by batch
MAX_SAMPLES = 256  # each layer runs all samples through the layers before it; more samples change little
SAMPLED = 1 << 17  # values from which the range of an activation is chosen
TOKENS = 1 << 14  # of the input of a layer, in all samples together, for which its weights are chosen
ALGORITHM = 2  # raised when the same samples give another graph: what an earlier release made is then made again
HEADS = frozenset({"classifier"})  # one small matmul for each image, which decides every answer
SMALL = 1 << 14  # weights of one layer: 128 x 128 is small, 96 x 384 is not


class CpuLayout:
    """A quantized fp32 graph, from which graphs with fewer quantized layers are made. Without `feeds`, `ranges` has all."""

    def __init__(
        self,
        bundle: Bundle,
        source: str,
        model: Any,
        spec: QuantSpec,
        feeds: Samples | None,
        ranges: QatRanges | None,
        open_graph: Callable[[Path], Any],
    ) -> None:
        from swin_deploy.calib.collect import CACHE

        self._model, self._feeds, self._open = model, feeds, open_graph
        resume, qat = None, QatLayers()
        if ranges is not None:
            config, _ = config_and_task(bundle)
            qat = qat_layers(ranges, model, config, {layer.name: (layer.input,) for layer in linear_layers(model)})
        if feeds is not None:
            self._feeds = replace(feeds, chosen=evenly_spread(feeds.chosen, MAX_SAMPLES))
            if len(self._feeds) < len(feeds):
                _LOG.info("Calibrating with %d of the %d samples, evenly spread", len(self._feeds), len(feeds))
            if ranges is None:
                release = require("onnxruntime", "quantize a model").__version__
                releases = ALGORITHM, np.__version__, release
                facts = (spec.target, spec.method, sorted(spec.keep), spec.batch, releases, self._feeds.fingerprint)
                resume = ResumeState.for_run(bundle.place(CACHE), model, *facts)
        batches = None if self._feeds is None else partial(self._feeds.batches, spec.batch)
        self.check = network_check(bundle, source, model)
        self._graphs = quantize_for_cpu(
            model, str(spec.target), batches, spec.method, frozenset(spec.keep), qat, resume, self.check
        )
        self.names = tuple(self._graphs.layers)

    def graph(self, keep: Set[str]) -> NewGraph:
        """Return the quantized graph, in which the layers `keep` stay fp32."""
        used: dict[str, Any] = {} if self._feeds is None else {"calibrated_with": len(self._feeds)}
        records = [record for record in self._graphs.records if record["name"] not in keep]
        measured = f"{len(records)} layers are in 8 bits, and {self.check or 'rewrites were not compared'}"
        made = self._graphs.model(keep)
        if self._graphs.fits_16_bits(keep):
            used["sum_bits"] = 16
            # For measurements of speed and accuracy; the file gets it from its entry.
            require("onnx", "write the quantized graph").helper.set_model_props(made, {"sum_bits": "16"})
        return NewGraph(made, (), {"layers": records, **used, **left_out(self.check)}, measured)

    def speed(self, model: Any, gpu: str | None) -> SpeedComparison:
        """Measure `model` against the fp32 graph on this machine, one image at a time."""
        from swin_deploy.calib.accuracy_gate import compare_speed

        assert self._feeds is not None
        feed = next(self._feeds.batches(1))
        with scratch_graph(self._model) as before, scratch_graph(model) as after:
            return compare_speed(lambda: self._open(before), lambda: self._open(after), feed, "fp32")


@dataclass(frozen=True)
class CpuGraphs:
    """A quantized network: the fp32 graph with equalized channels, its layers in INT8, and their entries in the manifest.

    With `three_axes`, LayerNorms before quantized layers have three axes, and with `zero_in_bias`, activations have no zero
    point after they are quantized: both for OpenVINO.
    """

    base: onnx.ModelProto
    layers: Mapping[str, QuantizedLinear]
    records: tuple[dict[str, Any], ...]
    three_axes: bool = False
    zero_in_bias: bool = False

    def model(self, keep: Set[str] = frozenset()) -> onnx.ModelProto:
        """Return the graph with Q/DQ, in which the layers `keep` stay fp32."""
        layers = [layer for name, layer in self.layers.items() if name not in keep]
        nodes, constants = qdq_nodes(self.base.graph.node, layers, self.zero_in_bias)
        made = with_nodes(self.base, nodes, constants.values())
        return norms_of_three_axes(made, {layer.layer.input for layer in layers}) if self.three_axes else made

    def fits_16_bits(self, keep: Set[str] = frozenset()) -> bool:
        """Return whether sums of two products fit into 16 bits in all layers but `keep`; weights of QAT may be too large."""
        return all((pair_sums(layer.values) <= PAIR_LIMIT).all() for name, layer in self.layers.items() if name not in keep)


def quantize_for_cpu(
    model: onnx.ModelProto,
    target: str,
    feeds: SampleFeeds | None,
    method: str | None = None,
    keep: Set[str] = frozenset(),
    qat: QatLayers | None = None,
    resume: ResumeState | None = None,
    check: NetworkCheck | None = None,
) -> CpuGraphs:
    """Quantize the linear layers of `model` to INT8, with ranges of `qat`, or from `feeds` by `method`.

    `check` compares the rewritten fp32 network with `model`. In fp32 stay `keep`, a classifier that was not trained in 8 bits,
    and for OpenVINO layers that are not faster.
    """
    from onnx import numpy_helper

    qat, model = qat or QatLayers(), with_own_constants(model)
    heads = [layer for layer in linear_layers(model) if layer.name.split(".")[0] in HEADS]
    keep = keep | {layer.name for layer in heads if not qat.covers([layer])}
    groups = _groups(model, keep | small_layers(model) if target == "openvino" else keep)
    if feeds is None:
        qat.refuse_missing(layer for layers in groups.values() for layer in layers)
        feeds = tuple
    with scratch_folder("quantize") as scratch:
        store, inputs, batches = ArrayStore(scratch), dict[str, LayerInput](), list[dict[str, Kept]]()
        if not all(map(qat.covers, groups.values())):
            batches = [{name: store.keep(array) for name, array in feed.items()} for feed in feeds()]
            inputs = layer_inputs(model, groups, batches, store)
        model, divisors = equalized_for_cpu(model, inputs, groups, qat, check)
        three_axes = target == "openvino" and (
            check is None or check.accepts(norms_of_three_axes(model, set(groups)), "norms of three axes")
        )
        weights = {tensor.name: tensor for tensor in model.graph.initializer}
        done: dict[str, QuantizedLinear] = {}
        records: list[dict[str, Any]] = []
        count = sum(map(len, groups.values()))
        run: LayerwiseRun | None = None
        for name, layers in groups.items():
            first, last = len(done) + 1, len(done) + len(layers)
            which = f"layers {first} to {last}" if last > first else f"layer {first}"
            _LOG.info("Quantizing %s (%s of %d)", layers[0].name, which, count)
            matrices = [numpy_helper.to_array(weights[layer.weight]) for layer in layers]
            biases = [None if layer.bias is None else numpy_helper.to_array(weights[layer.bias]) for layer in layers]
            scale = qat.scale(name)
            known = None if resume is None else resume.read(layers)
            if scale is None or not qat.covers(layers):
                if run is None:
                    run, batches = LayerwiseRun(model, batches, store), []
                run.nodes, constants = qdq_nodes(model.graph.node, done.values())
                run.constants |= constants

                def values(name: str = name, run: LayerwiseRun = run) -> Iterator[Array]:
                    return (batch.reshape(-1, batch.shape[-1]) for batch in run.advance(name))

                if known is not None:
                    # The run advances step by step as before: in one step ONNX Runtime fuses more, and the last bits differ.
                    for _ in values():
                        pass
                    scale = known[0].activation
                if scale is None and method is None:
                    scale = _best_scale(values(), np.square(np.concatenate(matrices)).sum(axis=0))
                elif scale is None and method is not None:
                    seen = (Observation.of(batch, len(batch), f"The tensor {name}") for batch in values())
                    scale = scale_of_range(*reduce(Observation.merged, seen).compute_range(method))
                assert scale is not None
                moments = LayerMoments(np.concatenate(matrices))
                for ours, (tokens, fp32) in zip(values(), inputs[name].sampled, strict=True) if known is None else ():
                    moments.add(quantized_activation(ours[tokens], scale), store.read(fp32) / divisors.get(name, 1))
            if known is None and not qat.covers(layers):
                rounded = rounded_linear(matrices, biases, moments)
            for position, (layer, matrix, bias) in enumerate(zip(layers, matrices, biases, strict=True)):
                if known is not None:
                    made = known[position]
                elif layer.name in qat.weights:
                    made = qat.quantized(layer, matrix, bias, scale).with_bias_in_range()
                else:
                    made = QuantizedLinear(layer, *rounded[position], scale).with_bias_in_range()
                if resume is not None and known is None:
                    resume.save(made)
                done[layer.name] = made
                records.append(_record(made, matrix, qat))
            for _, fp32 in inputs.pop(name).sampled if name in inputs else ():
                store.drop(fp32)
    if resume is not None:
        resume.clear()
    return CpuGraphs(model, done, tuple(records), three_axes, zero_in_bias=target == "openvino")


@dataclass(frozen=True)
class LayerInput:
    """The activation that a linear layer reads: statistics of its channels, and some tokens of each batch."""

    statistics: ChannelStatistics
    sampled: list[tuple[Array, Kept]]  # the numbers of the tokens, and their fp32 values [tokens, channels]


def equalized_for_cpu(
    model: onnx.ModelProto,
    inputs: Mapping[str, LayerInput],
    groups: Mapping[str, list[LinearLayer]],
    qat: QatLayers,
    check: NetworkCheck | None = None,
) -> tuple[onnx.ModelProto, dict[str, Array]]:
    """Return `model` with equalized channels, except for those for which `qat` has ranges, and their divisors by tensor."""
    from onnx import numpy_helper

    layers = tuple(layer for group in groups.values() for layer in group)
    if all(qat.prevents([layer], {layer.weight}, set()) for layer in layers):
        return model, {}
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    read = {layer.weight: (name, numpy_helper.to_array(weights[layer.weight])) for name in groups for layer in groups[name]}
    statistics = {name: one.statistics for name, one in inputs.items()}
    chosen = (
        (one, factors)
        for one in channels_of(GraphIndex(model), layers)
        if not qat.prevents(layers, one.read, {name for name, *_ in one.written})
        if (factors := best_factors(one, read, statistics)) is not None
    )
    result, accepted = equalize_all(with_nodes(model, model.graph.node, []), chosen, check)
    divisors = {
        name: np.tile(factors, len(inputs[name].statistics.amax) // one.width)
        for one, factors in accepted
        for name in one.tensors & groups.keys()
    }
    return result, divisors


def layer_inputs(
    model: onnx.ModelProto, names: Iterable[str], batches: Sequence[Mapping[str, Kept]], store: ArrayStore
) -> dict[str, LayerInput]:
    """Measure some tokens of the tensors `names` [tokens, channels]. They are chosen in the graph to save memory."""
    from onnx import TensorProto, helper

    if not batches:
        raise InputError(NO_SAMPLES)
    names, watched = list(names), type(model)()
    watched.CopyFrom(model)
    for name in names:
        watched.graph.input.append(helper.make_tensor_value_info(f"{name}/tokens", TensorProto.INT64, [None]))
        watched.graph.node.append(helper.make_node("Shape", [name], [f"{name}/shape"]))
        watched.graph.node.append(helper.make_node("Gather", [name, f"{name}/tokens"], [f"{name}/sampled"], axis=0))
    run = session_for(watched, [f"{name}/{part}" for name in names for part in ("shape", "sampled")], 0)
    one_token, draw = {f"{name}/tokens": np.zeros(1, np.int64) for name in names}, np.random.default_rng(0)
    sampled: dict[str, list[tuple[Array, Kept]]] = {name: [] for name in names}
    amax: dict[str, Array] = {}
    square: dict[str, Array] = {}
    for batch in batches:
        feed = {name: store.read(kept) for name, kept in batch.items()}
        images = len(next(iter(feed.values())))
        if batch is batches[0]:
            found = run({**{name: array[:1] for name, array in feed.items()}, **one_token})
            tokens = {name: int(found[f"{name}/shape"][0]) for name in names}  # of one image
        chosen = {}
        for name in names:
            there, most = tokens[name] * images, -(-TOKENS // len(batches))
            few = draw.choice(there, most, replace=False, shuffle=False) if there > most else np.arange(there)
            chosen[f"{name}/tokens"] = np.sort(few)
        values = run({**feed, **chosen})
        for name in names:
            rows = values[f"{name}/sampled"]
            refuse_not_finite(rows, name)
            sampled[name].append((chosen[f"{name}/tokens"], store.keep(rows)))
            amax[name] = np.maximum(amax.get(name, 0), np.abs(rows).max(axis=0))
            square[name] = square.get(name, 0) + np.square(rows, dtype=np.float64).sum(axis=0)
    counts = {name: sum(len(one) for one, _ in sampled[name]) for name in names}
    return {name: LayerInput(ChannelStatistics(amax[name], square[name] / counts[name]), sampled[name]) for name in names}


def small_layers(model: onnx.ModelProto) -> frozenset[str]:
    """Return the names of the layers that OpenVINO does not run faster in 8 bits."""
    sizes = {tensor.name: int(np.prod(tensor.dims)) for tensor in model.graph.initializer}
    return frozenset(layer.name for layer in linear_layers(model) if sizes[layer.weight] <= SMALL)


def norms_of_three_axes(model: onnx.ModelProto, quantized: Set[str]) -> onnx.ModelProto:
    """Put a Reshape around each LayerNorm that writes one of `quantized`: OpenVINO fuses it with quantization on three axes."""
    onnx = require("onnx", "write the quantized graph")
    graph, nodes, constants = GraphIndex(model), [], {}
    for node in model.graph.node:
        channels = graph.widths.get(node.output[0])
        if node.op_type != "LayerNormalization" or node.output[0] not in quantized or channels is None:
            nodes.append(node)
            continue
        name, make = node.output[0], onnx.helper.make_node
        for shape in ((1, -1, channels), (-1, channels)):
            key = "reshape/" + "x".join(map(str, shape))
            constants[key] = onnx.numpy_helper.from_array(np.array(shape, np.int64), key)
        norm = onnx.NodeProto.FromString(node.SerializeToString())
        norm.input[0], norm.output[0] = f"{name}/input", f"{name}/normed"
        nodes += [
            make("Reshape", [node.input[0], f"reshape/1x-1x{channels}"], [norm.input[0]], f"{node.name}/Reshape"),
            norm,
            make("Reshape", [norm.output[0], f"reshape/-1x{channels}"], [name], f"{node.name}/Reshape_2"),
        ]
    return with_nodes(model, nodes, constants.values())


def _groups(model: onnx.ModelProto, keep: Set[str]) -> dict[str, list[LinearLayer]]:
    """The layers to quantize, by the activation that they read."""
    layers = linear_layers(model)
    names = sorted(layer.name for layer in layers)
    for name in sorted(keep - set(names) - HEADS):
        raise unknown("layer", name, names)
    groups: dict[str, list[LinearLayer]] = {}
    for layer in layers:
        if layer.name not in keep:
            groups.setdefault(layer.input, []).append(layer)
    return groups


def _best_scale(batches: Iterable[Array], importance: Array) -> ActivationScale:
    """The scale with the least error in the next layer's output, judged by some rows of every batch."""
    low, high, sample = math.inf, -math.inf, list[Array]()
    rng, rows = np.random.default_rng(0), max(1, SAMPLED // len(importance))
    for values in batches:
        low, high = min(low, float(values.min())), max(high, float(values.max()))
        sample.append(values[rng.permutation(len(values))[:rows]])
        sample = [part[: max(1, rows // len(sample))] for part in sample]
    return best_activation_scale(np.concatenate(sample), low, high, importance)


def _record(layer: QuantizedLinear, weight: Array, qat: QatLayers) -> dict[str, Any]:
    return {
        "name": layer.layer.name,
        "type": "int8",
        "input": layer.layer.input,
        "scale": layer.activation.scale,
        "zero_point": layer.activation.zero_point,
        "weight_sqnr_db": round(sqnr(weight, layer.weight), 2),
        "range_from": qat.source if layer.layer.input in qat.activations else "samples",
        "weight_from": qat.source if layer.layer.name in qat.weights else "samples",
    }
