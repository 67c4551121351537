"""Device and pinned host buffers for the inputs and outputs of a network, and tensors that are on the GPU already."""

from __future__ import annotations

import contextlib
import ctypes
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from swin_deploy.bundle import TensorSpec
from swin_deploy.errors import BackendError, MissingDependencyError, sentence
from swin_deploy.options import Array
from swin_deploy.runtimes.base import resolved
from swin_deploy.runtimes.dlpack import DeviceTensor

from .cuda_context import LEGACY_STREAM, CudaContext, Handle


@dataclass(frozen=True)
class BufferLayout:
    """Memory layout of an input or output: `rows` rows of shape `tail` for each image."""

    name: str
    dtype: np.dtype[Any]
    rows: int
    tail: tuple[int, ...]

    @classmethod
    def from_spec(cls, spec: TensorSpec) -> BufferLayout:
        shape = resolved(spec.shape, {"batch": 1})
        if not shape:
            raise BackendError(f"The size of {spec} for each image is unknown. Export the bundle again.")
        return cls(spec.name, np.dtype(spec.dtype), shape[0], shape[1:])

    @property
    def image_bytes(self) -> int:
        return self.rows * math.prod(self.tail) * self.dtype.itemsize

    def shape(self, batch: int) -> tuple[int, ...]:
        return (batch * self.rows, *self.tail)


class IoBuffer:
    """Memory for one input or output on the GPU (`device`) and, if `pinned`, on the host (`host`, or `view` as an array)."""

    def __init__(self, context: CudaContext, layout: BufferLayout, pinned: bool = True) -> None:
        self.layout, self._context, self._pinned, self._capacity = layout, context, pinned, 0
        self.device = self.host = self.size = 0
        self.view: Array = np.empty(0, layout.dtype)

    def resize(self, batch: int) -> None:
        """Make `size` the bytes of `batch` images; memory that is large enough stays where it is."""
        self.size = size = batch * self.layout.image_bytes
        if size > self._capacity:
            self.free()
            self.device = self._context.allocate(size)
            if self._pinned:
                self.host = self._context.allocate_pinned(size)
            self._capacity = self.size = size
        if self._pinned:
            raw = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(self.host))
            self.view = raw.view(self.layout.dtype).reshape(self.layout.shape(batch))

    def free(self) -> None:
        self.view, self._capacity, self.size = np.empty(0, self.layout.dtype), 0, 0
        device, host, self.device, self.host = self.device, self.host, 0, 0
        if device:
            self._context.free(device)
        if host:
            self._context.free_pinned(host)


class StreamBuffers:
    """A stream, an event and the buffers for the inputs and outputs of one call at a time."""

    def __init__(self, cuda: CudaContext, layouts: Sequence[Sequence[BufferLayout]]) -> None:
        self._cuda = cuda
        self.stream: Handle = None
        self.event: Handle = None
        self.inputs, self.outputs = ([IoBuffer(cuda, layout) for layout in side] for side in layouts)
        try:
            self.stream, self.event = cuda.create_stream(), cuda.create_event()
        except BackendError:
            self.free()
            raise

    def wait_for(self, feeds: Mapping[str, Any]) -> None:
        """Make the stream wait for the work that produces tensors on the GPU."""
        if any(isinstance(feed, DeviceTensor) for feed in feeds.values()):
            self._cuda.wait_for_stream(self.stream, LEGACY_STREAM, self.event)

    def free(self, *first: Callable[[], None]) -> None:
        """Free everything once the stream is idle, `first` before the buffers; a second call does nothing."""
        stream, event, self.stream, self.event = self.stream, self.event, None, None
        steps: list[Callable[[], None]] = [partial(self._cuda.synchronize, stream)] if stream is not None else []
        steps += [*first, *(buffer.free for buffer in self.inputs + self.outputs)]
        steps += [partial(self._cuda.destroy_event, event)] if event is not None else []
        steps += [partial(self._cuda.destroy_stream, stream)] if stream is not None else []
        for step in steps:
            with contextlib.suppress(BackendError):  # after a failure the GPU may refuse these as well
                step()


def device_tensor(value: Any, device: str) -> DeviceTensor:
    """View a tensor of another library on the GPU `device`, whose queued work is ordered before CUDA's default stream.

    Raises ValueError if its memory is not contiguous.
    """
    try:
        from cuda.core.utils import StridedMemoryView
    except ImportError as error:
        raise MissingDependencyError(
            f"NVIDIA's cuda-core is needed to read tensors on {device}, but it cannot be imported ({sentence(str(error))}). "
            'Run: pip install "cuda-bindings>=12.9" "cuda-core>=1.0"'
        ) from error
    torch = sys.modules.get("torch")  # PyTorch exports tensors of its current GPU only
    on_device = torch.cuda.device(device) if torch is not None and torch.cuda.is_available() else contextlib.nullcontext()
    with on_device:
        view = StridedMemoryView.from_dlpack(value, stream_ptr=LEGACY_STREAM)
        dtype, shape = np.dtype(view.dtype), tuple(view.shape)
    expected = 1
    for size, stride in zip(reversed(shape), reversed(view.strides or ()), strict=False):
        if size != 1 and stride != expected:
            raise ValueError("its memory is not contiguous")
        expected *= size
    return DeviceTensor(device, dtype, shape, int(view.ptr), view)
