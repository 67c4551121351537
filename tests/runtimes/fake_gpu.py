"""A simulated GPU in host memory: the parts of cuda-bindings, TensorRT and ONNX Runtime for CUDA that our code calls.

Work in a stream is done when somebody waits for it, not before, so that memory which is read too early holds wrong values.
`FakeGpu.violations` notes what a driver would not refuse but what corrupts memory. Networks run in ONNX Runtime on the CPU.
test_fake_gpu.py compares names and parameters with the real packages.
"""

from __future__ import annotations

import ctypes
import enum
import functools
import importlib.machinery
import itertools
import json
import math
import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

import swin_deploy.gpus

LEGACY, INVALID, OUT_OF_MEMORY, CAPTURE_REFUSED = 1, 1, 2, 900
ERRORS = {INVALID: "INVALID_VALUE", OUT_OF_MEMORY: "OUT_OF_MEMORY", CAPTURE_REFUSED: "STREAM_CAPTURE_UNSUPPORTED"}
DTYPES = {"tensor(float)": "FLOAT", "tensor(float16)": "HALF", "tensor(bool)": "BOOL", "tensor(uint8)": "UINT8"}
NUMPY = {"FLOAT": np.float32, "HALF": np.float16, "BOOL": np.bool_, "UINT8": np.uint8}
RELEASES = {"tensorrt": "11.4.0.106", "tensorrt-rtx": "1.7.1.116", "tensorrt-lean": "11.4.0.106"}
Work = Callable[[], object]


class FakeDriver:
    """libcuda, as swin_deploy.gpus asks it through ctypes which GPUs there are."""

    def __init__(self, *capabilities: str) -> None:
        self.capabilities, self.version = capabilities or ("sm_89",), 13000
        self.cuInit = lambda flags: 0
        self.cuDeviceGet = lambda device, ordinal: self._answer(device, ordinal)
        self.cuDriverGetVersion = lambda version: self._answer(version, self.version)
        self.cuDeviceGetCount = lambda count: self._answer(count, len(self.capabilities))

    def cuDeviceGetName(self, name: Any, length: int, device: Any) -> int:
        name.value = b"Simulated GPU"
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: Any) -> int:
        return self._answer(value, divmod(int(self.capabilities[device.value][3:]), 10)[attribute - 75])

    def _answer(self, pointer: Any, value: int) -> int:
        pointer._obj.value = value
        return 0


class Stream:
    def __init__(self) -> None:
        self.work: list[Work] = []
        self.done = 0
        self.capture: list[Work] | None = None


