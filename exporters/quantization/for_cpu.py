"""A fp32 graph and samples -> the same network in 8 bits, layer by layer, each making up for what those before it lost."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from swin_deploy.calib.observers import Observation
from swin_deploy.dependencies import require
from swin_deploy.errors import InputError, UsageError
from swin_deploy.files import scratch_folder
from swin_deploy.parity import sqnr
from swin_deploy.specs import Array

from .equalization import ChannelStatistics, Graph, best_factors, channels_of, fold
from .gptq import Grid, Moments, best_activation_scale, grid, quantized_activation, rounded_linear, scale_of_range
from .layerwise import Feeds, Stream
from .qat_layers import Own, refuse_missing
from .qdq import ActivationScale, LinearLayer, QuantizedLinear, linear_layers, qdq_from_fp32, qdq_nodes, with_nodes
from .resume import Stopped

if TYPE_CHECKING:
    import onnx


@dataclass(frozen=True)
class Form:
    """A network in INT8 as a runtime takes it: the layers that are, by name, a record of each, and the graph with fewer."""

    quantized: Quantized
    target: str

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.quantized.layers)

    def graph(self, keep: Set[str] = frozenset()) -> onnx.ModelProto:
        """The graph; the layers `keep` are not quantised, the others as if these were."""
        layers = [layer for name, layer in self.quantized.layers.items() if name not in keep]
        made = qdq_from_fp32(self.quantized.base, layers)
        return made if self.target != "openvino" else norms_of_three_axes(made, {layer.layer.input for layer in layers})

    def records(self, keep: Set[str]) -> list[dict[str, Any]]:
        """What a manifest should know of each layer that is quantised."""
        return [record for record in self.quantized.records if record["name"] not in keep]


def quantized_for(
    target: str,
    model: onnx.ModelProto,
    feeds: SampleFeeds | None,
    method: str | None,
    keep: Set[str],
    say: Callable[[str], None],
    own: Own | None = None,
    stopped: Stopped | None = None,
) -> Form:
    """`model` in INT8 as "onnxruntime" or "openvino" runs it fastest.

    `feeds()` yields the samples batch by batch, None where `own` has every range; `method` finds ranges (one of
    ranges.METHODS; None: the least error behind the layer), `keep` names layers that stay as they are. A classifier that was
    trained in 8 bits is quantised like the others. `stopped` keeps what is done, for when it is stopped.
    """
    trained = own or Own()
    heads = HEADS - {layer.name for layer in linear_layers(model) if trained.covers([layer])}
    keep = heads | keep | (small_layers(model) if target == "openvino" else frozenset())
    ranges = None if method is None else partial(_interval, method)
    return Form(quantize(model, feeds, Options(keep=keep), ranges, say, own, stopped), target)


def _interval(method: str, name: str, values: Batches) -> tuple[float, float]:
    seen: Observation | None = None
    for batch in values():
        one = Observation.of(batch, len(batch), f"The tensor {name}")
        seen = one if seen is None else seen.merged(one)
    assert seen is not None
    return seen.compute_range(method)


SMALL = 1 << 16  # weights of one layer: 192 x 192 is small, 192 x 768 is not


def small_layers(model: onnx.ModelProto) -> frozenset[str]:
    """The layers of `model`, by name, that OpenVINO is not faster with in 8 bits: what to keep for it (see Options)."""
    sizes = {tensor.name: int(np.prod(tensor.dims)) for tensor in model.graph.initializer}
    return frozenset(layer.name for layer in linear_layers(model) if sizes[layer.weight] < SMALL)


def norms_of_three_axes(model: onnx.ModelProto, rounded: Set[str]) -> onnx.ModelProto:
    """`model` with a Reshape around each LayerNorm whose result is one of the tensors `rounded`, [rows, channels]."""
    onnx = require("onnx", "write the quantised graph")
    graph, nodes, constants = Graph(model), [], {}
    for node in model.graph.node:
        channels = graph.widths.get(node.output[0])
        if node.op_type != "LayerNormalization" or node.output[0] not in rounded or channels is None:
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


Batches = Callable[[], Iterator[Array]]  # an activation of every batch; may be asked for again
Ranges = Callable[[str, Batches], tuple[float, float]]  # (tensor, its values) -> lowest and highest value of its codes
SampleFeeds = Callable[[], Iterable[Feeds]]
SAMPLED = 1 << 17  # values from which an activation's range is chosen
HEADS = frozenset({"classifier"})  # one small product for each image, on which every answer hangs


@dataclass(frozen=True)
class Options:
    """`kind` is "int8" or "fp8". `keep` names layers that stay in fp32.

    `symmetric` puts INT8's zero point in the middle, as TensorRT has it. `threads` are ONNX Runtime's; 0 lets it choose.
    """

    kind: str = "int8"
    symmetric: bool = False
    keep: Set[str] = HEADS
    threads: int = 0


@dataclass(frozen=True)
class Quantized:
    """`base` is the fp32 network with its channels balanced, `layers` are those in 8 bits, by name.

    `records` has for each layer what a manifest should keep: its name, type, scales and the distance of its weights.
    """

    base: onnx.ModelProto
    layers: Mapping[str, QuantizedLinear]
    records: tuple[dict[str, Any], ...]

    @property
    def model(self) -> onnx.ModelProto:
        """The graph with Q/DQ, for ONNX Runtime and OpenVINO."""
        return qdq_from_fp32(self.base, self.layers.values())

    @property
    def scales(self) -> dict[str, ActivationScale]:
        """The scale of every activation that is quantised, by the tensor's name."""
        return {layer.layer.input: layer.activation for layer in self.layers.values()}


