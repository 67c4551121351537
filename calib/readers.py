"""Where samples come from: a folder of images, a NumPy file, or any Python iterable. One sample at a time is in memory.

A source is sized and can be read again and again, always in the same order, so that reading can be taken up where it stopped.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np

from swin_deploy.bundle import sha256_of
from swin_deploy.errors import InputError
from swin_deploy.specs import Array

IMAGES, PIXELS, LABELS = "images", "pixel_values", "labels"  # the arrays of a NumPy file
# Formats that Pillow opens only with a plug-in of somebody else's, or that are no pictures.
STUBS = {"BUFR", "FITS", "GRIB", "HDF5", "MPEG", "WMF"}


class Source(Protocol):
    """Samples by number, sorted; each is a path, a PIL image, a uint8 array [h, w, 3] or a float array [3, h, w].

    `labels` holds a class name or number for each sample, or is None.
    """

    @property
    def title(self) -> str: ...

    @property
    def labels(self) -> Sequence[Any] | None: ...

    def __len__(self) -> int: ...

    def name(self, index: int) -> str: ...

    def read(self, wanted: Sequence[int]) -> Iterator[Any]: ...

    def digest(self, index: int, sample: Any) -> bytes: ...


@dataclass(frozen=True)
class Folder:
    """The images at and below `path`: `names` relative to it, sorted; `labels` the class folder that each is in."""

    path: Path
    names: tuple[str, ...]
    labels: tuple[str, ...] | None

    @property
    def title(self) -> str:
        return str(self.path)

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        return self.names[index]

    def read(self, wanted: Sequence[int]) -> Iterator[Path]:
        return (self.path / self.names[index] for index in wanted)

    def digest(self, index: int, sample: Path) -> bytes:
        try:
            return self.names[index].encode("utf-8", "surrogateescape") + b"\0" + sha256_of(sample).encode()
        except OSError as error:
            raise InputError(f"Image file {str(sample)!r} cannot be read: {error.strerror}. Check its permissions.") from error

    @classmethod
    def at(cls, path: Path) -> Folder:
        """The folder `path`. Its classes are the folders directly in it, where no image lies beside them.

        A folder that holds nothing but one folder of class folders is that folder. Hidden files and files that are no
        images by their name are passed over. Raises InputError where there is no image, or a folder may not be read.
        """
        known = _suffixes()
        found: list[Path] = []
        seen: set[str] = set()
        for place, folders, files in os.walk(path, followlinks=True, onerror=_refuse_unreadable):
            here = os.path.realpath(place)
            if here in seen:  # a link that leads back up
                folders[:] = []
                continue
            seen.add(here)
            folders[:] = [folder for folder in folders if not folder.startswith(".")]
            pictures = (file for file in files if not file.startswith(".") and Path(file).suffix.lower() in known)
            found += [Path(place, file).relative_to(path) for file in pictures]
        if not found:
            raise InputError(f"There is no image in {path} or below it. Expected files such as JPEG or PNG.")
        while len({file.parts[0] for file in found}) == 1 and all(len(file.parts) > 2 for file in found):
            path = path / found[0].parts[0]
            found = [file.relative_to(file.parts[0]) for file in found]
        found.sort(key=lambda file: file.as_posix())
        labels = tuple(file.parts[0] for file in found) if all(len(file.parts) > 1 for file in found) else None
        return cls(path, tuple(file.as_posix() for file in found), labels)


class NumpyFile:
    """The rows of one array in a .npy or .npz file, read one after the other; the file is never loaded as a whole."""

    def __init__(self, title: str, open_array: Callable[[], contextlib.AbstractContextManager[IO[bytes]]]) -> None:
        self.title, self._open = title, open_array
        self.labels: Sequence[Any] | None = None
        self.prepared = False  # whether the samples are what the graph takes, whatever their type
        with self._reading() as stream:
            self.shape, self.dtype = self._header(stream)

    def __len__(self) -> int:
        return self.shape[0]

    def name(self, index: int) -> str:
        return f"sample {index} of {self.title}"

    def read(self, wanted: Sequence[int]) -> Iterator[Array]:
        size, place = math.prod(self.shape[1:]) * self.dtype.itemsize, 0
        with self._reading() as stream:
            self._header(stream)
            for index in wanted:
                stream.seek((index - place) * size, os.SEEK_CUR)
                place = index + 1
                data = stream.read(size)
                if len(data) != size:
                    raise InputError(f"{self.title} ends after {index} of {len(self)} samples: it is damaged. Write it again.")
                yield np.frombuffer(data, self.dtype).reshape(self.shape[1:])

    def digest(self, index: int, sample: Array) -> bytes:
        return _array_digest(sample)

    @classmethod
    def at(cls, path: Path) -> NumpyFile:
        """The samples in the file `path`: `pixel_values` float [n, 3, h, w] or `images` uint8 [n, h, w, 3].

        An .npz may hold `labels` [n] beside them. Raises InputError for anything else.
        """
        if path.suffix.lower() == ".npy":
            return cls(str(path), lambda: path.open("rb"))
        names = _members(path)
        samples = next((name for name in (PIXELS, IMAGES) if name in names), None)
        if samples is None:
            held = ", ".join(names) or "nothing"
            raise InputError(f"{path} has no array {PIXELS} or {IMAGES}; it holds {held}. Name the samples so: np.savez.")
        found = cls(f"{path} ({samples})", lambda: _member(path, samples))
        if LABELS in names:
            labels = cls(f"{path} ({LABELS})", lambda: _member(path, LABELS))
            if labels.shape != (len(found),):
                raise InputError(
                    f"{labels.title} has shape {list(labels.shape)}, and must hold one label for each of {len(found)} samples."
                )
            found.labels = [row.item() for row in labels.read(range(len(labels)))]
        return found

    @contextlib.contextmanager
    def _reading(self) -> Iterator[IO[bytes]]:
        try:
            with self._open() as stream:
                yield stream
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{self.title} cannot be read as a NumPy array ({error}). Write it with np.save.") from error

    def _header(self, stream: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(stream)
        if dtype.hasobject:
            raise InputError(f"{self.title} holds Python objects, which are never loaded. Write an array of numbers.")
        if not shape or 0 in shape:
            raise InputError(f"{self.title} holds no samples: its shape is {list(shape)}. Write at least one.")
        if fortran:
            raise InputError(f"{self.title} is in Fortran order. Write it with np.ascontiguousarray, sample after sample.")
        return tuple(shape), dtype


class Items:
    """A sequence of paths, PIL images or arrays, each alone or in a pair with its label; an array counts as its rows."""

    title = "the samples"

    def __init__(self, items: Any) -> None:
        self._items = items
        self.labels: Sequence[Any] | None = None
        if len(items) == 0:
            raise InputError("There are no samples: the sequence is empty. Give at least one image.")
        if len(getattr(items, "targets", ())) == len(items):  # torchvision's data sets, without reading every image
            self.labels = list(items.targets)
        elif _is_pair(items[0]):
            self.labels = [_split(items[index])[1] for index in range(len(items))]

    def __len__(self) -> int:
        return len(self._items)

    def name(self, index: int) -> str:
        item = _split(self._items[index])[0]
        return os.fspath(item) if isinstance(item, str | os.PathLike) else f"sample {index}"

    def read(self, wanted: Sequence[int]) -> Iterator[Any]:
        return (_split(self._items[index])[0] for index in wanted)

    def digest(self, index: int, sample: Any) -> bytes:
        if isinstance(sample, str | os.PathLike):
            return Folder(Path(), (Path(sample).name,), None).digest(0, Path(sample))
        return _array_digest(np.asarray(sample))


def spooled(items: Iterable[Any], limit: int | None, prepare: Callable[[int, Any], Array]) -> NumpyFile:
    """What an iterable without a length gives, at most `limit` samples, as `prepare` makes them.

    They are kept in a temporary file, since the iterable may give them only once.
    """
    file = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the source
    labels: list[Any] = []
    shape: tuple[int, ...] = ()
    header, count = 128, 0
    file.seek(header)
    for count, item in enumerate(items, start=1):
        sample, label = _split(item)
        array = prepare(count - 1, sample)
        shape = array.shape
        file.write(np.ascontiguousarray(array).data)
        if _is_pair(item):
            labels.append(label)
        if count == limit:
            break
    if not count:
        raise InputError("There are no samples: the iterable gives none. Give at least one image.")
    file.seek(0)
    described = {"descr": array.dtype.str, "fortran_order": False, "shape": (count, *shape)}
    np.lib.format.write_array_header_1_0(file, described)
    assert file.tell() == header  # NumPy pads its headers to 64 bytes, and this one never needs more than 128

    @contextlib.contextmanager
    def rewound() -> Iterator[IO[bytes]]:
        file.seek(0)
        yield file

    source = NumpyFile("the samples", rewound)
    source.prepared = True
    source.labels = labels if len(labels) == count else None
    return source


def _suffixes() -> frozenset[str]:
    from PIL import Image

    suffixes = Image.registered_extensions()  # loads every plug-in
    return frozenset(suffix for suffix, kind in suffixes.items() if kind in Image.OPEN and kind not in STUBS)


def _refuse_unreadable(error: OSError) -> None:
    raise InputError(f"{error.filename} cannot be read: {error.strerror}. Change its permissions.")


def _members(path: Path) -> list[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist()]
    except (OSError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} cannot be read as an .npz file ({error}). Write it with np.savez.") from error


@contextlib.contextmanager
def _member(path: Path, name: str) -> Iterator[IO[bytes]]:
    with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as stream:
        yield stream


def _array_digest(array: Array) -> bytes:
    head = f"{array.dtype.str}{array.shape}".encode()
    return hashlib.sha256(head + np.ascontiguousarray(array).tobytes()).digest()


def _is_pair(item: Any) -> bool:
    return isinstance(item, tuple | list) and len(item) == 2


def _split(item: Any) -> tuple[Any, Any]:
    return (item[0], item[1]) if _is_pair(item) else (item, None)
