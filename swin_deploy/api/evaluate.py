"""Compare the graphs of a bundle with PyTorch, and measure their accuracy on images."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from swin_deploy.option_parsers import BundlePath, bundle_keywords
from swin_deploy.options import EvaluateSpec, VerifySpec

if TYPE_CHECKING:
    from pathlib import Path

    from swin_deploy.bundle import Bundle
    from swin_deploy.calib.data import Samples
    from swin_deploy.evaluation import Evaluation, Targets
    from swin_deploy.frame_input import Preparation
    from swin_deploy.manifest import EngineEntry, GraphEntry
    from swin_deploy.models.torch_runtime import TorchNetwork
    from swin_deploy.options import Size
    from swin_deploy.parity import Verdict

_LOG = logging.getLogger(__name__)


@bundle_keywords(VerifySpec)
def verify(bundle: BundlePath, spec: VerifySpec) -> tuple[Verdict, ...]:
    """Check the sha256 of every file of a bundle and compare its graphs with the outputs of PyTorch recorded in it.

    A bundle that another machine wrote is run in another process: if a library dies of it, that is an error like any other.
    A back end that runs engines compares the engines that fit this machine instead. A graph that was built for another
    runtime and would give wrong results is left out, with a log message. A successful comparison updates the manifest of a
    bundle that can be written. A graph that disagrees is reported in the result and does not raise an error.

    Args:
        bundle: Folder of the bundle.
        {options}

    Returns:
        A verdict for each graph or engine that was run.

    Raises:
        BundleError: A file is missing or damaged.
        EngineError: No engine fits this machine.
        UsageError: The back end does not run on the device.

    Example:
        >>> all(verdict.verified for verdict in swin_deploy.verify("swinv2-tiny"))
    """
    from swin_deploy.bundle import Bundle
    from swin_deploy.errors import BundleError
    from swin_deploy.runtimes.backends import misread

    found = Bundle.open(bundle, spec.trust)
    engines = _engines(found, spec.backend, spec.device)
    found.sweep()
    for file in found.files:
        found.verified_path(file)
    left_out = {} if engines is not None else {file: misread(found, file, spec.backend) for file in found.graphs}
    for file, why in left_out.items():
        if why is not None:
            _LOG.info("Not verified: %s. %s", file, why)
    files = [file for file in (found.graphs if engines is None else engines) if left_out.get(file) is None]
    # The libraries that run graphs may die of one that is malicious.
    apart = engines is None and not spec.trust and any(map(found.foreign, files))
    verdicts = _verdicts_apart(found, files, spec) if apart else [_verdict(found, file, spec) for file in files]
    for verdict in verdicts if engines is None else ():
        if verdict.verified and not found.graphs[verdict.file].verified:
            try:
                found.with_entry(verdict.file, {"agreement": verdict.to_dict()})
            except BundleError as error:  # the verdict itself is valid
                _LOG.warning("%s is verified, but the manifest cannot be updated. %s", verdict.file, error)
    if engines is not None:
        _propose_unfused(found, [verdict.file for verdict in verdicts if not verdict.verified], spec.backend, spec.device)
    return tuple(verdicts)


def json_of_verify(bundle: Bundle, verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Return what `verify --json` prints: the verdicts, and the graphs and engines that were not run."""
    run = {verdict.file for verdict in verdicts}
    kinds = (".engine", ".onnx") if any(file.endswith(".onnx") for file in run) else ".engine"
    return {
        "bundle": str(bundle.path),
        "files_intact": True,
        "graphs": [{"file": verdict.file, **verdict.to_dict()} for verdict in verdicts],
        "not_verified": [file for file in bundle.files if file.endswith(kinds) and file not in run],
    }


