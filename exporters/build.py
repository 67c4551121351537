"""A bundle -> the same bundle with engines: the typed graph is written and checked once, then compiled for each GPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swin_deploy.bundle import CONFIG, Bundle
from swin_deploy.config import SwinConfig
from swin_deploy.errors import MissingDependencyError, UsageError, VerificationError
from swin_deploy.reference import OpenGraph, Reference, Verdict, check_graph
from swin_deploy.requires import require
from swin_deploy.specs import PRECISIONS, graph_file

from .engine_from_onnx import BACKENDS, EngineSpec, Log, Progress, engine_from_onnx, resolve_backend
from .gpu import cuda_devices, target_gpu
from .onnx_from_torch import OPSET
from .precision import fp16_from_fp32

Say = Callable[[str], None]

# What TensorRT for RTX compiles for where there is no GPU to ask: Ampere, Ada and Blackwell.
DEFAULT_GPUS = ("sm_86", "sm_89", "sm_120")


@dataclass(frozen=True)
class Built:
    """One engine in a bundle. `reused` when it was there already, compiled from this graph for this target."""

    file: str
    entry: Mapping[str, Any]
    reused: bool


def build_engines(
    bundle: Bundle,
    precision: str,
    *,
    backend: str,
    gpus: Sequence[str],
    batch: tuple[int, int, int],
    force: bool,
    open_graph: OpenGraph,
    say: Say,
    log: Log,
    progress: Progress | None = None,
) -> tuple[Bundle, tuple[Built, ...]]:
    """The bundle with an engine for each of `gpus` in it (none given: this machine's GPU, else DEFAULT_GPUS).

    Every target is checked before the first is compiled. Raises EngineError when the compiler refuses, UsageError for a
    target or precision that it cannot build, VerificationError when the typed graph is not good enough.
    """
    if precision not in PRECISIONS:
        raise UsageError(f'There is no precision "{precision}". There are: {", ".join(PRECISIONS)}.')
    chosen = resolve_backend(backend)
    if not gpus:
        gpus = ("current",) if cuda_devices() or chosen == "tensorrt" else DEFAULT_GPUS
    specs = [EngineSpec(chosen, gpu, batch) for gpu in dict.fromkeys(target_gpu(chosen, gpu) for gpu in gpus)]
    bundle = with_typed_graph(bundle, precision, open_graph, say)
    graph = graph_file(precision)
    path = bundle.verified_path(graph)
    parent = bundle.files[graph]["sha256"]
    built = []
    for spec in specs:
        file = _engine_file(spec, precision)
        known = bundle.files.get(file)
        wanted = {"parent": parent, "batch": list(spec.batch)}
        there = (bundle.path / file).exists()  # one that was deleted is compiled again
        if known is not None and there and not force and wanted.items() <= known.items():
            bundle.verified_path(file)
            say(f"{file} is there already, compiled from this graph")
            built.append(Built(file, known, reused=True))
            continue
        say(f"Compiling {precision} for {spec.gpu} with {BACKENDS[chosen][1]}")
        engine = engine_from_onnx(path, spec, log, progress)
        entry = {
            "precision": precision,
            "backend": engine.backend,
            "backend_version": engine.backend_version,
            "gpu": engine.gpu,
            **wanted,
            "seconds": round(engine.seconds, 2),
            "report": engine.report.to_dict(layers=False),
            "agreement": "not verified",  # an engine can only be run on its own GPU
        }
        bundle = bundle.with_file(file, entry, lambda target, plan=engine.plan: target.write_bytes(plan))  # type: ignore[misc]
        built.append(Built(file, bundle.files[file], reused=False))
    return bundle, tuple(built)


def with_typed_graph(bundle: Bundle, precision: str, open_graph: OpenGraph, say: Say) -> Bundle:
    """The bundle with the ONNX graph of `precision` in it, written from the fp32 graph and compared with PyTorch."""
    source, file = graph_file("fp32"), graph_file(precision)
    parent = bundle.files[source]["sha256"]
    known = bundle.files.get(file)
    there = (bundle.path / file).exists()  # one that was deleted is written again
    if precision == "fp32" or (known is not None and there and known["parent"] == parent):
        return bundle
    onnx = require("onnx", f"write the {precision} graph")
    say(f"Writing {file}")
    config = SwinConfig.from_dict(bundle.read_json(CONFIG))
    model, records = fp16_from_fp32(onnx.load(str(bundle.verified_path(source))), config)
    reference = Reference.load(bundle)
    entry: dict[str, Any] = {
        "precision": precision,
        "opset": OPSET,
        "parent": parent,
        "passes": [{"name": record.name, "count": record.count} for record in records],
    }

    def write(path: Path) -> None:
        path.write_bytes(model.SerializeToString())
        onnx.checker.check_model(str(path), full_check=True)
        verdict = _verdict(reference, open_graph, path, file, precision)
        entry["agreement"] = verdict.to_dict() if verdict else "not verified"

    return bundle.with_file(file, entry, write)


def _verdict(reference: Reference, open_graph: OpenGraph, path: Path, file: str, precision: str) -> Verdict | None:
    try:
        verdict = check_graph(reference, open_graph, path, file, precision)
    except MissingDependencyError:
        return None
    if not verdict.verified:
        problem = (
            f"relative L2 {verdict.agreement.relative_l2:.2e}, and {verdict.tolerance:.0e} is allowed"
            if verdict.agreement.finite
            else "its outputs hold NaN or infinity"
        )
        raise VerificationError(
            f"The {precision} graph is too far from PyTorch: {problem}. It was not kept; build with --fp32 instead."
        )
    return verdict


def _engine_file(spec: EngineSpec, precision: str) -> str:
    # Asked of the module: TensorRT is also installed under other names than its own (tensorrt-cu12, a system package).
    release = require(BACKENDS[spec.backend][0], "compile engines").__version__
    sizes = "" if spec.batch == (1, 1, 1) else "-b" + "_".join(str(size) for size in dict.fromkeys(spec.batch))
    return f"engines/{precision}{sizes}-{spec.gpu}-{spec.backend}-{release}.engine"
