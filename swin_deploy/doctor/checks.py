"""Try the libraries on this machine, and the graphs and engines of a bundle."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import swin_deploy
from swin_deploy.bundle import Bundle
from swin_deploy.dependencies import installed, onnxruntime_session, require
from swin_deploy.errors import BackendError, BundleError, MissingDependencyError
from swin_deploy.files import scratch_folder
from swin_deploy.gpus import CudaDevice, cuda_devices, device_memory
from swin_deploy.machine import Machine, this_machine
from swin_deploy.manifest import EngineEntry

from .packages import VersionConflict, install_command, installed_conflicts, known_faults, versions_of

WORKS, BROKEN, MISSING, NO_GPU = "works", "broken", "not installed", "needs a GPU"
SECONDS = 180  # the longest that the check of one library may take
PROBE = "import sys; sys.path[:] = filter(None, sys.path); from swin_deploy.doctor.checks import probe; probe()"

# One value through one Relu, opset 17.
MICRO = (
    b'\x08\x08:7\n\x0c\n\x01x\x12\x01y"\x04Relu\x12\x05microZ\x0f\n\x01x\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01'
    b"b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x04\n\x00\x10\x11"
)
FEEDS = {"x": np.ones(1, np.float32)}


@dataclass(frozen=True)
class Check:
    """One use of libraries: `probe` tries it and returns what it can do. `backend` is set if it runs bundles.

    Without a GPU, a check with `needs_gpu` does nothing, and one with `runs_on_gpu` only compiles.
    """

    name: str
    modules: tuple[str, ...]
    extras: str
    probe: Callable[[], str]
    backend: str | None = None
    needs_gpu: bool = False
    runs_on_gpu: bool = False


@dataclass(frozen=True)
class CheckResult:
    """The state of a check (WORKS, BROKEN, MISSING or NO_GPU), the versions in use, what works or why not, and the fix."""

    name: str
    state: str
    versions: Mapping[str, str]
    message: str
    command: str | None = None


@dataclass(frozen=True)
class InstalledGpu(CudaDevice):
    """An NVIDIA GPU that this process may use, with its memory in bytes, if nvidia-smi or the driver states it."""

    memory: int | None


@dataclass(frozen=True)
class BundleRun:
    """Whether a back end runs a graph or an engine of the bundle on this machine, and what it reported."""

    file: str
    backend: str
    precision: str
    works: bool
    message: str


@dataclass(frozen=True)
class Diagnosis:
    """The result of `doctor`; `can_run` is whether anything on this machine runs a bundle, or the one that was given."""

    machine: Machine
    driver: str | None
    gpus: tuple[InstalledGpu, ...]
    checks: tuple[CheckResult, ...]
    conflicts: tuple[VersionConflict, ...]
    runs: tuple[BundleRun, ...] | None
    damaged: tuple[str, ...]
    can_run: bool

    def to_dict(self) -> dict[str, Any]:
        """Return the result as JSON values."""
        return {"swin_deploy": swin_deploy.__version__, **asdict(self)}


def doctor(bundle: str | os.PathLike[str] | None = None) -> Diagnosis:
    """Try every library in its own process; with `bundle`, also run its graphs and engines, and check its files."""
    from swin_deploy.runtimes.backends import BACKENDS

    found = None if bundle is None else Bundle.open(bundle)
    machine = this_machine()
    driver, listed = nvidia_smi()
    gpus = tuple(
        InstalledGpu(gpu.name, gpu.capability, listed.get(gpu.name) or device_memory(number))
        for number, gpu in enumerate(cuda_devices())
    )
    with ThreadPoolExecutor(min(4, machine.usable_cores)) as pool:
        results = tuple(pool.map(lambda check: _result(check, bool(gpus)), CHECKS))
    conflicts = installed_conflicts(bool(gpus))
    for release in dict.fromkeys(versions_of(("tensorrt",)).values()) if gpus else ():
        conflicts += known_faults(release, [gpu.capability for gpu in gpus])
    if listed and not gpus:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "not set")
        problem = f"nvidia-smi lists a GPU, but CUDA offers none to this process (CUDA_VISIBLE_DEVICES: {visible})"
        conflicts += (VersionConflict(problem, "unset CUDA_VISIBLE_DEVICES"),)
    pairs = list(zip(CHECKS, results, strict=True))
    works = {check.backend for check, one in pairs if one.state == WORKS and (gpus or not check.runs_on_gpu)}
    able, runs = works & BACKENDS.keys(), None
    if found is not None:
        run_by = [name for name, backend in BACKENDS.items() if not backend.engines]
        why = {check.backend: one.message for check, one in reversed(pairs)}
        runs = _runs(found, [name for name in run_by if name in able], gpus)
        runs += tuple(BundleRun("-", name, "-", False, why.get(name, "not checked")) for name in run_by if name not in able)
    can_run = bool(able) if runs is None else any(run.works for run in runs)
    return Diagnosis(machine, driver, gpus, results, conflicts, runs, () if found is None else _damaged(found), can_run)


def nvidia_smi() -> tuple[str | None, dict[str, int | None]]:
    """Return the version of the NVIDIA driver, and the memory in bytes of each GPU that nvidia-smi lists."""
    query = ["nvidia-smi", "--query-gpu=driver_version,name,memory.total", "--format=csv,noheader,nounits"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
        rows = [[part.strip() for part in line.split(",")] for line in done.stdout.splitlines() if line.count(",") == 2]
        if rows:
            return rows[0][0], {name: int(size) << 20 if size.isdigit() else None for _, name, size in rows}
    with contextlib.suppress(OSError):  # a container or a Jetson without nvidia-smi
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8", errors="replace")
        if match := re.search(r"\b\d{3,}(?:\.\d+)+\b", text):
            return match[0], {}
    with contextlib.suppress(OSError):  # "# R36 (release), REVISION: 4.0, ..." on a Jetson
        text = Path("/etc/nv_tegra_release").read_text(encoding="utf-8", errors="replace")
        if match := re.search(r"R(\d+) \(release\), REVISION: ([\d.]+)", text):
            return f"Jetson Linux {match[1]}.{match[2]}", {}
    return None, {}


def _damaged(bundle: Bundle) -> tuple[str, ...]:
    sentences = []
    for file in bundle.files:
        try:
            bundle.verified_path(file)
        except BundleError as error:
            sentences.append(str(error))
    return tuple(dict.fromkeys(sentences))  # several graphs may share one weights file


def _result(check: Check, gpu: bool) -> CheckResult:
    found = versions_of(check.modules)
    if (unusable := cannot_try(check, gpu, found)) is not None:
        return unusable
    reinstall = install_command(check.extras).replace("install", "install --force-reinstall")
    command = [sys.executable, "-c", PROBE, check.name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False, errors="replace")
        answer = json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        answer = {"error": f"gave no answer within {SECONDS} seconds"}
    except ValueError:
        last = next((line.strip() for line in reversed(done.stderr.splitlines()) if line.strip()), "no message")
        answer = {"error": f"crashed (exit code {done.returncode}): {last}"}
    if "error" in answer:
        return CheckResult(check.name, BROKEN, found, answer["error"], answer.get("command") or reinstall)
    return CheckResult(check.name, WORKS, found, answer["works"])


def cannot_try(check: Check, gpu: bool, versions: Mapping[str, str]) -> CheckResult | None:
    """Return why a check cannot be tried on this machine, or None if it can. `versions` are those in use by it."""
    if check.needs_gpu and not gpu:
        return CheckResult(check.name, NO_GPU, versions, "this machine has no usable NVIDIA GPU")
    missing = [module for module in check.modules if not installed(module)]
    if not missing:
        return None
    replaced = "onnxruntime-gpu" not in versions and "onnxruntime" in versions and check.extras.startswith("gpu")
    extras = re.sub(r"\bonnxruntime\b", "gpu", check.extras) if "onnxruntime-gpu" in versions else check.extras
    command = ("pip uninstall -y onnxruntime && " if replaced else "") + install_command(extras)
    return CheckResult(check.name, MISSING, versions, f"cannot import {', '.join(missing)}", command)


class ProbeError(Exception):
    """A library that is installed and does not work: the problem, and the command that fixes it."""


def probe() -> None:
    """Try one library in this process; its argument is the name of the check, its answer one JSON object on stdout."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print to stdout
    check = next(check for check in CHECKS if check.name == sys.argv[1])
    try:
        for module in check.modules:
            require(module, f"use {check.name}")
        answer = {"works": check.probe()}
    except ProbeError as error:
        answer = dict(zip(("error", "command"), error.args, strict=False))
    except Exception as error:  # noqa: BLE001 - libraries raise anything
        answer = {"error": " ".join(str(error).split()) or type(error).__name__}
    with answers:
        json.dump(answer, answers)


