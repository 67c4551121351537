"""A fp32 graph and samples -> the same network in 8 bits, layer by layer, each making up for what those before it lost."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from swin_deploy.errors import InputError, UsageError
from swin_deploy.folders import scratch_folder

from .folding import ChannelStatistics, Graph, best_factors, channels_of, fold
from .grids import Grid, best_activation_scale, grid, quantized_activation, scale_of_range
from .own import Own, refuse_missing
from .placement import ActivationScale, LinearLayer, QuantizedLinear, linear_layers, qdq_from_fp32, qdq_nodes, with_nodes
from .rounding import Moments, rounded_linear
from .stopped import Stopped
from .stream import Feeds, Stream

if TYPE_CHECKING:
    import onnx

Array = NDArray[Any]
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


def sqnr(reference: Array, found: Array) -> float:
    """The ratio of the reference's energy to that of the difference, in dB; infinite where there is no difference.

    Where either is not finite it is minus infinity.
    """
    noise = float(np.square(found.astype(np.float64) - reference).sum())
    signal = float(np.square(reference.astype(np.float64)).sum())
    if not math.isfinite(noise):
        return -math.inf
    return math.inf if noise == 0 else 10 * math.log10(max(signal, 1e-300) / noise)


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
