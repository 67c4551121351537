"""Checkpoint: a config and its tensors under canonical names, read one by one when they are asked for."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from swin_deploy.config import SwinConfig
from swin_deploy.errors import CheckpointError
from swin_deploy.models.parameters import POSITIONS, Shape, parameters, random_parameter
from swin_deploy.qat_ranges import Ranges
from swin_deploy.tasks import TaskSpec


@dataclass(frozen=True)
class Checkpoint:
    """What a network is made from. `tensors` are float32, complete and of the right shapes; `source` says whence."""

    config: SwinConfig
    tensors: Mapping[str, Tensor]
    source: str
    raw_config: Mapping[str, Any] | None = None  # config.json as found, kept so that nothing in it is lost
    preprocessor: Mapping[str, Any] | None = None  # preprocessor_config.json as found
    notes: tuple[str, ...] = ()  # what the checkpoint does not tell and was assumed
    ranges: Ranges | None = None  # its own quantisation ranges


class LazyTensors(Mapping[str, Tensor]):
    """Tensors by canonical name; `read(name)` fetches one, and only when it is asked for."""

    def __init__(self, names: Iterable[str], read: Callable[[str], Tensor]) -> None:
        self._names, self._read = dict.fromkeys(names), read

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def random_checkpoint(config: SwinConfig, task: TaskSpec, seed: int = 0) -> Checkpoint:
    """A checkpoint of random weights, reproducible from `seed`: for measuring and testing, not for predicting."""
    shapes = parameters(config, task)
    tensors = LazyTensors(shapes, lambda name: torch.from_numpy(random_parameter(name, shapes[name], seed)))
    return Checkpoint(config, tensors, source=f"random weights, seed {seed}")


def fitted(
    config: SwinConfig, task: TaskSpec, found: Mapping[str, Shape], tensors: Mapping[str, Tensor], where: str
) -> LazyTensors:
    """`tensors` as `task` needs them: exactly its parameters, of the right shapes.

    `found` holds canonical name -> shape of all that is in the file. The norms of a V1 backbone's feature maps, which only
    backbones are saved with, start at 1 and 0 where they are absent, as in transformers. Raises CheckpointError.
    """
    expected = parameters(config, task)
    absent = [name for name in expected if name not in found and name.startswith("hidden_states_norms.")]
    missing = [name for name in expected if name not in found and name not in absent]
    if missing and all(name.split(".")[0] in HEADS or name == "embeddings.mask_token" for name in missing):
        part, remedy = HEADS.get(missing[-1].split(".")[0], ("mask token", "masked image modelling"))
        raise CheckpointError(
            f"{where} has no {part}: it was saved by a class without one. The task {task.name} needs a checkpoint that was "
            f"made for {remedy}; another --task may suit this one."
        )
    if missing:
        raise CheckpointError(
            f"{where} lacks {len(missing)} of the {len(expected)} parameters that its config asks for: {_some(missing)}. "
            f"Check that config.json belongs to these weights."
        )
    wrong = [n for n in expected if n in found and not _fits(n, found[n], expected[n])]
    if wrong:
        name = wrong[0]
        raise CheckpointError(
            f"{where}: {name} has shape {list(found[name])}, but the config asks for {list(expected[name])}"
            f"{f' ({len(wrong) - 1} more differ)' if len(wrong) > 1 else ''}. Check that config.json belongs to these weights."
        )
    unexpected = [name for name in found if name not in expected and not OTHER_HEADS.search(name)]
    if unexpected:
        raise CheckpointError(
            f"{where} holds {len(unexpected)} tensors that no Swin V{config.version} has: {_some(unexpected)}. "
            f"It is another network, or a damaged file."
        )

    def read(name: str) -> Tensor:
        if name in absent:
            return torch.full(expected[name], float(name.endswith("weight")))
        return tensors[name]

    return LazyTensors(expected, read)


# first part of a parameter's name -> what it belongs to, and what a checkpoint with it was made for
HEADS = {
    "classifier": ("classifier", "image classification"),
    "decoder": ("decoder", "masked image modelling"),
    "layernorm": ("final norm", "classification, feature extraction or masked image modelling"),
}

# Parameters of parts that the task at hand may not use.
OTHER_HEADS = re.compile(
    r"^(classifier|decoder\.0|layernorm|hidden_states_norms\.\w+)\.(weight|bias)$|^embeddings\.(mask_token|position_embeddings)$"
)


def _fits(name: str, found: Shape, expected: Shape) -> bool:
    if name == POSITIONS:  # transformers writes one row too many in some versions; see positions.py
        return len(found) == 3 and found[0] == 1 and found[1] in (expected[1], expected[1] + 1) and found[2] == expected[2]
    return tuple(found) == tuple(expected)


def usable(name: str, tensor: Tensor, where: str) -> Tensor:
    """`tensor` in float32; raises CheckpointError when it is not of a floating type or holds NaN or infinity."""
    if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        raise CheckpointError(f"{where}: {name} is of type {tensor.dtype}; expected a floating-point tensor.")
    tensor = tensor.to(torch.float32)
    if not torch.isfinite(tensor).all():
        raise CheckpointError(f"{where}: {name} holds NaN or infinity. The file is damaged, or its training diverged.")
    return tensor


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
