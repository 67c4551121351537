"""Find the NVIDIA GPUs of this machine by asking the driver through ctypes, so that no package has to be installed."""

from __future__ import annotations

import ctypes
import os
import sys
from dataclasses import dataclass

from swin_deploy.errors import UsageError

# CUdevice_attribute values of cuda.h, part of the driver's stable ABI.
_CAPABILITY_MAJOR = 75
_CAPABILITY_MINOR = 76


@dataclass(frozen=True)
class CudaDevice:
    """A GPU: its marketing name and its compute capability, such as "sm_89"."""

    name: str
    capability: str


def cuda_driver() -> ctypes.CDLL | None:
    """Load the driver's library; None if it is not installed."""
    try:
        return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None


def cuda_version() -> int | None:
    """Return the newest CUDA version that the driver supports, such as 13000 for 13.0; None without a driver."""
    driver, version = cuda_driver(), ctypes.c_int()
    return version.value if driver is not None and driver.cuDriverGetVersion(ctypes.byref(version)) == 0 else None


def cuda_devices() -> tuple[CudaDevice, ...]:
    """Return the GPUs that CUDA_VISIBLE_DEVICES leaves, in CUDA's order; none where the driver fails to start."""
    driver, count = cuda_driver(), ctypes.c_int()
    if driver is None or driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
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


def device_memory(ordinal: int) -> int | None:
    """Return the bytes of memory of a GPU, which a Jetson shares with its processor; None if the driver does not state it."""
    driver, device, size = cuda_driver(), ctypes.c_int(), ctypes.c_size_t()
    total = getattr(driver, "cuDeviceTotalMem_v2", None)
    if driver is None or total is None or driver.cuDeviceGet(ctypes.byref(device), ordinal) != 0:
        return None
    return size.value if total(ctypes.byref(size), device) == 0 else None


def refuse_without_gpu(device: str) -> None:
    """Raise UsageError for a device such as "cuda:0" if this machine has no GPU."""
    if not cuda_devices():
        raise UsageError(f"Device {device} is not available: this machine has no usable NVIDIA GPU. Use the device cpu.")


def seen_first(capability: str) -> list[str]:
    """Return what to put before a command so that the first GPU that it sees is of this compute capability, if one is."""
    capabilities = [device.capability for device in cuda_devices()]
    if capability not in capabilities or capability == capabilities[0]:
        return []
    number = capabilities.index(capability)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return [f"CUDA_VISIBLE_DEVICES={visible[number].strip() if number < len(visible) else number}"]
