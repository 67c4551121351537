"""The measuring process: its memory, why a model did not load, and its end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cli.exported import digits

from swin_deploy.bench.worker import Child
from swin_deploy.errors import BackendError


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only on Linux does /proc know the peak of a process")
def test_peak_memory_is_not_that_of_the_parent_process() -> None:
    held = np.ones(40_000_000)  # 320 MB, which getrusage would count for a process started now
    code = "from swin_deploy.bench.worker import peak_memory; print(peak_memory())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parent)
    assert held.nbytes == 320_000_000
    assert 5e6 < int(done.stdout) < 200e6


def request(tmp_path: Path, **changes: object) -> dict[str, object]:
    usual = {"bundle": str(digits(2)), "backend": "onnxruntime", "precision": "fp32", "threads": 1, "batch": 2}
    return {**usual, "answer": str(tmp_path / "answer.npz"), **changes}


def test_the_reason_why_a_model_does_not_load(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="no int8 graph"):
        Child(request(tmp_path, precision="int8"))


def test_a_process_that_is_killed(tmp_path: Path) -> None:
    with Child(request(tmp_path)) as child:
        assert np.load(tmp_path / "answer.npz")["logits"].shape == (2, 10)
        assert len(child.milliseconds(0.01)) >= 1
        os.kill(child.pid, signal.SIGKILL)
        with pytest.raises(BackendError, match="killed by the system"):
            child.milliseconds(0.01)
