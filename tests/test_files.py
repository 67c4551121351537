"""Scratch files: what a killed process left is swept by the next one, in whichever container, and nothing else is."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from swin_deploy import files
from swin_deploy.errors import SwinDeployError
from swin_deploy.files import locked, put_back, replaced_by, scratch, scratch_folder, sweep, sweep_folder

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows has other locks, and no SIGKILL")

HOLD = """
from swin_deploy.files import scratch_folder
with scratch_folder("test") as folder:
    (folder / "large.npz").write_bytes(b"x")
    print(folder, flush=True)
    input()
"""


def held(tmp_path: Path, *prefix: str) -> tuple[subprocess.Popen[str], Path]:
    """A process that holds a scratch folder, and the folder."""
    process = subprocess.Popen(
        [*prefix, sys.executable, "-c", HOLD],
        env={**os.environ, "TMPDIR": str(tmp_path)}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


@pytest.mark.parametrize("namespace", [False, True])
def test_what_the_killed_left_is_swept(namespace: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process of another process-id namespace has a number that is another process's here, or nobody's."""
    prefix = ("unshare", *(("-r",) if os.geteuid() else ()), "--pid", "--fork", "--kill-child") if namespace else ()
    if namespace and (not shutil.which("unshare") or subprocess.run([*prefix, "true"], capture_output=True).returncode):
        pytest.skip("namespaces of process ids are not permitted here")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    others = [tmp_path / name for name in ("swin-test", ".swin-test.partial-notes")]
    for other in others:
        other.mkdir()
    (killed, left), (alive, used) = held(tmp_path, *prefix), held(tmp_path, *prefix)
    killed.kill()
    killed.wait()  # and keep its input open, which a child would read until it is killed, too
    assert (left / "large.npz").exists()
    while not sweep(tmp_path / "swin-test") and left.exists():  # --kill-child does not wait for the child
        time.sleep(0.01)
    with scratch_folder("another") as mine:
        assert {path for path in tmp_path.iterdir() if not path.name.endswith(".lock")} == {*others, used, mine}
        assert mine.stat().st_mode & 0o077 == 0
        assert (used / "large.npz").exists()
    for process in (killed, alive):
        process.communicate("\n")
    assert sorted(tmp_path.iterdir()) == sorted(others)


def left_by_the_killed(target: Path, lock: str | None = "", age: float = 0) -> Path:
    """Scratch beside `target` of a process that is gone, and its lock with that text."""
    left = target.with_name(f".{target.name}.partial-0123abcd")
    left.write_bytes(b"x")
    if lock is not None:
        file = left.with_name(f"{left.name}.lock")
        file.write_text(lock)
        os.utime(file, (time.time() - age,) * 2)
    return left


@pytest.mark.parametrize(
    ("lock", "age", "swept"),
    [(None, 0, True), ("", 0, True), ("boot\nanother\n1\n", 0, False), ("boot\nanother\n1\n", files.OLD + 99, True)],
)
def test_what_another_machine_makes_stays_for_a_week(lock: str | None, age: float, swept: bool, tmp_path: Path) -> None:
    """On a disk that several write to: file systems may not show the locks of one to the others."""
    left = left_by_the_killed(tmp_path / "b", lock, age)
    sweep(tmp_path / "b")
    assert (not left.exists(), not any(tmp_path.iterdir())) == (swept, swept)


