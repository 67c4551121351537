"""What the user asked to export -> the name of the bundle it makes, and the checkpoint it means."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from swin_deploy.config import SwinConfig
from swin_deploy.dependencies import require
from swin_deploy.errors import CheckpointError, UsageError
from swin_deploy.specs import Size
from swin_deploy.tasks import TaskSpec
from swin_deploy.variants import Variant, find_variant

if TYPE_CHECKING:
    from swin_deploy.models.checkpoints import Checkpoint

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

# What must agree between a variant asked for by name and the checkpoint given for it.
ARCHITECTURE = ("version", "patch_size", "num_channels", "embed_dim", "depths", "num_heads")


def bundle_name(variant_name: str | None, weights: str | os.PathLike[str] | None) -> str:
    """What the bundle is called where nobody says otherwise.

    Raises UsageError when nothing is to be exported, or a variant that there is not.
    """
    if variant_name is not None:
        find_variant(variant_name)
    elif weights is None:
        raise UsageError('Nothing to export: give --variant NAME (see "swin-deploy variants"), or --weights FOLDER.')
    else:
        path = Path(os.path.realpath(str(weights)))
        variant_name = path.stem if os.path.isfile(path) else path.name  # noqa: PTH113 - as below
    return variant_name.rsplit("/", 1)[-1]


def checkpoint_from_request(
    variant_name: str | None,
    weights: str | os.PathLike[str] | None,
    random_weights: bool,
    seed: int,
    task: TaskSpec,
    image_size: Size | None,
    semantics: str | None,
    window_size: tuple[int, ...] | None,
    pretrained_window_sizes: tuple[int, ...] | None,
    say: Callable[[str], None],
) -> Checkpoint:
    """The checkpoint to export. Raises UsageError when the request names two.

    Where windows are asked for that the checkpoint does not have, or those of a variant whose weights are given, the network
    is one built for these windows, and for `image_size` where that is given.
    """
    if weights is not None and random_weights:
        raise UsageError("--weights and --random-weights exclude each other: give one of them.")
    if seed and not random_weights:
        raise UsageError(f"A seed of {seed} is given, and the weights are not random. Add --random-weights, or leave it out.")
    if seed < 0:
        raise UsageError(f"The seed is {seed}, and must be 0 or more.")
    variant = None if variant_name is None else find_variant(variant_name)
    require("torch", "export a model")
    from swin_deploy.models import checkpoints

    if weights is None:
        assert variant is not None
        if variant.task == "masked-image-modeling" and task.name == "image-classification":
            raise UsageError(
                f"{variant.name} was published for masked image modelling and has no classes. Export it with "
                f"--task masked-image-modeling, or as --task feature-extraction or backbone."
            )
        if random_weights:
            config = dataclasses.replace(variant.config(), semantics=semantics or "hf")
            checkpoint = checkpoints.random_checkpoint(config, task, seed)
        else:
            checkpoint = _from_hub(variant, task, image_size, semantics, say)
    else:
        folder = Path(weights)
        if os.path.exists(folder):  # noqa: PTH110 - Path.exists raises for a name that is too long
            checkpoint = checkpoints.checkpoint_from_path(folder, task, image_size=image_size, semantics=semantics)
        elif HUB_ID.fullmatch(str(weights)) and not str(weights).startswith("."):
            checkpoint = checkpoints.checkpoint_from_hub(str(weights), task, image_size=image_size, semantics=semantics)
        else:
            raise CheckpointError(
                f"There is no folder {folder}. Expected a checkpoint's folder or file, or a hub id such "
                f"as microsoft/swinv2-tiny-patch4-window8-256."
            )
    if variant is not None:
        _check_same(variant, checkpoint.config)
        if weights is not None and window_size is None and not _same_windows(variant, checkpoint.config):
            wanted = variant.config()
            window_size, image_size = wanted.window_size, image_size or wanted.image_size
            if wanted.version == 2:
                pretrained_window_sizes = pretrained_window_sizes or wanted.pretrained_window_sizes
    if window_size or pretrained_window_sizes:
        checkpoint = checkpoints.with_windows(
            checkpoint, window_size=window_size, pretrained_window_sizes=pretrained_window_sizes, image_size=image_size
        )
    for note in checkpoint.notes:
        say(f"Note: {note}")
    return checkpoint


def _from_hub(
    variant: Variant, task: TaskSpec, image_size: Size | None, semantics: str | None, say: Callable[[str], None]
) -> Checkpoint:
    from swin_deploy.models.checkpoints import checkpoint_from_hub

    hub_id = variant.hub_id or (variant.timm_name and f"timm/{variant.timm_name}")
    if hub_id is None:
        raise CheckpointError(
            f"{variant.name} is in no hub repository. Give its file with --weights FILE, or try the pipeline with "
            f"--random-weights."
        )
    say(f"Looking for {hub_id} in the Hugging Face cache, then on the hub")
    return checkpoint_from_hub(hub_id, task, image_size=image_size, semantics=semantics)


def _same_windows(variant: Variant, config: SwinConfig) -> bool:
    """Whether the checkpoint's windows are the variant's, at the variant's image size and by the checkpoint's rules."""
    wanted = dataclasses.replace(variant.config(), semantics=config.semantics)
    return all(wanted.table_window(stage) == config.table_window(stage) for stage in range(len(config.depths)))


def _check_same(variant: Variant, config: SwinConfig) -> None:
    asked = dataclasses.asdict(variant.config())
    given = dataclasses.asdict(config)
    for field in ARCHITECTURE:
        if asked[field] != given[field]:
            raise CheckpointError(
                f"The checkpoint is not a {variant.name}: its {field} is {given[field]}, and that variant's is "
                f"{asked[field]}. Leave --variant out to export the checkpoint as what it is."
            )
