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
from .grids import grid
from .rounding import DAMPING, gptq

if TYPE_CHECKING:
    import onnx

Array = NDArray[Any]


@dataclass
class InputMoments:
    """Sums over `rows` rows x of a tensor: of x [channels], and of the outer products of x with itself [channels, channels]."""

    total: Array
    gram: Array
    rows: int

    def add(self, values: Array) -> None:
        """Takes in `values` [..., channels]."""
        x = values.reshape(-1, values.shape[-1])
        self.total += x.sum(axis=0, dtype=np.float64)
        self.gram += x.T @ x
        self.rows += len(x)


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
            channels = values[name].shape[-1]
            empty = InputMoments(np.zeros(channels), np.zeros((channels, channels), np.float32), 0)
            moments = found.setdefault(name, empty)
            moments.add(values[name])
            if not np.isfinite(moments.total).all():
                raise InputError(f"The samples make a value in {name} that is not finite; look for damaged images.")
    return {layer: found[name] for layer, name in read.items()}


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
