"""Exported digits models classify held-out images."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cli.exported import EXAMPLES, digits, digits_split

import swin_deploy

pytest.importorskip("sklearn", reason="scikit-learn brings the images of the digits")


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("version", [1, 2])
def test_held_out_digits(version: int, precision: str) -> None:
    images, wanted = digits_split().test_images, digits_split().test_digits
    assert len(images) == 450
    with swin_deploy.load(digits(version), backend="onnxruntime", precision=precision) as model:
        answers = model.classify(list(images), top_k=1, batch_size=64)
    right = np.mean([best.index == digit for (best,), digit in zip(answers, wanted, strict=True)])
    assert right >= 0.97


def test_the_evaluation_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = [sys.executable, str(EXAMPLES / "digits/evaluate.py"), str(digits(2))]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    monkeypatch.syspath_prepend(EXAMPLES / "digits")
    monkeypatch.setattr(sys, "argv", [*command[1:], "--at-least", "1.1"])
    with pytest.raises(SystemExit, match="1"):
        runpy.run_path(command[1], run_name="__main__")
