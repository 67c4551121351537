"""The simulated GPU has the functions and parameters of the real packages, so that it cannot drift from them."""

from __future__ import annotations

import inspect
import re
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxruntime", reason="the simulated libraries compute with it")

import fake_gpu

from swin_deploy.runtimes.gpu import cuda_context, io_buffers


def parameters(function: Any) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]


def documented(function: Any) -> set[int]:
    """How many parameters each overload has, from a docstring such as "copy(dst, size_t count)" or "f(self, name) -> bool"."""
    signatures = re.findall(rf"\b{function.__name__}\((.*?)\)(?: ->|$)", function.__doc__, re.MULTILINE)
    return {len([part for part in text.split(", ") if part and not part.startswith("self")]) for text in signatures}


def test_cuda_bindings() -> None:
    real = pytest.importorskip("cuda.bindings.driver", reason="cuda-bindings is not installed")
    fake = fake_gpu.FakeGpu().driver()
    functions = [name for name in vars(fake) if name.startswith("cu")]
    for name in functions:
        assert len(parameters(getattr(fake, name))) in documented(getattr(real, name)), name
    assert set(re.findall(r"[a-z]river\.(cu\w+)", inspect.getsource(cuda_context))) == set(functions)
    assert int(real.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL) == 1
    assert (int(real.CUstream_flags.CU_STREAM_NON_BLOCKING), int(real.CUevent_flags.CU_EVENT_DISABLE_TIMING)) == (1, 2)
    assert (real.CU_STREAM_LEGACY, int(real.CUresult.CUDA_SUCCESS)) == (cuda_context.LEGACY_STREAM, 0)


@pytest.mark.parametrize("name", ["tensorrt_rtx", "tensorrt_lean_bindings"])
def test_tensorrt(name: str) -> None:
    real = pytest.importorskip(name, reason=f"{name} is not installed")
    only_rtx = ("EngineV", "EngineI", "CudaGraph", "DynamicShapes", "get_engine_validity", "create_runtime_c", "set_runtime_c")
    for kind, members in fake_gpu.ENUMS.items():
        if name == "tensorrt_rtx" or not kind.startswith(only_rtx):
            assert set(members.__members__) <= set((real.ILogger if kind == "Severity" else real).__dict__[kind].__members__)
    for fake in (fake_gpu.Runtime, fake_gpu.ICudaEngine, fake_gpu.IExecutionContext, fake_gpu.IRuntimeConfig):
        for method, function in inspect.getmembers(fake, inspect.isfunction):
            if method.startswith("_") or (
                name != "tensorrt_rtx" and method.startswith((*only_rtx, "serialize", "deserialize"))
            ):
                continue
            kind = real.IRuntimeCache if method in ("serialize", "deserialize") else getattr(real, fake.__name__)
            assert len(parameters(function)) in documented(getattr(kind, method)), f"{fake.__name__}.{method}"


def test_onnxruntime() -> None:
    ort = pytest.importorskip("onnxruntime", reason="the provider under test")
    assert len(parameters(fake_gpu.RunOptions.add_run_config_entry)) in documented(ort.RunOptions.add_run_config_entry)
    cases = [("IOBinding", "bind_input"), ("IOBinding", "bind_output"), ("InferenceSession", "run_with_iobinding")]
    for kind, name in cases:
        expected = parameters(getattr(getattr(fake_gpu, kind), name))
        assert parameters(getattr(getattr(ort, kind), name))[: len(expected)] == expected


class GpuTensor:
    """A tensor of PyTorch's that says of itself that it is on the GPU cuda:1."""

    def __init__(self, tensor: Any) -> None:
        self.tensor = tensor

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 1

    def __dlpack__(self, *, stream: int, max_version: Any = None) -> Any:
        assert stream == cuda_context.LEGACY_STREAM
        return self.tensor.__dlpack__()


@pytest.mark.parametrize("dtype", ["float32", "float16", "uint8", "bool"])
def test_a_tensor_on_the_gpu_is_described_by_cuda_core(dtype: str) -> None:
    """As PyTorch itself describes it."""
    pytest.importorskip("cuda.core", reason="cuda-core is not installed")
    torch = pytest.importorskip("torch", reason="PyTorch makes the tensors")
    tensor = torch.zeros((4, 3, 8, 6), dtype=getattr(torch, dtype))[1:3]
    found = io_buffers.device_tensor(GpuTensor(tensor), "cuda:1")
    assert (found.device, found.dtype, found.shape) == ("cuda:1", np.dtype(dtype), tuple(tensor.shape))
    assert found.pointer == tensor.data_ptr()
    with pytest.raises(ValueError, match="not contiguous"):
        io_buffers.device_tensor(GpuTensor(tensor.transpose(2, 3)), "cuda:1")
    with pytest.raises(BufferError, match="gradient"):
        io_buffers.device_tensor(GpuTensor(torch.zeros(2, requires_grad=True)), "cuda:1")
