"""How fast an engine could be on a GPU at best: from the bytes and operations it needs, and what the GPU is published to do.

The time is the larger of two, reading and writing every byte at full bandwidth and every product at full rate, and LAUNCH for
each kernel. It is no measurement and no promise: real kernels reach neither rate, and caches spare some of the bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from swin_deploy.errors import UsageError

LAUNCH = 2e-6  # seconds a kernel costs beyond its work inside a CUDA graph: an assumption, of the usual size


@dataclass(frozen=True)
class Gpu:
    """A GPU's published peaks: bytes and operations per second, dense, at boost clock; `source` says where they stand.

    fp32 is that of the CUDA cores (TF32 is off in our engines), fp16 (also bf16), int8 and fp8 of the tensor cores at their
    faster accumulation. 0: the GPU has no such arithmetic.
    """

    name: str
    capability: str
    bandwidth: float
    fp32: float
    fp16: float
    int8: float
    fp8: float
    source: str


def _gpu(name: str, capability: str, gigabytes: float, fp32: float, fp16: float, int8: float, fp8: float, source: str) -> Gpu:
    return Gpu(name, capability, gigabytes * 1e9, fp32 * 1e12, fp16 * 1e12, int8 * 1e12, fp8 * 1e12, source)


# The first of a compute capability stands for it where only the capability is known.
GPUS = (
    _gpu("t4", "sm_75", 320, 8.1, 65, 130, 0, "NVIDIA T4 product brief"),
    _gpu("a100", "sm_80", 2039, 19.5, 312, 624, 0, "NVIDIA A100 80GB SXM data sheet"),
    _gpu("rtx-3090", "sm_86", 936, 35.6, 142, 284, 0, "NVIDIA Ampere GA102 white paper"),
    _gpu("a10", "sm_86", 600, 31.2, 125, 250, 0, "NVIDIA A10 data sheet"),
    _gpu("rtx-4090", "sm_89", 1008, 82.6, 330.3, 660.6, 660.6, "NVIDIA Ada white paper"),
    _gpu("l4", "sm_89", 300, 30.3, 121, 242, 242, "NVIDIA L4 data sheet, without sparsity"),
    _gpu("h100", "sm_90", 3350, 67, 989.5, 1979, 1979, "NVIDIA H100 SXM data sheet, without sparsity"),
    _gpu("h200", "sm_90", 4800, 67, 989.5, 1979, 1979, "NVIDIA H200 SXM data sheet, without sparsity"),
    _gpu("rtx-5090", "sm_120", 1792, 104.8, 419, 838, 838, "NVIDIA RTX Blackwell white paper"),
)
# A type that a product is computed in -> which peak is its own.
_PEAKS = {"float": "fp32", "float16": "fp16", "bfloat16": "fp16", "int8": "int8", "float8e4m3fn": "fp8"}


@dataclass(frozen=True)
class Roofline:
    """Seconds that an engine needs on `gpu` at least for its bytes, its products and its launches, and all together."""

    gpu: str
    memory: float
    compute: float
    launch: float

    @property
    def seconds(self) -> float:
        return max(self.memory, self.compute) + self.launch

    def to_dict(self) -> dict[str, Any]:
        """The figures as plain JSON values."""
        return {**asdict(self), "seconds": self.seconds}


def find_gpu(name: str) -> Gpu:
    """The GPU of that name, or the first of that compute capability. Raises UsageError for one that is not in GPUS."""
    for gpu in GPUS:
        if name.lower() in (gpu.name, gpu.capability):
            return gpu
    known = ", ".join(f"{gpu.name} ({gpu.capability})" for gpu in GPUS)
    raise UsageError(f"The published figures of the GPU {name!r} are not known here. Expected one of: {known}.")


def capability_of(name: str) -> str:
    """ "sm_89" for "rtx-4090"; a name that is not in GPUS, such as "sm_121" or "current", as it is."""
    return next((gpu.capability for gpu in GPUS if gpu.name == name.lower()), name)


def roofline(gpu: Gpu, kernels: int | None, bytes_moved: int | None, flops: Mapping[str, int] | None) -> Roofline | None:
    """The roofline of an engine with these figures; None when one of them, or the GPU's peak for a type, is not known."""
    if kernels is None or bytes_moved is None or flops is None:
        return None
    compute = 0.0
    for kind, count in flops.items():
        peak = getattr(gpu, _PEAKS[kind]) if kind in _PEAKS else 0
        if not peak:
            return None
        compute += count / peak
    return Roofline(gpu.name, bytes_moved / gpu.bandwidth, compute, kernels * LAUNCH)