class FakeGpu:
    """The machine. `refuse` maps a function of the driver to the error it returns; `on_call` gets the name of each call first.

    The other public attributes make TensorRT or ONNX Runtime fail.
    """

    def __init__(self, *capabilities: str) -> None:
        self.library = FakeDriver(*capabilities)
        self.violations: list[str] = []
        self.refuse: dict[str, int] = {}
        self.on_call: Callable[[str], object] = lambda name: None
        self.fail = ""  # what the libraries complain of when they run
        self.raising = False  # whether TensorRT then raises an exception as well
        self.uncapturable = False  # whether no network can be captured
        self.graphs_allowed = self.starts = True  # whether ONNX Runtime's provider supports graphs, and starts at all
        self.wrong_graphs = False  # whether ONNX Runtime's graphs give wrong outputs
        self.invalid = 0  # flags of get_engine_validity
        self.runs = {"plain": 0, "captured": 0, "launched": 0}
        self.held: dict[int, Any] = {LEGACY: Stream()}  # memory, streams, events and graphs by handle or address
        self.alive: weakref.WeakSet[Any] = weakref.WeakSet()  # objects of TensorRT and ONNX Runtime
        self.logger: Any = None
        self.sessions: list[dict[str, Any]] = []  # provider options of each session of ONNX Runtime
        self.retained, self._contexts = [0] * len(self.library.capabilities), threading.local()
        self.capturing_thread = 0  # of a capture in the global mode, which no other thread may disturb
        self._handles, self._lock = itertools.count(0x7F55_0000_0000, 0x100), threading.RLock()

    @property
    def left(self) -> list[str]:
        """What is still held, as names of types."""
        return [type(thing).__name__ for thing in [*self.held.values(), *self.alive]][1:] + ["context"] * sum(self.retained)

    def array(self, address: int, shape: tuple[int, ...], dtype: Any) -> Any:
        """GPU memory as an array."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        if not self.holds(address, size):
            self.violations.append(f"{size} bytes at {address:#x} are not in GPU memory")
            return np.empty(shape, dtype)
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address)).view(dtype).reshape(shape)

    def holds(self, address: int, size: int) -> bool:
        with self._lock:
            return any(
                start <= address and address + size <= start + len(memory)
                for start, memory in self.held.items()
                if isinstance(memory, ctypes.Array)
            )

    def allocate(self, size: int) -> int:
        memory = (ctypes.c_uint8 * (size + 256))()
        address = (ctypes.addressof(memory) + 255) // 256 * 256
        ctypes.memset(address, 0xCD, size)
        self.held[address] = (ctypes.c_uint8 * size).from_buffer(memory, address - ctypes.addressof(memory))
        return address

    def enqueue(self, stream: int, work: Work) -> bool:
        found = self.held[stream]
        (found.work if found.capture is None else found.capture).append(work)
        return True

    def drain(self, stream: Stream, until: int | None = None) -> None:
        with self._lock:
            until = stream.done + len(stream.work) if until is None else until
            while stream.done < until:
                stream.done += 1
                stream.work.pop(0)()

    def made(self, thing: Any) -> None:
        if not getattr(self._contexts, "stack", None):
            self.violations.append(f"{type(thing).__name__} was created in a thread without a context")
        self.alive.add(thing)

    def driver(self) -> Any:
        """The module cuda.bindings.driver."""
        module: Any = types.ModuleType("cuda.bindings.driver")
        modes = {f"CU_STREAM_CAPTURE_MODE_{name}": value for value, name in enumerate(("GLOBAL", "THREAD_LOCAL", "RELAXED"))}
        module.CUstreamCaptureMode = enum.IntEnum("CUstreamCaptureMode", modes)
        module.CUresult = types.SimpleNamespace(CUDA_SUCCESS=0)
        for name, function in self._functions().items():
            setattr(module, name, self._called(name, function))
        return module

    def _called(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any) -> Any:
            self.on_call(name)
            free = name.startswith(("cuInit", "cuGetError", "cuDevice", "cuCtx", "cuThread"))
            if not free and not getattr(self._contexts, "stack", None):
                self.violations.append(f"{name} in a thread without a context")
            if not free and self.capturing_thread not in (0, threading.get_ident()):
                self.violations.append(f"{name} while another thread captures")
            with self._lock:
                found = self.refuse[name] if name in self.refuse else function(*arguments)
            return found if isinstance(found, tuple) else (int(found), None)

        called.__name__ = name
        called.__signature__ = __import__("inspect").signature(function)  # type: ignore[attr-defined]
        return called

    def _functions(self) -> dict[str, Callable[..., Any]]:
        def new(thing: Any) -> tuple[int, int]:
            handle = next(self._handles)
            self.held[handle] = thing
            return 0, handle

        def gone(handle: int) -> int:
            return 0 if self.held.pop(handle, None) is not None else INVALID

        def retain(dev: int) -> tuple[int, int]:
            self.retained[dev] += 1
            return 0, dev

        def release(dev: int) -> int:
            self.retained[dev] -= 1
            return 0

        def push(ctx: int) -> int:
            assert self.retained[ctx]
            self._contexts.stack = [*getattr(self._contexts, "stack", []), ctx]
            return 0

        def exchange(mode: int) -> tuple[int, int]:
            before, self._contexts.mode = getattr(self._contexts, "mode", 0), mode
            return 0, before

        def copy(dst: int, src: int, ByteCount: int, hStream: int) -> int:
            def work() -> None:
                if self.holds(dst, ByteCount) and self.holds(src, ByteCount):
                    ctypes.memmove(dst, src, ByteCount)
                else:
                    self.violations.append(f"a copy of {ByteCount} bytes from or to memory that is freed or not pinned")

            return not self.enqueue(hStream, work)

        def wait_event(hStream: int, hEvent: int, Flags: int) -> int:
            recorded = list(self.held[hEvent])
            return not self.enqueue(hStream, lambda: self.drain(*recorded))

        def record(hEvent: int, hStream: int) -> int:
            stream = self.held[hStream]
            self.held[hEvent][:] = stream, stream.done + len(stream.work)
            return 0

        def begin(hStream: int, mode: int) -> int:
            self.held[hStream].capture = []
            return 0

        def end(hStream: int) -> tuple[int, int | None]:
            captured, self.held[hStream].capture = self.held[hStream].capture, None
            return (CAPTURE_REFUSED, None) if captured is None else new(captured)

        def launch(hGraphExec: int, hStream: int) -> int:
            self.runs["launched"] += 1
            return not all(self.enqueue(hStream, work) for work in self.held[hGraphExec])

        return {
            "cuInit": lambda Flags: 0,
            "cuGetErrorName": lambda error: (0, f"CUDA_ERROR_{ERRORS[error]}".encode()),
            "cuGetErrorString": lambda error: (0, ERRORS[error].lower().replace("_", " ").encode()),
            "cuDeviceGet": lambda ordinal: (0, ordinal),
            "cuDevicePrimaryCtxRetain": retain,
            "cuDevicePrimaryCtxRelease": release,
            "cuCtxPushCurrent": push,
            "cuCtxPopCurrent": lambda: (0, self._contexts.stack.pop()),
            "cuThreadExchangeStreamCaptureMode": exchange,
            "cuMemAlloc": lambda bytesize: (0, self.allocate(bytesize)),
            "cuMemHostAlloc": lambda bytesize, Flags: (0, self.allocate(bytesize)),
            "cuMemFree": lambda dptr: gone(dptr),
            "cuMemFreeHost": lambda p: gone(p),
            "cuMemcpyAsync": copy,
            "cuStreamCreate": lambda Flags: new(Stream()),
            "cuStreamDestroy": lambda hStream: gone(hStream),
            "cuStreamSynchronize": lambda hStream: self.drain(self.held[hStream]) or 0,
            "cuStreamWaitEvent": wait_event,
            "cuEventCreate": lambda Flags: new([Stream(), 0]),
            "cuEventRecord": record,
            "cuEventDestroy": lambda hEvent: gone(hEvent),
            "cuStreamBeginCapture": begin,
            "cuStreamEndCapture": end,
            "cuGraphInstantiate": lambda hGraph, flags: new(self.held[hGraph]),
            "cuGraphLaunch": launch,
            "cuGraphDestroy": lambda hGraph: gone(hGraph),
            "cuGraphExecDestroy": lambda hGraphExec: gone(hGraphExec),
        }


@functools.cache
def cpu_session(path: str) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


class Runtime:
    gpu: FakeGpu  # of the module that it is in
    trt: Any

    def __init__(self, logger: Any) -> None:
        if self.gpu.logger is None:
            self.gpu.logger = logger
        self.engine_host_code_allowed = False
        self.gpu.made(self)

    def get_engine_validity(self, buffer: bytes) -> tuple[Any, int]:
        return (self.trt.EngineValidity.INVALID if self.gpu.invalid else self.trt.EngineValidity.VALID), self.gpu.invalid

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> ICudaEngine | None:
        try:
            content = json.loads(serialized_engine)
        except ValueError:
            return self.error("The plan file's magic tag does not match.\n  Error Code 1: Serialization")
        if content["host_code"] and not self.engine_host_code_allowed:
            return self.error("the engine brings host code, which is not allowed")
        return ICudaEngine(self, content)

    def error(self, message: str) -> Any:
        self.gpu.logger.log(self.trt.ILogger.Severity.ERROR, message)
        if self.gpu.raising:
            raise RuntimeError("Unexpected exception")


class ICudaEngine:
    def __init__(self, runtime: Runtime, content: dict[str, Any]) -> None:
        self._runtime, self._gpu, self._trt = weakref.ref(runtime), runtime.gpu, runtime.trt
        self._profiles = [tuple(profile) for profile in content["profiles"]]
        self._cpu = cpu_session(content["graph"])
        self._inputs = {node.name: node for node in self._cpu.get_inputs()}
        self._nodes = self._inputs | {node.name: node for node in self._cpu.get_outputs()}
        self.num_io_tensors, self.num_optimization_profiles = len(self._nodes), len(self._profiles)
        self._gpu.made(self)

    def get_tensor_name(self, index: int) -> str:
        return list(self._nodes)[index]

    def get_tensor_mode(self, name: str) -> Any:
        return self._trt.TensorIOMode.INPUT if name in self._inputs else self._trt.TensorIOMode.OUTPUT

    def get_tensor_location(self, name: str) -> Any:
        return self._trt.TensorLocation.DEVICE

    def get_tensor_dtype(self, name: str) -> Any:
        return self._trt.DataType[DTYPES[self._nodes[name].type]]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(size if isinstance(size, int) else -1 for size in self._nodes[name].shape)

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
        return [(size, *self.get_tensor_shape(name)[1:]) for size in self._profiles[profile_index]]

    def create_runtime_config(self) -> IRuntimeConfig:
        return IRuntimeConfig(self._gpu)

    def create_execution_context(self, strategy: Any = None) -> IExecutionContext:
        if self._runtime() is None:
            self._gpu.violations.append("an engine outlived its runtime")
        return IExecutionContext(self, strategy if isinstance(strategy, IRuntimeConfig) else None)


class IRuntimeConfig:
    def __init__(self, gpu: FakeGpu) -> None:
        self._gpu, self._cache = gpu, None
        self.cuda_graph_strategy = self.dynamic_shapes_kernel_specialization_strategy = None

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        pass

    def create_runtime_cache(self) -> IRuntimeCache:
        return IRuntimeCache(self._gpu)

    def set_runtime_cache(self, cache: IRuntimeCache) -> bool:
        self._cache: Any = cache
        return True


class IRuntimeCache:
    """Its content names the batch sizes that kernels were compiled for."""

    _TITLE = b"CACHE "

    def __init__(self, gpu: FakeGpu) -> None:
        self._batches: set[int] = set()
        gpu.made(self)

    def deserialize(self, blob: bytes) -> bool:
        self._batches |= set(map(int, blob.removeprefix(self._TITLE).split())) if blob.startswith(self._TITLE) else set()
        return blob.startswith(self._TITLE)

    def serialize(self) -> bytes:
        return self._TITLE + b" ".join(b"%d" % batch for batch in sorted(self._batches))


class IExecutionContext:
    def __init__(self, engine: ICudaEngine, config: IRuntimeConfig | None) -> None:
        self._engine, self._gpu, self._config = weakref.ref(engine), engine._gpu, config
        self._own_graphs = config is not None and config.cuda_graph_strategy.name == "WHOLE_GRAPH_CAPTURE"
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._profile, self._state = -1, 0  # counts changes, after which graphs of the context are invalid
        self._gpu.made(self)

    def _of(self) -> Any:
        return self._engine()

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        self._profile, self._shapes, self._addresses, self._state = profile_index, {}, {}, self._state + 1
        return stream_handle in self._gpu.held

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        low, _, high = self._of().get_tensor_profile_shape(name, self._profile)
        self._shapes[name], self._state = tuple(shape), self._state + 1
        return all(a <= size <= b for a, size, b in zip(low, shape, high, strict=True))

    def infer_shapes(self) -> list[str]:
        return [name for name in self._of()._inputs if name not in self._shapes]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        first, *tail = self._of()._nodes[name].shape
        batch = next(iter(self._shapes.values()))[0]
        return (batch * (int(first.partition("*")[0]) if "*" in str(first) else 1), *tail)

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self._addresses[name], self._state = memory, self._state + 1
        return memory % 256 == 0

    def execute_async_v3(self, stream_handle: int) -> bool:
        gpu, engine, state = self._gpu, self._of(), self._state
        capturing = gpu.held[stream_handle].capture is not None
        if message := gpu.fail or ("the graph could not be captured" if gpu.uncapturable and self._own_graphs else ""):
            return bool(engine._runtime().error(message))
        if capturing and gpu.uncapturable:
            return bool(engine._runtime().error("operation not permitted when stream is capturing"))
        gpu.runs["captured" if capturing else "plain"] += 1
        batch = next(iter(self._shapes.values()))[0]
        if self._config is not None:
            self._config._cache._batches.add(batch)
        places = {name: (self._addresses[name], self.get_tensor_shape(name)) for name in engine._nodes}
        myself = weakref.ref(self)

        def work() -> None:
            context = myself()
            if context is None or context._engine() is None or context._state != state:
                gpu.violations.append("an execution context was changed or freed before its work was done")
                return
            compute(gpu, engine._cpu, places)

        return gpu.enqueue(stream_handle, work)


def compute(gpu: FakeGpu, cpu: Any, places: dict[str, tuple[int, tuple[int, ...]]], change: float = 0) -> None:
    """Run a network on GPU memory."""
    nodes = {node.name: node for node in (*cpu.get_inputs(), *cpu.get_outputs())}
    arrays = {name: gpu.array(*place, NUMPY[DTYPES[nodes[name].type]]) for name, place in places.items()}
    outputs = [node.name for node in cpu.get_outputs()]
    found = cpu.run(outputs, {name: array.copy() for name, array in arrays.items() if name not in outputs})
    for name, array in zip(outputs, found, strict=True):
        arrays[name][...] = array + change


ENUMS = {
    "Severity": "INTERNAL_ERROR ERROR WARNING INFO VERBOSE",
    "DataType": "FLOAT HALF BOOL UINT8",
    "TensorIOMode": "NONE INPUT OUTPUT",
    "TensorLocation": "DEVICE HOST",
    "ExecutionContextAllocationStrategy": "STATIC ON_PROFILE_CHANGE USER_MANAGED",
    "EngineValidity": "VALID SUBOPTIMAL INVALID",
    "CudaGraphStrategy": "DISABLED WHOLE_GRAPH_CAPTURE",
    "DynamicShapesKernelSpecializationStrategy": "LAZY EAGER NONE",
}


def tensorrt_module(gpu: FakeGpu, backend: str) -> Any:
    name = backend.replace("-", "_")
    made: Any = types.ModuleType(name)
    made.__spec__, made.__version__ = importlib.machinery.ModuleSpec(name, None), RELEASES[backend]
    for kind, members in ENUMS.items():
        setattr(made, kind, enum.Enum(kind, members))
    flags = enum.IntFlag("EngineInvalidityDiagnostics", "VERSION_MISMATCH UNSUPPORTED_CC OLD_CUDA_DRIVER")
    made.ILogger = type("ILogger", (), {"Severity": made.Severity})
    made.Runtime = type("Runtime", (Runtime,), {"gpu": gpu, "trt": made})
    made.EngineInvalidityDiagnostics, made.ICudaEngine, made.IExecutionContext = flags, ICudaEngine, IExecutionContext
    made.IRuntimeConfig, made.IRuntimeCache = IRuntimeConfig, IRuntimeCache
    return made


class RunOptions:
    def __init__(self) -> None:
        self.entries: dict[str, str] = {}

    def add_run_config_entry(self, key: str, value: str) -> None:
        self.entries[key] = value


class IOBinding:
    def __init__(self) -> None:
        self.bound: dict[str, Any] = {}

    def bind_input(
        self, name: str, device_type: str, device_id: int, element_type: Any, shape: tuple[int, ...], buffer_ptr: int
    ) -> None:
        self.bound[name] = buffer_ptr, shape

    bind_output = bind_input


class InferenceSession:
    """ONNX Runtime's, with a provider for the GPU."""

    def __init__(self, gpu: FakeGpu, path: str, providers: list[Any]) -> None:
        if gpu.fail:
            raise RuntimeError(gpu.fail)
        given: dict[str, Any] = dict(providers[:-1])
        self._gpu, self._cpu, self._device = gpu, cpu_session(path), given["CUDAExecutionProvider"]
        gpu.sessions.append(given)
        self._graphs: dict[Any, Any] = {} if self._device.get("enable_cuda_graph") else {-1: None}
        if -1 not in self._graphs and not gpu.graphs_allowed:
            raise RuntimeError("This session cannot use the graph capture feature as requested by the user")
        self.get_inputs, self.get_outputs = self._cpu.get_inputs, self._cpu.get_outputs
        self.get_providers = lambda: [*given, "CPUExecutionProvider"] if gpu.starts else ["CPUExecutionProvider"]
        self.io_binding, self._thread = IOBinding, threading.get_ident()
        gpu.made(self)

    def run_with_iobinding(self, iobinding: IOBinding, run_options: RunOptions) -> None:
        gpu, stream, bound = self._gpu, int(self._device["user_compute_stream"]), dict(iobinding.bound)
        gpu.on_call("run_with_iobinding")
        if gpu.fail:
            raise RuntimeError(gpu.fail)
        if threading.get_ident() != self._thread or run_options.entries["disable_synchronize_execution_providers"] != "1":
            gpu.violations.append("a run in another thread, or one that waits for the whole GPU")
        graph = run_options.entries.get("gpu_graph_id", "-1")
        kind = "plain" if graph == "-1" else "launched" if graph in self._graphs else "captured"
        gpu.runs[kind] += 1
        if kind == "captured":
            gpu.drain(gpu.held[stream])
            gpu.capturing_thread = threading.get_ident()
            gpu.on_call("capture")
            gpu.capturing_thread = 0
            if gpu.uncapturable:
                gpu.held[stream].capture = []  # the capture is never ended
                raise RuntimeError("CUDA failure 900: operation not permitted when stream is capturing")
            self._graphs[graph] = bound
        bound = self._graphs[graph] if graph != "-1" else bound
        gpu.enqueue(stream, lambda: compute(gpu, self._cpu, bound, change=gpu.wrong_graphs and graph != "-1"))


