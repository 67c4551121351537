"""The kinds of input, and the number of cases of each in a whole run."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

from . import bundle_inputs, checkpoint_inputs
from .runner import Plan, Planned
from .seeds import Seeds

# A function writes a changed input into a folder, and returns the verb that reads it.
KINDS: dict[str, tuple[Callable[[Seeds, random.Random, Path], Planned], int]] = {
    "safetensors": (checkpoint_inputs.safetensors, 2000),
    "pth": (checkpoint_inputs.pth, 3000),
    "pickles": (checkpoint_inputs.pickles, 2000),
    "bombs": (checkpoint_inputs.bombs, 500),
    "h5": (checkpoint_inputs.h5, 2000),
    "configs": (checkpoint_inputs.configs, 3000),
    "images": (bundle_inputs.images, 2000),
    "data": (bundle_inputs.data, 1500),
    "manifest": (bundle_inputs.manifest, 2000),
    "graphs": (bundle_inputs.graphs, 1000),
    "side": (bundle_inputs.side, 1000),
}


def plan_of(kind: str, seeds: Seeds) -> Plan:
    """Return the function that plans the cases of a kind."""
    function = KINDS[kind][0]
    return lambda rng, folder: function(seeds, rng, folder)
