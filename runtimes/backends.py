"""BACKENDS: every back end by name, as strings; its module is imported only when it is asked for."""

from __future__ import annotations

import importlib
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from swin_deploy.dependencies import installed
from swin_deploy.errors import MissingKernelError, UsageError
from swin_deploy.files import scratch_folder
from swin_deploy.specs import QUANTIZED, TARGETS, target_of

from .base import Runtime

if TYPE_CHECKING:
    from swin_deploy.bundle import Bundle

    from .base import EngineFile


@dataclass(frozen=True)
class Backend:
    """Where a back end is: our module and class, the library it needs, and the kinds of device it runs on.

    `engines` says that it runs engines and not graphs; `auto` that it may be chosen without being asked for by name. `lean` is
    a smaller library that does for version-compatible engines where only that is installed. `on_gpu` is another module and
    class for GPUs.
    """

    module: str
    runtime: str
    library: str
    devices: tuple[str, ...]
    engines: bool = False
    auto: bool = True
    lean: str = ""
    on_gpu: tuple[str, str] | None = None

    @property
    def installed(self) -> bool:
        """Whether its library is there, or the lean one."""
        return installed(self.found)

    @property
    def found(self) -> str:
        """The library that is there; the usual one where none is."""
        return self.lean if self.lean and not installed(self.library) and installed(self.lean) else self.library


BACKENDS = {
    "onnxruntime": Backend(
        "onnxruntime", "OnnxRuntime", "onnxruntime", ("cpu", "cuda"), on_gpu=("gpu.onnxruntime_cuda", "OnnxRuntimeCuda")
    ),
    "openvino": Backend("openvino", "OpenVino", "openvino", ("cpu",)),
    # It compiles the graph each time that it is loaded.
    "onnxruntime-tensorrt": Backend("gpu.onnxruntime_cuda", "OnnxRuntimeTensorRt", "onnxruntime", ("cuda",), auto=False),
    # The reference, which fuses nothing.
    "torch": Backend("pytorch", "PyTorch", "torch", ("cpu", "cuda"), auto=False),
    "tensorrt": Backend("gpu.tensorrt", "TensorRt", "tensorrt", ("cuda",), engines=True, lean="tensorrt_lean"),
    "tensorrt-rtx": Backend("gpu.tensorrt", "TensorRtRtx", "tensorrt_rtx", ("cuda",), engines=True),
}


def backend_named(name: str) -> Backend:
    """The back end of that name. Raises UsageError where there is none."""
    if name not in BACKENDS:
        raise UsageError(f'There is no back end "{name}". There are: {", ".join(BACKENDS)}.')
    return BACKENDS[name]


def misread(bundle: Bundle, file: str, backend: str) -> str | None:
    """Why a back end is not to run that graph of a bundle: it makes other answers of it. None where it may."""
    entry = bundle.files[file]
    precision = str(entry["precision"])
    if backend != "openvino" or precision not in QUANTIZED or target_of(entry) != TARGETS[0]:
        return None
    command = ["swin-deploy", "quantize", str(bundle.path), "--int8", "--target", "openvino", "--data", "DIR"]
    return (
        f"The {precision} graph of {bundle.path} is in the form for TensorRT, of which OpenVINO makes other answers. "
        f'Make one for it: "{shlex.join(command)}".'
    )


def device_from_text(text: str) -> str:
    """ "cuda:0" from "cuda" or "cuda:0", "cpu" from "cpu". Raises UsageError for anything else."""
    if text == "cpu":
        return text
    match = re.fullmatch(r"cuda(?::(\d{1,3}))?", text)
    if match is None:
        raise UsageError(f'There is no device "{text}". Expected cpu, cuda, or one of several GPUs such as cuda:1.')
    return f"cuda:{int(match[1] or 0)}"


def runtime_from_onnx(
    path: Path, backend: str = "onnxruntime", threads: int = 0, bf16: bool = False, device: str = "cpu"
) -> Runtime:
    """The ONNX model at `path`, loaded by `backend`, which computes in the graph's own types, or, of OpenVINO, in bf16.

    Raises UsageError for a back end or a device that there is not, or that do not go together.
    """
    chosen, device = backend_named(backend), device_from_text(device)
    if chosen.engines:
        raise UsageError(f"The back end {backend} runs engines of a bundle, not ONNX graphs. Take one of another name.")
    if device.partition(":")[0] not in chosen.devices:
        raise UsageError(f"The back end {backend} runs on {' or '.join(chosen.devices)}, not on {device}.")
    module, runtime = chosen.on_gpu if chosen.on_gpu and device != "cpu" else (chosen.module, chosen.runtime)
    make = getattr(importlib.import_module(f".{module}", __package__), runtime)
    loaded: Runtime = make(path, threads, device, bf16=True) if bf16 else make(path, threads, device)
    return loaded


def runtime_from_engine(file: EngineFile, backend: str, device: str) -> Runtime:
    """The engine, loaded by `backend` on `device` ("cuda:0")."""
    make = getattr(importlib.import_module(f".{BACKENDS[backend].module}", __package__), BACKENDS[backend].runtime)
    loaded: Runtime = make(file, device)
    return loaded


def runtime_to_check(path: Path, backend: str = "onnxruntime", device: str = "cpu") -> Runtime:
    """As runtime_from_onnx, for comparing answers only: types that the back end has no kernels for are emulated.

    The runtime's title says so where it was done.
    """
    try:
        return runtime_from_onnx(path, backend, device=device)
    except MissingKernelError:
        from .emulate import emulated_file

        with scratch_folder("emulate") as folder:
            runtime = runtime_from_onnx(emulated_file(path, folder), backend, device=device)
    runtime.title += ", types emulated"
    return runtime
