"""This machine, and a bundle -> what can be done here, and what has to be installed for the rest."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import swin_deploy
from swin_deploy.arguments import checked
from swin_deploy.bundle import Bundle
from swin_deploy.dependencies import installed, onnxruntime_session, require
from swin_deploy.doctor.packages import (
    BROKEN,
    STEPS,
    WORKS,
    Finding,
    Step,
    Trap,
    install,
    installed_traps,
    unusable,
    versions_for,
)
from swin_deploy.errors import BackendError, BundleError, MissingDependencyError
from swin_deploy.files import scratch_folder
from swin_deploy.machine import Gpu, Machine, driver_and_gpus, this_machine

SECONDS = 180  # for one library to show that it works
PROBE = "import sys; sys.path[:] = filter(None, sys.path); from swin_deploy.api.doctor import probe; probe()"

# One value through one Relu, opset 17.
MICRO = (
    b'\x08\x08:7\n\x0c\n\x01x\x12\x01y"\x04Relu\x12\x05microZ\x0f\n\x01x\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01'
    b"b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x04\n\x00\x10\x11"
)


@dataclass(frozen=True)
class Run:
    """A graph or an engine of a bundle and a back end: whether that can run here, and what it said."""

    file: str
    backend: str
    precision: str
    works: bool
    said: str


@dataclass(frozen=True)
class Diagnosis:
    """What was found. `runs` is None where no bundle was named; `healthy` is whether something can run one, or that one.

    `damaged` is a sentence for each file of the bundle that is not as it was written.
    """

    machine: Machine
    driver: str | None
    gpus: tuple[Gpu, ...]
    findings: tuple[Finding, ...]
    traps: tuple[Trap, ...]
    runs: tuple[Run, ...] | None
    damaged: tuple[str, ...]
    healthy: bool

    def to_dict(self) -> dict[str, Any]:
        """The facts as JSON values."""
        return {
            "swin_deploy": swin_deploy.__version__,
            "machine": self.machine.to_dict(),
            "driver": self.driver,
            "gpus": [asdict(gpu) for gpu in self.gpus],
            "steps": [finding.to_dict() for finding in self.findings],
            "traps": [asdict(trap) for trap in self.traps],
            "bundle": None if self.runs is None else [asdict(run) for run in self.runs],
            "damaged": list(self.damaged),
            "can_run": self.healthy,
        }


@checked
def doctor(bundle: str | os.PathLike[str] | None = None) -> Diagnosis:
    """What this machine has and can do: every library is really tried, each in a process of its own.

    With `bundle`, every graph of it is loaded and run by every back end, too, and every engine that is for this machine, and
    every file is compared with its sha256. Raises errors.BundleError where it is none.
    """
    from swin_deploy.gpus import cuda_devices
    from swin_deploy.runtimes.backends import BACKENDS

    found = None if bundle is None else Bundle.open(bundle)
    machine, devices = this_machine(), cuda_devices()
    driver, listed = driver_and_gpus()
    memory = {gpu.name: gpu.memory for gpu in listed}
    gpus = tuple(Gpu(device.name, device.capability, memory.get(device.name)) for device in devices)
    with ThreadPoolExecutor(min(4, machine.usable_cores)) as pool:
        findings = tuple(pool.map(lambda step: _finding(step, bool(gpus)), STEPS))
    traps = installed_traps(bool(gpus))
    if listed and not gpus:
        traps += (
            Trap(
                f"nvidia-smi lists {len(listed)} GPU(s), and CUDA offers none to this process (CUDA_VISIBLE_DEVICES is "
                f"{os.environ.get('CUDA_VISIBLE_DEVICES', 'not set')!r})",
                "unset CUDA_VISIBLE_DEVICES",
            ),
        )
    working = [step for step, one in zip(STEPS, findings, strict=True) if one.state == WORKS and (gpus or not step.runs_on_gpu)]
    able = {step.backend for step in working} & BACKENDS.keys()
    runs = None
    if found is not None:
        runs = _runs(found, [name for name, kind in BACKENDS.items() if name in able and not kind.engines], gpus)
        why = {step.backend: one.can for step, one in reversed([*zip(STEPS, findings, strict=True)])}
        runs += tuple(
            Run("-", name, "-", False, why.get(name, "it is not tried here"))
            for name, kind in BACKENDS.items()
            if name not in able and not kind.engines  # whose engines have rows of their own
        )
    healthy = bool(able) if runs is None else any(run.works for run in runs)
    return Diagnosis(machine, driver, gpus, findings, traps, runs, () if found is None else _damaged(found), healthy)


def _damaged(bundle: Bundle) -> tuple[str, ...]:
    sentences = []
    for file in bundle.files:
        try:
            bundle.verified_path(file)
        except BundleError as error:
            sentences.append(str(error))
    return tuple(dict.fromkeys(sentences))  # damaged weights are told of once, and not for each graph that reads them


def _finding(step: Step, gpu: bool) -> Finding:
    found = versions_for(step)
    if (why := unusable(step, gpu, found)) is not None:
        return why
    command = [sys.executable, "-c", PROBE, step.name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False, errors="replace")
    except subprocess.TimeoutExpired:
        return Finding(step.name, BROKEN, found, f"gave no answer within {SECONDS} seconds", _reinstall(step))
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        last = next((line.strip() for line in reversed(done.stderr.splitlines()) if line.strip()), "it said nothing")
        return Finding(step.name, BROKEN, found, f"crashed (exit code {done.returncode}): {last}", _reinstall(step))
    if "error" in answer:
        return Finding(step.name, BROKEN, found, answer["error"], answer["command"] or _reinstall(step))
    return Finding(step.name, WORKS, found, answer["can"])


def _reinstall(step: Step) -> str:
    return install(step.extras).replace("install", "install --force-reinstall")


def probe() -> None:
    """The process in which one library is tried: the step's name is its argument, and a line of JSON its answer."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print
    step = next(step for step in STEPS if step.name == sys.argv[1])
    try:
        for module in step.modules:
            require(module, f"use {step.name}")
        answer = {"can": PROBES[step.name]()}
    except Wrong as error:
        answer = {"error": str(error), "command": error.command}
    except Exception as error:  # noqa: BLE001 - whatever a library says
        answer = {"error": " ".join(str(error).split()) or type(error).__name__, "command": ""}
    answers.write(json.dumps(answer))
    answers.flush()