def quantize(
    model: onnx.ModelProto,
    feeds: SampleFeeds | None,
    options: Options | None = None,
    ranges: Ranges | None = None,
    say: Callable[[str], None] = lambda line: None,
    own: Own | None = None,
    stopped: Stopped | None = None,
) -> Quantized:
    """`model` (weights inside) in 8 bits; `feeds()` yields its inputs batch by batch, the same ones each time.

    `ranges` finds an activation's range from its values; without it the range is the one with the least error behind the
    next layer. What the network has of its `own` is taken as it is, its weights rounded to nearest. Layers that `stopped` has
    are taken from there; what is done is kept there until all is. Raises InputError where samples make a value that is not
    finite, UsageError for a layer that there is not, or a range where `feeds` is None.
    """
    from onnx import numpy_helper

    options, own = options or Options(), own or Own()
    kind = grid(options.kind)
    if feeds is None:
        refuse_missing(own, [layer for layers in _groups(model, options).values() for layer in layers], own.source)
        feeds = tuple
    model = balanced(model, feeds, options, own)
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    groups = _groups(model, options)
    done: dict[str, QuantizedLinear] = {}
    records: list[dict[str, Any]] = []
    with scratch_folder("quantize") as scratch:
        streams: list[Stream] = []
        for name, layers in groups.items():
            first, last = len(done) + 1, len(done) + len(layers)
            which = f"layers {first} to {last}" if last > first else f"layer {first}"
            say(f"Quantising {layers[0].name} ({which} of {sum(map(len, groups.values()))})")
            matrices = [numpy_helper.to_array(weights[layer.weight]) for layer in layers]
            biases = [None if layer.bias is None else numpy_helper.to_array(weights[layer.bias]) for layer in layers]
            scale = own.scale(name, kind)
            known = None if stopped is None else stopped.read(layers)
            if scale is None or not own.covers(layers):
                streams = streams or [Stream(model, feeds(), scratch / one, options.threads) for one in ("fp32", "int8")]
                meant, seen = streams
                seen.nodes, constants = qdq_nodes(model.graph.node, done.values())
                seen.constants |= constants

                def values(name: str = name, seen: Stream = seen) -> Iterator[Array]:
                    return (batch.reshape(-1, batch.shape[-1]) for batch in seen.advance(name))

                if known is not None:
                    for _ in zip(values(), meant.advance(name), strict=True):
                        pass  # step by step as before: in one leap the runtime would fuse more, and the last bits be others
                    scale = known[0].activation
                if scale is None and ranges is None:
                    scale = _best_scale(values(), np.square(np.concatenate(matrices)).sum(axis=0), kind, options.symmetric)
                elif scale is None and ranges is not None:
                    scale = scale_of_range(*ranges(name, values), kind, options.symmetric)
                assert scale is not None
                moments = Moments.empty(matrices[0].shape[1])
                for ours, theirs in zip(values(), meant.advance(name), strict=True) if known is None else ():
                    moments.add(quantized_activation(ours, scale, kind), theirs.reshape(ours.shape))
            for position, (layer, matrix, bias) in enumerate(zip(layers, matrices, biases, strict=True)):
                if known is not None:
                    done[layer.name] = known[position]
                elif layer.name in own.steps:
                    done[layer.name] = own.layer(layer, matrix, bias, scale, kind)
                else:
                    codes, steps, found = rounded_linear(matrix, bias, moments, kind)
                    done[layer.name] = QuantizedLinear(layer, codes, steps, found, scale)
                if stopped is not None and known is None:
                    stopped.keep(done[layer.name])
                records.append(_record(done[layer.name], matrix, options.kind) | own.origin(layer))
    if stopped is not None:
        stopped.clear()
    return Quantized(model, done, tuple(records))