def test_what_earlier_releases_left_is_swept_when_it_is_old(tmp_path: Path) -> None:
    """They had no locks, so a file that is younger may belong to one that is running."""
    (tmp_path / ".b.partial-cam-2-4711-4567abcd").touch()
    for name in (
        ".b.partial-cam-2-4711-0123abcd",
        ".manifest.json.partial-cam-2-4711-0123abcd",
        ".b.partial-x",
        "b.partial-0123abcd",
    ):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (0, 0))
    kept = {".b.partial-cam-2-4711-4567abcd", ".b.partial-x", "b.partial-0123abcd"}
    sweep(tmp_path / "b")
    assert {path.name for path in tmp_path.iterdir()} == {*kept, ".manifest.json.partial-cam-2-4711-0123abcd"}
    sweep_folder(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == kept


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF])
def test_without_locks(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is refused, one line is logged, and only what is old is removed."""

    def refuse(handle: int, how: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("fcntl.flock", refuse)
    files._no_locks.cache_clear()
    young = left_by_the_killed(tmp_path / "b")
    with locked(tmp_path), scratch(tmp_path / "b") as path:
        path.mkdir()
        sweep(tmp_path / "b")
        assert path.is_dir()
    assert young.exists()
    left_by_the_killed(tmp_path / "b", age=files.OLD + 99)
    sweep(tmp_path / "b")
    assert not any(tmp_path.iterdir())
    assert len(caplog.records) == 1
    assert "no file locks" in caplog.text


def test_a_sweep_between_the_making_of_a_lock_and_its_locking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock, swept = files._lock, []

    def late(handle: int, wait: bool = False) -> bool | None:
        if not swept:
            swept.append(True)
            sweep(tmp_path / "b")
        return lock(handle, wait)

    monkeypatch.setattr(files, "_lock", late)
    with scratch(tmp_path / "b") as path:
        path.mkdir()
        sweep(tmp_path / "b")
        assert path.is_dir()
        assert len([*tmp_path.iterdir()]) == 2
    assert not any(tmp_path.iterdir())


def test_what_may_not_be_removed_is_in_nobodys_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = left_by_the_killed(tmp_path / "b", None)

    def refuse(self: Path, missing_ok: bool = False) -> None:
        raise PermissionError(1, "Operation not permitted", str(self))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refuse)  # as in a folder with the sticky bit, where another user left it
        sweep(tmp_path / "b")
    assert left.exists()
    sweep(tmp_path / "b")
    assert not left.exists()


def test_a_link_is_removed_and_not_what_it_leads_to(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").touch()
    (tmp_path / ".b.partial-0123abcd").symlink_to("mine")
    (tmp_path / ".b.partial-0123abcd.lock").symlink_to("mine/thesis.txt")  # is never opened
    (tmp_path / ".b.partial-4567abcd").symlink_to("mine")
    sweep(tmp_path / "b")
    assert (tmp_path / "mine/thesis.txt").exists()
    assert not (tmp_path / ".b.partial-4567abcd").is_symlink()


def test_names_of_the_greatest_length(tmp_path: Path) -> None:
    target = tmp_path / ("ü" * 127)
    with scratch(target) as path:
        path.mkdir()
        path.rename(target)
    assert [*tmp_path.iterdir()] == [target]


def test_whoever_holds_a_lock_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    code = "import fcntl, os, sys; fcntl.flock(os.open(sys.argv[1], 0), fcntl.LOCK_SH); print(flush=True); input()"
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    holder.stdout.readline()
    monkeypatch.setattr(files, "SLOW", 0.0)
    real = files._holder

    def then_release(handle: int) -> str:
        found = real(handle)
        holder.communicate("\n")
        return found

    monkeypatch.setattr(files, "_holder", then_release)
    asked: list[Any] = []
    with locked(tmp_path, lambda: asked.append(1)):
        pass
    assert asked == [1]
    assert f"Still waiting for the lock of {tmp_path}, held by " in caplog.text
    assert sys.platform != "linux" or f"process {holder.pid} on " in caplog.text


@pytest.mark.parametrize("partly", [False, True])
def test_a_bundle_that_was_renamed_away_is_put_back(partly: bool, tmp_path: Path) -> None:
    """`partly`: its original was only partly removed, where it had to be copied."""
    old = tmp_path / ".b.replaced-0123abcd"
    (old / "onnx").mkdir(parents=True)
    for name in ("manifest.json", "onnx/model.onnx", "config.json"):
        (old / name).write_text("whole")
    if partly:
        (tmp_path / "b/onnx").mkdir(parents=True)
        (tmp_path / "b/config.json").write_text("whole")
    put_back(tmp_path / "b")
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*")) == [
        "b/config.json", "b/manifest.json", "b/onnx/model.onnx",
    ]  # fmt: skip


def test_nothing_is_put_back_into_a_folder_with_other_files(tmp_path: Path) -> None:
    for name in (".b.replaced-0123abcd/manifest.json", "b/thesis.txt"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    sweep(tmp_path / "b")
    assert (tmp_path / ".b.replaced-0123abcd/manifest.json").exists()
    (tmp_path / "b/manifest.json").touch()  # another bundle took its place
    sweep(tmp_path / "b")
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_a_running_command_keeps_what_it_renamed_away(tmp_path: Path) -> None:
    with scratch(tmp_path / "b") as path:
        old = replaced_by(path)
        old.mkdir()
        (old / "manifest.json").touch()
        sweep(tmp_path / "b")
        assert old.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["b"]  # it failed before the new one was in place


def test_no_space_for_temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for error in (OSError(errno.ENOSPC, "No space left on device"), OSError("16 requested and 8 written")):
        with pytest.raises(SwinDeployError, match=f"no space in {tmp_path}.*TMPDIR"), scratch_folder("test"):
            raise error
    with pytest.raises(FileNotFoundError), scratch_folder("test"):
        raise FileNotFoundError(2, "No such file", "image.png")
    assert not any(tmp_path.iterdir())


def test_a_umask_that_takes_all_permissions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(PermissionError, match="umask"), scratch(tmp_path / "b") as path:
        files.make_folder(path)
    assert not any(tmp_path.iterdir())
