"""benchmarks/scale.py: the formula agrees with the simulation of each task, and each resource can be the limit."""

from __future__ import annotations

import importlib.util
import random
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks/scale.py"


@pytest.fixture(scope="module")
def scale() -> Any:
    spec = importlib.util.spec_from_file_location("scale", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["scale"] = importlib.util.module_from_spec(spec)  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


def test_the_formula_agrees_with_the_simulation(scale: Any) -> None:
    draw, limits = random.Random(0), Counter[str]()
    for _ in range(300):
        plan = scale.Plan(
            images=draw.choice([10**5, 10**6]), task_images=1000, object_images=draw.choice([1, 100]),
            decode_ms=draw.uniform(0.1, 10), run_ms=10 ** draw.uniform(-0.5, 2.5), image_kb=10 ** draw.uniform(-1, 3),
            start_s=draw.choice([1, 60]), commit_ms=10 ** draw.uniform(0, 2), node_gbit=draw.choice([1, 10]),
            store_requests=10 ** draw.uniform(2.5, 4.5), store_gbit=10 ** draw.uniform(0, 2.5),
        )  # fmt: skip
        workers = draw.choice([1, 10, 100, 1000])
        seconds, limit = plan.time(workers)
        assert seconds == pytest.approx(plan.simulated(workers), rel=0.1), (plan, workers)
        limits[limit] += 1
    assert len(limits) == 7, limits  # all but the one below


def test_figures_by_hand(scale: Any) -> None:
    plan = scale.Plan(images=1000, task_images=100, decode_ms=2, run_ms=8, start_s=5, latency_ms=0, commit_ms=0, bundle_mb=0)
    plan = replace(plan, store_requests=1e9, image_kb=0.001)
    assert plan.time(1)[0] == pytest.approx(5 + 10, rel=1e-3)
    assert plan.time(10) == (pytest.approx(5 + 1, rel=1e-3), "start-up")
    assert plan.time(6) == (pytest.approx(5 + 2, rel=1e-3), "start-up")  # four of six compute two tasks
    assert replace(plan, start_s=0.5).time(7) == (pytest.approx(0.5 + 2, rel=1e-3), "few tasks")
    done = subprocess.run(
        [sys.executable, SCRIPT, "plan", "--workers", "1", "--images", "1000000"], capture_output=True, text=True
    )
    assert "10:1" in done.stdout, done.stderr
