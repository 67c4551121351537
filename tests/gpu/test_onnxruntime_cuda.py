"""ONNX Runtime's CUDA provider, on the GPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from cli.exported import copied, digits

import swin_deploy
from swin_deploy.compare import TOLERANCES, compare
from swin_deploy.errors import InputError

pytestmark = [pytest.mark.cuda]
FEED = np.random.default_rng(0).standard_normal((3, 3, 32, 32)).astype(np.float32)


@pytest.fixture(autouse=True)
def provider() -> None:
    ort = pytest.importorskip("onnxruntime", reason="the back end under test")
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        pytest.skip('this ONNX Runtime has no CUDA provider (pip install "swin-deploy[gpu]")')


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_answers_as_the_cpu_does(version: int, precision: str) -> None:
    with swin_deploy.load(digits(version), backend="onnxruntime", device="cpu", precision="fp32") as model:
        wanted = model.run({"pixel_values": FEED})["logits"]
    with swin_deploy.load(digits(version), backend="onnxruntime", device="cuda", precision=precision) as model:
        assert model.describe().device == "cuda:0"
        found = model.run({"pixel_values": FEED})["logits"]
        assert compare(found, wanted).within(TOLERANCES[precision])
        out = {"logits": np.full_like(found, np.nan)}
        assert model.run({"pixel_values": FEED}, out) is out
        assert np.array_equal(out["logits"], found)


def test_verified_on_the_gpu(tmp_path: Path) -> None:
    assert all(verdict.verified for verdict in swin_deploy.verify(copied(2, tmp_path / "b"), device="cuda"))


def test_a_tensor_on_the_gpu_is_not_copied_to_the_host() -> None:
    torch = pytest.importorskip("torch", reason="PyTorch makes the tensor")
    if not torch.cuda.is_available():
        pytest.skip("this PyTorch has no CUDA")
    tensor = torch.from_numpy(FEED).cuda()
    with swin_deploy.load(digits(2), backend="onnxruntime", device="cuda", precision="fp32") as model:
        wanted = model.run({"pixel_values": FEED})["logits"]
        for _ in range(20):  # written by torch's stream just before
            found = model.run({"pixel_values": (tensor * 2) / 2})["logits"]
            assert np.allclose(found, wanted, atol=1e-5)
        with pytest.raises(InputError, match="not contiguous"):
            model.run({"pixel_values": tensor.transpose(2, 3)})
    with swin_deploy.load(digits(2), device="cpu", precision="fp32") as model, pytest.raises(InputError, match="is on cuda:0"):
        model.run({"pixel_values": tensor})
