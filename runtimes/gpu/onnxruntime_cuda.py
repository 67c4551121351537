"""ONNX Runtime on a GPU, with CUDA graphs, pinned memory and streams of our own; or with its TensorRT provider."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import re
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from swin_deploy.dependencies import require
from swin_deploy.errors import BackendError, MissingDependencyError, sentence
from swin_deploy.gpus import refuse_without_gpu
from swin_deploy.runtimes.base import Feeds, Pool, Runtime
from swin_deploy.runtimes.dlpack import DeviceTensor
from swin_deploy.runtimes.onnxruntime import failed, opened, specs_of
from swin_deploy.specs import Array, TensorSpec

from .driver import CAPTURING, LEGACY_STREAM, Gpu
from .gpu_thread import Worker
from .memory import Layout, Memory

MOST_CALLS = 4  # at a time: while one is computed, others come and go over the bus
MOST_GRAPHS = 16  # batch sizes that have a CUDA graph; ONNX Runtime keeps each until the session ends
SAFE_GRAPHS = 1, 31  # older releases free or reuse what a graph reads when another batch size comes
NO_GRAPH = -1  # the `gpu_graph_id` of a run that is none
_LOG = logging.getLogger("swin_deploy")

Options = dict[str, str]


class OnnxRuntimeCuda(Runtime):
    """The ONNX model in the file `path` on `device` ("cuda:0"). `threads` is for what runs on the CPU; 0 leaves it open.

    Any number of threads may run it. One thread of its own computes, because ONNX Runtime keeps CUDA graphs, and the handles
    of CUDA's libraries, for each thread that does; up to MOST_CALLS calls carry their inputs and outputs meanwhile, each with
    a stream and memory of its own. Raises BackendError when ONNX Runtime does not take the model or cannot start the
    provider, MissingDependencyError where it was built without, UsageError where there is no GPU either.
    """

    calls_at_once = 2
    provider = "CUDAExecutionProvider"
    providers: tuple[tuple[str, Options], ...] = ((provider, {"use_tf32": "0"}),)  # TF32 would not be fp32
    graphs = True

    def __init__(self, path: Path, threads: int = 0, device: str = "cuda:0") -> None:
        ort = require("onnxruntime", "run ONNX models")
        if self.provider not in ort.get_available_providers():
            refuse_without_gpu(device)
            raise MissingDependencyError(
                f"ONNX Runtime {ort.__version__} as it is installed has no {self.provider}, so it cannot run on {device}. "
                'Run: pip uninstall onnxruntime, then pip install "swin-deploy[gpu]"'
            )
        with CAPTURING.shared():
            gpu = Gpu(int(device.partition(":")[2] or 0))
        self._thread = Worker("swin_deploy-onnxruntime")
        opening = partial(_opened, ort, path, threads, self.providers)  # not a method: the runtime would keep itself alive
        graphs = self.graphs and tuple(map(int, re.findall(r"\d+", ort.__version__)[:2])) >= SAFE_GRAPHS
        self._computing = computing = _Computing(gpu, opening, ort.RunOptions, graphs)
        self._release = weakref.finalize(self, self._thread.leave, computing.end)
        self._release.atexit = False
        try:
            inputs, outputs = self._thread.start(computing.begin).result()
        except BaseException:
            self._close()
            raise
        super().__init__(f"onnxruntime {ort.__version__}", inputs, outputs, device)
        layouts = [[Layout.of(spec) for spec in side] for side in (inputs, outputs)]
        self._carriers = computing.carriers = Pool(partial(_Carrier, gpu, *layouts), MOST_CALLS)

    def _run(self, feeds: Feeds, out: Mapping[str, Array] | None) -> Mapping[str, Array]:
        assert out is not None  # Layout.of saw to it that the size of every output is known
        batch = int(feeds[self.inputs[0].name].shape[0])
        try:
            with self._computing.gpu.current(), self._carriers.taken() as carrier:
                try:
                    with CAPTURING.shared():
                        carrier.bring(feeds, batch)
                    self._thread.start(partial(self._computing.compute, carrier, batch)).result()
                    with CAPTURING.shared():
                        carrier.take(out)
                except BaseException:
                    self._thread.start(partial(self._computing.drop, carrier))  # after what may still be using it
                    raise
        except Exception as error:
            raise failed(error) from error
        return out

    def _close(self) -> None:
        self._release()
        self._thread.join()


class OnnxRuntimeTensorRt(OnnxRuntimeCuda):
    """The same with ONNX Runtime's TensorRT provider, which compiles the graph while it is loaded."""

    provider = "TensorrtExecutionProvider"
    providers = ((provider, {}), *OnnxRuntimeCuda.providers)  # what the first does not take is the second's
    graphs = False


