"""The table of back ends. The module of a back end is imported only when it is used."""

from __future__ import annotations

import importlib
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swin_deploy.dependencies import installed
from swin_deploy.errors import MissingKernelError, UsageError, unknown
from swin_deploy.files import scratch_folder
from swin_deploy.options import QUANTIZED, TARGETS, device_from_text

from .base import Runtime

if TYPE_CHECKING:
    from swin_deploy.bundle import Bundle

    from .base import EngineFile


@dataclass(frozen=True)
class Backend:
    """Where a back end is implemented (our module and class), the library it needs, and the kinds of device it runs on.

    `engines`: it runs engines instead of graphs. `auto`: "auto" may choose it. `lean`: a smaller library that is enough for
    version-compatible engines. `on_gpu`: module and class for GPUs, if they are others.
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
        """Whether its library, or the lean one, is installed."""
        return installed(self.found)

    @property
    def found(self) -> str:
        """The installed library; the usual one if none is."""
        return self.lean if self.lean and not installed(self.library) and installed(self.lean) else self.library


BACKENDS = {
    "onnxruntime": Backend(
        "onnxruntime", "OnnxRuntime", "onnxruntime", ("cpu", "cuda"), on_gpu=("gpu.onnxruntime_cuda", "OnnxRuntimeCuda")
    ),
    "openvino": Backend("openvino", "OpenVino", "openvino", ("cpu",)),
    # Compiles the graph every time it is loaded.
    "onnxruntime-tensorrt": Backend("gpu.onnxruntime_cuda", "OnnxRuntimeTensorRt", "onnxruntime", ("cuda",), auto=False),
    "onnxruntime-tensorrt-rtx": Backend(
        "gpu.onnxruntime_cuda", "OnnxRuntimeTensorRtRtx", "onnxruntime_ep_nv_tensorrt_rtx", ("cuda",), auto=False
    ),
    # The reference. Fuses nothing.
    "torch": Backend("pytorch", "PyTorch", "torch", ("cpu", "cuda"), auto=False),
    "tensorrt": Backend("gpu.tensorrt", "TensorRt", "tensorrt", ("cuda",), engines=True, lean="tensorrt_lean"),
    "tensorrt-rtx": Backend("gpu.tensorrt", "TensorRtRtx", "tensorrt_rtx", ("cuda",), engines=True),
}


def backend_named(name: str) -> Backend:
    """Return the back end of that name. Raises UsageError for an unknown name."""
    if name not in BACKENDS:
        raise unknown("back end", name, BACKENDS)
    return BACKENDS[name]


def misread(bundle: Bundle, file: str, backend: str) -> str | None:
    """Return why a back end would compute wrong results from that graph of a bundle; None if it would not."""
    entry = bundle.graphs.get(file)
    if entry is None or backend != "openvino" or entry.precision not in QUANTIZED or entry.target != TARGETS[0]:
        return None
    command = ["swin-deploy", "quantize", str(bundle.path), "--int8", "--target", "openvino", "--data", "DIR"]
    return (
        f"The {entry.precision.upper()} graph in {bundle.path} was built for TensorRT and gives wrong results in OpenVINO. "
        f"Build one for OpenVINO: {shlex.join(command)}"
    )


def runtime_from_onnx(
    path: Path, backend: str = "onnxruntime", threads: int = 0, bf16: bool = False, device: str = "cpu", **options: Any
) -> Runtime:
    """Load the ONNX model at `path`. `bf16` lets OpenVINO compute in bf16; otherwise the types of the graph decide.

    `options` are further arguments: `batches` of OpenVINO, and the `digest` of the file for back ends that store
    compiled graphs.

    Raises UsageError for an unknown back end or device, or a back end that does not run on the device.
    """
    chosen, device = backend_named(backend), device_from_text(device)
    if chosen.engines:
        raise UsageError(f"The back end {backend} runs engines of a bundle, not ONNX graphs. Choose another back end.")
    if device.partition(":")[0] not in chosen.devices:
        raise UsageError(f"The back end {backend} runs on {' or '.join(chosen.devices)}, not on {device}.")
    module, runtime = chosen.on_gpu if chosen.on_gpu and device != "cpu" else (chosen.module, chosen.runtime)
    make = getattr(importlib.import_module(f".{module}", __package__), runtime)
    if backend != "openvino":
        options = {"digest": options.get("digest", "")} if (backend, device) == ("onnxruntime", "cpu") else {}
    if bf16:
        options["bf16"] = True
    loaded: Runtime = make(path, threads, device, **options)
    return loaded


def runtime_from_engine(file: EngineFile, backend: str, device: str) -> Runtime:
    """Load an engine on `device` ("cuda:0")."""
    make = getattr(importlib.import_module(f".{BACKENDS[backend].module}", __package__), BACKENDS[backend].runtime)
    loaded: Runtime = make(file, device)
    return loaded


def runtime_to_check(path: Path, backend: str = "onnxruntime", device: str = "cpu") -> Runtime:
    """Load the ONNX model at `path` to compare its results: types that the back end has no kernels for are emulated.

    The title of the runtime then ends in "types emulated".
    """
    try:
        return runtime_from_onnx(path, backend, device=device)
    except MissingKernelError:
        from .emulate import emulated_file

        with scratch_folder("emulate") as folder:
            runtime = runtime_from_onnx(emulated_file(path, folder), backend, device=device)
    runtime.title += ", types emulated"
    return runtime
