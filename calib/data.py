"""Samples: what a network is calibrated or judged with, chosen, prepared as the bundle prescribes, and batched."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from swin_deploy.bundle import PREPROCESSOR, Bundle
from swin_deploy.errors import InputError, UsageError
from swin_deploy.frame_input import Frames, Preparation, preparation_for
from swin_deploy.preprocess import Preprocessor
from swin_deploy.specs import Array, Size, TensorSpec

from .labels import labels_from_file
from .readers import Folder, Items, NumpyFile, Source, spooled

Feeds = dict[str, Array]
LOOK = 16  # samples that are looked at before any work, to refuse a data set in which nothing varies


@dataclass(frozen=True)
class Samples:
    """The `chosen` samples of a source, as the network whose `inputs` these are takes them.

    Batches are made one at a time; a sample costs memory only while its batch is used.
    """

    source: Source
    preprocessor: Preparation
    inputs: tuple[TensorSpec, ...]
    chosen: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def labels(self) -> tuple[Any, ...] | None:
        """The class of each sample, a folder's name or what came with the data; None where there is none."""
        known = self.source.labels
        return None if known is None else tuple(known[index] for index in self.chosen)

    @property
    def image_size(self) -> Size:
        """(height, width) in pixels of what the network takes."""
        return self.inputs[0].image_size

    @property
    def ready(self) -> bool:
        """Whether samples come as the network takes them, for one image size."""
        if isinstance(self.source, NumpyFile) and self.source.prepared:
            return True
        sample = next(self.source.read(self.chosen[:1]))
        return isinstance(sample, np.ndarray) and sample.dtype.kind == "f"

    @property
    def names(self) -> tuple[str, ...]:
        """What each sample is called: a file's path in its folder."""
        return tuple(self.source.name(index) for index in self.chosen)

    @cached_property
    def fingerprint(self) -> str:
        """A sha256 over the chosen samples (names and contents) and how they are prepared, in hexadecimal."""
        how = {"preprocessor": self.preprocessor.to_dict(), "inputs": [spec.to_dict() for spec in self.inputs]}
        digest = hashlib.sha256(json.dumps(how, sort_keys=True).encode())
        for index, sample in zip(self.chosen, self.source.read(self.chosen), strict=True):
            digest.update(self.source.digest(index, sample))
        return digest.hexdigest()

    def batches(self, size: int, start: int = 0) -> Iterator[Feeds]:
        """Feeds for the network, at most `size` samples each, from sample number `start` on.

        {"pixel_values": float32 [size, 3, height, width], or uint8 frames [size, height, width, 3] where the graph takes
        them}, and masks that hide nothing where the network takes masks.
        Raises InputError for a sample that cannot be read, has another shape, or holds NaN or infinity.
        """
        if size < 1:
            raise UsageError(f"The batch is {size}, and must be at least 1.")
        chosen = self.chosen[start:]
        stream = zip(chosen, self.source.read(chosen), strict=True)
        for first in range(0, len(chosen), size):
            count = min(size, len(chosen) - first)
            pixels = np.empty((count, *_shape(self.inputs)), dtype=self.inputs[0].dtype)
            for row, (index, sample) in zip(pixels, stream, strict=False):
                as_is = isinstance(self.source, NumpyFile) and self.source.prepared
                if as_is and sample.shape != row.shape:
                    raise InputError(
                        f"{self.source.title} come from an iterable without a length, prepared for one image size "
                        f"({list(sample.shape)}), and a graph takes another ({list(row.shape)}). Give a list of them."
                    )
                row[:] = sample if as_is else prepared(sample, self.source.name(index), self.preprocessor, self.inputs)
            yield self._feeds(pixels)

    def _feeds(self, pixels: Array) -> Feeds:
        feeds: Feeds = {self.inputs[0].name: pixels}
        for spec in self.inputs[1:]:
            feeds[spec.name] = np.zeros((len(pixels), *(int(n) for n in spec.shape[1:])), dtype=spec.dtype)
        return feeds

    def with_size(self, preprocessor: Preparation, inputs: tuple[TensorSpec, ...]) -> Samples:
        """The same samples for another network, such as that of another image size."""
        return dataclasses.replace(self, preprocessor=preprocessor, inputs=inputs)


