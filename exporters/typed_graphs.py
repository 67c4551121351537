"""Add graphs of another precision to a bundle, made from its fp32 graphs and compared with PyTorch."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from swin_deploy.bundle import Bundle, disk_errors, graph_file, load_weights, weights_file
from swin_deploy.config import SwinConfig
from swin_deploy.dependencies import installed, require
from swin_deploy.errors import MissingDependencyError, UsageError, VerificationError
from swin_deploy.files import scratch, scratch_folder
from swin_deploy.options import QUANTIZED, TARGETS, Size
from swin_deploy.parity import OpenGraph, Reference, Runnable, check_graph
from swin_deploy.tasks import TaskSpec

from .external_data import PROTOBUF_LIMIT, WeightFile, add_metadata, graph_facts
from .passes import PassRecord
from .passes.base import OPSET, NetworkCheck, complete_header
from .precision import BF16_OPSET, QDQ_OLDEST, typed_from_fp32

_LOG = logging.getLogger(__name__)
WITH_DATA = "pass images with --data to find the values that must stay in fp32, or build with --fp32 instead."
NO_CALIBRATION = (
    "{} was exported with --static-batch {}, and images are measured one at a time. Export it without --static-batch, or with "
    "--static-batch 1."
)
OTHER_IMAGES = "keep the most sensitive layers in fp32 with --max-drop, pass images like those of the application, or use fp16."


@dataclass(frozen=True)
class Calibration:
    """Images on which the ranges of fp16 values are measured: their number, a sha256 over them, and the measurement.

    `amax(file, model)` returns the largest absolute value of each tensor of `model`, an fp32 version of the graph `file`.
    """

    samples: int
    fingerprint: str
    amax: Callable[[str, Any], Mapping[str, float]]


@dataclass(frozen=True)
class NewGraph:
    """A graph made from an fp32 graph, the passes applied to it, further facts for its entry in the manifest, and a clause
    about what was measured, for a refusal.
    """

    model: Any
    records: tuple[PassRecord, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    measured: str = ""


Make = Callable[[str, Any], NewGraph]  # (file of an fp32 graph, the graph with weights and shapes) -> new graph


def with_typed_graphs(bundle: Bundle, precision: str, open_graph: OpenGraph, calibration: Calibration | None = None) -> Bundle:
    """Return the bundle with its fp16 or bf16 graphs. Existing graphs are reused, unless `calibration` has other images."""
    if precision == "fp32":
        return bundle
    refuse_opset(bundle, precision)
    config, task = config_and_task(bundle)
    asked = {} if calibration is None else {"ranges": {"samples": calibration.samples, "data": calibration.fingerprint}}

    def make(source: str, model: Any) -> NewGraph:
        measure = None if calibration is None else partial(calibration.amax, source)
        check = network_check(bundle, source, model)
        typed = typed_from_fp32(model, config, task, precision, measure, check)
        facts = {"fallbacks": [asdict(nodes) for nodes in typed.fallbacks], **left_out(check)}
        return NewGraph(typed.model, typed.records, facts, "" if check is None else str(check))

    return with_graphs(bundle, precision, make, asked, open_graph)


def refuse_opset(bundle: Bundle, precision: str, target: str = TARGETS[0]) -> None:
    """Raise UsageError if the opset that the bundle was exported with lacks types of its graph of this precision."""
    asked, least = bundle.manifest.opset, 0
    if precision == "bf16":
        least, types = BF16_OPSET, "bfloat16"
    elif precision in QUANTIZED and target == TARGETS[0]:
        least, types = QDQ_OLDEST, f"{precision.upper()} Q/DQ with fp16 scales"
    if asked is not None and asked < least:
        raise UsageError(
            f"{bundle.path} was exported with --opset {asked}, and {types} needs opset {least}. Export it with "
            f"--opset {least}, or choose another precision."
        )


def network_check(bundle: Bundle, source: str, model: Any) -> NetworkCheck | None:
    """Return the check of rewrites of `model`, the fp32 graph `source`; None without ONNX Runtime, or beyond 2 GB."""
    if not installed("onnxruntime") or sum(len(tensor.raw_data) for tensor in model.graph.initializer) > PROTOBUF_LIMIT:
        return None
    reference, static = Reference.load(bundle, bundle.graphs[source].reference), bundle.static_batch
    feeds, names = reference.feeds, [output.name for output in model.graph.output]
    recorded = [reference.outputs[name] for name in names] if set(names) <= set(reference.outputs) else []
    if static is not None:
        feeds = {name: np.resize(feed, (static, *feed.shape[1:])) for name, feed in feeds.items()}
        recorded = [np.resize(one, (static * len(one) // reference.samples, *one.shape[1:])) for one in recorded]
    return NetworkCheck(model, feeds, recorded=recorded)


def left_out(check: NetworkCheck | None) -> dict[str, Any]:
    """Return the manifest entry of the rewrites that changed the network; empty if there are none."""
    return {"left_out": check.left_out} if check is not None and check.left_out else {}


def config_and_task(bundle: Bundle) -> tuple[SwinConfig, TaskSpec]:
    """Return the configuration and the task of the network of a bundle."""
    return bundle.config, bundle.task


def with_graphs(bundle: Bundle, precision: str, make: Make, asked: Mapping[str, Any], open_graph: OpenGraph) -> Bundle:
    """Return the bundle with the graph that `make` makes of each of its fp32 graphs.

    A graph made earlier from the same fp32 graph with the same `asked`, the options stored in its entry, is reused. Raises
    VerificationError, and leaves the bundle as it was, if a graph is too far from PyTorch.
    """
    sources = list(bundle.graphs_of("fp32"))
    pairs = [(source, graph_file(precision, further_size(bundle, source, number))) for number, source in enumerate(sources)]
    missing = [(source, file) for source, file in pairs if not _known(bundle, file, bundle.files[source].sha256, asked)]
    if not missing:
        return bundle
    shared = weights_file(precision) if bundle.graphs[sources[0]].weights else None
    if shared is not None:
        missing = pairs  # graphs that share a weights file are written together
    bundle.refuse_read_only()
    require("onnx", f"write the {precision} graph")
    made, metadata = [], []
    for source, file in missing:
        _LOG.info("Writing %s", file)
        model, answer = with_shapes(bundle.verified_path(source)), bundle.graphs[source].postprocessing
        metadata.append({one.key: one.value for one in model.metadata_props})
        del model.metadata_props[:]
        if answer is None:
            made.append(make(source, model))
        else:
            from .postprocessing import add_answer, remove_answer

            remove_answer(model)
            made.append(make(source, model))
            add_answer(made[-1].model, answer)
        complete_header(made[-1].model, bundle.manifest.opset)
    with _scratch_folder(bundle.place(missing[0][1])) as folder:
        entries: dict[str, dict[str, Any]] = {}
        if shared is not None:
            with disk_errors(bundle.path / shared):
                weights = WeightFile(folder / Path(shared).name, Path(shared).name)
                for graph in made:
                    weights.take(graph.model)
        for (source, file), graph, stated in zip(missing, made, metadata, strict=True):
            origin = bundle.graphs[source]
            entry: dict[str, Any] = {
                "image_size": list(origin.image_size),
                "inputs": [spec.to_dict() for spec in origin.inputs],
                "outputs": [spec.to_dict() for spec in origin.outputs],
                "preprocessing": None if origin.preprocessing is None else origin.preprocessing.to_dict(),
                **({} if origin.postprocessing is None else {"postprocessing": origin.postprocessing.to_dict()}),
                "reference": origin.reference,
                "opset": next(domain.version for domain in graph.model.opset_import if not domain.domain),
                "precision": precision,
                "parent": origin.sha256,
                "passes": [asdict(record) for record in graph.records],
                **graph.facts,
                **asked,
                **({"weights": shared} if shared else {}),
            }
            with disk_errors(bundle.path / file):
                _write_checked(bundle, graph, entry, folder / Path(file).name, file, open_graph)
                if stated:  # a graph of an earlier release has none
                    target = asked.get("calibration", {}).get("target") or bundle.manifest.target
                    add_metadata(folder / Path(file).name, {**stated, **graph_facts(entry, target)})
            entries[file] = entry
        # All passed: now they may replace the existing ones.
        for file, entry in ({shared: {}, **entries} if shared else entries).items():
            bundle = bundle.with_file(file, entry, (folder / Path(file).name).replace)
    return bundle


def further_size(bundle: Bundle, source: str, number: int) -> Size | None:
    """Return the image size in the file names of graph number `number`; None for the first graph."""
    return None if number == 0 else bundle.graphs[source].image_size


def with_shapes(path: Path) -> Any:
    """Load the graph at `path` with the types and shapes of all values, which the passes need and the file omits."""
    import onnx

    bare = onnx.load(str(path), load_external_data=False)  # large weights exceed the protobuf limit of shape inference
    complete_header(bare, max(OPSET, bare.opset_import[0].version))
    model = onnx.shape_inference.infer_shapes(bare, strict_mode=True)
    load_weights(model.graph.initializer, path.parent)
    return model


def _write_checked(
    bundle: Bundle, graph: NewGraph, entry: dict[str, Any], path: Path, file: str, open_graph: OpenGraph
) -> None:
    """Write the graph `file` to `path`, check it, compare it with PyTorch, and store the agreement in `entry`."""
    import onnx

    del graph.model.metadata_props[:]
    path.write_bytes(graph.model.SerializeToString())
    onnx.checker.check_model(str(path), full_check=True)
    reference = Reference.load(bundle, entry["reference"])
    try:
        verdict = check_graph(reference, open_graph, path, file, entry["precision"])
    except MissingDependencyError:
        entry["agreement"] = "not verified"
        return
    if not verdict.verified:
        raise VerificationError(
            f"The {entry['precision']} graph is too far from PyTorch: {verdict.mismatch()}"
            f"{graph.measured and '; ' + graph.measured}. It was not kept; "
            + (OTHER_IMAGES if entry["precision"] in QUANTIZED else WITH_DATA)
        )
    entry["agreement"] = verdict.to_dict()


@contextlib.contextmanager
def _scratch_folder(target: Path) -> Iterator[Path]:
    """Yield a folder beside `target` for files that are checked before they are moved."""
    with contextlib.ExitStack() as stack:
        with disk_errors(target):
            folder = stack.enter_context(scratch(target))
            folder.mkdir()
        yield folder


@contextlib.contextmanager
def scratch_graph(model: Any) -> Iterator[Path]:
    """Yield the path of a temporary file with the graph `model`."""
    with scratch_folder("graph") as folder:
        path = folder / "model.onnx"
        path.write_bytes(model.SerializeToString())
        yield path


@contextlib.contextmanager
def opened_graph(open_graph: OpenGraph, model: Any) -> Iterator[Runnable]:
    """Yield a runtime with the graph `model`."""
    with scratch_graph(model) as path, open_graph(path) as runtime:
        yield runtime


def _known(bundle: Bundle, file: str, parent: str, asked: Mapping[str, Any]) -> bool:
    """Return whether the bundle has `file`, made from the graph with sha256 `parent` with the options `asked`."""
    known = bundle.graphs.get(file)
    if known is None or known.parent != parent or not known.has(asked):
        return False
    return all(bundle.place(name).exists() for name in (file, known.weights) if name)
