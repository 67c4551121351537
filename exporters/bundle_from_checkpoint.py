"""Export a checkpoint: build the network, trace it to ONNX, compare it with PyTorch, and write the bundle."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from swin_deploy.bundle import (
    CONFIG,
    NEW,
    PREPROCESSOR,
    Bundle,
    Draft,
    TensorSpec,
    create_bundle,
    disk_errors,
    graph_file,
    reference_file,
    sha256_of,
    size_text,
    specs_from_onnx,
    weights_file,
)
from swin_deploy.config import OWN_KEYS, SwinConfig
from swin_deploy.dependencies import installed_versions
from swin_deploy.errors import InputError, MissingDependencyError, UsageError, VerificationError
from swin_deploy.frame_input import Frames, refuse_misfit
from swin_deploy.manifest import LARGEST_FRAME, LARGEST_SIDE, EmbeddedAnswer
from swin_deploy.options import LAYOUTS, ORDERS, ExportSpec, Size
from swin_deploy.parity import OpenGraph, Reference, check_graph, sample_inputs
from swin_deploy.preprocess import EMBEDDABLE, Preprocessor
from swin_deploy.qat_ranges import RANGES
from swin_deploy.tasks import PIXELS

from .checkpoint_from_request import HUB_ID, natural_size, preprocessing_of
from .external_data import PROTOBUF_LIMIT, Metadata, WeightFile, add_metadata, embed_weights, graph_facts, weight_bytes
from .onnx_from_torch import onnx_from_torch
from .passes.base import OPSET, complete_header

if TYPE_CHECKING:
    import torch

    from swin_deploy.models.checkpoints import Checkpoint
    from swin_deploy.models.swin import SwinNetwork

_LOG = logging.getLogger(__name__)
LABELS, CARD, TRANSFORMERS_JS = "labels.txt", "README.md", "transformers.js_config"
TOOLS = ("swin-deploy", "torch", "onnx", "onnx-graphsurgeon", "onnxruntime", "numpy")


def bundle_from_checkpoint(checkpoint: Checkpoint, path: Path, spec: ExportSpec, open_graph: OpenGraph) -> Bundle:
    """Trace a checkpoint to ONNX, one graph for each image size of `spec`, and write the bundle `path`.

    `open_graph` loads a graph to compare it with PyTorch; without ONNX Runtime graphs are recorded as not verified. Raises
    VerificationError, and writes nothing, if a graph disagrees.
    """
    import onnx

    if (spec.opset or 0) > (newest := onnx.defs.onnx_opset_version()):
        raise UsageError(
            f"onnx {onnx.__version__} has opsets up to {newest}. Pass --opset {newest} or less, or install a newer onnx."
        )
    task, frame_size, target = checkpoint.task, spec.embed_resize, spec.target
    config = checkpoint.config
    stated = preprocessing_of(checkpoint, spec)
    preprocessor = stated.preprocessor
    sizes = tuple(dict.fromkeys(spec.image_sizes)) or (checkpoint.image_size or natural_size(preprocessor, config),)
    if not spec.image_sizes and sizes[0] != config.image_size:
        _LOG.info("Using the %s pixels of the image processor as the size of the graph", size_text(sizes[0]))
    if (largest := max(max(size) for size in sizes)) > LARGEST_SIDE:
        raise UsageError(f"An image side of {largest} pixels is too long. Expected at most {LARGEST_SIDE}.")
    if frame_size is not None and max(frame_size) > LARGEST_FRAME:
        raise UsageError(f"Frames of {size_text(frame_size)} pixels are too large. Expected sides of at most {LARGEST_FRAME}.")
    if frame_size is not None and len(sizes) > 1:
        raise UsageError(
            f"--embed-resize writes one graph, and {len(sizes)} image sizes were given. Export one bundle for each."
        )
    if natural_size(preprocessor, config) != sizes[0] or (preprocessor.do_pad and preprocessor.pad_size is None):
        preprocessor = preprocessor.with_size(sizes[0])
    processor = _kept(checkpoint.preprocessor, preprocessor) or preprocessor.to_dict()
    assumed = stated.warning(preprocessor)
    _report(preprocessor, stated.source, assumed, sizes)
    answer: EmbeddedAnswer | None = None
    if spec.embed_postprocess is not None:
        from .postprocessing import answer_for

        answer = answer_for(spec.embed_postprocess, config, task)
    preparations = {size: preprocessor if number == 0 else preprocessor.with_size(size) for number, size in enumerate(sizes)}
    embedded = spec.embed_preprocess or frame_size is not None
    layout, order = spec.input_layout or LAYOUTS[0], spec.input_order or ORDERS[0]
    frames = {size: Frames(one, frame_size, layout, order) if embedded else None for size, one in preparations.items()}
    made = frames[sizes[0]]
    for size, one in frames.items():
        if one is not None:
            refuse_misfit(one, size, config.num_channels)
    facts = {
        "name": Path(os.path.realpath(path)).name,
        "variant": spec.variant,
        "task": task.to_dict(),
        "semantics": config.framework,
        "target": target,
        "source": checkpoint.source,
        **({"weights_key": spec.weights_key} if spec.weights_key else {}),
        **({"opset": spec.opset} if spec.opset else {}),
        "notes": list(checkpoint.notes),
        "preprocessing": {"source": stated.source, "steps": preprocessor.summary(), "assumed": assumed},
        "tools": installed_versions(TOOLS),
    }
    digests = ",".join(sha256_of(file) for file in checkpoint.files)
    with create_bundle(path, replace=spec.force, facts=facts) as draft:
        shared = WeightFile(draft.path / weights_file("fp32")) if len(sizes) > 1 else None
        for number, size in enumerate(sizes):
            further = None if number == 0 else size
            metadata = graph_metadata(checkpoint, frames[size] or preparations[size], digests)
            _add_graph(draft, checkpoint, spec, size, further, shared, frames[size], answer, metadata, open_graph)
        written = config.to_dict()
        own = {key: written[key] for key in OWN_KEYS if key in written}
        graph = draft.files[graph_file("fp32")]
        own[TRANSFORMERS_JS] = for_transformers_js(quantized=False, external="weights" in graph)
        draft.add_json(CONFIG, {**(checkpoint.raw_config or written), **own})
        for file, text in texts_beside(str(facts["name"]), checkpoint, preprocessor, graph).items():
            draft.add(file, {}, text.encode())
        if checkpoint.ranges is not None:
            draft.add(RANGES, {}, checkpoint.ranges.to_json().encode())
        draft.add_json(PREPROCESSOR, processor if made is None else _left_to_do(processor, made))
    return Bundle.open(path)


def _report(preprocessor: Preprocessor, source: str, assumed: str, sizes: tuple[Size, ...]) -> None:
    """Log the preprocessing, its source, and what is assumed or not answered."""
    _LOG.info("Preprocessing: %s (source: %s)", preprocessor.summary(), source)
    if assumed:
        _LOG.warning("Warning: %s", assumed)
    if preprocessor.varies:
        edge = preprocessor.shortest_edge or 0
        _LOG.warning(
            "Warning: The image processor resizes the shorter side to %d and crops nothing, so this bundle accepts only images "
            "with the aspect ratio of %s. To accept every image, crop the center with --crop-pct 1. To accept other aspect "
            "ratios, pass --image-size for each, such as %dx%d.",
            *(edge, " or ".join(map(size_text, sizes)), edge, edge * 3 // 2),
        )


def _add_graph(
    draft: Draft,
    checkpoint: Checkpoint,
    spec: ExportSpec,
    size: Size,
    further: Size | None,
    shared: WeightFile | None,
    frames: Frames | None,
    answer: EmbeddedAnswer | None,
    metadata: Metadata,
    open_graph: OpenGraph,
) -> None:
    """Add the graph for images of `size` and its reference outputs; `further` is the size in file names, None for the first.

    With `frames` the graph takes camera frames, and PyTorch runs on what the image processor makes of them.
    """
    import onnx

    from swin_deploy.models.frame_embedding import accept_frames
    from swin_deploy.models.swin import SwinNetwork

    config, task, target = checkpoint.config, checkpoint.task, spec.target
    at = f" at {size_text(size)}" if shared else ""
    _LOG.info("Loading %s%s", checkpoint.source, at)
    network = SwinNetwork(config, size, checkpoint.tensors, task, target).eval()
    _LOG.info("Running PyTorch on the reference inputs%s", at)
    given = None if frames is None else frames.spec(size)
    inputs = task.inputs(config, size, given)
    reference = _reference(network, inputs, frames, answer)
    _LOG.info("Tracing to ONNX%s", at)
    if frames is not None:
        accept_frames(network, size, checkpoint.tensors, frames)
    traced = onnx_from_torch(network, size, given)
    if spec.static_batch is not None:
        from .passes.static_batch import fix_batch

        traced = dataclasses.replace(traced, weights=fix_batch(traced.model, traced.weights, spec.static_batch))
        inputs = specs_from_onnx(traced.model.graph.input)
    if answer is not None:
        from .postprocessing import add_answer

        add_answer(traced.model, answer)
    file = graph_file("fp32", further)
    entry: dict[str, Any] = {
        "precision": "fp32",
        "opset": spec.opset or OPSET,
        "image_size": list(size),
        "inputs": [spec.to_dict() for spec in inputs],
        "outputs": [spec.to_dict() for spec in specs_from_onnx(traced.model.graph.output)],
        "preprocessing": None if frames is None else frames.entry(),
        **({} if answer is None else {"postprocessing": answer.to_dict()}),
        "reference": reference_file(further),
        "parent": None,
        "passes": [{"name": record.name, "count": record.count} for record in traced.passes],
    }
    complete_header(traced.model, spec.opset)
    if shared is None and weight_bytes(traced.weights) > PROTOBUF_LIMIT:
        shared = WeightFile(draft.path / weights_file("fp32"))
    if shared is None:
        embed_weights(traced.model, traced.weights)
    else:
        entry["weights"] = weights_file("fp32")
        with disk_errors(shared.path, NEW):
            shared.path.parent.mkdir(parents=True, exist_ok=True)
            shared.take(traced.model, traced.weights)
        draft.add(weights_file("fp32"), {}, lambda target: None)  # already written; this records its sha256
    path = draft.path / file
    with disk_errors(path, NEW):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(traced.model.SerializeToString())
    del network, traced  # the weights may be most of the memory, and the comparison loads them once more
    onnx.checker.check_model(str(path), full_check=True)
    _LOG.info("Comparing ONNX with PyTorch%s", at)
    try:
        verdict = check_graph(reference, open_graph, path, file, "fp32")
    except MissingDependencyError:
        entry["agreement"] = "not verified"
    else:
        if not verdict.verified:
            # Some weights amplify rounding beyond any fixed bound: measure how far fp32 PyTorch is from float64 PyTorch.
            reference = _with_noise(SwinNetwork(config, size, checkpoint.tensors, task, target).eval(), reference, frames)
            verdict = dataclasses.replace(
                verdict, tolerances={name: reference.tolerance("fp32", name) for name in reference.outputs}
            )
        if not verdict.verified:
            raise VerificationError(
                f"The ONNX graph disagrees with PyTorch: {verdict.mismatch()}. Nothing was written. Install the versions in "
                f"constraints.txt and, if it persists, report it."
            )
        entry["agreement"] = verdict.to_dict()
    draft.add(file, entry, partial(add_metadata, metadata={**metadata, **graph_facts(entry, target)}))
    draft.add(reference_file(further), {}, reference.save)


def _reference(
    network: SwinNetwork, inputs: tuple[TensorSpec, ...], frames: Frames | None, answer: EmbeddedAnswer | None
) -> Reference:
    import torch

    feeds = sample_inputs(inputs if frames is None else (frames.as_bytes().spec(inputs[0].image_size), *inputs[1:]))
    if frames is not None:
        feeds[PIXELS] = frames.arranged(feeds[PIXELS])
    with torch.no_grad():
        outputs = network.named(*_prepared(feeds, frames))
    arrays = {name: output.contiguous().numpy() for name, output in outputs.items()}
    if answer is not None:
        from .postprocessing import answers_from_logits

        arrays |= answers_from_logits(arrays["logits"], answer)
    return Reference(feeds, arrays)


def _prepared(feeds: Mapping[str, NDArray[Any]], frames: Frames | None) -> list[torch.Tensor]:
    """Return the PyTorch inputs for `feeds`: frames go through the image processor first."""
    import torch

    given = dict(feeds)
    if frames is not None:
        given[PIXELS] = frames.inside(list(frames.pixels(feeds[PIXELS])))
    return [torch.from_numpy(feed) for feed in given.values()]


def _with_noise(network: SwinNetwork, reference: Reference, frames: Frames | None) -> Reference:
    import torch

    from swin_deploy.parity import compare

    feeds = _prepared(reference.feeds, frames)
    with torch.no_grad():
        exact = network.double().named(*(feed.double() if feed.is_floating_point() else feed for feed in feeds))
    noise = {name: compare(reference.outputs[name], output.numpy()).relative_l2 for name, output in exact.items()}
    finite = {name: value for name, value in noise.items() if value != float("inf")}
    return dataclasses.replace(reference, noise=finite)


def _kept(stated: Mapping[str, Any] | None, preprocessor: Preprocessor) -> dict[str, Any] | None:
    """Return the image processor of the checkpoint if it is `preprocessor`, with the size to which the graph needs padding."""
    if stated is not None:
        padded = (
            {"pad_size": dict(zip(("height", "width"), preprocessor.pad_size, strict=True))} if preprocessor.pad_size else {}
        )
        with contextlib.suppress(InputError, TypeError, ValueError):
            if Preprocessor.from_dict({**stated, **padded}, preprocessor.channels) == preprocessor:
                return {**stated, **padded}
    return None


def _left_to_do(processor: Mapping[str, Any], frames: Frames) -> dict[str, Any]:
    """Return `processor` without the steps in the graph, which clients of Hugging Face would repeat.

    They pass bytes unless they rescale, so for a graph of float32 they multiply by 1.
    """
    off: dict[str, Any] = {EMBEDDABLE[step]: False for step in frames.entry()["steps"]}
    off |= {"do_rescale": True, "rescale_factor": 1.0} if frames.layout == "nchw" else {}
    complete = frames.preprocessor
    with contextlib.suppress(InputError, TypeError, ValueError):
        if Preprocessor.from_dict({**processor, **off}, complete.channels) == dataclasses.replace(complete, **off):
            return {**processor, **off}
    return {**complete.to_dict(), **off}


def graph_metadata(checkpoint: Checkpoint, preparation: Preprocessor | Frames, weights_sha256: str) -> Metadata:
    """Return the metadata that the graphs of a checkpoint have in all precisions.

    `preparation` is the preprocessing before the graph, and `weights_sha256` the digests of the checkpoint's files.
    """
    config, task = checkpoint.config, checkpoint.task
    frames = preparation if isinstance(preparation, Frames) else None
    complete = preparation.preprocessor if isinstance(preparation, Frames) else preparation
    mean, scale = mean_and_scale(complete) if frames is None else ((0.0,), (1.0,))
    found = {
        "task": task.name,
        "input_layout": "NCHW" if frames is None else frames.layout.upper(),
        "input_order": {1: "grayscale", 3: "RGB" if frames is None else frames.order.upper()}.get(config.num_channels, ""),
        "input_range": "(pixel - mean) / scale, pixels from 0 to 255" if frames is None else "0 to 255",
        "mean": json.dumps(mean),
        "scale": json.dumps(scale),
        "preprocessing": complete.summary(),
        "source": public_source(checkpoint.source),
        "weights_sha256": weights_sha256,
    }
    if _has_classes(checkpoint):
        found |= {"labels": json.dumps(config.label_lines), "activation": config.score_activation}
        found |= {f"model_info {key}": value for key, value in _model_info(config, complete, frames).items()}
    return {key: value for key, value in found.items() if value}


def mean_and_scale(preprocessor: Preprocessor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return what is subtracted from pixels from 0 to 255, and what they are divided by then: one for all channels, or each."""
    unit = preprocessor.rescale_factor if preprocessor.do_rescale else 1.0
    both = (preprocessor.image_mean, preprocessor.image_std) if preprocessor.do_normalize else ((0.0,), (1.0,))
    mean, scale = (tuple(float(f"{value / unit:.7g}") for value in values) for values in both)
    return mean, scale


