"""A bundle -> the same bundle with engines: the typed graph is written and checked once, then compiled for each GPU."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from swin_deploy.bundle import CONFIG, Bundle
from swin_deploy.config import SwinConfig
from swin_deploy.errors import MissingDependencyError, UsageError, VerificationError
from swin_deploy.reference import OpenGraph, Reference, check_graph
from swin_deploy.requires import require
from swin_deploy.specs import PRECISIONS, TARGETS, Size, graph_file, size_text, weights_file
from swin_deploy.tasks import TaskSpec

from .engine_from_onnx import Engine, Log, Progress, engine_from_onnx, resolve_backend
from .engine_spec import BACKENDS, EngineSpec, fingerprint
from .gpu import cuda_devices, target_gpu
from .precision import typed_from_fp32
from .roofline import capability_of
from .weights import WeightFile

Say = Callable[[str], None]

# What TensorRT for RTX compiles for where there is no GPU to ask: Ampere, Ada and Blackwell.
DEFAULT_GPUS = ("sm_86", "sm_89", "sm_120")


@dataclass(frozen=True)
class Calibration:
    """Samples on which the ranges of a graph's values are measured: how many, what they are, and the measuring.

    `largest(file, model)` gives the largest absolute value of each value of a fp32 form of the bundle's graph `file`.
    """

    samples: int
    fingerprint: str
    largest: Callable[[str, Any], Mapping[str, float]]


@dataclass(frozen=True)
class Built:
    """One engine in a bundle. `reused` when it was there already, of this graph, spec, compiler and target."""

    file: str
    entry: Mapping[str, Any]
    reused: bool


def build_engines(
    bundle: Bundle,
    precision: str,
    *,
    backend: str,
    gpus: Sequence[str],
    spec_for: Callable[[str, str], EngineSpec],
    force: bool,
    open_graph: OpenGraph,
    say: Say,
    log: Log,
    progress: Progress | None = None,
    calibration: Calibration | None = None,
) -> tuple[Bundle, tuple[Built, ...]]:
    """The bundle with an engine for each of `gpus` in it (none given: this machine's GPU, else DEFAULT_GPUS).

    `spec_for(backend, gpu)` is called for every target before the first is compiled. One process at a time compiles into a
    bundle; another waits, and takes what it then finds. Raises EngineError when the compiler refuses, UsageError for a
    target, option or precision that it cannot build, VerificationError when the typed graph is not good enough.
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
    specs = [spec_for(chosen, gpu) for gpu in dict.fromkeys(target_gpu(chosen, capability_of(gpu)) for gpu in gpus)]
    # Asked of the module: TensorRT is also installed under other names than its own (tensorrt-cu12, a system package).
    release = str(require(BACKENDS[chosen][0], "compile engines").__version__)
    built = []
    with bundle.compiling(lambda: say(f"Waiting for another process that compiles into {bundle.path}")) as bundle:
        bundle = with_typed_graphs(bundle, precision, open_graph, say, calibration)
        graphs = [file for file, entry in bundle.graphs.items() if entry["precision"] == precision]
        for number, graph in enumerate(graphs):
            path, entry = bundle.verified_path(graph), bundle.files[graph]
            for spec in specs:
                file = _engine_file(spec, precision, _further(bundle, graph, number), release)
                wanted: dict[str, Any] = {
                    "graph": graph,
                    "parent": entry["sha256"],
                    "backend": spec.backend,
                    "backend_version": release,
                    "gpu": spec.gpu,
                    "options": spec.options,
                }
                wanted["fingerprint"] = fingerprint({**wanted, "profiles": spec.profiles})
                known = bundle.files.get(file)
                if known is not None and not force and _is_there(bundle, file, wanted["fingerprint"]):
                    bundle.verified_path(file)
                    say(f"{file} is there already, compiled from this graph")
                    built.append(Built(file, known, reused=True))
                    continue
                say(f"Compiling {graph} for {spec.gpu} with {BACKENDS[chosen][1]}")
                engine = engine_from_onnx(path, spec, log, progress)
                bundle = _with_engine(
                    bundle, file, engine, spec, {"precision": precision, "image_size": entry["image_size"], **wanted}
                )
                built.append(Built(file, bundle.files[file], reused=False))
    return bundle, tuple(built)


def layers_file(engine: str) -> str:
    """Where a bundle keeps the layers of an engine, as the compiler described them."""
    return engine.removesuffix(".engine") + ".layers.json"


def _is_there(bundle: Bundle, file: str, wanted: str) -> bool:
    """Whether `file` is in the bundle and is the engine that is wanted, with its layers; what was deleted is made again."""
    known, layers = bundle.files[file], bundle.files.get(layers_file(file), {})
    whole = known.get("fingerprint") == wanted and layers.get("parent") == known["sha256"]
    return whole and all((bundle.path / name).exists() for name in (file, layers_file(file)))


def _with_engine(bundle: Bundle, file: str, engine: Engine, spec: EngineSpec, facts: Mapping[str, Any]) -> Bundle:
    """The bundle with the engine in it, and with its layers in a file beside it."""
    described = [
        {"batch": list(batch), **report.to_dict()} for batch, report in zip(spec.profiles, engine.reports, strict=True)
    ]
    entry = {
        **facts,
        "profiles": [{name: value for name, value in profile.items() if name != "layers"} for profile in described],
        "seconds": round(engine.seconds, 2),
        "agreement": "not verified",  # an engine can only be run on its own GPU
    }
    bundle = bundle.with_file(file, entry, bytes_writer(engine.plan))
    text = json.dumps({"profiles": described}) + "\n"
    return bundle.with_file(layers_file(file), {"parent": bundle.files[file]["sha256"]}, bytes_writer(text.encode()))


def with_typed_graphs(
    bundle: Bundle, precision: str, open_graph: OpenGraph, say: Say, calibration: Calibration | None = None
) -> Bundle:
    """The bundle with the ONNX graphs of `precision` in it, written from the fp32 graphs and compared with PyTorch.

    Those that are there already stay, unless `calibration` asks for the ranges of other samples.
    """
    ranges = None if calibration is None else {"samples": calibration.samples, "data": calibration.fingerprint}
    sources = [file for file, entry in bundle.graphs.items() if entry["precision"] == "fp32"]
    pairs = [(source, graph_file(precision, _further(bundle, source, number))) for number, source in enumerate(sources)]
    missing = [(source, file) for source, file in pairs if not _known(bundle, file, bundle.files[source]["sha256"], ranges)]
    if precision == "fp32" or not missing:
        return bundle
    shared = weights_file(precision) if bundle.files[sources[0]].get("weights") else None
    if shared is not None:
        missing = pairs  # graphs that share a file of weights are only written together
    require("onnx", f"write the {precision} graph")
    config = SwinConfig.from_dict(bundle.read_json(CONFIG))
    task = TaskSpec.from_dict(bundle.manifest["task"])
    made = []
    for source, file in missing:
        say(f"Writing {file}")
        measure = None if calibration is None else partial(calibration.largest, source)
        made.append(typed_from_fp32(_with_shapes(bundle.verified_path(source)), config, task, precision, measure))
    if shared is not None:

        def write_weights(path: Path) -> None:
            weights = WeightFile(path, Path(shared).name)
            for graph in made:
                weights.take(graph.model)

        bundle = bundle.with_file(shared, {}, write_weights)
    for (source, file), graph in zip(missing, made, strict=True):
        origin = bundle.files[source]
        entry: dict[str, Any] = {
            **{key: origin[key] for key in ("image_size", "inputs", "outputs", "reference")},
            "opset": next(domain.version for domain in graph.model.opset_import if not domain.domain),
            "precision": precision,
            "parent": origin["sha256"],
            "passes": [asdict(record) for record in graph.records],
            "islands": [asdict(island) for island in graph.islands],
            **({"ranges": ranges} if ranges else {}),
            **({"weights": shared} if shared else {}),
        }
        bundle = bundle.with_file(file, entry, _graph_writer(bundle, graph.model, entry, file, open_graph))
    return bundle


def _with_shapes(path: Path) -> Any:
    """The graph at `path`, with the types and shapes of all values, which the rewrites go by and the file does without."""
    import onnx

    bare = onnx.load(str(path), load_external_data=False)  # large weights would not fit into the message that is inferred
    model = onnx.shape_inference.infer_shapes(bare, strict_mode=True)
    onnx.load_external_data_for_model(model, str(path.parent))
    return model


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
                f"The {entry['precision']} graph is too far from PyTorch: {verdict.complaint()}. It was not kept; name images "
                f"with --data, by which to see what must stay fp32, or build with --fp32 instead."
            )
        entry["agreement"] = verdict.to_dict()

    return write


def bytes_writer(data: bytes) -> Callable[[Path], None]:
    """A function that writes `data` to the path it is given."""

    def write(path: Path) -> None:
        path.write_bytes(data)

    return write


def _further(bundle: Bundle, source: str, number: int) -> Size | None:
    height, width = bundle.files[source]["image_size"]
    return None if number == 0 else (height, width)


def _known(bundle: Bundle, file: str, parent: str, ranges: Mapping[str, Any] | None) -> bool:
    """Whether `file` is in the bundle, made from the graph whose sha256 is `parent`; a deleted one is made again.

    With `ranges`, also whether these are what it was made with.
    """
    known = bundle.files.get(file)
    if known is None or known["parent"] != parent or (ranges is not None and known.get("ranges") != ranges):
        return False
    return all((bundle.path / name).exists() for name in (file, known.get("weights")) if name)


def _engine_file(spec: EngineSpec, precision: str, further: Size | None, release: str) -> str:
    parts = [precision, size_text(further) if further else "", spec.words, spec.gpu, spec.backend, release]
    return f"engines/{'-'.join(part for part in parts if part)}.engine"
