"""A bundle -> engines, and what graphs and engines cost."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swin_deploy.arguments import checked
from swin_deploy.specs import Say, silent

if TYPE_CHECKING:
    from swin_deploy.bundle import Bundle
    from swin_deploy.exporters.engines.build import Built
    from swin_deploy.exporters.inspection.costs import Inspection
    from swin_deploy.exporters.typed_graphs import Calibration


@checked
def build_engine(
    bundle: str | os.PathLike[str] | None = None,
    *,
    precision: str = "fp16",
    data: str | os.PathLike[str] | Iterable[Any] | None = None,
    samples: int | None = None,
    backend: str = "auto",
    gpus: Sequence[str] = (),
    batches: Sequence[tuple[int, int, int]] = ((1, 1, 1),),
    workspace: int | None = None,
    optimization_level: int | None = None,
    timing_cache: str | os.PathLike[str] | None = None,
    version_compatible: bool = False,
    hardware_compatible: bool = False,
    strip_weights: bool = False,
    force: bool = False,
    say: Say = silent,
    log: Callable[[str, str], None] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> tuple[Built, ...]:
    """The TensorRT engines compiled from a bundle, which are also written into it.

    `bundle` None is the newest one in the current directory. `data` (see `evaluate`; of it `samples`) are images on which
    the ranges of an fp16 graph's values are measured; what comes near the largest number of fp16 stays fp32. `backend`
    "auto" is TensorRT where it and a GPU are, else TensorRT for RTX, which compiles for `gpus` ("sm_89", ...) without one.
    `batches` are (smallest, tuned for, largest), one optimisation profile each; `workspace` is in bytes; an engine of
    `strip_weights` runs after `refit`. An option that the back end lacks is an errors.UsageError, and an engine that is
    there already, of the same graph, options, compiler and GPU, is not compiled again unless with `force`. `log(severity,
    message)` gets the compiler's own messages, `progress(phase, step, steps)` follows it. Raises errors.EngineError when it
    refuses.
    """
    from swin_deploy.bundle import Bundle, newest_bundle
    from swin_deploy.errors import UsageError
    from swin_deploy.exporters.engines.build import build_engines
    from swin_deploy.exporters.engines.engine_spec import EngineSpec
    from swin_deploy.runtimes.backends import runtime_to_check

    def spec_for(backend: str, gpu: str) -> EngineSpec:
        return EngineSpec(
            backend,
            gpu,
            tuple(batches),
            workspace=workspace,
            optimization_level=optimization_level,
            timing_cache=None if timing_cache is None else Path(timing_cache),
            version_compatible=version_compatible,
            hardware_compatible=hardware_compatible,
            strip_weights=strip_weights,
        )

    found = newest_bundle(Path.cwd()) if bundle is None else Bundle.open(bundle)
    if data is not None and precision != "fp16":
        raise UsageError(f"{precision} has the range of fp32, and no values need to be measured for it. Leave the data out.")
    if samples is not None and data is None:
        raise UsageError("A number of samples is given and no data to take them from. Name images with --data.")
    _, built = build_engines(
        found,
        precision,
        backend=backend,
        gpus=gpus,
        spec_for=spec_for,
        force=force,
        open_graph=runtime_to_check,
        say=say,
        log=log or (lambda severity, message: None),
        progress=progress,
        calibration=None if data is None else _calibration(found, data, samples, progress),
    )
    return built


def _calibration(
    bundle: Bundle,
    data: str | os.PathLike[str] | Iterable[Any],
    samples: int | None,
    progress: Callable[[str, int, int], None] | None,
) -> Calibration:
    from swin_deploy.calib.collect import largest_values
    from swin_deploy.calib.data import preparation, samples_for
    from swin_deploy.exporters.typed_graphs import Calibration

    chosen = samples_for(bundle, data, samples)
    tell = progress or (lambda phase, done, total: None)

    def largest(file: str, model: Any) -> dict[str, float]:
        of_file = chosen.with_size(*preparation(bundle, file))
        return largest_values(model, of_file, progress=lambda done, total: tell("Measuring ranges", done, total))

    return Calibration(len(chosen), chosen.fingerprint, largest)


@checked
def refit(
    bundle: str | os.PathLike[str], *, say: Say = silent, log: Callable[[str, str], None] | None = None
) -> tuple[Built, ...]:
    """The engines of a bundle that were compiled without their weights, with the weights of their graphs put back.

    They are written into the bundle as further engines. Needs the GPU and the release of the compiler that they were compiled
    with. Raises errors.EngineError where these are others, errors.UsageError where no engine lacks its weights.
    """
    from swin_deploy.bundle import Bundle
    from swin_deploy.exporters.engines.refit_engine import refit_engines

    return refit_engines(Bundle.open(bundle), say, log or (lambda severity, message: None))


@checked
def inspect(
    path: str | os.PathLike[str],
    *,
    gpu: str | None = None,
    batch: int = 1,
    backend: str = "auto",
    log: Callable[[str, str], None] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Inspection:
    """What the graphs and engines of a bundle hold, compute and move, or what any ONNX file would.

    `path` is a bundle's folder, whose engines are described without compiling anything, or an ONNX file, which is compiled by
    `backend` for `batch` images and not kept. `gpu` ("rtx-4090", "sm_89", ...) is the GPU whose published peaks give the
    roofline, and what a file is compiled for. Raises errors.UsageError for a file that is no graph.
    """
    from swin_deploy.exporters.inspection.costs import inspect_path

    return inspect_path(Path(path), gpu, batch, backend, log or (lambda severity, message: None), progress)
