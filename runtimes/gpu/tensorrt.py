"""TensorRT and TensorRT for RTX: engines that build-engine compiled, on the GPU that they were compiled for."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from swin_deploy.dependencies import require
from swin_deploy.errors import BackendError, sentence
from swin_deploy.runtimes.backends import BACKENDS
from swin_deploy.runtimes.base import EngineFile, Feeds, Runtime
from swin_deploy.runtimes.user_cache import read_cached, write_cached
from swin_deploy.specs import Array, Batch
from swin_deploy.tensorrt_log import Said, logger_of

from .contexts import Lane, Lanes
from .driver import CAPTURING, Gpu
from .memory import Layout

_LOG = logging.getLogger("swin_deploy")
MOST_LANES = 8  # calls at a time, and batch sizes whose CUDA graphs are kept; each has its own memory for activations

# TensorRT's names for the types of inputs and outputs.
_DTYPES = {"FLOAT": "float32", "HALF": "float16", "BOOL": "bool", "UINT8": "uint8"}


class TensorRt(Runtime):
    """The engine `file` on `device` ("cuda:0"). Raises BackendError where TensorRT or the driver does not take it,
    MissingDependencyError where TensorRT is not installed.

    Any number of threads may run it; up to MOST_LANES calls are on the GPU at a time, each with an execution context, a
    stream and memory of its own. A batch that no profile holds is split over the largest one; one smaller than each of
    them, or between two, is filled up with its last image, which is cut from the answers.
    """

    backend, name = "tensorrt", "TensorRT"
    own_graphs = False  # whether it captures CUDA graphs by itself
    calls_to_warm = 2  # the second is captured
    calls_at_once = 2

    def __init__(self, file: EngineFile, device: str = "cuda:0") -> None:
        trt = require(BACKENDS[self.backend].found, "run engines")
        logger, said = logger_of(trt)
        self._said, self._file = said, file
        title = f"{self.name} {trt.__version__}"
        layouts = [Layout.of(spec) for spec in file.inputs], [Layout.of(spec) for spec in file.outputs]
        self._natives = natives = _Natives(Gpu(int(device.partition(":")[2] or 0)))
        said.clear()
        try:
            with natives.gpu.current():
                natives.runtime = trt.Runtime(logger)
                if file.host_code:
                    natives.runtime.engine_host_code_allowed = True
                plan = file.path.read_bytes()
                self._check_plan(trt, natives, plan)
                with CAPTURING.shared(long=True):
                    natives.engine = natives.runtime.deserialize_cuda_engine(plan)
                if natives.engine is None:
                    raise BackendError(said.sentence())
                _check_tensors(trt, natives, file)
                self._profiles = _profiles(natives, file.inputs[0].name)
                self._configure(trt, natives)
                make = partial(_lane, self._new_context(trt), natives, *layouts, self.own_graphs, said)
                natives.lanes = Lanes(make, MOST_LANES)
                with natives.lanes.taken(0, self._profiles[0][0]):
                    pass  # the first lane: what it lacks is missed now, and not in the first call
        except BaseException as error:
            reason = _reason(error, said)  # before anything is freed, which may say more
            natives.free()
            if not isinstance(error, Exception):
                raise
            raise BackendError(
                f"{title} cannot run {file.path.name}: {reason}. Where the engine is the reason, compile it "
                f'again with "{file.again}".'
            ) from error
        self._release = weakref.finalize(self, natives.free)
        self._release.atexit = False
        super().__init__(f"{self.backend} {trt.__version__}", file.inputs, file.outputs, device)

    def _check_plan(self, trt: Any, natives: _Natives, plan: bytes) -> None:
        """Raises BackendError where the engine's header says that it cannot be run here."""

    def _configure(self, trt: Any, natives: _Natives) -> None:
        """Makes what execution contexts are made with."""

    def _new_context(self, trt: Any) -> Callable[[_Natives], Any]:
        """What makes an execution context that has memory for one profile at a time."""
        strategy = trt.ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE
        return lambda natives: natives.engine.create_execution_context(strategy)

    def _run(self, feeds: Feeds, out: Mapping[str, Array] | None) -> Mapping[str, Array]:
        assert out is not None  # Layout.of saw to it that the size of every output is known
        natives = self._natives
        batch = int(feeds[self.inputs[0].name].shape[0])
        self._said.clear()
        try:
            with natives.gpu.current():
                for start, count, profile, size in planned(batch, self._profiles):
                    self._run_part(natives, profile, size, feeds, out, start, count)
                    if (profile, size) not in natives.ran:
                        natives.ran.add((profile, size))
                        self._keep(natives)
        except Exception as error:
            raise BackendError(f"{self.name} failed while running the model: {_reason(error, self._said)}") from error
        return out

    def _run_part(self, natives: _Natives, profile: int, size: int, *part: Any) -> None:
        assert natives.lanes is not None
        with natives.lanes.taken(profile, size) as lane:
            lane.run(*part)

    def _keep(self, natives: _Natives) -> None:
        """Keeps what was compiled for a batch size that has just run for the first time."""

    def _close(self) -> None:
        self._release()