def _opened(ort: Any, path: Path, threads: int, known: Sequence[tuple[str, Options]], here: Options, graphs: bool) -> Any:
    """A session with those providers on the GPU and the stream that `here` names."""
    said = preloaded(ort)
    options = here | ({"enable_cuda_graph": "1"} if graphs else {})
    providers = [(name, {**chosen, **options}) for name, chosen in known]
    session = opened(ort, path, threads, [*providers, "CPUExecutionProvider"], "GPU")
    if known[0][0] not in session.get_providers():
        # It warns and goes on with the CPU when CUDA's libraries are missing or of another release.
        raise BackendError(
            f"ONNX Runtime {ort.__version__} could not start its {known[0][0]}, mostly because CUDA or cuDNN is missing "
            f'or of another release than it was built for{said}. Run: pip install "onnxruntime-gpu[cuda,cudnn]"'
        )
    return session


class _Carrier:
    """What one call needs to carry its inputs to the GPU and its outputs from there: a stream, and memory on both sides."""

    def __init__(self, gpu: Gpu, inputs: Sequence[Layout], outputs: Sequence[Layout]) -> None:
        self._gpu = gpu
        self.inputs = [Memory(gpu, layout) for layout in inputs]
        self.outputs = [Memory(gpu, layout) for layout in outputs]
        self.sources = [0] * len(inputs)  # where each input is on the GPU: here, or where the caller has it
        self._batch = self.stream = self.event = 0

    def bring(self, feeds: Feeds, batch: int) -> None:
        """The inputs, on their way to the GPU."""
        if not self.event:
            self.stream = self._gpu.stream()
            self.event = self._gpu.event()
        if batch != self._batch:
            self._batch = 0
            for memory in self.inputs + self.outputs:
                memory.hold(batch)
            self._batch = batch
        if any(isinstance(feed, DeviceTensor) for feed in feeds.values()):
            self._gpu.follow(self.stream, LEGACY_STREAM, self.event)
        for number, memory in enumerate(self.inputs):
            feed = feeds[memory.layout.name]
            if isinstance(feed, DeviceTensor):
                self.sources[number] = feed.pointer
            else:
                memory.view[...] = feed
                self._gpu.to_device(memory.device, memory.host, memory.size, self.stream)
                self.sources[number] = memory.device

    def take(self, out: Mapping[str, Array]) -> None:
        """The outputs, once they are here."""
        for memory in self.outputs:
            self._gpu.to_host(memory.host, memory.device, memory.size, self.stream)
        self._gpu.wait(self.stream)
        for memory in self.outputs:
            out[memory.layout.name][...] = memory.view

    def free(self) -> None:
        """Frees everything, whatever state it is in; a second time does nothing."""
        stream, event, self.stream, self.event = self.stream, self.event, 0, 0
        steps: list[Callable[[], None]] = [memory.free for memory in self.inputs + self.outputs]
        if stream:
            steps = [partial(self._gpu.wait, stream), *steps, partial(self._gpu.end_stream, stream)]
        if event:
            steps.append(partial(self._gpu.end_event, event))
        for step in steps:
            with contextlib.suppress(BackendError):  # a GPU that failed refuses this, too, and what failed has been told
                step()


