"""Memory: what one input or output takes on a GPU and, pinned, on this side, for some number of images."""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from swin_deploy.errors import BackendError
from swin_deploy.runtimes.base import resolved
from swin_deploy.specs import Array, TensorSpec

from .driver import Gpu


@dataclass(frozen=True)
class Layout:
    """An input or output as it lies in memory: `rows` of shape `tail` for each image, and the bytes of an image."""

    name: str
    dtype: np.dtype[Any]
    rows: int
    tail: tuple[int, ...]

    @classmethod
    def of(cls, spec: TensorSpec) -> Layout:
        one = resolved(spec.shape, {"batch": 1})
        if not one:
            raise BackendError(f"{spec} does not say how large it is for each image. Export the bundle again.")
        return cls(spec.name, np.dtype(spec.dtype), one[0], one[1:])

    @property
    def bytes(self) -> int:
        return self.rows * math.prod(self.tail) * self.dtype.itemsize

    def shape(self, batch: int) -> tuple[int, ...]:
        return (batch * self.rows, *self.tail)


class Memory:
    """Room for one input or output on the GPU and, where it is `pinned`, on this side; `view` is the latter as an array."""

    def __init__(self, gpu: Gpu, layout: Layout, pinned: bool = True) -> None:
        self.layout, self._gpu, self._pinned, self._room = layout, gpu, pinned, 0
        self.device = self.host = self.size = 0
        self.view: Array = np.empty(0, layout.dtype)

    def hold(self, batch: int) -> None:
        """Makes room for `batch` images, `size` bytes; what there is stays where it is enough."""
        self.size = size = batch * self.layout.bytes
        if size > self._room:
            self.free()
            self.device = self._gpu.allocated(size)
            if self._pinned:
                self.host = self._gpu.pinned(size)
            self._room = self.size = size
        if self._pinned:
            raw = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(self.host))
            self.view = raw.view(self.layout.dtype).reshape(self.layout.shape(batch))

    def free(self) -> None:
        self.view, self._room, self.size = np.empty(0, self.layout.dtype), 0, 0
        device, host, self.device, self.host = self.device, self.host, 0, 0
        if device:
            self._gpu.free(device)
        if host:
            self._gpu.unpin(host)
