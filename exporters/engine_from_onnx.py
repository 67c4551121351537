"""A TensorRT engine from an ONNX graph: one code path for TensorRT 10.12 and newer, TensorRT 11, and TensorRT for RTX.

Every network is strongly typed: the engine computes in the types that the graph is written in; none is chosen here.
"""

from __future__ import annotations

import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swin_deploy.errors import EngineError, MissingDependencyError, UsageError
from swin_deploy.requires import require

from .gpu import check_gpu, cuda_devices, target_gpu
from .inspect import EngineReport, report_from_inspector, report_from_log

# back end -> (the module, what to call it)
BACKENDS = {"tensorrt": ("tensorrt", "TensorRT"), "tensorrt-rtx": ("tensorrt_rtx", "TensorRT for RTX")}
OLDEST_TENSORRT = (10, 12)  # the first whose strongly typed networks take every graph that we write

Log = Callable[[str, str], None]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class EngineSpec:
    """What an engine is compiled for; the types it computes in are in the graph.

    `gpu` is "sm_89" or the like, or "current", the first GPU of this machine. TensorRT for RTX compiles for any GPU it
    knows; full TensorRT only for the one it runs on. `batch` is (smallest, tuned for, largest).
    """

    backend: str
    gpu: str = "current"
    batch: tuple[int, int, int] = (1, 1, 1)

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise UsageError(f"There is no back end {self.backend!r}. Expected one of: {', '.join(BACKENDS)}.")
        if self.gpu != "current":
            check_gpu(self.backend, self.gpu)
        sizes = self.batch
        if len(sizes) != 3 or not all(type(size) is int for size in sizes) or not 1 <= sizes[0] <= sizes[1] <= sizes[2]:
            raise UsageError(
                f"A batch of {sizes!r} cannot be meant. Expected three whole numbers from 1 up, smallest <= tuned for "
                "<= largest, such as (1, 8, 32)."
            )


@dataclass(frozen=True)
class Engine:
    """A compiled engine and what is known about it; `seconds` is the time it took to parse and compile."""

    plan: bytes
    report: EngineReport
    backend: str
    backend_version: str
    gpu: str
    seconds: float


def resolve_backend(name: str) -> str:
    """The back end that `name` stands for: "tensorrt" or "tensorrt-rtx".

    "auto" is full TensorRT where it and a GPU are present, and otherwise TensorRT for RTX, which compiles without.
    A back end asked for by name is that one or an error, never the other.
    """
    if name == "auto":
        if cuda_devices() and _imports("tensorrt"):
            return "tensorrt"
        if _imports("tensorrt_rtx"):
            return "tensorrt-rtx"
        raise MissingDependencyError(
            "A TensorRT compiler is needed to compile engines, but none is usable here. On a machine with an NVIDIA "
            'GPU run: pip install "swin-deploy[tensorrt]". On any machine run: pip install "swin-deploy[tensorrt-rtx]".'
        )
    if name not in BACKENDS:
        raise UsageError(f"There is no back end {name!r}. Expected one of: auto, {', '.join(BACKENDS)}.")
    if name == "tensorrt" and not cuda_devices():
        raise EngineError(
            "TensorRT compiles on the GPU it compiles for, and this machine has no usable NVIDIA GPU. Run this on the "
            "target machine, or compile here for one of the GPUs of the back end tensorrt-rtx."
        )
    _load(name)
    return name


def engine_from_onnx(onnx: bytes | Path, spec: EngineSpec, log: Log, progress: Progress | None = None) -> Engine:
    """The engine compiled from a serialized ONNX graph, or from a file (weights stored next to it are found).

    `log(severity, message)` receives what the compiler says as it says it (severities "verbose", "info", "warning",
    "error", "internal_error"); `progress(phase, step, steps)` follows its phases. What either raises, and Ctrl-C, stops
    the compiler at its next step and is raised from here: the compiler is native code, which no exception may cross.
    Fusing the graph is one single step, so stopping may have to wait for the end of it.
    """
    if isinstance(onnx, Path) and not onnx.is_file():
        raise UsageError(f"There is no ONNX file {onnx}. Export the model first, or give the path of a graph.")
    trt, gpu = _load(spec.backend), target_gpu(spec.backend, spec.gpu)
    watch = _Watch(log, progress)
    begun = time.perf_counter()
    with _interrupts_kept_for(watch):
        plan, report = _compile(trt, onnx, spec, gpu, watch)
        watch.check()  # the compiler may also speak while it is being taken down
    return Engine(plan, report, spec.backend, str(trt.__version__), gpu, time.perf_counter() - begun)