def _expect_one(found: Any, place: str) -> None:
    if found.tolist() != [1.0]:
        raise ProbeError(f"Relu(1) is {found.tolist()} on {place}")


def _onnxruntime(provider: str, extras: str, works: str) -> str:
    from swin_deploy.runtimes.gpu.onnxruntime_cuda import preloaded

    ort = require("onnxruntime", "run a graph")
    if provider not in ort.get_available_providers():
        command = ("" if extras == "onnxruntime" else "pip uninstall -y onnxruntime && ") + install_command(extras)
        raise ProbeError(f"this build of onnxruntime has no {provider}", command)
    message = "" if extras == "onnxruntime" else preloaded(ort)
    session = onnxruntime_session(MICRO, providers=[provider])
    if session.get_providers()[0] != provider:  # it falls back to the CPU, and only its log reports that
        more = install_command("tensorrt") + " && " if provider == "TensorrtExecutionProvider" else ""
        problem = f"{provider} does not start: CUDA or one of its libraries is missing or has the wrong version{message}"
        raise ProbeError(problem, more + 'pip install "onnxruntime-gpu[cuda,cudnn]"')
    _expect_one(session.run(None, FEEDS)[0], provider)
    return works


def _onnxruntime_plugin() -> str:
    from swin_deploy.runtimes.gpu.onnxruntime_cuda import RTX_PLUGIN, rtx_plugin_devices

    ort = require("onnxruntime", "run a graph")
    name, devices = rtx_plugin_devices(ort, require(RTX_PLUGIN, "run a graph"))
    if not devices:
        raise ProbeError(f"{name} supports none of the GPUs of this machine")
    _expect_one(onnxruntime_session(MICRO, devices=devices[:1]).run(None, FEEDS)[0], name)
    return _COMPILED


