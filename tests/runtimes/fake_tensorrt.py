"""A double of TensorRT's Python modules that runs nothing but what an engine was made of: its ONNX graph, with ONNX Runtime, on
the addresses that were set.

Its plans are JSON: the graph's file and the profiles. It does what the documentation says of the real one, and is strict: what
that leaves undefined is a violation. Objects do not keep alive what they were made with, so that an order that is wrong shows.
"""

from __future__ import annotations

import ctypes
import enum
import functools
import importlib.machinery
import json
import types
import weakref
from pathlib import Path
from typing import Any

import numpy as np
from fake_driver import FakeDriver

NUMPY = {"FLOAT": np.float32, "HALF": np.float16, "BOOL": np.bool_, "UINT8": np.uint8}
ONNX = {"tensor(float)": "FLOAT", "tensor(float16)": "HALF", "tensor(bool)": "BOOL", "tensor(uint8)": "UINT8"}

Severity = enum.Enum("Severity", "INTERNAL_ERROR ERROR WARNING INFO VERBOSE")
DataType = enum.Enum("DataType", "FLOAT HALF BOOL UINT8")
TensorIOMode = enum.Enum("TensorIOMode", "NONE INPUT OUTPUT")
TensorLocation = enum.Enum("TensorLocation", "DEVICE HOST")
ExecutionContextAllocationStrategy = enum.Enum("ExecutionContextAllocationStrategy", "STATIC ON_PROFILE_CHANGE USER_MANAGED")
EngineValidity = enum.Enum("EngineValidity", "VALID SUBOPTIMAL INVALID")
EngineInvalidityDiagnostics = enum.IntFlag("EngineInvalidityDiagnostics", "VERSION_MISMATCH UNSUPPORTED_CC OLD_CUDA_DRIVER")
CudaGraphStrategy = enum.Enum("CudaGraphStrategy", "DISABLED WHOLE_GRAPH_CAPTURE")
DynamicShapesKernelSpecializationStrategy = enum.Enum("DynamicShapesKernelSpecializationStrategy", "LAZY EAGER NONE")


@functools.cache
def session(path: str) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def plan(graph: Path, profiles: list[tuple[int, int, int]], version_compatible: bool = False) -> bytes:
    return json.dumps({"graph": str(graph), "profiles": profiles, "host_code": version_compatible}).encode()


class ILogger:
    Severity = Severity

    def log(self, severity: Severity, message: str) -> None:
        raise NotImplementedError


class World:
    """What the objects of one module share. The tests set what is to go wrong, and read what went on."""

    def __init__(self, driver: FakeDriver) -> None:
        self.driver = driver
        self.logger: Any = None
        self.contexts_made = self.plain_runs = self.captured_runs = self.serialized = self.addressed = 0
        self.fail = ""  # what execute_async_v3 complains of
        self.spoilt_captures = 0  # of contexts that capture by themselves
        self.strategies: list[str] = []  # of memory, of each engine of TensorRT for RTX
        self.capturing: list[bool] = []  # of each context that was made, whether it does
        self.raising = False  # whether what fails is an exception, as in some of the bindings
        self.uncapturable = False
        self.invalid: Any = 0  # flags that get_engine_validity answers
        self.alive: weakref.WeakSet[Any] = weakref.WeakSet()
        self.ended: list[str] = []

    def error(self, message: str) -> None:
        self.logger.log(Severity.ERROR, message)
        if self.raising:
            raise RuntimeError("Unexpected exception")

    def wrong(self, what: str) -> None:
        self.driver.violations.append(what)

    def made(self, thing: Any) -> None:
        if not self.driver.has_context():
            self.wrong(f"{type(thing).__name__} was made in a thread without a context")
        self.alive.add(thing)
        name, ended = type(thing).__name__, self.ended
        weakref.finalize(thing, lambda: ended.append(name if self.driver.has_context() else f"{name} without a context"))