def _propose_unfused(bundle: Bundle, wrong: Sequence[str], backend: str, device: str) -> None:
    """Log how to compile engines without fused attention if their results are wrong and they have it."""
    from swin_deploy.options import device_from_text
    from swin_deploy.runtimes.gpu.engine_fit import gpu_of, rebuild_command

    for file in wrong:
        if any(profile.fused_attention for profile in bundle.engines[file].profiles):
            again = rebuild_command(bundle, file, [gpu_of(device_from_text(device), backend)], fused_attention=False)
            _LOG.warning(
                "%s disagrees with PyTorch. Some releases of TensorRT compute fused attention wrongly on some GPUs. Compile it "
                'without and verify that: "%s"', file, again,
            )  # fmt: skip


def _verdict(bundle: Bundle, file: str, spec: VerifySpec) -> Verdict:
    """Run a graph or an engine of a bundle in this process and compare it with PyTorch."""
    from swin_deploy.options import device_from_text
    from swin_deploy.parity import Reference, check_runtime
    from swin_deploy.runtimes.backends import runtime_to_check
    from swin_deploy.runtimes.gpu.engine_fit import open_engine

    reference = Reference.load(bundle, bundle.graph_of(file).reference)
    runtime: Any = (
        open_engine(bundle, file, device_from_text(spec.device))
        if file in bundle.engines
        else runtime_to_check(bundle.verified_path(file), spec.backend, spec.device)
    )
    entry = bundle.engines.get(file) or bundle.graphs[file]
    with runtime:
        return check_runtime(reference, runtime, file, entry.precision)


def _verdicts_apart(bundle: Bundle, files: Sequence[str], spec: VerifySpec) -> list[Verdict]:
    """Run graphs in another process, which may die of them."""
    from swin_deploy.bench.worker import Process
    from swin_deploy.parity import Verdict

    verdicts = []
    with Process("from swin_deploy.api.evaluate import answer_with_verdicts; answer_with_verdicts()") as process:
        for file in files:
            process.title = f"The process that ran {bundle.place(file)}"
            question = {"bundle": str(bundle.path), "file": file, "backend": spec.backend, "device": spec.device}
            verdicts.append(Verdict.from_json(process.ask(question)))
    return verdicts


def answer_with_verdicts() -> None:
    """Run the graphs that are named on stdin, each in a line of JSON, and answer with their verdicts."""
    from swin_deploy.bench.worker import answers
    from swin_deploy.bundle import Bundle

    with answers() as answer:
        while line := sys.stdin.readline():
            question = json.loads(line)
            bundle, file = Bundle.open(question["bundle"]), question["file"]
            _check_with_onnx(bundle.verified_path(file))
            answer(**asdict(_verdict(bundle, file, VerifySpec(backend=question["backend"], device=question["device"]))))


def _check_with_onnx(path: Path) -> None:
    """Check a graph with onnx's own checker, which is native code as well, if onnx is installed."""
    from swin_deploy.dependencies import installed, require
    from swin_deploy.errors import BundleError, sentence

    if not installed("onnx"):
        return
    onnx = require("onnx", "check the graph")
    try:
        model = onnx.load(str(path), load_external_data=False)
        # onnx refuses links to external data. Their sizes were checked, so they are like inputs here.
        outside = [one for one in model.graph.initializer if one.data_location == one.EXTERNAL]
        for one in outside:
            model.graph.initializer.remove(one)
            model.graph.input.append(onnx.helper.make_tensor_value_info(one.name, one.data_type, one.dims))
        onnx.checker.check_model(model, full_check=True)
    except Exception as error:
        raise BundleError(f"{path} is not a valid ONNX graph: {sentence(str(error))}. Export the bundle again.") from error


def _engines(bundle: Bundle, backend: str, device: str) -> Mapping[str, EngineEntry] | None:
    """Return the engines that a back end can run on `device`, by file; None for a back end that runs graphs."""
    from swin_deploy.errors import UsageError
    from swin_deploy.options import device_from_text
    from swin_deploy.runtimes.backends import BACKENDS
    from swin_deploy.runtimes.gpu.engine_fit import runnable_engines

    if not BACKENDS[backend].engines:
        return None
    if device == "cpu":
        raise UsageError(f"The back end {backend} runs on {' or '.join(BACKENDS[backend].devices)}, not on {device}.")
    return runnable_engines(bundle, backend, device_from_text(device))


