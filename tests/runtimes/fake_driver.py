"""A double of the CUDA driver, in this machine's own memory: what our ctypes prototypes call when there is no GPU.

It is strict: whatever a driver would refuse it refuses, and what a driver would let pass to the ruin of memory it writes
down in `violations`. Work that is put into a stream is done when somebody waits for that stream, not before, so what is read
too early is wrong. It is called as the driver is, through C function pointers whose argument types are those of cuda.h.
"""

from __future__ import annotations

import ctypes
import itertools
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

# The declarations of cuda.h (13.0), by the names that its macros give them.
HEADER = {
    "cuInit": "unsigned int Flags",
    "cuDriverGetVersion": "int *driverVersion",
    "cuGetErrorName": "CUresult error, const char **pStr",
    "cuGetErrorString": "CUresult error, const char **pStr",
    "cuDeviceGet": "CUdevice *device, int ordinal",
    "cuDeviceGetCount": "int *count",
    "cuDeviceGetName": "char *name, int len, CUdevice dev",
    "cuDeviceGetAttribute": "int *pi, CUdevice_attribute attrib, CUdevice dev",
    "cuDevicePrimaryCtxRetain": "CUcontext *pctx, CUdevice dev",
    "cuDevicePrimaryCtxRelease_v2": "CUdevice dev",
    "cuCtxPushCurrent_v2": "CUcontext ctx",
    "cuCtxPopCurrent_v2": "CUcontext *pctx",
    "cuMemAlloc_v2": "CUdeviceptr *dptr, size_t bytesize",
    "cuMemFree_v2": "CUdeviceptr dptr",
    "cuMemHostAlloc": "void **pp, size_t bytesize, unsigned int Flags",
    "cuMemFreeHost": "void *p",
    "cuMemcpyHtoDAsync_v2": "CUdeviceptr dstDevice, const void *srcHost, size_t ByteCount, CUstream hStream",
    "cuMemcpyDtoHAsync_v2": "void *dstHost, CUdeviceptr srcDevice, size_t ByteCount, CUstream hStream",
    "cuMemcpyDtoDAsync_v2": "CUdeviceptr dstDevice, CUdeviceptr srcDevice, size_t ByteCount, CUstream hStream",
    "cuStreamCreate": "CUstream *phStream, unsigned int Flags",
    "cuStreamDestroy_v2": "CUstream hStream",
    "cuStreamSynchronize": "CUstream hStream",
    "cuStreamWaitEvent": "CUstream hStream, CUevent hEvent, unsigned int Flags",
    "cuEventCreate": "CUevent *phEvent, unsigned int Flags",
    "cuEventRecord": "CUevent hEvent, CUstream hStream",
    "cuEventDestroy_v2": "CUevent hEvent",
    "cuStreamBeginCapture_v2": "CUstream hStream, CUstreamCaptureMode mode",
    "cuStreamEndCapture": "CUstream hStream, CUgraph *phGraph",
    "cuGraphInstantiateWithFlags": "CUgraphExec *phGraphExec, CUgraph hGraph, unsigned long long flags",
    "cuGraphLaunch": "CUgraphExec hGraphExec, CUstream hStream",
    "cuGraphDestroy": "CUgraph hGraph",
    "cuGraphExecDestroy": "CUgraphExec hGraphExec",
    "cuThreadExchangeStreamCaptureMode": "CUstreamCaptureMode *mode",
}
TYPES: dict[str, Any] = {
    "int": ctypes.c_int, "unsigned int": ctypes.c_uint, "unsigned long long": ctypes.c_ulonglong, "size_t": ctypes.c_size_t,
    "CUresult": ctypes.c_int, "CUdevice": ctypes.c_int, "CUdevice_attribute": ctypes.c_int, "CUstreamCaptureMode": ctypes.c_int,
    "CUdeviceptr": ctypes.c_ulonglong, "CUcontext": ctypes.c_void_p, "CUstream": ctypes.c_void_p, "CUevent": ctypes.c_void_p,
    "CUgraph": ctypes.c_void_p, "CUgraphExec": ctypes.c_void_p,
}  # fmt: skip
OK, INVALID_VALUE, OUT_OF_MEMORY, INVALID_CONTEXT, INVALID_HANDLE = 0, 1, 2, 201, 400
CAPTURE_UNSUPPORTED, CAPTURE_INVALIDATED = 900, 901
NAMES = {
    INVALID_VALUE: (b"CUDA_ERROR_INVALID_VALUE", b"invalid argument"),
    OUT_OF_MEMORY: (b"CUDA_ERROR_OUT_OF_MEMORY", b"out of memory"),
    INVALID_CONTEXT: (b"CUDA_ERROR_INVALID_CONTEXT", b"invalid device context"),
    INVALID_HANDLE: (b"CUDA_ERROR_INVALID_HANDLE", b"invalid resource handle"),
    CAPTURE_UNSUPPORTED: (b"CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED", b"operation not permitted when stream is capturing"),
    CAPTURE_INVALIDATED: (b"CUDA_ERROR_STREAM_CAPTURE_INVALIDATED", b"operation failed due to a previous error during capture"),
}
LEGACY = 1


