"""Stored: one tensor in a file, known by shape and type, and read when it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

FLOATING = ("float32", "float16", "bfloat16", "float64")


@dataclass(frozen=True)
class Stored:
    """A tensor in a file. `dtype` is torch's name for its type, without "torch."."""

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], Tensor]


@dataclass(frozen=True)
class StoredFile:
    """The tensors of one file, or of all shards, under the names found there."""

    path: Path  # the file, or the folder of the shards
    tensors: Mapping[str, Stored]
    tensorflow: bool = False  # names and axes are those of TensorFlow
    extras: Mapping[str, Any] = field(default_factory=dict)  # what a training script saved beside the weights
