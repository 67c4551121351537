"""Accept tensors of other libraries without a copy, through DLPack."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from swin_deploy.bundle import TensorSpec
from swin_deploy.errors import InputError, sentence

_CPU, _CUDA, _CUDA_HOST = 1, 2, 3  # DLDeviceType of dlpack.h


@dataclass(frozen=True)
class DeviceTensor:
    """Contiguous memory on a GPU such as "cuda:0"; `owner` keeps it alive."""

    device: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    pointer: int
    owner: Any = field(repr=False)


def from_dlpack(spec: TensorSpec, value: Any, device: str, on_gpu: Callable[[Any, str], DeviceTensor] | None) -> Any:
    """View the memory of a tensor of another library as a numpy array or, on the GPU `device`, with `on_gpu`.

    Raises InputError if `value` is no tensor, is on another device, or its library refuses to export it.
    """
    if not (hasattr(value, "__dlpack__") and hasattr(value, "__dlpack_device__")):
        raise InputError(f'The input "{spec.name}" is a {type(value).__name__}. Expected a numpy array, {spec}.')
    if callable(is_neg := getattr(value, "is_neg", None)) and is_neg():
        value = value.resolve_neg()  # PyTorch exports the values before their pending negation
    try:
        kind, number = (int(part) for part in value.__dlpack_device__())
        if kind in (_CPU, _CUDA_HOST):
            return np.from_dlpack(value)
        if kind == _CUDA and on_gpu is not None and device == f"cuda:{number}":
            return on_gpu(value, device)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(
            f'The input "{spec.name}", a {type(value).__name__}, cannot be read through DLPack: {sentence(str(error))}. '
            f"Expected {spec}."
        ) from error
    if kind == _CUDA:
        raise InputError(
            f'The input "{spec.name}" is on cuda:{number}, and the model runs on {device}. Move it there first, or load '
            "the model for that device."
        )
    raise InputError(f'The input "{spec.name}" is on a device of DLPack type {kind}; expected one on the CPU or a CUDA GPU.')