def _model_info(config: SwinConfig, preprocessor: Preprocessor, frames: Frames | None) -> Metadata:
    """Return what OpenVINO Model API and DL Streamer read. Both start from BGR images, and split labels at spaces or commas."""
    if config.score_activation == "none":  # both would apply a softmax
        return {}
    found = {
        "model_type": "Classification",
        "labels": " ".join(re.sub(r"[\s,;]+", "_", label) or "_" for label in config.label_lines),
        "resize_type": "standard",
    }
    if frames is None or frames.frame_size is None:
        covers = preprocessor.do_center_crop and (preprocessor.shortest_edge or preprocessor.keep_ratio == "cover")
        letterbox = preprocessor.keep_ratio == "contain"
        found["resize_type"] = "fit_to_window_letterbox" if letterbox else "crop" if covers else "standard"
    if config.num_channels == 3:
        found["reverse_input_channels"] = str(frames is None or frames.order == "rgb")
    if frames is None and config.num_channels == 3:
        for key, values in zip(("mean_values", "scale_values"), mean_and_scale(preprocessor), strict=True):
            found[key] = " ".join(f"{value:.7g}" for value in (values * 3)[:3])
    found["multilabel" if config.prediction == "labels" else "output_raw_scores"] = "True"
    return found


def public_source(source: str) -> str:
    """Return where the weights come from, without the folders of this machine."""
    is_path = os.path.isabs(source) or os.path.lexists(source)  # noqa: PTH117 - the source may be any text
    return (Path(source).name if is_path else source).encode("utf-8", "replace").decode()


