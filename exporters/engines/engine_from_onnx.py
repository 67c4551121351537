"""Compile an ONNX graph into a TensorRT engine, with TensorRT 10.3 and newer, TensorRT 11, or TensorRT for RTX.

Every network is strongly typed: the engine computes in the types of the graph.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from swin_deploy.dependencies import require
from swin_deploy.errors import EngineError, MissingDependencyError, UsageError, system_limit, unknown
from swin_deploy.files import read_regular, scratch, sweep
from swin_deploy.gpus import cuda_devices
from swin_deploy.options import Batch, EngineSpec, Progress, no_progress
from swin_deploy.tensorrt_log import log_callback

from .layer_report import EngineReport, report_from_inspector, report_from_log, reports_by_profile
from .targets import COMPILERS, NEEDED, has_name, target_gpu

TIMINGS_BYTES = 1 << 30  # of a timing cache

_LOG = logging.getLogger("swin_deploy.tensorrt")
_LEVELS = {"verbose": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING}


@dataclass(frozen=True)
class Engine:
    """A compiled engine: the serialized `plan`, a report for each optimization profile, and the seconds that it took."""

    plan: bytes
    reports: tuple[EngineReport, ...]
    backend: str
    backend_version: str
    gpu: str
    seconds: float

    @property
    def report(self) -> EngineReport:
        """The report of the first optimization profile."""
        return self.reports[0]


def resolve_backend(name: str) -> str:
    """Return the compiler that `name` stands for: "tensorrt" or "tensorrt-rtx".

    "auto" is full TensorRT if it and a GPU are available, otherwise TensorRT for RTX, which compiles without a GPU. A compiler
    that is named is used, or an error is raised.
    """
    if name == "auto":
        if cuda_devices() and _imports("tensorrt"):
            return "tensorrt"
        if _imports("tensorrt_rtx"):
            return "tensorrt-rtx"
        raise MissingDependencyError(
            "No TensorRT compiler is usable on this machine. With an NVIDIA GPU run: "
            'pip install "swin-deploy[tensorrt]". Without one run: pip install "swin-deploy[tensorrt-rtx]".'
        )
    if name not in COMPILERS:
        raise unknown("compiler", name, ("auto", *COMPILERS))
    if name == "tensorrt" and not cuda_devices():
        raise EngineError(
            "TensorRT compiles on the GPU that it compiles for, and this machine has no usable NVIDIA GPU. Run this on the "
            "target machine, or use the back end tensorrt-rtx."
        )
    load_compiler(name)
    return name


def engine_from_onnx(onnx: bytes | Path, spec: EngineSpec) -> Engine:
    """Compile an ONNX graph into an engine for the first GPU of `spec`.

    Messages of the compiler go to the logger "swin_deploy.tensorrt", its phases to `spec.progress`. An exception of
    `spec.progress` and Ctrl-C stop the compiler at its next step and are raised from here, because no exception may cross the
    native code of the compiler. Graph fusion is one step, so stopping may have to wait for its end.
    """
    if isinstance(onnx, Path) and not onnx.is_file():
        raise UsageError(f"There is no ONNX file {onnx}. Export the model first, or pass the path of a graph.")
    trt, gpu = load_compiler(spec.backend), target_gpu(spec.backend, spec.gpu)
    watch = Watch(spec.progress)
    begun = time.perf_counter()
    with _interrupts_kept_for(watch), log_callback(trt, watch.hear) as logger, natives_freed():
        plan, reports = _compile(trt, onnx, spec, gpu, watch, logger)
        watch.check()  # the compiler may also log while it is destroyed
    return Engine(plan, reports, spec.backend, str(trt.__version__), gpu, time.perf_counter() - begun)


class Watch:
    """Collects the messages of a running compiler, and remembers the exception that must stop it."""

    def __init__(self, progress: Progress = no_progress) -> None:
        self.progress = progress
        self.errors: list[str] = []
        self.layers: list[str] = []
        self.steps: dict[str, int] = {}
        self.stop: BaseException | None = None

    def hear(self, severity: str, message: str) -> None:
        if severity in ("error", "internal_error"):
            self.errors.append(message.strip())
        elif "LayerType: " in message:
            self.layers.append(message)
        level = _LEVELS.get(severity, logging.ERROR)
        if _LOG.isEnabledFor(level):
            self._call(_LOG.log, level, message)

    def follow(self, phase: str, step: int) -> bool:
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
def natives_freed() -> Iterator[None]:
    """Free what the compiler created as soon as an error leaves the block, not when its traceback is freed.

    The compiler holds a lock while it logs, and takes the same lock to free a builder. If the garbage collector freed a builder
    inside the log callback of the next compilation, it would deadlock.
    """
    try:
        yield
    except BaseException as error:
        trace = error.__traceback__
        while trace is not None:
            if Path(trace.tb_frame.f_code.co_filename).parent == Path(__file__).parent:
                with suppress(RuntimeError):  # it is still running
                    trace.tb_frame.clear()
            trace = trace.tb_next
        raise


@contextmanager
def _interrupts_kept_for(watch: Watch) -> Iterator[None]:
    """Let Ctrl-C only set `watch.stop` inside the block, and raise the signal again afterwards for the previous handler.

    A `try` in the callbacks is not enough: Python runs a pending handler when it enters a function, before the `try`, and the
    binding then drops the KeyboardInterrupt and continues to compile.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield  # handlers run in the main thread only; an ignored or default signal is left alone
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


