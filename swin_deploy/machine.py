"""What this machine is: system, processor and memory, from what the operating system says, with no library beyond Python."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# What a processor may have that decides how fast a network runs on it: the kernel's word for it -> its usual name.
FEATURES = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx_vnni": "AVX-VNNI",
    "avx512_vnni": "AVX-512 VNNI",
    "avx512_bf16": "AVX-512 bf16",
    "avx512_fp16": "AVX-512 fp16",
    "amx_int8": "AMX int8",
    "amx_bf16": "AMX bf16",
    "asimd": "NEON",
    "asimddp": "NEON dot product",
    "asimdhp": "NEON fp16",
    "i8mm": "int8 matrix product",
    "bf16": "bf16",
    "sve": "SVE",
}


@dataclass(frozen=True)
class Machine:
    """`cores` are those of the machine and `usable_cores` those that this process may use; memory is in bytes.

    What the system does not tell is None, or an empty tuple of `features`.
    """

    python: str
    system: str
    processor: str
    cores: int
    usable_cores: int
    features: tuple[str, ...]
    memory: int | None
    free_memory: int | None

    def to_dict(self) -> dict[str, Any]:
        """The facts as JSON values."""
        return {**asdict(self), "features": list(self.features)}

    def __str__(self) -> str:
        cores = f"{self.usable_cores} of {self.cores} cores" if self.usable_cores < self.cores else f"{self.cores} cores"
        return ", ".join([self.processor, cores, *self.features])


def this_machine() -> Machine:
    """The machine that this runs on."""
    cores = os.cpu_count() or 1
    info = _text("/proc/cpuinfo")
    words = re.search(r"^(?:flags|Features)\s*:(.*)$", info, re.MULTILINE)
    found = set(words[1].split()) if words else set()
    return Machine(
        python=f"{platform.python_implementation()} {platform.python_version()}",
        system=f"{platform.system()} {platform.release()}, {platform.machine()}",
        processor=_processor(info),
        cores=cores,
        usable_cores=_usable_cores(cores),
        features=tuple(name for word, name in FEATURES.items() if word in found),
        memory=_memory("MemTotal", "SC_PHYS_PAGES"),
        free_memory=_memory("MemAvailable", "SC_AVPHYS_PAGES"),
    )


def _processor(info: str) -> str:
    board = _text("/proc/device-tree/model").strip("\0 \n")  # Jetson, Raspberry Pi
    name = re.search(r"^(?:model name|Hardware)\s*:\s*(.+)$", info, re.MULTILINE)
    if sys.platform == "darwin":
        done = subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, check=False)
        board = done.stdout.strip()
    return board or (name[1].strip() if name else "") or platform.processor() or platform.machine()


def _usable_cores(cores: int) -> int:
    """Those that the scheduler gives to this process, and no more than a container's quota of processor time."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    quota = re.match(r"(\d+) (\d+)", _text("/sys/fs/cgroup/cpu.max"))
    return min(usable, max(1, int(quota[1]) // int(quota[2]))) if quota else usable


def _memory(line: str, pages: str) -> int | None:
    found = re.search(rf"^{line}:\s*(\d+) kB", _text("/proc/meminfo"), re.MULTILINE)
    limit = _text("/sys/fs/cgroup/memory.max").strip()
    if found:
        size = int(found[1]) * 1024
        return min(size, int(limit)) if limit.isdigit() else size
    try:
        return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows; a system that does not tell
        return None


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


@dataclass(frozen=True)
class Gpu:
    """An NVIDIA GPU: its name, its compute capability ("sm_89"; "" where only nvidia-smi lists it), its memory in bytes."""

    name: str
    capability: str
    memory: int | None


def driver_and_gpus() -> tuple[str | None, tuple[Gpu, ...]]:
    """The NVIDIA driver's version, and the GPUs that nvidia-smi lists, whether or not this process may use them.

    Where there is no nvidia-smi (in a container, on a Jetson) the driver's own library is asked for the version.
    """
    query = ["nvidia-smi", "--query-gpu=driver_version,name,memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
        rows = [[part.strip() for part in line.split(",")] for line in done.stdout.splitlines() if line.count(",") == 2]
    except (OSError, subprocess.SubprocessError):
        rows = []
    gpus = tuple(Gpu(name, "", int(size) << 20 if size.isdigit() else None) for _, name, size in rows)
    return (rows[0][0] if rows else _driver_from_library()), gpus


def _driver_from_library() -> str | None:
    try:
        library = ctypes.CDLL("nvml.dll" if sys.platform == "win32" else "libnvidia-ml.so.1")
    except OSError:
        return None
    text = ctypes.create_string_buffer(80)
    if library.nvmlInit_v2() != 0:
        return None
    found = library.nvmlSystemGetDriverVersion(text, len(text)) == 0
    library.nvmlShutdown()
    return text.value.decode("ascii", "replace") if found else None
