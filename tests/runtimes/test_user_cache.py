"""The cache folder of the user keeps files that are used, and stays small."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from swin_deploy.runtimes.user_cache import DAYS, MOST_FILES, read_cached, write_cached

DAY = 24 * 3600


def used(file: Path, days: float) -> Path:
    file.write_text(file.name)
    os.utime(file, (time.time() - days * DAY,) * 2)
    return file


@pytest.fixture(autouse=True)
def folder(tmp_path: Path) -> Path:
    (tmp_path / "auto").mkdir(0o700)
    return tmp_path / "auto"


def name(number: int) -> str:
    return f"{number:032x}.json"


def test_files_that_were_not_used_for_long_are_deleted(folder: Path) -> None:
    old, young = used(folder / name(1), DAYS + 1), used(folder / f"{2:032x}-NVIDIA-L4.cache", DAYS - 1)
    others = [used(folder / other, DAYS + 1) for other in ("notes.json", f"{3:032x}.txt", f"x{4:032x}.json", ".bashrc")]
    used(folder / f".{name(5)}.partial-1234abcd", DAYS + 1)  # left by a process that was killed
    (folder / name(6)).symlink_to(old)
    os.utime(folder / name(6), (0, 0), follow_symlinks=False)
    write_cached(folder / name(7), b"content")
    assert sorted(folder.iterdir()) == sorted([folder / name(7), young, *others, folder / name(6)])
    os.utime(young, (time.time() - (DAYS + 1) * DAY,) * 2)
    assert read_cached(young) == young.name.encode()  # which marks it as used
    write_cached(folder / name(7), b"more")
    assert read_cached(young) == young.name.encode()


def test_a_limited_number_of_files_stays(folder: Path) -> None:
    files = [used(folder / name(days), days) for days in range(1, MOST_FILES + 10)]
    assert read_cached(files[-1])
    write_cached(folder / name(0), b"content")
    assert {*folder.iterdir()} == {folder / name(0), files[-1], *files[: MOST_FILES - 2]}


def test_files_that_cannot_be_read_or_written(folder: Path) -> None:
    assert read_cached(None) == read_cached(folder / "none") == read_cached(folder) == b""
    (folder / "file").write_text("secret")
    (folder / "link").symlink_to("file")
    os.mkfifo(folder / "fifo")
    assert read_cached(folder / "link") == read_cached(folder / "fifo") == b""
    write_cached(folder / "file/below", b"content")
    write_cached(None, b"content")
    (folder / name(0)).mkdir()
    os.utime(folder / name(0), (0, 0))
    write_cached(folder / "new", b"content")
    assert read_cached(folder / "new") == b"content"
    assert (folder / name(0)).is_dir()


@pytest.mark.skipif(os.name == "nt", reason="permissions of POSIX")
@pytest.mark.parametrize("place", ["auto", "."])
def test_what_others_could_write_is_not_read(place: str, folder: Path) -> None:
    """Earlier releases left the permissions to the umask, which is 002 on Ubuntu."""
    file, other = used(folder / name(1), 0), used(folder / "notes.json", 0)
    (folder.parent / place).chmod(0o775)
    assert read_cached(file) == b""
    assert [*folder.iterdir()] == [other]
    assert (folder.parent / place).stat().st_mode & 0o777 == 0o755
    write_cached(file, b"content")
    assert read_cached(file) == b"content"


@pytest.mark.skipif(os.name == "nt", reason="permissions of POSIX")
def test_a_folder_of_others_is_not_trusted(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kept = used(folder / name(1), DAYS + 1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: folder.stat().st_uid + 1)
        assert read_cached(kept) == b""
        write_cached(folder / name(2), b"content")
        assert [*folder.iterdir()] == [kept]
        assert len(caplog.records) == 1
        assert f"{folder.parent} belongs to another user" in caplog.text
    assert read_cached(kept)
