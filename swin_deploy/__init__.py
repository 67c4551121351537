"""From a Swin Transformer checkpoint (V1 or V2) to a verified ONNX model and a TensorRT engine that runs on a device.

    import swin_deploy

    with swin_deploy.load("swinv2-tiny") as model:
        print(model.classify("photo.jpg")[0])

Loading and running a bundle needs numpy, Pillow and one back end. Exporting and compiling bring torch, onnx and TensorRT,
which are imported only when they are asked for.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from swin_deploy.bundle import Bundle
    from swin_deploy.calib.data import Samples
    from swin_deploy.evaluation import Evaluation
    from swin_deploy.exporters.build import Built
    from swin_deploy.exporters.graphs import Calibration
    from swin_deploy.exporters.inspection import Inspection
    from swin_deploy.models.running import TorchNetwork
    from swin_deploy.reference import Verdict
    from swin_deploy.runtimes.model import Model
    from swin_deploy.tasks import TaskSpec

__version__ = "0.1.0"
__all__ = ["__version__", "build_engine", "evaluate", "export", "inspect", "load", "quantize", "refit", "verify"]

Say = Callable[[str], None]


def _silent(line: str) -> None:
    pass


def _one_or_more(sizes: int | Sequence[int] | None) -> tuple[int, ...] | None:
    return None if sizes is None else (sizes,) if isinstance(sizes, int) else tuple(sizes)


def load(path: str | os.PathLike[str], *, precision: str = "fp32", backend: str = "onnxruntime", threads: int = 0) -> Model:
    """The bundle at `path`, loaded and ready to run; use it as a context manager or call `close()`.

    `precision` is "fp32", or another one whose graph was made ("fp16", "int8"), or with OpenVINO "bf16"; `backend` is
    "onnxruntime" or "openvino", both on the CPU; `threads` 0 lets the back end choose. Raises errors.BundleError for a
    folder that is no intact bundle.
    """
    from swin_deploy.runtimes.model import load_model

    return load_model(path, precision, backend, threads)


def export(
    variant: str | None = None,
    *,
    weights: str | os.PathLike[str] | None = None,
    random_weights: bool = False,
    seed: int = 0,
    output: str | os.PathLike[str] | None = None,
    task: str | TaskSpec = "image-classification",
    image_sizes: Sequence[tuple[int, int]] = (),
    semantics: str | None = None,
    window_size: int | Sequence[int] | None = None,
    pretrained_window_sizes: int | Sequence[int] | None = None,
    target: str = "tensorrt",
    force: bool = False,
    say: Say = _silent,
) -> Bundle:
    """The bundle that a checkpoint was exported to, compared with PyTorch before it is kept.

    `variant` is a name of `swin-deploy variants`; `weights` a checkpoint's folder or file (of transformers, timm, Microsoft,
    torchvision or TensorFlow, recognised by what it holds) or a hub id, and otherwise the variant's own hub id;
    `random_weights` takes reproducible random ones instead. `task` is one of tasks.TASKS, or a TaskSpec with its options;
    `image_sizes` are (height, width) in pixels, one graph each, by default the checkpoint's own; `semantics` (one of
    config.SEMANTICS) replaces the rules of the system that wrote the checkpoint; `window_size` (tokens, one number or one
    for each stage) builds the network with other windows, and for the first image size given, for which the checkpoint's
    position tables are resized as its own system does it; `pretrained_window_sizes` are Swin V2's; `target` is what
    the graph's form is fastest with (one of specs.TARGETS; it answers the same everywhere). The bundle is written to
    `output`, by default a folder of the variant's (or checkpoint's) name in the current directory; `force` replaces a
    bundle that is there. `say` gets a line for each step. Raises errors.SwinDeployError with nothing written.
    """
    from swin_deploy.exporters.export import bundle_from_checkpoint
    from swin_deploy.exporters.source import checkpoint_from_request
    from swin_deploy.runtimes.backends import runtime_to_check
    from swin_deploy.tasks import TaskSpec

    spec = TaskSpec(task) if isinstance(task, str) else task
    checkpoint, name = checkpoint_from_request(
        variant,
        weights,
        random_weights,
        seed,
        spec,
        image_sizes[0] if image_sizes else None,
        semantics,
        _one_or_more(window_size),
        _one_or_more(pretrained_window_sizes),
        say,
    )
    return bundle_from_checkpoint(
        checkpoint,
        Path(name if output is None else output),
        variant=variant,
        task=spec,
        image_sizes=image_sizes,
        target=target,
        replace=force,
        open_graph=runtime_to_check,
        say=say,
    )


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
    say: Say = _silent,
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
    from swin_deploy.exporters.build import build_engines
    from swin_deploy.exporters.engine_spec import EngineSpec
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
    from swin_deploy.calib.data import preparation, samples_for
    from swin_deploy.calib.largest import largest_values
    from swin_deploy.exporters.graphs import Calibration

    chosen = samples_for(bundle, data, samples)
    tell = progress or (lambda phase, done, total: None)

    def largest(file: str, model: Any) -> dict[str, float]:
        of_file = chosen.with_size(*preparation(bundle, file))
        return largest_values(model, of_file, progress=lambda done, total: tell("Measuring ranges", done, total))

    return Calibration(len(chosen), chosen.fingerprint, largest)


def quantize(
    bundle: str | os.PathLike[str],
    data: str | os.PathLike[str] | Iterable[Any],
    *,
    quantization: str = "int8",
    method: str | None = None,
    samples: int | None = None,
    batch: int = 8,
    keep: Iterable[str] = (),
    say: Say = _silent,
    progress: Callable[[str, int, int], None] | None = None,
) -> Evaluation:
    """Writes the graphs of "int8" or "fp8" of a bundle into it, and returns how far they are from fp32 on the samples.

    `data`, of it `samples`, are images like those of the application (see `evaluate`), on which the ranges of activations
    are measured; these are kept in the bundle, and a measurement that was interrupted goes on. `method` is how a range is
    chosen, one of calib.ranges.METHODS; without it, the one with the least squared error. `keep` names layers that are not
    quantised. A bundle for TensorRT gets fp16 between the quantised layers, for `build_engine`; one for ONNX Runtime or
    OpenVINO fp32, and weights rounded so that each layer makes up for those before it. Raises errors.InputError for data
    that does not fit and errors.UsageError for a layer or method that there is not.
    """
    from swin_deploy.bundle import Bundle
    from swin_deploy.calib.collect import CACHE, collect
    from swin_deploy.calib.data import preparation, samples_for
    from swin_deploy.calib.forms import quantized_for
    from swin_deploy.calib.ranges import METHODS
    from swin_deploy.errors import UsageError
    from swin_deploy.exporters.graphs import NewGraph, config_and_task, with_graphs
    from swin_deploy.exporters.quantized import quantized_from_fp32, quantized_layers, refuse_unknown
    from swin_deploy.runtimes.backends import runtime_to_check
    from swin_deploy.specs import QUANTIZED, TARGETS

    found, kept = Bundle.open(bundle), frozenset(keep)
    target = str(found.manifest.get("target", TARGETS[0]))
    for what, given, known in (("quantisation", quantization, QUANTIZED), ("method", method or METHODS[0], METHODS)):
        if given not in known:
            raise UsageError(f'There is no {what} "{given}". There are: {", ".join(known)}.')
    if quantization == "fp8" and target != TARGETS[0]:
        raise UsageError(f"{found.path} was exported for {target}, which does not compute in FP8. Take int8.")
    chosen = samples_for(found, data, samples)
    (config, task), tell = config_and_task(found), progress or (lambda phase, done, total: None)

    def make(source: str, model: Any) -> NewGraph:
        feeds = chosen.with_size(*preparation(found, source))
        if target != TARGETS[0]:
            graph, done = quantized_for(target, model, lambda: feeds.batches(batch), method, kept, say)
            return NewGraph(graph, (), {"layers": done})
        layers = quantized_layers(model, config, quantization)
        refuse_unknown(layers, kept)
        seen = collect(
            found.path / source,
            [name for layer in layers for name in layer.inputs],
            feeds,
            batch=batch,
            cache=found.path / CACHE,
            progress=lambda done, total: tell("Measuring ranges", done, total),
        )
        amplitudes = {name: one.amplitude(method or "mse", quantization) for name, one in seen.items()}
        made, records = quantized_from_fp32(model, config, task, quantization, amplitudes, keep=kept)
        return NewGraph(made, records, {"amplitudes": amplitudes})

    with found.compiling(lambda: say(f"Waiting for another process that works on {found.path}")) as found:
        facts = {"samples": len(chosen), "data": chosen.fingerprint, "method": method, "keep": sorted(kept)}
        found = with_graphs(found, quantization, make, {"calibration": facts}, runtime_to_check, say)
        say("Comparing with fp32 on the samples")
        result = evaluate(
            found.path, chosen, labels="none", batch=batch, precisions=[quantization],
            progress=lambda done, total: tell("Comparing", done, total),
        )  # fmt: skip
        for score in result.scores:
            if score.precision == quantization:
                found = found.with_entry(score.file, {"on_samples": score.to_dict()})
    return result


def refit(
    bundle: str | os.PathLike[str], *, say: Say = _silent, log: Callable[[str, str], None] | None = None
) -> tuple[Built, ...]:
    """The engines of a bundle that were compiled without their weights, with the weights of their graphs put back.

    They are written into the bundle as further engines. Needs the GPU and the release of the compiler that they were compiled
    with. Raises errors.EngineError where these are others, errors.UsageError where no engine lacks its weights.
    """
    from swin_deploy.bundle import Bundle
    from swin_deploy.exporters.refit import refit_engines

    return refit_engines(Bundle.open(bundle), say, log or (lambda severity, message: None))


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
    from swin_deploy.exporters.inspection import inspect_path

    return inspect_path(Path(path), gpu, batch, backend, log or (lambda severity, message: None), progress)


def verify(bundle: str | os.PathLike[str], *, backend: str = "onnxruntime") -> tuple[Verdict, ...]:
    """A verdict on every ONNX graph of a bundle, run here by `backend` against PyTorch's recorded answers.

    Checks every file's sha256 first (errors.BundleError). A verdict that is not `verified` is returned, not raised.
    """
    from functools import partial

    from swin_deploy.bundle import Bundle
    from swin_deploy.reference import verify_bundle
    from swin_deploy.runtimes.backends import runtime_to_check

    return verify_bundle(Bundle.open(bundle), partial(runtime_to_check, backend=backend))


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
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """How often the graphs of a bundle are right on `data`, and how far they are from fp32, in one pass.

    `data` is a folder of images, an .npz or .npy file, or an iterable of images, each alone or in a pair with its class; see
    calib.data.samples_from. Classes come from the names of folders, or from the file `labels` with lines "image,class";
    `labels` "none" ignores them. `precisions` leaves out other graphs than these and the fp32 ones; types that the back end
    has no kernels for are emulated. Graphs are compared with the fp32 graph of their image size, or with PyTorch where
    `weights` names the checkpoint that was exported. `progress(done, total)` counts samples. Raises errors.InputError for data
    that does not fit the network, errors.UsageError for a precision that the bundle does not hold.
    """
    from swin_deploy.bundle import CONFIG, Bundle
    from swin_deploy.calib.data import preparation, samples_for
    from swin_deploy.calib.labels import class_numbers
    from swin_deploy.config import SwinConfig
    from swin_deploy.errors import UsageError
    from swin_deploy.evaluation import Evaluation, Graph, evaluate_graphs
    from swin_deploy.runtimes.backends import runtime_to_check

    found = Bundle.open(bundle)
    held = dict.fromkeys(str(entry["precision"]) for entry in found.graphs.values())
    if unknown := [precision for precision in precisions if precision not in held]:
        raise UsageError(f"The bundle {found.path} holds no {unknown[0]} graph. It holds: {', '.join(held)}.")
    config = SwinConfig.from_dict(found.read_json(CONFIG))
    classes = config.num_labels if found.manifest["task"]["name"] == "image-classification" else 0
    chosen = samples_for(found, data, samples, None if labels == "none" else labels)
    wanted, rule = None, None
    if classes and labels != "none" and chosen.source.labels is not None and chosen.labels is not None:
        numbers, rule = class_numbers(chosen.source.labels, config.id2label)
        wanted = [numbers[label] for label in chosen.labels]
    prepared: dict[tuple[int, int], Samples] = {}
    graphs, left_out = [], []
    with contextlib.ExitStack() as stack:
        for file, entry in sorted(found.graphs.items(), key=lambda item: item[1]["precision"] != "fp32"):
            size = (int(entry["image_size"][0]), int(entry["image_size"][1]))
            if chosen.ready and size != chosen.image_size:
                left_out.append(file)
            elif not precisions or entry["precision"] in ("fp32", *precisions):
                if weights is not None and size not in prepared:
                    graphs.append(Graph("", "fp32", size, _torch_network(weights, found, size)))
                runtime = stack.enter_context(runtime_to_check(found.verified_path(file), backend))
                graphs.append(Graph(file, str(entry["precision"]), size, runtime))
                prepared.setdefault(size, chosen.with_size(*preparation(found, file)))
        streams = zip(*(made.batches(batch) for made in prepared.values()), strict=True)
        batches = (dict(zip(prepared, feeds, strict=True)) for feeds in streams)
        scores = evaluate_graphs(graphs, batches, wanted, classes, lambda done: progress and progress(done, len(chosen)))
    against = "the fp32 graph" if weights is None else "PyTorch fp32"
    return Evaluation(len(chosen), rule, against, scores, tuple(left_out))


def _torch_network(weights: str | os.PathLike[str], bundle: Bundle, size: tuple[int, int]) -> TorchNetwork:
    from swin_deploy.exporters.source import checkpoint_from_request
    from swin_deploy.models.running import TorchNetwork, refuse_other_network
    from swin_deploy.tasks import TaskSpec

    task, semantics = TaskSpec.from_dict(bundle.manifest["task"]), str(bundle.manifest["semantics"])
    checkpoint, _ = checkpoint_from_request(None, weights, False, 0, task, size, semantics, None, None, _silent)
    refuse_other_network(weights, checkpoint.config, bundle)
    return TorchNetwork(checkpoint, task, size)
