"""A simulated GPU in host memory: the parts of cuda-bindings, TensorRT and ONNX Runtime for CUDA that our code calls.

Work in a stream is done when somebody waits for it, not before, so that memory which is read too early holds wrong values.
`FakeGpu.violations` notes what a driver would not refuse but what corrupts memory. Networks run in ONNX Runtime on the CPU.
test_fake_gpu.py compares it with the real packages.
"""

from __future__ import annotations

import enum
import functools
import itertools
import json
import math
import sys
import threading
import types
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

import swin_deploy.gpus

LEGACY, INVALID, OUT_OF_MEMORY, CAPTURE_REFUSED = 1, 1, 2, 900
ERRORS = {INVALID: "INVALID_VALUE", OUT_OF_MEMORY: "OUT_OF_MEMORY", CAPTURE_REFUSED: "STREAM_CAPTURE_UNSUPPORTED"}
DTYPES = {"tensor(float)": "FLOAT", "tensor(float16)": "HALF", "tensor(bool)": "BOOL", "tensor(uint8)": "UINT8"}
NUMPY = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(bool)": np.bool_, "tensor(uint8)": np.uint8}
RELEASES = {"tensorrt": "11.4.0.106", "tensorrt-rtx": "1.7.1.116", "tensorrt-lean": "11.4.0.106"}
Work = Callable[[], object]


class FakeDriver:
    """libcuda, as swin_deploy.gpus asks it through ctypes which GPUs there are."""

    def __init__(self, *capabilities: str) -> None:
        self.capabilities, self.version = capabilities or ("sm_89",), 13000
        self.cuInit = lambda flags: 0
        self.cuDeviceGet = self._answer
        self.cuDeviceGetName = lambda name, length, device: setattr(name, "value", b"Simulated GPU") or 0
        self.cuDriverGetVersion = lambda version: self._answer(version, self.version)
        self.cuDeviceGetCount = lambda count: self._answer(count, len(self.capabilities))

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: Any) -> int:
        return self._answer(value, divmod(int(self.capabilities[device.value][3:]), 10)[attribute - 75])

    def _answer(self, pointer: Any, value: int) -> int:
        pointer._obj.value = value
        return 0


@dataclass(eq=False)
class Stream:
    work: list[Work] = field(default_factory=list)
    done: int = 0
    capture: list[Work] | None = None


class Contexts(threading.local):
    def __init__(self) -> None:
        self.stack: list[int] = []


