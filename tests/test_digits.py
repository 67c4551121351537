"""Exported digits models classify held-out images."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cli.exported import EXAMPLES, WEIGHTS, digits

import swin_deploy

pytest.importorskip("sklearn", reason="scikit-learn brings the images of the digits")


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> tuple[np.ndarray, np.ndarray]:
    """Return the held-out images and their digits."""
    file = tmp_path_factory.mktemp("digits") / "split.npz"
    code = (
        "import sys, numpy; sys.path.insert(0, sys.argv[1]); from digits import split\n"
        "data = split(); numpy.savez(sys.argv[2], images=data.test_images, digits=data.test_digits)"
    )
    subprocess.run([sys.executable, "-c", code, str(EXAMPLES / "digits"), str(file)], check=True)
    with np.load(file) as arrays:
        return arrays["images"], arrays["digits"]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("version", [1, 2])
def test_held_out_digits(version: int, precision: str, held_out: tuple[np.ndarray, np.ndarray]) -> None:
    images, wanted = held_out
    assert len(images) == 450
    with swin_deploy.load(digits(version), precision=precision) as model:
        answers = model.classify(list(images), top_k=1, batch_size=64)
    right = np.mean([best.index == digit for (best,), digit in zip(answers, wanted, strict=True)])
    assert right >= 0.97


@pytest.mark.parametrize("version", [1, 2])
def test_labels_of_the_example_images(version: int) -> None:
    words = list(json.loads((WEIGHTS[version] / "config.json").read_text())["id2label"].values())
    paths = [EXAMPLES / f"digits/images/{digit}.png" for digit in range(10)]
    with swin_deploy.load(digits(version), precision="fp32") as model:
        assert [best.label for (best,) in model.classify(paths, top_k=1)] == words


def test_the_evaluation_example(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "digits/evaluate.py"), str(digits(2))]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert subprocess.run([*command, "--at-least", "1.1"], cwd=tmp_path, capture_output=True).returncode == 1
