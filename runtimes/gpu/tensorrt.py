"""Run TensorRT and TensorRT for RTX engines on the GPU that they were compiled for."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from swin_deploy.dependencies import require
from swin_deploy.errors import BackendError, sentence
from swin_deploy.options import Array, Batch
from swin_deploy.runtimes.backends import BACKENDS
from swin_deploy.runtimes.base import EngineFile, Feeds, Runtime
from swin_deploy.runtimes.user_cache import read_cached, write_cached
from swin_deploy.tensorrt_log import ErrorLog, logger_of

from .capture_lock import CAPTURE_LOCK
from .contexts import ContextPool, ContextSlot
from .cuda_context import CudaContext, device_number
from .io_buffers import BufferLayout, device_tensor

_LOG = logging.getLogger(__name__)
MAX_CONTEXTS = 8  # concurrent calls, and batch sizes whose CUDA graphs are kept; each has its own activation memory

_DTYPES = {"FLOAT": "float32", "HALF": "float16", "BOOL": "bool", "UINT8": "uint8", "INT64": "int64"}


class TensorRt(Runtime):
    """An engine that TensorRT compiled.

    Up to MAX_CONTEXTS calls run at a time, each with its own execution context, stream and buffers. A batch larger than every
    optimisation profile is split; one smaller than a profile's minimum is padded with its last image.
    """

    backend, name = "tensorrt", "TensorRT"
    own_graphs = False  # whether the library captures CUDA graphs by itself
    calls_to_warm = 2  # the second call is captured
    calls_at_once = 2
    device_tensor = staticmethod(device_tensor)

    def __init__(self, file: EngineFile, device: str = "cuda:0") -> None:
        trt = require(BACKENDS[self.backend].found, "run engines")
        logger, self._errors = logger_of(trt)
        self._resources = resources = _EngineResources(file, device, self._errors, self.own_graphs)
        self._errors.clear()
        try:
            with resources.cuda.current():
                resources.runtime = trt.Runtime(logger)
                if file.host_code:
                    resources.runtime.engine_host_code_allowed = True
                plan = file.path.read_bytes()
                self._check_plan(trt, resources, plan)
                with CAPTURE_LOCK.shared(long=True):
                    resources.engine = resources.runtime.deserialize_cuda_engine(plan)
                if resources.engine is None:
                    raise BackendError(self._errors.sentence())
                _check_tensors(trt, resources, file)
                self._profiles = resources.profiles()
                self._configure(trt, resources)
                resources.pool = ContextPool(resources.create_slot, MAX_CONTEXTS)
                # Create the first slot, so that what is missing fails here and not in the first call.
                resources.pool.use(0, self._profiles[0][0], lambda slot: None)
        except BaseException as error:
            reason = _reason(error, self._errors)  # before anything is freed, which may log more
            resources.free()
            if not isinstance(error, Exception):
                raise
            raise BackendError(
                f"{self.name} {trt.__version__} cannot run {file.path.name}: {reason}. If the engine is the cause, compile it "
                f'again with "{file.again}".'
            ) from error
        self._release = weakref.finalize(self, resources.free)
        self._release.atexit = False
        super().__init__(f"{self.backend} {trt.__version__}", file.inputs, file.outputs, device)

    def _check_plan(self, trt: Any, resources: _EngineResources, plan: bytes) -> None:
        """Raise BackendError if the engine's header says that it cannot run on this machine."""

    def _configure(self, trt: Any, resources: _EngineResources) -> None:
        """Set `resources.config`, the argument of create_execution_context."""
        resources.config = trt.ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE

    def _run(self, feeds: Feeds, out: Mapping[str, Array] | None) -> Mapping[str, Array]:
        assert out is not None  # BufferLayout checked that the size of every output is known
        resources = self._resources
        batch = int(feeds[self.inputs[0].name].shape[0])
        self._errors.clear()
        try:
            with resources.cuda.current():
                for start, count, profile, size in split_batch(batch, self._profiles):
                    self._run_part(resources, profile, size, feeds, out, start, count)
                    if (profile, size) not in resources.finished:
                        resources.finished.add((profile, size))
                        self._save_kernels(resources)
        except Exception as error:
            raise BackendError(f"{self.name} failed while running the model: {_reason(error, self._errors)}") from error
        return out

    def _run_part(self, resources: _EngineResources, profile: int, size: int, *part: Any) -> None:
        assert resources.pool is not None
        resources.pool.use(profile, size, ContextSlot.run, *part)

    def _save_kernels(self, resources: _EngineResources) -> None:
        """Save what was compiled for a batch size, after its first call."""

    def _close(self) -> None:
        self._release()


