"""BACKENDS: every back end by name, as strings; its module is imported only when it is asked for."""

from __future__ import annotations

import importlib
import tempfile
from pathlib import Path

from swin_deploy.errors import MissingKernelError, UsageError

from .base import Runtime

BACKENDS = {"onnxruntime": ("onnxruntime", "OnnxRuntime"), "openvino": ("openvino", "OpenVino")}


def runtime_from_onnx(path: Path, backend: str = "onnxruntime", threads: int = 0, bf16: bool = False) -> Runtime:
    """The ONNX model at `path`, loaded by `backend`, which computes in the graph's own types, or, of OpenVINO, in bf16.

    Raises UsageError for a back end that there is not.
    """
    if backend not in BACKENDS:
        raise UsageError(f'There is no back end "{backend}". There are: {", ".join(BACKENDS)}.')
    module, name = BACKENDS[backend]
    make = getattr(importlib.import_module(f".{module}", __package__), name)
    loaded: Runtime = make(path, threads, bf16=True) if bf16 else make(path, threads)
    return loaded


def runtime_to_check(path: Path, backend: str = "onnxruntime") -> Runtime:
    """As runtime_from_onnx, for comparing answers only: types that the back end has no kernels for are emulated.

    The runtime's title says so where it was done.
    """
    try:
        return runtime_from_onnx(path, backend)
    except MissingKernelError:
        from .emulate import emulated_file

        with tempfile.TemporaryDirectory() as folder:
            runtime = runtime_from_onnx(emulated_file(path, Path(folder)), backend)
    runtime.title += ", types emulated"
    return runtime
