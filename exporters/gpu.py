"""Which GPU an engine can be compiled for."""

from __future__ import annotations

import re

from swin_deploy.cuda import cuda_devices, seen_first
from swin_deploy.errors import EngineError, MissingDependencyError, UsageError
from swin_deploy.requires import require


def rtx_gpus() -> tuple[str, ...]:
    """The GPUs that the installed TensorRT for RTX compiles for, such as ("sm_75", ..., "sm_121"); empty without it."""
    try:
        trt = require("tensorrt_rtx", "compile engines")
    except MissingDependencyError:
        return ()
    names = (re.fullmatch(r"SM(\d+)", name) for name in trt.ComputeCapability.__members__)
    return tuple(f"sm_{number}" for number in sorted(int(match[1]) for match in names if match))


def check_gpu(backend: str, gpu: str) -> None:
    """Nothing; raises UsageError for a GPU that `backend` cannot compile for.

    Without TensorRT for RTX installed, only the form of the name is checked: the list of GPUs is the compiler's own.
    """
    if not re.fullmatch(r"sm_\d{2,3}", gpu):
        raise UsageError(
            f"There is no GPU {gpu!r}. Expected 'current', a compute capability such as sm_89, or rtx-4090 and the like."
        )
    if backend != "tensorrt-rtx":
        return
    if gpu == "sm_90":
        raise UsageError(
            "TensorRT for RTX has no SM90 (H100, H200): full TensorRT is what serves it. Use the back end tensorrt on "
            "a machine with that GPU."
        )
    known = rtx_gpus()
    if known and gpu not in known:
        raise UsageError(f"TensorRT for RTX does not compile for {gpu}. Expected one of: {', '.join(known)}.")


def has_fp8(gpu: str) -> bool:
    """Whether a GPU of that compute capability ("sm_89") multiplies FP8 numbers."""
    return int(gpu.removeprefix("sm_")) >= 89


def target_gpu(backend: str, gpu: str) -> str:
    """The compute capability to compile for: `gpu` itself, or that of this machine's first GPU for "current".

    Full TensorRT times its kernels while it compiles, so for it a `gpu` other than this machine's is an EngineError.
    """
    if backend == "tensorrt-rtx" and gpu != "current":
        return gpu
    devices = cuda_devices()
    if not devices:
        raise EngineError(
            f"Compiling for {gpu!r} with the back end {backend} needs a GPU, and this machine has no usable NVIDIA "
            "GPU. Run this on the target machine, or use the back end tensorrt-rtx and name its target, such as sm_89."
        )
    here = devices[0]
    if gpu not in ("current", here.capability):
        first = seen_first(gpu)
        way = f"run this with {first[0]} before it" if first else "run this on the target machine"
        raise EngineError(
            f"The engine was asked for {gpu}, and the GPU of this machine is {here.capability} ({here.name}). TensorRT "
            f"compiles only for the first GPU it sees: {way}, or ask for 'current'."
        )
    check_gpu(backend, here.capability)
    return here.capability
