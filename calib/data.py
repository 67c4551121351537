"""Samples for calibration and evaluation: selected, prepared the way the bundle specifies, and batched."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from swin_deploy.bundle import Bundle, TensorSpec
from swin_deploy.errors import InputError, UsageError
from swin_deploy.frame_input import Frames, Preparation, preparation_for
from swin_deploy.options import Array, Size
from swin_deploy.preprocess import refuse_address

from .labels import labels_from_file
from .readers import ImageFolder, NumpyFile, SampleSequence, SampleSource, spool

CHECKED_SAMPLES = 16  # are read before any work, to refuse a data set in which nothing varies


@dataclass(frozen=True)
class Samples:
    """The samples with the numbers `chosen` of a source, prepared for one graph. Only the current batch is in memory."""

    source: SampleSource
    preprocessor: Preparation
    inputs: tuple[TensorSpec, ...]
    chosen: tuple[int, ...]
    skip: bool = False  # whether samples that cannot be read are left out of batches; otherwise they raise InputError
    failures: dict[str, str] = dataclasses.field(default_factory=dict, compare=False)  # why, by the name of the sample

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def labels(self) -> tuple[Any, ...] | None:
        """Label of each sample: a folder name, or what came with the data. None without labels."""
        known = self.source.labels
        return None if known is None else tuple(known[index] for index in self.chosen)

    @property
    def image_size(self) -> Size:
        """(height, width) of the graph's input in pixels."""
        return self.inputs[0].image_size

    @property
    def ready(self) -> bool:
        """Whether samples are already prepared, for one image size."""
        if isinstance(self.source, NumpyFile) and self.source.prepared:
            return True
        sample = next(self.source.read(self.chosen[:1]))
        return isinstance(sample, np.ndarray) and sample.dtype.kind == "f"

    @cached_property
    def fingerprint(self) -> str:
        """Hexadecimal sha256 of the samples (names and contents) and their preparation."""
        how = {"preprocessor": self.preprocessor.to_dict(), "inputs": [spec.to_dict() for spec in self.inputs]}
        digest = hashlib.sha256(json.dumps(how, sort_keys=True).encode())
        for index, sample in zip(self.chosen, self.source.read(self.chosen), strict=True):
            digest.update(self.source.digest(index, sample))
        return digest.hexdigest()

    def batches(self, size: int, start: int = 0) -> Iterator[dict[str, Array]]:
        """Yield feeds for the graph, at most `size` samples each, from sample `start` on. A mask hides nothing."""
        return (feeds for rows, feeds in self.numbered(size, start) if rows)

    def numbered(self, size: int, start: int = 0) -> Iterator[tuple[list[int], dict[str, Array]]]:
        """Yield batches as `batches` does, with the numbers of their samples."""
        chosen = self.chosen[start:]
        stream = zip(range(start, len(self.chosen)), self.source.read(chosen), strict=True)
        for first in range(0, len(chosen), size):
            count = min(size, len(chosen) - first)
            pixels = np.empty((count, *_shape(self.inputs[0])), dtype=self.inputs[0].dtype)
            rows: list[int] = []
            for number, sample in islice(stream, count):
                try:
                    pixels[len(rows)] = self._prepared(self.chosen[number], sample, pixels.shape[1:])
                except InputError as error:
                    if not self.skip:
                        raise
                    self.failures[self.source.name(self.chosen[number])] = str(error)
                else:
                    rows.append(number)
            masks = {spec.name: np.zeros((len(rows), *_shape(spec)), dtype=spec.dtype) for spec in self.inputs[1:]}
            yield rows, {self.inputs[0].name: pixels[: len(rows)], **masks}

    def _prepared(self, index: int, sample: Any, shape: tuple[int, ...]) -> Array:
        if not (isinstance(self.source, NumpyFile) and self.source.prepared):
            return prepared(sample, self.source.name(index), self.preprocessor, self.inputs)
        if sample.shape != shape:
            raise InputError(
                f"Samples from an iterable without a length are prepared for one image size ({list(sample.shape)}), but a "
                f"graph expects another ({list(shape)}). Pass a list instead."
            )
        return np.asarray(sample)

    def readable(self) -> Samples:
        """Read every sample, and return those that can be used. The result raises InputError for any other."""
        trial = dataclasses.replace(self, skip=True)
        kept = [self.chosen[number] for rows, _ in trial.numbered(1) for number in rows]
        if not kept:
            raise none_readable(self.source.title, self.failures)
        return dataclasses.replace(self, skip=False, chosen=tuple(kept))

    def with_size(self, preprocessor: Preparation, inputs: tuple[TensorSpec, ...]) -> Samples:
        """Return the same samples for another graph, such as one with another image size."""
        return dataclasses.replace(self, preprocessor=preprocessor, inputs=inputs)


