"""`bench` on a machine with a GPU: rows there beside those on the CPU."""

from __future__ import annotations

import numpy as np
import pytest
from cli.exported import WEIGHTS, digits

from swin_deploy.bench.run import bench
from swin_deploy.gpus import cuda_devices

torch = pytest.importorskip("torch", reason="PyTorch is the reference")

pytestmark = [pytest.mark.cuda]


def test_pytorch_and_every_back_end_have_rows_on_the_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("this PyTorch has no CUDA")
    found = bench(digits(2), batches=(2,), precisions=("fp32",), weights=WEIGHTS[2], seconds=1.0, rounds=2)
    assert found.gpus == {"cuda:0": cuda_devices()[0].name}
    of_torch = [(row.case.backend, row.case.precision) for row in found.rows if row.case.device == "cuda:0"]
    assert of_torch[:3] == [("pytorch", "fp32"), ("pytorch", "fp16"), ("torch.compile", "fp16")]
    for row in found.rows:
        assert all(np.isfinite(row.round_ms))
        assert row.relative_l2 is not None
        assert row.relative_l2 < 1e-2  # PyTorch computes the patch embedding in TF32 by itself
    assert {one.case.device for one in found.skipped} <= {"cuda:0"}
    assert "on cuda:0" in found.reference
