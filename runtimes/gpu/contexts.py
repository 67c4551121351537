"""Lane: an execution context with a stream and memory of its own, which one thread at a time runs; Lanes hands them out."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from swin_deploy.errors import BackendError
from swin_deploy.runtimes.base import Feeds
from swin_deploy.runtimes.dlpack import DeviceTensor
from swin_deploy.specs import Array
from swin_deploy.tensorrt_log import Said

from .driver import CAPTURING, LEGACY_STREAM, Gpu
from .memory import Layout, Memory

CAPTURES = 3  # how often capturing is tried: another thread that synchronises the whole device spoils it, too
_LOG = logging.getLogger("swin_deploy")
ALIGNMENT = 256  # what TensorRT is given by its own allocator; a tensor of the caller's that is not is copied


class Lane:
    """Runs one engine for `batch` images of a profile at a time, as `prepare` says. Call everything inside `gpu.current()`.
    It takes the execution context out of the list `context`, so that nobody else keeps it.

    A call that follows another one with the same batch and the same addresses is captured as a CUDA graph, and those after it
    only launch that. A graph is of the context as it was when it was captured, so it goes when anything there changes; where
    capturing is refused CAPTURES times, the batch is run plainly from then on. With `own_graphs` TensorRT does all this by
    itself. An input of the caller's on the GPU is read where it is, until that changes; from then on it is copied to where
    the lane has it.
    """

    def __init__(
        self, gpu: Gpu, context: list[Any], inputs: Sequence[Layout], outputs: Sequence[Layout], own_graphs: bool, said: Said
    ) -> None:
        self.prepared: tuple[int, int] | None = None  # profile, batch
        self.calls = 0  # since it was prepared
        self.without_graphs = False  # whether TensorRT was told not to capture
        self._gpu, self._context, self._own_graphs, self._said = gpu, context.pop(), own_graphs, said
        self._profile: int | None = None
        self._graph: int | None = None
        self._alike = False  # whether the call before was this one
        self._moving: set[str] = set()  # inputs of the caller's on the GPU that were somewhere else in another call
        self._refused: Counter[tuple[int, int]] = Counter()
        self._addresses: dict[str, int] = {}
        self._stream = self._event = 0
        self._inputs = [Memory(gpu, layout) for layout in inputs]
        self._outputs = [Memory(gpu, layout) for layout in outputs]
        try:
            self._stream, self._event = gpu.stream(), gpu.event()
        except BackendError:
            self.free()
            raise

    def prepare(self, profile: int, batch: int) -> None:
        """Makes this lane ready for `batch` images of that profile; nothing is done where it is."""
        if self.prepared == (profile, batch):
            return
        self.prepared = None
        self.calls = 0
        self._changed()
        self._said.clear()
        if self._profile != profile:
            self._profile = None
            self._addresses.clear()  # a context that changes its profile is to be told everything again
            self._must(self._context.set_optimization_profile_async(profile, self._stream), f"select the profile {profile}")
            self._gpu.wait(self._stream)
            self._profile = profile
        for memory in self._inputs:
            shape = memory.layout.shape(batch)
            self._must(self._context.set_input_shape(memory.layout.name, shape), f"take {memory.layout.name} {list(shape)}")
        missing = self._context.infer_shapes()
        self._must(not missing, f"tell its shapes without {', '.join(missing)}")
        for memory in self._inputs + self._outputs:
            name, shape = memory.layout.name, memory.layout.shape(batch)
            found = tuple(self._context.get_tensor_shape(name))
            self._must(found == shape, f"make {name} {list(shape)} (it makes {list(found)})")
            memory.hold(batch)
            self._address(name, memory.device)
        self.prepared = (profile, batch)

    def run(self, feeds: Feeds, out: Mapping[str, Array], start: int, count: int) -> None:
        """`count` images, from `start` on, from `feeds` into `out`; the last one fills up what the batch has more."""
        assert self.prepared is not None
        batch, stream, gpu = self.prepared[1], self._stream, self._gpu
        if any(isinstance(feed, DeviceTensor) for feed in feeds.values()):
            gpu.follow(stream, LEGACY_STREAM, self._event)
        for memory in self._inputs:
            layout, feed = memory.layout, feeds[memory.layout.name]
            if not isinstance(feed, DeviceTensor):
                rows = count * layout.rows
                memory.view[:rows] = feed[start * layout.rows : start * layout.rows + rows]
                for more in range(count, batch):
                    memory.view[more * layout.rows : (more + 1) * layout.rows] = memory.view[rows - layout.rows : rows]
                gpu.to_device(memory.device, memory.host, batch * layout.bytes, stream)
                self._address(layout.name, memory.device)
                continue
            source = feed.pointer + start * layout.bytes
            if self.calls and self._addresses[layout.name] != source:
                self._moving.add(layout.name)
            if count == batch and source % ALIGNMENT == 0 and layout.name not in self._moving:
                self._address(layout.name, source)
                continue
            gpu.on_device(memory.device, source, count * layout.bytes, stream)
            for more in range(count, batch):
                last = source + (count - 1) * layout.bytes
                gpu.on_device(memory.device + more * layout.bytes, last, layout.bytes, stream)
            self._address(layout.name, memory.device)
        self._execute()
        self.calls += 1
        for memory in self._outputs:
            gpu.to_host(memory.host, memory.device, count * memory.layout.bytes, stream)
        gpu.wait(stream)
        for memory in self._outputs:
            rows, first = count * memory.layout.rows, start * memory.layout.rows
            out[memory.layout.name][first : first + rows] = memory.view[:rows]

    def free(self) -> None:
        """Frees everything, whatever state it is in; a second time does nothing."""
        self.prepared = None
        steps: list[Callable[[], None]] = []
        if self._stream:
            steps += [lambda stream=self._stream: self._gpu.wait(stream)]  # type: ignore[misc]
        steps += [self._changed, self._let_go, *(memory.free for memory in self._inputs + self._outputs)]
        if self._event:
            steps += [lambda event=self._event: self._gpu.end_event(event)]  # type: ignore[misc]
        if self._stream:
            steps += [lambda stream=self._stream: self._gpu.end_stream(stream)]  # type: ignore[misc]
        self._stream = self._event = 0
        for step in steps:
            with suppress(BackendError):  # a GPU that failed refuses this, too, and what failed has been told
                step()

    def _let_go(self) -> None:
        self._context = None

    def _execute(self) -> None:
        assert self.prepared is not None
        if self._graph is None and self._alike and not self._own_graphs and self._refused[self.prepared] < CAPTURES:
            self._graph = self._gpu.captured(self._stream, self._enqueued)
            if self._graph is None:
                self._refused[self.prepared] += 1
                if self._refused[self.prepared] == CAPTURES:
                    _LOG.warning(
                        "This engine's CUDA graph cannot be captured for %s images and runs without.", self.prepared[1]
                    )
        if self._graph is not None:
            self._gpu.launch(self._graph, self._stream)
        else:
            self._said.clear()
            self._must(self._context.execute_async_v3(self._stream), "run")
        self._alike = True

    def _enqueued(self) -> bool:
        try:
            return bool(self._context.execute_async_v3(self._stream))
        except RuntimeError:  # it is then run without capturing, and says why if that fails, too
            return False

    def _address(self, name: str, address: int) -> None:
        if self._addresses.get(name) != address:
            self._changed()
            self._must(self._context.set_tensor_address(name, address), f"read or write {name} where it is")
            self._addresses[name] = address

    def _changed(self) -> None:
        """The context is about to be another one than before: its graph is not to be launched any more."""
        self._alike = False
        graph, self._graph = self._graph, None
        if graph is not None:
            self._gpu.end_graph(graph)

    def _must(self, done: Any, what: str) -> None:
        if not done:
            raise BackendError(f"it did not {what}: {self._said.sentence()}")


class Lanes:
    """Up to `most` lanes, made as they are needed, but no more than the GPU has memory for; who comes later waits.

    A lane that is prepared for what is wanted comes first, then a new one, then the one that nobody has used for longest.
    """

    def __init__(self, make: Callable[[], Lane], most: int) -> None:
        self._make, self._most, self._made = make, most, 0
        self._allowed = most
        self._free: list[Lane] = []  # the one used last is the last
        self._turn = threading.Condition()

    @contextmanager
    def taken(self, profile: int, batch: int) -> Iterator[Lane]:
        """A lane that is prepared for it; with an error inside it is freed and forgotten, for nobody knows its state."""
        lane = self._next(profile, batch)
        try:
            yield lane
        except BaseException:
            self._drop(lane)
            raise
        with self._turn:
            self._free.append(lane)
            self._turn.notify()

    def drain(self) -> list[Lane]:
        """All that are not in use, taken out, to be freed."""
        with self._turn:
            free, self._free = self._free, []
            self._made -= len(free)
            self._turn.notify_all()
        return free

    def _next(self, profile: int, batch: int) -> Lane:
        while True:
            lane = None
            with self._turn:
                self._turn.wait_for(lambda: self._free or self._made < self._most)
                for index in reversed(range(len(self._free))):
                    if self._free[index].prepared == (profile, batch):
                        return self._free.pop(index)
                if self._made < self._most:
                    self._made += 1
                else:
                    lane = self._free.pop(0)
            try:
                with CAPTURING.shared():  # it allocates
                    lane = lane or self._make()
                    lane.prepare(profile, batch)
                return lane
            except BaseException as error:
                others = self._drop(lane)
                if not isinstance(error, BackendError) or not others:
                    self._most = self._allowed  # it was not for want of memory, or the next call finds that anew
                    raise
                self._most = others  # there is no memory for more; those that there are go on

    def _drop(self, lane: Lane | None) -> int:
        """Frees a lane, or the place of one that was not made; how many others there are."""
        if lane is not None:
            lane.free()
        with self._turn:
            self._made -= 1
            self._turn.notify()
            return self._made
