"""The cache folder of the user keeps files that are used, and stays small."""

from __future__ import annotations

import os
import time
from pathlib import Path

from swin_deploy.runtimes.user_cache import DAYS, MOST_FILES, read_cached, write_cached

DAY = 24 * 3600


def used(file: Path, days: float) -> Path:
    file.write_text(file.name)
    os.utime(file, (time.time() - days * DAY,) * 2)
    return file


def test_files_that_were_not_used_for_long_are_deleted(tmp_path: Path) -> None:
    old, young = used(tmp_path / "old", DAYS + 1), used(tmp_path / "young", DAYS - 1)
    left = used(tmp_path / ".file.partial-1-00", DAYS + 1)  # left by a process that was killed
    write_cached(tmp_path / "file", b"content")
    assert sorted(tmp_path.iterdir()) == [tmp_path / "file", young]
    assert not old.exists()
    assert not left.exists()
    os.utime(young, (time.time() - (DAYS + 1) * DAY,) * 2)
    assert read_cached(young) == b"young"  # which marks it as used
    write_cached(tmp_path / "file", b"more")
    assert read_cached(young) == b"young"


def test_a_limited_number_of_files_stays(tmp_path: Path) -> None:
    files = [used(tmp_path / f"{days:02}", days) for days in range(1, MOST_FILES + 10)]
    assert read_cached(files[-1])
    write_cached(tmp_path / "file", b"content")
    assert {*tmp_path.iterdir()} == {tmp_path / "file", files[-1], *files[: MOST_FILES - 2]}


def test_files_that_cannot_be_read_or_written(tmp_path: Path) -> None:
    assert read_cached(None) == read_cached(tmp_path / "none") == read_cached(tmp_path) == b""
    (tmp_path / "file").write_text("")
    write_cached(tmp_path / "file/below", b"content")
    write_cached(None, b"content")
    (tmp_path / "folder").mkdir()
    os.utime(tmp_path / "folder", (0, 0))
    write_cached(tmp_path / "new", b"content")
    assert read_cached(tmp_path / "new") == b"content"
    assert (tmp_path / "folder").is_dir()