class _Watch:
    """Listens to the compiler while it runs, and remembers what must stop it."""

    def __init__(self, log: Log, progress: Progress | None) -> None:
        self.log, self.progress = log, progress
        self.errors: list[str] = []
        self.layers: list[str] = []
        self.steps: dict[str, int] = {}
        self.stop: BaseException | None = None

    def hear(self, severity: str, message: str) -> None:
        if severity in ("error", "internal_error"):
            self.errors.append(message.strip())
        elif "LayerType: " in message:
            self.layers.append(message)
        self._call(self.log, severity, message)

    def follow(self, phase: str, step: int) -> bool:
        if self.progress is not None:
            self._call(self.progress, phase, step, self.steps.get(phase, step))
        return self.stop is None

    def check(self) -> None:
        if self.stop is not None:
            raise self.stop

    def _call(self, function: Callable[..., None], *arguments: object) -> None:
        if self.stop is None:
            try:
                function(*arguments)
            except BaseException as error:  # noqa: BLE001 -- raised again by check(), once the native code has returned
                self.stop = error


@contextmanager
def _interrupts_kept_for(watch: _Watch) -> Iterator[None]:
    """While inside, Ctrl-C only sets `watch.stop`; afterwards it is sent again, to the handler that was there before.

    A `try` in the callbacks would not do: Python runs a waiting handler as a function is entered, before its `try`, and
    the binding then drops the KeyboardInterrupt and compiles on.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield  # signals run in the main thread only, and one that is ignored, or kills outright, is not ours to change
        return
    interrupted = threading.Event()

    def remember(signum: int, frame: object) -> None:
        interrupted.set()
        watch.stop = watch.stop or KeyboardInterrupt()

    signal.signal(signal.SIGINT, remember)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if interrupted.is_set():
            signal.raise_signal(signal.SIGINT)


def _compile(trt: Any, onnx: bytes | Path, spec: EngineSpec, gpu: str, watch: _Watch) -> tuple[bytes, EngineReport]:
    # Both listeners must outlive everything that is made with them.
    logger, monitor = _listeners(trt, watch)
    title = f"{BACKENDS[spec.backend][1]} {trt.__version__}"
    try:
        builder = trt.Builder(logger)
    except (TypeError, RuntimeError) as error:  # the binding's way to say that the native factory returned nothing
        raise EngineError(
            f"{title} does not start: {_joined(watch.errors or [str(error)])}. Expected a driver new enough for "
            "it; update the NVIDIA driver, or install an older TensorRT."
        ) from error
    flags = trt.NetworkDefinitionCreationFlag
    # Required by TensorRT 10, ignored by 11, where every network is strongly typed.
    network = builder.create_network(1 << int(flags.STRONGLY_TYPED) if hasattr(flags, "STRONGLY_TYPED") else 0)
    parser = trt.OnnxParser(network, logger)
    parsed = parser.parse_from_file(str(onnx)) if isinstance(onnx, Path) else parser.parse(onnx)
    watch.check()
    if not parsed:
        reasons = [_parser_error(parser.get_error(index)) for index in range(parser.num_errors)]
        raise EngineError(
            f"{title} cannot read the ONNX graph: {_joined(reasons or watch.errors)}. Expected a valid graph of "
            "operators that its parser knows; export the model again without the operator named here."
        )
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.progress_monitor = monitor
    if hasattr(trt.BuilderFlag, "TF32"):
        config.clear_flag(trt.BuilderFlag.TF32)  # on by default, and it would make fp32 engines disagree with PyTorch
    if spec.backend == "tensorrt-rtx":
        # No timing cache here: setting one makes the compiler query a GPU.
        config.num_compute_capabilities = 1
        config.set_compute_capability(trt.ComputeCapability.__members__[gpu.upper().replace("_", "")], 0)
    _set_batch(builder, config, network, spec.batch, title, watch)
    built = builder.build_serialized_network(network, config)
    watch.check()
    if built is None:
        raise EngineError(
            f"{title} could not compile the graph for {gpu}: {_joined(watch.errors)}. Expected a graph whose every "
            "operator it has a kernel for in these types; compile the fp32 graph to see whether types are the reason."
        )
    plan = bytes(built)
    report = report_from_log(watch.layers)
    if report.source == "none" and spec.backend == "tensorrt":
        runtime = trt.Runtime(logger)
        engine = runtime.deserialize_cuda_engine(plan)
        if engine is not None:
            inspector = engine.create_engine_inspector()
            report = report_from_inspector(inspector.get_engine_information(trt.LayerInformationFormat.JSON))
    return plan, report


def _listeners(trt: Any, watch: _Watch) -> tuple[Any, Any]:
    # The base classes come from a module that may not be installed, so the classes can only be made here.
    class Logger(trt.ILogger):  # type: ignore[misc]
        def log(self, severity: Any, message: str) -> None:
            watch.hear(severity.name.lower(), message)

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            watch.steps[phase_name] = num_steps
            watch.follow(phase_name, 0)

        def phase_finish(self, phase_name: str) -> None:
            pass

        def step_complete(self, phase_name: str, step: int) -> bool:
            return watch.follow(phase_name, step + 1)

    return Logger(), Monitor()


def _set_batch(builder: Any, config: Any, network: Any, batch: tuple[int, int, int], title: str, watch: _Watch) -> None:
    # One optimisation profile for the inputs whose batch is free; a graph whose batch is fixed must be asked for it.
    profile, free = builder.create_optimization_profile(), False
    for tensor in (network.get_input(index) for index in range(network.num_inputs)):
        name, shape = tensor.name, tuple(tensor.shape)
        if any(extent < 0 for extent in shape[1:]):
            raise EngineError(
                f"Input {name!r} has the shape {shape}, where -1 is free. Expected only the first axis, the batch, to "
                "be free; export the model for one image size."
            )
        if shape and shape[0] < 0:
            profile.set_shape(name, *((size, *shape[1:]) for size in batch))
            free = True
        elif shape and batch != (shape[0],) * 3:
            raise UsageError(
                f"Input {name!r} has a fixed batch of {shape[0]}, and the engine was asked for batch {batch}. Ask for "
                f"{(shape[0],) * 3}, or export the model with a free batch."
            )
    if free and config.add_optimization_profile(profile) < 0:
        raise EngineError(f"{title} refused the batch sizes {batch}: {_joined(watch.errors)}. Ask for smaller ones.")


def _load(backend: str) -> Any:
    trt = require(BACKENDS[backend][0], "compile engines")
    numbers = tuple(int(number) for number in re.findall(r"\d+", str(trt.__version__))[:2])
    if backend == "tensorrt" and numbers < OLDEST_TENSORRT:
        raise EngineError(
            f"TensorRT {trt.__version__} is installed, and {'.'.join(map(str, OLDEST_TENSORRT))} or newer is needed. "
            'Run: pip install --upgrade "swin-deploy[tensorrt]"'
        )
    return trt


def _imports(module: str) -> bool:
    try:
        require(module, "compile engines")
    except (MissingDependencyError, OSError):  # OSError: the wheel is there and its native libraries are not
        return False
    return True


def _parser_error(error: Any) -> str:
    if not error.node_operator():
        return str(error.desc())  # the file as a whole, not one of its nodes
    return f"node {error.node_name() or error.node()} ({error.node_operator()}): {error.desc()}"


def _joined(reasons: list[str]) -> str:
    return "; ".join(dict.fromkeys(reason.rstrip(".") for reason in reasons)) or "it gave no reason"
