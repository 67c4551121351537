"""Folders for a while: what a killed process left is swept by the next one, and nothing else is."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from swin_deploy.files import scratch_beside, scratch_folder, sweep

HOLD = """
from swin_deploy.files import scratch_folder
with scratch_folder("test") as folder:
    (folder / "large.npz").write_bytes(b"x")
    print(folder, flush=True)
    input()
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows does not tell whether a process is there without touching it")
def test_what_the_killed_left_is_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "swin-test").mkdir()  # somebody else's
    command, environment = [sys.executable, "-c", HOLD], {**os.environ, "TMPDIR": str(tmp_path)}
    held = []
    for _ in range(2):
        process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        held.append((process, Path(process.stdout.readline().strip())))
    (killed, left), (alive, used) = held
    killed.kill()
    killed.communicate()
    assert (left / "large.npz").exists()
    with scratch_folder("test") as mine:
        assert sorted(tmp_path.iterdir()) == sorted([tmp_path / "swin-test", used, mine])
        assert mine.stat().st_mode & 0o077 == 0
        assert (used / "large.npz").exists()
    alive.communicate("\n")
    assert [path.name for path in tmp_path.iterdir()] == ["swin-test"]


def left_by_another(target: Path) -> Path:
    """What a process that has ended left beside `target`."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.getpid", lambda: gone.pid)
        return scratch_beside(target)


@pytest.mark.skipif(os.name == "nt", reason="nothing is swept there")
def test_what_another_machine_makes_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a disk that several write to. Its process is not one of this machine, whose name may begin like the other's."""
    for name in ("cam-2", "camera", "cam"):
        monkeypatch.setattr("platform.node", lambda name=name: name)
        left_by_another(tmp_path / "b").mkdir()
    sweep(tmp_path / "b")
    assert sorted(path.name.rsplit("-", 2)[0] for path in tmp_path.iterdir()) == [".b.partial-cam-2", ".b.partial-camera"]


@pytest.mark.skipif(os.name == "nt", reason="nothing is swept there")
def test_what_may_not_be_removed_is_in_nobodys_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = left_by_another(tmp_path / "b")
    left.write_bytes(b"x")

    def refuse(self: Path, missing_ok: bool = False) -> None:
        raise PermissionError(1, "Operation not permitted", str(self))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refuse)  # as in a folder with the sticky bit, where another user left it
        sweep(tmp_path / "b")
    assert left.exists()
    sweep(tmp_path / "b")
    assert not left.exists()
