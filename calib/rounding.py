"""Weights on a grid such that the layer still answers as before: least squares, then rounding that repairs itself.

Both look at what the layer really gets as input: 8-bit activations from layers that are quantised already. The rounding is
GPTQ's (Frantar and others, 2022): column by column, what one column's rounding breaks the columns not yet rounded repair.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .grids import Grid, weight_scales

Array = NDArray[Any]
DAMPING = 0.01  # of the mean diagonal
BLOCK = 128  # columns


@dataclass
class Moments:
    """What is known of a layer's input over all rows: `seen` as the quantised network gives it, `meant` as fp32 does.

    `gram` is the sum of seen.T @ seen, `cross` of seen.T @ meant, both [channels, channels].
    """

    gram: Array
    cross: Array
    seen: Array
    meant: Array
    rows: int = 0

    @classmethod
    def empty(cls, channels: int) -> Moments:
        square = (channels, channels)
        return cls(np.zeros(square), np.zeros(square), np.zeros(channels), np.zeros(channels))

    def add(self, seen: Array, meant: Array) -> None:
        """Takes in `seen` and `meant`, both [rows, channels]."""
        self.gram += seen.T @ seen
        self.cross += seen.T @ meant
        self.seen += seen.sum(axis=0, dtype=np.float64)
        self.meant += meant.sum(axis=0, dtype=np.float64)
        self.rows += len(seen)

    def centred(self) -> tuple[Array, Array, Array, Array]:
        """Gram and cross around the means, per row, and the means."""
        seen, meant = self.seen / self.rows, self.meant / self.rows
        return self.gram / self.rows - np.outer(seen, seen), self.cross / self.rows - np.outer(seen, meant), seen, meant


def rounded_linear(weight: Array, bias: Array | None, moments: Moments, kind: Grid) -> tuple[Array, Array, Array]:
    """(codes [outputs, inputs], scale [outputs], bias [outputs]) for `weight` [outputs, inputs].

    The bias takes up the mean error of every output, so that a layer without one gets one.
    """
    gram, cross, seen, meant = moments.centred()
    wanted = weight.astype(np.float64)
    damped = gram + np.eye(len(gram)) * max(DAMPING * float(np.trace(gram)) / len(gram), 1e-12)
    # The weights that make of `seen` what `weight` makes of `meant`; the damping draws them towards `weight`.
    target = np.linalg.solve(damped, (cross + damped - gram) @ wanted.T).T
    scale = weight_scales(target, kind)
    codes = gptq(target, damped, scale, kind)
    found = wanted @ meant - (codes * scale[:, None]) @ seen
    if bias is not None:
        found = found + bias
    return kind.codes(codes), scale.astype(np.float32), found.astype(np.float32)


def gptq(weight: Array, gram: Array, scale: Array, kind: Grid) -> Array:
    """`weight` [outputs, inputs] / `scale` [outputs] as codes, such that inputs with this `gram` see little of it."""
    order = np.argsort(-np.diag(gram), kind="stable")
    work = (weight / scale[:, None])[:, order]
    inverse = np.linalg.inv(gram[np.ix_(order, order)])
    factor = np.linalg.cholesky((inverse + inverse.T) / 2).T  # upper
    codes = np.empty_like(work)
    for start in range(0, len(gram), BLOCK):
        stop = min(start + BLOCK, len(gram))
        errors = np.empty((len(work), stop - start))
        for column in range(start, stop):
            codes[:, column] = kind.nearest(work[:, column])
            error = (work[:, column] - codes[:, column]) / factor[column, column]
            work[:, column + 1 : stop] -= np.outer(error, factor[column, column + 1 : stop])
            errors[:, column - start] = error
        work[:, stop:] -= errors @ factor[start:stop, stop:]
    result = np.empty_like(codes)
    result[:, order] = codes
    return result
