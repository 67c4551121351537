"""What the tests on a real GPU need besides it: each function skips where it is missing."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
from applicable import not_applicable

from swin_deploy.gpus import cuda_devices


def needs_exporter() -> None:
    if importlib.util.find_spec("torch") is None:
        not_applicable("PyTorch, which exports the bundles of these tests, is not installed")


def needs_cuda_provider() -> Any:
    ort = pytest.importorskip("onnxruntime", reason="the back end under test")
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        pytest.skip('this ONNX Runtime has no CUDA provider (pip install "swin-deploy[gpu]")')
    return ort


def needs_torch_cuda() -> Any:
    torch = pytest.importorskip("torch", reason="PyTorch makes the tensors")
    if not torch.cuda.is_available():
        pytest.skip("this PyTorch is built without CUDA")
    return torch


def needs_rtx() -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    from swin_deploy.exporters.engines.targets import rtx_gpus

    if cuda_devices()[0].capability not in rtx_gpus():
        not_applicable(f"TensorRT for RTX does not compile for {cuda_devices()[0].capability}")
