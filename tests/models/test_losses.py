"""The loss beside the outputs, against transformers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the networks are torch networks")
pytest.importorskip("transformers", reason="transformers is the reference for the networks")

from models.test_sweep import feeds_of, pristine  # noqa: E402

from swin_deploy.models.checkpoints import checkpoint_from_path  # noqa: E402
from swin_deploy.models.swin import SwinNetwork  # noqa: E402
from swin_deploy.tasks import TaskSpec  # noqa: E402

LABELS: dict[str | None, Any] = {
    None: torch.tensor([1, 4]),
    "regression": torch.linspace(-1, 1, 10).reshape(2, 5),
    "multi_label_classification": torch.tensor([[1.0, 0, 0, 1, 0], [0, 0, 1, 1, 1]]),
}


def network(version: int, task: str, folder: Path) -> tuple[Any, Any]:
    model = copy.deepcopy(pristine(version, task, 4))
    model.save_pretrained(folder)
    checkpoint = checkpoint_from_path(folder, TaskSpec(task))
    return model, SwinNetwork(checkpoint.config, (64, 64), checkpoint.tensors, TaskSpec(task)).eval()


@pytest.mark.parametrize("problem_type", LABELS)
def test_of_classification(problem_type: str | None, tmp_path: Path) -> None:
    model, ours = network(1, "image-classification", tmp_path)
    model.config.problem_type = problem_type
    pixels = torch.from_numpy(feeds_of("image-classification", (64, 64), 4, 2)["pixel_values"])
    with torch.no_grad():
        wanted = model(pixels, labels=LABELS[problem_type])
        found = ours.with_loss(pixels, labels=LABELS[problem_type], problem_type=problem_type)
        assert set(ours.with_loss(pixels)) == {"logits"}
    torch.testing.assert_close(found["loss"], wanted.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["logits"], wanted.logits, rtol=1e-4, atol=1e-5)


def test_of_masked_image_modeling(tmp_path: Path) -> None:
    model, ours = network(2, "masked-image-modeling", tmp_path)
    feeds = [torch.from_numpy(feed) for feed in feeds_of("masked-image-modeling", (64, 64), 4, 2).values()]
    with torch.no_grad():
        wanted, found = model(feeds[0], bool_masked_pos=feeds[1]), ours.with_loss(*feeds)
    torch.testing.assert_close(found["loss"], wanted.loss, rtol=1e-5, atol=1e-6)
