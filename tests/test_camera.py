"""examples/camera.py, run as a user runs it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from cli.exported import EXAMPLES, digits, exported_bundle, one_block


def camera(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLES / "camera.py"), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


@pytest.mark.parametrize("batch", [1, 4])
def test_a_folder_of_frames(batch: int, tmp_path: Path) -> None:
    done = camera(digits(2), EXAMPLES / "digits/images", "--batch", batch, "--backend", "onnxruntime", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    assert [(row[0], row[-1]) for row in rows] == [(str(i), word) for i, word in enumerate(words)]
    assert all(float(row[2]) >= 0 and row[3] == "ms" for row in rows)
    assert "onnxruntime" in done.stderr


def test_stdout_that_is_closed(tmp_path: Path) -> None:
    """As with `| head -1`: no error message, and the remaining frames are not read."""
    reads, writes = os.pipe()
    os.close(reads)
    command = [sys.executable, EXAMPLES / "camera.py", digits(2), EXAMPLES / "digits/images", "--backend", "onnxruntime"]
    with os.fdopen(writes, "w") as closed:
        done = subprocess.run(command, cwd=tmp_path, stdout=closed, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 130
    assert "rror" not in done.stderr, done.stderr


def test_it_is_short() -> None:
    assert len((EXAMPLES / "camera.py").read_text(encoding="utf-8").splitlines()) <= 60


@pytest.mark.parametrize(("source", "said"), [("absent.mp4", "absent.mp4 does not exist."), ("empty", "empty has no images.")])
def test_invalid_sources(source: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    done = camera(digits(2), tmp_path / source, "--backend", "onnxruntime", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1].endswith(f"{said} Pass images or a video.")
    assert "Traceback" not in done.stderr


def test_a_bundle_for_another_task(tmp_path: Path) -> None:
    options = ("--weights", str(one_block()), "--task", "feature-extraction", "--output-attentions")
    done = camera(exported_bundle(*options), EXAMPLES / "digits/images", "--backend", "onnxruntime", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "is for feature-extraction. Pass a bundle for image classification" in done.stderr.splitlines()[-1]
