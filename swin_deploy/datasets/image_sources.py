"""Sources of images for `classify_dataset`: each yields keys and images in a fixed order, with bounded memory.

An image is a path or the content of an image file, so it is decoded in the process that classifies it.
"""

from __future__ import annotations

import glob
import hashlib
import itertools
import os
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from swin_deploy.dependencies import require
from swin_deploy.errors import InputError, UsageError, sentence, shown
from swin_deploy.files import open_regular
from swin_deploy.preprocess import image_suffixes, refuse_address

PATH, KEY = "path", "key"  # column that names an image in the results
TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
IMAGE_BYTES = 1 << 28  # largest image in a shard
LINE = 1 << 16  # bytes; longest path in a text file
IMAGE_COLUMNS = ("image", "img", "jpg", "png", "bytes", "image_bytes", "content")
PATH_COLUMNS = ("path", "image_path", "file_path", "filepath", "file_name", "filename")
KEY_COLUMNS = ("key", "__key__", "id", "image_id", *PATH_COLUMNS)
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}")
_ROWS = 64  # of a Parquet file that are decoded at a time


class Unreadable(str):
    """Why an image of a shard cannot be read; it stands in the place of the image."""


Image = str | bytes | Unreadable
Item = tuple[str, Image]  # key and image


@dataclass
class Source:
    """Images in shards: one list of paths, or several files with images.

    Batches never span two shards, so each shard can be read on another machine. `read(shard, skip)` yields the images of a
    shard after the first `skip`. `total` is the number of images, 0 if it is not known; `count` fills it in, and returns what
    identifies the source.
    """

    title: str
    column: str
    shards: tuple[Any, ...]
    read: Callable[[Any, int], Iterator[Item]]
    count: Callable[[Source], str]
    total: int = 0
    size: int = 0  # bytes of the shards

    def expected(self) -> int:
        """Return the number of images; if it is not known, an estimate from the part of the tar files that was read."""
        if self.total or not isinstance(self.read, _Tar) or not self.read.places:
            return self.total
        images, read = (sum(one) for one in zip(*self.read.places.values(), strict=True))
        return round(images * self.size / read) if read else 0


def source_from(value: Any, image_column: str | None = None, key_column: str | None = None) -> Source:
    """Return the source that a path, a pattern or a sequence of paths stands for. Raises InputError if there is no image."""
    if not isinstance(value, str | os.PathLike):
        try:
            paths = [os.fsdecode(one) for one in value]
        except TypeError as error:
            raise InputError(
                f"Invalid source of type {type(value).__name__}. Expected a path, a list of paths, or a Ray dataset."
            ) from error
        return _of_paths("the list of paths", paths, image_column, key_column)
    text = os.fspath(value)
    if os.path.isdir(text):  # noqa: PTH112 - Path.is_dir raises for a name that is too long
        return Source(text, PATH, (text,), _walked, _counted)
    if not os.path.lexists(text) and (any(sign in text for sign in "*?[") or _RANGE.search(text)):
        patterns = _expanded(text)
        paths = [path for one in patterns for path in ([one] if not glob.has_magic(one) else sorted(_found(one)))]
        if not paths:
            raise InputError(f"No file matches {shown(text)}. Check the pattern, and quote it in a shell.")
        return _of_paths(text, paths, image_column, key_column)
    if not os.path.isfile(text):  # noqa: PTH113
        refuse_address(text, text)
        problem = "is not a regular file" if os.path.exists(text) else "does not exist"  # noqa: PTH110
        raise InputError(f"{text} {problem}. Expected a folder, a pattern, a text file of paths, tar shards or a Parquet file.")
    if text.lower().endswith(".txt"):
        return Source(text, PATH, (text,), _listed, _counted)
    return _of_paths(text, [text], image_column, key_column)


def _of_paths(title: str, paths: Sequence[str], image_column: str | None, key_column: str | None) -> Source:
    """Return the source of several files of one kind: tar shards, Parquet files or images."""
    kinds = {_kind(path) for path in paths}
    if len(kinds) != 1:
        raise InputError(f"{title} has {' and '.join(sorted(kinds)) or 'no'} files. Expected files of one kind.")
    [kind] = kinds
    if kind == "image":
        return Source(title, PATH, (tuple(paths),), _given, _counted)
    if kind == "tar":
        return Source(title, KEY, tuple(paths), _Tar(), _identified)
    require("pyarrow.parquet", "read Parquet files")
    return Source(title, KEY, tuple(paths), _Parquet(image_column, key_column), _measured)


def _kind(path: str) -> str:
    low = path.lower()
    return "tar" if low.endswith(TARS) else "Parquet" if low.endswith((".parquet", ".pq")) else "image"


