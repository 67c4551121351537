"""What an engine is compiled for: the GPU, the options of the compiler, and the names that follow from them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from swin_deploy.dependencies import require
from swin_deploy.errors import EngineError, MissingDependencyError, UsageError
from swin_deploy.gpus import cuda_devices, seen_first
from swin_deploy.options import QUANTIZED, EngineSpec

# What releases of TensorRT differ in. docs/guides/engines.md has the table of releases, and the sources.
NEEDED = {  # by every engine: its name, and the attribute of the bindings that shows it
    "typed ONNX graphs (strongly typed networks, with a parser that can refit them)": "OnnxParserRefitter.refit_from_file",
    "execution contexts that allocate memory for one profile": "ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE",
    "progress monitor": "IProgressMonitor",
}
FOR_OPTIONS = {  # by an option or a precision
    "strip_weights": ("engines without weights", "BuilderFlag.REFIT_IDENTICAL"),
    "version_compatible": ("version-compatible engines", "BuilderFlag.VERSION_COMPATIBLE"),
    "hardware_compatible": ("hardware-compatible engines", "HardwareCompatibilityLevel.AMPERE_PLUS"),
    "bf16": ("bfloat16", "DataType.BF16"),
    "fp8": ("FP8", "DataType.FP8"),
}
PARSER_OPSETS = ((10, 6), 20, 22)  # before this release, its ONNX parser reads the first opset at most; later ones the second

# back end -> (module, name of the product)
COMPILERS = {"tensorrt": ("tensorrt", "TensorRT"), "tensorrt-rtx": ("tensorrt_rtx", "TensorRT for RTX")}


def rtx_gpus() -> tuple[str, ...]:
    """Return the GPUs that the installed TensorRT for RTX compiles for, such as ("sm_75", ..., "sm_121"); empty without it."""
    try:
        trt = require("tensorrt_rtx", "compile engines")
    except MissingDependencyError:
        return ()
    names = (re.fullmatch(r"SM(\d+)", name) for name in trt.ComputeCapability.__members__)
    return tuple(f"sm_{number}" for number in sorted(int(match[1]) for match in names if match))


def check_gpu(backend: str, gpu: str) -> None:
    """Raise UsageError for a GPU that `backend` cannot compile for, as far as the installed compiler tells."""
    if not re.fullmatch(r"sm_\d{2,3}", gpu):
        raise UsageError(
            f"Unknown GPU {gpu!r}. Expected 'current', a compute capability such as sm_89, or a name such as rtx-4090."
        )
    if backend != "tensorrt-rtx":
        return
    if gpu == "sm_90":
        raise UsageError(
            "TensorRT for RTX does not support SM90 (H100, H200). Use the back end tensorrt on a machine with that GPU."
        )
    if (known := rtx_gpus()) and gpu not in known:
        raise UsageError(
            f"TensorRT for RTX does not compile for {gpu}. Expected one of: {', '.join(known)}. Use the back end tensorrt on a "
            "machine with that GPU."
        )


def has_name(trt: Any, name: str) -> bool:
    """Return whether the bindings `trt` have an attribute such as "BuilderFlag.TF32"."""
    for part in name.split("."):
        trt = getattr(trt, part, None)
    return trt is not None


def refuse_lacking(trt: Any, spec: EngineSpec, opset: int) -> None:
    """Raise UsageError if this TensorRT lacks an option or the precision of `spec`, or does not read graphs of this opset."""
    release = str(trt.__version__)
    for asked, (feature, name) in FOR_OPTIONS.items():
        if (asked == spec.precision or getattr(spec, asked, False)) and not has_name(trt, name):
            raise UsageError(f"TensorRT {release} has no {feature}. Leave out the option, or install a newer TensorRT.")
    first, before, since = PARSER_OPSETS
    newest = since if tuple(map(int, re.findall(r"\d+", release)[:2])) >= first else before
    if opset > max(newest, before):
        way = "Build fp16" if spec.precision == "bf16" else f"Export the model again with --opset {newest}"
        way += " and quantize it again" if spec.precision in QUANTIZED else ""
        way += f", or install TensorRT {'.'.join(map(str, first))} or newer" if opset <= since else ""
        raise UsageError(
            f"The ONNX parser of TensorRT {release} reads opsets up to {newest}, and {spec.precision} graphs of this bundle "
            f"use opset {opset}. {way}."
        )


def has_fp8(gpu: str) -> bool:
    """Return whether a GPU of this compute capability ("sm_89") has FP8 matmuls."""
    return int(gpu.removeprefix("sm_")) >= 89


def target_gpu(backend: str, gpu: str) -> str:
    """Return the compute capability to compile for; that of the first GPU for "current", the only one for full TensorRT."""
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


def for_target(spec: EngineSpec, backend: str, gpu: str) -> EngineSpec:
    """Return `spec` for one back end and one GPU. Raises UsageError if that back end lacks an option or cannot build for it."""
    if gpu != "current":
        check_gpu(backend, gpu)
    return dataclasses.replace(spec, backend=backend, gpus=(gpu,))


def compiler_options(spec: EngineSpec) -> dict[str, Any]:
    """Return the options that are not left to the compiler, as JSON values for the manifest."""
    names = ("workspace", "optimization_level", "version_compatible", "hardware_compatible", "fused_attention", "strip_weights")
    values = {name: getattr(spec, name) for name in names}
    return {name: value for name, value in values.items() if value is not None and value is not (name == "fused_attention")}


def name_of_options(spec: EngineSpec) -> str:
    """Return the part of an engine's file name that tells its options; it differs for any two specs of one GPU."""
    words = [] if spec.batches == ((1, 1, 1),) else ["b" + "_".join(map(str, dict.fromkeys(sizes))) for sizes in spec.batches]
    words += [f"workspace{spec.workspace}"] if spec.workspace is not None else []
    words += [f"level{spec.optimization_level}"] if spec.optimization_level is not None else []
    words += ["vc"] * spec.version_compatible + ["hc"] * spec.hardware_compatible + ["unfused"] * (not spec.fused_attention)
    if len("-".join(words)) > 100:  # file names are limited in length
        words = [fingerprint({"profiles": spec.batches, **compiler_options(spec)})[:16]]
    return "-".join(words + ["stripped"] * spec.strip_weights)


def fingerprint(facts: Mapping[str, Any]) -> str:
    """Return the sha256 of JSON values, independent of the order of their keys."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
