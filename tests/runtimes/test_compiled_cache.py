"""Graphs that OpenVINO compiled are stored for the next load. What is damaged, foreign or not writable is never used."""

from __future__ import annotations

import logging
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli.exported import exported_bundle, one_block

import swin_deploy

pytest.importorskip("openvino", reason="compiles the graphs")

import swin_deploy.runtimes.openvino as back_end

IMAGES = np.random.default_rng(0).standard_normal((3, 3, 32, 32)).astype(np.float32)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported_bundle("--weights", str(one_block())), tmp_path / "bundle"))


@pytest.fixture(autouse=True)
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(back_end, "SMALLEST_STORED", 0)
    return tmp_path / "cache/swin-deploy/openvino"


def run(bundle: Path, caplog: pytest.LogCaptureFixture, **options: Any) -> tuple[int, list[bytes]]:
    """Return how many graphs were compiled, and the outputs of one image and of three."""
    caplog.clear()
    caplog.set_level(logging.DEBUG, "swin_deploy")
    with swin_deploy.load(bundle, backend="openvino", precision="fp32", **options) as model:
        found = [model.run({"pixel_values": IMAGES[:count]})["logits"].tobytes() for count in (1, 3, 1)]
    for thread in threading.enumerate():
        if thread.name == back_end.STORING:
            thread.join()
    return sum(record.msg.startswith("Compiled") for record in caplog.records), found


def test_a_stored_graph_gives_the_same_results_to_the_bit(
    bundle: Path, stored: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled, wanted = run(bundle, caplog)
    assert compiled == 2  # one image, and three
    assert len([*stored.iterdir()]) == 4
    assert all(file.stat().st_mode & 0o022 == 0 for file in stored.iterdir())
    assert run(bundle, caplog) == (0, wanted)
    assert run(bundle, caplog, batches=(3, 1)) == (0, wanted)
    assert run(bundle, caplog, threads=1)[0] == 2
    monkeypatch.setattr(back_end, "processor_name", lambda: "another processor")
    assert run(bundle, caplog)[0] == 2


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
    """Whole, but not what OpenVINO writes: as if another build of it had the same version."""
    from swin_deploy.bundle import sha256_of

    record = file.with_suffix(".json")
    file.write_bytes(b"no compiled model")
    kept = record.read_text()
    record.write_text(kept.replace(kept.partition('"sha256": "')[2][:64], sha256_of(file)))


def unreadable_record(file: Path) -> None:
    file.with_suffix(".json").write_text('{"sha256": 3}')


@pytest.mark.skipif(os.name == "nt", reason="permissions of POSIX")
@pytest.mark.parametrize(
    "change", [damaged, foreign, linked, garbage, unreadable_record, Path.unlink], ids=lambda one: one.__name__
)
def test_what_is_not_trusted_is_compiled_again(
    change: Any, bundle: Path, stored: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, wanted = run(bundle, caplog)
    for file in stored.glob("*.cache"):
        change(file)
    assert run(bundle, caplog) == (2, wanted)
    assert run(bundle, caplog) == (0, wanted)


def test_a_folder_that_cannot_be_written(bundle: Path, stored: Path, caplog: pytest.LogCaptureFixture) -> None:
    stored.parent.mkdir(parents=True)
    stored.write_text("not a folder")
    assert run(bundle, caplog)[0] == run(bundle, caplog)[0] == 2
    assert stored.read_text() == "not a folder"
    assert not [record for record in caplog.records if record.levelno > logging.INFO]


def test_a_damaged_bundle_is_refused_although_its_graph_is_stored(bundle: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(bundle, caplog)
    damaged(bundle / "onnx/model.onnx")
    with pytest.raises(swin_deploy.errors.BundleError, match="its sha256 is"):
        swin_deploy.load(bundle, backend="openvino", precision="fp32")
