"""A bundle -> the same bundle with graphs of another precision, made from its fp32 graphs and compared with PyTorch."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from swin_deploy.bundle import CONFIG, Bundle, disk_errors
from swin_deploy.config import SwinConfig
from swin_deploy.dependencies import require
from swin_deploy.errors import MissingDependencyError, VerificationError
from swin_deploy.files import scratch_beside
from swin_deploy.parity import OpenGraph, Reference, check_graph
from swin_deploy.specs import QUANTIZED, Size, graph_file, weights_file
from swin_deploy.tasks import TaskSpec

from .external_data import WeightFile
from .passes import PassRecord
from .precision import typed_from_fp32

Say = Callable[[str], None]
WITH_DATA = "name images with --data, by which to see what must stay fp32, or build with --fp32 instead."
OTHER_IMAGES = "name more images, or images like those of the application, with --data, or build with --fp16 instead."


@dataclass(frozen=True)
class Calibration:
    """Samples on which the ranges of a graph's values are measured: how many, what they are, and the measuring.

    `largest(file, model)` gives the largest absolute value of each value of a fp32 form of the bundle's graph `file`.
    """

    samples: int
    fingerprint: str
    largest: Callable[[str, Any], Mapping[str, float]]


@dataclass(frozen=True)
class NewGraph:
    """A graph that was made of a fp32 graph, how, and what else its entry in the manifest is to say."""

    model: Any
    records: tuple[PassRecord, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)


Make = Callable[[str, Any], NewGraph]  # of the name of a fp32 graph in the bundle, and the graph with its weights and shapes


def with_typed_graphs(
    bundle: Bundle, precision: str, open_graph: OpenGraph, say: Say, calibration: Calibration | None = None
) -> Bundle:
    """The bundle with the graphs of "fp16" or "bf16" in it; those of "fp32" are there already.

    Graphs that are there stay, unless `calibration` asks for the ranges of other samples.
    """
    if precision == "fp32":
        return bundle
    config, task = config_and_task(bundle)
    asked = {} if calibration is None else {"ranges": {"samples": calibration.samples, "data": calibration.fingerprint}}

    def make(source: str, model: Any) -> NewGraph:
        measure = None if calibration is None else partial(calibration.largest, source)
        typed = typed_from_fp32(model, config, task, precision, measure)
        return NewGraph(typed.model, typed.records, {"islands": [asdict(island) for island in typed.islands]})

    return with_graphs(bundle, precision, make, asked, open_graph, say)


def config_and_task(bundle: Bundle) -> tuple[SwinConfig, TaskSpec]:
    """What the bundle's network is."""
    return SwinConfig.from_dict(bundle.read_json(CONFIG)), TaskSpec.from_dict(bundle.manifest["task"])


def with_graphs(
    bundle: Bundle, precision: str, make: Make, asked: Mapping[str, Any], open_graph: OpenGraph, say: Say
) -> Bundle:
    """The bundle with the graph that `make` makes of each fp32 graph, unless one of the same graph and `asked` is there.

    `asked` goes into each entry. Raises VerificationError for a graph that is too far from PyTorch; none is kept then.
    """
    sources = [file for file, entry in bundle.graphs.items() if entry["precision"] == "fp32"]
    pairs = [(source, graph_file(precision, further_size(bundle, source, number))) for number, source in enumerate(sources)]
    missing = [(source, file) for source, file in pairs if not _known(bundle, file, bundle.files[source]["sha256"], asked)]
    if not missing:
        return bundle
    shared = weights_file(precision) if bundle.files[sources[0]].get("weights") else None
    if shared is not None:
        missing = pairs  # graphs that share a file of weights are only written together
    bundle.refuse_read_only()
    require("onnx", f"write the {precision} graph")
    made = []
    for source, file in missing:
        say(f"Writing {file}")
        made.append(make(source, _with_shapes(bundle.verified_path(source))))
    with _scratch_folder(bundle.path / missing[0][1]) as folder:
        entries: dict[str, dict[str, Any]] = {}
        if shared is not None:
            with disk_errors(bundle.path / shared):
                weights = WeightFile(folder / Path(shared).name, Path(shared).name)
                for graph in made:
                    weights.take(graph.model)
        for (source, file), graph in zip(missing, made, strict=True):
            origin = bundle.files[source]
            entry: dict[str, Any] = {
                **{key: origin.get(key) for key in ("image_size", "inputs", "outputs", "preprocessing", "reference")},
                "opset": next(domain.version for domain in graph.model.opset_import if not domain.domain),
                "precision": precision,
                "parent": origin["sha256"],
                "passes": [asdict(record) for record in graph.records],
                **graph.facts,
                **asked,
                **({"weights": shared} if shared else {}),
            }
            with disk_errors(bundle.path / file):
                _write_checked(bundle, graph.model, entry, folder / Path(file).name, file, open_graph)
            entries[file] = entry
        # All are good: now they may replace what is there.
        for file, entry in ({shared: {}, **entries} if shared else entries).items():
            bundle = bundle.with_file(file, entry, _mover(folder / Path(file).name))
    return bundle


def further_size(bundle: Bundle, source: str, number: int) -> Size | None:
    """The image size of graph number `number`, which names its files; None for the first."""
    height, width = bundle.files[source]["image_size"]
    return None if number == 0 else (height, width)


def _with_shapes(path: Path) -> Any:
    """The graph at `path`, with the types and shapes of all values, which the rewrites go by and the file does without."""
    import onnx

    bare = onnx.load(str(path), load_external_data=False)  # large weights would not fit into the message that is inferred
    model = onnx.shape_inference.infer_shapes(bare, strict_mode=True)
    onnx.load_external_data_for_model(model, str(path.parent))
    return model


def _write_checked(bundle: Bundle, model: Any, entry: dict[str, Any], path: Path, file: str, open_graph: OpenGraph) -> None:
    """Writes the graph `file` to `path`, checks it, compares it with PyTorch, and puts the verdict into `entry`."""
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
            f"The {entry['precision']} graph is too far from PyTorch: {verdict.complaint()}. It was not kept; "
            + (OTHER_IMAGES if entry["precision"] in QUANTIZED else WITH_DATA)
        )
    entry["agreement"] = verdict.to_dict()


@contextlib.contextmanager
def _scratch_folder(target: Path) -> Iterator[Path]:
    """A folder beside `target`, for files that are checked before they are moved there."""
    with disk_errors(target):
        folder = scratch_beside(target)
        folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _mover(made: Path) -> Callable[[Path], None]:
    """A function that moves the file `made` to the path it is given."""

    def write(path: Path) -> None:
        made.replace(path)

    return write


def bytes_writer(data: bytes) -> Callable[[Path], None]:
    """A function that writes `data` to the path it is given."""

    def write(path: Path) -> None:
        path.write_bytes(data)

    return write


def _known(bundle: Bundle, file: str, parent: str, asked: Mapping[str, Any]) -> bool:
    """Whether `file` is in the bundle, made from the graph whose sha256 is `parent` as `asked`; a deleted one is made again."""
    known = bundle.files.get(file)
    if known is None or known["parent"] != parent or any(known.get(key) != value for key, value in asked.items()):
        return False
    return all((bundle.path / name).exists() for name in (file, known.get("weights")) if name)
