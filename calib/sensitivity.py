"""Which layers 8 bits hurt most: each alone is quantised, and the answers of the network are compared."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from swin_deploy.requires import require

from .placement import QuantizedLinear, qdq_from_fp32
from .quantize import Quantized, SampleFeeds, sqnr
from .stream import Feeds, session

Array = NDArray[Any]


@dataclass(frozen=True)
class Damage:
    """The layer `name` alone in 8 bits leaves the outputs at `sqnr_db` (infinite where nothing changes)."""

    name: str
    sqnr_db: float


def sensitivity(
    quantized: Quantized, feeds: SampleFeeds, threads: int = 0, say: Callable[[str], None] = lambda line: None
) -> tuple[Damage, ...]:
    """Every layer of `quantized`, the most damaging one first; a few samples are enough to rank them."""
    reference = _answers(quantized, {}, feeds(), threads)
    found = []
    for number, (name, layer) in enumerate(quantized.layers.items()):
        say(f"Measuring {name} ({number + 1} of {len(quantized.layers)})")
        found.append(Damage(name, sqnr(reference, _answers(quantized, {name: layer}, feeds(), threads))))
    return tuple(sorted(found, key=lambda damage: damage.sqnr_db))


def _answers(quantized: Quantized, layers: Mapping[str, QuantizedLinear], feeds: Iterable[Feeds], threads: int) -> Array:
    """All outputs for all samples, one after the other, as one vector."""
    require("onnx", "quantise a model")
    run = session(qdq_from_fp32(quantized.base, layers.values()), threads)
    outputs = [output.reshape(-1) for feed in feeds for output in run.run(None, dict(feed))]
    return np.concatenate(outputs)
