"""Run ONNX Runtime on a GPU, with CUDA graphs, pinned buffers and streams of our own, or with its TensorRT provider."""

from __future__ import annotations

import _thread
import contextlib
import functools
import io
import logging
import re
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from swin_deploy.bundle import TensorSpec
from swin_deploy.dependencies import require
from swin_deploy.errors import BackendError, MissingDependencyError, UsageError, sentence
from swin_deploy.gpus import refuse_without_gpu
from swin_deploy.options import Array
from swin_deploy.runtimes.base import Feeds, Pool, Runtime, of_any_batch, static_batch_of
from swin_deploy.runtimes.dlpack import DeviceTensor
from swin_deploy.runtimes.onnxruntime import OnnxRuntime, failed, opened, specs_of

from .capture_lock import CAPTURE_LOCK
from .cuda_context import CudaContext, Handle, device_number
from .io_buffers import BufferLayout, IoBuffer, StreamBuffers, device_tensor

MAX_TRANSFERS = 4  # concurrent calls: while one is computed, others copy their inputs and outputs
MAX_GRAPHS = 16  # batch sizes with a CUDA graph, which ONNX Runtime keeps until the session ends
FIRST_SAFE_RELEASE = 1, 31  # in older releases, another batch size frees or reuses memory that a graph reads
RTX_PLUGIN = "onnxruntime_ep_nv_tensorrt_rtx"
NO_GRAPH = -1  # the `gpu_graph_id` of a run without a CUDA graph
_LOG = logging.getLogger(__name__)

Options = dict[str, str]


class OnnxRuntimeCuda(Runtime):
    """An ONNX model in ONNX Runtime's CUDA provider; `threads` are for nodes that run on the CPU.

    One thread computes, because ONNX Runtime keeps CUDA graphs and the handles of CUDA's libraries per thread. Up to
    MAX_TRANSFERS calls copy their inputs and outputs meanwhile, each with a stream and buffers.
    """

    calls_at_once = 2
    provider = "CUDAExecutionProvider"
    providers: tuple[tuple[str, Options], ...] = ((provider, {"use_tf32": "0"}),)  # TF32 is less precise than fp32
    graphs = True
    device_tensor = staticmethod(device_tensor)

    def __init__(self, path: Path, threads: int = 0, device: str = "cuda:0") -> None:
        ort = require("onnxruntime", "run ONNX models")
        if self.provider not in ort.get_available_providers():
            refuse_without_gpu(device)
            raise MissingDependencyError(
                f"The installed ONNX Runtime {ort.__version__} has no {self.provider}, so it cannot run on {device}. "
                'Run: pip uninstall onnxruntime, then pip install "swin-deploy[gpu]"'
            )
        with CAPTURE_LOCK.shared():
            cuda = CudaContext(device_number(device))
        create = partial(_create_session, ort, path, threads, self.providers)  # a bound method would keep the runtime alive
        graphs = self.graphs and tuple(map(int, re.findall(r"\d+", ort.__version__)[:2])) >= FIRST_SAFE_RELEASE
        self._executor = ThreadPoolExecutor(1, "swin-deploy-onnxruntime")
        self._session = session = _GraphSession(cuda, create, ort.RunOptions, graphs)
        # The garbage collector may run anywhere, also while an executor holds its lock: the finalizer must not submit.
        self._release = weakref.finalize(self, _thread.start_new_thread, _shut_down, (self._executor, session))
        self._release.atexit = False
        try:
            inputs, outputs = self._executor.submit(session.open).result()
        except BaseException:
            self._close()
            raise
        super().__init__(f"onnxruntime {ort.__version__}", inputs, outputs, device)
        self._transfers = session.transfers = Pool(partial(_Transfer, cuda, session.layouts), MAX_TRANSFERS)

    def _run(self, feeds: Feeds, out: Mapping[str, Array] | None) -> Mapping[str, Array]:
        assert out is not None  # BufferLayout checked that the size of every output is known
        batch = int(feeds[self.inputs[0].name].shape[0])
        session = self._session
        try:
            with session.cuda.current():
                self._transfers.use(self._run_transferred, feeds, batch, out)
        except Exception as error:
            raise failed(error) from error
        return out

    def _run_transferred(self, transfer: _Transfer, feeds: Feeds, batch: int, out: Mapping[str, Array]) -> None:
        try:
            with CAPTURE_LOCK.shared():
                transfer.send(feeds, batch)
            self._executor.submit(self._session.compute, transfer, batch).result()
            with CAPTURE_LOCK.shared():
                transfer.receive(out)
        except BaseException:
            self._executor.submit(self._session.discard, transfer)  # queued after the work that may still use it
            raise

    def _close(self) -> None:
        if self._release.detach():
            _shut_down(self._executor, self._session)


