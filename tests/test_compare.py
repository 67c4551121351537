"""The figures by which an export is judged, on values whose answers are known."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from swin_deploy.parity import Agreement, compare


def test_equal_arrays_agree_exactly() -> None:
    logits = np.random.default_rng(0).standard_normal((4, 10)).astype(np.float32)
    assert compare(logits, logits.copy()) == Agreement(4, True, 0.0, 0.0, pytest.approx(1.0), 1.0)


def test_figures_are_those_of_the_worst_sample() -> None:
    reference = np.array([[3.0, 4.0], [3.0, 4.0]])
    found = compare(np.array([[3.0, 4.0], [4.0, 3.0]]), reference)
    assert found.max_abs == 1
    assert found.relative_l2 == pytest.approx(math.sqrt(2) / 5)
    assert found.cosine == pytest.approx(24 / 25)
    assert found.top1 == 0.5
    assert found.within(0.3)
    assert not found.within(0.28)


def test_one_bad_sample_does_not_hide_among_many_good_ones() -> None:
    reference = np.random.default_rng(0).standard_normal((1000, 10))
    test = reference.copy()
    test[500] *= 1.1
    assert compare(test, reference).relative_l2 == pytest.approx(0.1)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", ["test", "reference"])
def test_nan_and_infinity_never_agree(value: float, side: str) -> None:
    arrays = {name: np.ones((2, 3)) for name in ("test", "reference")}
    arrays[side][1, 2] = value
    found = compare(**arrays)
    assert not found.finite
    assert not found.within(math.inf)
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["relative_l2"] is None


def test_a_reference_of_zeros_divides_by_nothing() -> None:
    zeros = np.zeros((1, 3))
    assert compare(zeros, zeros).within(0)
    assert not compare(zeros + 1e-6, zeros).within(1)


def test_half_precision_does_not_overflow() -> None:
    large = np.full((1, 1000), 60000, np.float16)
    assert compare(large, large).relative_l2 == 0


def test_shapes_must_be_equal() -> None:
    with pytest.raises(ValueError, match="shape"):
        compare(np.zeros((2, 3)), np.zeros((3, 2)))