def _openvino() -> str:
    from swin_deploy.runtimes.openvino import openvino_core

    core = openvino_core()
    _expect_one(core.compile_model(core.read_model(MICRO), "CPU").create_infer_request().infer(FEEDS)["y"], "CPU")
    types = [str(name) for name in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")]
    names = {"FP32": "fp32", "BF16": "bf16", "FP16": "fp16", "INT8": "INT8"}
    computes = ", ".join(name for word, name in names.items() if word in types)
    return f"{computes} on the CPU; devices: {', '.join(core.available_devices)}"


def _pytorch() -> str:
    from swin_deploy.runtimes.pytorch import PyTorch

    devices = ["cpu"] + ["cuda:0"] * bool(require("torch", "run a graph").cuda.is_available())
    with scratch_folder("doctor") as folder:
        path = folder / "micro.onnx"
        path.write_bytes(MICRO)
        for device in devices:
            with PyTorch(path, device=device) as runtime:
                _expect_one(runtime.run(FEEDS)["y"], device)
    return f"every graph, node by node, as the reference; devices: {', '.join(devices)}"


def _compiler(backend: str) -> str:
    from swin_deploy.exporters.engines.engine_from_onnx import load_compiler
    from swin_deploy.exporters.engines.targets import has_fp8, rtx_gpus

    trt = load_compiler(backend)
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    if not trt.OnnxParser(network, logger).parse(MICRO):
        raise ProbeError("its parser rejects an ONNX graph of one node")
    if backend == "tensorrt-rtx":
        return f"compiles for {', '.join(rtx_gpus())}, without a GPU"
    gpu = cuda_devices()[0].capability
    types = ["fp32", "fp16"] + ["bf16"] * (int(gpu.removeprefix("sm_")) >= 80) + ["INT8"] + ["FP8"] * has_fp8(gpu)
    return f"compiles and runs {', '.join(types)} engines for {gpu}"


def _export() -> str:
    cuda = require("torch", "export").version.cuda
    return f"torch is built for {f'CUDA {cuda}' if cuda else 'the CPU'}; graphs in fp32, fp16, bf16"


def _hub() -> str:
    from huggingface_hub import constants

    offline = "local cache only: HF_HUB_OFFLINE is set"
    return f"checkpoints from the {offline if constants.HF_HUB_OFFLINE else 'cache and the hub, which was not contacted'}"


_MAKERS = ("torch", "onnx", "onnx_graphsurgeon", "safetensors")
_QUANTIZED = "INT8 and FP8 graphs for TensorRT, INT8 for ONNX Runtime and OpenVINO"
_COMPILED = "graphs that TensorRT compiles while they load"
_ORT, _ORT_TRT = "onnxruntime", "onnxruntime-tensorrt"
_ort_cpu = partial(_onnxruntime, "CPUExecutionProvider", "onnxruntime", "fp32 and INT8 graphs")
_ort_cuda = partial(_onnxruntime, "CUDAExecutionProvider", "gpu", "fp32 and fp16 graphs on the GPU")
_ort_tensorrt = partial(_onnxruntime, "TensorrtExecutionProvider", "gpu,tensorrt", _COMPILED)
_rtx = partial(_compiler, "tensorrt-rtx")
CHECKS = (
    Check("ONNX Runtime, CPU", (_ORT,), "onnxruntime", _ort_cpu, _ORT),
    Check("ONNX Runtime, CUDA", (_ORT,), "gpu", _ort_cuda, _ORT, needs_gpu=True),
    Check("ONNX Runtime, TensorRT", (_ORT,), "gpu,tensorrt", _ort_tensorrt, _ORT_TRT, needs_gpu=True),
    Check(
        "ONNX Runtime, TensorRT for RTX",
        (_ORT, "onnxruntime_ep_nv_tensorrt_rtx"),
        "onnxruntime-tensorrt-rtx",
        _onnxruntime_plugin,
        "onnxruntime-tensorrt-rtx",
        needs_gpu=True,
    ),
    Check("OpenVINO", ("openvino",), "openvino", _openvino, "openvino"),
    Check("PyTorch", ("torch", "onnx"), "export", _pytorch, "torch"),
    Check("TensorRT", ("tensorrt",), "tensorrt", partial(_compiler, "tensorrt"), "tensorrt", needs_gpu=True),
    Check("TensorRT for RTX", ("tensorrt_rtx",), "tensorrt-rtx", _rtx, "tensorrt-rtx", runs_on_gpu=True),
    Check("export", _MAKERS, "export", _export),
    Check("quantize", ("onnx", "onnx_graphsurgeon", _ORT), "export,onnxruntime", lambda: _QUANTIZED),
    Check("hub", ("huggingface_hub",), "hub", _hub),
    Check("TensorFlow checkpoints", ("h5py",), "tensorflow", lambda: "tf_model.h5 files"),
    Check("plots", ("matplotlib",), "plots", lambda: "bench --plot, inspect --plot"),
    Check("report", ("jinja2", "vl_convert"), "report", lambda: "reports as HTML pages"),
    Check("TIFF files with many bands", ("tifffile", "imagecodecs"), "tiff", lambda: "images of more than four channels"),
    Check("machine facts", ("psutil",), "bench", lambda: "memory of this machine"),
)


def _runs(bundle: Bundle, backends: Sequence[str], gpus: Sequence[InstalledGpu]) -> tuple[BundleRun, ...]:
    """Run every precision of the bundle in every back end, and every engine that fits this machine."""
    held: dict[str, str] = {}
    for file, entry in bundle.graphs.items():
        held.setdefault(entry.precision, file)  # the first image size
    runs = [
        _tried(bundle, file, backend, precision, {"backend": backend, "precision": precision, "threads": 0})
        for backend in backends
        for precision, file in {**held, **({"bf16": held["fp32"]} if backend == "openvino" else {})}.items()
    ]
    return (*runs, *(run_engine(bundle, file, entry, gpus) for file, entry in bundle.engines.items()))


def run_engine(bundle: Bundle, file: str, entry: EngineEntry, gpus: Sequence[InstalledGpu]) -> BundleRun:
    """Run an engine of the bundle on the first GPU that it fits, or report why it fits none."""
    from swin_deploy.runtimes.backends import BACKENDS
    from swin_deploy.runtimes.gpu.engine_fit import incompatibility, untrusted

    backend, precision, library = entry.backend, entry.precision, BACKENDS[entry.backend].found
    release = None
    with contextlib.suppress(MissingDependencyError, OSError):
        release = str(require(library, "run engines").__version__)
    names = [gpu.capability for gpu in gpus]
    if (why := incompatibility(bundle, file, names, release) or untrusted(bundle, file, names)) is not None:
        return BundleRun(file, backend, precision, False, why)
    fitting = (i for i, gpu in enumerate(gpus) if incompatibility(bundle, file, [gpu.capability], release) is None)
    return _tried(bundle, file, backend, precision, {"engine": file, "device": f"cuda:{next(fitting)}"})


def _tried(bundle: Bundle, file: str, backend: str, precision: str, request: Mapping[str, Any]) -> BundleRun:
    from swin_deploy.bench.worker import Child

    with scratch_folder("doctor") as folder:
        try:
            answer = str(folder / "answer.npz")
            with Child({"bundle": str(bundle.path), **request, "batch": 1, "answer": answer}) as child:
                message = f"{child.model}; first result {child.cold_start:.1f} s after the start of its process"
                return BundleRun(file, backend, precision, True, message)
        except BackendError as error:
            return BundleRun(file, backend, precision, False, str(error))
