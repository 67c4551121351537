"""Find and load the checkpoint that an export names, and find its preprocessing."""

from __future__ import annotations

import dataclasses
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swin_deploy.bundle import Bundle
from swin_deploy.config import SwinConfig
from swin_deploy.dependencies import require
from swin_deploy.errors import CheckpointError, InputError, UsageError, shown
from swin_deploy.files import json_file
from swin_deploy.options import ExportSpec, Size
from swin_deploy.preprocess import Preprocessor, channels_text
from swin_deploy.tasks import TaskSpec
from swin_deploy.variants import VARIANTS, Variant, find_variant

if TYPE_CHECKING:
    from swin_deploy.models.checkpoints import Checkpoint

_LOG = logging.getLogger(__name__)
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

# Fields in which a checkpoint must equal the variant that was named with it.
ARCHITECTURE = ("version", "patch_size", "num_channels", "embed_dim", "depths", "num_heads")


def bundle_name(variant_name: str | None, weights: str | os.PathLike[str] | None) -> str:
    """Return the default name of the bundle. Raises UsageError if there is nothing to export or the variant is unknown."""
    if variant_name is not None:
        find_variant(variant_name)
    elif weights is None:
        raise UsageError('Nothing to export. Pass --variant NAME (see "swin-deploy variants"), or --weights PATH.')
    else:
        path = Path(os.path.realpath(str(weights)))
        variant_name = path.stem if os.path.isfile(path) else path.name  # noqa: PTH113 - as below
    return variant_name.rsplit("/", 1)[-1]


def spec_of_export(bundle: Bundle, weights: str | os.PathLike[str], size: Size) -> ExportSpec:
    """Return the options with which the checkpoint `weights` is the network of `bundle`, for images of `size`."""
    config = bundle.config
    return ExportSpec(
        weights=weights,
        task=bundle.task,
        image_sizes=[size],
        framework=bundle.manifest.semantics,
        weights_key=bundle.manifest.weights_key,
        head_activation=config.head_act if config.head_widths else None,
        always_partition=config.always_partition,
    )


def checkpoint_from_request(spec: ExportSpec) -> Checkpoint:
    """Load the checkpoint that `spec` names.

    If the spec asks for window sizes that the checkpoint does not have, or names a variant with other windows than the
    weights, the position tables are resized, for the first image size of the spec.
    """
    if spec.weights is not None and spec.random_weights:
        raise UsageError("--weights and --random-weights exclude each other. Pass one of them.")
    if spec.seed and not spec.random_weights:
        raise UsageError(f"The seed {spec.seed} has no effect without random weights. Add --random-weights, or leave it out.")
    variant = None if spec.variant is None else find_variant(spec.variant)
    require("torch", "export a model")
    from swin_deploy.models import checkpoints

    image_size = spec.image_sizes[0] if spec.image_sizes else None
    names = ("framework", "weights_key", "head_activation", "always_partition")
    options = {name: getattr(spec, name) for name in names} | {"image_size": image_size}
    if spec.weights is None:
        if variant is None:
            raise UsageError('Nothing to export. Pass --variant NAME (see "swin-deploy variants"), or --weights PATH.')
        task = spec.task_spec()
        if variant.task == "masked-image-modeling" and task.name == "image-classification":
            raise UsageError(
                f"{variant.name} was published for masked image modeling and has no classes. Export it with "
                f"--task masked-image-modeling, feature-extraction or backbone."
            )
        if spec.random_weights:
            config = dataclasses.replace(
                variant.config(), framework=spec.framework or "hf", always_partition=spec.always_partition
            )
            checkpoint = checkpoints.random_checkpoint(config, task, spec.seed)
        else:
            checkpoint = _from_hub(variant, task, options)
    else:
        weights = str(spec.weights)
        if os.path.exists(weights):  # noqa: PTH110 - Path.exists raises for a name that is too long
            checkpoint = checkpoints.checkpoint_from_path(Path(weights), spec.task_spec, **options)
        elif HUB_ID.fullmatch(weights) and not weights.startswith("."):
            checkpoint = checkpoints.checkpoint_from_hub(weights, spec.task_spec, **options)
        else:
            raise CheckpointError(
                f"There is no checkpoint {weights}. Expected a folder, a file, or a hub id such as "
                f"microsoft/swinv2-tiny-patch4-window8-256."
            )
    window_size, pretrained = spec.window_size, spec.pretrained_window_sizes
    if variant is not None:
        _check_same(variant, checkpoint.config)
        if spec.weights is not None and window_size is None and not _same_windows(variant, checkpoint.config):
            wanted = variant.config()
            window_size, image_size = wanted.window_size, image_size or wanted.image_size
            if wanted.version == 2:
                pretrained = pretrained or wanted.pretrained_window_sizes
    if window_size or pretrained:
        checkpoint = checkpoints.resize_windows(
            checkpoint, window_size=window_size, pretrained_window_sizes=pretrained, image_size=image_size
        )
    checkpoint = _with_predictions(checkpoint, spec)
    for note in checkpoint.notes:
        _LOG.info("Note: %s", note)
    return checkpoint