def arguments_of(declaration: str) -> list[Any]:
    """The ctypes of "CUdeviceptr *dptr, size_t bytesize": every pointer as what it is in memory, an address."""
    found = []
    for part in declaration.split(","):
        kind = re.sub(r"\w+$", "", part.strip().removeprefix("const ")).strip()
        found.append(ctypes.c_void_p if kind.endswith("*") else TYPES[kind])
    return found


@dataclass
class Stream:
    work: list[Callable[[], None]] = field(default_factory=list)
    capture: list[Callable[[], None]] | None = None
    capturing_thread: int = 0
    spoilt: bool = False
    done: int = 0
    executing: bool = False


class FakeDriver:
    """The driver of a machine with GPUs of these compute capabilities. `counts` says how often a function was called."""

    def __init__(self, *capabilities: str) -> None:
        self.capabilities = capabilities or ("sm_89",)
        self.version = 13000
        self.violations: list[str] = []
        self.counts: dict[str, int] = dict.fromkeys(HEADER, 0)
        self.refuse: dict[str, int] = {}  # function -> the code that it answers
        self.alone = 0  # the thread that captures in the mode in which others may do nothing
        self.retained = [0] * len(self.capabilities)
        self.stacks: dict[int, list[int]] = {}
        self.modes: dict[int, int] = {}  # thread -> how captures of other threads concern it
        self.device: dict[int, Any] = {}  # address -> memory
        self.host: dict[int, Any] = {}
        self.streams: dict[int, Stream] = {LEGACY: Stream()}
        self.events: dict[int, tuple[Stream, int] | None] = {}  # the stream, and how far it was to go
        self.graphs: dict[int, list[Callable[[], None]]] = {}
        self.launchable: dict[int, list[Callable[[], None]]] = {}
        self._lock, self._executing = threading.RLock(), threading.RLock()
        self._handles = itertools.count(0x7F55_0000_0000, 0x100)  # none of them fits into 32 bits
        self._texts = [ctypes.create_string_buffer(text) for pair in NAMES.values() for text in pair]
        self._kept = {name: self._function(name) for name in HEADER}

    def __getattr__(self, name: str) -> Any:
        """A function of the library, without argument types, as ctypes finds it."""
        if name not in HEADER:
            raise AttributeError(name)
        return ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.cast(self._kept[name], ctypes.c_void_p).value)

    @property
    def left(self) -> list[str]:
        """What is still held."""
        held = {"device memory": self.device, "pinned memory": self.host, "events": self.events, "graphs": self.graphs}
        held |= {
            "graphs that can be launched": self.launchable,
            "streams": {k: v for k, v in self.streams.items() if k != LEGACY},
        }
        found = [f"{len(what)} {name}" for name, what in held.items() if what]
        found += [f"cuda:{i} is retained {n} times" for i, n in enumerate(self.retained) if n]
        found += [f"thread {thread} has a capture mode" for thread, mode in self.modes.items() if mode]
        return found + [f"thread {thread} has a context" for thread, stack in self.stacks.items() if stack]

    def here(self, address: int, size: int, device: bool) -> bool:
        """Whether those bytes are memory of the GPU, or pinned memory."""
        kept = self.device if device else self.host
        with self._lock:
            return any(start <= address and address + size <= start + len(memory) for start, memory in kept.items())

    def has_context(self) -> bool:
        return bool(self.stacks.get(threading.get_ident()))

    def enqueue(self, stream: int, work: Callable[[], None]) -> int:
        """Puts work into a stream, or into the graph that is captured there."""
        found = self.streams.get(stream)
        if found is None:
            return INVALID_HANDLE
        if found.capture is not None:
            if found.capturing_thread != threading.get_ident():
                found.spoilt = True
                return CAPTURE_UNSUPPORTED
            found.capture.append(work)
        else:
            found.work.append(work)
        return OK

    def drain(self, stream: Stream, until: int | None = None) -> None:
        """Does what is in a stream, in order, up to that point of it; a thread that comes while another is at it waits."""
        with self._executing:
            until = stream.done + len(stream.work) if until is None else until
            while stream.done < until:
                if stream.executing:
                    self.violations.append("a stream waits for itself")
                    return
                stream.executing = True
                stream.work.pop(0)()
                stream.executing, stream.done = False, stream.done + 1

    def capturing(self, stream: int) -> bool:
        return self.streams[stream].capture is not None

    def spoil(self, stream: int) -> None:
        """What a library does to a capture that it cannot take part in."""
        self.streams[stream].spoilt = True

    def _function(self, name: str) -> Any:
        own = getattr(self, f"_{name.removesuffix('_v2')}")

        def called(*arguments: int | None) -> int:
            try:
                with self._lock:
                    self.counts[name] += 1
                if name in self.refuse:
                    return self.refuse[name]
                if self.alone not in (0, threading.get_ident()) and not re.match("cuCtx|cuThread", name):
                    self.violations.append(f"{name} while another thread captures")
                    return CAPTURE_UNSUPPORTED
                needs_context = not re.match("cuInit|cuGetError|cuDriver|cuDevice|cuCtx", name)
                if needs_context and not self.has_context():
                    self.violations.append(f"{name} in a thread without a context")
                    return INVALID_CONTEXT
                unsafe = name in ("cuMemAlloc_v2", "cuMemFree_v2", "cuMemHostAlloc", "cuMemFreeHost")
                if unsafe and any(s.capturing_thread == threading.get_ident() for s in self.streams.values()):
                    return CAPTURE_UNSUPPORTED
                return int(own(*(argument or 0 for argument in arguments)))
            except Exception as error:  # noqa: BLE001 - C cannot take an exception
                self.violations.append(f"{name}: {type(error).__name__}: {error}")
                return INVALID_VALUE

        return ctypes.CFUNCTYPE(ctypes.c_int, *arguments_of(HEADER[name]))(called)

    def _handle(self, target: int) -> int:
        handle = next(self._handles)
        ctypes.c_void_p.from_address(target).value = handle
        return handle

    def _memory(self, target: int, size: int, kept: dict[int, Any]) -> int:
        if not size:
            return INVALID_VALUE
        memory = (ctypes.c_uint8 * (size + 512))()
        address = (ctypes.addressof(memory) + 255) // 256 * 256
        ctypes.memset(address, 0xCD, size)
        part = (ctypes.c_uint8 * size).from_buffer(memory, address - ctypes.addressof(memory))
        with self._lock:
            kept[address] = part
        ctypes.c_void_p.from_address(target).value = address
        return OK

    def _copy(self, target: int, source: int, size: int, stream: int, to_device: bool, from_device: bool) -> int:
        def whole() -> bool:
            return self.here(target, size, to_device) and self.here(source, size, from_device)

        def work() -> None:
            if not whole():
                self.violations.append(f"a copy of {size} bytes from or to memory that was freed")
                return
            ctypes.memmove(target, source, size)

        if not whole():
            self.violations.append(f"a copy of {size} bytes from or to what is not allocated, or not pinned")
            return INVALID_VALUE
        return self.enqueue(stream, work)

    def _cuInit(self, flags: int) -> int:
        return OK if flags == 0 else INVALID_VALUE

    def _cuDriverGetVersion(self, version: int) -> int:
        ctypes.c_int.from_address(version).value = self.version
        return OK

    def _cuGetErrorName(self, error: int, text: int, which: int = 0) -> int:
        if error not in NAMES:
            return INVALID_VALUE
        place = list(NAMES).index(error) * 2 + which
        ctypes.c_void_p.from_address(text).value = ctypes.addressof(self._texts[place])
        return OK

    def _cuGetErrorString(self, error: int, text: int) -> int:
        return self._cuGetErrorName(error, text, 1)

    def _cuDeviceGetCount(self, count: int) -> int:
        ctypes.c_int.from_address(count).value = len(self.capabilities)
        return OK

    def _cuDeviceGet(self, device: int, ordinal: int) -> int:
        if ordinal >= len(self.capabilities):
            return INVALID_VALUE
        ctypes.c_int.from_address(device).value = ordinal
        return OK

    def _cuDeviceGetName(self, name: int, length: int, device: int) -> int:
        ctypes.memmove(name, b"Simulated GPU\0", 14)
        return OK

    def _cuDeviceGetAttribute(self, value: int, attribute: int, device: int) -> int:
        number = int(self.capabilities[device].removeprefix("sm_"))
        ctypes.c_int.from_address(value).value = {75: number // 10, 76: number % 10}[attribute]
        return OK

    def _cuDevicePrimaryCtxRetain(self, context: int, device: int) -> int:
        with self._lock:
            self.retained[device] += 1
        ctypes.c_void_p.from_address(context).value = 0x7F44_0000_0000 + device
        return OK

    def _cuDevicePrimaryCtxRelease(self, device: int) -> int:
        with self._lock:
            self.retained[device] -= 1
        return OK if self.retained[device] >= 0 else INVALID_CONTEXT

    def _cuCtxPushCurrent(self, context: int) -> int:
        device = context - 0x7F44_0000_0000
        if not 0 <= device < len(self.retained) or not self.retained[device]:
            return INVALID_CONTEXT
        self.stacks.setdefault(threading.get_ident(), []).append(context)
        return OK

    def _cuCtxPopCurrent(self, context: int) -> int:
        stack = self.stacks.get(threading.get_ident())
        if not stack:
            return INVALID_CONTEXT
        ctypes.c_void_p.from_address(context).value = stack.pop()
        return OK

    def _cuThreadExchangeStreamCaptureMode(self, mode: int) -> int:
        value, thread = ctypes.c_int.from_address(mode), threading.get_ident()
        self.modes[thread], value.value = value.value, self.modes.get(thread, 0)
        return OK

    def _cuMemAlloc(self, address: int, size: int) -> int:
        return self._memory(address, size, self.device)

    def _cuMemFree(self, address: int) -> int:
        with self._lock:
            return OK if self.device.pop(address, None) is not None else INVALID_VALUE

    def _cuMemHostAlloc(self, address: int, size: int, flags: int) -> int:
        return self._memory(address, size, self.host)

    def _cuMemFreeHost(self, address: int) -> int:
        with self._lock:
            return OK if self.host.pop(address, None) is not None else INVALID_VALUE

    def _cuMemcpyHtoDAsync(self, target: int, source: int, size: int, stream: int) -> int:
        return self._copy(target, source, size, stream, True, False)

    def _cuMemcpyDtoHAsync(self, target: int, source: int, size: int, stream: int) -> int:
        return self._copy(target, source, size, stream, False, True)

    def _cuMemcpyDtoDAsync(self, target: int, source: int, size: int, stream: int) -> int:
        return self._copy(target, source, size, stream, True, True)

    def _cuStreamCreate(self, stream: int, flags: int) -> int:
        if flags != 1:
            self.violations.append("a stream that waits for the default stream, and makes it wait")
        with self._lock:
            self.streams[self._handle(stream)] = Stream()
        return OK

    def _cuStreamDestroy(self, stream: int) -> int:
        with self._lock:
            return OK if self.streams.pop(stream, None) is not None else INVALID_HANDLE

    def _cuStreamSynchronize(self, stream: int) -> int:
        found = self.streams.get(stream)
        if found is None:
            return INVALID_HANDLE
        if found.capture is not None:
            found.spoilt = True
            return CAPTURE_UNSUPPORTED
        self.drain(found)
        return OK

    def _cuEventCreate(self, event: int, flags: int) -> int:
        with self._lock:
            self.events[self._handle(event)] = None
        return OK

    def _cuEventRecord(self, event: int, stream: int) -> int:
        if event not in self.events or stream not in self.streams:
            return INVALID_HANDLE
        found = self.streams[stream]
        with self._executing:
            self.events[event] = found, found.done + len(found.work)
        return OK

    def _cuStreamWaitEvent(self, stream: int, event: int, flags: int) -> int:
        recorded = self.events.get(event)
        if recorded is None:
            return INVALID_HANDLE

        return self.enqueue(stream, lambda: self.drain(*recorded))

    def _cuEventDestroy(self, event: int) -> int:
        with self._lock:
            return OK if self.events.pop(event, 0) != 0 else INVALID_HANDLE

    def _cuStreamBeginCapture(self, stream: int, mode: int) -> int:
        found = self.streams[stream]
        if mode != 1 or stream == LEGACY or found.capture is not None:
            return INVALID_VALUE
        found.capture, found.capturing_thread, found.spoilt = [], threading.get_ident(), False
        return OK

    def _cuStreamEndCapture(self, stream: int, graph: int) -> int:
        found = self.streams[stream]
        captured, found.capture, found.capturing_thread = found.capture, None, 0
        ctypes.c_void_p.from_address(graph).value = None
        if captured is None or found.spoilt:
            return CAPTURE_INVALIDATED
        with self._lock:
            self.graphs[self._handle(graph)] = captured
        return OK

    def _cuGraphInstantiateWithFlags(self, launchable: int, graph: int, flags: int) -> int:
        with self._lock:
            self.launchable[self._handle(launchable)] = list(self.graphs[graph])
        return OK

    def _cuGraphLaunch(self, launchable: int, stream: int) -> int:
        if launchable not in self.launchable:
            self.violations.append("a graph was launched that is not there any more")
            return INVALID_HANDLE
        for step in self.launchable[launchable]:
            self.enqueue(stream, step)
        return OK

    def _cuGraphDestroy(self, graph: int) -> int:
        with self._lock:
            return OK if self.graphs.pop(graph, None) is not None else INVALID_HANDLE

    def _cuGraphExecDestroy(self, launchable: int) -> int:
        with self._lock:
            return OK if self.launchable.pop(launchable, None) is not None else INVALID_HANDLE
