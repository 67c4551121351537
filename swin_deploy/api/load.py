"""A bundle -> a model that is ready to run."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from swin_deploy.runtimes.model import Model


def load(path: str | os.PathLike[str], *, precision: str = "fp32", backend: str = "onnxruntime", threads: int = 0) -> Model:
    """The bundle at `path`, loaded and ready to run; use it as a context manager or call `close()`.

    `precision` is "fp32", or another one whose graph was made ("fp16", "int8"), or with OpenVINO "bf16"; `backend` is
    "onnxruntime" or "openvino", both on the CPU; `threads` 0 lets the back end choose. Raises errors.BundleError for a
    folder that is no intact bundle.
    """
    from swin_deploy.runtimes.model import load_model

    return load_model(path, precision, backend, threads)
