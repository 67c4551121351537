"""The data types that checkpoint loading passes around: stored tensors, lazy state dicts and the final `Checkpoint`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swin_deploy.config import SwinConfig
from swin_deploy.errors import CheckpointError, shown, system_limit
from swin_deploy.models.parameters import POSITIONS, LazyTensors, Shape, parameters, random_parameter
from swin_deploy.qat_ranges import QatRanges
from swin_deploy.tasks import TaskSpec

DAMAGED = "It is truncated or damaged; fetch it again."
LONGEST_NAME = 300  # characters in the name of a tensor, with those of the dictionaries around it
FLOATING = ("float32", "float16", "bfloat16", "float64")


@dataclass(frozen=True)
class Stored:
    """A tensor in a file, which `read` loads. `dtype` is its torch type without "torch."."""

    shape: Shape
    dtype: str
    read: Callable[[], Tensor]


@dataclass(frozen=True)
class StoredFile:
    """The tensors of one file or of all shards, under the names in the file."""

    path: Path  # the file, or the folder of the shards
    tensors: Mapping[str, Stored]
    tensorflow: bool = False  # names and axes are those of TensorFlow
    extras: Mapping[str, Any] = field(default_factory=dict)  # what a training script saved beside the weights
    shards: tuple[Path, ...] = ()  # files of several shards

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold the tensors."""
        return self.shards or (self.path,)


@dataclass(frozen=True)
class Checkpoint:
    """Everything needed to build a network. `tensors` are complete, in float32 and of the right shapes."""

    config: SwinConfig
    tensors: Mapping[str, Tensor]
    source: str  # path, repository or description, for the manifest
    raw_config: Mapping[str, Any] | None = None  # config.json as found, kept so that nothing in it is lost
    preprocessor: Mapping[str, Any] | None = None  # preprocessor_config.json as found
    notes: tuple[str, ...] = ()  # assumptions about what the checkpoint does not contain
    ranges: QatRanges | None = None  # QAT ranges
    image_size: tuple[int, int] | None = None  # that of a resized checkpoint, in place of the image processor's
    writer: str = ""  # framework whose names the weights have; empty for random weights
    extras: Mapping[str, Any] = field(default_factory=dict)  # timm's pretrained_cfg, and what was saved beside the weights
    task: TaskSpec = field(default_factory=TaskSpec)  # the one to export
    parent: str = ""  # the model around the Swin
    files: tuple[Path, ...] = ()  # that hold the weights; none for random weights


def unreadable(what: str, error: Exception, kind: str = "", reason: str = "") -> CheckpointError:
    """Return the error for a file or tensor that cannot be read: the system is out of memory or files, or it is damaged."""
    why, remedy = f" ({reason or shown(str(error))})", DAMAGED
    if (limit := system_limit(error)) is not None:
        why, remedy = "", limit
    return CheckpointError(f"{what} cannot be read{kind}{why}. {remedy}")


def random_checkpoint(config: SwinConfig, task: TaskSpec, seed: int = 0) -> Checkpoint:
    """Create a checkpoint of random weights that `seed` reproduces. Use it for measurements and tests only."""
    shapes = parameters(config, task)
    tensors = LazyTensors(shapes, lambda name: torch.from_numpy(random_parameter(name, shapes[name], seed)))
    return Checkpoint(config, tensors, source=f"random weights, seed {seed}", task=task)


def tensors_for_task(
    config: SwinConfig, task: TaskSpec, found: Mapping[str, Shape], tensors: Mapping[str, Tensor], where: str
) -> LazyTensors:
    """Select exactly the parameters that `task` uses, and check their shapes.

    `found` maps the canonical names of all tensors in the file to their shapes. The feature-map norms of a V1 backbone are
    saved only by backbones. If they are absent they become 1 and 0, as in transformers. A head without biases has zeros.
    """
    expected = parameters(config, task)
    heads = any(name.startswith("classifier.") for name in found)
    absent = [name for name in expected if name not in found and (ABSENT_NORM.match(name) or (heads and HEAD_BIAS.match(name)))]
    missing = [name for name in expected if name not in found and name not in absent]
    if missing and all(name.split(".")[0] in HEADS or name == "embeddings.mask_token" for name in missing):
        part, purpose = HEADS.get(missing[-1].split(".")[0], ("mask token", "masked image modelling"))
        raise CheckpointError(
            f"{where} has no {part}: it was saved by a class without one. The task {task.name} needs a checkpoint for "
            f"{purpose}. Choose another --task for this one."
        )
    if missing:
        raise CheckpointError(
            f"{where} lacks {len(missing)} of the {len(expected)} parameters that its config asks for: {_some(missing)}. "
            f"Check that config.json belongs to these weights."
        )
    if wrong := [n for n in expected if n in found and not _fits(n, found[n], expected[n])]:
        name = wrong[0]
        raise CheckpointError(
            f"{where}: {name} has shape {list(found[name])}, but the config asks for {list(expected[name])}"
            f"{f' ({len(wrong) - 1} more differ)' if len(wrong) > 1 else ''}. Check that config.json belongs to these weights."
        )
    if unexpected := [name for name in found if name not in expected and not OTHER_HEADS.search(name)]:
        raise CheckpointError(
            f"{where} holds {len(unexpected)} tensors that no Swin V{config.version} has: {_some(unexpected)}. "
            f"It is another network, or a damaged file."
        )
    constants = {name: torch.full(expected[name], float(name.endswith("weight"))) for name in absent}
    return LazyTensors(expected, lambda name: constants[name] if name in constants else tensors[name])


# First part of a parameter name -> what it belongs to, and what a checkpoint that has it was trained for.
HEADS = {
    "classifier": ("classifier", "image classification"),
    "decoder": ("decoder", "masked image modelling"),
    "layernorm": ("final norm", "classification, feature extraction or masked image modelling"),
}

ABSENT_NORM, HEAD_BIAS = re.compile(r"hidden_states_norms\."), re.compile(r"classifier\.(\d+\.)?bias$")
# Parameters that only some tasks use.
OTHER_HEADS = re.compile(
    r"^(classifier(?:\.\d+)?|decoder\.0|layernorm|hidden_states_norms\.\w+)\.(weight|bias)$|^embeddings\.(mask_token|position_embeddings)$"
)


def _fits(name: str, found: Shape, expected: Shape) -> bool:
    if name == POSITIONS:  # some transformers versions write one row too many; see blocks.position_embeddings
        return len(found) == 3 and found[0] == 1 and found[1] in (expected[1], expected[1] + 1) and found[2] == expected[2]
    return tuple(found) == tuple(expected)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
