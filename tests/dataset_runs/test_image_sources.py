"""Sources of images yield what other readers find, in a fixed order, from any place on; damaged ones are refused."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from swin_deploy.datasets.image_sources import Unreadable, source_from
from swin_deploy.datasets.worker_pool import Pace, chunks_of
from swin_deploy.errors import InputError, UsageError

IMAGES = {f"{number:03d}.png": b"image %d" % number for number in range(7)}


def folder(place: Path) -> Path:
    for name, content in {"b/x.jpg": b"", "b/a/y.PNG": b"", "a.png": b"", "z.txt": b"", ".h/q.png": b"", ".i.png": b""}.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(content)
    (place / "b/loop").symlink_to(place, target_is_directory=True)
    return place


def tar(path: Path, names: list[str], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        for name in names:
            for member, content in ((name, IMAGES[name]), (name.replace("png", "cls"), b"3")):
                info = tarfile.TarInfo(member)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
        archive.addfile(tarfile.TarInfo("link.png"))
        info = tarfile.TarInfo("other.png")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(info)
    return path


def shards(place: Path, mode: str, ending: str) -> str:
    names = list(IMAGES)
    tar(place / f"s-08{ending}", names[:4], mode)
    tar(place / f"s-09{ending}", names[4:], mode)
    return str(place / f"s-{{08..09}}{ending}")


def parquet(place: Path, columns: dict[str, object], rows: int = 3) -> str:
    pq.write_table(pa.table(columns), place / "t.parquet", row_group_size=rows)
    return str(place / "t.parquet")


def listed(place: Path) -> str:
    (place / "list.txt").write_text("x/1.jpg\n\n  y 2.png \n")
    return str(place / "list.txt")


IN_TAR = [*list(IMAGES.items())[:4], ("link.png", b""), *list(IMAGES.items())[4:], ("link.png", b"")]
CONTENTS = list(IMAGES.values())
BOTH = [{"bytes": b"1", "path": "p/1.png"}, {"bytes": None, "path": "p/2.png"}, None, {"bytes": b"4", "path": None}]
SOURCES: dict[str, tuple[Callable[[Path], object], list[tuple[str, str | bytes]]]] = {
    "folder": (folder, [(name, name) for name in ("a.png", "b/x.jpg", "b/a/y.PNG")]),
    "pattern": (lambda place: f"{folder(place)}/*/*.*", [("b/x.jpg", "b/x.jpg")]),
    "names": (lambda place: f"{place}/{{b,c}}/{{1..2}}.png", [(f"{d}/{n}.png",) * 2 for d in "bc" for n in "12"]),
    "list": (listed, [("x/1.jpg",) * 2, ("y 2.png",) * 2]),
    "given": (lambda place: [Path("1.png"), "2.png"], [("1.png",) * 2, ("2.png",) * 2]),
    "tar": (lambda place: shards(place, "w", ".tar"), IN_TAR),
    "tar.gz": (lambda place: shards(place, "w:gz", ".tar.gz"), IN_TAR),
    "bytes": (lambda place: parquet(place, {"id": [*"abcdefg"], "image": CONTENTS}), [*zip("abcdefg", CONTENTS, strict=True)]),
    "only column": (
        lambda place: parquet(place, {"label": [1] * 7, "data": CONTENTS}),
        [(f"t.parquet:{number}", content) for number, content in enumerate(CONTENTS)],
    ),
    "hugging face": (
        lambda place: parquet(place, {"image": BOTH, "label": [1] * 4}),
        [("p/1.png", b"1"), ("p/2.png", "p/2.png"), ("t.parquet:2", "The row has no image."), ("t.parquet:3", b"4")],
    ),
    "paths": (lambda place: parquet(place, {"file_name": ["1.png", "2.png"], "n": [1, 2]}), [("1.png",) * 2, ("2.png",) * 2]),
}


@pytest.mark.parametrize("name", SOURCES)
def test_sources(name: str, tmp_path: Path) -> None:
    make, wanted = SOURCES[name]
    source = source_from(make(tmp_path))
    identity = source.count(source)
    known = source.total
    found = [(shard, item) for shard in source.shards for item in source.read(shard, 0)]
    places = [(key.removeprefix(f"{tmp_path}/"), image) for _, (key, image) in found]
    short = [(key, image.removeprefix(f"{tmp_path}/") if isinstance(image, str) else image) for key, image in places]
    assert short == wanted
    assert known == (0 if "tar" in name else len(wanted))
    for shard in source.shards:
        for skip in range(5):
            assert list(source.read(shard, skip)) == [item for one, item in found if one == shard][skip:]
    assert (source.count(source), source.total) == (identity, known)


def test_chunks_begin_anywhere_and_batches_stay(tmp_path: Path) -> None:
    source = source_from(shards(tmp_path, "w", ".tar"))
    assert source.expected() == 0
    whole = [(chunk.shard, chunk.end, batch) for chunk in chunks_of(source, 2, 0, 0, Pace()) for batch in chunk.batches]
    assert [len(batch) for *_, batch in whole] == [2, 2, 1, 2, 2]
    assert (source.expected(), source.count(source), source.expected()) == (0, source.count(source), 9)
    for number, (shard, end, _) in enumerate(whole):
        for pace in (1, 2, 5):
            later = chunks_of(source, 2, shard, end, Pace(pace))
            assert [batch for chunk in later for batch in chunk.batches] == [batch for *_, batch in whole[number + 1 :]]


def test_a_column_may_be_named(tmp_path: Path) -> None:
    path = parquet(tmp_path, {"left": [b"1"], "right": [b"2"], "n": [7], "key": ["k"]})
    source = source_from(path, "right", "n")
    assert list(source.read(path, 0)) == [("7", b"2")]


def damaged(place: Path, change: Callable[[bytes], bytes]) -> str:
    path = tar(place / "s.tar", list(IMAGES))
    path.write_bytes(change(path.read_bytes()))
    return str(path)


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "no paths": (lambda place: [b"1.png", 2], "Invalid source of type list"),
    "no list": (lambda place: 2, "Invalid source of type int"),
    "nothing there": (lambda place: place / "none", "does not exist"),
    "a device": (lambda place: "/dev/zero", "is not a regular file"),
    "address": (lambda place: "https://example.com/x.tar", "web address"),
    "no match": (lambda place: f"{place}/*.jpg", "No file matches"),
    "no image": (lambda place: place, "contains no image"),
    "two kinds": (lambda place: [str(place / "a.tar"), "b.png"], "files of one kind"),
    "range": (lambda place: f"{place}/{{9..1}}.tar", "Invalid range"),
    "shard is missing": (lambda place: f"{place}/{{1..2}}.tar", "1.tar does not exist"),
    "cut in a header": (lambda place: damaged(place, lambda data: data[: 512 * 4 + 9]), "cut off"),
    "cut in an image": (lambda place: damaged(place, lambda data: data[: 512 * 5 + 3]), "is damaged"),
    "no tar": (lambda place: damaged(place, lambda data: b"x" * 2000), "is damaged"),
    "two in one": (lambda place: damaged(place, lambda data: data + data), "data after its end"),
    "no Parquet": (lambda place: damaged(place, bytes) and _renamed(place / "s.tar", place / "s.parquet"), "is damaged"),
    "no column": (lambda place: parquet(place, {"n": [1]}), "no column that clearly holds images"),
    "two columns": (lambda place: parquet(place, {"left": [b"1"], "right": [b"2"]}), "--image-column"),
    "binary list": (lambda place: _written(place / "l.txt", b"\0\1"), "no path in line 1"),
}


def _renamed(old: Path, new: Path) -> str:
    return str(old.replace(new))


def _written(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    return str(path)


@pytest.mark.parametrize("name", REFUSED)
def test_refused_sources(name: str, tmp_path: Path) -> None:
    make, sentence = REFUSED[name]
    with pytest.raises((InputError, UsageError), match=sentence):  # noqa: PT012
        source = source_from(make(tmp_path))
        source.count(source)
        list(chunks_of(source, 2, 0, 0, Pace()))


def test_an_image_that_is_too_large_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("swin_deploy.datasets.image_sources.IMAGE_BYTES", 6)
    path = str(tar(tmp_path / "s.tar", ["000.png"]))
    [(_, image), _] = source_from(path).read(path, 0)
    assert isinstance(image, Unreadable)