def module(name: str, **content: Any) -> Any:
    made = types.ModuleType(name)
    vars(made).update(content, __spec__=ModuleSpec(name, None))
    return made


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
        self.logger: Any = None  # of TensorRT
        self.sessions: list[dict[str, Any]] = []  # provider options of each session of ONNX Runtime
        self.retained: Counter[int] = Counter()  # primary contexts
        self.capturing_thread = 0  # of a capture in the global mode, which no other thread may disturb
        self._contexts, self._lock, self._handles = Contexts(), threading.RLock(), itertools.count(0x7F55_0000_0000, 0x100)

    @property
    def left(self) -> list[Any]:
        """What is still held."""
        return [*self.held.values()][1:] + [*self.alive, *self.retained.elements()]

    def allocate(self, size: int) -> int:
        memory = np.full(size + 256, 0xCD, np.uint8)
        padding = -memory.ctypes.data % 256
        self.held[memory.ctypes.data + padding] = memory[padding : padding + size]
        return int(memory.ctypes.data + padding)

    def array(self, address: int, shape: tuple[int, ...], dtype: Any) -> Any:
        """GPU or pinned memory as an array."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        for start, memory in [*self.held.items()]:
            if isinstance(memory, np.ndarray) and start <= address and address + size <= start + len(memory):
                return memory[address - start :][:size].view(dtype).reshape(shape)
        self.violations.append(f"{size} bytes at {address:#x} are freed, or neither in GPU memory nor pinned")
        return np.empty(shape, dtype)

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

    def complain(self, message: str) -> None:
        """Fail as TensorRT does: the reason is only logged."""
        self.logger.log(ENUMS["Severity"]["ERROR"], message)
        if self.raising:
            raise RuntimeError("Unexpected exception")

    def driver(self) -> Any:
        """The module cuda.bindings.driver."""
        functions = {name: self._checked(name, function) for name, function in self._functions().items()}
        modes = types.SimpleNamespace(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL=1)
        result = types.SimpleNamespace(CUDA_SUCCESS=0)
        return module("cuda.bindings.driver", CUresult=result, CUstreamCaptureMode=modes, **functions)

    def _checked(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def called(*arguments: Any) -> Any:
            self.on_call(name)
            if not name.startswith(("cuInit", "cuGetError", "cuDevice", "cuCtx", "cuThread")):
                if not self._contexts.stack:
                    self.violations.append(f"{name} in a thread without a context")
                if self.capturing_thread not in (0, threading.get_ident()):
                    self.violations.append(f"{name} while another thread captures")
            with self._lock:
                found = self.refuse[name] if name in self.refuse else function(*arguments)
            return found if isinstance(found, tuple) else (int(found or 0), None)

        called.__name__ = name
        return called

    def _functions(self) -> dict[str, Callable[..., Any]]:
        """Each returns its status, or its status and a result; None is success."""

        def new(thing: Any) -> tuple[int, int]:
            self.held[handle := next(self._handles)] = thing
            return 0, handle

        def free(handle: int) -> int:
            return 0 if self.held.pop(handle, None) is not None else INVALID

        def copy(target: int, source: int, size: int, stream: int) -> None:
            self.enqueue(stream, lambda: np.copyto(*(self.array(place, (size,), np.uint8) for place in (target, source))))

        def wait_event(stream: int, event: int, flags: int) -> None:
            recorded = list(self.held[event])
            self.enqueue(stream, lambda: self.drain(*recorded))

        def record(event: int, stream: int) -> None:
            found = self.held[stream]
            self.held[event][:] = found, found.done + len(found.work)

        def end(stream: int) -> tuple[int, int | None]:
            captured, self.held[stream].capture = self.held[stream].capture, None
            return (CAPTURE_REFUSED, None) if captured is None else new(captured)

        def launch(graph: int, stream: int) -> None:
            self.runs["launched"] += 1
            for work in self.held[graph]:
                self.enqueue(stream, work)

        return {
            "cuInit": lambda flags: 0,
            "cuGetErrorName": lambda error: (0, f"CUDA_ERROR_{ERRORS[error]}".encode()),
            "cuGetErrorString": lambda error: (0, ERRORS[error].lower().replace("_", " ").encode()),
            "cuDeviceGet": lambda ordinal: (0, ordinal),
            "cuDevicePrimaryCtxRetain": lambda device: self.retained.update([device]) or (0, device),
            "cuDevicePrimaryCtxRelease": lambda device: self.retained.subtract([device]),
            "cuCtxPushCurrent": lambda context: self._contexts.stack.append(context) if self.retained[context] else INVALID,
            "cuCtxPopCurrent": lambda: (0, self._contexts.stack.pop()),
            "cuThreadExchangeStreamCaptureMode": lambda mode: (0, mode),
            "cuMemAlloc": lambda size: (0, self.allocate(size)),
            "cuMemHostAlloc": lambda size, flags: (0, self.allocate(size)),
            "cuMemcpyAsync": copy,
            "cuStreamCreate": lambda flags: new(Stream()),
            "cuStreamSynchronize": lambda stream: self.drain(self.held[stream]),
            "cuStreamWaitEvent": wait_event,
            "cuEventCreate": lambda flags: new([Stream(), 0]),
            "cuEventRecord": record,
            "cuStreamBeginCapture": lambda stream, mode: setattr(self.held[stream], "capture", []),
            "cuStreamEndCapture": end,
            "cuGraphInstantiate": lambda graph, flags: new(self.held[graph]),
            "cuGraphLaunch": launch,
            **dict.fromkeys(("cuMemFree", "cuMemFreeHost", "cuStreamDestroy", "cuEventDestroy"), free),
            **dict.fromkeys(("cuGraphDestroy", "cuGraphExecDestroy"), free),
        }


@functools.cache
def cpu_session(path: str) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def compute(gpu: FakeGpu, cpu: Any, places: dict[str, tuple[int, tuple[int, ...]]], change: float = 0) -> None:
    """Run a network on GPU memory."""

    def array(node: Any) -> Any:
        return gpu.array(*places[node.name], NUMPY[node.type])

    found = cpu.run(None, {node.name: array(node).copy() for node in cpu.get_inputs()})
    for node, values in zip(cpu.get_outputs(), found, strict=True):
        array(node)[...] = values + change


MEMBERS = {
    "Severity": "INTERNAL_ERROR ERROR WARNING INFO VERBOSE",
    "DataType": "FLOAT HALF BOOL UINT8",
    "TensorIOMode": "NONE INPUT OUTPUT",
    "TensorLocation": "DEVICE HOST",
    "ExecutionContextAllocationStrategy": "STATIC ON_PROFILE_CHANGE USER_MANAGED",
    "EngineValidity": "VALID SUBOPTIMAL INVALID",
    "CudaGraphStrategy": "DISABLED WHOLE_GRAPH_CAPTURE",
    "DynamicShapesKernelSpecializationStrategy": "LAZY EAGER NONE",
    "EngineInvalidityDiagnostics": "VERSION_MISMATCH UNSUPPORTED_CC OLD_CUDA_DRIVER",
}
ENUMS: dict[str, Any] = {kind: enum.IntFlag(kind, members) for kind, members in MEMBERS.items()}


class Runtime:
    def __init__(self, gpu: FakeGpu, logger: Any) -> None:
        self._gpu, self.engine_host_code_allowed = gpu, False
        gpu.logger = gpu.logger or logger
        gpu.alive.add(self)

    def get_engine_validity(self, plan: bytes) -> tuple[Any, int]:
        return ENUMS["EngineValidity"]["INVALID" if self._gpu.invalid else "VALID"], self._gpu.invalid

    def deserialize_cuda_engine(self, plan: bytes) -> ICudaEngine | None:
        try:
            content = json.loads(plan)
        except ValueError:
            return self._gpu.complain("The plan file's magic tag does not match.\n  Error Code 1: Serialization")
        if content["host_code"] and not self.engine_host_code_allowed:
            return self._gpu.complain("the engine brings host code, which is not allowed")
        return ICudaEngine(self._gpu, content)


class ICudaEngine:
    def __init__(self, gpu: FakeGpu, content: dict[str, Any]) -> None:
        self._gpu, self._profiles, self._cpu = gpu, content["profiles"], cpu_session(content["graph"])
        self._inputs = [node.name for node in self._cpu.get_inputs()]
        self._nodes = {node.name: node for node in (*self._cpu.get_inputs(), *self._cpu.get_outputs())}
        self.num_io_tensors, self.num_optimization_profiles = len(self._nodes), len(self._profiles)
        gpu.alive.add(self)

    def get_tensor_name(self, index: int) -> str:
        return list(self._nodes)[index]

    def get_tensor_mode(self, name: str) -> Any:
        return ENUMS["TensorIOMode"]["INPUT" if name in self._inputs else "OUTPUT"]

    def get_tensor_location(self, name: str) -> Any:
        return ENUMS["TensorLocation"]["DEVICE"]

    def get_tensor_dtype(self, name: str) -> Any:
        return ENUMS["DataType"][DTYPES[self._nodes[name].type]]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(size if isinstance(size, int) else -1 for size in self._nodes[name].shape)

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        return [(size, *self.get_tensor_shape(name)[1:]) for size in self._profiles[profile]]

    def create_runtime_config(self) -> IRuntimeConfig:
        return IRuntimeConfig(self._gpu)

    def create_execution_context(self, config: Any = None) -> IExecutionContext:
        return IExecutionContext(self, config if isinstance(config, IRuntimeConfig) else None)


class IRuntimeConfig:
    """Also the IRuntimeCache, whose content names the batch sizes that kernels were compiled for."""

    def __init__(self, gpu: FakeGpu) -> None:
        self.cuda_graph_strategy = self.dynamic_shapes_kernel_specialization_strategy = None
        self.batches: set[int] = set()
        gpu.alive.add(self)

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        pass

    def create_runtime_cache(self) -> IRuntimeConfig:
        return self

    def set_runtime_cache(self, cache: IRuntimeConfig) -> bool:
        return cache is self

    def deserialize(self, content: bytes) -> bool:
        whole = content.startswith(b"CACHE")
        self.batches |= set(map(int, content.split()[1:])) if whole else set()
        return whole

    def serialize(self) -> bytes:
        return b" ".join([b"CACHE", *(b"%d" % batch for batch in sorted(self.batches))])


class IExecutionContext:
    def __init__(self, engine: ICudaEngine, config: IRuntimeConfig | None) -> None:
        self._engine, self._gpu, self._config = engine, engine._gpu, config
        self._own_graphs = config is not None and config.cuda_graph_strategy.name == "WHOLE_GRAPH_CAPTURE"
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._profile, self._state = -1, 0  # counts changes, after which graphs of the context are invalid
        self._gpu.alive.add(self)

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self._profile, self._shapes, self._addresses, self._state = profile, {}, {}, self._state + 1
        return stream in self._gpu.held

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        low, _, high = self._engine.get_tensor_profile_shape(name, self._profile)
        self._shapes[name], self._state = tuple(shape), self._state + 1
        return all(a <= size <= b for a, size, b in zip(low, shape, high, strict=True))

    def infer_shapes(self) -> list[str]:
        return [name for name in self._engine._inputs if name not in self._shapes]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        first, *tail = self._engine._nodes[name].shape
        batch = next(iter(self._shapes.values()))[0]
        return (batch * (int(first.partition("*")[0]) if "*" in str(first) else 1), *tail)

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name], self._state = address, self._state + 1
        return address % 256 == 0

    def execute_async_v3(self, stream: int) -> bool:
        gpu, cpu, state, myself = self._gpu, self._engine._cpu, self._state, weakref.ref(self)
        capturing = gpu.held[stream].capture is not None
        if gpu.fail or (gpu.uncapturable and (capturing or self._own_graphs)):
            return bool(gpu.complain(gpu.fail or "the graph could not be captured"))
        gpu.runs["captured" if capturing else "plain"] += 1
        places = {name: (self._addresses[name], self.get_tensor_shape(name)) for name in self._engine._nodes}
        if self._config is not None:
            self._config.batches.add(next(iter(self._shapes.values()))[0])

        def work() -> None:
            context = myself()
            if context is None or context._state != state:
                gpu.violations.append("an execution context was changed or freed before its work was done")
            else:
                compute(gpu, cpu, places)

        return gpu.enqueue(stream, work)


def tensorrt_module(gpu: FakeGpu, backend: str) -> Any:
    classes = {"ILogger": type("ILogger", (), {}), "Runtime": functools.partial(Runtime, gpu)}
    return module(backend.replace("-", "_"), __version__=RELEASES[backend], **ENUMS, **classes)


class RunOptions(dict[str, str]):
    def add_run_config_entry(self, key: str, value: str) -> None:
        self[key] = value


class IOBinding(dict[str, Any]):
    def bind_input(
        self, name: str, device_type: str, device_id: int, element_type: Any, shape: tuple[int, ...], buffer_ptr: int
    ) -> None:
        self[name] = buffer_ptr, shape

    bind_output = bind_input


class InferenceSession:
    """ONNX Runtime's, with a provider for the GPU."""

    def __init__(self, gpu: FakeGpu, path: str, providers: list[Any]) -> None:
        given: dict[str, Any] = dict(providers[:-1])
        self._gpu, self._cpu, self._device = gpu, cpu_session(path), given["CUDAExecutionProvider"]
        gpu.sessions.append(given)
        if self._device.get("enable_cuda_graph") and not gpu.graphs_allowed:
            raise RuntimeError("This session cannot use the graph capture feature as requested by the user")
        self._graphs: dict[str, Any] = {}
        self.get_inputs, self.get_outputs, self.io_binding = self._cpu.get_inputs, self._cpu.get_outputs, IOBinding
        self.get_providers = lambda: [*(given if gpu.starts else ()), "CPUExecutionProvider"]
        self._thread = threading.get_ident()
        gpu.alive.add(self)

    def run_with_iobinding(self, iobinding: IOBinding, run_options: RunOptions) -> None:
        gpu, stream, bound = self._gpu, int(self._device["user_compute_stream"]), dict(iobinding)
        if gpu.fail:
            raise RuntimeError(gpu.fail)
        if threading.get_ident() != self._thread or run_options["disable_synchronize_execution_providers"] != "1":
            gpu.violations.append("a run in another thread, or one that waits for the whole GPU")
        graph = run_options.get("gpu_graph_id", "-1")
        kind = "plain" if graph == "-1" else "launched" if graph in self._graphs else "captured"
        gpu.runs[kind] += 1
        if kind == "captured":
            gpu.drain(gpu.held[stream])
            gpu.capturing_thread = threading.get_ident()
            compute(gpu, self._cpu, bound)  # takes its time, as a capture does
            gpu.capturing_thread = 0
            if gpu.uncapturable:
                gpu.held[stream].capture = []  # the capture is never ended
                raise RuntimeError("CUDA failure 900: operation not permitted when stream is capturing")
            self._graphs[graph] = bound
        places = self._graphs.get(graph, bound)
        gpu.enqueue(stream, lambda: compute(gpu, self._cpu, places, change=gpu.wrong_graphs and kind != "plain"))


def onnxruntime_module(gpu: FakeGpu) -> Any:
    def create(path: str, sess_options: Any = None, providers: Any = None, **others: Any) -> Any:
        if providers == ["CPUExecutionProvider"]:
            return ort.InferenceSession(path, sess_options, providers=providers)
        if gpu.fail:
            raise RuntimeError(gpu.fail)
        return InferenceSession(gpu, path, providers)

    return module(
        "onnxruntime",
        __version__="1.31.1",
        SessionOptions=ort.SessionOptions,
        RunOptions=RunOptions,
        InferenceSession=create,
        get_available_providers=lambda: ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"],
        preload_dlls=lambda: print("" if gpu.starts else "Failed to load libcudnn.so.9", end=""),
    )


def install(patch: pytest.MonkeyPatch, *capabilities: str) -> FakeGpu:
    """Give this process GPUs of these compute capabilities."""
    gpu = FakeGpu(*capabilities)
    patch.setattr(swin_deploy.gpus, "cuda_driver", lambda: gpu.library)
    patch.setitem(sys.modules, "cuda.bindings", module("cuda.bindings", driver=gpu.driver()))
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
