"""Scores as transformers' pipeline computes them, images that fail among many, and models passed to other processes."""

from __future__ import annotations

import copy
import json
import multiprocessing
import operator
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from cli.exported import FLOWER, THREE, cli_here, digits, exported_bundle, refused
from transformers.pipelines.image_classification import ImageClassificationPipeline

import swin_deploy
from swin_deploy.config import SwinConfig
from swin_deploy.errors import BackendError, CheckpointError, InputError, UsageError
from swin_deploy.runtimes.model import Model

TAGS = Path(__file__).parents[1] / "reported/hf_multilabel"
HERE = {"backend": "onnxruntime", "precision": "fp32", "device": "cpu"}


def model_for(labels: int = 4, **config: Any) -> Model:
    """A model without a graph, to turn logits into predictions."""
    made = Model.__new__(Model)
    made.config = SwinConfig(1, id2label={i: f"tag{i}" for i in range(labels)}, **config)
    return made


@pytest.mark.parametrize("labels", [1, 2, 7])
@pytest.mark.parametrize("problem", [None, "single_label_classification", "multi_label_classification", "regression"])
@pytest.mark.parametrize("activation", [None, "softmax", "sigmoid", "none"])
def test_scores_equal_those_of_the_pipeline(labels: int, problem: str | None, activation: str | None) -> None:
    logits = np.random.default_rng(labels).normal(0, 30, labels).astype(np.float32)
    model = model_for(labels, problem_type=problem, activation=activation)
    config = SimpleNamespace(problem_type=problem, num_labels=labels, id2label=model.config.id2label)
    pipeline: Any = SimpleNamespace(model=SimpleNamespace(config=config))
    expected = ImageClassificationPipeline.postprocess(
        pipeline, {"logits": torch.from_numpy(logits[None])}, function_to_apply=activation, top_k=labels
    )
    found = model._best(logits, *model._limits(labels, None))
    assert [one.label for one in found] == [one["label"] for one in expected]
    assert [one.score for one in found] == pytest.approx([one["score"] for one in expected], abs=1e-6)
    again = SwinConfig.from_dict(json.loads(json.dumps(model.config.to_dict())))
    assert (again.score_activation, again.prediction) == (model.config.score_activation, model.config.prediction)


@pytest.mark.parametrize(
    ("config", "top_k", "threshold", "count"),
    [
        ({}, None, None, 4),
        ({}, 2, None, 2),
        ({}, None, 0.3, 1),
        ({"labels": 9}, None, None, 5),
        ({"problem_type": "multi_label_classification"}, None, None, 2),
        ({"problem_type": "multi_label_classification"}, None, 0.9, 1),
        ({"problem_type": "multi_label_classification"}, 3, None, 3),
        ({"problem_type": "multi_label_classification"}, 1, 0.2, 1),
        ({"problem_type": "regression", "labels": 9}, None, None, 9),
        ({"labels": 1}, None, None, 1),
        ({"activation": "none", "labels": 9}, None, None, 5),
    ],
)
def test_how_many_classes_are_returned(config: dict[str, Any], top_k: Any, threshold: Any, count: int) -> None:
    model = model_for(**config)
    logits = np.resize(np.array([-1.0, 3.0, -4.0, 1.0], np.float32), model.config.num_labels)
    assert len(model._best(logits, *model._limits(top_k, threshold))) == count


@pytest.mark.parametrize(("key", "value"), [("problem_type", "multi_label"), ("activation", "tanh")])
def test_an_unknown_kind_of_scores_is_refused(key: str, value: str) -> None:
    with pytest.raises(CheckpointError, match=f'{key} is "{value}", expected one of'):
        SwinConfig.from_dict({"model_type": "swin", key: value})


