"""The accuracy gate: sensitivity of layers, the fewest layers kept in fp32, speed, and refusals with figures."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator, Set
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from plotted import bar_widths

from swin_deploy.calib.accuracy_gate import (
    LayerSensitivity,
    SpeedComparison,
    compare_speed,
    fewest_fp32_layers,
    rank_layers,
    sensitivity_svg,
)
from swin_deploy.errors import GateError


@pytest.mark.parametrize("layers", range(1, 12))
def test_the_fewest_layers_stay_in_fp32(layers: int) -> None:
    """Compare with trying every number, for losses that shrink with each layer kept in fp32."""
    ranking = [LayerSensitivity(str(number), float(number)) for number in range(layers)]
    for seed in range(20):
        rng = np.random.default_rng([layers, seed])
        losses = np.sort(rng.integers(0, 6, layers))[::-1].astype(float)  # losses[n]: with n layers in fp32
        asked: list[int] = []

        def drop(kept: Set[str], losses: Any = losses, asked: list[int] = asked) -> float:
            assert kept == {str(number) for number in range(len(kept))}
            asked.append(len(kept))
            return float(losses[len(kept)])

        most = float(rng.integers(0, 6))
        wanted = next((count for count in range(layers) if losses[count] <= most), layers)
        kept, loss = fewest_fp32_layers(ranking, drop, most)
        assert len(kept) == wanted
        assert loss == losses[min(wanted, layers - 1)]
        assert len(asked) == len(set(asked)) <= 2 + 2 * math.log2(layers + 1)


def test_the_plot_has_a_bar_for_each_layer() -> None:
    pytest.importorskip("matplotlib", reason="matplotlib draws the plot")
    ranking = (LayerSensitivity("stages.0.<fc1>", 12.0), LayerSensitivity("fc2", 30.0), LayerSensitivity("head", math.inf))
    picture = sensitivity_svg("a & b", ranking, {"stages.0.<fc1>"})
    assert picture is not None
    assert picture.count(b"#ee6677") == 1 + 2  # one bar, and fill and stroke in the legend
    [widths] = zip(*bar_widths(picture), strict=True)
    assert widths[0] / widths[1] == pytest.approx(12 / 30, rel=0.01)
    assert widths[1] == widths[2]
    broken = [LayerSensitivity(name, value) for name, value in (("nan", -math.inf), ("fine", 9.0), ("exact", math.inf))]
    picture = sensitivity_svg("title", broken, set())
    assert picture is not None
    assert (picture.count(b"not finite"), picture.count(b"no loss")) == (1, 1)


def test_a_layer_that_breaks_the_outputs_comes_first() -> None:
    answers = {"nan": [math.nan, 1.0], "overflow": [math.inf, 1.0], "fine": [1.0, 1.1], "exact": [1.0, 1.0]}
    ranking = rank_layers(tuple(answers), lambda keep: np.array(answers[next(iter(answers.keys() - keep), "exact")]))
    assert {layer.name for layer in ranking[:2]} == {"nan", "overflow"}
    assert [layer.name for layer in ranking[2:]] == ["fine", "exact"]
    assert [layer.to_dict()["sqnr_db"] for layer in ranking[:2]] == [None, None]


def test_speed_is_a_ratio_and_only_one_graph_is_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """With runtimes whose runs advance a clock."""
    clock, lock = list[float](), threading.Lock()

    @contextlib.contextmanager
    def timed(seconds: float) -> Iterator[Any]:
        assert lock.acquire(blocking=False)
        yield SimpleNamespace(title="timed", run=lambda feeds: clock.append(seconds))
        lock.release()

    monkeypatch.setattr("swin_deploy.calib.accuracy_gate.time.perf_counter", lambda: sum(clock))
    speed = compare_speed(lambda: timed(0.5), lambda: timed(0.125), {}, "fp32")
    assert (speed.before, speed.after, speed.ratio) == (0.5, 0.125, 4)
    assert speed.where == "measured on this machine in timed"


def test_a_slow_graph_is_refused_with_figures() -> None:
    speed = SpeedComparison("measured here", "fp32", 0.030, 0.025, 1.2)
    speed.require(1.2, "INT8", 3, 50)
    with pytest.raises(
        GateError, match=r"47 of 50 layers quantized it is 1.20 times as fast as fp32 \(25.00 ms instead of 30.00"
    ):
        speed.require(1.5, "INT8", 3, 50)