class Wrong(Exception):
    """A library that is there and does not do what it should, with the command that puts it right."""

    def __init__(self, what: str, command: str) -> None:
        super().__init__(what)
        self.command = command


def _onnxruntime_cpu() -> str:
    _session("CPUExecutionProvider")
    return "fp32 and INT8 graphs"


def _onnxruntime_cuda() -> str:
    _session("CUDAExecutionProvider")
    return "fp32 and fp16 graphs on the GPU"


def _onnxruntime_tensorrt() -> str:
    _session("TensorrtExecutionProvider")
    return "graphs compiled by TensorRT while they load"


def _session(provider: str) -> None:
    from swin_deploy.runtimes.gpu.onnxruntime_cuda import preloaded

    ort = require("onnxruntime", "run a graph")
    extras = {"CPUExecutionProvider": "onnxruntime", "CUDAExecutionProvider": "gpu"}.get(provider, "gpu,tensorrt")
    if provider not in ort.get_available_providers():
        command = ("" if extras == "onnxruntime" else "pip uninstall -y onnxruntime && ") + install(extras)
        raise Wrong(f"this build of onnxruntime has no {provider}", command)
    said = "" if provider == "CPUExecutionProvider" else preloaded(ort)
    session = onnxruntime_session(MICRO, providers=[provider])
    if session.get_providers()[0] != provider:  # it falls back to the CPU and says so in its log alone
        more = install("tensorrt") + " && " if provider == "TensorrtExecutionProvider" else ""
        what = f"CUDA or one of its libraries is missing or of another version{said}"
        raise Wrong(f"{provider} does not start: {what}", more + 'pip install "onnxruntime-gpu[cuda,cudnn]"')
    [answer] = session.run(None, {"x": _ones()})
    if answer.tolist() != [1.0]:
        raise BackendError(f"Relu(1) is {answer.tolist()}")


def _ones() -> Any:
    import numpy as np

    return np.ones(1, np.float32)


