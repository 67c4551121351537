"""Full TensorRT, on the GPU that it compiles for."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli.exported import copied

import swin_deploy
from swin_deploy.bundle import Bundle
from swin_deploy.exporters.gpu import cuda_devices

pytestmark = [pytest.mark.cuda, pytest.mark.tensorrt]


@pytest.mark.parametrize("version", [1, 2])
def test_an_fp16_engine_of_a_trained_model(version: int, tmp_path: Path) -> None:
    path = copied(version, tmp_path / "b")
    [built] = swin_deploy.build_engine(path, precision="fp16", backend="tensorrt")
    report = built.entry["report"]
    assert not built.reused
    assert (built.entry["backend"], built.entry["gpu"]) == ("tensorrt", cuda_devices()[0].capability)
    assert report["source"] != "none"
    assert report["unread"] == 0
    assert 0 < report["kernels"] < 100
    assert Bundle.open(path).verified_path(built.file).stat().st_size == built.entry["bytes"] > 10_000
    [again] = swin_deploy.build_engine(path, precision="fp16", backend="tensorrt")
    assert again.reused