def _has_classes(checkpoint: Checkpoint) -> bool:
    return checkpoint.task.name == "image-classification" and checkpoint.config.has_classes


def for_transformers_js(quantized: bool, external: bool) -> dict[str, Any]:
    """Return the entry of config.json for transformers.js. Its default on a CPU is q8: the file model_quantized.onnx.

    Args:
        quantized: Whether that file exists. Otherwise the fp32 graph is named.
        external: Whether graphs have their weights in files of their own.
    """
    return {**({} if quantized else {"dtype": "fp32"}), **({"use_external_data_format": True} if external else {})}


def files_for_transformers_js(bundle: Bundle) -> dict[str, str]:
    """Return the names under which transformers.js opens the graphs of a bundle (fp32, fp16, q8), and the files of the bundle.

    INT8 graphs for ONNX Runtime only: others are slow in onnxruntime-web.
    """
    names = {"fp32": "model", "fp16": "model_fp16", "int8": "model_quantized"}
    graphs = {graph_file(precision): f"onnx/{name}.onnx" for precision, name in names.items()}
    fits = (file for file, entry in bundle.graphs.items() if entry.precision != "int8" or entry.target == "onnxruntime")
    return {graphs[file]: file for file in fits if file in graphs}


def texts_beside(name: str, checkpoint: Checkpoint, preprocessor: Preprocessor, graph: Mapping[str, Any]) -> dict[str, str]:
    """Return the text files of the bundle `name`: the model card, and the labels, one line each."""
    found = {CARD: model_card(name, checkpoint, preprocessor, graph)}
    if _has_classes(checkpoint):
        found[LABELS] = "".join(f"{label}\n" for label in checkpoint.config.label_lines)
    return found


