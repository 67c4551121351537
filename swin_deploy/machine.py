"""Facts about this machine: system, processor, cores and memory."""

from __future__ import annotations

import functools
import os
import platform
import re
import sys
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from swin_deploy.dependencies import installed, require

# Processor features that decide how fast a network runs: the flag of the operating system -> its usual name.
FEATURES = {
    "avx2": "AVX2", "avx512f": "AVX-512", "avx_vnni": "AVX-VNNI", "avx512_vnni": "AVX-512 VNNI",
    "avx512_bf16": "AVX-512 bf16", "avx512_fp16": "AVX-512 fp16", "amx_int8": "AMX int8", "amx_bf16": "AMX bf16",
    "asimd": "NEON", "asimddp": "NEON dot product", "asimdhp": "NEON fp16", "i8mm": "int8 matrix multiply",
    "bf16": "bf16", "sve": "SVE",
}  # fmt: skip
EIGHT_BIT = ("AVX-VNNI", "AVX-512 VNNI", "AMX int8")  # features that add 8-bit products in 32 bits
PAIR_LIMIT = 128  # sums of two weights whose products with up to 255 fit into the 16 bits of other x86 processors


@dataclass(frozen=True)
class Machine:
    """A machine. `usable_cores` are those that this process may use. Memory is in bytes; None without psutil."""

    python: str
    system: str
    processor: str
    cores: int
    usable_cores: int
    features: tuple[str, ...]
    memory: int | None
    free_memory: int | None

    def __str__(self) -> str:
        cores = f"{self.usable_cores} of {self.cores} cores" if self.usable_cores < self.cores else f"{self.cores} cores"
        return ", ".join([self.processor, cores, *self.features])


def this_machine() -> Machine:
    """Return the facts about this machine, as far as the system and the libraries of the extra `bench` know them."""
    processor, features = processor_name(), processor_features()
    if sys.platform != "linux" and installed("cpuinfo"):  # on Linux py-cpuinfo reads the same file, and takes 1.3 s
        facts = require("cpuinfo", "describe the processor").get_cpu_info()
        processor, features = facts.get("brand_raw", processor), _features(facts.get("flags", []))
    total, free = memory_sizes()
    return Machine(
        python=f"{platform.python_implementation()} {platform.python_version()}",
        system=f"{platform.system()} {platform.release()}, {platform.machine()}",
        processor=processor,
        cores=os.cpu_count() or 1,
        usable_cores=usable_cores(),
        features=features,
        memory=total,
        free_memory=free,
    )


def processor_name() -> str:
    """Return the name of the board (Jetson, Raspberry Pi) or of the processor."""
    board = _text("/proc/device-tree/model").strip("\0 \n")
    name = re.search(r"^(?:model name|Hardware)\s*:\s*(.+)$", _cpuinfo(), re.MULTILINE)
    return board or (name[1].strip() if name else "") or platform.processor() or platform.machine()


def processor_features() -> tuple[str, ...]:
    """Return the names of the features of the processor that decide how fast a network runs; on Linux only."""
    flags = re.search(r"^(?:flags|Features)\s*:(.*)$", _cpuinfo(), re.MULTILINE)
    return _features(flags[1].split() if flags else ())


def saturates(features: Collection[str]) -> bool:
    """Return whether a processor adds two 8-bit products in 16 bits, as x86 processors without any of `EIGHT_BIT` do.

    False where the features are not known.
    """
    known = bool(features) or bool(_cpuinfo())
    return known and platform.machine().lower() in ("x86_64", "amd64") and not any(name in features for name in EIGHT_BIT)


def _features(flags: Collection[str]) -> tuple[str, ...]:
    return tuple(name for flag, name in FEATURES.items() if flag in flags)


def usable_cores() -> int:
    """Return the number of cores that the scheduler and the CPU quota of a container leave to this process."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = re.match(r"(\d+) (\d+)", _text("/sys/fs/cgroup/cpu.max"))
    return min(usable, max(1, int(quota[1]) // int(quota[2]))) if quota else usable


def memory_sizes() -> tuple[int | None, int | None]:
    """Return the total and the available memory in bytes, at most the limit of a container; None without psutil."""
    if not installed("psutil"):
        return None, None
    found = require("psutil", "measure memory").virtual_memory()
    limit = _text("/sys/fs/cgroup/memory.max").strip()
    most = int(limit) if limit.isdigit() else int(found.total)
    return min(int(found.total), most), min(int(found.available), most)


@functools.cache  # the kernel writes it again at each reading, with a paragraph for every core
def _cpuinfo() -> str:
    return _text("/proc/cpuinfo")


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