def _compile(
    trt: Any, onnx: bytes | Path, spec: EngineSpec, gpu: str, watch: Watch, logger: Any
) -> tuple[bytes, tuple[EngineReport, ...]]:
    monitor = _monitor(trt, watch)  # must outlive everything created with it
    title = f"{COMPILERS[spec.backend][1]} {trt.__version__}"
    try:
        builder = trt.Builder(logger)
    except (TypeError, RuntimeError) as error:  # the native factory returned nothing
        raise EngineError(
            f"{title} does not start: {joined(watch.errors or [str(error)])}. It needs a newer driver: update the NVIDIA "
            "driver, or install an older TensorRT."
        ) from error
    flags = trt.NetworkDefinitionCreationFlag
    # Required by TensorRT 10, ignored by 11, where every network is strongly typed.
    network = builder.create_network(1 << int(flags.STRONGLY_TYPED) if hasattr(flags, "STRONGLY_TYPED") else 0)
    parser = trt.OnnxParser(network, logger)
    if not spec.fused_attention:
        parsed = parser.parse(_unfused(onnx), *([str(onnx)] if isinstance(onnx, Path) else []))  # weights are beside that file
    else:
        parsed = parser.parse_from_file(str(onnx)) if isinstance(onnx, Path) else parser.parse(onnx)
    watch.check()
    if not parsed:
        reasons = [_parser_error(parser.get_error(index)) for index in range(parser.num_errors)]
        raise EngineError(
            f"{title} cannot read the ONNX graph: {joined(reasons or watch.errors)}. Expected a valid graph of operators "
            "that its parser supports. Export the model again without the operator named here."
        )
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.progress_monitor = monitor
    _set_options(trt, config, spec, gpu)
    _set_profiles(builder, config, network, spec.batches, title, watch)
    with _timing_cache(config, None if spec.timing_cache is None else Path(spec.timing_cache), title, watch):
        built = builder.build_serialized_network(network, config)
        watch.check()
        if built is None:
            what = f"{title} could not compile the graph for {gpu}"
            if (limit := system_limit(RuntimeError(joined(watch.errors)))) is not None:
                raise EngineError(f"{what}. {limit}")
            raise EngineError(
                f"{what}: {joined(watch.errors)}. It needs a kernel for every operator in these types, and enough memory. "
                "Compile the fp32 graph to find out whether the types are the reason."
            )
    plan = bytes(built)
    report = report_from_log(watch.layers)
    if report.source == "none" and spec.backend == "tensorrt":
        runtime = trt.Runtime(logger)
        if spec.version_compatible:
            runtime.engine_host_code_allowed = True  # the plan contains a runtime of its own
        engine = runtime.deserialize_cuda_engine(plan)
        if engine is not None:
            inspector = engine.create_engine_inspector()
            report = report_from_inspector(inspector.get_engine_information(trt.LayerInformationFormat.JSON))
    return plan, reports_by_profile(report, len(spec.batches))


def _unfused(onnx: bytes | Path) -> bytes:
    from swin_deploy.exporters.passes.attention import unfused

    library = require("onnx", "compile attention without fusing it")
    load = library.load_from_string if isinstance(onnx, bytes) else partial(library.load, load_external_data=False)
    return bytes(unfused(load(onnx)).SerializeToString())


