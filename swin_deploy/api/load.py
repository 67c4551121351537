"""A bundle -> a model that is ready to run."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from swin_deploy.runtimes.model import Model


def load(
    path: str | os.PathLike[str],
    *,
    backend: str = "auto",
    precision: str = "auto",
    device: str = "auto",
    threads: int = 0,
) -> Model:
    """The bundle at `path`, loaded and ready to run; use it as a context manager or call `close()`.

    `backend` is "onnxruntime", "openvino" or "torch", `device` "cpu", "cuda" or "cuda:1"; `precision` is "fp32", or another
    one whose graph was made ("fp16", "int8"), or with OpenVINO "bf16". What is named is taken, or an error. What is "auto" is
    measured where there is a choice, once for this bundle on this machine: the fastest that agrees with PyTorch's recorded
    answers as `verify` demands it of its precision; name "fp32" for answers that are as exact as they can be.
    `model.describe()` says what was chosen and why. `threads` 0 lets the back end choose.

    Raises errors.BundleError for a folder that is no intact bundle, errors.MissingDependencyError for a back end that is not
    installed, errors.UsageError for what the bundle does not hold or a back end does not do, errors.BackendError where one
    fails.
    """
    from swin_deploy.runtimes.opening import load_model

    return load_model(path, backend, precision, device, threads)
