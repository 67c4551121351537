"""SWIN_DEPLOY_REQUIRE fails what was skipped for want of something, and nothing that cannot apply to the machine."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
CASES = """
import pytest
from applicable import not_applicable

@pytest.mark.cuda
def test_runs():
    pass

@pytest.mark.cuda
def test_does_not_apply():
    not_applicable("this GPU has no such unit")

@pytest.mark.cuda
def test_lacks_a_library():
    pytest.skip("cuDNN is not installed")

def test_without_a_marker():
    pytest.skip("h5py is not installed")
"""


@pytest.mark.parametrize(("required", "failed", "skipped"), [("", 0, 3), ("cuda", 1, 2)])
def test_what_is_required(required: str, failed: int, skipped: int, tmp_path: Path) -> None:
    """On a machine with a GPU, or what the tests take for one."""
    (tmp_path / "test_cases.py").write_text(CASES)
    code = (
        "import sys, conftest, pytest\nconftest.MISSING['cuda'] = lambda: None\nsys.exit(pytest.main(sys.argv[1:], [conftest]))"
    )
    options = ["-q", "-p", "no:cacheprovider", "-c", str(TESTS.parent / "pyproject.toml"), "--rootdir", str(tmp_path), "-n0"]
    command, env = [sys.executable, "-c", code, *options, str(tmp_path / "test_cases.py")], {"SWIN_DEPLOY_REQUIRE": required}
    done = subprocess.run(command, cwd=TESTS, env={**os.environ, **env}, capture_output=True, text=True)
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped)", done.stdout)}
    assert (counts.get("passed"), counts.get("failed", 0), counts.get("skipped")) == (1, failed, skipped), (
        done.stdout + done.stderr
    )
    assert "not applicable: this GPU has no such unit" in done.stdout
    assert bool(done.returncode) == bool(failed)
    if failed:
        assert "SWIN_DEPLOY_REQUIRE=cuda, and this test was skipped: cuDNN is not installed" in done.stdout
