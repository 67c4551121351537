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

@pytest.mark.cuda
@pytest.mark.tensorrt
def test_of_tensorrt():
    pass

def test_without_a_marker():
    pytest.skip("h5py is not installed")
"""


@pytest.mark.parametrize(
    ("required", "has_tensorrt", "counts"),  # passed, failed, skipped
    [("", True, (2, 0, 3)), ("cuda", True, (2, 1, 2)), ("cuda", False, (1, 1, 3)), ("cuda,tensorrt", False, (1, 2, 2)),
     ("cuda,tensorrt", True, (2, 1, 2))],
)  # fmt: skip
def test_what_is_required(required: str, has_tensorrt: bool, counts: tuple[int, ...], tmp_path: Path) -> None:
    """On a machine with a GPU, or what the tests take for one, with TensorRT or without."""
    (tmp_path / "test_cases.py").write_text(CASES)
    code = (
        "import sys, conftest, pytest\nconftest.MISSING['cuda'] = lambda: None\n"
        f"conftest.MISSING['tensorrt'] = lambda: {None if has_tensorrt else 'TensorRT is not installed'!r}\n"
        "sys.exit(pytest.main(sys.argv[1:], [conftest]))"
    )
    options = ["-q", "-p", "no:cacheprovider", "-c", str(TESTS.parent / "pyproject.toml"), "--rootdir", str(tmp_path), "-n0"]
    command, env = [sys.executable, "-c", code, *options, str(tmp_path / "test_cases.py")], {"SWIN_DEPLOY_REQUIRE": required}
    done = subprocess.run(command, cwd=TESTS, env={**os.environ, **env}, capture_output=True, text=True)
    found = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|error)", done.stdout)}
    found["failed"] = found.get("failed", 0) + found.get("error", 0)
    assert tuple(found.get(word, 0) for word in ("passed", "failed", "skipped")) == counts, done.stdout + done.stderr
    assert "not applicable: this GPU has no such unit" in done.stdout
    assert bool(done.returncode) == bool(counts[1])
    if counts[1]:
        assert "SWIN_DEPLOY_REQUIRE=cuda, and this test was skipped: cuDNN is not installed" in done.stdout


def test_the_gpu_tests_need_no_exporter_and_no_compiler(tmp_path: Path) -> None:
    """They are collected and skipped where nothing but ONNX Runtime is installed, from packed bundles."""
    absent = ("torch", "transformers", "onnx", "onnx_graphsurgeon", "safetensors", "tensorrt", "tensorrt_rtx")
    code = f"import sys; sys.modules.update(dict.fromkeys({absent!r})); import pytest\nsys.exit(pytest.main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "-q", "-n0", "-p", "no:cacheprovider", "--collect-only", str(TESTS / "gpu")]
    env = {**os.environ, "SWIN_DEPLOY_TEST_BUNDLES": str(tmp_path)}
    done = subprocess.run(command, cwd=TESTS, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(re.findall(r"(\d+) tests collected", done.stdout)[0]) > 50