def onnxruntime_module(gpu: FakeGpu) -> Any:
    made: Any = types.ModuleType("onnxruntime")
    made.__version__, made.__spec__ = "1.31.1", importlib.machinery.ModuleSpec("onnxruntime", None)
    made.SessionOptions, made.RunOptions, made.IOBinding = ort.SessionOptions, RunOptions, IOBinding
    made.get_available_providers = lambda: ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    made.preload_dlls = lambda: print("" if gpu.starts else "Failed to load libcudnn.so.9", end="")

    def create(path: str, sess_options: Any = None, providers: Any = None, **others: Any) -> Any:
        if providers == ["CPUExecutionProvider"]:
            return ort.InferenceSession(path, sess_options, providers=providers)
        return InferenceSession(gpu, path, providers)

    made.InferenceSession = create
    return made


def install(patch: pytest.MonkeyPatch, *capabilities: str) -> FakeGpu:
    """Give this process GPUs of these compute capabilities."""
    gpu = FakeGpu(*capabilities)
    patch.setattr(swin_deploy.gpus, "cuda_driver", lambda: gpu.library)
    bindings: Any = types.ModuleType("cuda.bindings")
    bindings.driver = gpu.driver()
    patch.setitem(sys.modules, "cuda.bindings", bindings)
    return gpu


@contextmanager
def simulated(patch: pytest.MonkeyPatch, *capabilities: str) -> Iterator[FakeGpu]:
    """Simulate a machine with these GPUs and with TensorRT; afterwards nothing may be left, and nothing undefined happened."""
    gpu = install(patch, *capabilities)
    for backend in ("tensorrt", "tensorrt-rtx"):
        patch.setitem(sys.modules, backend.replace("-", "_"), tensorrt_module(gpu, backend))
    yield gpu
    assert gpu.violations == []
    assert gpu.left == []
