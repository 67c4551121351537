"""Tensors of other libraries, taken without a copy through DLPack, wherever their memory is."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from swin_deploy.errors import InputError, sentence
from swin_deploy.specs import TensorSpec

_CPU, _CUDA, _CUDA_HOST = 1, 2, 3  # DLDeviceType of dlpack.h
_CODES = {0: "int", 1: "uint", 2: "float", 6: "bool"}  # DLDataTypeCode


@dataclass(frozen=True)
class DeviceTensor:
    """Memory on a GPU, contiguous; `owner` keeps it alive. `device` is "cuda:0" or the like."""

    device: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    pointer: int
    owner: Any = field(repr=False)


class _Tensor(ctypes.Structure):  # DLTensor; the device and the type are structures of two and three small members
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


def from_dlpack(spec: TensorSpec, value: Any, device: str) -> Any:
    """A numpy array on the memory of `value`, which has `__dlpack__`; a DeviceTensor where that memory is on the GPU `device`.

    Raises InputError for anything else, and for what its own library does not hand over (a tensor with a gradient).
    """
    if not (hasattr(value, "__dlpack__") and hasattr(value, "__dlpack_device__")):
        raise InputError(f'The input "{spec.name}" is a {type(value).__name__}; expected a numpy array, {spec}.')
    if callable(is_neg := getattr(value, "is_neg", None)) and is_neg():
        value = value.resolve_neg()  # PyTorch hands over the numbers before it has changed their signs
    try:
        kind, number = (int(part) for part in value.__dlpack_device__())
        if kind in (_CPU, _CUDA_HOST):
            return np.from_dlpack(value)
        if kind == _CUDA and device != f"cuda:{number}":
            raise InputError(
                f'The input "{spec.name}" is on cuda:{number}, and the model runs on {device}. Move it there first, or load '
                "the model for that device."
            )
        if kind == _CUDA:
            with _current(number):
                # 1 is the legacy default stream, with which all others but non-blocking ones keep in order.
                return device_tensor(value.__dlpack__(stream=1), device)
    except InputError:
        raise
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        reason = sentence(str(error))
        raise InputError(
            f'The input "{spec.name}", a {type(value).__name__}, cannot be read through DLPack: {reason}. Expected {spec}.'
        ) from error
    raise InputError(f'The input "{spec.name}" is on a device of DLPack type {kind}; expected one on the CPU or a CUDA GPU.')


def _current(number: int) -> contextlib.AbstractContextManager[Any]:
    """PyTorch hands over tensors of the GPU only that is its current one; where it is not imported, nothing is to be done."""
    torch = sys.modules.get("torch")
    return contextlib.nullcontext() if torch is None or not torch.cuda.is_available() else torch.cuda.device(number)


def device_tensor(capsule: Any, device: str) -> DeviceTensor:
    """What a DLPack capsule describes. Raises ValueError for one whose memory is not contiguous, or of an unusual type."""
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    tensor = _Tensor.from_address(pointer(capsule, b"dltensor"))
    shape = tuple(tensor.shape[axis] for axis in range(tensor.ndim))
    if tensor.code not in _CODES or tensor.lanes != 1:
        raise ValueError(f"its type is of DLPack code {tensor.code}")
    kind = _CODES[tensor.code]
    if tensor.strides:
        expected = 1
        for axis in reversed(range(tensor.ndim)):
            if shape[axis] != 1 and tensor.strides[axis] != expected:
                raise ValueError("its memory is not contiguous")
            expected *= shape[axis]
    dtype = np.dtype(kind if kind == "bool" else f"{kind}{tensor.bits}")
    # The capsule still owns the tensor, and frees it when it goes.
    return DeviceTensor(device, dtype, shape, (tensor.data or 0) + tensor.byte_offset, capsule)
