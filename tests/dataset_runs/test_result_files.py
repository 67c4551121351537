"""The three kinds of result files hold the same rows, read by pyarrow, json and csv."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from swin_deploy.datasets.image_runner import Answers
from swin_deploy.datasets.result_files import result_file

LABELS = ("tench, Tinca tinca", "gold\nfish", "ä")
KEYS = ["a,b", "c", "d\udcff"]
CLASSES = Answers(
    np.array([[2, 0], [0, 0], [1, 2]], np.int32),
    np.array([[0.1, 1 / 3], [0, 0], [0.7, 0.2]]),
    np.array([[True, True], [False, False], [True, False]]),
    {1: "It is damaged."},
    0.0,
)
ROWS = [
    ["a,b", [LABELS[2], LABELS[0]], [2, 0], [0.1, 1 / 3], None],
    ["c", [], [], [], "It is damaged."],
    ["d\\xff", [LABELS[1]], [1], [0.7], None],
]
FEATURES = Answers(np.array([[1, 2], [0, 0], [-0.5, 4]], np.float32), None, None, {1: "no"}, 0.0)
FEATURE_ROWS = [["a,b", [1, 2], None], ["c", None, "no"], ["d\\xff", [-0.5, 4], None]]


def read(path: Path) -> list[list[Any]]:
    if path.suffix == ".parquet":
        return [list(row.values()) for row in pq.read_table(path).to_pylist()]
    if path.suffix == ".jsonl":
        return [list(json.loads(line).values()) for line in path.read_text(encoding="utf-8").splitlines()]
    with path.open(newline="", encoding="utf-8") as file:
        _, *rows = csv.reader(file)
    return [[key, *(json.loads(one) if one else None for one in found), error or None] for key, *found, error in rows]


@pytest.mark.parametrize("ending", ["parquet", "jsonl", "csv"])
@pytest.mark.parametrize(("labels", "answers", "rows"), [(LABELS, CLASSES, ROWS), (None, FEATURES, FEATURE_ROWS)])
def test_rows(ending: str, labels: Any, answers: Answers, rows: list[Any], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("swin_deploy.datasets.result_files.GROUP_ROWS", 4)
    found = result_file(tmp_path / f"out.{ending}", "path", labels, 2)
    piece, parts = found.piece(KEYS, answers), [tmp_path / f"{number}.part" for number in range(3)]
    for part, count in zip(parts, (1, 2, 1), strict=True):
        found.write(part, [piece] * count)
    found.join(parts, tmp_path / f"out.{ending}")
    assert read(tmp_path / f"out.{ending}") == rows * 4


def test_numbers_that_are_not_finite_are_null_in_json(tmp_path: Path) -> None:
    answers = FEATURES._replace(values=np.array([[np.nan, np.inf]], np.float32), errors={})
    assert json.loads(result_file(tmp_path / "x.jsonl", "key", None, 2).piece(["k"], answers))["features"] == [None, None]
