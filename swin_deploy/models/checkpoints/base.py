"""Checkpoint: a config and its tensors under canonical names, read one by one when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from swin_deploy.config import SwinConfig
from swin_deploy.errors import CheckpointError
from swin_deploy.models.parameters import Shape, parameters, random_parameter


@dataclass(frozen=True)
class Checkpoint:
    """What a network is made from. `tensors` are float32, complete and of the right shapes; `source` says whence."""

    config: SwinConfig
    tensors: Mapping[str, Tensor]
    source: str
    raw_config: Mapping[str, Any] | None = None  # config.json as found, kept so that nothing in it is lost
    preprocessor: Mapping[str, Any] | None = None  # preprocessor_config.json as found


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


def random_checkpoint(config: SwinConfig, seed: int = 0) -> Checkpoint:
    """A checkpoint of random weights, reproducible from `seed`: for measuring and testing, not for predicting."""
    shapes = parameters(config)
    tensors = LazyTensors(shapes, lambda name: torch.from_numpy(random_parameter(name, shapes[name], seed)))
    return Checkpoint(config, tensors, source=f"random weights, seed {seed}")


def check_complete(config: SwinConfig, found: Mapping[str, Shape], where: str) -> None:
    """Raises CheckpointError unless `found` (canonical name -> shape) is exactly what `config` needs."""
    expected = parameters(config)
    missing = [name for name in expected if name not in found]
    headless = [name for name in expected if name.startswith("classifier.") and name not in found]
    if headless and all(name.startswith(("classifier.", "layernorm.")) for name in missing):  # V2's backbone has neither
        raise CheckpointError(
            f"{where} has no classifier: it was saved by a class without one (backbone, bare model or masked image "
            f"modelling). Image classification needs a checkpoint of the ForImageClassification class."
        )
    if missing:
        raise CheckpointError(
            f"{where} lacks {len(missing)} of the {len(expected)} parameters that its config asks for: {_some(missing)}. "
            f"Check that config.json belongs to these weights."
        )
    wrong = [n for n in expected if tuple(found[n]) != tuple(expected[n])]
    if wrong:
        name = wrong[0]
        raise CheckpointError(
            f"{where}: {name} has shape {list(found[name])}, but the config asks for {list(expected[name])}"
            f"{f' ({len(wrong) - 1} more differ)' if len(wrong) > 1 else ''}. Check that config.json belongs to these weights."
        )
    unexpected = [name for name in found if name not in expected]
    if unexpected:
        raise CheckpointError(
            f"{where} holds {len(unexpected)} tensors that no Swin V{config.version} classifier has: {_some(unexpected)}. "
            f"It is another network, or a damaged file."
        )


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