class TensorRtRtx(TensorRt):
    """The same with TensorRT for RTX, which compiles the last part on the GPU itself, and keeps that in the user's cache."""

    backend, name = "tensorrt-rtx", "TensorRT for RTX"
    own_graphs = True

    def _check_plan(self, trt: Any, natives: _Natives, plan: bytes) -> None:
        validity, flags = natives.runtime.get_engine_validity(plan)
        if validity == trt.EngineValidity.INVALID:
            kinds = trt.EngineInvalidityDiagnostics.__members__.items()
            why = [name.lower().replace("_", " ") for name, flag in kinds if int(flag) & int(flags)]
            raise BackendError(", ".join(why) or self._said.sentence())

    def _configure(self, trt: Any, natives: _Natives) -> None:
        natives.config = natives.engine.create_runtime_config()
        # It only captures with memory that is there beforehand, of which STATIC is the documentation's example. With several
        # profiles that would be as much as the largest takes in every lane.
        strategy = trt.ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE
        if natives.engine.num_optimization_profiles == 1:
            strategy = trt.ExecutionContextAllocationStrategy.STATIC
        natives.config.set_execution_context_allocation_strategy(strategy)
        self._strategies = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE, trt.CudaGraphStrategy.DISABLED
        self._set_graphs(natives, without=False)
        # Not LAZY, which answers with other kernels until the right ones are compiled: the same input, other last bits.
        natives.config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        natives.cache, natives.cache_file = natives.config.create_runtime_cache(), self._file.cache
        content = read_cached(natives.cache_file)
        if content and natives.cache.deserialize(content):  # it refuses what is damaged, or of another release, GPU or driver
            natives.kept = content
        natives.config.set_runtime_cache(natives.cache)

    def _new_context(self, trt: Any) -> Callable[[_Natives], Any]:
        return lambda natives: natives.engine.create_execution_context(natives.config)

    def _run_part(self, natives: _Natives, profile: int, size: int, *part: Any) -> None:
        """What fails in the first calls of a context may be its capture: that is tried once more without, and, where that does
        it, all contexts of the engine are without from then on."""
        assert natives.lanes is not None
        lane = None
        try:
            with natives.lanes.taken(profile, size) as lane:
                lane.run(*part)
            return
        except Exception as error:
            if lane is None or lane.without_graphs or lane.calls >= self.calls_to_warm:
                raise
            reason = str(error)
        with natives.retrying:
            before = natives.without_graphs
            self._set_graphs(natives, without=True)
            for other in natives.lanes.drain():
                other.free()
            try:
                super()._run_part(natives, profile, size, *part)
            except BaseException:
                self._set_graphs(natives, without=before)  # they are not what fails
                raise
        if not before:
            _LOG.warning("TensorRT for RTX captures no CUDA graph of %s any more: %s", self._file.path.name, reason)

    def _set_graphs(self, natives: _Natives, without: bool) -> None:
        """Says how execution contexts are made from now on."""
        with natives.making:
            natives.without_graphs = without
            natives.config.cuda_graph_strategy = self._strategies[without]

    def _keep(self, natives: _Natives) -> None:
        with suppress(Exception):  # the answers are there; what is not kept is compiled again
            natives.keep_cache()


