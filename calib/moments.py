"""Second moments of what linear layers read, in one pass, and weights rounded so that such inputs see little of it (GPTQ)."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from swin_deploy.errors import InputError

from .collect import session_for
from .folding import ChannelStatistics, Graph, best_factors, channels_of, fold
from .grids import grid
from .placement import linear_layers
from .rounding import DAMPING, gptq

if TYPE_CHECKING:
    import onnx

Array = NDArray[Any]


@dataclass
class InputMoments:
    """Sums over `rows` rows x of a tensor: of x [channels], and of the outer products of x with itself [channels, channels];
    and the largest magnitude [channels]."""

    total: Array
    gram: Array
    largest: Array
    rows: int

    @classmethod
    def empty(cls, channels: int) -> InputMoments:
        """Of no rows."""
        return cls(np.zeros(channels), np.zeros((channels, channels), np.float32), np.zeros(channels, np.float32), 0)

    def add(self, values: Array) -> None:
        """Takes in `values` [..., channels]."""
        x = values.reshape(-1, values.shape[-1])
        self.total += x.sum(axis=0, dtype=np.float64)
        self.gram += x.T @ x
        self.largest = np.maximum(self.largest, np.abs(x).max(axis=0))
        self.rows += len(x)

    def divided(self, factors: Array) -> InputMoments:
        """Of x / factors [channels]."""
        return InputMoments(self.total / factors, self.gram / np.outer(factors, factors), self.largest / factors, self.rows)

    @property
    def statistics(self) -> ChannelStatistics:
        """What balancing asks of each channel."""
        return ChannelStatistics(self.largest, np.diag(self.gram) / self.rows)


class Change(Protocol):
    """What became of a tensor x before it is read: (x - shift) * factor, and some channels constant."""

    @property
    def shift(self) -> Array | float: ...
    @property
    def factor(self) -> Array | float: ...
    @property
    def constants(self) -> Mapping[int, float]: ...


def input_moments(
    model: str | os.PathLike[str] | onnx.ModelProto,
    read: Mapping[str, str],
    feeds: Iterable[Mapping[str, Array]],
    threads: int = 0,
) -> dict[str, InputMoments]:
    """By layer, the moments of the tensor of `model`, a file or a loaded graph, that `read` says it reads, over all `feeds`.

    Memory is that of the model, one batch, and 4 bytes times the square of each tensor's channels. Raises InputError where
    samples make a value that is not finite.
    """
    names = sorted(set(read.values()))
    run, found = session_for(model, names, threads), dict[str, InputMoments]()
    for feed in feeds:
        values = run(feed)
        for name in names:
            moments = found[name] = found.get(name) or InputMoments.empty(values[name].shape[-1])
            moments.add(values[name])
            if not np.isfinite(moments.total).all():
                raise InputError(f"The samples make a value in {name} that is not finite; look for damaged images.")
    return {layer: found[name] for layer, name in read.items()}


def balanced(model: onnx.ModelProto, moments: Mapping[str, InputMoments]) -> tuple[onnx.ModelProto, dict[str, InputMoments]]:
    """`model` (weights inside) with the channels that the layers of `moments` read brought to sizes that suit 8 bits, and what
    the moments then are.

    Only where all factors go into weights (see folding.py), and by powers of two: nothing is rounded, and the network stays
    what it was.
    """
    from onnx import numpy_helper

    layers = tuple(layer for layer in linear_layers(model) if layer.name in moments)
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    statistics = {layer.input: moments[layer.name].statistics for layer in layers}
    read = {layer.weight: (layer.input, numpy_helper.to_array(weights[layer.weight])) for layer in layers}
    result, found = type(model)(), dict(moments)
    result.CopyFrom(model)
    for one in channels_of(Graph(model), layers):
        factors = None if one.after or one.before else best_factors(one, read, statistics, powers_of_two=True)
        if factors is None:
            continue
        fold(result, one, factors)
        for layer in layers:
            if layer.weight in one.read:
                found[layer.name] = found[layer.name].divided(np.tile(factors, len(found[layer.name].total) // one.width))
    return result, found


@dataclass(frozen=True)
class Repaired:
    """A way of rounding the weights of layers: what the rounding of one column breaks the columns not yet rounded repair."""

    moments: Mapping[str, InputMoments]
    kind: str
    known: dict[tuple[str, bytes], Array] = field(default_factory=dict)  # what was rounded already

    def __call__(self, layer: str, weight: Array, steps: Array, change: Change) -> Array | None:
        """The numbers of the 8-bit type for `weight` [outputs, channels], whose steps [outputs] are; None without moments."""
        moments = self.moments.get(layer)
        if moments is None:
            return None
        key = layer, hashlib.sha256(weight.tobytes() + steps.tobytes()).digest()
        if key not in self.known:
            gram = changed_gram(moments, change)
            gram[np.diag_indices_from(gram)] += max(DAMPING * float(np.trace(gram)) / len(gram), 1e-12)
            codes = gptq(weight.astype(np.float64), gram, steps.astype(np.float64), grid(self.kind))
            self.known[key] = codes.astype(np.float32)
        return self.known[key]


def changed_gram(moments: InputMoments, change: Change) -> Array:
    """[channels, channels]: the mean of the outer products of what became of x."""
    mean, gram = moments.total / moments.rows, moments.gram.astype(np.float64) / moments.rows
    shift, factor = (np.broadcast_to(np.asarray(a, np.float64), mean.shape) for a in (change.shift, change.factor))
    gram += np.outer(shift, shift) - np.outer(shift, mean) - np.outer(mean, shift)
    gram *= np.outer(factor, factor)
    mean = (mean - shift) * factor
    for channel, value in change.constants.items():
        mean[channel] = value
        gram[channel] = gram[:, channel] = value * mean
    return gram
