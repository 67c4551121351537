"""Compiled graphs are stored for the next load. What is damaged, foreign or not writable is never used."""

from __future__ import annotations

import logging
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli.exported import digits, exported_bundle, one_block

import swin_deploy
from swin_deploy.runtimes import model_from_bundle, user_cache

IMAGES = np.random.default_rng(0).standard_normal((3, 3, 32, 32)).astype(np.float32)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported_bundle("--weights", str(one_block())), tmp_path / "bundle"))


@pytest.fixture(autouse=True, params=["onnxruntime", "openvino"])
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    """Where a back end stores its graphs. OpenVINO compiles one for each batch, and one for each number of threads."""
    pytest.importorskip(request.param, reason="compiles the graphs")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(model_from_bundle, "SMALLEST_STORED", 0)
    return tmp_path / "cache/swin-deploy" / request.param


def run(bundle: Path, caplog: pytest.LogCaptureFixture, backend: str, **options: Any) -> tuple[int, list[bytes]]:
    """Return how many graphs were compiled, and the outputs of one image and of three."""
    caplog.clear()
    caplog.set_level(logging.DEBUG, "swin_deploy")
    with swin_deploy.load(bundle, backend=backend, precision="fp32", **options) as model:
        found = [model.run({"pixel_values": IMAGES[:count]})["logits"].tobytes() for count in (1, 3, 1)]
    stored_now()
    return sum(record.msg.startswith("Compiled") for record in caplog.records), found


def test_a_stored_graph_gives_the_same_results_to_the_bit(
    bundle: Path, stored: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend, each = stored.name, 2 if stored.name == "openvino" else 1
    compiled, wanted = run(bundle, caplog, backend)
    assert compiled == each
    assert len([*stored.iterdir()]) == (4 if backend == "openvino" else 3)
    assert all(file.stat().st_mode & 0o022 == 0 for file in stored.iterdir())
    assert run(bundle, caplog, backend) == (0, wanted)
    if backend == "openvino":
        assert run(bundle, caplog, backend, batches=(3, 1)) == (0, wanted)
        assert run(bundle, caplog, backend, threads=1)[0] == 2
    monkeypatch.setattr(user_cache, "processor_name", lambda: "another processor")
    assert run(bundle, caplog, backend)[0] == each


def stored_now() -> None:
    for thread in threading.enumerate():
        if thread.name == user_cache.STORING:
            thread.join()


@pytest.mark.parametrize("stored", ["onnxruntime"], indirect=True)
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_trained_networks(version: int, precision: str, stored: Path) -> None:
    """ONNX Runtime runs what it stored as it is, without optimizing it again."""
    found = []
    for _ in range(2):
        with swin_deploy.load(digits(version), backend="onnxruntime", precision=precision) as model:
            shape = [size if isinstance(size, int) else 2 for size in model.inputs[0].shape]
            images = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
            found.append(model.run({"pixel_values": images})["logits"].tobytes())
        stored_now()
    assert found[0] == found[1]
    assert len([*stored.iterdir()]) == 3


def damaged(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def foreign(file: Path) -> None:
    file.chmod(0o666)


def linked(file: Path) -> None:
    file.rename(file.with_suffix(".elsewhere"))
    file.symlink_to(file.with_suffix(".elsewhere"))


def garbage(file: Path) -> None:
    """Whole, but not what the library writes: as if another build of it had the same version."""
    from swin_deploy.bundle import sha256_of

    record, before = file.with_suffix(".json"), sha256_of(file)
    file.write_bytes(b"no compiled model")
    record.write_text(record.read_text().replace(before, sha256_of(file)))


def unreadable_record(file: Path) -> None:
    file.with_suffix(".json").write_text('{"sha256": 3}')


@pytest.mark.skipif(os.name == "nt", reason="permissions of POSIX")
@pytest.mark.parametrize(
    "change", [damaged, foreign, linked, garbage, unreadable_record, Path.unlink], ids=lambda one: one.__name__
)
def test_what_is_not_trusted_is_compiled_again(
    change: Any, bundle: Path, stored: Path, caplog: pytest.LogCaptureFixture
) -> None:
    compiled, wanted = run(bundle, caplog, stored.name)
    for file in stored.glob("*.cache"):
        if file.with_suffix(".json").exists():  # else it has the weights
            change(file)
    assert run(bundle, caplog, stored.name) == (compiled, wanted)
    assert run(bundle, caplog, stored.name) == (0, wanted)


@pytest.mark.parametrize("stored", ["onnxruntime"], indirect=True)  # OpenVINO stores them in the same file
def test_damaged_weights(bundle: Path, caplog: pytest.LogCaptureFixture, stored: Path) -> None:
    _, wanted = run(bundle, caplog, stored.name)
    [weights] = stored.glob("*-weights.cache")
    damaged(weights)
    assert run(bundle, caplog, stored.name) == (1, wanted)
    assert [record.levelname for record in caplog.records if record.levelno > logging.INFO] == ["WARNING"]
    assert run(bundle, caplog, stored.name) == (0, wanted)


def test_a_folder_that_cannot_be_written(bundle: Path, stored: Path, caplog: pytest.LogCaptureFixture) -> None:
    stored.parent.mkdir(parents=True)
    stored.write_text("not a folder")
    assert run(bundle, caplog, stored.name)[0] == run(bundle, caplog, stored.name)[0] > 0
    assert stored.read_text() == "not a folder"
    assert not [record for record in caplog.records if record.levelno > logging.INFO]


def test_a_damaged_bundle_is_refused_although_its_graph_is_stored(
    bundle: Path, caplog: pytest.LogCaptureFixture, stored: Path
) -> None:
    run(bundle, caplog, stored.name)
    damaged(bundle / "onnx/model.onnx")
    with pytest.raises(swin_deploy.errors.BundleError, match="its sha256 is"):
        swin_deploy.load(bundle, backend=stored.name, precision="fp32")
