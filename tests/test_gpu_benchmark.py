"""benchmarks/gpu.py: its plan, its floors, and its table."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def gpu() -> Any:
    spec = importlib.util.spec_from_file_location("gpu_benchmark", Path(__file__).resolve().parents[1] / "benchmarks/gpu.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    __import__("sys").modules["gpu_benchmark"] = module
    spec.loader.exec_module(module)
    return module


def test_the_most_important_cells_come_first(gpu: Any) -> None:
    planned = gpu.cells(gpu.NETWORKS[:4], gpu.BATCHES, gpu.TYPES)
    assert len(planned) == len(set(planned)) == 32
    assert {(one.batch, one.precision) for one in planned[:4]} == {(1, "fp16")}
    assert {one.batch for one in planned[:16]} == {1, 32}
    assert planned[0].file(Path("r")).name == "swin-tiny-1-fp16.json"


@pytest.mark.parametrize(("moved", "operations", "ms", "bound"), [(4e9, 1e12, 2.0, "memory"), (1e9, 3e12, 3.0, "compute")])
def test_the_floor_is_the_larger_of_two_times(gpu: Any, moved: float, operations: float, ms: float, bound: str) -> None:
    floor = gpu.Floor(moved, operations, bandwidth=2e12, rate=1e15)
    assert (floor.ms, floor.bound) == (pytest.approx(ms), bound)


def test_the_table_compares_with_the_fastest_mode_of_torch_compile(gpu: Any) -> None:
    rows = {
        "ours, ONNX Runtime": {"wall": [1.0, 3.0, 2.0], "event": [0.9, 2.9, 1.9], "relative_l2": 1e-3},
        "torch.compile": {"wall": [2.0, 6.0, 5.0], "event": [1.0] * 3, "relative_l2": 2e-3},
        "torch.compile, CUDA graph": {"wall": [4.0, 4.0, 4.0], "event": [1.0] * 3, "relative_l2": 2e-3},
        "torch.compile, max-autotune": {"failed": "no compiler"},
    }
    assert gpu.ratio(rows, "ours, ONNX Runtime", "torch.compile, CUDA graph") == 0.5
    assert gpu.ratio(rows, "ours, ONNX Runtime", "torch.compile, max-autotune") is None
    cell = {"network": "swin-tiny", "batch": 1, "precision": "fp16", "floor": {"ms": 0.5, "bound": "memory"}, "rows": rows}
    lines = gpu.table([cell]).splitlines()
    assert lines[2] == "| swin-tiny | 1 | fp16 | ours, ONNX Runtime | 2.000 | 1.900 | 0.500 (memory) | 0.50 | 1.0e-03 |"
    assert "failed: no compiler" in lines[5]
    assert {line.count("|") for line in lines} == {10}
