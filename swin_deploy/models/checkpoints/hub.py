"""Hugging Face hub repositories: from the local cache when it is there, else downloaded into it."""

from __future__ import annotations

from pathlib import Path

from swin_deploy.dependencies import require
from swin_deploy.errors import CheckpointError

# What a checkpoint may consist of; safetensors are preferred, so the other forms are fetched only where there are none.
DESCRIPTIONS = ["config.json", "preprocessor_config.json"]
SAFETENSORS = ["*.safetensors", "model.safetensors.index.json"]
OTHERS = ["pytorch_model*.bin", "pytorch_model.bin.index.json", "tf_model*.h5", "tf_model.h5.index.json"]
INSTEAD = "Give a local checkpoint with --weights FOLDER, or try the pipeline with --random-weights."


def folder_from_hub(repo_id: str) -> Path:
    """The folder with the files of a Hugging Face repository.

    Raises CheckpointError when it is neither cached nor reachable.
    """
    hub = require("huggingface_hub", f"fetch {repo_id} from the Hugging Face hub")
    try:
        cached = Path(hub.snapshot_download(repo_id, allow_patterns=DESCRIPTIONS, local_files_only=True))
        if (cached / "config.json").exists() and _has_weights(cached):
            return cached
    except (OSError, ValueError):  # not in the cache
        pass
    try:
        folder = Path(hub.snapshot_download(repo_id, allow_patterns=DESCRIPTIONS + SAFETENSORS))
        if not _has_weights(folder):
            folder = Path(hub.snapshot_download(repo_id, allow_patterns=DESCRIPTIONS + OTHERS))
    except Exception as error:
        reason = (str(error).strip().splitlines() or ["no message"])[0]
        raise CheckpointError(
            f"{repo_id} is not in the local Hugging Face cache and could not be fetched ({type(error).__name__}: {reason}). "
            f"{INSTEAD}"
        ) from error
    if not ((folder / "config.json").exists() and _has_weights(folder)):  # offline, what is cached comes without an error
        raise CheckpointError(f"{repo_id} has no config.json with weights in the cache or on the hub. {INSTEAD}")
    return folder


def _has_weights(folder: Path) -> bool:
    return any(next(folder.glob(pattern), None) is not None for pattern in (*SAFETENSORS, *OTHERS))
