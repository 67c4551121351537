"""A checkpoint -> a bundle: networks, ONNX graphs, PyTorch's answers, comparison; nothing is kept unless all of it holds."""

from __future__ import annotations

import dataclasses
import gc
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from swin_deploy.bundle import CONFIG, NEW, PREPROCESSOR, Bundle, Draft, create_bundle, disk_errors
from swin_deploy.config import SwinConfig
from swin_deploy.dependencies import installed_versions, require
from swin_deploy.errors import CheckpointError, InputError, MissingDependencyError, UsageError, VerificationError
from swin_deploy.frame_input import Frames, refuse_misfit
from swin_deploy.parity import OpenGraph, Reference, check_graph, sample_inputs
from swin_deploy.preprocess import Preprocessor
from swin_deploy.qat_ranges import RANGES
from swin_deploy.specs import TARGETS, Size, TensorSpec, graph_file, reference_file, size_text, specs_from_onnx, weights_file
from swin_deploy.tasks import PIXELS, TaskSpec

from .external_data import WeightFile, embed_weights, weight_bytes
from .onnx_from_torch import OPSET, onnx_from_torch, writer
from .typed_graphs import bytes_writer

if TYPE_CHECKING:
    import torch

    from swin_deploy.models.checkpoints import Checkpoint
    from swin_deploy.models.swin import SwinNetwork

Say = Callable[[str], None]
TOOLS = ("swin-deploy", "torch", "onnx", "onnxscript", "onnx-graphsurgeon", "onnxruntime", "numpy")
LARGEST_SIDE = 4096  # pixels; a graph for more than that would not fit into memory
LARGEST_FRAME = 32768
PROTOBUF_LIMIT = 2_000_000_000  # bytes; a protobuf message ends at 2 GiB, and the graph itself needs some


def bundle_from_checkpoint(
    checkpoint: Checkpoint,
    path: Path,
    *,
    variant: str | None,
    task: TaskSpec,
    image_sizes: Sequence[Size],
    target: str = TARGETS[0],
    embed_preprocess: bool = False,
    frame_size: Size | None = None,
    replace: bool,
    open_graph: OpenGraph,
    say: Say,
) -> Bundle:
    """The bundle at `path`, with a graph in `target`'s form for each of `image_sizes` (none given: the checkpoint's own).

    With `embed_preprocess` the graphs take uint8 frames [batch, height, width, 3], and with `frame_size` such of that size,
    which they resize as the image processor does.
    `open_graph` loads the graphs to be compared; without ONNX Runtime they are kept as not verified. `say` gets a line for
    each step. Raises VerificationError, and writes nothing, when ONNX and PyTorch disagree.
    """
    if target not in TARGETS:
        raise UsageError(f'There is no target "{target}". There are: {", ".join(TARGETS)}.')
    for module in ("torch", "onnx", "onnxscript", "onnx_graphsurgeon"):
        require(module, "export a model")
    config = checkpoint.config
    preprocessor = _preprocessor(checkpoint, say)
    sizes = tuple(dict.fromkeys(image_sizes)) or (_image_size(preprocessor, config, say),)
    if (largest := max(max(size) for size in sizes)) > LARGEST_SIDE:
        raise UsageError(f"An image side of {largest} pixels was asked for; at most {LARGEST_SIDE} are supported.")
    if frame_size is not None and max(frame_size) > LARGEST_FRAME:
        raise UsageError(f"Frames of {size_text(frame_size)} pixels were asked for; a side may have at most {LARGEST_FRAME}.")
    if frame_size is not None and len(sizes) > 1:
        raise UsageError(
            f"Frames of {size_text(frame_size)} can be resized in one graph only, and {len(sizes)} image sizes are asked for. "
            f"Export one bundle for each."
        )
    processor = _preprocessor_config(checkpoint, preprocessor, sizes[0])
    preparations = {size: Preprocessor.from_dict(processor) for size in sizes[:1]}
    preparations |= {size: preparations[sizes[0]].with_size(size) for size in sizes[1:]}
    frames = {size: Frames(one, frame_size) if embed_preprocess else None for size, one in preparations.items()}
    for size, one in frames.items():
        if one is not None:
            refuse_misfit(one, size, config.num_channels)
    facts = {
        "name": Path(os.path.realpath(path)).name,
        "variant": variant,
        "task": task.to_dict(),
        "semantics": config.semantics,
        "target": target,
        "source": checkpoint.source,
        "notes": list(checkpoint.notes),
        "tools": installed_versions(TOOLS),
    }
    with create_bundle(path, replace=replace, facts=facts) as draft:
        shared = WeightFile(draft.path / weights_file("fp32")) if len(sizes) > 1 else None
        for number, size in enumerate(sizes):
            further = None if number == 0 else size
            _add_graph(draft, checkpoint, task, size, target, further, shared, frames[size], open_graph, say)
        raw = dict(checkpoint.raw_config or config.to_dict())
        draft.add_json(CONFIG, raw if config.semantics == "hf" else {**raw, "semantics": config.semantics})
        if checkpoint.ranges is not None:
            draft.add(RANGES, {}, bytes_writer(checkpoint.ranges.to_json().encode()))
        draft.add_json(PREPROCESSOR, processor)
    return Bundle.open(path)


