"""Agreement: how far one array is from another, in the figures by which an export is judged."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

# The largest relative L2 distance from fp32 PyTorch with which a graph of that precision counts as verified. Published
# architectures stay below 1.5e-3 in fp16; a Swin V2 whose every block has a head at the largest scale, 100, comes to 6e-3.
# bf16 has 3 bits less. How good a quantised graph is depends on the images and is measured on them (`swin-deploy evaluate`); on
# the bundle's own samples, noise, it only has to be recognisably the same network.
TOLERANCES = {"fp32": 1e-5, "fp16": 1e-2, "bf16": 8e-2, "int8": 0.3, "fp8": 0.3}


@dataclass(frozen=True)
class Agreement:
    """`relative_l2` is |test - reference| / |reference|, the worst sample's; `top1` the share of equal best classes."""

    samples: int
    finite: bool
    max_abs: float
    relative_l2: float
    cosine: float
    top1: float

    def within(self, tolerance: float) -> bool:
        """Whether everything is finite and the relative L2 distance is at most `tolerance`."""
        return self.finite and self.relative_l2 <= tolerance

    def to_dict(self) -> dict[str, Any]:
        """The figures as JSON values; infinite ones (of an output with NaN) become None."""
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(self).items()}


def compare(test: Array, reference: Array) -> Agreement:
    """The agreement of `test` with `reference`, both [samples, classes]. Raises ValueError when the shapes differ."""
    if test.shape != reference.shape:
        raise ValueError(f"cannot compare shape {test.shape} with {reference.shape}")
    if not (np.isfinite(test).all() and np.isfinite(reference).all()):
        return Agreement(len(test), False, math.inf, math.inf, 0.0, 0.0)
    a = test.reshape(len(test), -1).astype(np.float64)
    b = reference.reshape(len(reference), -1).astype(np.float64)
    norm_a, norm_b = np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1)
    tiny = np.finfo(np.float64).tiny
    return Agreement(
        samples=len(a),
        finite=True,
        max_abs=float(np.abs(a - b).max()),
        relative_l2=float((np.linalg.norm(a - b, axis=1) / np.maximum(norm_b, tiny)).max()),
        cosine=float(((a * b).sum(axis=1) / np.maximum(norm_a * norm_b, tiny)).min()),
        top1=float((a.argmax(axis=1) == b.argmax(axis=1)).mean()),
    )
