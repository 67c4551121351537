"""Full TensorRT, on the GPU that it compiles for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gpu.needs import copied

import swin_deploy
from swin_deploy.bench.worker import open_request
from swin_deploy.bundle import Bundle
from swin_deploy.errors import UsageError
from swin_deploy.gpus import cuda_devices

pytestmark = [pytest.mark.cuda, pytest.mark.tensorrt]


@pytest.mark.parametrize("version", [1, 2])
def test_an_fp16_engine_of_a_trained_model(version: int, tmp_path: Path) -> None:
    path = copied(version, tmp_path / "b")
    built, _ = swin_deploy.build_engine(path, precision="fp16", backend="tensorrt")
    [report] = built.entry["profiles"]
    assert not built.reused
    assert (built.entry["backend"], built.entry["gpu"]) == ("tensorrt", cuda_devices()[0].capability)
    assert report["source"] != "none"
    assert report["unread"] == 0
    assert 0 < report["kernels"] < 100
    assert Bundle.open(path).verified_path(built.file).stat().st_size == built.entry["bytes"] > 10_000
    again, _ = swin_deploy.build_engine(path, precision="fp16", backend="tensorrt")
    assert again.reused


def test_the_largest_batch_within_a_latency_budget(tmp_path: Path) -> None:
    for built in swin_deploy.build_engine(copied(1, tmp_path / "b"), precision="fp16", backend="tensorrt", latency_ms=5):
        choice = built.entry["batch_choice"]
        assert (choice["by"], choice["gpu"]) == ("measurement", cuda_devices()[0].name)
        assert 0 < choice["milliseconds"] <= 5
        assert built.entry["profiles"][0]["batch"][0] > 1


@pytest.mark.parametrize(
    "options",
    [
        {"batches": [(1, 1, 1), (1, 4, 8)]},
        {"workspace": 1 << 30},
        {"optimization_level": 5},
        {"version_compatible": True},
        {"hardware_compatible": True},
    ],
    ids=lambda options: next(iter(options)),
)
def test_every_option_makes_an_engine_of_its_own(options: dict[str, Any], tmp_path: Path) -> None:
    path = copied(2, tmp_path / "b")
    plain, _ = swin_deploy.build_engine(path, backend="tensorrt")
    built, _ = swin_deploy.build_engine(path, backend="tensorrt", **options)
    assert not built.reused
    assert built.file != plain.file
    assert len(built.entry["profiles"]) == len(options.get("batches", [1]))


def test_a_timing_cache_is_kept_and_read_again(tmp_path: Path) -> None:
    path, cache = copied(2, tmp_path / "b"), tmp_path / "timings"
    swin_deploy.build_engine(path, backend="tensorrt", timing_cache=cache)
    kept = cache.read_bytes()
    assert len(kept) > 100
    swin_deploy.build_engine(path, backend="tensorrt", timing_cache=cache, force=True)
    assert [file.name for file in tmp_path.iterdir() if file.name != "b"] == ["timings"]
    cache.write_bytes(b"no timings")
    with pytest.raises(UsageError, match="is not a timing cache"):
        swin_deploy.build_engine(path, backend="tensorrt", timing_cache=cache, force=True)


def test_weights_that_were_left_out_are_put_back(tmp_path: Path) -> None:
    path = copied(2, tmp_path / "b")
    whole, _ = swin_deploy.build_engine(path, backend="tensorrt")
    stripped, _ = swin_deploy.build_engine(path, backend="tensorrt", strip_weights=True)
    refitted, _ = swin_deploy.refit(path)
    assert stripped.entry["bytes"] < min(whole.entry["bytes"], refitted.entry["bytes"])
    assert refitted.entry["refitted_from"] == stripped.entry["sha256"]
    again, _ = swin_deploy.refit(path)
    assert again.reused
    answers = []
    for engine in (whole, refitted):
        with open_request({"bundle": str(path), "engine": engine.file, "device": "cuda:0"}) as runtime:
            answers.append(runtime.run({"pixel_values": np.ones((1, 3, 32, 32), np.float32)})["logits"])
    assert np.allclose(*answers, atol=1e-2)