class OnnxRuntimeTensorRt(OnnxRuntimeCuda):
    """An ONNX model in ONNX Runtime's TensorRT provider, which compiles the graph while it is loaded."""

    provider = "TensorrtExecutionProvider"
    providers = ((provider, {}), *OnnxRuntimeCuda.providers)  # the second runs what the first does not support
    graphs = False


class OnnxRuntimeTensorRtRtx(OnnxRuntime):
    """An ONNX model in ONNX Runtime's plug-in provider for TensorRT for RTX, which brings that library and compiles the graph.

    Arrays are copied by ONNX Runtime. The plug-in needs no ONNX Runtime that is built for CUDA.
    """

    def __init__(self, path: Path, threads: int = 0, device: str = "cuda:0") -> None:
        refuse_without_gpu(device)
        ort, plugin = require("onnxruntime", "run ONNX models"), require(RTX_PLUGIN, "run ONNX models in TensorRT for RTX")
        name, devices = rtx_plugin_devices(ort, plugin)
        number = device_number(device)
        if number >= len(devices):
            raise UsageError(
                f"Device {device} is not available to {name}, which supports {len(devices)} GPUs of this machine. It needs an "
                "RTX GPU from Ampere on. Use another device, or the back end onnxruntime."
            )
        self._session = opened(ort, path, threads, (), "GPU", devices=devices[number : number + 1])
        if name not in self._session.get_providers():
            raise BackendError(f"ONNX Runtime {ort.__version__} could not start its plug-in provider {name}.")
        Runtime.__init__(self, f"onnxruntime {ort.__version__}, {name} {plugin.__version__}", *specs_of(self._session), device)
        self._names = [spec.name for spec in self.outputs]

    def _run(self, feeds: Feeds, out: Mapping[str, Array] | None) -> Mapping[str, Array]:
        try:
            found = dict(zip(self._names, self._session.run(self._names, feeds), strict=True))
        except Exception as error:
            raise failed(error) from error
        for name, array in (out or {}).items():
            array[...] = found[name]
        return found if out is None else out

    def _close(self) -> None:
        self._session = None


@functools.cache  # a library can be registered once
def rtx_plugin_devices(ort: Any, plugin: Any) -> tuple[str, list[Any]]:
    """Register the library of the plug-in provider; return the name of the provider and the devices that it supports."""
    name = str(plugin.get_ep_name())
    if not hasattr(ort, "register_execution_provider_library"):
        raise MissingDependencyError(
            f"ONNX Runtime {ort.__version__} has no plug-in providers. Expected 1.24 or newer. "
            'Run: pip install --upgrade "swin-deploy[onnxruntime-tensorrt-rtx]"'
        )
    try:
        ort.register_execution_provider_library(name, plugin.get_library_path())
    except Exception as error:
        raise BackendError(
            f"ONNX Runtime {ort.__version__} cannot load its plug-in provider {name}: {sentence(str(error))}. It needs an "
            "NVIDIA driver for CUDA 13. Update the driver, or use the back end onnxruntime."
        ) from error
    return name, [device for device in ort.get_ep_devices() if device.ep_name == name]


def _shut_down(executor: ThreadPoolExecutor, session: _GraphSession) -> None:
    executor.submit(session.close)
    executor.shutdown()


def _create_session(
    ort: Any, path: Path, threads: int, providers: Sequence[tuple[str, Options]], device: Options, graphs: bool
) -> Any:
    """Create a session on the GPU and the stream that the provider options `device` name."""
    warnings = preloaded(ort)
    options = device | ({"enable_cuda_graph": "1"} if graphs else {})
    on_gpu = [(name, {**chosen, **options}) for name, chosen in providers]
    session = opened(ort, path, threads, [*on_gpu, "CPUExecutionProvider"], "GPU")
    if providers[0][0] not in session.get_providers():
        # ONNX Runtime only warns, and continues on the CPU, if CUDA's libraries are missing or of another release.
        raise BackendError(
            f"ONNX Runtime {ort.__version__} could not start its {providers[0][0]}. The usual cause is that CUDA or cuDNN is "
            f'missing or of another release than it was built for{warnings}. Run: pip install "onnxruntime-gpu[cuda,cudnn]"'
        )
    return session


