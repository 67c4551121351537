"""Export a checkpoint: build the network, trace it to ONNX, compare it with PyTorch, and write the bundle."""

from __future__ import annotations

import contextlib
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
from swin_deploy.dependencies import installed_versions
from swin_deploy.errors import CheckpointError, InputError, MissingDependencyError, UsageError, VerificationError, shown
from swin_deploy.files import json_file
from swin_deploy.frame_input import Frames, refuse_misfit
from swin_deploy.manifest import LARGEST_FRAME, LARGEST_SIDE, EmbeddedAnswer
from swin_deploy.options import LAYOUTS, ORDERS, ExportSpec, Size
from swin_deploy.parity import OpenGraph, Reference, check_graph, sample_inputs
from swin_deploy.preprocess import EMBEDDABLE, Preprocessor, channels_text
from swin_deploy.qat_ranges import RANGES
from swin_deploy.tasks import PIXELS
from swin_deploy.variants import VARIANTS

from .external_data import PROTOBUF_LIMIT, WeightFile, embed_weights, weight_bytes
from .onnx_from_torch import onnx_from_torch
from .passes.base import OPSET, complete_header

if TYPE_CHECKING:
    import torch

    from swin_deploy.models.checkpoints import Checkpoint
    from swin_deploy.models.swin import SwinNetwork

_LOG = logging.getLogger(__name__)
TOOLS = ("swin-deploy", "torch", "onnx", "onnx-graphsurgeon", "onnxruntime", "numpy")


def bundle_from_checkpoint(checkpoint: Checkpoint, path: Path, spec: ExportSpec, open_graph: OpenGraph) -> Bundle:
    """Trace a checkpoint to ONNX, one graph for each image size of `spec`, and write the bundle `path`.

    `open_graph` loads a graph to compare it with PyTorch; without ONNX Runtime graphs are recorded as not verified. Raises
    VerificationError, and writes nothing, if a graph disagrees.
    """
    task, frame_size, target = checkpoint.task, spec.embed_resize, spec.target
    config = checkpoint.config
    stated = preprocessing_of(checkpoint, spec)
    preprocessor = stated.preprocessor
    sizes = tuple(dict.fromkeys(spec.image_sizes)) or (checkpoint.image_size or _image_size(preprocessor, config),)
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
    if _image_size(preprocessor, config) != sizes[0] or (preprocessor.do_pad and preprocessor.pad_size is None):
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
    with create_bundle(path, replace=spec.force, facts=facts) as draft:
        shared = WeightFile(draft.path / weights_file("fp32")) if len(sizes) > 1 else None
        for number, size in enumerate(sizes):
            further = None if number == 0 else size
            _add_graph(draft, checkpoint, spec, size, further, shared, frames[size], answer, open_graph)
        written = config.to_dict()
        own = {key: written[key] for key in OWN_KEYS if key in written}
        draft.add_json(CONFIG, {**(checkpoint.raw_config or written), **own})
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
    draft.add(file, entry, traced.model.SerializeToString())
    del network, traced  # the weights may be most of the memory, and the comparison loads them once more
    gc.collect()  # the nodes that were recorded are reference cycles that hold them
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
    """Return `processor` without the steps in the graph, which clients of Hugging Face would repeat."""
    steps, complete = frames.entry()["steps"], frames.preprocessor
    off = {EMBEDDABLE[step]: False for step in steps}
    with contextlib.suppress(InputError, TypeError, ValueError):
        if Preprocessor.from_dict({**processor, **off}, complete.channels) == complete.with_steps(steps, done=False):
            return {**processor, **off}
    return {**complete.to_dict(), **off}