def _found(pattern: str) -> list[str]:
    """Return the files that match; folders, of a pattern such as `**`, are left out."""
    return [path for path in glob.iglob(pattern, recursive=True) if not os.path.isdir(path)]  # noqa: PTH112, PTH207


def _expanded(text: str) -> list[str]:
    """Return the names that braces stand for: {000..099} and {a,b}."""
    match = _RANGE.search(text)
    if match is None:
        return [text]
    first, last, names = match.groups()
    if names is not None:
        parts = names.split(",")
    else:
        low, high = int(first), int(last)
        if not 0 <= high - low < 10_000_000:
            raise UsageError(f"Invalid range {match[0]}. Expected {{FIRST..LAST}}, for example {{000..099}}.")
        parts = [str(number).zfill(len(first)) for number in range(low, high + 1)]
    return [one for part in parts for one in _expanded(text[: match.start()] + part + text[match.end() :])]


def _counted(source: Source) -> str:
    """Count the paths of a source and return a digest of them."""
    digest, source.total = hashlib.sha256(), 0
    for key, _ in itertools.chain.from_iterable(source.read(shard, 0) for shard in source.shards):
        digest.update(key.encode("utf-8", "surrogatepass") + b"\0")
        source.total += 1
    if not source.total:
        raise InputError(f"{source.title} contains no image. Expected files such as JPEG or PNG.")
    return digest.hexdigest()


def _identified(source: Source) -> str:
    """Return a digest of the names, sizes and times of the shards."""
    digest, source.size = hashlib.sha256(), 0
    for shard in source.shards:
        with open_regular(shard, InputError) as file:
            facts = os.fstat(file.fileno())
        source.size += facts.st_size
        digest.update(f"{shard}\0{facts.st_size}\0{facts.st_mtime_ns}\0".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _walked(folder: str, skip: int) -> Iterator[Item]:
    """Yield the images of a folder tree: of each folder first its files, then its subfolders, both sorted by name.

    Hidden files and folders, and files without the suffix of an image, are left out.
    """
    known, seen = image_suffixes(), set[str]()

    def below(place: str) -> Iterator[str]:
        if (real := os.path.realpath(place)) in seen:  # a symbolic link to a parent folder
            return
        seen.add(real)
        try:
            with os.scandir(place) as entries:
                names = sorted((entry.name, entry.is_dir()) for entry in entries if not entry.name.startswith("."))
        except OSError as error:
            raise InputError(f"{place} cannot be read: {error.strerror}. Change its permissions.") from error
        start = place if place.endswith(os.sep) else place + os.sep
        for name, is_folder in names:
            if not is_folder and name[name.rfind(".") :].lower() in known:
                yield start + name
        for name, is_folder in names:
            if is_folder:
                yield from below(start + name)

    yield from ((path, path) for path in itertools.islice(below(folder), skip, None))


def _given(paths: Sequence[str], skip: int) -> Iterator[Item]:
    yield from ((path, path) for path in paths[skip:])


def _listed(file: str, skip: int) -> Iterator[Item]:
    """Yield the paths in a text file, one a line."""
    with open_regular(file, InputError) as opened:
        number = 0
        while line := opened.readline(LINE):
            if len(line) == LINE or b"\0" in line:
                raise InputError(f"{file} has no path in line {number + 1}. Expected text with one path a line.")
            if path := os.fsdecode(line.strip()):
                number += 1
                if number > skip:
                    yield path, path


@dataclass(frozen=True)
class _Tar:
    """Reads the images of a tar file under the names that they have in it. `places`: images and bytes of it read so far."""

    places: dict[str, tuple[int, int]] = field(default_factory=dict)

    def __call__(self, shard: str, skip: int) -> Iterator[Item]:
        known, number = image_suffixes(), 0
        with _readable(shard, tarfile.TarError), open_regular(shard, InputError) as file, tarfile.open(fileobj=file) as archive:
            while (member := archive.next()) is not None:
                archive.members = []  # type: ignore[attr-defined] # otherwise memory grows
                if not member.isreg() or os.path.splitext(member.name)[1].lower() not in known:  # noqa: PTH122
                    continue
                number += 1
                self.places[shard] = (number, file.tell())
                if number <= skip:
                    continue
                if member.size > IMAGE_BYTES:
                    yield member.name, Unreadable(f"The image has {member.size} bytes. The limit is {IMAGE_BYTES} bytes.")
                else:
                    content = archive.extractfile(member)
                    assert content is not None
                    yield member.name, content.read()
            _refuse_partial(archive)
            self.places[shard] = (number, os.fstat(file.fileno()).st_size)


def _refuse_partial(archive: tarfile.TarFile) -> None:
    """Raise TarError for a file that ends without the mark of its end, which tarfile accepts, or has more after it."""
    stream: Any = archive.fileobj
    stream.seek(archive.offset)
    if len(end := stream.read(tarfile.BLOCKSIZE)) < tarfile.BLOCKSIZE or end.strip(b"\0"):
        raise tarfile.ReadError("it is cut off")
    while piece := stream.read(1 << 20):
        if piece.strip(b"\0"):
            raise tarfile.ReadError("it has data after its end; join tar files with tar --concatenate")


@contextmanager
def _readable(shard: str, *kinds: Any) -> Iterator[None]:
    """Turn the errors of a damaged shard into InputError."""
    try:
        yield
    except InputError:
        raise
    except (*kinds, OSError, EOFError, ValueError) as error:
        raise InputError(f"{shard} is damaged ({sentence(shown(str(error)))}). Write it again, or leave it out.") from error


@dataclass(frozen=True)
class _Parquet:
    """Reads the images of a Parquet file: a column of bytes, of paths, or of both as in Hugging Face data sets."""

    image_column: str | None
    key_column: str | None

    def __call__(self, shard: str, skip: int) -> Iterator[Item]:
        parquet = require("pyarrow.parquet", "read Parquet files")
        with _readable(shard, require("pyarrow", "read Parquet files").ArrowException), parquet.ParquetFile(shard) as file:
            groups = [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)]
            ends = list(itertools.accumulate(groups))
            wanted = [number for number, end in enumerate(ends) if end > skip]
            first = ends[wanted[0]] - groups[wanted[0]] if wanted else 0
            image, key = columns_of(file.schema_arrow, self.image_column, self.key_column, shard)
            names = list(dict.fromkeys(name for name in (image, key) if name))
            for batch in file.iter_batches(_ROWS, row_groups=wanted, columns=names):
                for item in items_of(batch, image, key, f"{Path(shard).name}:", first):
                    first += 1
                    if first > skip:
                        yield item


