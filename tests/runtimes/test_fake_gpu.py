"""The simulated GPU has the names and parameters of the real packages, so that it cannot drift from them."""

from __future__ import annotations

import inspect
import re
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxruntime", reason="the simulated libraries compute with it")

from fake_gpu import ENUMS, FakeGpu, InferenceSession, IOBinding, RunOptions, tensorrt_module

from swin_deploy.runtimes.gpu import cuda_context, io_buffers


def parameters(function: Any) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]


def documented(function: Any) -> list[list[str]]:
    """The parameters of each overload, from a docstring such as "copy(dst, size_t ByteCount)" or "f(name: str) -> bool"."""
    signatures = re.findall(rf"\b{function.__name__}\((.*?)\)(?: ->|$)", function.__doc__, re.MULTILINE)
    found = [[re.split(r"[:=]", part)[0].split()[-1] for part in text.split(", ") if part] for text in signatures]
    return [[name for name in names if name != "self"] for names in found]


def test_cuda_bindings() -> None:
    real = pytest.importorskip("cuda.bindings.driver", reason="cuda-bindings is not installed")
    fake = FakeGpu().driver()
    functions = [name for name in vars(fake) if name.startswith("cu")]
    for name in functions:
        assert parameters(getattr(fake, name)) in documented(getattr(real, name)), name
    assert {m.name: m.value for m in fake.CUstreamCaptureMode} == {
        f"CU_STREAM_CAPTURE_MODE_{name}": int(getattr(real.CUstreamCaptureMode, f"CU_STREAM_CAPTURE_MODE_{name}"))
        for name in ("GLOBAL", "THREAD_LOCAL", "RELAXED")
    }
    used = set(re.findall(r"[a-z]river\.(cu\w+)", inspect.getsource(cuda_context)))
    assert used == set(functions)
    assert (int(real.CUstream_flags.CU_STREAM_NON_BLOCKING), int(real.CUevent_flags.CU_EVENT_DISABLE_TIMING)) == (1, 2)
    assert (real.CU_STREAM_LEGACY, int(real.CUresult.CUDA_SUCCESS)) == (cuda_context.LEGACY_STREAM, 0)


@pytest.mark.parametrize("name", ["tensorrt_rtx", "tensorrt_lean_bindings"])
def test_tensorrt(name: str) -> None:
    real = pytest.importorskip(name, reason=f"{name} is not installed")
    fake = tensorrt_module(FakeGpu(), "tensorrt-rtx")
    kinds = [kind for kind in vars(fake) if inspect.isclass(getattr(fake, kind)) and kind not in ("ILogger", "Severity")]
    only_rtx = {"Config", "Cache", "Validity", "Invalidity", "GraphStrategy", "Specialization"}
    if name != "tensorrt_rtx":
        kinds = [kind for kind in kinds if not any(part in kind for part in only_rtx)]
    assert len(kinds) >= 7
    for kind in kinds:
        found, expected = getattr(fake, kind), getattr(real, kind)
        if kind in ENUMS or kind == "EngineInvalidityDiagnostics":
            assert set(found.__members__) <= set(expected.__members__), kind
            continue
        for method, function in inspect.getmembers(found, inspect.isfunction):
            if method.startswith("_") or method == "error" or (name != "tensorrt_rtx" and method == "get_engine_validity"):
                continue
            if name != "tensorrt_rtx" and method == "create_runtime_config":
                continue
            assert parameters(function) in documented(getattr(expected, method)), f"{kind}.{method}"


def test_onnxruntime() -> None:
    ort = pytest.importorskip("onnxruntime", reason="the provider under test")
    assert len(parameters(RunOptions.add_run_config_entry)) == len(documented(ort.RunOptions.add_run_config_entry)[0])
    for kind, real in ((IOBinding, ort.IOBinding), (InferenceSession, ort.InferenceSession)):
        for name, function in inspect.getmembers(kind, inspect.isfunction):
            if not name.startswith("_"):
                assert parameters(function) == parameters(getattr(real, name))[: len(parameters(function))], name


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