def samples_from(
    source: str | os.PathLike[str] | Iterable[Any],
    preprocessor: Preparation,
    inputs: tuple[TensorSpec, ...],
    samples: int | None = None,
    labels: str | os.PathLike[str] | None = None,
    skip: bool = False,
    prediction: str = "classes",
) -> Samples:
    """Select samples from a folder of images, an .npy or .npz file, or a Python iterable.

    `source` is a path, or an iterable of paths, PIL images, uint8 arrays [height, width, 3] or prepared float arrays
    [3, height, width], or of pairs of these and labels. `samples` are evenly spread over the sorted data, and the same number
    per class if labels are known; of an iterable without a length, the first ones. `labels` is a file with the classes of the
    images in a folder (see labels_from_file, also for `prediction`). With `skip`, samples that cannot be read are left out.
    Raises InputError if there are no samples, or all are the same.
    """
    failures: dict[str, str] = {}
    found = _source(source, preprocessor, inputs, samples, failures if skip else None)
    if labels is not None:
        if not isinstance(found, ImageFolder):
            raise UsageError(
                f"The label file {labels} applies to a folder of images only, but the data is {found.title}. Remove it."
            )
        found = dataclasses.replace(found, labels=labels_from_file(Path(labels), found.names, prediction))
    chosen = tuple(range(len(found)))
    if samples is not None and samples < len(found):
        chosen = evenly_spread(chosen, samples) if found.labels is None else class_balanced(found.labels, samples)
    made = Samples(found, preprocessor, inputs, chosen, skip, failures)
    _refuse_uniform(made)
    return made


def none_readable(title: str, failures: Mapping[str, str]) -> InputError:
    """Return the error for data without a single sample that can be used."""
    return InputError(f"None of the samples in {title} can be used. The first one: {next(iter(failures.values()))}")


def samples_for(
    bundle: Bundle,
    source: str | os.PathLike[str] | Iterable[Any] | Samples,
    samples: int | None = None,
    labels: str | os.PathLike[str] | None = None,
    skip: bool = False,
) -> Samples:
    """Select samples for the first image size of `bundle` (see samples_from). Samples are returned as they are."""
    if isinstance(source, Samples):
        return source
    prediction = bundle.config.prediction
    preparation = preparation_and_inputs(bundle, next(iter(bundle.graphs_of("fp32"))))
    return samples_from(source, *preparation, samples, labels, skip, prediction)


def preparation_and_inputs(bundle: Bundle, file: str) -> tuple[Preparation, tuple[TensorSpec, ...]]:
    """Return the preprocessing for the graph `file` of `bundle`, or of the engine, and the graph's inputs."""
    graph, preprocessor = bundle.graph_of(file), bundle.preprocessor
    if graph.image_size != bundle.image_size:  # the bundle's preprocessor is for the first size
        preprocessor = preprocessor.with_size(graph.image_size)
    return preparation_for(preprocessor, graph.preprocessing), graph.inputs


def prepared(sample: Any, name: str, preprocessor: Preparation, inputs: tuple[TensorSpec, ...]) -> Array:
    """Prepare one sample for the graph. Raises InputError if it does not fit."""
    from PIL import Image

    shape = _shape(inputs[0])
    if hasattr(sample, "__array__") and not isinstance(sample, np.ndarray | Image.Image):
        sample = np.asarray(sample)  # a tensor of another library
    if isinstance(sample, np.ndarray) and sample.dtype.kind == "f":
        if isinstance(preprocessor, Frames):
            raise InputError(
                f"{name} is already prepared ({sample.dtype}), but this graph includes the preprocessing. Expected uint8 "
                f"images [height, width, 3]."
            )
        pixels = sample.astype(np.float32)
        if pixels.shape != shape:
            raise InputError(
                f"{name} has shape {list(sample.shape)}. Expected a prepared array {list(shape)}, or a uint8 image "
                f"[height, width, 3]."
            )
        if not np.isfinite(pixels).all():
            raise InputError(f"{name} contains NaN or infinity. Remove it, or write the data again.")
        return pixels
    try:
        made: Array = preprocessor(sample)[0]
    except InputError as error:
        raise error if isinstance(sample, str | os.PathLike) else InputError(f"{name}: {error}") from error
    if made.shape != shape:
        sizes = (made.shape, shape) if inputs[0].dtype == "uint8" else (made.shape[1:], shape[1:])
        found, expected = (f"{size[0]}x{size[1]}" for size in sizes)
        raise InputError(
            f"{name} has {found} pixels after preprocessing, but the graph expects {expected}. Export a graph for that size."
        )
    return made


