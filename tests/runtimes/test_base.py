"""What every back end checks before it runs, on one with two inputs that share a free axis."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from swin_deploy.bundle import TensorSpec
from swin_deploy.errors import BackendError, InputError
from swin_deploy.runtimes.base import Runtime


class Adder(Runtime):
    """Adds its two inputs, and counts how often it is closed."""

    def __init__(self) -> None:
        specs = (TensorSpec("a", "float32", ("batch", 2)), TensorSpec("b", "float32", ("batch", 2)))
        super().__init__("adder 1.0", specs, (TensorSpec("sum", "float32", ("batch", 2)),))
        self.closed = 0

    def _run(self, feeds: dict[str, Any], out: Mapping[str, Any] | None) -> Mapping[str, Any]:
        assert out is not None
        np.add(feeds["a"], feeds["b"], out=out["sum"])
        return out

    def _close(self) -> None:
        self.closed += 1


def ones(*shape: int, dtype: str = "float32") -> np.ndarray:
    return np.ones(shape, dtype)


@pytest.mark.parametrize("batch", [1, 3])
def test_runs_any_batch(batch: int) -> None:
    with Adder() as adder:
        assert np.array_equal(adder.run({"a": ones(batch, 2), "b": ones(batch, 2)})["sum"], 2 * ones(batch, 2))


@pytest.mark.parametrize(
    ("feeds", "sentence"),
    [
        ({"a": ones(1, 2)}, '"b" is missing'),
        ({}, '"a" is missing'),
        ({"a": ones(1, 2), "b": ones(1, 2), "c": ones(1)}, 'no input "c".*a: float32'),
        ({"a": ones(1, 2), "b": ones(1, 2, dtype="float64")}, r'dtype float64. Expected .*astype\("float32"\)'),
        ({"a": ones(1, 2), "b": ones(1, 2, dtype=">f4")}, "dtype >f4"),
        ({"a": ones(1, 2), "b": ones(1, 3)}, r"shape \[1, 3\]. Expected b: float32 \[batch, 2\]"),
        ({"a": ones(1, 2), "b": ones(2)}, r"shape \[2\]"),
        ({"a": ones(1, 2), "b": ones(1, 2, 1)}, "shape"),
        ({"a": ones(0, 2), "b": ones(0, 2)}, r"shape \[0, 2\] and is empty. Expected .*at least one image"),
        ({"a": ones(1, 2), "b": ones(2, 2)}, '"b" has a batch of 2, and "a" one of 1. Pass equal sizes.'),
        ({"a": [[1.0, 2.0]], "b": ones(1, 2)}, "is a list. Expected a numpy array"),
        ({"a": None, "b": ones(1, 2)}, "is a NoneType"),
        (ones(1, 2), r"Expected a dict with a: float32 \[batch, 2\], b"),
        (None, "Expected a dict with a"),
    ],
)
def test_feeds_that_do_not_fit(feeds: Any, sentence: str) -> None:
    with Adder() as adder, pytest.raises(InputError, match=sentence) as caught:
        adder.run(feeds)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("out", "sentence"),
    [
        (ones(1, 2), "out is a .*. Expected a dict with sum: float32"),
        ([ones(1, 2)], "out is a .*. Expected a dict with sum: float32"),
        ({None: ones(1, 2), "total": ones(1, 2)}, r"out has None, total\. Expected an array for each of sum: float32"),
    ],
)
def test_an_out_that_does_not_fit(out: Any, sentence: str) -> None:
    with Adder() as adder, pytest.raises(InputError, match=sentence):
        adder.run({"a": ones(1, 2), "b": ones(1, 2)}, out)


def test_closed_once_and_for_all() -> None:
    with pytest.raises(KeyError), Adder() as adder:
        raise KeyError
    adder.close()
    assert adder.closed == 1
    with pytest.raises(BackendError, match="closed"):
        adder.run({"a": ones(1, 2), "b": ones(1, 2)})


def test_out_in_memory_that_is_read_or_written_otherwise() -> None:
    memory = ones(3, 2)
    with Adder() as adder, pytest.raises(InputError, match='"sum" shares memory with "b"'):
        adder.run({"a": ones(2, 2), "b": memory[:2]}, {"sum": memory[1:]})
    with Adder() as adder:
        adder.outputs = (adder.outputs[0], TensorSpec("same", "float32", ("batch", 2)))
        with pytest.raises(InputError, match='"same" shares memory with "sum"'):
            adder.run({"a": ones(1, 2), "b": ones(1, 2)}, {"sum": memory[:1], "same": memory[:1]})
        assert adder.run({"a": ones(1, 2), "b": ones(1, 2)}, {"sum": memory[:1], "same": memory[1:2]})["sum"].sum() == 4