def _with_predictions(checkpoint: Checkpoint, spec: ExportSpec) -> Checkpoint:
    """Return `checkpoint` with the labels and the activation that `spec` names."""
    config, raw, notes = checkpoint.config, dict(checkpoint.raw_config or {}), checkpoint.notes
    if (spec.labels, spec.activation) == (None, None):
        return checkpoint
    if checkpoint.task.name != "image-classification" or not config.has_classes:
        raise UsageError("--labels and --activation apply to networks with classes, and this one has none. Leave them out.")
    if spec.activation == "softmax" and config.num_labels == 1:
        raise UsageError("The softmax of one class is always 1. Choose --activation sigmoid or none.")
    config = dataclasses.replace(config, activation=spec.activation or config.activation)
    if spec.labels is not None:
        from swin_deploy.calib.labels import class_names

        labels, note = class_names(spec.labels, config.num_labels)
        config, notes = dataclasses.replace(config, id2label=labels), (*notes, *((note,) if note else ()))
    if raw:
        written = config.to_dict()
        raw |= {key: written[key] for key in ("id2label", "label2id")}
    return dataclasses.replace(checkpoint, config=config, raw_config=raw or None, notes=notes)


def _from_hub(variant: Variant, task: TaskSpec, options: Mapping[str, Any]) -> Checkpoint:
    from swin_deploy.models.checkpoints import checkpoint_from_hub

    hub_id = variant.hub_id or (variant.timm_name and f"timm/{variant.timm_name}")
    if hub_id is None:
        raise CheckpointError(
            f"{variant.name} is in no hub repository. Pass its file with --weights FILE, or try the pipeline with "
            f"--random-weights."
        )
    _LOG.info("Looking for %s in the Hugging Face cache, then on the hub", hub_id)
    return checkpoint_from_hub(hub_id, task, **options)


def _same_windows(variant: Variant, config: SwinConfig) -> bool:
    """Return whether checkpoint and variant have the same windows at the image size of the variant."""
    wanted = dataclasses.replace(variant.config(), framework=config.framework)
    return all(wanted.table_window(stage) == config.table_window(stage) for stage in range(len(config.depths)))


def _check_same(variant: Variant, config: SwinConfig) -> None:
    asked = dataclasses.asdict(variant.config())
    given = dataclasses.asdict(config)
    for field in ARCHITECTURE:
        if asked[field] != given[field]:
            raise CheckpointError(
                f"The checkpoint is not a {variant.name}: its {field} is {given[field]}, not {asked[field]}. "
                f"Leave out --variant to export the checkpoint as it is."
            )


def natural_size(preprocessor: Preprocessor, config: SwinConfig) -> Size:
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
        made = made.with_crop(natural_size(made, checkpoint.config), spec.crop_pct)
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
