"""`bench` on a machine with a GPU: rows there beside those on the CPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gpu.needs import NAMES, bundle, needs_cuda_provider, needs_torch_cuda

from swin_deploy.bench.run import bench
from swin_deploy.gpus import cuda_devices

pytestmark = [pytest.mark.cuda]


def test_rows_on_the_gpu() -> None:
    needs_torch_cuda()
    needs_cuda_provider()
    found = bench(
        bundle(2),
        trust=True,
        batches=(2,),
        precisions=("fp32",),
        weights=str(Path(__file__).parents[2] / "examples/digits" / NAMES[2]),
        seconds=1.0,
        rounds=2,
    )
    assert found.gpus == {"cuda:0": cuda_devices()[0].name}
    on_gpu = [(row.case.backend, row.case.precision) for row in found.rows if row.case.device == "cuda:0"]
    assert {("pytorch", "fp32"), ("pytorch", "fp16"), ("onnxruntime", "fp32")} <= set(on_gpu)
    for row in found.rows:
        assert all(np.isfinite(row.round_ms))
        assert row.relative_l2 is not None
        assert row.relative_l2 < 1e-2  # PyTorch computes the patch embedding in TF32 by itself
    # torch.compile needs a C compiler; everything else that is left out is on the GPU
    assert {case.device for case in found.skipped if case.backend != "torch.compile"} <= {"cuda:0"}
    assert "on cuda:0" in found.reference
