"""Sources of samples: a folder of images, a NumPy file, or any Python iterable. One sample at a time is in memory.

A source has a length and can be read repeatedly, always in the same order, so that an interrupted pass can resume.
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
from swin_deploy.errors import InputError, shown
from swin_deploy.files import NUMPY_ADVICE, archive_of, numpy_errors, open_regular, read_header
from swin_deploy.options import Array
from swin_deploy.preprocess import file_in_memory, image_suffixes

IMAGES, PIXELS, LABELS = "images", "pixel_values", "labels"  # the arrays of a NumPy file
SAMPLE_BYTES = 1 << 30  # of one sample in a NumPy file
MOST_SAMPLES = 10_000_000  # in a NumPy file
LABEL_BYTES = 1 << 27  # of all labels in a NumPy file
Stream = tuple[IO[bytes], int]  # and its size


class SampleSource(Protocol):
    """Sorted samples: paths, PIL images, uint8 arrays [height, width, 3] or float arrays [3, height, width]."""

    @property
    def title(self) -> str: ...
    @property
    def labels(self) -> Sequence[Any] | None: ...
    def __len__(self) -> int: ...
    def name(self, index: int) -> str: ...
    def read(self, wanted: Sequence[int]) -> Iterator[Any]: ...
    def digest(self, index: int, sample: Any) -> bytes: ...


@dataclass(frozen=True)
class ImageFolder:
    """The images in `path` and its subfolders: sorted relative `names`, and `labels`, the class folder of each."""

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
    def at(cls, path: Path) -> ImageFolder:
        """List the images of a folder. Its subfolders are classes if there is no image beside them.

        A folder that contains only one folder of class folders is replaced by that folder. Hidden files, and files without
        the suffix of an image, are ignored. Raises InputError if there is no image or a folder cannot be read.
        """
        known = image_suffixes()
        found: list[Path] = []
        seen: set[str] = set()
        for place, folders, files in os.walk(path, followlinks=True, onerror=_refuse_unreadable):
            here = os.path.realpath(place)
            if here in seen:  # a symbolic link to a parent folder
                folders[:] = []
                continue
            seen.add(here)
            folders[:] = [folder for folder in folders if not folder.startswith(".")]
            pictures = (file for file in files if not file.startswith(".") and Path(file).suffix.lower() in known)
            found += [Path(place, file).relative_to(path) for file in pictures]
        if not found:
            raise InputError(f"{path} and its subfolders contain no image. Expected files such as JPEG or PNG.")
        while len({file.parts[0] for file in found}) == 1 and all(len(file.parts) > 2 for file in found):
            path = path / found[0].parts[0]
            found = [file.relative_to(file.parts[0]) for file in found]
        found.sort(key=lambda file: file.as_posix())
        labels = tuple(file.parts[0] for file in found) if all(len(file.parts) > 1 for file in found) else None
        return cls(path, tuple(file.as_posix() for file in found), labels)


class NumpyFile:
    """Rows of one array in an .npy or .npz file, read one by one; the file is never loaded as a whole."""

    def __init__(self, title: str, open_array: Callable[[], contextlib.AbstractContextManager[Stream]]) -> None:
        self.title, self._open = title, open_array
        self.labels: Sequence[Any] | None = None
        self.prepared = False  # whether the samples are inputs of the graph, whatever their type
        with self._reading() as (stream, size):
            self.shape, self.dtype = self._header(stream)
            if (needed := self._row_bytes * len(self)) > (left := size - stream.tell()):
                raise ValueError(f"its shape {list(self.shape)} needs {needed} bytes, and it has {left}")
        if self._row_bytes > SAMPLE_BYTES or len(self) > MOST_SAMPLES:
            raise InputError(
                f"{self.title} has {len(self)} samples of {self._row_bytes} bytes. Expected at most {MOST_SAMPLES} samples, "
                f"each of at most {SAMPLE_BYTES} bytes."
            )

    @property
    def _row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    def name(self, index: int) -> str:
        return f"sample {index} of {self.title}"

    def read(self, wanted: Sequence[int]) -> Iterator[Array]:
        size, place = self._row_bytes, 0
        with self._reading() as (stream, _):
            self._header(stream)
            for index in wanted:
                stream.seek((index - place) * size, os.SEEK_CUR)
                place = index + 1
                data = stream.read(size)
                if len(data) != size:
                    raise InputError(f"{self.title} is damaged: it ends after {index} of {len(self)} samples. Write it again.")
                yield np.frombuffer(data, self.dtype).reshape(self.shape[1:])
            if isinstance(stream, zipfile.ZipExtFile):
                while stream.read(1 << 20):  # its CRC-32 is checked at the end
                    pass

    def digest(self, index: int, sample: Array) -> bytes:
        return _array_digest(sample)

    @classmethod
    def at(cls, path: Path) -> NumpyFile:
        """Open an .npy file, or an .npz file with `pixel_values` or `images`, and optionally `labels`."""
        if path.suffix.lower() == ".npy":
            return cls(str(path), lambda: _whole(path))
        with numpy_errors(str(path)), open_regular(path, InputError, NUMPY_ADVICE) as file, archive_of(file) as (_, members):
            names = list(members)
        samples = next((name for name in (PIXELS, IMAGES) if name in names), None)
        if samples is None:
            held = shown(", ".join(names)) or "nothing"
            raise InputError(f"{path} has no array {PIXELS} or {IMAGES}, but {held}. Write one of these with np.savez.")
        found = cls(f"{path} ({samples})", lambda: _member(path, samples))
        if LABELS in names:
            labels = cls(f"{path} ({LABELS})", lambda: _member(path, LABELS))
            if labels.shape[:1] != (len(found),) or len(labels.shape) > 2:
                raise InputError(
                    f"{labels.title} has shape {list(labels.shape)}. Expected one label for each of {len(found)} samples, or "
                    f"one row."
                )
            if len(labels) * labels._row_bytes > LABEL_BYTES:
                raise InputError(f"{labels.title} has more than {LABEL_BYTES} bytes. Expected one label for each sample.")
            found.labels = [_plain(row) for row in labels.read(range(len(labels)))]
        return found

    @contextlib.contextmanager
    def _reading(self) -> Iterator[Stream]:
        with numpy_errors(self.title), self._open() as opened:
            yield opened

    def _header(self, stream: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
        shape, fortran, dtype = read_header(stream)
        if not shape or 0 in shape:
            raise InputError(f"{self.title} contains no samples: its shape is {list(shape)}. Expected at least one.")
        if fortran:
            raise InputError(f"{self.title} is in Fortran order. Convert it with np.ascontiguousarray.")
        return tuple(shape), dtype


class SampleSequence:
    """A sequence of paths, PIL images or arrays, or of pairs of these and labels; of an array, its rows."""

    title = "the samples"

    def __init__(self, items: Any) -> None:
        self._items = items
        self.labels: Sequence[Any] | None = None
        if len(items) == 0:
            raise InputError("There are no samples: the sequence is empty. Expected at least one image.")
        if len(getattr(items, "targets", ())) == len(items):  # a torchvision data set: without reading every image
            self.labels = list(map(_plain, items.targets))
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
            return ImageFolder(Path(), (Path(sample).name,), None).digest(0, Path(sample))
        if (file := file_in_memory(sample)) is not None:
            return hashlib.sha256(file.getvalue()).digest()
        return _array_digest(np.asarray(sample))


def spool(
    items: Iterable[Any], limit: int | None, prepare: Callable[[int, Any], Array], failures: dict[str, str] | None = None
) -> NumpyFile:
    """Write at most `limit` samples of an iterable, prepared by `prepare`, to a temporary file.

    An iterable without a length may yield its samples only once. Samples that cannot be prepared are left out, and added to
    `failures` with the reason; without `failures`, they raise InputError.
    """
    file = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the source
    labels: list[Any] = []
    shape: tuple[int, ...] = ()
    header, count = 128, 0
    file.seek(header)
    for number, item in enumerate(items):
        sample, label = _split(item)
        try:
            array = prepare(number, sample)
        except InputError as error:
            if failures is None:
                raise
            failures[f"sample {number}"] = str(error)
            continue
        count += 1
        shape = array.shape
        file.write(np.ascontiguousarray(array).data)
        if _is_pair(item):
            labels.append(label)
        if count == limit:
            break
    if not count:
        reason = f"The first one: {next(iter(failures.values()))}" if failures else "Expected at least one image."
        raise InputError(f"There are no samples{'' if failures else ': the iterable is empty'}. {reason}")
    file.seek(0)
    described = {"descr": array.dtype.str, "fortran_order": False, "shape": (count, *shape)}
    np.lib.format.write_array_header_1_0(file, described)
    assert file.tell() == header  # NumPy pads headers to 64 bytes, and this one needs at most 128

    @contextlib.contextmanager
    def rewound() -> Iterator[Stream]:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        yield file, size

    source = NumpyFile("the samples", rewound)
    source.prepared = True
    source.labels = labels if len(labels) == count else None
    return source


def _refuse_unreadable(error: OSError) -> None:
    raise InputError(f"{error.filename} cannot be read: {error.strerror}. Change its permissions.")


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[Stream]:
    with open_regular(path, InputError, NUMPY_ADVICE) as file:
        yield file, os.fstat(file.fileno()).st_size


@contextlib.contextmanager
def _member(path: Path, name: str) -> Iterator[Stream]:
    with (
        open_regular(path, InputError, NUMPY_ADVICE) as file,
        archive_of(file) as (archive, members),
        archive.open(members[name]) as it,
    ):
        yield it, members[name].file_size


def _array_digest(array: Array) -> bytes:
    head = f"{array.dtype.str}{array.shape}".encode()
    return hashlib.sha256(head + np.ascontiguousarray(array).tobytes()).digest()


def _is_pair(item: Any) -> bool:
    return isinstance(item, tuple | list) and len(item) == 2


def _split(item: Any) -> tuple[Any, Any]:
    return (item[0], _plain(item[1])) if _is_pair(item) else (item, None)


def _plain(label: Any) -> Any:
    """Return a label as a value that can be compared: several labels, and the rows of arrays and tensors, as a tuple."""
    label = label.tolist() if hasattr(label, "tolist") else label
    return tuple(label) if isinstance(label, list | set | frozenset) else label
