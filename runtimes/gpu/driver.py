"""Gpu: the few functions of the CUDA driver that running an engine takes: memory, streams, copies, graphs.

The driver is called itself, through ctypes, so that no CUDA package for Python is needed. A GPU is used through its primary
context, the one that TensorRT, PyTorch and CuPy use as well.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from swin_deploy.errors import BackendError
from swin_deploy.gpus import cuda_driver

_HANDLE = ctypes.c_void_p  # CUcontext, CUstream, CUevent, CUgraph, CUgraphExec: pointers to what only the driver knows
_MADE = ctypes.POINTER(_HANDLE)
_ADDRESS = ctypes.c_uint64  # CUdeviceptr

# Argument types as cuda.h declares them, by the names that its macros put in place of the plain ones. Every function returns
# a CUresult, which is 0 when all is well.
PROTOTYPES: dict[str, tuple[Any, ...]] = {
    "cuInit": (ctypes.c_uint,),
    "cuGetErrorName": (ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)),
    "cuGetErrorString": (ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)),
    "cuDeviceGet": (ctypes.POINTER(ctypes.c_int), ctypes.c_int),
    "cuDevicePrimaryCtxRetain": (_MADE, ctypes.c_int),
    "cuDevicePrimaryCtxRelease_v2": (ctypes.c_int,),
    "cuCtxPushCurrent_v2": (_HANDLE,),
    "cuCtxPopCurrent_v2": (_MADE,),
    "cuMemAlloc_v2": (ctypes.POINTER(_ADDRESS), ctypes.c_size_t),
    "cuMemFree_v2": (_ADDRESS,),
    "cuMemHostAlloc": (_MADE, ctypes.c_size_t, ctypes.c_uint),
    "cuMemFreeHost": (ctypes.c_void_p,),
    "cuMemcpyHtoDAsync_v2": (_ADDRESS, ctypes.c_void_p, ctypes.c_size_t, _HANDLE),
    "cuMemcpyDtoHAsync_v2": (ctypes.c_void_p, _ADDRESS, ctypes.c_size_t, _HANDLE),
    "cuMemcpyDtoDAsync_v2": (_ADDRESS, _ADDRESS, ctypes.c_size_t, _HANDLE),
    "cuStreamCreate": (_MADE, ctypes.c_uint),
    "cuStreamDestroy_v2": (_HANDLE,),
    "cuStreamSynchronize": (_HANDLE,),
    "cuStreamWaitEvent": (_HANDLE, _HANDLE, ctypes.c_uint),
    "cuEventCreate": (_MADE, ctypes.c_uint),
    "cuEventRecord": (_HANDLE, _HANDLE),
    "cuEventDestroy_v2": (_HANDLE,),
    "cuStreamBeginCapture_v2": (_HANDLE, ctypes.c_int),
    "cuStreamEndCapture": (_HANDLE, _MADE),
    "cuGraphInstantiateWithFlags": (_MADE, _HANDLE, ctypes.c_uint64),
    "cuGraphLaunch": (_HANDLE, _HANDLE),
    "cuGraphDestroy": (_HANDLE,),
    "cuGraphExecDestroy": (_HANDLE,),
    "cuThreadExchangeStreamCaptureMode": (ctypes.POINTER(ctypes.c_int),),
}
LEGACY_STREAM = 1  # CU_STREAM_LEGACY: the default stream, in which DLPack tensors were asked for
_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: work of the application in the default stream neither waits nor is waited for
_NO_TIMING = 2  # CU_EVENT_DISABLE_TIMING
_THREAD_LOCAL = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL: what other threads do meanwhile is their own affair


class Turns:
    """Either any number of threads are in `shared`, or one is `alone`; who wants to be alone comes before who comes later."""

    def __init__(self) -> None:
        self._turn, self._inside, self._waiting, self._long = threading.Condition(), 0, 0, 0

    @contextmanager
    def shared(self, long: bool = False) -> Iterator[None]:
        """Not to be entered once more inside. `long` says that it takes so long that nobody is to wait for it."""
        with self._turn:
            self._turn.wait_for(lambda: not self._waiting)
            self._inside += 1
            self._long += long
        try:
            yield
        finally:
            with self._turn:
                self._inside -= 1
                self._long -= long
                self._turn.notify_all()

    @contextmanager
    def alone(self) -> Iterator[bool]:
        """Whether it is so: not while somebody is inside for long."""
        with self._turn:
            if self._long:
                yield False
                return
            self._waiting += 1
            try:
                self._turn.wait_for(lambda: not self._inside)
                yield True  # with the lock held
            finally:
                self._waiting -= 1
                self._turn.notify_all()


# ONNX Runtime captures CUDA graphs in CUDA's global mode, in which what other threads do may be refused: it does so alone.
CAPTURING = Turns()


class Gpu:
    """The GPU number `ordinal`, until `close`. All other methods are to be called inside `current`, in any thread.

    Whatever the driver refuses is a BackendError with its own name for that.
    """

    def __init__(self, ordinal: int) -> None:
        driver = cuda_driver()
        if driver is None:
            raise BackendError("The NVIDIA driver is not installed here. Install it, or run on a machine with an NVIDIA GPU.")
        self.ordinal = ordinal
        self._functions: dict[str, Callable[..., int]] = {}
        for name, arguments in PROTOTYPES.items():
            function = getattr(driver, name, None)
            if function is None:
                raise BackendError(f"The NVIDIA driver has no {name}: it is older than CUDA 11.4. Update it.")
            function.argtypes, function.restype = arguments, ctypes.c_int
            self._functions[name] = function
        self._do("cuInit", 0)
        device = ctypes.c_int()
        self._do("cuDeviceGet", ctypes.byref(device), ordinal)
        self._device = device.value
        self._context: int | None = self._made("cuDevicePrimaryCtxRetain", self._device)

    def close(self) -> None:
        """Lets the GPU go; a second time does nothing."""
        if self._context is not None:
            self._context = None
            self._do("cuDevicePrimaryCtxRelease_v2", self._device)

    @contextmanager
    def current(self) -> Iterator[None]:
        """While inside, CUDA calls of this thread are for this GPU; afterwards for the one that they were for before. What
        other threads capture, in whatever mode, does not concern this one meanwhile."""
        self._do("cuCtxPushCurrent_v2", self._context)
        try:
            mode = ctypes.c_int(_THREAD_LOCAL)
            self._do("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))
            try:
                yield
            finally:
                self._do("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))
        finally:
            self._made("cuCtxPopCurrent_v2")

    def allocated(self, size: int) -> int:
        """The address of `size` bytes of GPU memory, aligned to 256; `free` frees them."""
        address = _ADDRESS()
        self._do("cuMemAlloc_v2", ctypes.byref(address), size)
        return address.value

    def free(self, address: int) -> None:
        self._do("cuMemFree_v2", address)

    def pinned(self, size: int) -> int:
        """The address of `size` bytes of this machine's memory that the GPU reads and writes by itself; `unpin` frees them."""
        return self._made("cuMemHostAlloc", size, 0)

    def unpin(self, address: int) -> None:
        self._do("cuMemFreeHost", address)

    def to_device(self, target: int, source: int, size: int, stream: int) -> None:
        self._do("cuMemcpyHtoDAsync_v2", target, source, size, stream)

    def to_host(self, target: int, source: int, size: int, stream: int) -> None:
        self._do("cuMemcpyDtoHAsync_v2", target, source, size, stream)

    def on_device(self, target: int, source: int, size: int, stream: int) -> None:
        """A copy from GPU memory to GPU memory."""
        self._do("cuMemcpyDtoDAsync_v2", target, source, size, stream)

    def stream(self) -> int:
        return self._made("cuStreamCreate", _NON_BLOCKING)

    def end_stream(self, stream: int) -> None:
        self._do("cuStreamDestroy_v2", stream)

    def wait(self, stream: int) -> None:
        """Returns when all that was put into `stream` is done; other threads run meanwhile."""
        self._do("cuStreamSynchronize", stream)

    def event(self) -> int:
        return self._made("cuEventCreate", _NO_TIMING)

    def end_event(self, event: int) -> None:
        self._do("cuEventDestroy_v2", event)

    def follow(self, stream: int, other: int, event: int) -> None:
        """What comes into `stream` from now on waits for what is in `other` now."""
        self._do("cuEventRecord", event, other)
        self._do("cuStreamWaitEvent", stream, event, 0)

    def captured(self, stream: int, enqueue: Callable[[], bool]) -> int | None:
        """What `enqueue` puts into `stream`, not run but kept as a graph, to be launched; None where it cannot be kept."""
        if self._functions["cuStreamBeginCapture_v2"](stream, _THREAD_LOCAL) != 0:
            return None
        whole = False
        try:
            whole = enqueue()
        finally:
            graph = _HANDLE()  # the capture has to be ended, whatever became of it
            ended = self._functions["cuStreamEndCapture"](stream, ctypes.byref(graph)) == 0
        if not graph.value:
            return None
        launchable = _HANDLE()
        try:
            if whole and ended:
                self._functions["cuGraphInstantiateWithFlags"](ctypes.byref(launchable), graph, 0)
        finally:
            self._do("cuGraphDestroy", graph)
        return launchable.value

    def abandon_capture(self, stream: int) -> None:
        """Ends what somebody else began to capture in `stream` and did not end; does nothing where there is nothing."""
        graph = _HANDLE()
        if self._functions["cuStreamEndCapture"](stream, ctypes.byref(graph)) == 0 and graph.value:
            self._do("cuGraphDestroy", graph)

    def launch(self, graph: int, stream: int) -> None:
        self._do("cuGraphLaunch", graph, stream)

    def end_graph(self, graph: int) -> None:
        self._do("cuGraphExecDestroy", graph)

    def _made(self, name: str, *arguments: int) -> int:
        """The handle or address that the function puts where its first argument points to."""
        handle = _HANDLE()
        self._do(name, ctypes.byref(handle), *arguments)
        return handle.value or 0

    def _do(self, name: str, *arguments: Any) -> None:
        if code := self._functions[name](*arguments):
            raise BackendError(f"The CUDA driver refused {name} on cuda:{self.ordinal}: {self._reason(code)}.")

    def _reason(self, code: int) -> str:
        """ "CUDA_ERROR_OUT_OF_MEMORY (out of memory)" """
        words = []
        for name in ("cuGetErrorName", "cuGetErrorString"):
            text = ctypes.c_char_p()
            if self._functions[name](code, ctypes.byref(text)) == 0 and text.value:
                words.append(text.value.decode("utf-8", "replace"))
        return f"{words[0]} ({words[-1]})" if words else f"error {code}"
