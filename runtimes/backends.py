"""BACKENDS: every back end by name, as strings; its module is imported only when it is asked for."""

from __future__ import annotations

import importlib
from pathlib import Path

from swin_deploy.errors import UsageError

from .base import Runtime

BACKENDS = {"onnxruntime": ("onnxruntime", "OnnxRuntime"), "openvino": ("openvino", "OpenVino")}


def runtime_from_onnx(path: Path, backend: str = "onnxruntime", threads: int = 0) -> Runtime:
    """The ONNX model at `path`, loaded by `backend`. Raises UsageError for a back end that there is not."""
    if backend not in BACKENDS:
        raise UsageError(f'There is no back end "{backend}". There are: {", ".join(BACKENDS)}.')
    module, name = BACKENDS[backend]
    loaded: Runtime = getattr(importlib.import_module(f".{module}", __package__), name)(path, threads)
    return loaded
