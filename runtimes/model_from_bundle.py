"""Load a bundle as a Model, run by what was named, or by what is fastest on this machine."""

from __future__ import annotations

import contextlib
import os
import shlex
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from swin_deploy.bundle import Bundle, sha256_of
from swin_deploy.dependencies import require
from swin_deploy.errors import EngineError, MissingDependencyError, UntrustedEngineError, UsageError
from swin_deploy.gpus import cuda_devices, refuse_without_gpu
from swin_deploy.options import PRECISIONS, QUANTIZED, TARGETS, LoadSpec, Size, device_from_text

from .autoselect import LOADING, LOG, Candidate, Description, Measured, choose, tuned_before, tuning_of
from .backends import BACKENDS, Backend, backend_named, misread, runtime_from_onnx
from .base import Runtime
from .model import Model
from .user_cache import SMALLEST_STORED, stored_files

AUTO, NAMED = "auto", "asked for by name"


def model_from_bundle(path: str | os.PathLike[str], spec: LoadSpec, tune: bool = False) -> Model:
    """Load the bundle at `path`; see `swin_deploy.load`. The sha256 of every file is checked before the file is read.

    `tune` measures the candidates again and stores the result in the bundle.
    """
    bundle = Bundle.open(path, spec.trust)
    candidates = _candidates(bundle, spec)
    # Graphs of further image sizes are opened when they are needed, and the current directory may have changed by then.
    bundle = replace(bundle, path=bundle.path.absolute())

    def open_file(candidate: Candidate, file: str, batches: tuple[int, ...] = ()) -> Runtime:
        if BACKENDS[candidate.backend].engines:
            from .gpu.engine_fit import open_engine

            return open_engine(bundle, file, candidate.device)
        in_bf16 = bundle.graphs[file].precision != candidate.precision
        weights = bundle.graphs[file].weights
        parts = [file, *([weights] if weights else [])]

        def check_stored() -> None:
            stated = " ".join(bundle.files[part].sha256 for part in parts)
            if _is_stored(bundle, parts):
                for stored in stored_files(candidate.backend, stated, batches, spec.threads, in_bf16):
                    sha256_of(stored)

        # Both take as long as the import.
        _import_during([partial(bundle.verified_path, file), check_stored], BACKENDS[candidate.backend].library)
        checked = bundle.verified_path(file)
        digest = " ".join(sha256_of(bundle.place(part)) for part in parts) if _is_stored(bundle, parts) else ""
        where = candidate.backend, spec.threads, in_bf16, candidate.device
        return runtime_from_onnx(checked, *where, batches=batches, digest=digest)

    def open_first(candidate: Candidate) -> tuple[str, Runtime]:
        file = next(iter(candidates[candidate].values()))
        return file, open_file(candidate, file)

    tuned = None if tune or len(candidates) == 1 else tuned_before(bundle, candidates, spec.threads)
    failed: dict[Candidate, Exception] = {}
    chosen, reason = next(iter(candidates)), "the only candidate on this machine"
    measured: tuple[Measured, ...] = ()
    while True:
        if len(candidates) > 1:
            anew = tune and not failed
            chosen, reason, measured = choose(bundle, tuple(candidates), open_first, spec.threads, failed, tuned, anew)
            if anew:
                bundle.with_tuning(tuning_of(bundle, candidates, spec.threads, measured))
        files = candidates[chosen]
        why = reason if AUTO in (spec.backend, spec.precision, spec.device) else NAMED
        described = Description(
            *(os.fspath(path), chosen.backend, "", chosen.device, chosen.precision, spec.threads, files, why, measured),
            batches=spec.batches if chosen.backend == "openvino" else (),
        )
        try:
            return Model(bundle, described, lambda file, chosen=chosen: open_file(chosen, file, spec.batches))  # type: ignore[misc]
        except LOADING as error:  # it ran when it was measured, which may be long ago
            if not measured:
                raise
            failed[chosen] = error


def _is_stored(bundle: Bundle, parts: Sequence[str]) -> bool:
    """Return whether a graph is so large that it is stored when it is compiled."""
    return sum(bundle.place(part).stat().st_size for part in parts) >= SMALLEST_STORED


def _import_during(checks: Sequence[Callable[[], object]], library: str) -> None:
    """Import a library while `checks` compute sha256 in other threads. Each sha256 is computed once, and then known."""
    threads = [threading.Thread(target=_tried, args=(check,), name="swin-deploy: sha256", daemon=True) for check in checks]
    for thread in threads:
        thread.start()
    require(library, "run models")
    for thread in threads:
        thread.join()