def samples_from(
    source: str | os.PathLike[str] | Iterable[Any],
    preprocessor: Preparation,
    inputs: tuple[TensorSpec, ...],
    samples: int | None = None,
    labels: str | os.PathLike[str] | None = None,
) -> Samples:
    """The samples of a folder of images, of an .npy or .npz file, or of a Python iterable.

    An iterable gives paths, PIL images, uint8 arrays [h, w, 3] or prepared float arrays [3, h, w], each alone or in a pair
    with its label. `samples` takes that many, evenly spread over what there is in sorted order, and equally many of
    each class where classes are known; an iterable without a length gives its first ones. `labels` is a file
    (see labels_from_file) with the classes of the images of a folder. Raises InputError where there is nothing to take, and
    where what is there does not vary.
    """
    if samples is not None and samples < 1:
        raise UsageError(f"{samples} samples are asked for, and at least 1 is needed.")
    found = _source(source, preprocessor, inputs, samples)
    if labels is not None:
        if not isinstance(found, Folder):
            raise UsageError(f"The labels {labels} are for a folder of images, and {found.title} is none. Leave them out.")
        found = dataclasses.replace(found, labels=labels_from_file(Path(labels), found.names))
    chosen = tuple(range(len(found)))
    if samples is not None and samples < len(found):
        chosen = spread(chosen, samples) if found.labels is None else balanced(found.labels, samples)
    made = Samples(found, preprocessor, inputs, chosen)
    _look(made)
    return made


def samples_for(
    bundle: Bundle,
    source: str | os.PathLike[str] | Iterable[Any] | Samples,
    samples: int | None = None,
    labels: str | os.PathLike[str] | None = None,
) -> Samples:
    """As samples_from, for the graphs of the first image size of `bundle`; samples that were chosen already are returned."""
    if isinstance(source, Samples):
        return source
    return samples_from(source, *preparation(bundle, next(iter(bundle.graphs))), samples, labels)


def preparation(bundle: Bundle, file: str) -> tuple[Preparation, tuple[TensorSpec, ...]]:
    """How images become what the graph `file` of `bundle` takes, for its image size, and its inputs."""
    entry: Mapping[str, Any] = bundle.files[file]
    inputs = tuple(TensorSpec.from_dict(spec) for spec in entry["inputs"])
    preprocessor = Preprocessor.from_dict(bundle.read_json(PREPROCESSOR))
    first = next(iter(bundle.graphs.values()))["image_size"]
    if entry["image_size"] != first:  # the bundle's preprocessor makes the first size
        preprocessor = preprocessor.with_size((int(entry["image_size"][0]), int(entry["image_size"][1])))
    return preparation_for(preprocessor, entry), inputs


def prepared(sample: Any, name: str, preprocessor: Preparation, inputs: tuple[TensorSpec, ...]) -> Array:
    """One sample as the graph takes it, float32 [3, height, width] or uint8 [height, width, 3].

    Raises InputError for one that does not fit.
    """
    from PIL import Image

    shape = _shape(inputs)
    if hasattr(sample, "__array__") and not isinstance(sample, np.ndarray | Image.Image):
        sample = np.asarray(sample)  # a tensor of some library
    if isinstance(sample, np.ndarray) and sample.dtype.kind == "f":
        if isinstance(preprocessor, Frames):
            raise InputError(
                f"{name} is prepared already ({sample.dtype}), and this graph prepares its images itself. Give uint8 images "
                f"[height, width, 3]."
            )
        pixels = sample.astype(np.float32)
        if pixels.shape != shape:
            raise InputError(
                f"{name} has shape {list(sample.shape)}, and {list(shape)} was expected, prepared as the network takes it. "
                f"Give uint8 images [height, width, 3] to have them prepared."
            )
        if not np.isfinite(pixels).all():
            raise InputError(f"{name} holds NaN or infinity. Take it out, or write the data again.")
        return pixels
    try:
        made: Array = preprocessor(sample)[0]
    except InputError as error:
        raise error if isinstance(sample, str | os.PathLike) else InputError(f"{name}: {error}") from error
    if made.shape != shape:
        sizes = (made.shape, shape) if isinstance(preprocessor, Frames) else (made.shape[1:], shape[1:])
        comes, takes = (f"{size[0]}x{size[1]}" for size in sizes)
        raise InputError(
            f"{name} is {comes} pixels once it is prepared, and the network takes {takes}. Export for that size as well."
        )
    return made