def _add_graph(
    draft: Draft,
    checkpoint: Checkpoint,
    task: TaskSpec,
    size: Size,
    target: str,
    further: Size | None,
    shared: WeightFile | None,
    frames: Frames | None,
    open_graph: OpenGraph,
    say: Say,
) -> None:
    """Makes the graph for images of `size` and its certificate; `further` is the size in their names, None for the first.

    With `frames` it takes these; PyTorch answers for what the image processor makes of them.
    """
    import onnx

    from swin_deploy.models.frame_embedding import take_frames
    from swin_deploy.models.swin import SwinNetwork

    config = checkpoint.config
    at = f" at {size_text(size)}" if shared else ""
    say(f"Loading {checkpoint.source}{at}")
    network = SwinNetwork(config, size, checkpoint.tensors, task, target).eval()
    say(f"Running PyTorch on the reference inputs{at}")
    frame_size = None if frames is None else frames.frame_size or size
    inputs = task.inputs(config, size, frame_size)
    reference = _reference(network, inputs, frames)
    say(f"Tracing to ONNX{at}")
    if frames is not None:
        take_frames(network, size, checkpoint.tensors, frames)
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
    # Told the shape of every value with its free batch, ONNX Runtime plans its memory by them, and is 5 to 13 % slower.
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
        draft.add(weights_file("fp32"), {}, lambda target: None)  # it is there already; this takes its sha256
    draft.add(file, entry, writer(traced.model))
    del network, traced  # the weights may be most of the memory, and the comparison loads them once more
    gc.collect()  # torch.export leaves circles that hold them
    onnx.checker.check_model(str(draft.path / file), full_check=True)
    say(f"Comparing ONNX with PyTorch{at}")
    try:
        verdict = check_graph(reference, open_graph, draft.path / file, file, "fp32")
    except MissingDependencyError:
        draft.files[file]["agreement"] = "not verified"
    else:
        if not verdict.verified:
            # Some weights amplify rounding beyond any fixed bound; how far PyTorch is from itself in float64 tells.
            reference = _with_noise(SwinNetwork(config, size, checkpoint.tensors, task, target).eval(), reference, frames)
            verdict = dataclasses.replace(
                verdict, tolerances={name: reference.tolerance("fp32", name) for name in reference.outputs}
            )
        if not verdict.verified:
            raise VerificationError(
                f"The ONNX graph does not answer as PyTorch does: {verdict.complaint()}. Nothing was written. Install the "
                f"versions in constraints.txt, and please report it."
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
    """What PyTorch's network is given for `feeds`: frames go through the image processor first."""
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


def _image_size(preprocessor: Preprocessor, config: SwinConfig, say: Say) -> Size:
    """What the checkpoint's image processor makes of every image, which is what its network is run at."""
    if preprocessor.do_center_crop and preprocessor.crop_size is not None:
        size = preprocessor.crop_size
    elif preprocessor.do_resize and preprocessor.shortest_edge is None:
        size = preprocessor.size
    else:
        return config.image_size
    if size != config.image_size:
        say(f"The image processor makes images of {size_text(size)} pixels, and so the graph is made for that size")
    return size


def _preprocessor_config(checkpoint: Checkpoint, preprocessor: Preprocessor, size: Size) -> dict[str, Any]:
    """preprocessor_config.json for the bundle: the checkpoint's own, unless the graph is for another size than it makes."""
    if checkpoint.preprocessor is not None and _image_size(preprocessor, checkpoint.config, lambda line: None) == size:
        return dict(checkpoint.preprocessor)
    if preprocessor.do_center_crop:
        return dataclasses.replace(preprocessor, crop_size=size).to_dict()
    return dataclasses.replace(preprocessor, size=size, shortest_edge=None).to_dict()


def _preprocessor(checkpoint: Checkpoint, say: Say) -> Preprocessor:
    config = checkpoint.config
    found = checkpoint.preprocessor
    if found is None:
        if not checkpoint.source.startswith("random weights"):
            say("The checkpoint has no preprocessor_config.json; taking the published one of Swin (bicubic, ImageNet mean)")
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
