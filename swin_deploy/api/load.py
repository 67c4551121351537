"""A bundle -> a model that is ready to run."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from swin_deploy.arguments import checked

if TYPE_CHECKING:
    from swin_deploy.runtimes.model import Model


@checked
def load(
    path: str | os.PathLike[str],
    *,
    backend: str = "auto",
    precision: str = "auto",
    device: str = "auto",
    threads: int = 0,
    rebuild: bool = False,
) -> Model:
    """The bundle at `path`, loaded and ready to run; use it as a context manager or call `close()`.

    `backend` is "onnxruntime", "openvino", "torch", or "tensorrt" or "tensorrt-rtx", which run the bundle's engines on a GPU;
    `device` is "cpu", "cuda" or "cuda:1"; `precision` is "fp32", or another one whose graph or engine was made ("fp16",
    "int8"), or with OpenVINO "bf16". What is named is taken, or an error. What is "auto" is measured where there is a choice,
    once for this bundle on this machine: the fastest that agrees with PyTorch's recorded answers as `verify` demands it of its
    precision; name "fp32" for answers that are as exact as they can be. `model.describe()` says what was chosen and why.
    `threads` 0 lets the back end choose.

    With `rebuild`, an engine that does not fit this GPU, this release of TensorRT or the graph as it is now is compiled again
    from the ONNX graph beside it, with the options it had, which may take minutes and changes the bundle. Full TensorRT does
    that for the first GPU only, and of another kind than that is an errors.EngineError with the command for it.

    Raises errors.BundleError for a folder that is no intact bundle, errors.MissingDependencyError for a back end that is not
    installed, errors.UsageError for what the bundle does not hold or a back end does not do, errors.EngineError for an engine
    that does not fit, with the command that compiles it again, errors.BackendError where a back end fails.
    """
    from swin_deploy.runtimes.model_from_bundle import load_model

    if rebuild:
        _rebuild(path, backend, precision, device)
    return load_model(path, backend, precision, device, threads)


def _rebuild(path: str | os.PathLike[str], backend: str, precision: str, device: str) -> None:
    """Compiles the engines again that would be loaded, where one of them does not fit."""
    from swin_deploy.api.build_engine import build_engine
    from swin_deploy.bundle import Bundle
    from swin_deploy.errors import EngineError, UsageError
    from swin_deploy.runtimes.backends import BACKENDS, device_from_text
    from swin_deploy.runtimes.gpu.engines import engines_of, fitting_engines, gpu_of, rebuild_options
    from swin_deploy.specs import PRECISIONS

    compiled = [name for name, kind in BACKENDS.items() if kind.engines]
    if backend not in compiled:
        raise UsageError(
            f"rebuild compiles an engine again, and the back end is {backend}. Name the engine's: {' or '.join(compiled)}."
        )
    where = device_from_text("cuda" if device == "auto" else device)
    bundle, kinds = Bundle.open(path), BACKENDS[backend].devices
    if where.partition(":")[0] not in kinds or precision not in ("auto", *PRECISIONS):
        return  # loading refuses that
    held = dict.fromkeys(str(entry["precision"]) for entry in engines_of(bundle, backend).values())
    for one in held if precision == "auto" else [precision]:
        try:
            fitting_engines(bundle, backend, one, where)
        except EngineError:
            if backend == "tensorrt" and gpu_of(where, backend) != gpu_of("cuda:0", backend):
                raise  # it compiles for the first GPU only; the error says how it is made to be that one
            last = next(iter(engines_of(bundle, backend, one).values()))
            build_engine(path, gpus=(gpu_of(where, backend),), **rebuild_options(last))
