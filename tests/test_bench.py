"""The measuring process tells its own memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="/proc tells a process's own peak on Linux alone")
def test_peak_memory_is_not_that_of_the_process_that_started_it() -> None:
    held = np.ones(40_000_000)  # 320 MB here, which getrusage would count to a process started now
    code = "from swin_deploy.bench import _peak_memory_mb; print(_peak_memory_mb())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parent)
    assert held.nbytes == 320_000_000
    assert 5 < float(done.stdout) < 200
