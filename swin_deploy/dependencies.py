"""Import of optional libraries where they are used, with a clear error if one is missing."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from swin_deploy.bundle import without_links
from swin_deploy.errors import GONE, MissingDependencyError, SwinDeployError, system_limit

# module -> (name in messages, extra that installs it)
PROVIDERS = {
    "torch": ("PyTorch", "export"),
    "onnx": ("onnx", "export"),
    "onnx_graphsurgeon": ("onnx-graphsurgeon", "export"),
    "safetensors": ("safetensors", "export"),
    "h5py": ("h5py", "tensorflow"),
    "huggingface_hub": ("huggingface_hub", "hub"),
    "onnxruntime": ("ONNX Runtime", "onnxruntime"),
    "onnxruntime_ep_nv_tensorrt_rtx": ("ONNX Runtime's provider for TensorRT for RTX", "onnxruntime-tensorrt-rtx"),
    "openvino": ("OpenVINO", "openvino"),
    "tensorrt": ("TensorRT", "tensorrt"),
    "tensorrt_lean": ("TensorRT's lean runtime", "tensorrt"),
    "tensorrt_rtx": ("TensorRT for RTX", "tensorrt-rtx"),
    "matplotlib": ("matplotlib", "plots"),
    "jinja2": ("Jinja2", "report"),
    "vl_convert": ("vl-convert-python", "report"),
    "tifffile": ("tifffile", "tiff"),
    "imagecodecs": ("imagecodecs", "tiff"),
    "pyarrow": ("PyArrow", "parquet"),
    "ray": ("Ray", "ray"),
    "fastapi": ("FastAPI", "serve"),
    "uvicorn": ("Uvicorn", "serve"),
    "httptools": ("httptools", "serve"),
    "python_multipart": ("python-multipart", "serve"),
    "prometheus_client": ("prometheus-client", "serve"),
    "psutil": ("psutil", "bench"),
    "cpuinfo": ("py-cpuinfo", "bench"),
}


_INTERRUPTED: set[str] = set()  # native libraries whose initialization an interrupt ended


def require(module: str, purpose: str) -> Any:
    """Import and return `module`; `purpose` completes "... is needed to". Raises MissingDependencyError if that fails."""
    top = module.partition(".")[0]
    if top == "torch" and top not in sys.modules:
        _refuse_what_ends_torch()
    if top == "onnxruntime":
        # From 1.29 on it sends telemetry, with an id of the device that it keeps in the user's cache folder. It reads this
        # variable once, when it is imported. Set it to 0 to allow telemetry.
        os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        return _openvino(module) if top == "openvino" else importlib.import_module(module)
    except (ImportError, OSError) as error:  # OSError: a shared library of the package is missing or damaged
        name, extra = PROVIDERS[top]
        if (cause := error.__cause__) is not None and not isinstance(cause, Exception):  # pybind11 converts an interrupt
            _INTERRUPTED.add(top)
            raise cause from None
        if top in _INTERRUPTED:
            raise SwinDeployError(
                f"The import of {name} was interrupted, and the library cannot be imported twice. Start this process again."
            ) from error
        if (limit := system_limit(error)) is not None:
            raise SwinDeployError(f"{name} cannot be imported. {limit}") from error
        why = f"installed and fails to import ({error}). Reinstall it: pip install --force-reinstall"
        if isinstance(error, ModuleNotFoundError) and error.name == top:
            why = "not installed. Run: pip install"
        raise MissingDependencyError(f'{name} is needed to {purpose}, but it is {why} "swin-deploy[{extra}]"') from error


def _refuse_what_ends_torch() -> None:
    """Raise SwinDeployError where the import of torch would end this process, instead of raising an error."""
    try:
        Path.cwd()
    except FileNotFoundError:
        raise SwinDeployError(f"PyTorch cannot be imported. {GONE}") from None
    with contextlib.suppress(ImportError, OSError):  # not Linux
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        if limit != resource.RLIM_INFINITY and limit - used < TORCH_BYTES:
            raise SwinDeployError(
                f"PyTorch needs {TORCH_BYTES >> 20} MiB of address space to start, and {limit - used >> 20} MiB are left of "
                f"the {limit >> 20} MiB of this process. Raise this limit (ulimit -v)."
            )


def _openvino(module: str) -> Any:
    """Import OpenVINO without its telemetry library, unless the user has opted in or out or the application imported it."""
    reports, windows = "openvino_telemetry", sys.platform == "win32"
    folder = Path(os.environ.get("LOCALAPPDATA" if windows else "HOME", ""), "Intel Corporation" if windows else "intel")
    if reports in sys.modules or "openvino" in sys.modules or (folder / reports).exists():
        return importlib.import_module(module)
    sys.modules[reports] = None  # type: ignore[assignment]
    try:
        return importlib.import_module(module)
    finally:
        del sys.modules[reports]


TORCH_BYTES = 520 << 20  # address space that the import of torch 2.13 takes, without CUDA
EXACT_QDQ = {"session.disable_quant_qdq": "1"}  # compute Q/DQ as ONNX defines it, without 8-bit kernels
EXACT_SUMS = "session.x64quantprecision"  # "1": kernels whose sums do not saturate on x86 processors without VNNI


def onnxruntime_session(
    model: bytes | str | os.PathLike[str],
    *,
    threads: int = 0,
    providers: Sequence[Any] = ("CPUExecutionProvider",),
    config: Mapping[str, str] | None = None,
    devices: Sequence[Any] = (),
    disabled_optimizers: Sequence[str] = (),
    **options: Any,
) -> Any:
    """Open an ONNX Runtime session that reports problems only as exceptions and never falls back to another provider.

    `devices` are of a plug-in provider, and replace `providers`. On the CPU, sums of 8-bit products do not saturate unless
    `config` allows it.
    """
    ort = require("onnxruntime", "run a graph")
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = threads
    settings.log_severity_level = 3  # errors become exceptions; hints do not belong into an application's output
    for name, value in options.items():
        setattr(settings, name, value)
    only_cpu = not devices and list(providers) == ["CPUExecutionProvider"]
    for name, value in {**({EXACT_SUMS: "1"} if only_cpu else {}), **(config or {})}.items():
        settings.add_session_config_entry(name, value)
    if devices:
        settings.add_provider_for_devices(list(devices), {})
    with contextlib.nullcontext(model) if isinstance(model, bytes) else without_links(Path(model)) as source:
        # Without enable_fallback=0, ONNX Runtime replaces a failing provider by the CPU and prints a message.
        others = {"disabled_optimizers": list(disabled_optimizers)} if disabled_optimizers else {}
        given = None if devices else list(providers)
        return ort.InferenceSession(source, settings, providers=given, enable_fallback=0, **others)


def installed_versions(distributions: Iterable[str]) -> dict[str, str]:
    """Return the versions of those distributions that are installed, by name."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in distributions:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def installed(module: str) -> bool:
    """Return whether a module is installed, without importing it, which can take seconds."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False
