"""Loads checkpoints of any supported framework as one `Checkpoint` with canonical parameter names."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from swin_deploy.tasks import TaskSpec

from .base import Checkpoint as Checkpoint
from .base import random_checkpoint as random_checkpoint
from .base import tensors_for_task
from .recognise import recognise_checkpoint
from .resize import resize_windows as resize_windows
from .weight_files import folder_from_hub


def checkpoint_from_path(
    path: Path,
    task: TaskSpec,
    *,
    image_size: tuple[int, int] | None = None,
    framework: str | None = None,
    source: str | None = None,
) -> Checkpoint:
    """Open a checkpoint file or folder. Its tensors are read one by one, when they are used.

    `path` is a folder or a weight file of transformers, timm, Microsoft's code, torchvision or TensorFlow. `image_size` is used
    if the checkpoint does not contain its own, and `framework` replaces the window rules of the framework that wrote it.
    `source` is where the checkpoint comes from, for the manifest.
    """
    found = recognise_checkpoint(path, image_size)
    config = dataclasses.replace(found.config, patch_norm=found.patch_norm, framework=framework or found.framework)
    return Checkpoint(
        config=config,
        tensors=tensors_for_task(config, task, found.shapes, found.tensors, str(path)),
        source=source or str(path),
        raw_config=found.raw_config if found.writer in ("hf", "tf") else None,
        preprocessor=found.preprocessor if found.writer in ("hf", "tf") else None,
        notes=found.notes,
        ranges=found.ranges,
    )


def checkpoint_from_hub(
    repo_id: str, task: TaskSpec, *, image_size: tuple[int, int] | None = None, framework: str | None = None
) -> Checkpoint:
    """Open a checkpoint of the Hugging Face hub, downloaded unless the local cache has it (see `checkpoint_from_path`)."""
    folder = folder_from_hub(repo_id)
    return checkpoint_from_path(folder, task, image_size=image_size, framework=framework, source=repo_id)
