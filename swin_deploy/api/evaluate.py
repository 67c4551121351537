"""How near the graphs of a bundle are to PyTorch, and how often they are right."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from swin_deploy.arguments import checked
from swin_deploy.specs import ExportSpec, Progress, Say, no_progress, silent

if TYPE_CHECKING:
    from swin_deploy.bundle import Bundle
    from swin_deploy.calib.data import Samples
    from swin_deploy.evaluation import Evaluation
    from swin_deploy.frame_input import Preparation
    from swin_deploy.models.torch_runtime import TorchNetwork
    from swin_deploy.parity import Verdict


@checked
def verify(
    bundle: str | os.PathLike[str], *, backend: str = "onnxruntime", device: str = "cpu", say: Say = silent
) -> tuple[Verdict, ...]:
    """A verdict on every ONNX graph of a bundle, run here by `backend` on `device` against PyTorch's recorded answers.

    With a back end that runs engines ("tensorrt", "tensorrt-rtx", on "cuda"), on every engine that fits that GPU and release;
    errors.EngineError says why none does. A graph in a form of which the back end makes other answers has no verdict, and `say`
    gets a line that says so. Checks every file's sha256 first (errors.BundleError). A verdict that is not `verified` is
    returned, not raised. That a graph is verified is entered into the manifest where that did not say so yet; `say` gets a line
    where it cannot be written.
    """
    from functools import partial

    from swin_deploy.bundle import Bundle
    from swin_deploy.errors import BundleError
    from swin_deploy.parity import Reference, check_runtime, verify_bundle
    from swin_deploy.runtimes.backends import misread, runtime_to_check
    from swin_deploy.runtimes.gpu.engines import open_engine
    from swin_deploy.specs import device_from_text, is_verified

    found = Bundle.open(bundle)
    if (engines := _engines(found, backend, device)) is None:
        other = {file: why for file in found.graphs if (why := misread(found, file, backend)) is not None}
        for file, why in other.items():
            say(f"Not verified: {file}. {why}")
        answers = verify_bundle(found, partial(runtime_to_check, backend=backend, device=device), other)
        for verdict in answers:
            if verdict.verified and not is_verified(found.files[verdict.file]):
                try:
                    found.with_entry(verdict.file, {"agreement": verdict.to_dict()})
                except BundleError as error:  # the verdict is what was asked for
                    say(f"That {verdict.file} is verified is not entered into the manifest. {error}")
        return answers
    for file in found.files:
        found.verified_path(file)
    verdicts = []
    for file, entry in engines.items():
        reference = Reference.load(found, found.files[entry["graph"]]["reference"])
        with open_engine(found, file, device_from_text(device)) as runtime:
            verdicts.append(check_runtime(reference, runtime, file, str(entry["precision"])))
    return tuple(verdicts)


def _engines(bundle: Bundle, backend: str, device: str) -> Mapping[str, Any] | None:
    """The engines that a back end for engines can run on `device`; None of a back end for graphs."""
    from swin_deploy.errors import UsageError
    from swin_deploy.runtimes.backends import BACKENDS
    from swin_deploy.runtimes.gpu.engines import runnable_engines
    from swin_deploy.specs import device_from_text

    if backend not in BACKENDS or not BACKENDS[backend].engines:
        return None
    if device == "cpu":
        raise UsageError(f"The back end {backend} runs on {' or '.join(BACKENDS[backend].devices)}, not on {device}.")
    return runnable_engines(bundle, backend, device_from_text(device))


@checked
def evaluate(
    bundle: str | os.PathLike[str],
    data: str | os.PathLike[str] | Iterable[Any] | Samples,
    *,
    labels: str | os.PathLike[str] | None = None,
    samples: int | None = None,
    batch: int = 8,
    precisions: Sequence[str] = (),
    backend: str = "onnxruntime",
    weights: str | os.PathLike[str] | None = None,
    progress: Progress = no_progress,
) -> Evaluation:
    """How often the graphs of a bundle are right on `data`, and how far they are from fp32, in one pass.

    `data` is a folder of images, an .npz or .npy file, or an iterable of images, each alone or in a pair with its class; see
    calib.data.samples_from. Classes come from the names of folders, or from the file `labels` with lines "image,class";
    `labels` "none" ignores them. `precisions` leaves out other graphs than these and the fp32 ones; types that the back end
    has no kernels for are emulated. A back end for engines ("tensorrt", "tensorrt-rtx") runs those that fit the first GPU, and
    ONNX Runtime the fp32 graphs. Graphs are compared with the fp32 graph of their image size, or with PyTorch where
    `weights` names the checkpoint that was exported. `progress` counts samples. Raises errors.InputError for data
    that does not fit the network, errors.UsageError for a precision that the bundle does not hold, or whose graph is in a form
    of which the back end makes other answers.
    """
    from swin_deploy.bundle import Bundle
    from swin_deploy.calib.data import preparation_and_inputs, samples_for
    from swin_deploy.errors import UsageError
    from swin_deploy.evaluation import Evaluation, GraphScorer, evaluate_graphs
    from swin_deploy.runtimes.backends import misread, runtime_to_check
    from swin_deploy.runtimes.gpu.engines import open_engine

    found = Bundle.open(bundle)
    engines = _engines(found, backend, "cuda")
    entries: Mapping[str, Any] = found.graphs
    if engines is not None:
        backend = "onnxruntime"
        entries = {**{file: entry for file, entry in found.graphs.items() if entry["precision"] == "fp32"}, **engines}
    held = dict.fromkeys(str(entry["precision"]) for entry in entries.values())
    if unknown := [precision for precision in precisions if precision not in held]:
        kind = "graph" if engines is None else "engine that runs here"
        raise UsageError(f"The bundle {found.path} holds no {unknown[0]} {kind}. It holds: {', '.join(held)}.")
    other = {file: why for file in entries if (why := misread(found, file, backend)) is not None}
    for file, why in other.items():
        if entries[file]["precision"] in precisions:
            raise UsageError(why)
    chosen = samples_for(found, data, samples, None if labels == "none" else labels)
    classes, wanted, rule = wanted_classes(found, chosen, labels)
    prepared: dict[tuple[int, int], Samples] = {}
    graphs: list[GraphScorer] = []
    left_out: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        for file, entry in sorted(entries.items(), key=lambda item: (item[1]["precision"] != "fp32", "graph" in item[1])):
            size = (int(entry["image_size"][0]), int(entry["image_size"][1]))
            if chosen.ready and size != chosen.image_size:
                left_out[file] = "of another image size than the data"
            elif not precisions and file in other:
                left_out[file] = "in the form for TensorRT, of which OpenVINO makes other answers"
            elif not precisions or entry["precision"] in ("fp32", *precisions):
                engine = "graph" in entry
                how, inputs = preparation_and_inputs(found, entry["graph"] if engine else file)
                if weights is not None and size not in prepared:
                    graphs.append(GraphScorer("", "fp32", size, _torch_network(weights, found, size, how)))
                runtime: Any = (
                    open_engine(found, file, "cuda:0") if engine else runtime_to_check(found.verified_path(file), backend)
                )
                stack.enter_context(runtime)
                graphs.append(GraphScorer(file, str(entry["precision"]), size, runtime))
                prepared.setdefault(size, chosen.with_size(how, inputs))
        streams = zip(*(made.batches(batch) for made in prepared.values()), strict=True)
        batches = (dict(zip(prepared, feeds, strict=True)) for feeds in streams)
        scores = evaluate_graphs(graphs, batches, wanted, classes, lambda done: progress("Evaluating", done, len(chosen)))
    against = "the fp32 graph" if weights is None else "PyTorch fp32"
    return Evaluation(len(chosen), rule, against, scores, left_out)


def wanted_classes(
    bundle: Bundle, chosen: Samples, labels: str | os.PathLike[str] | None
) -> tuple[int, list[int] | None, str | None]:
    """How many classes the network has (0: its outputs are no logits), those of the samples, and how their labels were read.

    The latter two are None where the samples have no labels, or `labels` is "none".
    """
    from swin_deploy.bundle import CONFIG
    from swin_deploy.calib.labels import class_numbers
    from swin_deploy.config import SwinConfig

    config = SwinConfig.from_dict(bundle.read_json(CONFIG))
    classes = config.num_labels if bundle.manifest["task"]["name"] == "image-classification" else 0
    if not classes or labels == "none" or chosen.source.labels is None or chosen.labels is None:
        return classes, None, None
    numbers, rule = class_numbers(chosen.source.labels, config.id2label)
    return classes, [numbers[label] for label in chosen.labels], rule


def _torch_network(weights: str | os.PathLike[str], bundle: Bundle, size: tuple[int, int], how: Preparation) -> TorchNetwork:
    from swin_deploy.exporters.checkpoint_from_request import checkpoint_from_request
    from swin_deploy.frame_input import Frames
    from swin_deploy.models.torch_runtime import TorchNetwork, refuse_other_network
    from swin_deploy.tasks import TaskSpec

    task, semantics = TaskSpec.from_dict(bundle.manifest["task"]), str(bundle.manifest["semantics"])
    checkpoint = checkpoint_from_request(ExportSpec(weights=weights, task=task, image_sizes=[size], framework=semantics))
    refuse_other_network(weights, checkpoint.config, bundle)
    return TorchNetwork(checkpoint, task, size, how if isinstance(how, Frames) else None)
