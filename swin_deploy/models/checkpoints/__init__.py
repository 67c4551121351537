"""Reads checkpoints: whatever wrote the weights, what comes out is one Checkpoint with canonical parameter names."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from swin_deploy.models.checkpoints.base import Checkpoint as Checkpoint
from swin_deploy.models.checkpoints.base import fitted
from swin_deploy.models.checkpoints.base import random_checkpoint as random_checkpoint
from swin_deploy.models.checkpoints.hub import folder_from_hub
from swin_deploy.models.checkpoints.recognise import open_source
from swin_deploy.models.checkpoints.resize import with_windows as with_windows
from swin_deploy.tasks import TaskSpec


def checkpoint_from_path(
    path: Path,
    task: TaskSpec,
    *,
    image_size: tuple[int, int] | None = None,
    semantics: str | None = None,
    source: str | None = None,
) -> Checkpoint:
    """The checkpoint at `path`, a folder or a file, as `task` needs it; its tensors are read one by one.

    What wrote it is recognised. `image_size` (height, width in pixels) counts where the checkpoint itself does not tell for
    which size it was made; `semantics` replaces the rules of the system that wrote it. Raises CheckpointError.
    """
    found = open_source(path, image_size)
    config = dataclasses.replace(found.config, patch_norm=found.patch_norm, semantics=semantics or found.semantics)
    return Checkpoint(
        config=config,
        tensors=fitted(config, task, found.shapes, found.tensors, str(path)),
        source=source or str(path),
        raw_config=found.raw_config if found.system in ("hf", "tf") else None,
        preprocessor=found.preprocessor if found.system in ("hf", "tf") else None,
        notes=found.notes,
        ranges=found.ranges,
    )


def checkpoint_from_hub(
    repo_id: str, task: TaskSpec, *, image_size: tuple[int, int] | None = None, semantics: str | None = None
) -> Checkpoint:
    """The checkpoint of a Hugging Face repository, from the local cache when it is there, else downloaded into it."""
    folder = folder_from_hub(repo_id)
    return checkpoint_from_path(folder, task, image_size=image_size, semantics=semantics, source=repo_id)
