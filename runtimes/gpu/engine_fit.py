"""Select the engines of a bundle that this machine can run, and explain why it cannot run the others."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from swin_deploy.bundle import Bundle, size_text
from swin_deploy.dependencies import require
from swin_deploy.errors import EngineError, MissingDependencyError, UntrustedEngineError, UsageError, unknown
from swin_deploy.gpus import cuda_devices, seen_first
from swin_deploy.manifest import EngineEntry
from swin_deploy.options import QUANTIZED, TARGETS, Size
from swin_deploy.runtimes.backends import BACKENDS, runtime_from_engine
from swin_deploy.runtimes.base import EngineFile, Runtime, of_any_batch, static_batch_of
from swin_deploy.runtimes.user_cache import cache_folder

from .cuda_context import device_number


def engines_of(bundle: Bundle, backend: str, precision: str | None = None) -> dict[str, EngineEntry]:
    """Return the engines of a bundle for a back end and, if given, a precision; the last added comes first."""
    found = [(file, entry) for file, entry in bundle.engines.items() if entry.backend == backend]
    return {file: entry for file, entry in reversed(found) if precision in (None, entry.precision)}


def incompatibility(bundle: Bundle, file: str, gpus: Sequence[str], release: str | None) -> str | None:
    """Explain why an engine cannot run on any of `gpus`, such as "sm_89", and which command fixes it; None if it can.

    `release` is the installed release of its back end; None if it is not installed.
    """
    entry = bundle.engines[file]
    options, backend = entry.options, entry.backend
    again = rebuild_command(bundle, file, gpus)
    graph = bundle.graphs.get(entry.graph)
    if graph is None or graph.sha256 != entry.parent:
        changed = f"{file} was compiled from another version of {entry.graph}."
        if entry.precision in QUANTIZED and (graph is None or graph.target != TARGETS[0]):
            quantize = ["quantize", str(bundle.path), f"--{entry.precision}", "--target", TARGETS[0], "--data", "DIR"]
            command = shlex.join(["swin-deploy", *quantize])
            return f'{changed} Create the graph for TensorRT with "{command}", then compile it with "{again}".'
        return f'{changed} Compile it again with "{again}".'
    if not gpus:
        return f"{file} was compiled for {entry.gpu}, and this machine has no usable NVIDIA GPU. Use a machine with one."
    if not any(_runs_on(entry, gpu) for gpu in gpus):
        made_for = f"sm_{_oldest(entry)} and newer" if options.hardware_compatible else entry.gpu
        return f'{file} was compiled for {made_for}, and this machine has {", ".join(gpus)}. Compile it with "{again}".'
    if release is None or not _runs_with(entry, release):
        newer = " or a newer compatible release" if options.version_compatible else ""
        return (
            f"{file} needs {backend} {entry.backend_version}{newer}; installed: {release or 'none'}. Install that release, "
            f'or compile the engine with "{again}".'
        )
    kind = BACKENDS[backend]
    if kind.found == kind.lean and not options.version_compatible:
        lean = rebuild_command(bundle, file, gpus, version_compatible=True)
        return (
            f"{file} needs {kind.library}. Only {kind.lean} is installed, which runs version-compatible engines. Install "
            f'{kind.library}, or compile the engine with "{lean}".'
        )
    if options.strip_weights:
        refit = shlex.join([*seen_first(gpus[0]), "swin-deploy", "refit", str(bundle.path)])
        return f'{file} was compiled without its weights. Add them with "{refit}".'
    return None


def untrusted(bundle: Bundle, file: str, gpus: Sequence[str]) -> str | None:
    """Explain why an engine is not run although it fits: it was compiled elsewhere. None if it may be run."""
    return bundle.untrusted(file, rebuild_command(bundle, file, gpus))


def fitting_engines(bundle: Bundle, backend: str, precision: str, device: str) -> dict[Size, str]:
    """Return for each image size the last added engine that runs on `device`, such as "cuda:0"; raise where there is none."""
    gpu = gpu_of(device, backend)
    held = _held(bundle, backend, gpu, precision)
    sizes = [entry.image_size for entry in bundle.graphs.values() if entry.precision == precision]
    chosen = {}
    for size in dict.fromkeys([*sizes, *(entry.image_size for entry in held.values())]):
        of_size = {file: entry for file, entry in held.items() if entry.image_size == size}
        if not of_size:
            again = rebuild_command(bundle, next(iter(held)), [gpu])
            raise EngineError(f'{bundle.path} has no {precision} engine for {size_text(size)}. Build it with "{again}".')
        chosen[size] = next(iter(_fitting(bundle, of_size, gpu, _release(backend))))
    return chosen


def runnable_engines(bundle: Bundle, backend: str, device: str) -> dict[str, EngineEntry]:
    """Return all engines of a back end that run on `device`, in the order of the manifest; raise if there are none."""
    gpu = gpu_of(device, backend)
    return dict(reversed(_fitting(bundle, _held(bundle, backend, gpu), gpu, _release(backend)).items()))


def engines_here(bundle: Bundle, backend: str, device: str) -> dict[str, EngineEntry]:
    """Return the same as `runnable_engines`, or nothing where that raises."""
    try:
        return runnable_engines(bundle, backend, device)
    except (EngineError, MissingDependencyError, UsageError):
        return {}


def _held(bundle: Bundle, backend: str, gpu: str, precision: str | None = None) -> dict[str, EngineEntry]:
    found = engines_of(bundle, backend, precision)
    if not found:
        others = dict.fromkeys(entry.precision for entry in engines_of(bundle, backend).values())
        only = f", only {', '.join(others)}" if others else ""
        kind = f"{precision} engine" if precision else "engine"
        command = shlex.join(_build_command(bundle, precision or "fp16", backend, gpu))
        raise UsageError(f'The bundle {bundle.path} has no {kind} for {backend}{only}. Build it with "{command}".')
    return found


def _fitting(bundle: Bundle, held: Mapping[str, EngineEntry], gpu: str, release: str) -> dict[str, EngineEntry]:
    """Return the engines of `held` that run; otherwise raise EngineError for the one for this GPU, or else the first."""
    reasons = {file: incompatibility(bundle, file, [gpu], release) for file in held}
    if None not in reasons.values():
        raise EngineError(reasons[next((file for file in held if _runs_on(held[file], gpu)), next(iter(held)))])
    fitting = [file for file in held if reasons[file] is None]
    found = {file: held[file] for file in fitting if untrusted(bundle, file, [gpu]) is None}
    if not found:
        raise UntrustedEngineError(untrusted(bundle, fitting[0], [gpu]))
    return found


def open_engine(bundle: Bundle, file: str, device: str) -> Runtime:
    """Load an engine of the bundle on `device`; its origin and its sha256 are checked before it is read."""
    entry, graph = bundle.engines[file], bundle.graph_of(file)
    backend = entry.backend
    gpu, folder = cuda_devices()[device_number(device)], cache_folder(backend)
    if (why := untrusted(bundle, file, [gpu.capability])) is not None:
        raise UntrustedEngineError(why)
    again = rebuild_command(bundle, file, [gpu.capability])
    name = re.sub(r"\W+", "-", f"{entry.sha256[:32]} {gpu.name}")
    engine = EngineFile(
        bundle.verified_path(file, f"Compile it again: {again} --force"),
        of_any_batch(graph.inputs, static := static_batch_of(graph.inputs)),
        of_any_batch(graph.outputs, static),
        host_code=entry.options.version_compatible,
        cache=folder / f"{name}.cache" if folder else None,
        again=again,
    )
    return runtime_from_engine(engine, backend, device)


def gpu_of(device: str, backend: str) -> str:
    """Return the compute capability of `device`; raise UsageError if this machine has no such device."""
    gpus, number = cuda_devices(), device_number(device)
    if not gpus:
        raise UsageError(f"The back end {backend} needs an NVIDIA GPU, and this machine has no usable one.")
    if number >= len(gpus):
        raise unknown("device", device, [f"cuda:{index} ({gpu.name})" for index, gpu in enumerate(gpus)])
    return gpus[number].capability


def rebuild_options(entry: EngineEntry) -> dict[str, Any]:
    """Return the options of build_engine that compile an engine of the manifest again."""
    batches = [profile.batch for profile in entry.profiles]
    kept = entry.options.chosen("strip_weights", "refitted")
    return {"precision": entry.precision, "backend": entry.backend, "batches": batches, **kept}


def rebuild_command(bundle: Bundle, file: str, gpus: Sequence[str], **changes: Any) -> str:
    """Return the command that compiles an engine again, for the first of `gpus` or, without one, for its previous GPU."""
    options = {**rebuild_options(bundle.engines[file]), **changes}
    gpu = gpus[0] if gpus else bundle.engines[file].gpu
    command = _build_command(bundle, options.pop("precision"), options.pop("backend"), gpu)
    for low, best, high in options.pop("batches"):
        command += ["--batch", str(best) if low == best == high else f"{low}:{best}:{high}"]
    for name, value in options.items():
        command += [f"--{'no-' * (value is False)}{name.replace('_', '-')}", *([] if isinstance(value, bool) else [str(value)])]
    return shlex.join(command)


def _build_command(bundle: Bundle, precision: str, backend: str, gpu: str) -> list[str]:
    command = ["swin-deploy", "build-engine", str(bundle.path), f"--{precision}", "--backend", backend]
    return [*command, "--gpu", gpu] if backend == "tensorrt-rtx" else [*seen_first(gpu), *command]


def _runs_on(entry: EngineEntry, gpu: str) -> bool:
    if entry.options.hardware_compatible:  # AMPERE_PLUS
        return int(gpu.removeprefix("sm_")) >= _oldest(entry)
    return entry.gpu == gpu


def _oldest(entry: EngineEntry) -> int:
    """Return the oldest compute capability that a hardware-compatible engine runs on."""
    return 89 if entry.precision == "fp8" else 80


def _runs_with(entry: EngineEntry, release: str) -> bool:
    """Version-compatible engines run with newer releases of the same major version, and those of 10 with 11 as well."""
    if not entry.options.version_compatible:
        return entry.backend_version == release
    made, here = (tuple(map(int, re.findall(r"\d+", text)[:3])) for text in (entry.backend_version, release))
    return made <= here and (made[0] == here[0] or (made[0], here[0]) == (10, 11))


def _release(backend: str) -> str:
    return str(require(BACKENDS[backend].found, f"run models with the back end {backend}").__version__)
