"""Compile a bundle into TensorRT engines."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from swin_deploy.option_parsers import BundlePath, bundle_keywords
from swin_deploy.options import EngineSpec, RefitSpec

if TYPE_CHECKING:
    from swin_deploy.bundle import Bundle
    from swin_deploy.exporters.engines.build import Built
    from swin_deploy.exporters.typed_graphs import Calibration


@bundle_keywords(EngineSpec, optional=True)
def build_engine(bundle: BundlePath | None, spec: EngineSpec) -> tuple[Built, ...]:
    """Compile the graphs of a bundle into TensorRT engines and add them to the bundle.

    Args:
        bundle: Folder of the bundle. Default: the newest bundle in the current directory.
        {options}

    Returns:
        One entry for each engine, with its file and what the compiler reported.

    Raises:
        EngineError: The compiler refused the graph, or cannot compile for a GPU.
        UsageError: An option is invalid, or the back end or the bundle does not support it.
        MissingDependencyError: No TensorRT compiler is installed.

    Example:
        >>> swin_deploy.build_engine("swinv2-tiny", precision="fp16", gpus=["sm_87"], batches=[1, "1:8:32"])
    """
    from swin_deploy.bundle import Bundle, newest_bundle
    from swin_deploy.exporters.engines.build import build_engines
    from swin_deploy.runtimes.backends import runtime_to_check

    found = newest_bundle(Path()) if bundle is None else Bundle.open(bundle)
    calibration = None if spec.data is None else _calibration(found, spec)
    return build_engines(found, spec, runtime_to_check, calibration, _median_milliseconds)[1]


def _median_milliseconds(bundle: Bundle, file: str, batch: int) -> float:
    """Time an engine on the first GPU, in a process of its own like `bench`."""
    from statistics import median

    from swin_deploy.bench.worker import Child
    from swin_deploy.files import scratch_folder

    with scratch_folder("bench") as folder:
        request = {"bundle": str(bundle.path), "engine": file, "device": "cuda:0", "batch": batch}
        with Child({**request, "answer": str(folder / "outputs.npz")}) as child:
            child.milliseconds(0.3)  # the clocks of the GPU rise
            return median(child.milliseconds(1.5))


def _calibration(bundle: Bundle, spec: EngineSpec) -> Calibration:
    from swin_deploy.calib.collect import amax_of_values
    from swin_deploy.calib.data import preparation_and_inputs, samples_for
    from swin_deploy.exporters.typed_graphs import Calibration

    chosen = samples_for(bundle, spec.data, spec.samples)

    def amax(file: str, model: Any) -> dict[str, float]:
        of_file = chosen.with_size(*preparation_and_inputs(bundle, file))
        return amax_of_values(model, of_file, progress=spec.progress)

    return Calibration(len(chosen), chosen.fingerprint, amax)


@bundle_keywords(RefitSpec)
def refit(bundle: BundlePath, spec: RefitSpec) -> tuple[Built, ...]:
    """Put the weights back into the engines of a bundle that were built with `strip_weights`.

    The weights come from the graphs of the bundle. The complete engines are added to the bundle as further files.

    Args:
        bundle: Folder of the bundle.
        {options}

    Returns:
        One entry for each refitted engine.

    Raises:
        EngineError: The GPU or the TensorRT release differs from that of the build.
        UsageError: No engine of the bundle was built with `strip_weights`.
    """
    from swin_deploy.bundle import Bundle
    from swin_deploy.exporters.engines.refit_engine import refit_engines

    return refit_engines(Bundle.open(bundle, spec.trust))
