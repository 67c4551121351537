"""A hundred cases of the harness in benchmarks/fuzz: changed and hostile inputs end in an answer or in one sentence."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from cli.exported import exported_bundle, one_block

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="the harness needs process descriptors, which only Linux has")
def test_changed_inputs_end_in_an_answer_or_one_sentence(tmp_path: Path) -> None:
    bundle = exported_bundle("--weights", str(one_block()))
    command = [sys.executable, "-m", "benchmarks.fuzz", "all", "--cases", "100", "--workers", "1", "--bundle", str(bundle)]
    done = subprocess.run([*command, "--seeds", str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