class TensorRtRtx(TensorRt):
    """An engine of TensorRT for RTX, which compiles the kernels on the target GPU; they are kept in the user's cache."""

    backend, name = "tensorrt-rtx", "TensorRT for RTX"
    own_graphs = True

    def _check_plan(self, trt: Any, resources: _EngineResources, plan: bytes) -> None:
        validity, flags = resources.runtime.get_engine_validity(plan)
        if validity == trt.EngineValidity.INVALID:
            kinds = trt.EngineInvalidityDiagnostics.__members__.items()
            reasons = [name.lower().replace("_", " ") for name, flag in kinds if int(flag) & int(flags)]
            raise BackendError(", ".join(reasons) or self._errors.sentence())

    def _configure(self, trt: Any, resources: _EngineResources) -> None:
        resources.config = resources.engine.create_runtime_config()
        # It captures only with memory that is allocated beforehand (STATIC in its documentation). With several profiles, every
        # context would take as much as the largest profile.
        static = resources.engine.num_optimization_profiles == 1
        strategies = trt.ExecutionContextAllocationStrategy
        resources.config.set_execution_context_allocation_strategy(
            strategies.STATIC if static else strategies.ON_PROFILE_CHANGE
        )
        resources.graph_strategies = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE, trt.CudaGraphStrategy.DISABLED
        resources.disable_graphs(False)
        # LAZY answers with other kernels until the specialised ones are compiled: the same input, different last bits.
        resources.config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        resources.cache = resources.config.create_runtime_cache()
        content = read_cached(resources.file.cache)
        if content and resources.cache.deserialize(content):  # False if damaged, or of another release, GPU or driver
            resources.cached = content
        resources.config.set_runtime_cache(resources.cache)

    def _run_part(self, resources: _EngineResources, profile: int, size: int, *part: Any) -> None:
        """Retry a failed first call without CUDA graphs; if that succeeds, all later contexts are without them."""
        assert resources.pool is not None
        slot: ContextSlot | None = None

        def run(taken: ContextSlot) -> None:
            nonlocal slot
            slot = taken
            slot.run(*part)

        try:
            resources.pool.use(profile, size, run)
            return
        except Exception as error:
            if slot is None or slot.graphs_disabled or slot.calls >= self.calls_to_warm:
                raise
            reason = str(error)
        with resources.retry_lock:
            before = resources.graphs_disabled
            resources.disable_graphs(True)
            for other in resources.pool.drain():
                other.free()
            try:
                super()._run_part(resources, profile, size, *part)
            except BaseException:
                resources.disable_graphs(before)  # graphs are not the cause
                raise
        if not before:
            _LOG.warning("TensorRT for RTX runs %s without CUDA graphs from now on: %s", resources.file.path.name, reason)

    def _save_kernels(self, resources: _EngineResources) -> None:
        with suppress(Exception):  # the outputs are valid; kernels that are not saved are compiled again
            resources.save_cache()


