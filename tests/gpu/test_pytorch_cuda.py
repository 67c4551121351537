"""The torch back end on the GPU: the CPU's answers, in float32 and not in TF32, and tensors that are there already."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from gpu.needs import bundle, needs_torch_cuda

import swin_deploy
from swin_deploy.parity import TOLERANCES, compare

pytestmark = [pytest.mark.cuda]
FEED = np.random.default_rng(0).standard_normal((3, 3, 32, 32)).astype(np.float32)


@pytest.fixture(autouse=True)
def torch() -> Any:
    return needs_torch_cuda()


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_answers_as_the_cpu_does(version: int, precision: str) -> None:
    with swin_deploy.load(bundle(version), trust=True, backend="torch", device="cpu", precision="fp32") as model:
        expected = model.run({"pixel_values": FEED})["logits"]
    with swin_deploy.load(bundle(version), trust=True, backend="torch", device="cuda", precision=precision) as model:
        assert model.describe().device == "cuda:0"
        found = model.run({"pixel_values": FEED})["logits"]
        assert compare(found, expected).within(TOLERANCES[precision])  # fp32: 1e-5, which TF32 would not keep
        out = {"logits": np.full_like(found, np.nan)}
        assert model.run({"pixel_values": FEED}, out) is out
        assert np.array_equal(out["logits"], found)


def test_verified_on_the_gpu() -> None:
    assert all(verdict.verified for verdict in swin_deploy.verify(bundle(2), trust=True, backend="torch", device="cuda"))


def test_a_tensor_on_the_gpu_whatever_stream_wrote_it(torch: Any) -> None:
    tensor = torch.from_numpy(FEED).cuda()
    with swin_deploy.load(bundle(2), trust=True, backend="torch", device="cuda", precision="fp32") as model:
        expected = model.run({"pixel_values": FEED})["logits"]
        for stream in (torch.cuda.default_stream(), torch.cuda.Stream()):
            with torch.cuda.stream(stream):
                stream.wait_stream(torch.cuda.default_stream())
                for _ in range(20):
                    found = model.run({"pixel_values": (tensor * 2) / 2})["logits"]
                    assert np.allclose(found, expected, atol=1e-5)