class IExecutionContext:
    def __init__(self, world: World, engine: ICudaEngine, own_graphs: bool, cache: IRuntimeCache | None) -> None:
        self._world, self._engine, self._own_graphs, self._cache = world, weakref.ref(engine), own_graphs, cache
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._profile = -1
        self._state, self._settled = 0, False  # counts changes; whether it ran since the last change of a shape
        self._pending: int | None = None
        world.contexts_made += 1
        world.capturing.append(own_graphs)
        world.made(self)

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        if stream_handle not in self._world.driver.streams or not 0 <= profile_index < self._of().num_optimization_profiles:
            self._world.error(f"there is no profile {profile_index} or no such stream")
            return False
        self._profile, self._shapes = profile_index, {}
        self._touched()
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        if self._profile < 0:
            self._world.wrong("an input shape before a profile")
        low, _, high = self._of().get_tensor_profile_shape(name, self._profile)
        if any(not a <= size <= b for a, size, b in zip(low, shape, high, strict=True)):
            self._world.error(f"{shape} is outside of {low} to {high}")
            return False
        self._shapes[name] = tuple(shape)
        self._touched()
        return True

    def infer_shapes(self) -> list[str]:
        return [name for name in self._of().inputs if name not in self._shapes]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if name in self._shapes or self.infer_shapes():
            return self._shapes.get(name, (-1,))
        batch = next(iter(self._shapes.values()))[0]
        first, *tail = self._of().shapes[name]
        rows = int(str(first).partition("*")[0]) if "*" in str(first) else 1
        return (batch * rows, *tail)

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if type(memory) is not int or name not in self._of().shapes:
            self._world.error(f"{name} at {memory!r}")
            return False
        self._addresses[name] = memory
        self._world.addressed += 1
        self._state += 1
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        world, driver = self._world, self._world.driver
        engine = self._of()
        if not driver.has_context():
            world.wrong("execute_async_v3 in a thread without a context")
            return False
        if world.fail:
            world.error(world.fail)
            return False
        if world.uncapturable and self._own_graphs:
            world.spoilt_captures += 1
            world.error("the graph could not be captured")
            return False
        if missing := [name for name in engine.shapes if name not in self._addresses] or self.infer_shapes():
            world.error(f"no address or shape for {', '.join(missing)}")
            return False
        for name, address in self._addresses.items():
            size = int(np.prod(self.get_tensor_shape(name))) * np.dtype(NUMPY[engine.kinds[name]]).itemsize
            if address % 256 or not driver.here(address, size, device=True):
                world.wrong(f"{name} at {address:#x} is not {size} bytes of the GPU's memory, or not aligned")
                return False
        if driver.capturing(stream_handle):
            if self._own_graphs:
                world.wrong("a capture around an execution context that captures by itself")
            if world.uncapturable or not self._settled:
                driver.spoil(stream_handle)
                world.error("operation not permitted when stream is capturing")
                return False
            world.captured_runs += 1
        else:
            if self._pending not in (None, stream_handle):
                world.wrong("one execution context in two streams at a time")
            self._pending = stream_handle
            self._settled = True
            world.plain_runs += 1
            if self._cache is not None:
                self._cache._compiled.add(next(iter(self._shapes.values()))[0])
        state, addresses = self._state, dict(self._addresses)
        shapes = {name: self.get_tensor_shape(name) for name in engine.shapes}
        myself = weakref.ref(self)

        def work() -> None:
            context = myself()
            if context is None or context._engine() is None:
                return world.wrong("an execution context was freed before its work was done, or its graph launched after it")
            if context._state != state:
                return world.wrong("an execution context was changed before its work was done, or its graph launched")
            context._pending = None
            feeds = {name: context._array(name, addresses[name], shapes[name]).copy() for name in engine.inputs}
            for name, found in zip(engine.outputs, session(engine.graph).run(list(engine.outputs), feeds), strict=True):
                context._array(name, addresses[name], shapes[name])[...] = found

        return driver.enqueue(stream_handle, work) == 0

    def _array(self, name: str, address: int, shape: tuple[int, ...]) -> Any:
        kind = np.dtype(NUMPY[self._of().kinds[name]])
        size = int(np.prod(shape)) * kind.itemsize
        if not self._world.driver.here(address, size, device=True):
            self._world.wrong(f"{name} is in memory that was freed")
            return np.empty(shape, kind)
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address)).view(kind).reshape(shape)

    def _touched(self) -> None:
        self._state, self._settled = self._state + 1, False

    def _of(self) -> ICudaEngine:
        engine = self._engine()
        if engine is None:
            self._world.wrong("an execution context was used after its engine was freed")
            raise RuntimeError("use after free")
        return engine


class IRuntimeCache:
    """Its content names the batches that kernels were compiled for."""

    _TITLE = b"CACHE of a simulated GPU"

    def __init__(self, world: World) -> None:
        self._world = world
        self._compiled: set[int] = set()

    def deserialize(self, blob: bytes) -> bool:
        if not self._world.driver.has_context():
            self._world.wrong("a cache was read in a thread without a context")
        if not blob.startswith(self._TITLE):
            return False
        self._compiled = set(map(int, blob.removeprefix(self._TITLE).split()))
        return True

    def serialize(self) -> bytes:
        self._world.serialized += 1
        return b" ".join([self._TITLE, *(b"%d" % batch for batch in sorted(self._compiled))])


