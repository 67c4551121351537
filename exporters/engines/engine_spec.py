"""What an engine is compiled for, checked where it is said: back end, GPU, batch sizes and the compiler's options."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swin_deploy.dependencies import require
from swin_deploy.errors import EngineError, MissingDependencyError, UsageError
from swin_deploy.gpus import cuda_devices, seen_first
from swin_deploy.specs import Batch


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


# back end -> (the module, what to call it)
BACKENDS = {"tensorrt": ("tensorrt", "TensorRT"), "tensorrt-rtx": ("tensorrt_rtx", "TensorRT for RTX")}

ONE_IMAGE: Batch = (1, 1, 1)

# What TensorRT for RTX lacks, and why; tests/exporters/test_engine_options.py asks the compiler for each.
RTX_LACKS = {
    "optimization_level": "optimization levels: it makes the same engine at each of them",
    "timing_cache": "timing cache: it times nothing while it compiles, and the functions that it has for one do nothing",
    "version_compatible": "version-compatible engines: the lean runtime that would run them is not part of it",
    "hardware_compatible": "hardware-compatible engines: it compiles one for each GPU that it is given",
}


@dataclass(frozen=True)
class EngineSpec:
    """What an engine is compiled for; the types it computes in are in the graph.

    `gpu` is "sm_89" or the like, or "current", the first GPU of this machine. TensorRT for RTX compiles for any GPU it
    knows; full TensorRT only for the one it runs on. `profiles` are the batch sizes, each (smallest, tuned for, largest),
    one optimisation profile each. `workspace` is in bytes. What is None is left to the compiler. `timing_cache` is a file
    that makes compiling faster; it says nothing about the engine, and is no part of what tells engines apart.
    """

    backend: str
    gpu: str = "current"
    profiles: tuple[Batch, ...] = (ONE_IMAGE,)
    workspace: int | None = None
    optimization_level: int | None = None
    timing_cache: Path | None = None
    version_compatible: bool = False
    hardware_compatible: bool = False
    strip_weights: bool = False

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise UsageError(f"There is no back end {self.backend!r}. Expected one of: {', '.join(BACKENDS)}.")
        if self.gpu != "current":
            check_gpu(self.backend, self.gpu)
        _check_profiles(self.profiles)
        if self.workspace is not None and (type(self.workspace) is not int or not 0 < self.workspace < 1 << 63):
            raise UsageError(f"A workspace of {self.workspace!r} bytes cannot be meant. Expected a size such as 2GiB.")
        if self.optimization_level is not None and self.optimization_level not in range(6):
            raise UsageError(f"There is no optimization level {self.optimization_level!r}. Expected a whole number, 0 to 5.")
        if self.backend == "tensorrt-rtx":
            self._check_rtx()
        if self.timing_cache is not None and (self.timing_cache.is_dir() or not self.timing_cache.absolute().parent.is_dir()):
            raise UsageError(
                f"The timing cache {self.timing_cache} cannot be a file: it is a folder, or the folder it would be in does not "
                "exist. Name a file in a folder that exists."
            )

    def _check_rtx(self) -> None:
        for option, reason in RTX_LACKS.items():
            if getattr(self, option) not in (None, False):
                raise UsageError(
                    f"TensorRT for RTX has no {reason}. Leave the option out, or use the back end tensorrt on the target "
                    "machine."
                )
        if self.strip_weights and not cuda_devices():
            raise EngineError(
                "TensorRT for RTX needs a GPU to compile engines without their weights, and this machine has no usable NVIDIA "
                "GPU. Run this on a machine with one, or keep the weights in the engine."
            )

    @property
    def options(self) -> dict[str, Any]:
        """The options that are not left to the compiler, as plain JSON values."""
        values = {
            "workspace": self.workspace,
            "optimization_level": self.optimization_level,
            "version_compatible": self.version_compatible,
            "hardware_compatible": self.hardware_compatible,
            "strip_weights": self.strip_weights,
        }
        return {name: value for name, value in values.items() if value not in (None, False)}

    @property
    def words(self) -> str:
        """What tells this engine from others for the same GPU, for its file name; no two specs share it."""
        words = [] if self.profiles == (ONE_IMAGE,) else ["b" + "_".join(map(str, dict.fromkeys(p))) for p in self.profiles]
        words += [f"workspace{self.workspace}"] if self.workspace is not None else []
        words += [f"level{self.optimization_level}"] if self.optimization_level is not None else []
        words += ["vc"] * self.version_compatible + ["hc"] * self.hardware_compatible
        if len("-".join(words)) > 100:  # a file name has an end
            words = [fingerprint({"profiles": self.profiles, **self.options})[:16]]
        return "-".join(words + ["stripped"] * self.strip_weights)


def fingerprint(facts: Mapping[str, Any]) -> str:
    """The sha256 of plain values, whatever the order of their names."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _check_profiles(profiles: tuple[Batch, ...]) -> None:
    if not profiles or len(set(profiles)) != len(profiles):
        raise UsageError(f"The batches {profiles!r} cannot be meant. Expected one or more, each of them once.")
    for sizes in profiles:
        whole = type(sizes) is tuple and len(sizes) == 3 and all(type(size) is int for size in sizes)
        if not whole or not 1 <= sizes[0] <= sizes[1] <= sizes[2]:
            raise UsageError(
                f"A batch of {sizes!r} cannot be meant. Expected three whole numbers from 1 up, smallest <= tuned for "
                "<= largest, such as (1, 8, 32)."
            )
        if sizes[2] >= 1 << 31:
            raise UsageError(f"A batch of {sizes!r} is too large: an extent has 31 bits. Ask for a smaller one.")