class _EngineResources:
    """The objects of TensorRT and the driver, freed once, in order, and never by the garbage collector.

    TensorRT holds a lock while it logs and takes it to free objects. The garbage collector may run inside the function that
    receives a log message, and that thread would wait for itself. So functions take these resources and no single object of
    TensorRT, which the traceback of an error would keep alive.
    """

    def __init__(self, file: EngineFile, device: str, errors: ErrorLog, own_graphs: bool) -> None:
        self.file, self._errors, self._own_graphs = file, errors, own_graphs
        self._layouts = [[BufferLayout.from_spec(spec) for spec in side] for side in (file.inputs, file.outputs)]
        self.runtime: Any = None
        self.engine: Any = None
        self.config: Any = None
        self.cache: Any = None
        self.pool: ContextPool | None = None
        self.cached = b""  # the content of the cache file
        self.finished: set[tuple[int, int]] = set()  # profile and batch of every call so far
        self.retry_lock = threading.Lock()
        self.graphs_disabled = False  # whether new contexts of TensorRT for RTX do not capture
        self.graph_strategies: Any = ()
        self._config_lock = threading.Lock()
        self.cuda = CudaContext(device_number(device))

    def create_slot(self) -> ContextSlot:
        self._errors.clear()
        with self._config_lock:
            context = [self.engine.create_execution_context(self.config)]  # a list, see ContextSlot
            graphs_disabled = self.graphs_disabled
        if context == [None]:
            raise BackendError(f"it created no execution context: {self._errors.sentence()}")
        slot = ContextSlot(self.cuda, context, self._layouts, self._own_graphs, self._errors)
        slot.graphs_disabled = graphs_disabled
        return slot

    def profiles(self) -> tuple[Batch, ...]:
        name, count = self.file.inputs[0].name, self.engine.num_optimization_profiles
        shapes = [self.engine.get_tensor_profile_shape(name, index) for index in range(count)]
        return tuple((int(low[0]), int(best[0]), int(high[0])) for low, best, high in shapes)

    def disable_graphs(self, disabled: bool) -> None:
        """Set whether contexts that are created from now on capture CUDA graphs by themselves."""
        with self._config_lock:
            self.graphs_disabled = disabled
            self.config.cuda_graph_strategy = self.graph_strategies[disabled]

    def save_cache(self) -> None:
        with self._config_lock:
            content = bytes(self.cache.serialize()) if self.file.cache else b""
            if content != self.cached:
                write_cached(self.file.cache, content)
                self.cached = content

    def free(self) -> None:
        """Free everything; after a failure the GPU may refuse, which is ignored."""
        with suppress(BackendError), self.cuda.current():
            self._free()
        self._free()
        with suppress(BackendError):
            self.cuda.close()

    def _free(self) -> None:
        if self.pool is not None:
            for slot in self.pool.drain():
                slot.free()
        self.pool = None  # it refers back to this object
        self.cache = self.config = None
        self.engine = None
        self.runtime = None


def _reason(error: BaseException, errors: ErrorLog) -> str:
    """Return the logged reason where the bindings raise an exception without one."""
    return errors.sentence() if isinstance(error, RuntimeError | TypeError) and errors.errors else sentence(str(error))


def split_batch(batch: int, profiles: Sequence[Batch]) -> Iterator[tuple[int, int, int, int]]:
    """Split a batch into calls (first image, number of images, profile index, batch size to run) that the profiles allow.

    Each call uses the profile whose optimal size is nearest to the remaining images; of equal ones, the smaller. A batch
    above every maximum is split over the largest profile. One below or between the profiles is padded to the next minimum.
    """
    start = 0
    while left := batch - start:
        fitting = [i for i, (low, _, high) in enumerate(profiles) if low <= left <= high]
        largest = max(range(len(profiles)), key=lambda i: (profiles[i][2], profiles[i][1]))
        if fitting:
            chosen = min(fitting, key=lambda i: (abs(profiles[i][1] - left), profiles[i][2]))
            size = count = left
        elif left > profiles[largest][2]:
            chosen = largest
            size = count = profiles[largest][2]
        else:
            above = [i for i, (low, _, _) in enumerate(profiles) if low > left]
            chosen = min(above, key=lambda i: profiles[i][0])
            size, count = profiles[chosen][0], left
        yield start, count, chosen, size
        start += count


def _check_tensors(trt: Any, resources: _EngineResources, file: EngineFile) -> None:
    """Raise BackendError if the engine's inputs and outputs are not its graph's: buffers must never be read past their end."""
    expected = {spec.name: (spec, trt.TensorIOMode.INPUT) for spec in file.inputs}
    expected |= {spec.name: (spec, trt.TensorIOMode.OUTPUT) for spec in file.outputs}
    names = [resources.engine.get_tensor_name(index) for index in range(resources.engine.num_io_tensors)]
    if set(names) != set(expected):
        raise BackendError(f"its inputs and outputs are {', '.join(names)}; expected those of its graph, {', '.join(expected)}")
    for name, (spec, mode) in expected.items():
        kind = resources.engine.get_tensor_dtype(name).name
        shape = tuple(resources.engine.get_tensor_shape(name))
        if (
            resources.engine.get_tensor_mode(name) != mode
            or resources.engine.get_tensor_location(name) != trt.TensorLocation.DEVICE
            or _DTYPES.get(kind) != spec.dtype
            or shape[1:] != spec.shape[1:]
        ):
            raise BackendError(f"its {name} is {kind} {list(shape)}; expected {spec}, as in its graph")