@bundle_keywords(EvaluateSpec)
def evaluate(bundle: BundlePath, spec: EvaluateSpec) -> Evaluation:
    """Run images through the graphs of a bundle in one pass and measure accuracy and the distance from fp32.

    The accuracy is top-1 and top-5; mAP and F1 if the network predicts several labels; the mean absolute error if it is a
    regression. Images that cannot be read are left out, and are in the result with the reason.

    Graphs are compared with the fp32 graph of their image size or, if `weights` is set, with PyTorch. Types that the back end
    has no kernels for are emulated. A back end for engines runs the engines that fit the first GPU, and ONNX Runtime runs the
    fp32 graphs.

    Args:
        bundle: Folder of the bundle.
        {options}

    Returns:
        The score of each graph.

    Raises:
        InputError: The images cannot be read, do not fit the network, or their labels match no class.
        UsageError: The bundle has no graph of a precision, or it gives wrong results in the back end.
        EngineError: No engine fits this machine.

    Example:
        >>> swin_deploy.evaluate("swinv2-tiny", "imagenet/val", samples=1000).score("fp16").top1
    """
    from swin_deploy.bundle import Bundle
    from swin_deploy.calib.data import samples_for

    found = Bundle.open(bundle, spec.trust)
    _selected(found, spec)  # refuses invalid options before any image is read
    samples = samples_for(found, spec.data, spec.samples, spec.labels, skip=spec.on_error == "continue")
    return evaluate_samples(found, samples, spec)


def json_of_evaluate(bundle: Bundle, data: object, found: Evaluation) -> dict[str, Any]:
    """Return what `evaluate --json` prints."""
    from swin_deploy.parity import verdict_text

    run = {score.file for score in found.scores}
    return {
        "bundle": str(bundle.path),
        "data": str(data),
        "samples": found.samples,
        "labels": found.rule,
        "against": found.against,
        "fp32_against_pytorch": {file: verdict_text(one.relative_l2) for file, one in bundle.graphs_of("fp32").items()},
        "graphs": [score.to_dict() for score in found.scores],
        "not_evaluated": [*found.left_out, *(file for file in bundle.engines if file not in run)],
        "failed": [{"image": name, "error": reason} for name, reason in found.failed.items()],
    }


def evaluate_samples(bundle: Bundle, samples: Samples, spec: EvaluateSpec) -> Evaluation:
    """Do what `evaluate` does, on samples that are already selected."""
    from swin_deploy.calib.data import none_readable, preparation_and_inputs
    from swin_deploy.evaluation import Evaluation, GraphScorer, evaluate_graphs
    from swin_deploy.manifest import EngineEntry
    from swin_deploy.runtimes.backends import runtime_to_check
    from swin_deploy.runtimes.gpu.engine_fit import open_engine

    entries, backend, left_out = _selected(bundle, spec)
    targets = targets_for(bundle, samples, spec.ignore_labels, spec.threshold)
    prepared: dict[Size, Samples] = {}
    graphs: list[GraphScorer] = []
    with contextlib.ExitStack() as stack:
        for file, entry in entries.items():
            size = entry.image_size
            if samples.ready and size != samples.image_size:
                left_out[file] = "the data has another image size"
                continue
            if file in left_out or (spec.precisions and entry.precision not in ("fp32", *spec.precisions)):
                continue
            engine = isinstance(entry, EngineEntry)
            preparation, inputs = preparation_and_inputs(bundle, file)
            if spec.weights is not None and size not in prepared:
                graphs.append(GraphScorer("", "fp32", size, _torch_network(spec.weights, bundle, size, preparation)))
            runtime: Any = (
                open_engine(bundle, file, "cuda:0") if engine else runtime_to_check(bundle.verified_path(file), backend)
            )
            stack.enter_context(runtime)
            graphs.append(GraphScorer(file, entry.precision, size, runtime))
            prepared.setdefault(size, samples.with_size(preparation, inputs))
        batches = _batches(prepared, spec.batch)
        scores = evaluate_graphs(graphs, batches, targets, lambda done: spec.progress("Evaluating", done, len(samples)))
    if not scores[0].samples:
        raise none_readable(samples.source.title, samples.failures)
    against = "the fp32 graph" if spec.weights is None else "PyTorch fp32"
    return Evaluation(scores[0].samples, targets.rule, against, scores, left_out, samples.failures)


