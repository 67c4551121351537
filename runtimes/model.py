"""A loaded bundle, from images to predictions. Needs numpy, Pillow and one back end, but neither torch nor onnx."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from swin_deploy.bundle import Bundle, TensorSpec, size_text
from swin_deploy.errors import BackendError, InputError, UsageError
from swin_deploy.frame_input import Preparation, preparation_for
from swin_deploy.option_parsers import choice, whole
from swin_deploy.options import ON_ERROR, Array, LoadSpec, Size
from swin_deploy.tasks import MASK, PIXELS, TaskSpec, class_limits, refuse_without_classes, scores_from_logits

from .autoselect import Description
from .base import Runtime
from .pipeline import pipelined

if TYPE_CHECKING:
    from typing_extensions import Self

    from swin_deploy.preprocess import ImageLike

Arrays = dict[str, Array]


@dataclass(frozen=True)
class Prediction:
    """A class of an image: its index, its label, and its score, by `SwinConfig.score_activation`."""

    index: int
    label: str
    score: float


class Model:
    """A bundle that is loaded and ready to run. Use it as a context manager, or call `close`.

    It has one graph for each exported image size, and runs the one that fits the input. The first graph is loaded at once, the
    others when they are needed. Any number of threads may use it at a time, and each gets bit for bit the results that it would
    get alone. A call that fails leaves the model usable.
    """

    def __init__(self, bundle: Bundle, description: Description, open_file: Callable[[str], Runtime]) -> None:
        """Load the graph of the first image size. `description` names the files; its version is filled in from the runtime."""
        files = description.graphs
        self.bundle, self.precision = bundle, description.precision
        self.config, self.preprocessor, self._task = bundle.config, bundle.preprocessor, bundle.task
        graph = bundle.graph_of(next(iter(files.values())))
        self.preparation: Preparation = self.preprocessor
        if graph.preprocessing is not None:
            self.preparation = preparation_for(self.preprocessor, graph.preprocessing)
        self.image_sizes: tuple[Size, ...] = tuple(files)
        self._files, self._open = dict(files), open_file
        self._runtimes: dict[Size, Runtime] = {}
        self._closed, self._opening = False, threading.RLock()
        version = self._runtime(self.image_sizes[0]).title.rpartition(" ")[2]
        self._description = replace(description, version=version)

    def describe(self) -> Description:
        """Return what runs this model, and why: back end, device, precision, files and measurements. Print it to read it."""
        return self._description

    @property
    def task(self) -> TaskSpec:
        """The task head of the network."""
        return self._task

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The inputs of the graph of the first image size."""
        return self._runtime(self.image_sizes[0]).inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """The outputs of the graph of the first image size."""
        return self._runtime(self.image_sizes[0]).outputs

    @property
    def labels(self) -> Sequence[str]:
        """The label of every class, by its index."""
        return tuple(self.config.id2label.values())

    def run(self, feeds: Mapping[str, Any], out: Mapping[str, Array] | None = None) -> Mapping[str, Array]:
        """Run the network on prepared arrays.

        Args:
            feeds: An array for each of `inputs`, such as `pixel_values` float32 [batch, 3, height, width], or uint8 RGB frames
                [batch, height, width, 3] for a graph with embedded preprocessing. numpy arrays, or tensors with `__dlpack__`
                (torch, CuPy), which are not copied.
            out: Arrays to fill and return, one for each output, as an earlier call returned them.

        Returns:
            An array for each of `outputs`, such as `logits` float32 [batch, labels].

        Raises:
            InputError: An array does not fit.
            BackendError: The back end failed, or the model is closed.
        """
        pixels = feeds.get(PIXELS) if isinstance(feeds, Mapping) else None
        return self._runtime(self._size_of(pixels)).run(feeds, out)

    def warm_up(self, batch: int = 1) -> None:
        """Load the graphs of all image sizes and run each on `batch` black images, so that the first call is fast, too."""
        batch = whole(1)("batch", batch)
        for size in self.image_sizes:
            runtime = self._runtime(size)
            shapes = {spec.name: (batch, *(int(n) for n in spec.shape[1:])) for spec in runtime.inputs}
            for _ in range(runtime.calls_to_warm):
                runtime.run({spec.name: np.zeros(shapes[spec.name], spec.dtype) for spec in runtime.inputs})

    def classify(
        self,
        images: ImageLike | Iterable[ImageLike],
        top_k: int | None = None,
        batch_size: int = 8,
        threshold: float | None = None,
        on_error: str = "stop",
    ) -> list[Any]:
        """Classify images.

        Scores are those of transformers' pipeline: sigmoid of a network for several labels or one, the outputs themselves of a
        regression, else softmax. `export --activation` states another one.

        Args:
            images: One image or several: paths, PIL images, bytes or file objects of image files, or uint8 RGB arrays or
                tensors [height, width, 3]. They are prepared as the image processor of the checkpoint does it.
            top_k: Number of classes to return for each image. Default: 5; all of a network for several labels or a regression.
            batch_size: Images to run at a time. Memory does not grow with the number of images.
            threshold: Return only classes with a score above it. Default: 0.5 for a network for several labels, unless `top_k`
                is given; else none.
            on_error: "stop" raises the error of an image that cannot be read. "continue" returns it in the place of its result.

        Returns:
            The best classes of each image, a list of Prediction, best first; or an InputError.

        Raises:
            InputError: An image cannot be read.
            UsageError: The model is not a classifier.
        """
        self._must_be("image-classification", "classify")
        refuse_without_classes(self.config)
        limits = self._limits(top_k, threshold)
        failed: dict[int, InputError] | None = (
            {} if choice("reaction to errors", ON_ERROR)("on_error", on_error) == "continue" else None
        )
        found: list[Any] = [
            self._best(logits, *limits)
            for outputs in self._batches(images, batch_size, failed=failed)
            for logits in outputs["logits"]
        ]
        for place, error in sorted((failed or {}).items()):
            found.insert(place, error)
        return found

    def features(self, images: ImageLike | Iterable[ImageLike], batch_size: int = 8) -> Arrays:
        """Return every output of a backbone or feature extractor by name, with the images along the first axis."""
        if self.task.name not in ("feature-extraction", "backbone"):
            self._must_be("feature-extraction", "features")
        batches = list(self._batches(images, batch_size))
        if not batches:
            raise InputError("There are no images. Pass at least one.")
        return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}

    def reconstruct(
        self, images: ImageLike | Iterable[ImageLike], mask: NDArray[np.bool_] | None = None, batch_size: int = 8
    ) -> NDArray[np.float32]:
        """Reconstruct images by masked image modeling.

        Args:
            images: As for `classify`.
            mask: bool [images, patches], or [patches] for all images. The network does not see patches where it is True.
            batch_size: Images to run at a time.

        Returns:
            float32 [images, channels, height, width], normalized like the input.

        Raises:
            InputError: The mask has another shape.
        """
        self._must_be("masked-image-modeling", "reconstruct")
        patches = next(spec.shape[1] for spec in self.inputs if spec.name == MASK)
        if mask is not None and (not isinstance(mask, np.ndarray) or mask.dtype != np.bool_ or mask.shape[-1:] != (patches,)):
            given = f"{mask.dtype} {list(mask.shape)}" if isinstance(mask, np.ndarray) else f"a {type(mask).__name__}"
            raise InputError(f"The mask is {given}. Expected bool [images, {patches}], or [{patches}] for all images.")
        found = [outputs["reconstruction"] for outputs in self._batches(images, batch_size, mask)]
        if not found:
            raise InputError("There are no images. Pass at least one.")
        made = np.concatenate(found)
        if mask is not None and mask.ndim == 2 and len(mask) != len(made):
            raise InputError(f"The mask is for {len(mask)} images, and there are {len(made)}. Pass one row for each.")
        return made

    def stream(
        self,
        frames: Iterable[ImageLike],
        batch: int = 1,
        prefetch: int = 2,
        top_k: int | None = None,
        threshold: float | None = None,
    ) -> Iterator[Any]:
        """Iterate over the results for a stream of frames, in order.

        Frames are read and prepared in one thread and run in another; on a GPU in two, so that it computes while data is
        copied. At most twice `prefetch` batches wait, so a slow caller slows down the frames and memory does not grow. An error
        is raised in place of the result of its frame. Closing the iterator, or leaving its `for` loop, ends the threads.

        Args:
            frames: Paths, PIL images, or uint8 RGB arrays [height, width, 3].
            batch: Frames to run at a time.
            prefetch: Batches to prepare ahead.
            top_k: Number of classes for each frame, as for `classify`.
            threshold: Score above which a class is returned, as for `classify`.

        Yields:
            For a classifier the best classes of the frame, otherwise every output of `run` by name.
        """
        batch, prefetch, limits = whole(1)("batch", batch), whole(1)("prefetch", prefetch), self._limits(top_k, threshold)
        classes = self.task.name == "image-classification" and self.config.has_classes

        def run(feeds: Arrays, count: int) -> list[Any]:
            outputs = self.run(feeds)
            if classes:
                return [self._best(logits, *limits) for logits in outputs["logits"]]
            return [
                {name: array[i * (n := len(array) // count) : (i + 1) * n] for name, array in outputs.items()}
                for i in range(count)
            ]

        calls = self._runtime(self.image_sizes[0]).calls_at_once
        return pipelined(_several(frames, batch), batch, prefetch, self._feeds, run, calls)

    def close(self) -> None:
        """Wait for running calls, then free the memory of the back end. The model cannot be run afterwards."""
        self._closed = True
        if self._forked() is None:
            with self._opening:  # until no graph is being loaded
                pass
        for runtime in self._runtimes.values():
            runtime.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle and copy the model as its bundle's path and what runs it, which is loaded again without a measurement."""
        if self._closed:
            raise BackendError("This model is closed. Load it again to copy it or to pass it to another process.")
        return _loaded_again, (self.bundle.path, self._description)

    def _runtime(self, size: Size) -> Runtime:
        runtime = self._runtimes.get(size)
        if runtime is None or self._closed:
            if (forked := self._forked()) is not None:
                return forked  # which refuses to run
            with self._opening:
                if self._closed:
                    raise BackendError("This model is closed. Load it again to run it.")
                runtime = self._runtimes.get(size) or self._open(self._files[size])
                self._runtimes[size] = runtime
                runtime.keep()
        return runtime

    def _forked(self) -> Runtime | None:
        """Return one of the runtimes if this process is a fork of the one that loaded the model."""
        return next((runtime for runtime in self._runtimes.values() if runtime.forked), None)

    def _size_of(self, pixels: object) -> Size:
        """Return the image size whose graph takes `pixels`. The runtime checks everything else."""
        shape = tuple(getattr(pixels, "shape", ()))
        varies = self.preprocessor.varies and getattr(self.preparation, "frame_size", None) is None
        if len(shape) == 4 and (len(self.image_sizes) > 1 or varies):
            first = 1 if getattr(self.preparation, "layout", "nchw") == "nhwc" else 2
            size = (int(shape[first]), int(shape[first + 1]))
            if size not in self._files:
                raise InputError(
                    f'The input "{PIXELS}" has images of {size_text(size)} pixels. This bundle has graphs for '
                    f"{', '.join(map(size_text, self.image_sizes))}. Resize the images, or export for that size as well"
                    f"{', or with --crop-pct 1 to crop the center of every image' * varies}."
                )
            return size
        return self.image_sizes[0]

    def _batches(
        self,
        images: ImageLike | Iterable[ImageLike],
        batch_size: int,
        mask: NDArray[np.bool_] | None = None,
        failed: dict[int, InputError] | None = None,
    ) -> Iterator[Mapping[str, Array]]:
        """Yield the outputs of batches. Images that cannot be read are left out, and put into `failed` if it is given."""
        batch_size = 1 if self.preprocessor.varies else whole(1)("batch_size", batch_size)
        stream = iter(_several(images, batch_size))
        done = 0
        while batch := list(islice(stream, batch_size)):
            yield from self._outputs(batch, done, mask, failed)
            done += len(batch)

    def _outputs(
        self, batch: list[Any], start: int, mask: NDArray[np.bool_] | None, failed: dict[int, InputError] | None
    ) -> Iterator[Mapping[str, Array]]:
        try:
            feeds = self._feeds(batch)
            if mask is not None:
                rows = mask if mask.ndim == 1 else mask[start : start + len(batch)]
                if mask.ndim > 2 or (mask.ndim == 2 and len(rows) < len(batch)):
                    raise InputError(f"The mask has shape {list(mask.shape)}. Expected a row for each image.")
                feeds[MASK][:] = rows
            outputs = self.run(feeds)
        except InputError as error:
            if failed is None:
                raise
            if len(batch) == 1:
                failed[start] = error
                return
        else:
            yield outputs
            return
        for place, image in enumerate(batch):  # one of them is faulty
            yield from self._outputs([image], start + place, mask, failed)

    def _feeds(self, images: list[Any]) -> Arrays:
        return self.feeds(self.preparation(images))

    def feeds(self, pixels: Array) -> Arrays:
        """Return the inputs for `run` from prepared images, with a mask, if the network has one, that hides no patch."""
        masks = {spec.name: np.zeros((len(pixels), *map(int, spec.shape[1:])), dtype=spec.dtype) for spec in self.inputs[1:]}
        return {PIXELS: pixels, **masks}

    def _must_be(self, task: str, method: str) -> None:
        if self.task.name != task:
            raise UsageError(
                f"This bundle was exported for the task {self.task.name}, and {method}() needs {task}. Use run(), or export it "
                f"with --task {task}."
            )

    def _limits(self, top_k: int | None, threshold: float | None) -> tuple[int, float]:
        return class_limits(self.config, top_k, threshold)

    def _best(self, logits: NDArray[Any], top_k: int, threshold: float) -> list[Prediction]:
        scores = scores_from_logits(logits, self.config.score_activation)
        best = np.argsort(-logits, kind="stable")[:top_k]
        return [Prediction(int(i), self.config.id2label[int(i)], float(scores[i])) for i in best if not scores[i] <= threshold]


def _loaded_again(path: Path, description: Description) -> Model:
    from .model_from_bundle import model_from_bundle

    named = {name: getattr(description, name) for name in ("backend", "precision", "device", "threads", "batches")}
    model = model_from_bundle(path, LoadSpec(**named))
    model._description = replace(description, version=model._description.version)
    return model


def _several(images: Any, together: int) -> Iterable[Any]:
    """`images`, or one in a list. Frames that are collected are copied: a camera may reuse the memory."""
    if isinstance(images, str | os.PathLike | np.ndarray) or not isinstance(images, Iterable):
        return [images]
    if isinstance(images, bytes | bytearray) or hasattr(images, "read") or hasattr(images, "__dlpack__"):
        return [images]  # not its bytes, lines or rows
    if together == 1 or isinstance(images, Sequence):
        return images
    return (image.copy() if isinstance(image, np.ndarray) else image for image in images)
