"""What is installed for each step, what of it is older than this package asks for, and the command that puts it right."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import packages_distributions, requires, version
from typing import Any

from swin_deploy.dependencies import installed, installed_versions


@dataclass(frozen=True)
class Step:
    """Something that this package does with libraries: the modules it imports, and the extras that bring them.

    `backend` is the name under which it runs bundles, and None where it makes them. `needs_gpu`: it does nothing without one;
    `runs_on_gpu`: it only compiles without one.
    """

    name: str
    modules: tuple[str, ...]
    extras: str
    backend: str | None = None
    needs_gpu: bool = False
    runs_on_gpu: bool = False


STEPS = (
    Step("ONNX Runtime, CPU", ("onnxruntime",), "onnxruntime", "onnxruntime"),
    Step("ONNX Runtime, CUDA", ("onnxruntime",), "gpu", "onnxruntime", needs_gpu=True),
    Step("ONNX Runtime, TensorRT", ("onnxruntime",), "gpu,tensorrt", "onnxruntime-tensorrt", needs_gpu=True),
    Step("OpenVINO", ("openvino",), "openvino", "openvino"),
    Step("PyTorch", ("torch", "onnx"), "export", "torch"),
    Step("TensorRT", ("tensorrt",), "tensorrt", "tensorrt", needs_gpu=True),
    Step("TensorRT for RTX", ("tensorrt_rtx",), "tensorrt-rtx", "tensorrt-rtx", runs_on_gpu=True),
    Step("export", ("torch", "onnx", "onnxscript", "onnx_graphsurgeon", "safetensors"), "export"),
    Step("quantize", ("onnx", "onnx_graphsurgeon", "onnxruntime"), "export,onnxruntime"),
    Step("hub", ("huggingface_hub",), "hub"),
    Step("TensorFlow checkpoints", ("h5py",), "tensorflow"),
)

WORKS, BROKEN, MISSING, NO_GPU = "works", "broken", "not installed", "needs a GPU"


@dataclass(frozen=True)
class Finding:
    """What there is for a step: its state (one of WORKS, BROKEN, MISSING, NO_GPU), versions of what it imports, what it `can`
    do here or why not, and the command that installs what is missing.
    """

    step: str
    state: str
    versions: Mapping[str, str]
    can: str
    command: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The finding as JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Trap:
    """Versions that do not go together: what is wrong, and the command that puts it right."""

    what: str
    command: str


def install(extras: str) -> str:
    """The command that installs extras of this package, such as "gpu,tensorrt"."""
    return f'pip install "swin-deploy[{extras}]"'


def unusable(step: Step, gpu: bool, found: Mapping[str, str]) -> Finding | None:
    """Why the step cannot be tried: what it needs is not there. None where it can. `found` are installed distributions."""
    missing = [module for module in step.modules if not installed(module)]
    if step.needs_gpu and not gpu:
        return Finding(step.name, NO_GPU, versions_for(step), "this machine has no usable NVIDIA GPU")
    if missing:
        replaced = "onnxruntime-gpu" not in found and "onnxruntime" in found and step.extras.startswith("gpu")
        extras = re.sub(r"\bonnxruntime\b", "gpu", step.extras) if "onnxruntime-gpu" in found else step.extras
        command = ("pip uninstall -y onnxruntime && " if replaced else "") + install(extras)
        return Finding(step.name, MISSING, versions_for(step), f"{', '.join(missing)} cannot be imported", command)
    return None


def versions_for(step: Step) -> dict[str, str]:
    """Distribution -> version of what the step imports; more than one may hold the same module."""
    holders = packages_distributions()
    names = dict.fromkeys(name for module in step.modules for name in holders.get(module, ()))
    return {name: version(name) for name in names}


def requirements() -> dict[str, str]:
    """Distribution -> the oldest version that this package takes, of it and of all its extras but that for its own tests."""
    found: dict[str, str] = {}
    for line in requires("swin-deploy") or ():
        match = re.match(r"([\w.-]+)\s*>=\s*([\w.]+)", line)
        if match and not re.search(r"""extra == ['"]test""", line):
            found[_normal(match[1])] = match[2]
    return found


def traps(found: Mapping[str, str], oldest: Mapping[str, str], torchvision_needs: Iterable[str], gpu: bool) -> tuple[Trap, ...]:
    """What does not go together in `found`, distribution -> version.

    `oldest` are those that this package takes; `torchvision_needs` the requirements that torchvision itself states.
    """
    traps = []
    both = {"onnxruntime", "onnxruntime-gpu"} <= found.keys()
    if both:
        again = install("gpu" if gpu else "onnxruntime")
        traps.append(
            Trap(
                "onnxruntime and onnxruntime-gpu are both installed, and write the same folder: what came last is what runs",
                f"pip uninstall -y onnxruntime onnxruntime-gpu && {again}",
            )
        )
    elif gpu and "onnxruntime" in found:
        traps.append(
            Trap(
                "onnxruntime is the build for CPUs, and this machine has an NVIDIA GPU",
                f"pip uninstall -y onnxruntime && {install('gpu')}",
            )
        )
    wanted = next((match[1] for line in torchvision_needs if (match := re.match(r"torch\s*\(?==\s*([\w.]+)", line))), None)
    if wanted and "torch" in found and _numbers(wanted) != _numbers(found["torch"]):
        traps.append(
            Trap(
                f"torchvision {found.get('torchvision', '')} is made for torch {wanted}, and torch is {found['torch']}",
                "pip install --upgrade torch torchvision",
            )
        )
    for name, least in oldest.items():
        if name in found and _numbers(found[name]) < _numbers(least):
            traps.append(
                Trap(f"{name} is {found[name]}, and {least} or newer is needed", f'pip install --upgrade "{name}>={least}"')
            )
    return tuple(traps)


def installed_traps(gpu: bool) -> tuple[Trap, ...]:
    """The traps in what is installed here."""
    oldest = requirements()
    found = installed_versions([*oldest, "torchvision"])
    return traps(found, oldest, (requires("torchvision") or ()) if "torchvision" in found else (), gpu)


def _numbers(text: str) -> tuple[int, ...]:
    """(2, 13, 0) of "2.13.0+cpu"; zeros at the end do not count."""
    match = re.match(r"\d+(?:\.\d+)*", text)
    numbers = [int(part) for part in match[0].split(".")] if match else []
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
