"""Load a bundle as a model that is ready to run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from swin_deploy.option_parsers import BundlePath, bundle_keywords
from swin_deploy.options import PRECISIONS, LoadSpec, device_from_text

if TYPE_CHECKING:
    from swin_deploy.runtimes.model import Model


@bundle_keywords(LoadSpec)
def load(bundle: BundlePath, spec: LoadSpec) -> Model:
    """Load a bundle. Use the model as a context manager, or call its `close()`.

    An option that is named is used, or an error is raised. If "auto" leaves a choice, the candidates that agree with PyTorch
    are measured, once for this bundle on this machine, and the fastest is used. Pass `precision="fp32"` for the most exact
    results. `model.describe()` reports what was selected and why.

    `rebuild` may take minutes and changes the bundle. Full TensorRT rebuilds for the first GPU only.

    Args:
        bundle: Folder of the bundle.
        {options}

    Returns:
        The model.

    Raises:
        BundleError: The folder is not a bundle, or a file in it is damaged.
        MissingDependencyError: The back end is not installed.
        UsageError: The bundle does not have what was named, or the back end does not support it.
        EngineError: An engine does not fit this machine. The message has the command that builds it again.
        BackendError: The back end failed to load the model.

    Example:
        >>> with swin_deploy.load("swinv2-tiny") as model:
        ...     print(model.classify("photo.jpg")[0])
    """
    from swin_deploy.runtimes.model_from_bundle import model_from_bundle

    if spec.rebuild:
        _rebuild(bundle, spec)
    return model_from_bundle(bundle, spec)


def _rebuild(path: BundlePath, spec: LoadSpec) -> None:
    """Compile the engines again that would be loaded, if one of them does not fit."""
    from swin_deploy.api.build_engine import build_engine
    from swin_deploy.bundle import Bundle
    from swin_deploy.errors import EngineError
    from swin_deploy.runtimes.backends import BACKENDS
    from swin_deploy.runtimes.gpu.engine_fit import engines_of, fitting_engines, gpu_of, rebuild_options

    backend, where = spec.backend, device_from_text("cuda" if spec.device == "auto" else spec.device)
    bundle = Bundle.open(path, spec.trust)
    if where.partition(":")[0] not in BACKENDS[backend].devices:
        return  # loading refuses that
    held = dict.fromkeys(entry.precision for entry in engines_of(bundle, backend).values())
    for precision in held if spec.precision not in PRECISIONS else [spec.precision]:
        try:
            fitting_engines(bundle, backend, precision, where)
        except EngineError:
            if backend == "tensorrt" and gpu_of(where, backend) != gpu_of("cuda:0", backend):
                raise  # it compiles for the first GPU only; the error tells how to make this one the first
            last = next(iter(engines_of(bundle, backend, precision).values()))
            build_engine(path, gpus=(gpu_of(where, backend),), **rebuild_options(last))