def balanced(model: onnx.ModelProto, feeds: SampleFeeds, options: Options, own: Own | None = None) -> onnx.ModelProto:
    """The same network, the channels of its activations brought to such sizes that 8 bits suit them (see folding.py).

    Channels that any layer has ranges or steps of its `own` for stay as they are.
    """
    from onnx import numpy_helper

    groups, own = _groups(model, options), own or Own()
    layers = tuple(layer for group in groups.values() for layer in group)
    if all(own.touches([layer], {layer.weight}, set()) for layer in layers):
        return model
    with scratch_folder("quantize") as scratch:
        stream = Stream(model, feeds(), scratch, options.threads)
        statistics = {name: _statistics(stream.advance(name), name) for name in groups}
    result = with_nodes(model, model.graph.node, [])
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    read = {layer.weight: (name, numpy_helper.to_array(weights[layer.weight])) for name in groups for layer in groups[name]}
    for one in channels_of(Graph(model), layers):
        if own.touches(layers, one.read, {name for name, *_ in one.written}):
            continue
        factors = best_factors(one, read, statistics)
        if factors is not None:
            fold(result, one, factors)
    return result


def _groups(model: onnx.ModelProto, options: Options) -> dict[str, list[LinearLayer]]:
    """The layers to quantise, by the activation that they read."""
    layers = linear_layers(model)
    names = {layer.name for layer in layers}
    if unknown := sorted(options.keep - names - HEADS):
        raise UsageError(f'There is no linear layer "{unknown[0]}" in the graph. There are: {", ".join(sorted(names))}.')
    groups: dict[str, list[LinearLayer]] = {}
    for layer in layers:
        if layer.name not in options.keep:
            groups.setdefault(layer.input, []).append(layer)
    return groups


def _statistics(batches: Iterable[Array], name: str) -> ChannelStatistics:
    largest: Any = 0.0
    square: Any = 0.0
    rows = 0
    for batch in batches:
        values = batch.reshape(-1, batch.shape[-1])
        if not np.isfinite(values).all():
            raise InputError(f"The samples make a value in {name} that is not finite; look for damaged images.")
        largest = np.maximum(largest, np.abs(values).max(axis=0))
        square = square + np.square(values).sum(axis=0, dtype=np.float64)
        rows += len(values)
    return ChannelStatistics(largest, square / rows)


def _best_scale(batches: Iterable[Array], importance: Array, kind: Grid, symmetric: bool) -> ActivationScale:
    """The scale with the least error behind the layer, judged by some rows of every batch."""
    low, high, sample = math.inf, -math.inf, list[Array]()
    rng, rows = np.random.default_rng(0), max(1, SAMPLED // len(importance))
    for values in batches:
        low, high = min(low, float(values.min())), max(high, float(values.max()))
        sample.append(values[rng.permutation(len(values))[:rows]])
        sample = [part[: max(1, rows // len(sample))] for part in sample]
    return best_activation_scale(np.concatenate(sample), low, high, importance, kind, symmetric)


def _record(layer: QuantizedLinear, weight: Array, kind: str) -> dict[str, Any]:
    return {
        "name": layer.layer.name,
        "type": kind,
        "input": layer.layer.input,
        "scale": layer.activation.scale,
        "zero_point": layer.activation.zero_point,
        "weight_sqnr_db": round(sqnr(weight, layer.weight), 2),
    }
