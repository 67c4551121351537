"""A bundle -> the same bundle with engines: the typed graph is written and checked once, then compiled for each GPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swin_deploy.bundle import CONFIG, Bundle
from swin_deploy.config import SwinConfig
from swin_deploy.errors import MissingDependencyError, UsageError, VerificationError
from swin_deploy.reference import OpenGraph, Reference, check_graph
from swin_deploy.requires import require
from swin_deploy.specs import PRECISIONS, TARGETS, Size, graph_file, size_text, weights_file
from swin_deploy.tasks import TaskSpec

from .engine_from_onnx import BACKENDS, EngineSpec, Log, Progress, engine_from_onnx, resolve_backend
from .gpu import cuda_devices, target_gpu
from .precision import fp16_from_fp32
from .weights import WeightFile

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
    if (target := bundle.manifest.get("target", TARGETS[0])) != TARGETS[0]:
        raise UsageError(
            f"The bundle {bundle.path} was exported for {target}, and TensorRT needs another form of the graph. "
            f'Export it again with "--target {TARGETS[0]}".'
        )
    chosen = resolve_backend(backend)
    if not gpus:
        gpus = ("current",) if cuda_devices() or chosen == "tensorrt" else DEFAULT_GPUS
    specs = [EngineSpec(chosen, gpu, batch) for gpu in dict.fromkeys(target_gpu(chosen, gpu) for gpu in gpus)]
    bundle = with_typed_graphs(bundle, precision, open_graph, say)
    graphs = [file for file, entry in bundle.graphs.items() if entry["precision"] == precision]
    built = []
    for number, graph in enumerate(graphs):
        path, entry = bundle.verified_path(graph), bundle.files[graph]
        for spec in specs:
            file = _engine_file(spec, precision, None if number == 0 else (entry["image_size"][0], entry["image_size"][1]))
            known = bundle.files.get(file)
            wanted = {"graph": graph, "parent": entry["sha256"], "batch": list(spec.batch)}
            if not force and known is not None and wanted.items() <= known.items() and (bundle.path / file).exists():
                bundle.verified_path(file)
                say(f"{file} is there already, compiled from this graph")
                built.append(Built(file, known, reused=True))
                continue
            say(f"Compiling {graph} for {spec.gpu} with {BACKENDS[chosen][1]}")
            engine = engine_from_onnx(path, spec, log, progress)
            facts = {
                "precision": precision,
                "image_size": entry["image_size"],
                "backend": engine.backend,
                "backend_version": engine.backend_version,
                "gpu": engine.gpu,
                **wanted,
                "seconds": round(engine.seconds, 2),
                "report": engine.report.to_dict(layers=False),
                "agreement": "not verified",  # an engine can only be run on its own GPU
            }
            bundle = bundle.with_file(file, facts, _bytes_writer(engine.plan))
            built.append(Built(file, bundle.files[file], reused=False))
    return bundle, tuple(built)


def with_typed_graphs(bundle: Bundle, precision: str, open_graph: OpenGraph, say: Say) -> Bundle:
    """The bundle with the ONNX graphs of `precision` in it, written from the fp32 graphs and compared with PyTorch."""
    sources = [file for file, entry in bundle.graphs.items() if entry["precision"] == "fp32"]
    pairs = [(source, graph_file(precision, _further(bundle, source, number))) for number, source in enumerate(sources)]
    missing = [(source, file) for source, file in pairs if not _known(bundle, file, bundle.files[source]["sha256"])]
    if precision == "fp32" or not missing:
        return bundle
    shared = weights_file(precision) if bundle.files[sources[0]].get("weights") else None
    if shared is not None:
        missing = pairs  # graphs that share a file of weights are only written together
    onnx = require("onnx", f"write the {precision} graph")
    config = SwinConfig.from_dict(bundle.read_json(CONFIG))
    task = TaskSpec.from_dict(bundle.manifest["task"])
    made = []
    for source, file in missing:
        say(f"Writing {file}")
        made.append(fp16_from_fp32(onnx.load(str(bundle.verified_path(source))), config, task))
    if shared is not None:

        def write_weights(path: Path) -> None:
            weights = WeightFile(path, Path(shared).name)
            for model, _ in made:
                weights.take(model)

        bundle = bundle.with_file(shared, {}, write_weights)
    for (source, file), (model, records) in zip(missing, made, strict=True):
        origin = bundle.files[source]
        entry: dict[str, Any] = {
            **{key: origin[key] for key in ("image_size", "inputs", "outputs", "reference", "opset")},
            "precision": precision,
            "parent": origin["sha256"],
            "passes": [{"name": record.name, "count": record.count} for record in records],
            **({"weights": shared} if shared else {}),
        }
        bundle = bundle.with_file(file, entry, _graph_writer(bundle, model, entry, file, open_graph))
    return bundle


def _graph_writer(
    bundle: Bundle, model: Any, entry: dict[str, Any], file: str, open_graph: OpenGraph
) -> Callable[[Path], None]:
    """A function that writes the graph, checks it, compares it with PyTorch, and puts the verdict into `entry`."""

    def write(path: Path) -> None:
        import onnx

        path.write_bytes(model.SerializeToString())
        onnx.checker.check_model(str(path), full_check=True)
        reference = Reference.load(bundle, entry["reference"])
        try:
            verdict = check_graph(reference, open_graph, path, file, entry["precision"])
        except MissingDependencyError:
            entry["agreement"] = "not verified"
            return
        if not verdict.verified:
            raise VerificationError(
                f"The {entry['precision']} graph is too far from PyTorch: {verdict.complaint()}. It was not kept; build with "
                f"--fp32 instead."
            )
        entry["agreement"] = verdict.to_dict()

    return write


def _bytes_writer(data: bytes) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_bytes(data)

    return write


def _further(bundle: Bundle, source: str, number: int) -> Size | None:
    height, width = bundle.files[source]["image_size"]
    return None if number == 0 else (height, width)


def _known(bundle: Bundle, file: str, parent: str) -> bool:
    """Whether `file` is in the bundle, and was made from the graph whose sha256 is `parent`; a deleted one is made again."""
    known = bundle.files.get(file)
    if known is None or known["parent"] != parent:
        return False
    return all((bundle.path / name).exists() for name in (file, known.get("weights")) if name)


def _engine_file(spec: EngineSpec, precision: str, further: Size | None) -> str:
    # Asked of the module: TensorRT is also installed under other names than its own (tensorrt-cu12, a system package).
    release = require(BACKENDS[spec.backend][0], "compile engines").__version__
    size = f"-{size_text(further)}" if further else ""
    batch = "" if spec.batch == (1, 1, 1) else "-b" + "_".join(str(n) for n in dict.fromkeys(spec.batch))
    return f"engines/{precision}{size}{batch}-{spec.gpu}-{spec.backend}-{release}.engine"