def test_a_network_for_several_labels(tmp_path: Path) -> None:
    """From the checkpoint to the scores that transformers' pipeline gave for the same photo."""
    expected = np.load(TAGS / "expected.npz")
    bundle = exported_bundle("--weights", str(TAGS))
    with swin_deploy.load(bundle, **HERE) as model:
        assert np.abs(model.preparation([FLOWER])[0] - expected["pixels"]).max() < 1e-6
        assert np.abs(model.run({"pixel_values": model.preparation([FLOWER])})["logits"][0] - expected["logits"]).max() < 1e-5
        [every] = model.classify(FLOWER, top_k=5)
        assert {one.index: one.score for one in every} == pytest.approx(dict(enumerate(expected["scores"])), abs=1e-5)
        above = [one for one in every if one.score > 0.5]
        assert list(model.stream([FLOWER, FLOWER])) == model.classify([FLOWER, FLOWER]) == [above, above]
    done = cli_here("predict", bundle, FLOWER, "--backend", "onnxruntime", "--threshold", 0.99999, cwd=tmp_path)
    assert (done.returncode, done.stdout.splitlines()[1].split(maxsplit=3)[3]) == (0, "(no label above the threshold)")
    (tmp_path / "images").mkdir()
    for number in range(3):
        shutil.copyfile(FLOWER if number else THREE, tmp_path / f"images/{number}.jpg")
    (tmp_path / "labels.csv").write_text("image,tag0,tag1,tag2,tag3,tag4\n0.jpg,1,0,0,0,0\n1.jpg,0,0,1,0,0\n2.jpg,0,0,1,0,0\n")
    told = cli_here("evaluate", bundle, "--data", "images", "--labels", "labels.csv", cwd=tmp_path)
    assert told.returncode == 0, told.stderr
    assert told.stdout.split()[2:5] == ["mAP", "F1", "agreement"]


def test_ten_damaged_images_among_a_thousand(tmp_path: Path) -> None:
    (tmp_path / "cut.jpg").write_bytes(FLOWER.read_bytes()[:5000])
    (tmp_path / "text.png").write_text("no image")
    faults = {100 * n + 7: ("cut.jpg", "text.png", "absent.png", ".")[n % 4] for n in range(10)}
    images = [faults.get(number, str(THREE)) for number in range(1000)]
    arguments = ("predict", digits(2), *images, "--backend", "onnxruntime", "--precision", "fp32", "-k", 1)
    done = cli_here(*arguments, "--json", cwd=tmp_path)
    rows = json.loads(done.stdout)
    assert (done.returncode, [row["image"] for row in rows]) == (1, images)
    assert {number: images[number] for number, row in enumerate(rows) if "error" in row} == faults
    assert all(row["image"] in row["error"] and not row["predictions"] for row in rows if "error" in row)
    assert {row["predictions"][0]["label"] for row in rows if "error" not in row} == {"three"}
    assert "10 of 1000 images cannot be read" in done.stderr
    table = cli_here(*arguments[:2], *images[:9], *arguments[-6:], cwd=tmp_path)
    assert (table.returncode, len(table.stdout.splitlines())) == (1, 10)
    assert "cut.jpg" in table.stdout.splitlines()[8]
    assert "is damaged" in table.stdout.splitlines()[8]
    refused(cli_here(*arguments, "--on-error", "stop", cwd=tmp_path), "'absent.png' does not exist")


def test_classify_returns_errors_in_the_place_of_results(tmp_path: Path) -> None:
    small = np.zeros((8, 8, 3), np.uint8)
    with swin_deploy.load(digits(2), **HERE) as model:
        found = model.classify([THREE, small[..., :2], tmp_path / "absent", THREE, None], batch_size=2, on_error="continue")
        assert [isinstance(one, InputError) for one in found] == [False, True, True, False, True]
        assert found[0] == found[3] == model.classify(THREE)[0]
        with pytest.raises(UsageError, match='Unknown reaction to errors "skip"'):
            model.classify(THREE, on_error="skip")
        with pytest.raises(InputError):
            model.classify([THREE, None])  # type: ignore[list-item]


def test_a_model_is_a_value(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It is loaded again on the other side, with what "auto" chose, wherever that process stands."""
    joblib = pytest.importorskip("joblib", reason="scikit-learn brings it")
    with swin_deploy.load(digits(2), backend="onnxruntime", device="cpu") as model:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("swin_deploy.runtimes.model_from_bundle._verified", None)  # what auto calls
        joblib.dump(model, tmp_path / "model.joblib")
        for again in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model), joblib.load(tmp_path / "model.joblib")):
            with again:
                assert again is not model
                assert (again.describe(), again.classify(THREE)) == (model.describe(), model.classify(THREE))
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            assert pool.apply(operator.methodcaller("classify", str(THREE)), (model,)) == model.classify(THREE)
    with pytest.raises(BackendError, match="This model is closed"):
        pickle.dumps(model)