class _Room:
    """The memory that the session reads and writes for a batch size; a CUDA graph is of these addresses."""

    def __init__(self, gpu: Gpu, layouts: Sequence[Sequence[Layout]], binding: Any, options: Any) -> None:
        self.inputs, self.outputs = ([Memory(gpu, layout, pinned=False) for layout in side] for side in layouts)
        self.binding, self.options = binding, options
        self._ordinal, self._batch = gpu.ordinal, 0

    def hold(self, batch: int) -> None:
        if batch == self._batch:
            return
        self._batch = 0
        for side, bind in ((self.inputs, self.binding.bind_input), (self.outputs, self.binding.bind_output)):
            for memory in side:
                memory.hold(batch)
                layout = memory.layout
                bind(layout.name, "cuda", self._ordinal, layout.dtype.type, layout.shape(batch), memory.device)
        self._batch = batch

    def free(self) -> None:
        self.binding = None
        for memory in self.inputs + self.outputs:
            with contextlib.suppress(BackendError):
                memory.free()


class _Computing:
    """The session, with its stream and memory. `begin`, `compute` and `end` are to be called in one and the same thread."""

    def __init__(
        self, gpu: Gpu, open_session: Callable[[Options, bool], Any], new_options: Callable[[], Any], graphs: bool
    ) -> None:
        self.gpu, self._open, self._new_options, self._graphs = gpu, open_session, new_options, graphs
        self.carriers: Pool[_Carrier] | None = None
        self._session: Any = None
        self._stream = 0
        self._layouts: list[list[Layout]] = []
        self._rooms: dict[int, _Room] = {}  # of each batch size that has a CUDA graph
        self._common: _Room | None = None  # of all others

    def begin(self) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
        """Opens the session; its inputs and outputs."""
        with self.gpu.current():
            self._begin()
            inputs, outputs = specs_of(self._session)
            self._layouts = [[Layout.of(spec) for spec in side] for side in (inputs, outputs)]
            return inputs, outputs

    def compute(self, carrier: _Carrier, batch: int) -> None:
        """Puts the network into the stream: from the inputs of `carrier` to its outputs, for which its stream then waits."""
        with self.gpu.current():
            if self._session is None:  # it was to be opened again, and could not be
                self._begin()
            room = self._rooms.get(batch) or self._with_graph(batch, carrier)
            with CAPTURING.shared():
                try:
                    if room is None:
                        room = self._common = self._common or self._room(NO_GRAPH)
                        self.gpu.wait(self._stream)  # until nothing uses the memory that is about to be another
                        room.hold(batch)
                    self._enter(room, carrier)
                    if not self._graphs:
                        self.gpu.wait(self._stream)  # nodes on the CPU read an input without waiting for our stream
                    self._session.run_with_iobinding(room.binding, room.options)
                    for memory, computed in zip(carrier.outputs, room.outputs, strict=True):
                        self.gpu.on_device(memory.device, computed.device, memory.size, self._stream)
                    self.gpu.follow(carrier.stream, self._stream, carrier.event)
                except BaseException:
                    with contextlib.suppress(BackendError):
                        self.gpu.wait(self._stream)  # until nothing reads the carrier's memory any more
                    raise

    def drop(self, carrier: _Carrier) -> None:
        """Frees what a call that failed was carried with."""
        with contextlib.suppress(BackendError), self.gpu.current(), CAPTURING.shared():
            carrier.free()

    def end(self) -> None:
        """Frees everything; a GPU that has failed may refuse, which changes nothing any more."""
        with contextlib.suppress(BackendError), self.gpu.current(), CAPTURING.shared(long=True):
            for carrier in self.carriers.drain() if self.carriers is not None else ():
                carrier.free()
            self._end()
        self._session = None
        with contextlib.suppress(BackendError), CAPTURING.shared():
            self.gpu.close()

    def _begin(self) -> None:
        with CAPTURING.shared(long=True):
            self._stream = self.gpu.stream()
            here = {"device_id": str(self.gpu.ordinal), "user_compute_stream": str(self._stream)}
            try:
                self._session = self._with_or_without_graphs(here)
            except BaseException:
                self._end()
                raise

    def _with_or_without_graphs(self, here: Options) -> Any:
        if self._graphs:
            try:
                return self._open(here, True)
            except BackendError as error:
                if "graph capture feature" not in str(error):
                    raise
                session = self._open(here, False)
                _LOG.info("ONNX Runtime makes no CUDA graphs of this network: %s", str(error))
                self._graphs = False
                return session
        return self._open(here, False)

    def _end(self) -> None:
        for room in (*self._rooms.values(), *([self._common] if self._common else [])):
            room.free()
        self._rooms, self._common = {}, None
        self._session = None
        stream, self._stream = self._stream, 0
        if stream:
            with contextlib.suppress(BackendError):
                self.gpu.end_stream(stream)

    def _room(self, graph: int) -> _Room:
        options = self._new_options()
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")  # the stream is ours
        if self._graphs:
            options.add_run_config_entry("gpu_graph_id", str(graph))
        return _Room(self.gpu, self._layouts, self._session.io_binding(), options)

    def _enter(self, room: _Room, carrier: _Carrier) -> None:
        self.gpu.follow(self._stream, carrier.stream, carrier.event)
        for memory, source in zip(room.inputs, carrier.sources, strict=True):
            self.gpu.on_device(memory.device, source, memory.size, self._stream)

    def _with_graph(self, batch: int, carrier: _Carrier) -> _Room | None:
        """The room for `batch` images with a CUDA graph that answers, to the bit, as the session does without; None where
        there is to be none, or not now. A session in which capturing goes wrong is opened again, to go on without."""
        if not self._graphs or len(self._rooms) == MOST_GRAPHS:
            return None
        with CAPTURING.alone() as alone:
            if not alone:
                return None  # this time
            room, plain = self._room(len(self._rooms) + 1), self._room(NO_GRAPH).options
            try:
                room.hold(batch)
                self._enter(room, carrier)
                wanted = self._answer(room, plain, carrier)
            except BaseException:
                with contextlib.suppress(BackendError):
                    self.gpu.wait(self._stream)
                room.free()
                raise
            try:  # the first of them runs it as often as it takes, and captures it
                if all(self._answer(room, room.options, carrier) == wanted for _ in range(2)):
                    self._rooms[batch] = room
                    return room
                reason = "the graph gave other answers"
            except Exception as error:  # noqa: BLE001 - whatever it is, without graphs it may be well
                reason = str(error)
            self.gpu.abandon_capture(self._stream)  # a session that ends in the middle of one takes the process with it
            room.free()
            self._end()
        _LOG.warning("ONNX Runtime's CUDA graph of this network is of no use (%s); it goes on without.", reason)
        self._graphs = False
        self._begin()
        return None

    def _answer(self, room: _Room, options: Any, carrier: _Carrier) -> list[bytes]:
        self._session.run_with_iobinding(room.binding, options)
        for memory, computed in zip(carrier.outputs, room.outputs, strict=True):
            self.gpu.to_host(memory.host, computed.device, memory.size, self._stream)
        self.gpu.wait(self._stream)
        return [memory.view.tobytes() for memory in carrier.outputs]


@functools.cache  # for what it prints, standard output of the whole process is held
def preloaded(ort: Any) -> str:
    """Lets ONNX Runtime load CUDA and cuDNN from where pip puts them; what it complains of, in brackets."""
    said = io.StringIO()
    if hasattr(ort, "preload_dlls"):
        with contextlib.redirect_stdout(said):
            ort.preload_dlls()
    return f" ({sentence(said.getvalue())})" if said.getvalue() else ""
