"""Export a checkpoint: build the network, trace it to ONNX, compare it with PyTorch, and write the bundle."""

from __future__ import annotations

import dataclasses
import gc
import logging
import os
from collections.abc import Mapping
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
    size_text,
    specs_from_onnx,
    weights_file,
)
from swin_deploy.config import OWN_KEYS, SwinConfig
from swin_deploy.dependencies import installed_versions, require
from swin_deploy.errors import CheckpointError, InputError, MissingDependencyError, UsageError, VerificationError
from swin_deploy.frame_input import Frames, refuse_misfit
from swin_deploy.options import ExportSpec, Size
from swin_deploy.parity import OpenGraph, Reference, check_graph, sample_inputs
from swin_deploy.preprocess import Preprocessor
from swin_deploy.qat_ranges import RANGES
from swin_deploy.tasks import PIXELS

from .external_data import WeightFile, embed_weights, weight_bytes
from .onnx_from_torch import OPSET, onnx_from_torch

if TYPE_CHECKING:
    import torch

    from swin_deploy.models.checkpoints import Checkpoint
    from swin_deploy.models.swin import SwinNetwork

_LOG = logging.getLogger(__name__)
TOOLS = ("swin-deploy", "torch", "onnx", "onnxscript", "onnx-graphsurgeon", "onnxruntime", "numpy")
LARGEST_SIDE = 4096  # pixels; a larger graph would not fit into memory
LARGEST_FRAME = 32768
PROTOBUF_LIMIT = 2_000_000_000  # bytes; a protobuf message is limited to 2 GiB, and the graph itself needs some


def bundle_from_checkpoint(checkpoint: Checkpoint, path: Path, spec: ExportSpec, open_graph: OpenGraph) -> Bundle:
    """Trace a checkpoint to ONNX, one graph for each image size of `spec`, and write the bundle `path`.

    `open_graph` loads a graph to compare it with PyTorch; without ONNX Runtime graphs are recorded as not verified. Raises
    VerificationError, and writes nothing, if a graph disagrees.
    """
    for module in ("torch", "onnx", "onnxscript", "onnx_graphsurgeon"):
        require(module, "export a model")
    task, frame_size, target = spec.task_spec(), spec.embed_resize, spec.target
    config = checkpoint.config
    preprocessor = _preprocessor(checkpoint)
    sizes = tuple(dict.fromkeys(spec.image_sizes)) or (_image_size(preprocessor, config),)
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
    processor = _preprocessor_config(checkpoint, preprocessor, sizes[0])
    preparations = {size: Preprocessor.from_dict(processor) for size in sizes[:1]}
    preparations |= {size: preparations[sizes[0]].with_size(size) for size in sizes[1:]}
    embedded = spec.embed_preprocess or frame_size is not None
    frames = {size: Frames(one, frame_size) if embedded else None for size, one in preparations.items()}
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
        "notes": list(checkpoint.notes),
        "tools": installed_versions(TOOLS),
    }
    with create_bundle(path, replace=spec.force, facts=facts) as draft:
        shared = WeightFile(draft.path / weights_file("fp32")) if len(sizes) > 1 else None
        for number, size in enumerate(sizes):
            further = None if number == 0 else size
            _add_graph(draft, checkpoint, spec, size, further, shared, frames[size], open_graph)
        written = config.to_dict()
        own = {key: written[key] for key in OWN_KEYS if key in written}
        draft.add_json(CONFIG, {**(checkpoint.raw_config or written), **own})
        if checkpoint.ranges is not None:
            draft.add(RANGES, {}, checkpoint.ranges.to_json().encode())
        draft.add_json(PREPROCESSOR, processor)
    return Bundle.open(path)