def _openvino() -> str:
    from swin_deploy.runtimes.openvino import openvino_core

    core = openvino_core()
    request = core.compile_model(core.read_model(MICRO), "CPU").create_infer_request()
    answer = request.infer({"x": _ones()})["y"]
    if answer.tolist() != [1.0]:
        raise BackendError(f"Relu(1) is {answer.tolist()}")
    types = [str(name) for name in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")]
    computes = [
        name for word, name in (("FP32", "fp32"), ("BF16", "bf16"), ("FP16", "fp16"), ("INT8", "INT8")) if word in types
    ]
    return f"{', '.join(computes)} on the CPU; devices: {', '.join(core.available_devices)}"


def _pytorch() -> str:
    import numpy as np

    from swin_deploy.runtimes.pytorch import PyTorch

    places = ["cpu"] + ["cuda:0"] * bool(require("torch", "run a graph").cuda.is_available())
    with scratch_folder("doctor") as folder:
        path = folder / "micro.onnx"
        path.write_bytes(MICRO)
        for place in places:
            with PyTorch(path, device=place) as runtime:
                answer = runtime.run({"x": np.ones(1, np.float32)})["y"]
            if answer.tolist() != [1.0]:
                raise BackendError(f"Relu(1) is {answer.tolist()} on {place}")
    return f"every graph, node by node, as the reference; devices: {', '.join(places)}"


def _tensorrt() -> str:
    from swin_deploy.exporters.engines.engine_spec import has_fp8
    from swin_deploy.gpus import cuda_devices

    _builder("tensorrt")
    gpu = cuda_devices()[0].capability
    number = int(gpu.removeprefix("sm_"))
    types = ["fp32", "fp16"] + ["bf16"] * (number >= 80) + ["INT8"] + ["FP8"] * has_fp8(gpu)
    return f"compiles and runs {', '.join(types)} engines for {gpu}"


def _tensorrt_rtx() -> str:
    from swin_deploy.exporters.engines.engine_spec import rtx_gpus

    _builder("tensorrt-rtx")
    return f"compiles for {', '.join(rtx_gpus())}, without a GPU"


def _builder(backend: str) -> None:
    from swin_deploy.exporters.engines.engine_from_onnx import load_compiler

    trt = load_compiler(backend)
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    if not trt.OnnxParser(network, logger).parse(MICRO):
        raise BackendError("its parser does not take an ONNX graph of one node")


def _export() -> str:
    import torch

    from swin_deploy.specs import PRECISIONS

    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU"
    return f"torch is built for {build}; graphs in {', '.join(PRECISIONS[:3])}"


def _quantize() -> str:
    return "INT8 and FP8 graphs for TensorRT, INT8 for ONNX Runtime and OpenVINO"


def _hub() -> str:
    from huggingface_hub import constants

    offline = "the local cache only: HF_HUB_OFFLINE is set"
    return offline if constants.HF_HUB_OFFLINE else "checkpoints from the cache and the hub, which was not contacted"


def _h5py() -> str:
    return "tf_model.h5 files"


PROBES: Mapping[str, Callable[[], str]] = {
    "ONNX Runtime, CPU": _onnxruntime_cpu,
    "ONNX Runtime, CUDA": _onnxruntime_cuda,
    "ONNX Runtime, TensorRT": _onnxruntime_tensorrt,
    "OpenVINO": _openvino,
    "PyTorch": _pytorch,
    "TensorRT": _tensorrt,
    "TensorRT for RTX": _tensorrt_rtx,
    "export": _export,
    "quantize": _quantize,
    "hub": _hub,
    "TensorFlow checkpoints": _h5py,
}


def _runs(bundle: Bundle, backends: list[str], gpus: tuple[Gpu, ...]) -> tuple[Run, ...]:
    """Every precision of the bundle in every back end, and every engine that is for this machine, really run."""
    runs = []
    held: dict[str, str] = {}
    for file, entry in bundle.graphs.items():
        held.setdefault(str(entry["precision"]), file)  # the first image size
    for backend in backends:
        for precision, file in {**held, **({"bf16": held["fp32"]} if backend == "openvino" else {})}.items():
            request = {"bundle": str(bundle.path), "backend": backend, "precision": precision, "threads": 0}
            runs.append(_tried(file, backend, precision, request))
    for file, entry in bundle.files.items():
        if file.endswith(".engine"):
            runs.append(_engine(bundle, file, entry, gpus))
    return tuple(runs)


def _engine(bundle: Bundle, file: str, entry: Mapping[str, Any], gpus: tuple[Gpu, ...]) -> Run:
    """Whether an engine runs here: on the first GPU that it is for it is really run."""
    from swin_deploy.runtimes.backends import BACKENDS
    from swin_deploy.runtimes.gpu.engines import misfit

    backend, precision, library = str(entry["backend"]), str(entry["precision"]), BACKENDS[entry["backend"]].found
    release = None
    if installed(library):
        with contextlib.suppress(MissingDependencyError, OSError):
            release = str(require(library, "run engines").__version__)
    if (why := misfit(bundle, file, [gpu.capability for gpu in gpus], release)) is not None:
        return Run(file, backend, precision, False, why)
    fitting = (i for i, gpu in enumerate(gpus) if misfit(bundle, file, [gpu.capability], release) is None)
    request = {"bundle": str(bundle.path), "engine": file, "device": f"cuda:{next(fitting)}"}
    return _tried(file, backend, precision, request)


def _tried(file: str, backend: str, precision: str, request: Mapping[str, Any]) -> Run:
    """What became of loading what `request` names and running one image, in a process of its own."""
    from swin_deploy.bench.worker import Child

    with scratch_folder("doctor") as folder:
        try:
            with Child({**request, "batch": 1, "answer": str(folder / "answer.npz")}) as child:
                said = f"{child.title}; first answer {child.cold_start:.1f} s after its process started"
                return Run(file, backend, precision, True, said)
        except BackendError as error:
            return Run(file, backend, precision, False, str(error))