def model_card(name: str, checkpoint: Checkpoint, preprocessor: Preprocessor, graph: Mapping[str, Any]) -> str:
    """Return the README.md of a bundle, with the front matter that the Hugging Face hub reads.

    `graph` is the entry of its first graph in the manifest.
    """
    config, task, source = checkpoint.config, checkpoint.task.name, public_source(checkpoint.source)
    classes = _has_classes(checkpoint)
    front: dict[str, Any] = {
        "library_name": "onnx",
        "pipeline_tag": "image-classification" if classes else "image-feature-extraction",
    }
    if source == checkpoint.source and HUB_ID.fullmatch(source):
        front |= {"base_model": source, "base_model_relation": "quantized"}
    front["tags"] = ["onnx", config.model_type, "vision", "swin-deploy"]
    inputs, outputs = (
        ", ".join(f"{one['name']} {one['dtype']} [{', '.join(map(str, one['shape']))}]" for one in graph[side])
        for side in ("inputs", "outputs")
    )
    quoted = json.dumps(name)
    lines = [
        "---",
        *(f"{key}: {json.dumps(value)}" for key, value in front.items()),  # JSON is YAML, too
        "---",
        "",
        f"# {' '.join(name.split())}",
        "",
        f"ONNX graphs of a Swin Transformer V{config.version} for {task}, exported by swin-deploy from {source}.",
        "`manifest.json` has their distance from PyTorch, and the sha256 of every file.",
        "",
        "| | |",
        "|---|---|",
        f"| inputs | `{inputs}` |",
        f"| outputs | `{outputs}` |",
        f"| image processor | {preprocessor.summary()} |",
    ]
    if classes:
        lines.append(f"| classes | {config.num_labels}, named in `{LABELS}` |")
    method = "classify" if classes else "reconstruct" if task == "masked-image-modeling" else "features"
    lines += ["", "```python", "import swin_deploy", "", f"with swin_deploy.load({quoted}) as model:"]
    return "\n".join([*lines, f'    print(model.{method}("photo.jpg"))', "```", ""])