def spread(indices: Sequence[int], count: int) -> tuple[int, ...]:
    """`count` of `indices`, evenly spread, in their order; all where there are no more."""
    if count >= len(indices):
        return tuple(indices)
    return tuple(indices[(2 * place + 1) * len(indices) // (2 * count)] for place in range(count))


def balanced(labels: Sequence[Any], count: int) -> tuple[int, ...]:
    """`count` sample numbers, sorted: as many of each class as there are, each class's evenly spread over it."""
    members: dict[Any, list[int]] = {}
    for index, label in enumerate(labels):
        members.setdefault(label, []).append(index)
    taken = dict.fromkeys(members, 0)
    while left := min(count, len(labels)) - sum(taken.values()):
        open_ = [label for label, indices in members.items() if taken[label] < len(indices)]
        share = min(left // len(open_), min(len(members[label]) - taken[label] for label in open_))
        for place in range(len(open_)) if share else spread(range(len(open_)), left):
            taken[open_[place]] += share or 1
    return tuple(sorted(index for label, number in taken.items() if number for index in spread(members[label], number)))


def _source(source: Any, preprocessor: Preparation, inputs: tuple[TensorSpec, ...], samples: int | None) -> Source:
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        if os.path.isdir(path):  # noqa: PTH112 - Path.is_dir raises for a name that is too long
            return Folder.at(path)
        if not os.path.isfile(path):  # noqa: PTH113
            raise InputError(f"There is no folder or file {path}. Expected a folder of images, or an .npz or .npy file.")
        if path.suffix.lower() in (".npz", ".npy"):
            return _fitting(NumpyFile.at(path), inputs)
        raise InputError(f"{path} is neither a folder nor an .npz or .npy file. Put images into a folder, and give that.")
    if hasattr(source, "__len__") and hasattr(source, "__getitem__") and not isinstance(source, Mapping):
        return Items(source)
    if not isinstance(source, Iterable) or isinstance(source, Mapping):
        raise InputError(f"The data is a {type(source).__name__}; give a folder, a file, or an iterable of images.")

    def prepare(index: int, sample: Any) -> Array:
        return prepared(sample, f"sample {index}", preprocessor, inputs)

    return spooled(source, samples, prepare)


def _fitting(found: NumpyFile, inputs: tuple[TensorSpec, ...]) -> NumpyFile:
    """`found`, whose samples have a shape that can be meant. Raises InputError otherwise."""
    shape = _shape(inputs)
    images = found.dtype == np.uint8 and (len(found.shape) == 3 or (len(found.shape) == 4 and found.shape[3] in (1, 3, 4)))
    sides = ", ".join(map(str, shape))
    if inputs[0].dtype == "uint8" and not images:
        raise InputError(
            f"{found.title} is {found.dtype} {list(found.shape)}, and this graph prepares its images itself. Expected uint8 "
            f"images [n, height, width, 3]."
        )
    if not images and not (found.dtype.kind == "f" and found.shape[1:] == shape):
        raise InputError(
            f"{found.title} is {found.dtype} {list(found.shape)}. Expected float [n, {sides}], prepared as the network takes "
            f"it, or uint8 images [n, height, width, 3]."
        )
    return found


def _look(samples: Samples) -> None:
    """Raises InputError when samples from all over the data are each of one colour, or all the same."""
    some = dataclasses.replace(samples, chosen=spread(samples.chosen, LOOK))
    first: Array | None = None
    plain = same = True
    for feeds in some.batches(1):
        pixels = feeds[samples.inputs[0].name][0]
        first = pixels if first is None else first
        plain = plain and bool((pixels == pixels[:, :1, :1]).all())
        same = same and np.array_equal(first, pixels)
        if not plain and (not same or len(some) == 1):
            return
    which = f"{len(some)} of the {len(samples)} samples" if len(some) < len(samples) else f"all {len(samples)} samples"
    fault = "have a single colour each" if plain else "are the same"
    raise InputError(f"In {samples.source.title} {which} {fault}, which says nothing about a network. Give real images.")


def _shape(inputs: tuple[TensorSpec, ...]) -> tuple[int, ...]:
    return tuple(int(size) for size in inputs[0].shape[1:])