def _batches(prepared: Mapping[Size, Samples], batch: int) -> Iterator[tuple[list[int], dict[Size, Any]]]:
    """Yield the numbers of samples and their feeds by image size. Samples that fail at one size are left out of all."""
    for parts in zip(*(one.numbered(batch) for one in prepared.values()), strict=True):
        rows = [row for row in parts[0][0] if all(row in found for found, _ in parts)]
        if rows:
            picked = [
                feeds if found == rows else {name: array[[found.index(row) for row in rows]] for name, array in feeds.items()}
                for found, feeds in parts
            ]
            yield rows, dict(zip(prepared, picked, strict=True))


def _selected(bundle: Bundle, spec: EvaluateSpec) -> tuple[dict[str, GraphEntry | EngineEntry], str, dict[str, str]]:
    """Return the graphs and engines that can be run, fp32 first; the back end for graphs; and why others are left out."""
    from swin_deploy.errors import UsageError
    from swin_deploy.manifest import EngineEntry
    from swin_deploy.runtimes.backends import misread

    entries: dict[str, GraphEntry | EngineEntry] = dict(bundle.graphs)
    backend, kind = spec.backend, "graph"
    if (engines := _engines(bundle, spec.backend, "cuda")) is not None:
        backend, kind = "onnxruntime", "engine that runs on this machine"
        entries = {file: entry for file, entry in entries.items() if entry.precision == "fp32"} | dict(engines)
    held = dict.fromkeys(entry.precision for entry in entries.values())
    if missing := [precision for precision in spec.precisions if precision not in held]:
        raise UsageError(f"The bundle {bundle.path} has no {missing[0]} {kind}. Choose one of: {', '.join(held)}.")
    wrong = {file: why for file in entries if (why := misread(bundle, file, backend)) is not None}
    for file, why in wrong.items():
        if entries[file].precision in spec.precisions:
            raise UsageError(why)
    entries = dict(sorted(entries.items(), key=lambda item: (item[1].precision != "fp32", isinstance(item[1], EngineEntry))))
    return entries, backend, {} if spec.precisions else dict.fromkeys(wrong, "it was built for TensorRT")


def targets_for(bundle: Bundle, samples: Samples, ignore_labels: bool = False, threshold: float = 0.5) -> Targets:
    """Return what the network predicts and, unless labels are unknown or ignored, what it should predict for each sample."""
    from swin_deploy.calib.labels import targets_from_labels
    from swin_deploy.evaluation import Targets

    config = bundle.config
    if bundle.manifest.task.name != "image-classification" or not config.has_classes:
        return Targets()
    values = rule = None
    if not ignore_labels and samples.source.labels is not None:
        values, rule = targets_from_labels(samples.source.labels, config)  # of the whole data set, to find the rule
        values = values[list(samples.chosen)]
    return Targets(config.prediction, config.num_labels, values, rule, config.score_activation, threshold)


def _torch_network(weights: Any, bundle: Bundle, size: Size, preparation: Preparation) -> TorchNetwork:
    from swin_deploy.exporters.checkpoint_from_request import checkpoint_from_request, spec_of_export
    from swin_deploy.frame_input import Frames
    from swin_deploy.models.torch_runtime import TorchNetwork, refuse_other_network

    checkpoint = checkpoint_from_request(spec_of_export(bundle, weights, size))
    refuse_other_network(weights, checkpoint.config, bundle)
    return TorchNetwork(checkpoint, bundle.task, size, preparation if isinstance(preparation, Frames) else None)
