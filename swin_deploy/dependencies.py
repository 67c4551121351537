"""Heavy libraries are imported where they are used, through here, so that a missing one is one clear sentence."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from swin_deploy.errors import MissingDependencyError

# module -> (what to call it, the extra that brings it)
PROVIDERS = {
    "torch": ("PyTorch", "export"),
    "onnx": ("onnx", "export"),
    "onnxscript": ("onnxscript", "export"),
    "onnx_graphsurgeon": ("onnx-graphsurgeon", "export"),
    "safetensors": ("safetensors", "export"),
    "h5py": ("h5py", "tensorflow"),
    "huggingface_hub": ("huggingface_hub", "hub"),
    "onnxruntime": ("ONNX Runtime", "onnxruntime"),
    "openvino": ("OpenVINO", "openvino"),
    "tensorrt": ("TensorRT", "tensorrt"),
    "tensorrt_lean": ("TensorRT's lean runtime", "tensorrt"),
    "tensorrt_rtx": ("TensorRT for RTX", "tensorrt-rtx"),
    "matplotlib": ("matplotlib", "plots"),
    "psutil": ("psutil", "bench"),
    "cpuinfo": ("py-cpuinfo", "bench"),
}


def require(module: str, purpose: str) -> Any:
    """The module `module`, imported now.

    `purpose` completes "... is needed to": `require("onnx", "write the fp16 graph")`. Raises MissingDependencyError with the
    exact install command when the library is absent; an installed library that fails to import says so with its cause.
    """
    top = module.partition(".")[0]
    if top == "onnxruntime":
        # From 1.29 on it reports to its makers, from a name for the device that it keeps in the user's cache folder; it looks
        # here once, when it is imported. Who wants that sets it to 0.
        os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        return _openvino(module) if top == "openvino" else importlib.import_module(module)
    except (ImportError, OSError) as error:  # OSError: a library of the package's that is not there, or not whole
        name, extra = PROVIDERS[top]
        if isinstance(error, ModuleNotFoundError) and error.name == top:
            raise MissingDependencyError(
                f'{name} is needed to {purpose}, but it is not installed. Run: pip install "swin-deploy[{extra}]"'
            ) from error
        raise MissingDependencyError(
            f"{name} is needed to {purpose}, but it is installed and fails to import ({error}). "
            f'Reinstall it: pip install --force-reinstall "swin-deploy[{extra}]"'
        ) from error


def _openvino(module: str) -> Any:
    """OpenVINO, imported without the library by which it reports each import to its makers, which it does without.

    Who has opted in or out (`opt_in_out`) has a file that says so, which that library reads; an application that has imported
    one of the two already has decided as well.
    """
    reports, windows = "openvino_telemetry", sys.platform == "win32"
    folder = Path(os.environ.get("LOCALAPPDATA" if windows else "HOME", ""), "Intel Corporation" if windows else "intel")
    if reports in sys.modules or "openvino" in sys.modules or (folder / reports).exists():
        return importlib.import_module(module)
    sys.modules[reports] = None  # type: ignore[assignment]
    try:
        return importlib.import_module(module)
    finally:
        del sys.modules[reports]


EXACT_QDQ = {"session.disable_quant_qdq": "1"}  # compute Q/DQ as ONNX defines it, without 8-bit kernels


def onnxruntime_session(
    model: bytes | str | os.PathLike[str],
    *,
    threads: int = 0,
    providers: Sequence[Any] = ("CPUExecutionProvider",),
    config: Mapping[str, str] | None = None,
    **options: Any,
) -> Any:
    """Open an ONNX Runtime session that reports problems as exceptions only and never falls back to another provider.

    Args:
        model: A serialized model, or the path of an ONNX file.
        threads: Number of threads within an operator. 0 lets ONNX Runtime choose.
        providers: Execution providers, in order of preference.
        config: Session configuration entries, such as `EXACT_QDQ`.
        options: Further attributes of `onnxruntime.SessionOptions`.

    Returns:
        The `onnxruntime.InferenceSession`.
    """
    ort = require("onnxruntime", "run a graph")
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = threads
    settings.log_severity_level = 3  # errors become exceptions; hints do not belong into an application's output
    for name, value in options.items():
        setattr(settings, name, value)
    for name, value in (config or {}).items():
        settings.add_session_config_entry(name, value)
    source = model if isinstance(model, bytes) else str(model)
    # Without enable_fallback=0, ONNX Runtime replaces a failing provider by the CPU and prints a message.
    return ort.InferenceSession(source, settings, providers=list(providers), enable_fallback=0)


def installed_versions(distributions: Iterable[str]) -> dict[str, str]:
    """The versions of those distributions that are installed, by name."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in distributions:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def installed(module: str) -> bool:
    """Whether `module` is there to be imported, which is not done: it takes seconds, and may still fail."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False
