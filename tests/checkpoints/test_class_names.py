"""The names of classes: from a label file, an id2label with gaps, and timm's configuration."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from cli.exported import WEIGHTS

from swin_deploy.calib.labels import class_names
from swin_deploy.config import SwinConfig
from swin_deploy.errors import InputError, UsageError
from swin_deploy.exporters.checkpoint_from_request import checkpoint_from_request
from swin_deploy.models.checkpoints.recognise import recognise_checkpoint
from swin_deploy.models.checkpoints.timm_config import _labels
from swin_deploy.options import ExportSpec

ANIMALS = {0: "cat", 1: "dog, hound", 2: "bee"}
GAP = "only 2 of 3 classes have a label; the others are called LABEL_n"
FROM_ONE = "the labels are numbered from 1; the first one is class 0"


@pytest.mark.parametrize(
    ("name", "text", "labels", "note"),
    [
        ("l.txt", "cat\ndog, hound\r\nbee\n\n", ANIMALS, None),
        ("names", "\ufeffcat\ndog, hound\nbee", ANIMALS, None),
        ("l.json", '["cat", "dog, hound", "bee"]', ANIMALS, None),
        ("l.json", '{"2": "bee", "0": "cat", "1": "dog, hound"}', ANIMALS, None),
        ("l.json", '{"bee": 2, "cat": 0, "dog, hound": 1}', ANIMALS, None),
        ("l.json", '{"model_type": "swin", "id2label": {"0": "cat", "1": "dog, hound", "2": "bee"}}', ANIMALS, None),
        ("l.json", '{"1": "cat", "2": "dog, hound", "3": "bee"}', ANIMALS, FROM_ONE),
        ("l.json", '{"0": "cat", "2": "bee"}', ANIMALS | {1: "LABEL_1"}, GAP),
        ("l.csv", 'id,name\n2,bee\n0,cat\n1,"dog, hound"\n', ANIMALS, None),
        ("l.csv", 'size,Label\n9,cat\n8,"dog, hound"\n7,bee\n', ANIMALS, None),
        ("l.csv", 'cat\n"dog, hound"\nbee\n', ANIMALS, None),
        ("l.csv", 'name\ncat\n"dog,\r\nhound"\nbee\n', ANIMALS | {1: "dog,\nhound"}, None),
        ("l.tsv", "index\tclass_name\n0\tcat\n2\tbee\n", ANIMALS | {1: "LABEL_1"}, GAP),
    ],
)
def test_label_files(name: str, text: str, labels: dict[int, str], note: str | None, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    assert class_names(str(tmp_path / name), 3) == (labels, note)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("l.txt", "cat\ndog\n", "another number of classes than 3"),
        ("l.txt", "", "another number of classes than 3"),
        ("l.json", '{"0": "cat", "7": "bee"}', "another number of classes than 3"),
        ("l.json", '{"cat": "dog"}', "cannot be read: invalid literal"),
        ("l.json", "[[1]]", "cannot be read: it holds no labels"),
        ("l.json", "cat", "cannot be read as JSON .Expecting value"),
        ("l.csv", "a,b\n1,2\n", "cannot be read: its columns are a, b"),
    ],
)
def test_label_files_that_do_not_fit(name: str, text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=said):
        class_names(str(tmp_path / name), 3)


def test_imagenet_has_its_names_in_the_package() -> None:
    labels, note = class_names("imagenet-1k", 1000)
    assert (len(labels), labels[0], labels[999], note) == (
        1000,
        "tench, Tinca tinca",
        "toilet tissue, toilet paper, bathroom tissue",
        None,
    )
    assert [number for number, label in labels.items() if label == "crane"] == [134, 517]
    with pytest.raises(InputError, match="imagenet-1k has labels for another number of classes than 10"):
        class_names("imagenet-1k", 10)


@pytest.mark.parametrize(
    ("id2label", "labels", "note"),
    [
        ([f"n{i}" for i in range(10)], {i: f"n{i}" for i in range(10)}, "the labels are a list; the first one is class 0"),
        ({str(i + 1): f"n{i}" for i in range(10)}, {i: f"n{i}" for i in range(10)}, FROM_ONE),
        (
            {str(i): f"n{i}" for i in (0, 2, 9, 12)},
            {i: f"n{i}" if i in (0, 2, 9) else f"LABEL_{i}" for i in range(10)},
            "only 3 of 10 classes have a label; the others are called LABEL_n",
        ),
    ],
)
def test_id2label_with_gaps(id2label: Any, labels: dict[int, str], note: str, tmp_path: Path) -> None:
    shutil.copytree(WEIGHTS[2], tmp_path / "c")
    raw = json.loads((tmp_path / "c/config.json").read_text())
    (tmp_path / "c/config.json").write_text(json.dumps({**raw, "id2label": id2label}))
    found = recognise_checkpoint(tmp_path / "c")
    assert (found.config.id2label, found.notes, found.raw_config is not None) == (labels, (note,), True)
    assert SwinConfig.from_dict(found.raw_config or {}).id2label == labels


@pytest.mark.parametrize(
    ("config", "labels"),
    [
        ({"label_names": ["cat", "dog"]}, ["cat", "dog"]),
        ({"label_names": ["n1", "n2"], "label_descriptions": {"n1": "cat", "n2": "dog"}}, ["cat", "dog"]),
        ({"label_names": {"1": "n2", "0": "n1"}, "label_descriptions": {"n2": "dog"}}, ["n1", "dog"]),
        ({"pretrained_cfg": {"label_names": {"1": "dog"}}}, ["LABEL_0", "dog"]),
        ({"labels": ["cat", "dog"]}, ["cat", "dog"]),
        ({"label_names": ["a", "b", "c"]}, ["LABEL_0", "LABEL_1"]),
        ({}, ["LABEL_0", "LABEL_1"]),
    ],
)
def test_labels_of_timm(config: dict[str, Any], labels: list[str]) -> None:
    found, note = _labels({"num_classes": 2, **config}, config.get("pretrained_cfg", {}), {})
    assert (list(found.values()), note is not None) == (labels, labels == ["LABEL_0", "dog"])


def test_labels_and_activation_by_hand(tmp_path: Path) -> None:
    (tmp_path / "l.txt").write_text("".join(f"n{i}\n" for i in range(10)))
    found = checkpoint_from_request(ExportSpec(weights=WEIGHTS[2], labels=tmp_path / "l.txt", activation="sigmoid"))
    assert (found.config.activation, found.config.prediction) == ("sigmoid", "labels")
    assert found.config.id2label == SwinConfig.from_dict(found.raw_config or {}).id2label == {i: f"n{i}" for i in range(10)}
    with pytest.raises(UsageError, match="apply to networks with classes"):
        checkpoint_from_request(ExportSpec(weights=WEIGHTS[2], task="backbone", activation="sigmoid"))
