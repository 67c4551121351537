"""Find and load the checkpoint that an export names."""

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
from swin_deploy.errors import CheckpointError, UsageError
from swin_deploy.options import ExportSpec, Size
from swin_deploy.tasks import TaskSpec
from swin_deploy.variants import Variant, find_variant

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
