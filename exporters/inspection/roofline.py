"""Roofline model: a lower bound for the latency of an engine, from its bytes and FLOPs and the published peaks of a GPU.

The bound is the larger of memory time and compute time, plus LAUNCH for each kernel. It is not a measurement: real kernels do
not reach the peaks, and caches save some of the bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from swin_deploy.errors import unknown

if TYPE_CHECKING:
    from swin_deploy.manifest import EngineProfile

LAUNCH = 2e-6  # assumed overhead of a kernel in a CUDA graph, in seconds


@dataclass(frozen=True)
class GpuPeaks:
    """Published peaks of a GPU: GB/s, dense tera-operations per second at boost clock, and their `source`.

    fp32 is the rate of the CUDA cores, because our engines do not use TF32. fp16 (also bf16), int8 and fp8 are the rates of the
    tensor cores with the faster accumulation; 0 means that the GPU does not support the type.
    """

    name: str
    capability: str
    bandwidth: float
    fp32: float
    fp16: float
    int8: float
    fp8: float
    source: str


# If only the compute capability is known, its first row is used.
GPUS = (
    GpuPeaks("t4", "sm_75", 320, 8.1, 65, 130, 0, "NVIDIA T4 product brief"),
    GpuPeaks("a100", "sm_80", 2039, 19.5, 312, 624, 0, "NVIDIA A100 80GB SXM data sheet"),
    GpuPeaks("rtx-3090", "sm_86", 936, 35.6, 142, 284, 0, "NVIDIA Ampere GA102 white paper"),
    GpuPeaks("a10", "sm_86", 600, 31.2, 125, 250, 0, "NVIDIA A10 data sheet"),
    GpuPeaks("agx-orin", "sm_87", 204.8, 5.3, 42.5, 85, 0, "NVIDIA Jetson AGX Orin technical brief, 64 GB, without sparsity"),
    GpuPeaks("rtx-4090", "sm_89", 1008, 82.6, 330.3, 660.6, 660.6, "NVIDIA Ada white paper"),
    GpuPeaks("l4", "sm_89", 300, 30.3, 121, 242, 242, "NVIDIA L4 data sheet, without sparsity"),
    GpuPeaks("h100", "sm_90", 3350, 67, 989.5, 1979, 1979, "NVIDIA H100 SXM data sheet, without sparsity"),
    GpuPeaks("h200", "sm_90", 4800, 67, 989.5, 1979, 1979, "NVIDIA H200 SXM data sheet, without sparsity"),
    GpuPeaks("rtx-5090", "sm_120", 1792, 104.8, 419, 838, 838, "NVIDIA RTX Blackwell white paper"),
)
# The type that a matmul computes in -> its peak.
_PEAKS = {"float": "fp32", "float16": "fp16", "bfloat16": "fp16", "int8": "int8", "float8e4m3fn": "fp8"}


@dataclass(frozen=True)
class Roofline:
    """Lower bounds in seconds for the memory traffic, the matmuls and the kernel launches of an engine on `gpu`."""

    gpu: str
    memory: float
    compute: float
    launch: float

    @property
    def seconds(self) -> float:
        return max(self.memory, self.compute) + self.launch

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as JSON values."""
        return {**asdict(self), "seconds": self.seconds}


def find_gpu(name: str) -> GpuPeaks:
    """Return the GPU with this name, or the first one with this compute capability ("sm_89")."""
    for gpu in GPUS:
        if name.lower() in (gpu.name, gpu.capability):
            return gpu
    raise unknown("GPU", name, (f"{gpu.name} ({gpu.capability})" for gpu in GPUS))


def capability_of(name: str) -> str:
    """Return "sm_89" for "rtx-4090"; names that are not in GPUS, such as "current", are returned unchanged."""
    return next((gpu.capability for gpu in GPUS if gpu.name == name.lower()), name)


def roofline(gpu: GpuPeaks, kernels: int | None, bytes_moved: int | None, flops: Mapping[str, int] | None) -> Roofline | None:
    """Compute the roofline of an engine; None if one of its figures, or the peak of `gpu` for a type, is unknown."""
    if kernels is None or bytes_moved is None or flops is None:
        return None
    peaks = {kind: getattr(gpu, _PEAKS.get(kind, ""), 0) for kind in flops}
    if not all(peaks.values()):
        return None
    compute = sum(count / (peaks[kind] * 1e12) for kind, count in flops.items())
    return Roofline(gpu.name, bytes_moved / (gpu.bandwidth * 1e9), compute, kernels * LAUNCH)


def roofline_of_profile(gpu: GpuPeaks, profile: EngineProfile, flops_per_image: Mapping[str, float]) -> Roofline | None:
    """Compute the roofline of an optimization profile at its optimal batch; None where `roofline` returns it."""
    of_batch = {kind: round(count * profile.batch[1]) for kind, count in flops_per_image.items()}
    return roofline(gpu, profile.kernels, profile.bytes_moved, of_batch)