def _tried(check: Callable[[], object]) -> None:
    with contextlib.suppress(Exception):
        check()


def _candidates(bundle: Bundle, spec: LoadSpec) -> dict[Candidate, dict[Size, str]]:
    """Return what `spec` leaves open, in the order of BACKENDS and PRECISIONS, with the file for each image size.

    Raises UsageError if nothing in the bundle fits the spec.
    """
    backend, precision = spec.backend, spec.precision
    wanted = None if spec.device == AUTO else device_from_text(spec.device)
    if backend != AUTO:
        named = {backend: backend_named(backend)}
        if not named[backend].installed:
            require(named[backend].found, f"run models with the back end {backend}")
    else:
        named = {name: found for name, found in BACKENDS.items() if found.auto and found.installed}
        if wanted not in (None, "cpu"):
            refuse_without_gpu(spec.device)
    found: dict[Candidate, dict[Size, str]] = {}
    for name, kind in named.items():
        for where in _devices(kind, wanted):
            if backend != AUTO or where == "cpu" or _has_cuda(kind):
                for one in _precisions(name, precision):
                    candidate = Candidate(name, one, where)
                    files = _files(bundle, candidate, report=backend == AUTO)
                    if files and _suits(bundle, candidate, files, precision == AUTO):
                        found[candidate] = files
    if found and precision == AUTO:
        return _verified(bundle, found)
    if not found:
        _refuse(bundle, spec, named, wanted)
    return found


def _refuse(bundle: Bundle, spec: LoadSpec, named: dict[str, Backend], wanted: str | None) -> None:
    """Raise the reason why no graph or engine of the bundle fits `spec`."""
    backend, precision = spec.backend, spec.precision
    if backend == AUTO and all(kind.engines for kind in named.values()):
        for name in named:
            if any(entry.backend == name for entry in bundle.engines.values()):
                _refuse_engine(bundle, name, precision, wanted)
        raise MissingDependencyError('No back end that runs models is installed. Run: pip install "swin-deploy[onnxruntime]"')
    for file in _files(bundle, Candidate(backend, precision, "cpu")).values() if backend != AUTO else ():
        if (why := misread(bundle, file, backend)) is not None:
            raise UsageError(why)
    if backend != AUTO and named[backend].engines:
        _refuse_engine(bundle, backend, precision, wanted)
    if not any(_devices(kind, wanted) for kind in named.values()):
        kinds = dict.fromkeys(place for kind in named.values() for place in kind.devices)
        what = f"The back end {backend}" if backend != AUTO else "The installed back ends"
        where = spec.device if wanted else "this machine, which has no usable NVIDIA GPU"
        raise UsageError(f"{what} cannot run on {where}. Expected {' or '.join(kinds)}; choose another device or back end.")
    graphs = [kind for kind in named.values() if "cuda" in kind.devices and not kind.engines]
    if backend == AUTO and wanted not in (None, "cpu") and not any(map(_has_cuda, graphs)):
        raise MissingDependencyError(f'No installed back end runs graphs on {wanted}. Run: pip install "swin-deploy[gpu]"')
    held = dict.fromkeys(entry.precision for entry in bundle.graphs.values())
    asked = "graph that fits" if precision == AUTO else f"{precision} graph"
    remedy = "" if precision == AUTO else f" {_remedy(bundle, backend, precision)}"
    raise UsageError(f"The bundle {bundle.path} has no {asked}, only {', '.join(held)}.{remedy}")


def _remedy(bundle: Bundle, backend: str, precision: str) -> str:
    """Return what to do to get a graph of that precision that the back end runs."""
    layout = bundle.manifest.target
    if precision == "fp8" and backend == "openvino":
        return "OpenVINO does not compute in FP8; use int8."
    if precision != "int8" and layout != TARGETS[0]:
        return f'It was exported for {layout}, which has no such graph. Export it with "--target {TARGETS[0]}" first.'
    command = ["swin-deploy", "quantize" if precision in QUANTIZED else "build-engine", str(bundle.path), f"--{precision}"]
    if precision in QUANTIZED:
        target = ["--target", backend] if precision == "int8" and backend in TARGETS and backend != layout else []
        command += [*target, "--data", "DIR"]
    return f"Create one: {shlex.join(command)}"


