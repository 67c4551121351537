"""load_model: a bundle -> a Model, run by what was asked for, or by what is fastest here."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from swin_deploy.bundle import Bundle
from swin_deploy.dependencies import require
from swin_deploy.errors import EngineError, MissingDependencyError, UsageError
from swin_deploy.gpus import cuda_devices, refuse_without_gpu
from swin_deploy.parity import is_verified
from swin_deploy.specs import PRECISIONS, QUANTIZED, TARGETS, Size, target_of

from .autoselect import LOADING, Candidate, Description, Measured, choose
from .backends import BACKENDS, Backend, backend_named, device_from_text, misread, runtime_from_onnx
from .base import Runtime
from .gpu.engines import engines_of, fitting_engines, open_engine
from .model import MOST_THREADS, Model

AUTO, NAMED = "auto", "asked for by name"


def load_model(
    path: str | os.PathLike[str], backend: str = AUTO, precision: str = AUTO, device: str = AUTO, threads: int = 0
) -> Model:
    """The bundle at `path`, loaded; see swin_deploy.load. Every file is checked against its sha256 before it is read."""
    bundle = Bundle.open(path)
    if precision not in (AUTO, *PRECISIONS):
        raise UsageError(f'There is no precision "{precision}". There are: {", ".join(PRECISIONS)}, and auto.')
    if not 0 <= threads <= MOST_THREADS:
        raise UsageError(f"threads is {threads}, and must be from 0 (the back end chooses) to {MOST_THREADS}.")
    candidates = _candidates(bundle, backend, precision, device)
    # Further image sizes are opened when they are needed, wherever the application has gone by then.
    bundle = Bundle(bundle.path.absolute(), bundle.manifest)

    def open_first(candidate: Candidate) -> tuple[str, Runtime]:
        file = next(iter(_files(bundle, candidate).values()))
        return file, _open(bundle, candidate, file, threads)

    failed: dict[Candidate, Exception] = {}
    while True:
        chosen, reason, measured = choose(bundle, candidates, open_first, threads, failed)
        try:
            return _loaded(path, bundle, chosen, reason if AUTO in (backend, precision, device) else NAMED, measured, threads)
        except LOADING as error:  # it ran when it was measured, which may be long ago
            if not measured:
                raise
            failed[chosen] = error


def _loaded(
    path: str | os.PathLike[str],
    bundle: Bundle,
    chosen: Candidate,
    reason: str,
    measured: tuple[Measured, ...],
    threads: int,
) -> Model:
    files = _files(bundle, chosen)

    def described(title: str) -> Description:
        version = title.rpartition(" ")[2]
        return Description(
            os.fspath(path), chosen.backend, version, chosen.device, chosen.precision, threads, files, reason, measured
        )

    return Model(bundle, files, chosen.precision, lambda file: _open(bundle, chosen, file, threads), described)


def _open(bundle: Bundle, candidate: Candidate, file: str, threads: int) -> Runtime:
    if BACKENDS[candidate.backend].engines:
        return open_engine(bundle, file, candidate.device)
    in_bf16 = bundle.files[file]["precision"] != candidate.precision
    return runtime_from_onnx(bundle.verified_path(file), candidate.backend, threads, in_bf16, candidate.device)


def _candidates(bundle: Bundle, backend: str, precision: str, device: str) -> list[Candidate]:
    """All that was left open, in the order of BACKENDS and PRECISIONS. Raises UsageError where nothing fits what was asked."""
    wanted = None if device == AUTO else device_from_text(device)
    if backend != AUTO:
        named = {backend: backend_named(backend)}
        require(named[backend].found, f"run models with the back end {backend}")
    else:
        named = {name: found for name, found in BACKENDS.items() if found.auto and found.installed}
    if backend == AUTO and wanted not in (None, "cpu"):
        refuse_without_gpu(device)
    found = [
        candidate
        for name, kind in named.items()
        for where in _devices(kind, wanted)
        if backend != AUTO or where == "cpu" or _has_cuda(kind)
        for one in _precisions(name, precision)
        if _files(bundle, candidate := Candidate(name, one, where)) and _suits(bundle, candidate, precision == AUTO)
    ]
    if found and precision == AUTO:
        return _verified(bundle, found)
    if found:
        return found
    if backend == AUTO and all(kind.engines for kind in named.values()):
        for name in named:
            if engines_of(bundle, name):
                _refuse_engine(bundle, name, precision, wanted)
        raise MissingDependencyError('Nothing that runs models is installed. Run: pip install "swin-deploy[onnxruntime]"')
    for file in _files(bundle, Candidate(backend, precision, "cpu")).values() if backend != AUTO else ():
        if (why := misread(bundle, file, backend)) is not None:
            raise UsageError(why)
    if backend != AUTO and named[backend].engines:
        _refuse_engine(bundle, backend, precision, wanted)
    if not any(_devices(kind, wanted) for kind in named.values()):
        kinds = dict.fromkeys(place for kind in named.values() for place in kind.devices)
        what = f"The back end {backend}" if backend != AUTO else "What is installed"
        where = device if wanted else "this machine, which has no usable NVIDIA GPU"
        raise UsageError(f"{what} runs on {' or '.join(kinds)}, not on {where}. Take another device or back end.")
    graphs = [kind for kind in named.values() if "cuda" in kind.devices and not kind.engines]
    if backend == AUTO and wanted not in (None, "cpu") and not any(map(_has_cuda, graphs)):
        raise MissingDependencyError(f'Nothing that is installed runs graphs on {wanted}. Run: pip install "swin-deploy[gpu]"')
    held = dict.fromkeys(str(entry["precision"]) for entry in bundle.graphs.values())
    asked = "graph that fits" if precision == AUTO else f"{precision} graph"
    remedy = "" if precision == AUTO else f" {_remedy(bundle, backend, precision)}"
    raise UsageError(f"The bundle {bundle.path} holds no {asked}; it holds {', '.join(held)}.{remedy}")


def _remedy(bundle: Bundle, backend: str, precision: str) -> str:
    """What to do for a graph of that precision which the back end runs."""
    form = str(bundle.manifest.get("target", TARGETS[0]))
    if precision == "fp8" and backend == "openvino":
        return "OpenVINO does not compute in FP8; take int8."
    if precision != "int8" and form != TARGETS[0]:
        return f'It was exported for {form}, which has no such graph; export it with "--target {TARGETS[0]}" first.'
    command = ["swin-deploy", "quantize" if precision in QUANTIZED else "build-engine", str(bundle.path), f"--{precision}"]
    if precision in QUANTIZED:
        target = ["--target", backend] if precision == "int8" and backend in TARGETS and backend != form else []
        command += [*target, "--data", "DIR"]
    return f'Make it with "{shlex.join(command)}".'


def _precisions(backend: str, precision: str) -> Sequence[str]:
    """What `precision` stands for: "auto" is all of them, but of the reference the one that is nearest to PyTorch."""
    return [precision] if precision != AUTO else ["fp32"] if backend == "torch" else PRECISIONS


def _suits(bundle: Bundle, candidate: Candidate, auto: bool) -> bool:
    """Whether the candidate computes a quantised graph in the form for TensorRT as it is meant: OpenVINO does not, and others
    without TensorRT are slow with it, and only take it when it is asked for."""
    if candidate.precision not in QUANTIZED or BACKENDS[candidate.backend].engines:
        return True
    made = [target_of(bundle.files[file]) for file in _files(bundle, candidate).values()]
    if TARGETS[0] not in made or candidate.backend == "onnxruntime-tensorrt":
        return True
    return not auto and candidate.backend != "openvino"


def devices_here(backend: str, device: str) -> list[str]:
    """Where a back end runs, of what `device` stands for ("auto", "cpu", "cuda", "cuda:1"): "auto" is all that is here.

    Raises UsageError where there is no such back end or device.
    """
    return _devices(backend_named(backend), None if device == AUTO else device_from_text(device))


def _refuse_engine(bundle: Bundle, backend: str, precision: str, wanted: str | None) -> None:
    """Raises what keeps the bundle's engines of that back end from running on `wanted`, or on the first GPU."""
    if wanted is None or wanted.startswith("cuda"):
        held = dict.fromkeys(str(entry["precision"]) for entry in engines_of(bundle, backend).values())
        fitting_engines(bundle, backend, next(iter(held), "fp16") if precision == AUTO else precision, wanted or "cuda:0")


