"""Execution contexts of one engine, each with its own stream and buffers, and the pool that hands them out to threads."""

from __future__ import annotations

import logging
import threading
from _thread import LockType, allocate_lock
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from swin_deploy.errors import BackendError
from swin_deploy.options import Array
from swin_deploy.runtimes.base import Feeds, Places
from swin_deploy.runtimes.dlpack import DeviceTensor
from swin_deploy.tensorrt_log import ErrorLog

from .capture_lock import CAPTURE_LOCK
from .cuda_context import CudaContext, Handle
from .io_buffers import BufferLayout, IoBuffer, StreamBuffers

MAX_CAPTURES = 3  # attempts to capture a batch size; another thread that synchronises the whole device spoils one
ALIGNMENT = 256  # of the addresses that TensorRT's own allocator returns; other tensors of the caller's are copied
R = TypeVar("R")
_LOG = logging.getLogger(__name__)


class ContextSlot:
    """An execution context with a stream and buffers, used by one thread at a time. Call all methods inside `cuda.current()`.

    The second of two calls with the same batch and addresses is captured as a CUDA graph, unless TensorRT captures by itself
    (`own_graphs`). A tensor on the GPU is read in place until its address changes; then it is copied, so that the graph stays
    valid. The execution context comes in a list and is taken out of it, so that no caller's frame keeps it alive.
    """

    def __init__(
        self,
        cuda: CudaContext,
        context: list[Any],
        layouts: Sequence[Sequence[BufferLayout]],
        own_graphs: bool,
        errors: ErrorLog,
    ) -> None:
        self.prepared: tuple[int, int] | None = None  # profile, batch
        self.calls = 0  # since it was prepared
        self.graphs_disabled = False  # whether capturing is switched off in TensorRT
        self._cuda, self._own_graphs, self._errors = cuda, own_graphs, errors
        self._profile: int | None = None
        self._graph: Handle = None
        self._repeats = False  # whether the previous call had the same batch and addresses
        self._moving_inputs: set[str] = set()  # tensors of the caller's that had another address in an earlier call
        self._refused: Counter[tuple[int, int]] = Counter()
        self._addresses: dict[str, int] = {}
        self._context: Any = context.pop()
        try:
            self._io = StreamBuffers(cuda, layouts)
        except BaseException:
            self._context = None
            raise

    def prepare(self, profile: int, batch: int) -> None:
        """Set the execution context and the buffers to `batch` images of an optimisation profile, unless they are."""
        if self.prepared == (profile, batch):
            return
        self.prepared = None
        self.calls = 0
        self._invalidate_graph()
        self._errors.clear()
        if self._profile != profile:
            self._profile = None
            self._addresses.clear()  # a change of the profile resets them
            self._must(
                self._context.set_optimization_profile_async(profile, int(self._io.stream)), f"select the profile {profile}"
            )
            self._cuda.synchronize(self._io.stream)
            self._profile = profile
        for buffer in self._io.inputs:
            shape = buffer.layout.shape(batch)
            self._must(self._context.set_input_shape(buffer.layout.name, shape), f"accept {buffer.layout.name} {list(shape)}")
        self._must(not self._context.infer_shapes(), "infer its shapes")
        for buffer in self._io.inputs + self._io.outputs:
            name, shape = buffer.layout.name, buffer.layout.shape(batch)
            found = tuple(self._context.get_tensor_shape(name))
            self._must(found == shape, f"give {name} the shape {list(shape)} (it has {list(found)})")
            buffer.resize(batch)
            self._set_address(name, buffer.device)
        self.prepared = (profile, batch)

    def run(self, feeds: Feeds, out: Mapping[str, Array], start: int, count: int) -> None:
        """Run `count` images of `feeds`, from `start` on, into `out`; pad the batch with the last of them."""
        assert self.prepared is not None
        batch, stream, cuda = self.prepared[1], self._io.stream, self._cuda
        self._io.wait_for(feeds)
        for buffer in self._io.inputs:
            layout, feed = buffer.layout, feeds[buffer.layout.name]
            if isinstance(feed, DeviceTensor):
                address = self._address_of(buffer, feed.pointer + start * layout.image_bytes, count, batch)
                self._set_address(layout.name, address)
                continue
            images = buffer.view.reshape(batch, -1)
            images[:count] = feed.reshape(-1, images.shape[1])[start : start + count]
            images[count:] = images[count - 1]
            cuda.copy(buffer.device, buffer.host, batch * layout.image_bytes, stream)
            self._set_address(layout.name, buffer.device)
        self._execute()
        self.calls += 1
        for buffer in self._io.outputs:
            cuda.copy(buffer.host, buffer.device, count * buffer.layout.image_bytes, stream)
        cuda.synchronize(stream)
        for buffer in self._io.outputs:
            rows, first = count * buffer.layout.rows, start * buffer.layout.rows
            out[buffer.layout.name][first : first + rows] = buffer.view[:rows]

    def free(self) -> None:
        """Free everything, in whatever state it is; a second call does nothing."""
        self.prepared = None
        self._io.free(self._invalidate_graph, lambda: setattr(self, "_context", None))

    def _address_of(self, buffer: IoBuffer, source: int, count: int, batch: int) -> int:
        """Return `source` if the engine can read the images there, or copy them into `buffer`."""
        name, size = buffer.layout.name, buffer.layout.image_bytes
        if self.calls and self._addresses[name] != source:
            self._moving_inputs.add(name)
        if count == batch and source % ALIGNMENT == 0 and name not in self._moving_inputs:
            return source
        self._cuda.copy(buffer.device, source, count * size, self._io.stream)
        for image in range(count, batch):
            self._cuda.copy(buffer.device + image * size, source + (count - 1) * size, size, self._io.stream)
        return buffer.device

    def _execute(self) -> None:
        assert self.prepared is not None
        if self._graph is None and self._repeats and not self._own_graphs and self._refused[self.prepared] < MAX_CAPTURES:
            self._graph = self._cuda.capture(self._io.stream, self._enqueue)
            if self._graph is None:
                self._refused[self.prepared] += 1
                if self._refused[self.prepared] == MAX_CAPTURES:
                    _LOG.warning(
                        "This engine's CUDA graph cannot be captured for a batch of %s. It runs without one.", self.prepared[1]
                    )
        if self._graph is not None:
            self._cuda.launch(self._graph, self._io.stream)
        else:
            self._errors.clear()
            self._must(self._context.execute_async_v3(int(self._io.stream)), "run")
        self._repeats = True

    def _enqueue(self) -> bool:
        try:
            return bool(self._context.execute_async_v3(int(self._io.stream)))
        except RuntimeError:  # the call without a graph, which follows, reports the reason if it fails as well
            return False

    def _set_address(self, name: str, address: int) -> None:
        if self._addresses.get(name) != address:
            self._invalidate_graph()
            self._must(self._context.set_tensor_address(name, address), f"accept the address of {name}")
            self._addresses[name] = address

    def _invalidate_graph(self) -> None:
        self._repeats = False
        graph, self._graph = self._graph, None
        if graph is not None:
            self._cuda.destroy_graph(graph)

    def _must(self, done: Any, what: str) -> None:
        if not done:
            raise BackendError(f"it did not {what}: {self._errors.sentence()}")