def _image_size(preprocessor: Preprocessor, config: SwinConfig) -> Size:
    """Return the size that the image processor makes, or that of the configuration where it keeps the aspect ratio."""
    if preprocessor.pad_size is not None:
        return preprocessor.pad_size
    if preprocessor.do_pad and preprocessor.shortest_edge and preprocessor.longest_edge:
        step = preprocessor.size_divisor or 1
        return -(-preprocessor.shortest_edge // step) * step, -(-preprocessor.longest_edge // step) * step
    if preprocessor.do_center_crop and preprocessor.crop_size is not None:
        return preprocessor.crop_size
    if preprocessor.varies and min(config.image_size) != preprocessor.shortest_edge:
        return (preprocessor.shortest_edge or 1,) * 2
    return preprocessor.size if preprocessor.do_resize and preprocessor.shortest_edge is None else config.image_size


# Architecture in torchvision (version, channels of the first stage, depths) -> sides of its resize and crop.
TORCHVISION: Mapping[tuple[int, int, tuple[int, ...]], tuple[int, int]] = {
    (1, 96, (2, 2, 6, 2)): (232, 224),
    (1, 96, (2, 2, 18, 2)): (246, 224),
    (1, 128, (2, 2, 18, 2)): (238, 224),
    (2, 96, (2, 2, 6, 2)): (260, 256),
    (2, 96, (2, 2, 18, 2)): (260, 256),
    (2, 128, (2, 2, 18, 2)): (272, 256),
}
BY_HAND = "State it with --preprocessor FILE, or with --mean, --std and --crop-pct."


@dataclasses.dataclass(frozen=True)
class Stated:
    """A preprocessing and its source, such as "preprocessor_config.json". `assumed` tells what no source states."""

    preprocessor: Preprocessor
    source: str
    assumed: str = ""
    unsupported: str = ""  # why the stated steps are not used

    def warning(self, used: Preprocessor) -> str:
        """Return what is assumed, with the steps of `used`, which may be for another image size. Empty if nothing is."""
        return self.assumed and f"{self.assumed}: {used.summary()}. {BY_HAND}"


def preprocessing_of(checkpoint: Checkpoint, spec: ExportSpec) -> Stated:
    """Return the preprocessing that the options, the checkpoint or its framework state, in this order."""
    channels = checkpoint.config.num_channels
    if spec.preprocessor is not None:
        found = Stated(_from_file(Path(spec.preprocessor), checkpoint.config), f"--preprocessor {spec.preprocessor}")
    else:
        try:
            found = _from_checkpoint(checkpoint)
        except (InputError, TypeError, ValueError) as error:
            if not checkpoint.parent or checkpoint.preprocessor is None:
                raise CheckpointError(f"{checkpoint.source}: {error}") from error
            found = _plain(checkpoint, str(error))
    made, assumed = found.preprocessor, found.assumed
    if spec.crop_pct is not None:
        made = made.with_crop(_image_size(made, checkpoint.config), spec.crop_pct)
    flags = [f"--{name.replace('_', '-')}" for name in ("mean", "std", "crop_pct") if getattr(spec, name) is not None]
    statistics = {"mean": made.image_mean, "std": made.image_std}
    if made.channels != channels:
        by_file = checkpoint.preprocessor is not None or spec.preprocessor is not None
        same = all(len(set(values)) == 1 for values in statistics.values()) or not made.do_normalize
        if not same and not (spec.mean and spec.std):
            if by_file and not (spec.mean or spec.std):
                raise CheckpointError(
                    f"The mean and std of {found.source} are for {channels_text(made.channels)}, and this network expects "
                    f"images with {channels_text(channels)}. Pass --mean and --std with one value for each channel."
                )
            assumed = assumed or f"values for {channels_text(channels)}"
        plain = {name: sum(values) / len(values) if same or channels == 1 else 0.5 for name, values in statistics.items()}
        statistics = {name: (round(value, 6),) * channels for name, value in plain.items()}
    for name in ("mean", "std"):
        given = getattr(spec, name) or statistics[name]
        if len(given) not in (1, channels):
            raise UsageError(
                f"--{name} has {len(given)} values, and this network expects images with {channels_text(channels)}. Pass one "
                f"value for each channel, or one for all."
            )
        statistics[name] = (given * channels)[:channels]
    try:
        normalize = made.do_normalize or bool(spec.mean or spec.std)
        made = dataclasses.replace(made.with_statistics(statistics["mean"], statistics["std"]), do_normalize=normalize)
    except InputError as error:
        raise UsageError(f"--mean and --std: {error}") from error
    if assumed and len(flags) < 3:
        what = "how images are resized" if spec.mean and spec.std else "its preprocessing"
        assumed = f"{found.unsupported or f'The checkpoint does not state {what}.'} Assumed {assumed}"
    source = f"{', '.join(flags)}; the rest: {found.source}" if flags else found.source
    return Stated(made, source, assumed if len(flags) < 3 else "")


def _plain(checkpoint: Checkpoint, reason: str) -> Stated:
    """Return a plain resize with the normalization of an image processor whose other steps are not supported."""
    names = ("image_mean", "image_std", "resample", "do_normalize", "do_rescale", "rescale_factor")
    raw = {name: value for name in names if (value := (checkpoint.preprocessor or {}).get(name)) is not None}
    try:
        made = Preprocessor.from_dict({**raw, "size": list(checkpoint.config.image_size)}, checkpoint.config.num_channels)
    except (InputError, TypeError, ValueError) as error:
        raise CheckpointError(f"{checkpoint.source}: {error}") from error
    what = f"The model's image processor has steps that are not supported ({reason.rstrip('.')})."
    return Stated(made, "preprocessor_config.json, in part", "a plain resize", what)


def _from_file(path: Path, config: SwinConfig) -> Preprocessor:
    """Read --preprocessor FILE, of transformers or timm."""
    raw = json_file(path, UsageError, "Pass a preprocessor_config.json, or timm's config.json.")
    try:
        if isinstance(raw, Mapping) and ("pretrained_cfg" in raw or "architecture" in raw or "mean" in raw):
            return _from_timm(raw.get("pretrained_cfg") or raw, config)
        return Preprocessor.from_dict(raw, config.num_channels)
    except (InputError, TypeError, ValueError) as error:
        raise UsageError(f"{path}: {error}") from error


def _from_timm(stated: Any, config: SwinConfig) -> Preprocessor:
    if not isinstance(stated, Mapping):
        raise InputError(f"Invalid pretrained_cfg: {shown(repr(stated))}. Expected a JSON object.")
    sizes = [stated.get(name) for name in ("test_input_size", "input_size")]
    if not all(isinstance(size, list | tuple | None) for size in sizes):
        raise InputError(f"Invalid input_size: {shown(repr(sizes))}. Expected a list of channels, height and width.")
    tested, trained = (size and tuple(size[1:]) for size in sizes)
    if tested and stated.get("test_crop_pct") and tested == config.image_size != trained:
        stated = {**stated, "crop_pct": stated["test_crop_pct"]}
    return Preprocessor.from_timm(stated, config.image_size, config.num_channels)


def _from_checkpoint(checkpoint: Checkpoint) -> Stated:
    config, extras = checkpoint.config, checkpoint.extras
    if checkpoint.preprocessor is not None:
        return Stated(Preprocessor.from_dict(checkpoint.preprocessor, config.num_channels), "preprocessor_config.json")
    if isinstance(stated := extras.get("pretrained_cfg"), Mapping):
        return Stated(_from_timm(stated, config), "pretrained_cfg in timm's config.json")
    if checkpoint.parent:
        made = Preprocessor.imagenet(config.image_size)
        return Stated(made, "the default of models with a Swin inside", "a plain resize with ImageNet's mean and std")
    side = max(config.image_size)
    if checkpoint.writer == "timm":
        arguments = {name: value for name, value in _members(extras.get("args")).items() if value}
        made = _from_timm({"crop_pct": 0.9 if side < 384 else 1.0, **arguments}, config)
        if arguments.keys() & {"mean", "std", "crop_pct", "interpolation"}:
            return Stated(made, "the arguments of timm's training script in the checkpoint")
        return Stated(made, "timm's default", "timm's default for Swin")
    if checkpoint.writer == "torchvision":
        known = TORCHVISION.get((config.version, config.embed_dim, config.depths))
        resized, side = known or (side * 256 // 224, side)
        made = _resized_and_cropped(side, resized)
        made = made.with_size(config.image_size)
        source = "torchvision's transform of this architecture" if known else "torchvision's default"
        return Stated(made, source, "" if known else source)
    if checkpoint.writer == "microsoft":
        data, test = (_members(_members(extras.get("config")).get(part)) for part in ("DATA", "TEST"))
        crop = test.get("CROP", side < 384)  # the published configurations for 384 pixels do not crop
        made = _resized_and_cropped(side, side * 256 // 224) if crop else Preprocessor.imagenet(config.image_size)
        made = made.with_size(config.image_size)
        made = dataclasses.replace(made, resample=data.get("INTERPOLATION") or made.resample)
        if "CROP" in test:
            return Stated(made, "the config in Microsoft's checkpoint (TEST.CROP)")
        published = any(
            (one.embed_dim, one.depths, one.num_heads, (one.image_size,) * 2, one.num_labels)
            == (config.embed_dim, config.depths, config.num_heads, config.image_size, config.num_labels)
            for one in VARIANTS
        )
        source = "the default of Microsoft's code"
        return Stated(made, source, "" if published else source)
    made = Preprocessor.imagenet(config.image_size)
    source = "the published Swin checkpoints" if checkpoint.writer else "random weights"
    return Stated(made, source, f"that of {source}" if checkpoint.writer else "")


def _resized_and_cropped(crop: int, resized: int) -> Preprocessor:
    """Return torchvision's transform: resize the shorter side, crop the center, normalize as for ImageNet."""
    return dataclasses.replace(
        Preprocessor.imagenet(crop), shortest_edge=resized, do_center_crop=True, crop_size=(crop, crop), round_crop=True
    )


def _members(value: Any) -> Mapping[str, Any]:
    """Return the items of a dictionary, or the attributes of an object that was read as a placeholder."""
    value = value if isinstance(value, Mapping) else getattr(value, "state", None)
    return value if isinstance(value, Mapping) else {}