def _measured(source: Source) -> str:
    """Count the rows of Parquet files from their metadata, and return what identifies the files."""
    parquet, source.total = require("pyarrow.parquet", "read Parquet files"), 0
    for shard in source.shards:
        with _readable(shard, require("pyarrow", "read Parquet files").ArrowException), open_regular(shard, InputError) as file:
            found = parquet.ParquetFile(file)
            read: Any = source.read
            columns_of(found.schema_arrow, read.image_column, read.key_column, shard)
            source.total += found.metadata.num_rows
    if not source.total:
        raise InputError(f"{source.title} has no rows. Expected one for each image.")
    return _identified(source)


def columns_of(schema: Any, image: str | None, key: str | None, title: str) -> tuple[str, str | None]:
    """Return the columns of the images and the keys: those that are named, or those found by type and name."""
    types = require("pyarrow", "read tables").types
    for name in (image, key):
        if name is not None and name not in schema.names:
            raise UsageError(f"{title} has no column {shown(name)}, only {shown(', '.join(schema.names))}.")
    if image is None:
        binary = [one.name for one in schema if _holds_images(types, one.type)]
        named = [one for one in IMAGE_COLUMNS if one in binary]
        paths = [one for one in PATH_COLUMNS if one in schema.names and _is_text(types, schema.field(one).type)]
        found = binary if len(binary) == 1 else named[:1] or ([] if binary else paths[:1])
        if not found:
            raise UsageError(
                f"{title} has no column that clearly holds images, only {shown(', '.join(schema.names))}. Name one with "
                f"--image-column."
            )
        [image] = found
    if key is None:
        plain = [one for one in schema.names if one != image or _is_text(types, schema.field(one).type)]
        key = next((one for one in KEY_COLUMNS if one in plain), None)
    return image, key


def _holds_images(types: Any, kind: Any) -> bool:
    if types.is_struct(kind):
        return {"bytes", "path"} & {kind.field(number).name for number in range(kind.num_fields)} != set()
    return bool(types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind))


def _is_text(types: Any, kind: Any) -> bool:
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))


def items_of(batch: Any, image: str, key: str | None, start: str, first: int) -> Iterator[Item]:
    """Yield the keys and images in an Arrow table. A row without a key gets `start` and its number from `first` on."""
    images = batch.column(batch.schema.get_field_index(image))
    keys = images if key is None else batch.column(batch.schema.get_field_index(key))
    for number in range(batch.num_rows):
        found, name = images[number].as_py(), keys[number].as_py() if key is not None else None
        if isinstance(found, dict):
            name = name if name is not None else found.get("path")
            found = found.get("bytes") or found.get("path")
        if not isinstance(found, str | bytes):
            found = Unreadable("The row has no image.")
        yield (f"{start}{first + number}" if name is None else str(name)), found