def _devices(kind: Backend, wanted: str | None) -> list[str]:
    """Where a back end is to run: `wanted` where it can, else every kind of device that it knows and this machine has."""
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


def _files(bundle: Bundle, candidate: Candidate) -> dict[Size, str]:
    """What the candidate runs: image size -> file; nothing where the bundle has no graph or no engine for it that fits.

    OpenVINO computes fp32 graphs in bf16 itself.
    """
    if BACKENDS[candidate.backend].engines:
        try:
            return fitting_engines(bundle, candidate.backend, candidate.precision, candidate.device)
        except (EngineError, MissingDependencyError, UsageError):
            return {}
    stored = "fp32" if (candidate.backend, candidate.precision) == ("openvino", "bf16") else candidate.precision
    return {_size(entry): file for file, entry in bundle.graphs.items() if entry["precision"] == stored}


def _size(entry: Mapping[str, Any]) -> Size:
    return int(entry["image_size"][0]), int(entry["image_size"][1])


def _verified(bundle: Bundle, candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those whose graphs, or their engines' graphs, all agreed with PyTorch. Raises UsageError where there are none."""
    graphs = {one: [bundle.files[file].get("graph", file) for file in _files(bundle, one).values()] for one in candidates}
    found = [one for one, files in graphs.items() if all(is_verified(bundle.files[file]) for file in files)]
    if found:
        return found
    never = dict.fromkeys(file for files in graphs.values() for file in files if not is_verified(bundle.files[file]))
    command = ["swin-deploy", "verify", str(bundle.path)]
    if not BACKENDS["onnxruntime"].installed:
        command += ["--backend", next((name for name in ("openvino", "torch") if BACKENDS[name].installed), "onnxruntime")]
    raise UsageError(
        f"auto takes graphs that were verified, and those of {bundle.path} that run here were never compared with PyTorch: "
        f'{", ".join(never)}. Do that with "{shlex.join(command)}", or name a precision.'
    )