class _Natives:
    """What TensorRT and the driver made, freed in order, once, and at a time of our choosing.

    TensorRT holds a lock while it logs and takes it to free things. Were one left to the garbage collector, which may run
    inside the function that hears another's log, that thread would wait for itself.
    """

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self.runtime: Any = None
        self.engine: Any = None
        self.config: Any = None
        self.cache: Any = None
        self.lanes: Lanes | None = None
        self.cache_file: Path | None = None
        self.kept = b""  # the cache as it is in the file
        self.ran: set[tuple[int, int]] = set()  # profile and batch of what has run
        self.making = threading.Lock()
        self.retrying = threading.Lock()
        self.without_graphs = False  # whether contexts of TensorRT for RTX do not capture

    def keep_cache(self) -> None:
        """Writes what was compiled for this GPU."""
        if self.cache_file is None:
            return
        with self.making:
            content = bytes(self.cache.serialize())
            if content != self.kept:
                write_cached(self.cache_file, content)
                self.kept = content

    def free(self) -> None:
        """Frees all of it; a GPU that has failed may refuse, which changes nothing any more."""
        with suppress(BackendError), self.gpu.current():
            self._let_go()
        self._let_go()
        with suppress(BackendError):
            self.gpu.close()

    def _let_go(self) -> None:
        if self.lanes is not None:
            for lane in self.lanes.drain():
                lane.free()
        self.lanes = None  # and with it the last way from here to here
        self.cache = None
        self.config = None
        self.engine = None
        self.runtime = None


def _lane(
    new_context: Callable[[_Natives], Any],
    natives: _Natives,
    inputs: Sequence[Layout],
    outputs: Sequence[Layout],
    own_graphs: bool,
    said: Said,
) -> Lane:
    said.clear()
    with natives.making:
        made = [new_context(natives)]  # in a list, so that no frame of an error's traceback keeps it
        without_graphs = natives.without_graphs
    if made == [None]:
        raise BackendError(f"it made no execution context: {said.sentence()}")
    lane = Lane(natives.gpu, made, inputs, outputs, own_graphs, said)
    lane.without_graphs = without_graphs
    return lane


def _reason(error: BaseException, said: Said) -> str:
    """Why it failed: of what the bindings raise, which says little, what the log says."""
    return said.sentence() if isinstance(error, RuntimeError | TypeError) and said.errors else sentence(str(error))


def planned(batch: int, profiles: Sequence[Batch]) -> Iterator[tuple[int, int, int, int]]:
    """How `batch` images are run: (first image, how many, profile, batch size to run them as), one after the other.

    Of the profiles that hold what is left the one tuned for a size nearest to it, and of equal ones the smaller. What is
    larger than all is split over the largest; what falls below or between them is filled up to the next smallest size.
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


def _profiles(natives: _Natives, name: str) -> tuple[Batch, ...]:
    found = []
    for index in range(natives.engine.num_optimization_profiles):
        low, best, high = (int(dims[0]) for dims in natives.engine.get_tensor_profile_shape(name, index))
        found.append((low, best, high))
    return tuple(found)


def _check_tensors(trt: Any, natives: _Natives, file: EngineFile) -> None:
    """Raises BackendError where the engine's inputs and outputs are not its graph's: nothing may be read past its end."""
    wanted = {spec.name: (spec, trt.TensorIOMode.INPUT) for spec in file.inputs}
    wanted |= {spec.name: (spec, trt.TensorIOMode.OUTPUT) for spec in file.outputs}
    names = [natives.engine.get_tensor_name(index) for index in range(natives.engine.num_io_tensors)]
    if set(names) != set(wanted):
        raise BackendError(f"its inputs and outputs are {', '.join(names)}, and those of its graph {', '.join(wanted)}")
    for name, (spec, mode) in wanted.items():
        kind = natives.engine.get_tensor_dtype(name).name
        shape = tuple(natives.engine.get_tensor_shape(name))
        if (
            natives.engine.get_tensor_mode(name) != mode
            or natives.engine.get_tensor_location(name) != trt.TensorLocation.DEVICE
            or _DTYPES.get(kind) != spec.dtype
            or shape[1:] != spec.shape[1:]
        ):
            raise BackendError(f"its {name} is {kind} {list(shape)}, and in its graph {spec}")