def _set_options(trt: Any, config: Any, spec: EngineSpec, gpu: str) -> None:
    if hasattr(trt.BuilderFlag, "TF32"):
        config.clear_flag(trt.BuilderFlag.TF32)  # on by default; fp32 engines would disagree with PyTorch
    if spec.backend == "tensorrt-rtx":
        config.num_compute_capabilities = 1
        config.set_compute_capability(trt.ComputeCapability.__members__[gpu.upper().replace("_", "")], 0)
    if spec.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, spec.workspace)
    if spec.optimization_level is not None:
        config.builder_optimization_level = spec.optimization_level
    if spec.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if spec.hardware_compatible:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if spec.strip_weights:
        # It is refitted with the same weights, so it may be optimized for them.
        config.set_flag(trt.BuilderFlag.STRIP_PLAN)
        config.set_flag(trt.BuilderFlag.REFIT_IDENTICAL)


@contextmanager
def _timing_cache(config: Any, path: Path | None, title: str, watch: Watch) -> Iterator[None]:
    """Let the compiler use the timings in the file, and add the new ones to it afterwards."""
    if path is None:
        yield
        return
    known = read_regular(path, TIMINGS_BYTES, UsageError, name=f"The timing cache {path}") if path.exists() else b""
    cache = config.create_timing_cache(known)
    if cache is None or not config.set_timing_cache(cache, False):
        raise UsageError(
            f"{path} is not a timing cache of {title} and this GPU: {joined(watch.errors)}. Delete it, or pass another file."
        )
    yield
    try:
        sweep(path)
        timings = config.get_timing_cache()
        with scratch(path) as file:
            file.write_bytes(bytes(timings.serialize()))
            file.replace(path)
    except OSError as error:  # the engine is done, and worth more
        watch.hear("warning", f"the timing cache {path} could not be written: {error.strerror}")


def _monitor(trt: Any, watch: Watch) -> Any:
    # The base class comes from a module that may not be installed.
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            watch.steps[phase_name] = num_steps
            watch.follow(phase_name, 0)

        def phase_finish(self, phase_name: str) -> None:
            pass

        def step_complete(self, phase_name: str, step: int) -> bool:
            return watch.follow(phase_name, step + 1)

    return Monitor()


def _set_profiles(builder: Any, config: Any, network: Any, batches: tuple[Batch, ...], title: str, watch: Watch) -> None:
    # One optimization profile for each batch range. A graph with a fixed batch accepts only that.
    free = False
    tensors = [network.get_input(index) for index in range(network.num_inputs)]
    for tensor in tensors:
        name, shape = tensor.name, tuple(tensor.shape)
        if any(extent < 0 for extent in shape[1:]):
            raise EngineError(
                f"Input {name!r} has the dynamic shape {shape}. Expected only the first axis, the batch, to be dynamic. "
                "Export the model for one image size."
            )
        if shape and shape[0] < 0:
            free = True
        elif shape and batches != ((shape[0],) * 3,):
            raise UsageError(
                f"Input {name!r} has a fixed batch of {shape[0]}, not {', '.join(map(str, batches))}. Build for "
                f"{(shape[0],) * 3}, or export the model with a dynamic batch."
            )
    for batch in batches if free else ():
        profile = builder.create_optimization_profile()
        for tensor in tensors:
            if tensor.shape and tensor.shape[0] < 0:
                profile.set_shape(tensor.name, *((size, *tuple(tensor.shape)[1:]) for size in batch))
        if config.add_optimization_profile(profile) < 0:
            raise EngineError(f"{title} refused the batch sizes {batch}: {joined(watch.errors)}. Use smaller ones.")


def load_compiler(backend: str) -> Any:
    """Import the module of a compiler. Raises EngineError if it lacks what every engine needs."""
    trt = require(COMPILERS[backend][0], "compile engines")
    for feature, name in NEEDED.items():
        if not has_name(trt, name):
            raise EngineError(
                f"{COMPILERS[backend][1]} {trt.__version__} has no {feature}. Every engine needs it. "
                f'Run: pip install --upgrade "swin-deploy[{backend}]"'
            )
    return trt


def _imports(module: str) -> bool:
    try:
        require(module, "compile engines")
    except (MissingDependencyError, OSError):  # OSError: the wheel is installed, but its native libraries are missing
        return False
    return True


def _parser_error(fault: Any) -> str:
    if not fault.node_operator():
        return str(fault.desc())  # about the whole file, not a node
    return f"node {fault.node_name() or fault.node()} ({fault.node_operator()}): {fault.desc()}"


def joined(reasons: list[str]) -> str:
    """Return the distinct reasons as one phrase."""
    return "; ".join(dict.fromkeys(reason.rstrip(".") for reason in reasons)) or "it gave no reason"