class IRuntimeConfig:
    def __init__(self, world: World) -> None:
        self._world = world
        self.cuda_graph_strategy = CudaGraphStrategy.DISABLED
        self.dynamic_shapes_kernel_specialization_strategy = DynamicShapesKernelSpecializationStrategy.LAZY
        self._cache: Any = None

    def set_execution_context_allocation_strategy(self, strategy: ExecutionContextAllocationStrategy) -> None:
        assert isinstance(strategy, ExecutionContextAllocationStrategy)
        self._world.strategies.append(strategy.name)

    def create_runtime_cache(self) -> IRuntimeCache:
        return IRuntimeCache(self._world)

    def set_runtime_cache(self, cache: IRuntimeCache) -> bool:
        self._cache = cache
        return True


class ICudaEngine:
    def __init__(self, world: World, runtime: Runtime, content: dict[str, Any]) -> None:
        self._world, self._runtime, self.graph = world, weakref.ref(runtime), content["graph"]
        self._profiles = [tuple(profile) for profile in content["profiles"]]
        made = session(self.graph)
        self.inputs, self.outputs = [n.name for n in made.get_inputs()], [n.name for n in made.get_outputs()]
        nodes = [*made.get_inputs(), *made.get_outputs()]
        self.shapes = {node.name: tuple(node.shape) for node in nodes}
        self.kinds = {node.name: ONNX[node.type] for node in nodes}
        self.num_io_tensors, self.num_optimization_profiles = len(nodes), len(self._profiles)
        world.made(self)

    def get_tensor_name(self, index: int) -> str:
        return [*self.inputs, *self.outputs][index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in self.inputs else TensorIOMode.OUTPUT

    def get_tensor_location(self, name: str) -> TensorLocation:
        return TensorLocation.DEVICE

    def get_tensor_dtype(self, name: str) -> DataType:
        return DataType[self.kinds[name]]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(size if isinstance(size, int) else -1 for size in self.shapes[name])

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
        assert name in self.inputs
        return [(size, *self.get_tensor_shape(name)[1:]) for size in self._profiles[profile_index]]

    def create_runtime_config(self) -> IRuntimeConfig:
        return IRuntimeConfig(self._world)

    def create_execution_context(self, how: Any = ExecutionContextAllocationStrategy.STATIC) -> IExecutionContext:
        if isinstance(how, IRuntimeConfig) and how._cache is None:
            self._world.wrong("an execution context without the runtime cache")
        graphs = isinstance(how, IRuntimeConfig) and how.cuda_graph_strategy == CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        return IExecutionContext(self._world, self, graphs, how._cache if isinstance(how, IRuntimeConfig) else None)


class Runtime:
    _world: World  # of the module that it is in
    version = ""

    def __init__(self, logger: Any) -> None:
        if self._world.logger not in (None, logger):
            self._world.wrong("a logger that is not the first one, which alone is spoken to")
        self._world.logger = logger
        self.engine_host_code_allowed = False
        self._world.made(self)

    def get_engine_validity(self, buffer: bytes) -> tuple[EngineValidity, int]:
        flags = int(self._world.invalid)
        return (EngineValidity.INVALID if flags else EngineValidity.VALID), flags

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> ICudaEngine | None:
        try:
            content = json.loads(serialized_engine)
        except ValueError:
            self._world.error("The plan file's magic tag does not match.\n  Error Code 1: Serialization")
            return None
        if content["host_code"] and not self.engine_host_code_allowed:
            self._world.error("the engine brings host code, which is not allowed")
            return None
        return ICudaEngine(self._world, self, content)


def module(name: str, version: str, driver: FakeDriver) -> Any:
    """A module of that name, to be put into sys.modules; its `world` is for the test."""
    made: Any = types.ModuleType(name)
    made.__spec__ = importlib.machinery.ModuleSpec(name, None)
    made.__version__, made.world = version, World(driver)
    made.Runtime = type("Runtime", (Runtime,), {"_world": made.world})
    own = [ILogger, ICudaEngine, IExecutionContext, DataType, TensorIOMode, TensorLocation, ExecutionContextAllocationStrategy]
    if name == "tensorrt_rtx":
        own += [EngineValidity, EngineInvalidityDiagnostics, CudaGraphStrategy, DynamicShapesKernelSpecializationStrategy]
        own += [IRuntimeConfig, IRuntimeCache]
    for kind in own:
        setattr(made, kind.__name__, kind)
    return made
