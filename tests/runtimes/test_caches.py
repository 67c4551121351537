"""The user's cache folder does not grow for ever, and what is used stays."""

from __future__ import annotations

import os
import time
from pathlib import Path

from swin_deploy.runtimes.user_cache import DAYS, MOST_FILES, keep, kept

DAY = 24 * 3600


def used(file: Path, days: float) -> Path:
    file.write_text(file.name)
    os.utime(file, (time.time() - days * DAY,) * 2)
    return file


def test_what_nobody_has_used_for_long_is_removed(tmp_path: Path) -> None:
    old, young = used(tmp_path / "old", DAYS + 1), used(tmp_path / "young", DAYS - 1)
    left = used(tmp_path / ".file.partial-1-00", DAYS + 1)  # by a process that was killed
    keep(tmp_path / "file", b"content")
    assert sorted(tmp_path.iterdir()) == [tmp_path / "file", young]
    assert not old.exists()
    assert not left.exists()
    os.utime(young, (time.time() - (DAYS + 1) * DAY,) * 2)
    assert kept(young) == b"young"  # used, and new with that
    keep(tmp_path / "file", b"more")
    assert kept(young) == b"young"


def test_only_so_many_stay(tmp_path: Path) -> None:
    files = [used(tmp_path / f"{days:02}", days) for days in range(1, MOST_FILES + 10)]
    assert kept(files[-1])
    keep(tmp_path / "file", b"content")
    assert {*tmp_path.iterdir()} == {tmp_path / "file", files[-1], *files[: MOST_FILES - 2]}


def test_what_cannot_be_read_or_written(tmp_path: Path) -> None:
    assert kept(None) == kept(tmp_path / "none") == kept(tmp_path) == b""
    (tmp_path / "file").write_text("")
    keep(tmp_path / "file/below", b"content")
    keep(None, b"content")
    (tmp_path / "folder").mkdir()
    os.utime(tmp_path / "folder", (0, 0))
    keep(tmp_path / "new", b"content")
    assert kept(tmp_path / "new") == b"content"
    assert (tmp_path / "folder").is_dir()
