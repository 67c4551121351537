"""Hugging Face folders and hub ids: safetensors, sharded or not, with the parameter names of transformers 4.x and 5.x."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from swin_deploy.config import SwinConfig
from swin_deploy.errors import CheckpointError
from swin_deploy.models.checkpoints.base import Checkpoint, LazyTensors, check_complete, usable
from swin_deploy.requires import require

WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"

PARTS = {"q": "query", "k": "key", "v": "value"}

# transformers 5 renamed V1's modules; files on disk mostly keep the older names, which are the canonical ones here.
RENAMED = tuple(
    (re.compile(new), old)
    for new, old in (
        (r"\.attention\.(query|key|value)\.", r".attention.self.\1."),
        (r"\.attention\.([qkv])_proj\.", lambda m: f".attention.self.{PARTS[m[1]]}."),
        (r"\.attention\.o_proj\.", ".attention.output.dense."),
        (
            r"\.attention\.relative_position_bias\.relative_position_bias_table$",
            ".attention.self.relative_position_bias_table",
        ),
        (r"\.mlp\.fc1\.", ".intermediate.dense."),
        (r"\.mlp\.fc2\.", ".output.dense."),
    )
)

# Found in files and not needed: buffers that are computed anew, and parameters of parts that a classifier lacks.
UNUSED = re.compile(
    r"(relative_position_index|relative_coords_table|attn_mask)$|^embeddings\.mask_token$|^hidden_states_norms\.|^pooler\."
)


def canonical_name(name: str) -> str | None:
    """The canonical name of a parameter in a Hugging Face file; None for one that an image classifier does not use."""
    name = re.sub(r"^(swin|swinv2)\.", "", name)
    for pattern, old in RENAMED:
        name = pattern.sub(old, name)
    return None if UNUSED.search(name) else name


def checkpoint_from_hub(repo_id: str) -> Checkpoint:
    """The checkpoint of a Hugging Face repository, from the local cache when it is there, else downloaded into it.

    Raises CheckpointError when it is neither cached nor reachable.
    """
    hub = require("huggingface_hub", f"fetch {repo_id} from the Hugging Face hub")
    wanted = ["config.json", "preprocessor_config.json", "*.safetensors", WEIGHTS_INDEX]
    try:
        folder = Path(hub.snapshot_download(repo_id, allow_patterns=wanted, local_files_only=True))
        cached = _has_checkpoint(folder)
    except (OSError, ValueError):  # not in the cache
        cached = False
    if not cached:
        instead = "Give a local checkpoint with --weights FOLDER, or try the pipeline with --random-weights."
        try:
            folder = Path(hub.snapshot_download(repo_id, allow_patterns=wanted))
        except Exception as error:
            raise CheckpointError(
                f"{repo_id} is not in the local Hugging Face cache and could not be fetched "
                f"({type(error).__name__}: {_first_line(error)}). {instead}"
            ) from error
        if not _has_checkpoint(folder):  # offline, a cache with other files of the repository is returned without an error
            raise CheckpointError(f"{repo_id} has no config.json with safetensors in the cache or on the hub. {instead}")
    return checkpoint_from_folder(folder, source=repo_id)


def _has_checkpoint(folder: Path) -> bool:
    return (folder / "config.json").exists() and any((folder / name).exists() for name in (WEIGHTS, WEIGHTS_INDEX))


def checkpoint_from_folder(folder: Path, source: str | None = None) -> Checkpoint:
    """The checkpoint in a folder that `save_pretrained` wrote; the tensors are memory-mapped until they are used.

    Raises CheckpointError when a file is missing or damaged, or when weights and config do not belong together.
    """
    raw = _json(folder / "config.json")
    config = SwinConfig.from_dict(raw)
    preprocessor = folder / "preprocessor_config.json"
    return Checkpoint(
        config=config,
        tensors=_tensors(folder, config),
        source=source or str(folder),
        raw_config=raw,
        preprocessor=_json(preprocessor) if preprocessor.exists() else None,
    )


def _tensors(folder: Path, config: SwinConfig) -> LazyTensors:
    safetensors = require("safetensors", "read checkpoints")
    readers: dict[str, Any] = {}
    homes: dict[str, tuple[Path, str]] = {}
    for file in _weight_files(folder):
        try:
            readers[file.name] = safetensors.safe_open(str(file), framework="pt")
            names = list(readers[file.name].keys())
        except (safetensors.SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{file} cannot be read as safetensors ({error}). It is truncated or damaged; fetch it again."
            ) from error
        for name in names:
            canonical = canonical_name(name)
            if canonical is not None:
                if canonical in homes:
                    raise CheckpointError(f"{folder} holds {canonical} twice. Expected each parameter once.")
                homes[canonical] = (file, name)
    shapes = {c: tuple(readers[file.name].get_slice(name).get_shape()) for c, (file, name) in homes.items()}
    if config.num_labels == 0:
        shapes = {c: shape for c, shape in shapes.items() if not c.startswith("classifier.")}
    check_complete(config, shapes, str(folder))

    def read(canonical: str) -> Tensor:
        file, name = homes[canonical]
        return usable(name, readers[file.name].get_tensor(name), str(file))

    return LazyTensors(shapes, read)


def _weight_files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    if (folder / WEIGHTS_INDEX).exists():
        shards = _json(folder / WEIGHTS_INDEX).get("weight_map")
        listed = list(shards.values()) if isinstance(shards, dict) else []
        if not listed or not all(isinstance(n, str) and Path(n).name == n and n.endswith(".safetensors") for n in listed):
            raise CheckpointError(f"{folder / WEIGHTS_INDEX} does not list the shards' file names. Fetch it again.")
        names = sorted(set(listed))
        absent = [name for name in names if not (folder / name).exists()]
        if absent:
            raise CheckpointError(f"{folder} lacks {absent[0]}, which {WEIGHTS_INDEX} lists. Fetch the checkpoint again.")
        return [folder / name for name in names]
    raise CheckpointError(
        f"{folder} holds no {WEIGHTS} and no {WEIGHTS_INDEX}. Expected a folder that transformers' save_pretrained wrote."
    )


def _json(path: Path) -> Mapping[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path.parent} has no {path.name}. Expected a folder that transformers' save_pretrained wrote."
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}). Fetch it again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} does not hold a JSON object. Fetch it again.")
    return value


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]
