"""Loads checkpoints of any supported framework as one `Checkpoint` with canonical parameter names."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from swin_deploy.config import SwinConfig
from swin_deploy.errors import CheckpointError, UsageError
from swin_deploy.tasks import TaskSpec

from .base import Checkpoint as Checkpoint
from .base import random_checkpoint as random_checkpoint
from .base import tensors_for_task
from .recognise import RecognisedCheckpoint, recognise_checkpoint
from .resize import resize_windows as resize_windows
from .weight_files import folder_from_hub


def checkpoint_from_path(
    path: Path,
    task: TaskSpec | Callable[[str], TaskSpec],
    *,
    image_size: tuple[int, int] | None = None,
    framework: str | None = None,
    source: str | None = None,
    weights_key: str | None = None,
    head_activation: str | None = None,
    always_partition: bool = False,
) -> Checkpoint:
    """Open a checkpoint file or folder. Its tensors are read one by one, when they are used.

    `path` is a folder or a weight file of transformers, timm, Microsoft's code, torchvision, OpenMMLab or TensorFlow, also of a
    model with a Swin inside. `task` may be a function of the name of the task for which it was made. `image_size` is used
    if the checkpoint does not contain its own, and `framework` replaces the window rules of the framework that wrote it.
    `source` is where the checkpoint comes from, for the manifest. `weights_key` chooses one of several Swins in a file,
    `head_activation` is between the linear layers of a head that has more than one, and `always_partition` shifts windows on
    maps of every size.
    """
    found = recognise_checkpoint(path, image_size, weights_key)
    task = task if isinstance(task, TaskSpec) else task(found.task)
    config = dataclasses.replace(
        found.config,
        patch_norm=found.patch_norm,
        framework=framework or found.framework,
        always_partition=found.config.always_partition or always_partition,
    )
    config, notes = _head(found, config, task, head_activation)
    if found.parent is not None:
        maps = task.name == "backbone"
        outputs = ", ".join(task.features(config) if maps else task.output_names(config))
        notes = (found.parent.note("feature maps of " * maps + outputs), *notes)
    return Checkpoint(
        config=config,
        tensors=tensors_for_task(config, task, found.shapes, found.tensors, str(path)),
        source=source or str(path),
        raw_config=found.raw_config if found.writer in ("hf", "tf") else None,
        preprocessor=found.preprocessor,
        notes=found.notes + notes,
        ranges=found.ranges,
        writer=found.framework,
        extras=found.extras,
        task=task,
        parent=found.parent.name if found.parent else "",
        files=found.files,
    )


def checkpoint_from_hub(repo_id: str, task: TaskSpec | Callable[[str], TaskSpec], **options: Any) -> Checkpoint:
    """Open a checkpoint of the Hugging Face hub, downloaded unless the local cache has it (see `checkpoint_from_path`)."""
    return checkpoint_from_path(folder_from_hub(repo_id), task, source=repo_id, **options)


def _head(
    found: RecognisedCheckpoint, config: SwinConfig, task: TaskSpec, activation: str | None
) -> tuple[SwinConfig, tuple[str, ...]]:
    """The config with the head that `task` has, and a note on a head that is left out."""
    heads = [name for name in found.shapes if name.startswith("classifier.") and name.endswith("weight")]
    if task.name != "image-classification":
        size = found.shapes[heads[-1]][0] if heads else 0
        left = f"of {size} classes" if heads else f"({found.other_head})"
        note = f"the classification head {left} is left out, because the task {task.name} has none"
        return dataclasses.replace(config, head_widths=()), (note,) if heads or found.other_head else ()
    if found.other_head:
        raise CheckpointError(
            f"{found.path} has a head that cannot be exported ({found.other_head}). Expected one of linear layers, activations "
            f"and dropout in a row. Export the encoder with --task feature-extraction, and compute the head outside."
        )
    if found.head_between and activation is None:
        raise CheckpointError(
            f"{found.path} has a head of {len(heads)} linear layers, and does not contain the activation between them. Pass "
            f"--head-activation relu (or gelu, tanh, ...; linear if there is only dropout)."
        )
    if activation is not None and not config.head_widths:
        raise UsageError("--head-activation is for a head of several linear layers, and this one has a single layer. Omit it.")
    return dataclasses.replace(config, head_act=(activation or "linear").lower()), ()
