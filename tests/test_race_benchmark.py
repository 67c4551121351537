"""benchmarks/race.py: ratios, comparable exactness, the tables, and what a second run leaves out."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def race() -> Any:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
    try:
        return __import__("race")
    finally:
        del sys.path[0]


@pytest.fixture
def rows(race: Any) -> dict[str, Any]:
    reference = [100.0, 200.0, 100.0]
    return {
        race.REFERENCE: race.Row(reference, reference, 3e-7),
        "ours-openvino-int8": race.Row([30.0, 60.0, 33.0], reference, 0.02),
        "nncf-openvino-int8": race.Row([25.0, 50.0, 25.0], reference, 0.05),
        "nncf-openvino-free-int8": race.Row([31.0, 62.0, 31.0], reference, 0.03),
        "limit-int8": race.Row([15.0, 30.0, 15.0], reference),
        "pt2e-int8": race.Row(failed="a|b"),
    }


def test_a_cell_compares_ours_with_the_fastest_that_is_as_exact(race: Any, rows: dict[str, Any]) -> None:
    found = race.standing(race.Cell("swin-tiny", 1, "int8"), rows)
    assert (found.ours, found.best, found.best_name, found.limit) == (0.3, 0.31, "nncf-openvino-free-int8", 0.15)
    assert found.leads is True  # by 3.2 %
    assert not race.comparable("nncf-openvino-int8", rows)
    assert rows["ours-openvino-int8"].ratio == pytest.approx((0.3, 0.3, 0.315))
    nobody = race.standing(race.Cell("swin-tiny", 1, "bf16"), rows)
    assert (nobody.ours, nobody.best, nobody.leads) == (None, None, None)


def test_results_are_kept_and_only_what_is_missing_is_measured(race: Any, rows: dict[str, Any], tmp_path: Path) -> None:
    cell = race.Cell("swin-tiny", 1, "int8")
    race.keep(cell, {"ours-openvino-int8": rows["nncf-openvino-int8"], "nncf-openvino-int8": race.Row(failed="no")}, tmp_path)
    race.keep(cell, rows, tmp_path)
    assert race.read_rows(cell.file(tmp_path)) == rows
    assert json.loads(cell.file(tmp_path).read_text())["versions"]["onnxruntime"]
    left = race.missing(cell, rows, [""])
    assert "pt2e-int8" in left  # it failed
    assert not {race.REFERENCE, "ours-openvino-int8", "compile-fp32"} & set(left)
    assert race.missing(cell, {}, ["nncf"]) == ["nncf-openvino-int8", "nncf-openvino-free-int8"]
    text = race.table(tmp_path)
    assert "| Swin-T 224 | 1 | INT8 | 0.300 | 0.310 (NNCF's default, OpenVINO, free batch) | 0.968 | 0.150 | 2.00 |" in text
    assert "| 0.250 | 0.250 to 0.250 | 5.0e-02 | less exact |" in text
    assert "fails: a/b |" in text
    assert b"Swin-T 224, 1, INT8" in race.plot(tmp_path)


def test_the_limit_has_every_linear_layer_of_the_network(race: Any) -> None:
    from race_candidates import products  # type: ignore[import-not-found]

    from swin_deploy.variants import find_variant

    config, found = find_variant("swin-tiny").config(), {"linear": 0, "attention": 0}
    for kind, count, *shape in products(config, 1):
        found[kind] += count * shape[0] * shape[1] * shape[2] * (1 if kind == "linear" else 2 * shape[1])
    assert sum(found.values()) == pytest.approx(4.5e9, rel=0.02)  # multiplications as published