class _Transfer(StreamBuffers):
    """Copies the inputs of one call to the GPU and its outputs back."""

    def __init__(self, cuda: CudaContext, layouts: Sequence[Sequence[BufferLayout]]) -> None:
        with CAPTURE_LOCK.shared():
            super().__init__(cuda, layouts)
        self.sources = [0] * len(self.inputs)  # device addresses of the inputs: a buffer's, or the caller's tensor
        self._batch = 0

    def send(self, feeds: Feeds, batch: int) -> None:
        """Start to copy the inputs to the GPU."""
        if batch != self._batch:
            self._batch = 0
            for buffer in self.inputs + self.outputs:
                buffer.resize(batch)
            self._batch = batch
        self.wait_for(feeds)
        for number, buffer in enumerate(self.inputs):
            feed = feeds[buffer.layout.name]
            if isinstance(feed, DeviceTensor):
                self.sources[number] = feed.pointer
            else:
                buffer.view[...] = feed
                self._cuda.copy(buffer.device, buffer.host, buffer.size, self.stream)
                self.sources[number] = buffer.device

    def receive(self, out: Mapping[str, Array]) -> None:
        """Copy the outputs to the host and wait for them."""
        for buffer in self.outputs:
            self._cuda.copy(buffer.host, buffer.device, buffer.size, self.stream)
        self._cuda.synchronize(self.stream)
        for buffer in self.outputs:
            out[buffer.layout.name][...] = buffer.view


class _BoundBuffers:
    """I/O binding: the device buffers that the session reads and writes; a CUDA graph is valid for these addresses only."""

    def __init__(self, cuda: CudaContext, layouts: Sequence[Sequence[BufferLayout]], binding: Any, options: Any) -> None:
        self.inputs, self.outputs = ([IoBuffer(cuda, layout, pinned=False) for layout in side] for side in layouts)
        self.binding, self.options = binding, options
        self._ordinal, self._batch = cuda.ordinal, 0

    def resize(self, batch: int) -> None:
        if batch == self._batch:
            return
        self._batch = 0
        for side, bind in ((self.inputs, self.binding.bind_input), (self.outputs, self.binding.bind_output)):
            for buffer in side:
                buffer.resize(batch)
                layout = buffer.layout
                bind(layout.name, "cuda", self._ordinal, layout.dtype.type, layout.shape(batch), buffer.device)
        self._batch = batch

    def free(self) -> None:
        self.binding = None
        for buffer in self.inputs + self.outputs:
            with contextlib.suppress(BackendError):
                buffer.free()


