"""What the tests on a real GPU need besides it. Each function skips where it is missing.

The bundles are those that pack.py packed, where SWIN_DEPLOY_TEST_BUNDLES names their folder. Otherwise they are exported, which
needs PyTorch. Both PyTorch and TensorRT for RTX may be absent from a device: SWIN_DEPLOY_REQUIRE=cuda does not require them.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from applicable import not_applicable
from once import once

from swin_deploy.gpus import cuda_devices

PACKED = os.environ.get("SWIN_DEPLOY_TEST_BUNDLES", "")
NAMES = {1: "swin-digits", 2: "swinv2-digits"}
BATCHES = [(1, 1, 1), (1, 4, 8)]


def bundle(version: int) -> Path:
    """The digits model of a Swin version in fp32, fp16 and INT8, for 32 and 48 pixels. Copy it before changing it."""
    if PACKED:
        return Path(PACKED) / NAMES[version]
    if importlib.util.find_spec("torch") is None:
        not_applicable("PyTorch is not installed, and SWIN_DEPLOY_TEST_BUNDLES names no folder of tests/gpu/pack.py")
    from gpu.pack import pack

    return once(f"packed-{version}", lambda path: pack(path, version, [])) / NAMES[version]


def copied(version: int, target: Path) -> Path:
    """A copy of `bundle(version)` at `target`."""
    shutil.copytree(bundle(version), target)
    return target


def needs_cuda_provider() -> Any:
    ort = pytest.importorskip("onnxruntime", reason="the back end under test")
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        pytest.skip('this ONNX Runtime has no CUDA provider (pip install "swin-deploy[gpu]")')
    return ort


def needs_torch_cuda() -> Any:
    if importlib.util.find_spec("torch") is None:
        not_applicable("PyTorch, which makes the tensors, is not installed")
    import torch

    if not torch.cuda.is_available():
        not_applicable("this PyTorch is built without CUDA")
    return torch


def needs_rtx() -> None:
    if importlib.util.find_spec("tensorrt_rtx") is None:
        not_applicable("TensorRT for RTX is not installed")
    from swin_deploy.exporters.engines.targets import rtx_gpus

    if cuda_devices()[0].capability not in rtx_gpus():
        not_applicable(f"TensorRT for RTX does not compile for {cuda_devices()[0].capability}")