class ContextPool:
    """Up to `limit` slots, created on demand as long as the GPU has memory for them; further threads wait.

    A slot that is prepared for the requested batch is preferred, then a new one, then the least recently used. An interrupt may
    come after any call, so slots change hands in statements without one.
    """

    def __init__(self, create: Callable[[], ContextSlot], limit: int) -> None:
        self._create, self._limit, self._initial_limit = create, limit, limit
        self._places = Places(limit)
        self._free: list[ContextSlot] = []  # least recently used first
        self._used: dict[LockType, ContextSlot | None] = {}  # by the held lock of each call; None while it is created
        self._choosing = threading.RLock()

    def use(self, profile: int, batch: int, work: Callable[..., R], *arguments: Any) -> R:
        """Return `work(slot, *arguments)` for a slot that is prepared for the batch.

        After an error or interrupt the slot is freed, because its state is unknown.
        """
        call = allocate_lock()
        for _ in self._places.taken:
            try:
                with call:
                    slot = self._next(call, profile, batch)
                    found = work(slot, *arguments)
                    self._free += (slot,)
                    del self._used[call]
                    return found
            except BaseException:
                self._drop(call)
                raise
            finally:
                self._places.give_back(True)
        raise AssertionError

    def drain(self) -> list[ContextSlot]:
        """Remove and return the slots that are not in use."""
        with self._choosing:
            free, self._free = self._free, []
        return free

    def _next(self, call: LockType, profile: int, batch: int) -> ContextSlot:
        while True:
            with self._choosing:
                others = len(self._free) + len(self._used)
                prepared = [index for index, slot in enumerate(self._free) if slot.prepared == (profile, batch)]
                if prepared or (self._free and others >= self._limit):
                    index = prepared[-1] if prepared else 0
                    self._used[call] = self._free[index]
                    del self._free[index]
                elif others < self._limit:
                    self._used[call] = None
                else:
                    used = next(iter(tuple(self._used)), call)  # a copy: calls end while others choose
            if call not in self._used:
                if used is not call:
                    with used:  # until the oldest call ends
                        pass
                continue
            slot = self._used[call]
            if prepared and slot is not None:
                return slot
            try:
                with CAPTURE_LOCK.shared():  # it allocates
                    if slot is None:
                        slot = self._used[call] = self._create()
                    slot.prepare(profile, batch)
                return slot
            except BaseException as error:
                others = self._drop(call)
                if not isinstance(error, BackendError) or not others:
                    self._limit = self._initial_limit  # it was not for want of memory, or the next call finds that anew
                    raise
                self._limit = others  # there is no memory for more slots; wait for one of those that exist

    def _drop(self, call: LockType) -> int:
        """Free the slot of a call, or its place if it could not be created; return the number of others."""
        if (slot := self._used.pop(call, None)) is not None:
            slot.free()
        return len(self._free) + len(self._used)
