"""Versions of installed packages: what is too old, and which known conflicts there are."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import packages_distributions, requires, version

from swin_deploy.dependencies import installed_versions


@dataclass(frozen=True)
class VersionConflict:
    """Installed versions that do not work together, and the command that fixes them."""

    problem: str
    command: str


def install_command(extras: str) -> str:
    """Return the command that installs extras of this package, such as "gpu,tensorrt"."""
    return f'pip install "swin-deploy[{extras}]"'


def versions_of(modules: Iterable[str]) -> dict[str, str]:
    """Return distribution -> version for `modules`; several distributions may hold the same module."""
    holders = packages_distributions()
    return {name: version(name) for module in modules for name in holders.get(module, ())}


def minimum_versions() -> dict[str, str]:
    """Return distribution -> lowest version that this package and its extras accept; those of its own tests are left out."""
    found: dict[str, str] = {}
    for line in requires("swin-deploy") or ():
        match = re.match(r"([\w.-]+)(?:\[.*?\])?\s*>=\s*([\w.]+)", line)
        if match and not re.search(r"""extra == ['"](test|docs)""", line):
            found[re.sub(r"[-_.]+", "-", match[1]).lower()] = match[2]
    return found


def version_conflicts(
    found: Mapping[str, str], minimum: Mapping[str, str], torchvision_needs: Iterable[str], gpu: bool
) -> tuple[VersionConflict, ...]:
    """Find the known conflicts between the versions `found`; `gpu` is whether this machine has a usable NVIDIA GPU."""
    conflicts = []
    if {"onnxruntime", "onnxruntime-gpu"} <= found.keys():
        problem = "onnxruntime and onnxruntime-gpu are both installed, and the one installed last overwrites the other"
        again = install_command("gpu" if gpu else "onnxruntime")
        conflicts.append(VersionConflict(problem, f"pip uninstall -y onnxruntime onnxruntime-gpu && {again}"))
    elif gpu and "onnxruntime" in found:
        problem = "onnxruntime is the CPU build, and this machine has an NVIDIA GPU"
        conflicts.append(VersionConflict(problem, f"pip uninstall -y onnxruntime && {install_command('gpu')}"))
    wanted = next((match[1] for line in torchvision_needs if (match := re.match(r"torch\s*\(?==\s*([\w.]+)", line))), None)
    if wanted and "torch" in found and _numbers(wanted) != _numbers(found["torch"]):
        problem = f"torchvision {found.get('torchvision', '')} needs torch {wanted}, and torch {found['torch']} is installed"
        conflicts.append(VersionConflict(problem, "pip install --upgrade torch torchvision"))
    for name, lowest in minimum.items():
        if name in found and _numbers(found[name]) < _numbers(lowest):
            problem = f"{name} {found[name]} is too old; {lowest} or newer is needed"
            conflicts.append(VersionConflict(problem, f'pip install --upgrade "{name}>={lowest}"'))
    return tuple(conflicts)


# Faults of TensorRT that change results: first release, first release without it (None: none is known), GPUs (empty: all),
# what is wrong, and what to run.
KNOWN_FAULTS = (
    (
        (10, 3), (10, 5), (), "computes some vision transformers wrongly in fp16 (NVIDIA/TensorRT issues 4723 and 4742)",
        "swin-deploy verify BUNDLE --backend tensorrt --device cuda",
    ),
    (
        (10, 0), None, ("sm_120", "sm_121"), "computes some fused attention wrongly in fp16 and bf16 on Blackwell "
        "(NVIDIA/TensorRT issue 4837)", "swin-deploy build-engine BUNDLE --backend tensorrt --no-fused-attention",
    ),
)  # fmt: skip


def known_faults(release: str, gpus: Iterable[str]) -> tuple[VersionConflict, ...]:
    """Find the known faults of this release of TensorRT on GPUs such as "sm_120"."""
    numbers = _numbers(release)
    return tuple(
        VersionConflict(f"TensorRT {release} {problem}", command)
        for first, fixed, of, problem, command in KNOWN_FAULTS
        if first <= numbers and (fixed is None or numbers < fixed) and (not of or set(of) & set(gpus))
    )


def installed_conflicts(gpu: bool) -> tuple[VersionConflict, ...]:
    """Find the known conflicts between the versions that are installed on this machine."""
    minimum = minimum_versions()
    found = installed_versions([*minimum, "torchvision"])
    return version_conflicts(found, minimum, (requires("torchvision") or ()) if "torchvision" in found else (), gpu)


def _numbers(text: str) -> tuple[int, ...]:
    """Return (2, 13) for "2.13.0+cpu": without the zeros at the end."""
    match = re.match(r"\d+(?:\.\d+)*", text)
    return tuple(int(part) for part in re.sub(r"(\.0+)+$", "", match[0]).split(".")) if match else ()