def _precisions(backend: str, precision: str) -> Sequence[str]:
    """Return what `precision` stands for: "auto" is all of them, and fp32 for PyTorch, which is the reference."""
    return [precision] if precision != AUTO else ["fp32"] if backend == "torch" else PRECISIONS


def _suits(bundle: Bundle, candidate: Candidate, files: dict[Size, str], auto: bool) -> bool:
    """Return whether the candidate runs its graphs correctly, and, for auto, fast.

    OpenVINO gives wrong results for INT8 graphs for TensorRT; other back ends without TensorRT run them slowly.
    """
    if candidate.precision not in QUANTIZED or BACKENDS[candidate.backend].engines:
        return True
    made = [bundle.graphs[file].target for file in files.values()]
    if TARGETS[0] not in made or candidate.backend.startswith("onnxruntime-tensorrt"):
        return True
    return not auto and candidate.backend != "openvino"


def devices_here(backend: str, device: str) -> list[str]:
    """Return the devices of this machine that a back end runs on, of those that `device` stands for ("auto": all).

    Raises UsageError for an unknown back end or device.
    """
    return _devices(backend_named(backend), None if device == AUTO else device_from_text(device))


def _refuse_engine(bundle: Bundle, backend: str, precision: str, wanted: str | None) -> None:
    """Raise the reason why the engines of that back end do not run on `wanted`, or on the first GPU."""
    from .gpu.engine_fit import engines_of, fitting_engines

    if wanted is None or wanted.startswith("cuda"):
        held = dict.fromkeys(entry.precision for entry in engines_of(bundle, backend).values())
        fitting_engines(bundle, backend, next(iter(held), "fp16") if precision == AUTO else precision, wanted or "cuda:0")


def _devices(kind: Backend, wanted: str | None) -> list[str]:
    """Return `wanted` if the back end runs there; without it, the devices of this machine that it runs on."""
    if wanted is not None:
        return [wanted] if wanted.partition(":")[0] in kind.devices else []
    here = ["cpu"] if "cpu" in kind.devices else []
    return here + ["cuda:0"] if "cuda" in kind.devices and cuda_devices() and _has_cuda(kind) else here


def _has_cuda(kind: Backend) -> bool:
    if kind.library == "torch":
        return bool(require("torch", "run ONNX models").cuda.is_available())
    if kind.library != "onnxruntime":
        return True
    providers: list[str] = require("onnxruntime", "run ONNX models").get_available_providers()
    return "CUDAExecutionProvider" in providers


def _files(bundle: Bundle, candidate: Candidate, report: bool = False) -> dict[Size, str]:
    """Return the file that the candidate runs for each image size; empty if the bundle has none that fits.

    `report` logs that engines are not used because they were compiled elsewhere.
    """
    if BACKENDS[candidate.backend].engines:
        from .gpu.engine_fit import fitting_engines

        try:
            return fitting_engines(bundle, candidate.backend, candidate.precision, candidate.device)
        except (EngineError, MissingDependencyError, UsageError) as error:
            if report and isinstance(error, UntrustedEngineError):
                LOG.warning("Not used: %s", error)
            return {}
    # OpenVINO computes fp32 graphs in bf16 itself.
    stored = "fp32" if (candidate.backend, candidate.precision) == ("openvino", "bf16") else candidate.precision
    return {entry.image_size: file for file, entry in bundle.graphs.items() if entry.precision == stored}


def _verified(bundle: Bundle, candidates: dict[Candidate, dict[Size, str]]) -> dict[Candidate, dict[Size, str]]:
    """Return the candidates whose graphs, or the graphs of whose engines, all agreed with PyTorch."""
    graphs = {one: [bundle.graph_file_of(file) for file in files.values()] for one, files in candidates.items()}
    found = {one: candidates[one] for one, names in graphs.items() if all(bundle.graphs[name].verified for name in names)}
    if found:
        return found
    never = dict.fromkeys(name for names in graphs.values() for name in names if not bundle.graphs[name].verified)
    command = ["swin-deploy", "verify", str(bundle.path)]
    if not BACKENDS["onnxruntime"].installed:
        command += ["--backend", next((name for name in ("openvino", "torch") if BACKENDS[name].installed), "onnxruntime")]
    raise UsageError(
        f"auto uses verified graphs, and those of {bundle.path} that run on this machine were never compared with PyTorch: "
        f'{", ".join(never)}. Run "{shlex.join(command)}", or name a precision.'
    )