def evenly_spread(indices: Sequence[int], count: int) -> tuple[int, ...]:
    """Select `count` of `indices`, evenly spread and in order; all if there are not more."""
    if count >= len(indices):
        return tuple(indices)
    return tuple(indices[(2 * place + 1) * len(indices) // (2 * count)] for place in range(count))


def class_balanced(labels: Sequence[Any], count: int) -> tuple[int, ...]:
    """Select `count` sample numbers, sorted: the same number per class while it lasts, evenly spread over the class."""
    members: dict[Any, list[int]] = {}
    for index, label in enumerate(labels):
        members.setdefault(label, []).append(index)
    taken = dict.fromkeys(members, 0)
    while left := min(count, len(labels)) - sum(taken.values()):
        open_ = [label for label, indices in members.items() if taken[label] < len(indices)]
        share = min(left // len(open_), min(len(members[label]) - taken[label] for label in open_))
        for place in range(len(open_)) if share else evenly_spread(range(len(open_)), left):
            taken[open_[place]] += share or 1
    return tuple(sorted(index for label, number in taken.items() if number for index in evenly_spread(members[label], number)))


def _source(
    source: Any,
    preprocessor: Preparation,
    inputs: tuple[TensorSpec, ...],
    samples: int | None,
    failures: dict[str, str] | None,
) -> SampleSource:
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        if os.path.isdir(path):  # noqa: PTH112 - Path.is_dir raises for a name that is too long
            return ImageFolder.at(path)
        if not os.path.isfile(path):  # noqa: PTH113
            refuse_address(source, str(source))
            raise InputError(f"{path} does not exist. Expected a folder of images, or an .npz or .npy file.")
        if path.suffix.lower() in (".npz", ".npy"):
            return _fitting(NumpyFile.at(path), inputs)
        raise InputError(f"{path} is neither a folder nor an .npz or .npy file. Put images into a folder and pass the folder.")
    if hasattr(source, "__len__") and hasattr(source, "__getitem__") and not isinstance(source, Mapping):
        return SampleSequence(source)
    if not isinstance(source, Iterable) or isinstance(source, Mapping):
        raise InputError(f"Invalid data of type {type(source).__name__}. Expected a folder, a file, or an iterable of images.")
    return spool(source, samples, lambda index, sample: prepared(sample, f"sample {index}", preprocessor, inputs), failures)


def _fitting(found: NumpyFile, inputs: tuple[TensorSpec, ...]) -> NumpyFile:
    """Return `found` if its samples have a valid shape; raise InputError otherwise."""
    shape = _shape(inputs[0])
    channels = shape[-1 if inputs[0].dtype == "uint8" else 0]
    images = found.dtype == np.uint8 and _has_bands(found.shape, channels)
    sides = ", ".join(map(str, shape))
    if inputs[0].dtype == "uint8" and not images:
        raise InputError(
            f"{found.title} is {found.dtype} {list(found.shape)}, but this graph includes the preprocessing. Expected uint8 "
            f"images [n, height, width, {channels}]."
        )
    if not images and not (found.dtype.kind == "f" and found.shape[1:] == shape):
        raise InputError(
            f"{found.title} is {found.dtype} {list(found.shape)}. Expected prepared float arrays [n, {sides}], or uint8 images "
            f"[n, height, width, {channels}]."
        )
    return found


def _has_bands(shape: tuple[int, ...], channels: int) -> bool:
    """Return whether an array of this shape has images for `channels` (see Preprocessor)."""
    if channels not in (1, 3):
        return len(shape) == 4 and shape[3] == channels
    return len(shape) == 3 or (len(shape) == 4 and shape[3] in (1, 3, 4))


def _refuse_uniform(samples: Samples) -> None:
    """Raise InputError if samples from all over the data have a single colour each, or are all the same."""
    some = dataclasses.replace(samples, chosen=evenly_spread(samples.chosen, CHECKED_SAMPLES))
    seen: list[Array] = []
    for feeds in some.batches(1):
        seen.append(feeds[samples.inputs[0].name][0])
        plain = all(bool((pixels == pixels[:, :1, :1]).all()) for pixels in seen)
        if not plain and (len(some) == 1 or not np.array_equal(seen[0], seen[-1])):
            return
    if not seen or (len(seen) == 1 and not plain):  # the others cannot be read
        return
    which = f"{len(some)} of the {len(samples)} samples" if len(some) < len(samples) else f"all {len(samples)} samples"
    fault = "have a single colour each" if plain else "are the same"
    raise InputError(f"In {samples.source.title}, {which} {fault}. Expected real images.")


def _shape(spec: TensorSpec) -> tuple[int, ...]:
    return tuple(int(size) for size in spec.shape[1:])
