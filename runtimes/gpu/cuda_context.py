"""Memory, streams, copies and CUDA graphs on one GPU, through NVIDIA's cuda-bindings."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from swin_deploy.errors import BackendError, MissingDependencyError, sentence

Handle = Any  # CUstream, CUevent or CUgraphExec; cuda-bindings takes integers as well, but needs twice the time for them
LEGACY_STREAM = 1  # CU_STREAM_LEGACY, the default stream that DLPack producers synchronise with
_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: no implicit synchronisation with the application's default stream
_NO_TIMING = 2  # CU_EVENT_DISABLE_TIMING


def device_number(device: str) -> int:
    """Return 1 for "cuda:1" and 0 for "cuda"."""
    return int(device.partition(":")[2] or 0)


class CudaContext:
    """The primary CUDA context of a visible GPU, which TensorRT, PyTorch and CuPy use as well, retained until `close`.

    Call every other method inside `current()`, from any thread. Addresses are integers; streams, events and graphs are the
    handles of cuda-bindings, whose `int()` TensorRT and ONNX Runtime accept.
    """

    def __init__(self, ordinal: int) -> None:
        try:
            from cuda.bindings import driver
        except ImportError as error:
            raise MissingDependencyError(
                f"NVIDIA's Python bindings for CUDA are needed to run models on cuda:{ordinal}, but they cannot be imported "
                f'({sentence(str(error))}). Run: pip install "cuda-bindings>=12.9" "cuda-core>=1.0"'
            ) from error
        self.ordinal, self._driver = ordinal, driver
        self._thread_local: Any = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self._success = driver.CUresult.CUDA_SUCCESS
        self._call(driver.cuInit, 0)
        self._device = self._call(driver.cuDeviceGet, ordinal)
        self._context: Any = self._call(driver.cuDevicePrimaryCtxRetain, self._device)

    def close(self) -> None:
        """Release the context; a second call does nothing."""
        if self._context is not None:
            self._context = None
            self._call(self._driver.cuDevicePrimaryCtxRelease, self._device)

    @contextmanager
    def current(self) -> Iterator[None]:
        """Make this GPU current in the calling thread. Captures in other threads neither restrict this one nor are spoilt."""
        driver = self._driver
        self._call(driver.cuCtxPushCurrent, self._context)
        try:
            before = self._call(driver.cuThreadExchangeStreamCaptureMode, self._thread_local)
            try:
                yield
            finally:
                self._call(driver.cuThreadExchangeStreamCaptureMode, before)
        finally:
            self._call(driver.cuCtxPopCurrent)

    def allocate(self, size: int) -> int:
        """Allocate `size` bytes of GPU memory, aligned to 256 bytes."""
        return int(self._call(self._driver.cuMemAlloc, size))

    def free(self, address: int) -> None:
        self._call(self._driver.cuMemFree, address)

    def allocate_pinned(self, size: int) -> int:
        """Allocate `size` bytes of page-locked host memory."""
        return int(self._call(self._driver.cuMemHostAlloc, size, 0))

    def free_pinned(self, address: int) -> None:
        self._call(self._driver.cuMemFreeHost, address)

    def copy(self, target: int, source: int, size: int, stream: Handle) -> None:
        """Queue a copy between GPU memory and pinned or GPU memory; the driver tells them by their addresses."""
        self._call(self._driver.cuMemcpyAsync, target, source, size, stream)

    def create_stream(self) -> Handle:
        return self._call(self._driver.cuStreamCreate, _NON_BLOCKING)

    def destroy_stream(self, stream: Handle) -> None:
        self._call(self._driver.cuStreamDestroy, stream)

    def synchronize(self, stream: Handle) -> None:
        """Wait until all work in `stream` is done; other threads run meanwhile."""
        self._call(self._driver.cuStreamSynchronize, stream)

    def create_event(self) -> Handle:
        return self._call(self._driver.cuEventCreate, _NO_TIMING)

    def destroy_event(self, event: Handle) -> None:
        self._call(self._driver.cuEventDestroy, event)

    def wait_for_stream(self, stream: Handle, other: Handle, event: Handle) -> None:
        """Make later work in `stream` wait for the work that is in `other` now."""
        self._call(self._driver.cuEventRecord, event, other)
        self._call(self._driver.cuStreamWaitEvent, stream, event, 0)

    def capture(self, stream: Handle, enqueue: Callable[[], bool]) -> Handle | None:
        """Record the work that `enqueue` puts into `stream` as an executable CUDA graph; None where CUDA or it refused."""
        driver = self._driver
        if driver.cuStreamBeginCapture(stream, self._thread_local)[0] != 0:
            return None
        whole = False
        try:
            whole = enqueue()
        finally:  # a capture must be ended whatever happened
            failed, graph = driver.cuStreamEndCapture(stream)
        if not graph or not int(graph):
            return None
        try:
            failed, executable = driver.cuGraphInstantiate(graph, 0) if whole and not failed else (True, None)
            return None if failed else executable
        finally:
            self._call(driver.cuGraphDestroy, graph)

    def abandon_capture(self, stream: Handle) -> None:
        """End a capture that somebody else began in `stream`; do nothing if there is none."""
        failed, graph = self._driver.cuStreamEndCapture(stream)
        if not failed and graph and int(graph):
            self._call(self._driver.cuGraphDestroy, graph)

    def launch(self, graph: Handle, stream: Handle) -> None:
        self._call(self._driver.cuGraphLaunch, graph, stream)

    def destroy_graph(self, graph: Handle) -> None:
        self._call(self._driver.cuGraphExecDestroy, graph)

    def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            result = function(*arguments)
        except RuntimeError as error:  # cuda-bindings found no driver, or one without this function
            raise BackendError(
                f"The NVIDIA driver is not installed, or too old ({sentence(str(error))}). Install or update it, or run on a "
                "machine with an NVIDIA GPU."
            ) from error
        if result[0] is not self._success:
            name, text = self._driver.cuGetErrorName(result[0])[1], self._driver.cuGetErrorString(result[0])[1]
            reason = f"{name.decode()} ({text.decode()})" if name and text else f"error {int(result[0])}"
            raise BackendError(f"{function.__name__} failed on cuda:{self.ordinal}: {reason}.")
        return result[1] if len(result) > 1 else None