def _add_graph(
    draft: Draft,
    checkpoint: Checkpoint,
    spec: ExportSpec,
    size: Size,
    further: Size | None,
    shared: WeightFile | None,
    frames: Frames | None,
    open_graph: OpenGraph,
) -> None:
    """Add the graph for images of `size` and its reference outputs; `further` is the size in file names, None for the first.

    With `frames` the graph takes camera frames, and PyTorch runs on what the image processor makes of them.
    """
    import onnx

    from swin_deploy.models.frame_embedding import accept_frames
    from swin_deploy.models.swin import SwinNetwork

    config, task, target = checkpoint.config, spec.task_spec(), spec.target
    at = f" at {size_text(size)}" if shared else ""
    _LOG.info("Loading %s%s", checkpoint.source, at)
    network = SwinNetwork(config, size, checkpoint.tensors, task, target).eval()
    _LOG.info("Running PyTorch on the reference inputs%s", at)
    frame_size = None if frames is None else frames.frame_size or size
    inputs = task.inputs(config, size, frame_size)
    reference = _reference(network, inputs, frames)
    _LOG.info("Tracing to ONNX%s", at)
    if frames is not None:
        accept_frames(network, size, checkpoint.tensors, frames)
    traced = onnx_from_torch(network, size, frame_size)
    file = graph_file("fp32", further)
    entry: dict[str, Any] = {
        "precision": "fp32",
        "opset": OPSET,
        "image_size": list(size),
        "inputs": [spec.to_dict() for spec in inputs],
        "outputs": [spec.to_dict() for spec in specs_from_onnx(traced.model.graph.output)],
        "preprocessing": None if frames is None else frames.entry(),
        "reference": reference_file(further),
        "parent": None,
        "passes": [{"name": record.name, "count": record.count} for record in traced.passes],
    }
    # With a stored shape for every value, whose batch is free, ONNX Runtime plans its memory 5 to 13 % slower.
    del traced.model.graph.value_info[:]
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
    draft.add(file, entry, traced.model.SerializeToString())
    del network, traced  # the weights may be most of the memory, and the comparison loads them once more
    gc.collect()  # torch.export leaves reference cycles that hold them
    onnx.checker.check_model(str(draft.path / file), full_check=True)
    _LOG.info("Comparing ONNX with PyTorch%s", at)
    try:
        verdict = check_graph(reference, open_graph, draft.path / file, file, "fp32")
    except MissingDependencyError:
        draft.files[file]["agreement"] = "not verified"
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
        draft.files[file]["agreement"] = verdict.to_dict()
    draft.add(reference_file(further), {}, reference.save)


def _reference(network: SwinNetwork, inputs: tuple[TensorSpec, ...], frames: Frames | None) -> Reference:
    import torch

    feeds = sample_inputs(inputs)
    with torch.no_grad():
        outputs = network.named(*_prepared(feeds, frames))
    return Reference(feeds, {name: output.contiguous().numpy() for name, output in outputs.items()})


def _prepared(feeds: Mapping[str, NDArray[Any]], frames: Frames | None) -> list[torch.Tensor]:
    """Return the PyTorch inputs for `feeds`: frames go through the image processor first."""
    import torch

    given = dict(feeds)
    if frames is not None:
        given[PIXELS] = frames.inside(list(feeds[PIXELS]))
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


def _image_size(preprocessor: Preprocessor, config: SwinConfig) -> Size:
    """Return the size that the image processor makes, or that of the configuration where it keeps the aspect ratio."""
    if preprocessor.do_center_crop and preprocessor.crop_size is not None:
        return preprocessor.crop_size
    return preprocessor.size if preprocessor.do_resize and preprocessor.shortest_edge is None else config.image_size


def _preprocessor_config(checkpoint: Checkpoint, preprocessor: Preprocessor, size: Size) -> dict[str, Any]:
    """Return preprocessor_config.json for the bundle: that of the checkpoint, adjusted if the graph has another size."""
    if checkpoint.preprocessor is not None and _image_size(preprocessor, checkpoint.config) == size:
        return dict(checkpoint.preprocessor)
    if preprocessor.do_center_crop:
        return dataclasses.replace(preprocessor, crop_size=size).to_dict()
    return dataclasses.replace(preprocessor, size=size, shortest_edge=None).to_dict()


def _preprocessor(checkpoint: Checkpoint) -> Preprocessor:
    config = checkpoint.config
    found = checkpoint.preprocessor
    if found is None:
        if not checkpoint.source.startswith("random weights"):
            _LOG.info(
                "The checkpoint has no preprocessor_config.json; using that of the published Swins (bicubic, ImageNet mean)"
            )
        return Preprocessor.imagenet(config.image_size)
    kind = str(found.get("image_processor_type") or found.get("feature_extractor_type") or "ViTImageProcessor")
    if not kind.startswith("ViT"):
        raise CheckpointError(
            f"preprocessor_config.json names {kind}; swin-deploy reproduces ViTImageProcessor, which every published Swin "
            f"uses. Replace the file by one of that kind if the model was trained so."
        )
    try:
        return Preprocessor.from_dict(found)
    except InputError as error:
        raise CheckpointError(f"preprocessor_config.json: {error}") from error
