"""Files of others: regular ones only, up to a limit, and one sentence about anything odd in them."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from swin_deploy import errors, files
from swin_deploy.errors import CheckpointError, InputError, shown
from swin_deploy.files import json_file, json_from, read_regular


def special(kind: str, folder: Path) -> Path:
    """Create a file that is not a regular one of at most 9 bytes."""
    path = folder / kind
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(str(path))
    elif kind == "folder":
        path.mkdir()
    elif kind == "sparse":
        with path.open("wb") as file:
            file.truncate(1 << 40)
    elif kind == "loop":
        path.symlink_to(path)
    return {"device": Path("/dev/zero"), "proc": Path("/proc/self/status"), "NUL": folder / "a\0b"}.get(kind, path)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such files")
@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("FIFO", "is not a regular file"),
        ("socket", "is not a regular file"),
        ("device", "is not a regular file"),
        ("folder", "is a folder"),
        ("missing", "does not exist"),
        ("loop", "cannot be read: Too many levels"),
        ("NUL", "cannot be read: "),
        ("sparse", "has more than 9 bytes"),
        ("proc", "has more than 9 bytes"),
    ],
)
def test_only_regular_files_of_a_limited_size_are_read(kind: str, said: str, tmp_path: Path) -> None:
    path = special(kind, tmp_path)
    with pytest.raises(CheckpointError) as caught:
        read_regular(path, 9, CheckpointError, "Do that.", "The thing")
    assert str(caught.value).startswith(f"The thing {said}")
    assert str(caught.value).endswith(". Do that.")


def test_a_file_up_to_the_limit_is_read(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "file")
    (tmp_path / "file").write_bytes(b"123456789")
    assert read_regular(tmp_path / "link", 9) == b"123456789"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"{", "Expecting property name"),
        (b"\xff", "not UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[" * 66 + b"]" * 66, "nested too deeply"),
        (b'{"a":' * 66 + b"1" + b"}" * 66, "nested too deeply"),
        (b"[1, NaN]", "NaN is not a finite number"),
        (b"[-Infinity]", "-Infinity is not a finite number"),
        (b"1e400", "1e400 is not a finite number"),
        (b"1" * 21, "more than 20 digits"),
        (b"-" + b"1" * 5000, "more than 20 digits"),
        (b'{"a": 1, "b": 2, "\\u001b": 3, "\\u001b": 4}', "the key \\x1b occurs twice"),
        (b"[1,2,3,4,5,6,7]", "more than 5 values"),
    ],
)
def test_json_within_limits(text: bytes, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "JSON_VALUES", 5 if b"7" in text else 10**6)
    (tmp_path / "x.json").write_bytes(text)
    with pytest.raises(InputError) as caught:
        json_file(tmp_path / "x.json")
    assert said in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path / "x.json"))


def test_json_values_are_those_of_python() -> None:
    text = '\ufeff{"a": [1.5, -18446744073709551615, true, null], "\\ud800": {"ä": "\\u001b"}}'
    assert json_from(text.encode(), "x") == {"a": [1.5, -18446744073709551615, True, None], "\ud800": {"ä": "\x1b"}}


def test_foreign_text_in_messages() -> None:
    assert shown("a\x1b[2J\x9b\u202eb\n\ud800ä") == "a\\x1b[2J\\x9b\\u202eb\\n\\ud800ä"
    assert shown("x" * 1000) == "x" * 297 + "..."
    assert len(shown("\x1b" * 1000)) == 300
    assert shown([10**5000]) == "<list>"
    assert shown({"a": "\x1b"}) == "{'a': '\\x1b'}"
    error = errors.UsageError("two\nlines\x1b[2J" + "x" * 10_000)
    assert str(error).startswith("two\nlines\\x1b[2J")
    assert len(str(error)) < 8100
