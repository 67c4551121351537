"""Which NVIDIA GPUs this machine has.

The driver itself is asked, so that neither torch nor a CUDA toolkit has to be installed.
"""

from __future__ import annotations

import ctypes
import os
import sys
from dataclasses import dataclass

from swin_deploy.errors import UsageError

# CUdevice_attribute values of cuda.h; they are part of the driver's stable ABI.
_CAPABILITY_MAJOR = 75
_CAPABILITY_MINOR = 76


@dataclass(frozen=True)
class CudaDevice:
    """One GPU: its marketing name, and its compute capability written as "sm_89"."""

    name: str
    capability: str


def cuda_driver() -> ctypes.CDLL | None:
    """The driver's own library, with functions that nobody has given argument types yet; None where it is not installed."""
    try:
        return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None


def cuda_version() -> int | None:
    """The newest CUDA that the driver knows, 13000 for 13.0; None without a driver."""
    driver, version = cuda_driver(), ctypes.c_int()
    return version.value if driver is not None and driver.cuDriverGetVersion(ctypes.byref(version)) == 0 else None


def cuda_devices() -> tuple[CudaDevice, ...]:
    """The CUDA GPUs that this process may use, in CUDA's own order; empty without a driver or without a GPU.

    CUDA_VISIBLE_DEVICES applies, because the driver applies it. A driver that is present and refuses to start (no
    permission, or a kernel module of another version) reads as no GPU: nothing could be run on it either.
    """
    driver = cuda_driver()
    if driver is None:
        return ()
    count = ctypes.c_int()
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return ()
    found = []
    for ordinal in range(count.value):
        device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        name = ctypes.create_string_buffer(256)
        failure = (
            driver.cuDeviceGet(ctypes.byref(device), ordinal)
            or driver.cuDeviceGetName(name, len(name), device)
            or driver.cuDeviceGetAttribute(ctypes.byref(major), _CAPABILITY_MAJOR, device)
            or driver.cuDeviceGetAttribute(ctypes.byref(minor), _CAPABILITY_MINOR, device)
        )
        if not failure:
            found.append(CudaDevice(name.value.decode("utf-8", "replace"), f"sm_{major.value}{minor.value}"))
    return tuple(found)


def refuse_without_gpu(device: str) -> None:
    """Raises UsageError where this machine has no GPU that `device` ("cuda:0") could be."""
    if not cuda_devices():
        raise UsageError(f"There is no {device} here: this machine has no usable NVIDIA GPU. Take the device cpu.")


def seen_first(capability: str) -> list[str]:
    """What to put before a command that works with the first GPU that it sees, so that this is one of that compute capability;
    nothing where it is already, or where this machine has none."""
    here = [device.capability for device in cuda_devices()]
    if capability not in here or capability == here[0]:
        return []
    number = here.index(capability)
    seen = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return [f"CUDA_VISIBLE_DEVICES={seen[number].strip() if number < len(seen) else number}"]