class _GraphSession:
    """The session with its stream, buffers and CUDA graphs. Call all methods in one and the same thread."""

    def __init__(
        self, cuda: CudaContext, create: Callable[[Options, bool], Any], new_options: Callable[[], Any], graphs: bool
    ) -> None:
        self.cuda, self._create, self._new_options, self._graphs = cuda, create, new_options, graphs
        self.transfers: Pool[_Transfer] | None = None
        self.layouts: list[list[BufferLayout]] = []
        self._session: Any = None
        self._stream: Handle = None
        self._captured: dict[int, _BoundBuffers] = {}  # of each batch size that has a CUDA graph
        self._shared: _BoundBuffers | None = None  # of all others

    def open(self) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
        """Create the session; return the specifications of its inputs and outputs."""
        with self.cuda.current():
            self._open()
            inputs, outputs = specs_of(self._session)
            size = static_batch_of(inputs)
            self.layouts = [list(map(BufferLayout.from_spec, of_any_batch(side, size))) for side in (inputs, outputs)]
            return inputs, outputs

    def compute(self, transfer: _Transfer, batch: int) -> None:
        """Queue the network, from the inputs of `transfer` to its outputs; its stream then waits for them."""
        with self.cuda.current():
            if self._session is None:  # it could not be created again after a failed capture
                self._open()
            buffers = self._captured.get(batch) or self._capture(batch, transfer)
            with CAPTURE_LOCK.shared():
                try:
                    if buffers is None:
                        buffers = self._shared = self._shared or self._bind(NO_GRAPH)
                        self.cuda.synchronize(self._stream)  # until no earlier call uses memory that may be replaced
                        buffers.resize(batch)
                    self._copy_inputs(buffers, transfer)
                    if not self._graphs:
                        self.cuda.synchronize(self._stream)  # nodes on the CPU read inputs without waiting for our stream
                    self._session.run_with_iobinding(buffers.binding, buffers.options)
                    for target, source in zip(transfer.outputs, buffers.outputs, strict=True):
                        self.cuda.copy(target.device, source.device, target.size, self._stream)
                    self.cuda.wait_for_stream(transfer.stream, self._stream, transfer.event)
                except BaseException:
                    with contextlib.suppress(BackendError):
                        self.cuda.synchronize(self._stream)  # until nothing reads the buffers of `transfer` any more
                    raise

    def discard(self, transfer: _Transfer) -> None:
        """Free the buffers of a failed call."""
        with contextlib.suppress(BackendError), self.cuda.current(), CAPTURE_LOCK.shared():
            transfer.free()

    def close(self) -> None:
        """Free everything; after a failure the GPU may refuse, which is ignored."""
        with contextlib.suppress(BackendError), self.cuda.current(), CAPTURE_LOCK.shared(long=True):
            for transfer in self.transfers.drain() if self.transfers is not None else ():
                transfer.free()
            self._close()
        self._session = None
        with contextlib.suppress(BackendError), CAPTURE_LOCK.shared():
            self.cuda.close()

    def _open(self) -> None:
        with CAPTURE_LOCK.shared(long=True):
            self._stream = self.cuda.create_stream()
            device = {"device_id": str(self.cuda.ordinal), "user_compute_stream": str(int(self._stream))}
            try:
                try:
                    self._session = self._create(device, self._graphs)
                except BackendError as error:
                    if not self._graphs or "graph capture feature" not in str(error):
                        raise
                    self._session = self._create(device, False)
                    self._graphs = False
                    _LOG.info("ONNX Runtime cannot use CUDA graphs for this network: %s", error)
            except BaseException:
                self._close()
                raise

    def _close(self) -> None:
        for buffers in (*self._captured.values(), self._shared):
            if buffers is not None:
                buffers.free()
        self._captured, self._shared = {}, None
        self._session = None
        stream, self._stream = self._stream, None
        if stream is not None:
            with contextlib.suppress(BackendError):
                self.cuda.destroy_stream(stream)

    def _bind(self, graph: int) -> _BoundBuffers:
        options = self._new_options()
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")  # we synchronise our stream
        if self._graphs:
            options.add_run_config_entry("gpu_graph_id", str(graph))
        return _BoundBuffers(self.cuda, self.layouts, self._session.io_binding(), options)

    def _copy_inputs(self, buffers: _BoundBuffers, transfer: _Transfer) -> None:
        self.cuda.wait_for_stream(self._stream, transfer.stream, transfer.event)
        for buffer, source in zip(buffers.inputs, transfer.sources, strict=True):
            self.cuda.copy(buffer.device, source, buffer.size, self._stream)

    def _capture(self, batch: int, transfer: _Transfer) -> _BoundBuffers | None:
        """Return the buffers of a new CUDA graph whose outputs are those of a run without one, to the bit; None without one.

        After a failed capture the session is created again without CUDA graphs.
        """
        if not self._graphs or len(self._captured) == MAX_GRAPHS:
            return None
        with CAPTURE_LOCK.exclusive() as exclusive:
            if not exclusive:
                return None
            buffers, without_graph = self._bind(len(self._captured) + 1), self._bind(NO_GRAPH).options
            try:
                buffers.resize(batch)
                self._copy_inputs(buffers, transfer)
                expected = self._outputs(buffers, without_graph, transfer)
            except BaseException:
                with contextlib.suppress(BackendError):
                    self.cuda.synchronize(self._stream)
                buffers.free()
                raise
            try:  # the first run captures, after as many plain runs as ONNX Runtime needs
                if all(self._outputs(buffers, buffers.options, transfer) == expected for _ in range(2)):
                    self._captured[batch] = buffers
                    return buffers
                reason = "the graph gave different outputs"
            except Exception as error:  # noqa: BLE001 - whatever the cause, a run without a graph may succeed
                reason = str(error)
            self.cuda.abandon_capture(self._stream)  # a session that is destroyed during a capture aborts the process
            buffers.free()
            self._close()
        _LOG.warning("ONNX Runtime runs this network without CUDA graphs from now on: %s", reason)
        self._graphs = False
        self._open()
        return None

    def _outputs(self, buffers: _BoundBuffers, options: Any, transfer: _Transfer) -> list[bytes]:
        self._session.run_with_iobinding(buffers.binding, options)
        for target, source in zip(transfer.outputs, buffers.outputs, strict=True):
            self.cuda.copy(target.host, source.device, target.size, self._stream)
        self.cuda.synchronize(self._stream)
        return [target.view.tobytes() for target in transfer.outputs]


@functools.cache  # it redirects standard output of the whole process while it runs
def preloaded(ort: Any) -> str:
    """Let ONNX Runtime load CUDA and cuDNN from their pip packages; return its complaints in brackets."""
    printed = io.StringIO()
    if hasattr(ort, "preload_dlls"):
        with contextlib.redirect_stdout(printed):
            ort.preload_dlls()
    return f" ({sentence(printed.getvalue())})" if printed.getvalue() else ""
