"""Model: a loaded bundle, from images to answers. Needs numpy, Pillow and one back end; neither torch nor onnx."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import IOBase
from itertools import islice
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from swin_deploy.arguments import checked
from swin_deploy.bundle import CONFIG, PREPROCESSOR, Bundle
from swin_deploy.config import SwinConfig
from swin_deploy.errors import BackendError, InputError, UsageError
from swin_deploy.frame_input import Frames, preparation_for
from swin_deploy.preprocess import Preprocessor
from swin_deploy.specs import Size, TensorSpec, size_text
from swin_deploy.tasks import MASK, PIXELS, TaskSpec

from .autoselect import Description
from .base import Runtime
from .pipeline import pipelined

if TYPE_CHECKING:
    from typing_extensions import Self

    from swin_deploy.preprocess import ImageLike

Arrays = dict[str, NDArray[Any]]


MOST_THREADS = 1024  # back ends start as many as they are told, until memory is gone


@dataclass(frozen=True)
class Prediction:
    """One class of one image: its number, its name, and its softmax probability."""

    index: int
    label: str
    score: float


class Model:
    """A bundle that is loaded and ready to run; use it as a context manager, or call `close`.

    It holds one graph for each image size that it was exported for, and takes the one that fits the input. The first is
    loaded at once, the others when they are needed. Any number of threads may use it at a time; each gets the answers, to the
    bit, that it would get alone. A call that fails leaves it as it was.
    """

    def __init__(
        self,
        bundle: Bundle,
        files: Mapping[Size, str],
        precision: str,
        open_graph: Callable[[str], Runtime],
        described: Callable[[str], Description],
    ) -> None:
        self.bundle, self.precision = bundle, precision
        self.config = SwinConfig.from_dict(bundle.read_json(CONFIG))
        self.task = TaskSpec.from_dict(bundle.manifest["task"])
        self.preprocessor = Preprocessor.from_dict(bundle.read_json(PREPROCESSOR))
        first = bundle.files[next(iter(files.values()))]
        self.preparation = preparation_for(self.preprocessor, bundle.files[first["graph"]] if "graph" in first else first)
        self.image_sizes: tuple[Size, ...] = tuple(files)
        self._files, self._open = dict(files), open_graph
        self._runtimes: dict[Size, Runtime] = {}
        self._closed, self._opening = False, threading.Lock()
        self._description = described(self._runtime(self.image_sizes[0]).title)

    def describe(self) -> Description:
        """What runs this model, and why: back end, device, precision and files, and what was measured where that was to
        choose. `str()` of it is a text to read."""
        return self._description

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What the graph of the first image size takes."""
        return self._runtime(self.image_sizes[0]).inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """What the graph of the first image size gives."""
        return self._runtime(self.image_sizes[0]).outputs

    @property
    def labels(self) -> Sequence[str]:
        """The name of every class, by its number."""
        return tuple(self.config.id2label.values())

    def run(self, feeds: Mapping[str, Any], out: Mapping[str, NDArray[Any]] | None = None) -> Mapping[str, NDArray[Any]]:
        """Arrays in, arrays out: {"pixel_values": float32 [batch, 3, height, width]} -> {"logits": float32 [batch, labels]}.

        A graph with embedded preprocessing takes uint8 frames [batch, height, width, 3] in RGB. The task decides what else
        goes in and what comes out (`inputs`, `outputs`). Feeds are numpy arrays, or tensors with `__dlpack__` (torch, CuPy),
        which are not copied. `out` holds an array for each output, as an earlier call returned them; they are filled and
        returned instead of new ones. Raises InputError when an array does not fit, naming the image sizes that do, and
        BackendError when the back end fails or the model is closed.
        """
        pixels = feeds.get(PIXELS) if isinstance(feeds, Mapping) else None
        return self._runtime(self._size_of(pixels)).run(feeds, out)

    @checked
    def warm_up(self, batch: int = 1) -> None:
        """Loads the graphs of all image sizes, and runs each on `batch` black images, once or as often as it takes, so that
        the first call is as quick as the next ones."""
        if batch < 1:
            raise UsageError(f"batch is {batch}, and must be at least 1.")
        for size in self.image_sizes:
            runtime = self._runtime(size)
            shapes = {spec.name: (batch, *(int(n) for n in spec.shape[1:])) for spec in runtime.inputs}
            for _ in range(runtime.calls_to_warm):
                runtime.run({spec.name: np.zeros(shapes[spec.name], spec.dtype) for spec in runtime.inputs})

    @checked
    def classify(self, images: ImageLike | Iterable[ImageLike], top_k: int = 5, batch_size: int = 8) -> list[list[Prediction]]:
        """The `top_k` best classes of every image, best first.

        `images` is one image or many: paths, PIL images, or uint8 arrays [height, width, 3] in RGB. They are prepared as the
        checkpoint's image processor does it, and run `batch_size` at a time, so that memory does not grow with their number.
        """
        self._must_be("image-classification", "classify")
        if self.config.num_labels == 0:
            raise UsageError("This model has no classes: its checkpoint was saved with num_labels 0. Use run() instead.")
        if top_k < 1:
            raise UsageError(f"top_k is {top_k}, and must be at least 1.")
        return [
            self._best(logits.astype(np.float64), top_k)
            for outputs in self._batches(images, batch_size)
            for logits in outputs["logits"]
        ]

    @checked
    def features(self, images: ImageLike | Iterable[ImageLike], batch_size: int = 8) -> Arrays:
        """Every output of a backbone or feature extractor for `images`, by name, the images along the first axis."""
        if self.task.name not in ("feature-extraction", "backbone"):
            self._must_be("feature-extraction", "features")
        batches = list(self._batches(images, batch_size))
        if not batches:
            raise InputError("There are no images. Give at least one.")
        return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}

    @checked
    def reconstruct(
        self, images: ImageLike | Iterable[ImageLike], mask: NDArray[np.bool_] | None = None, batch_size: int = 8
    ) -> NDArray[np.float32]:
        """What masked image modelling makes of `images`: float32 [images, channels, height, width], normalised as its input is.

        `mask` is bool [images, patches] or, for all images alike, [patches]; where it is True the network does not see the
        patch. None hides nothing. Raises InputError for a mask of another shape.
        """
        self._must_be("masked-image-modeling", "reconstruct")
        patches = next(spec.shape[1] for spec in self.inputs if spec.name == MASK)
        if mask is not None and (not isinstance(mask, np.ndarray) or mask.dtype != np.bool_ or mask.shape[-1:] != (patches,)):
            given = f"{mask.dtype} {list(mask.shape)}" if isinstance(mask, np.ndarray) else f"a {type(mask).__name__}"
            raise InputError(f"The mask is {given}; expected an array bool [images, {patches}], or [{patches}] for all images.")
        found: list[NDArray[np.float32]] = []
        for outputs in self._batches(images, batch_size, mask):
            found.append(outputs["reconstruction"])
        if not found:
            raise InputError("There are no images. Give at least one.")
        made = np.concatenate(found)
        if mask is not None and mask.ndim == 2 and len(mask) != len(made):
            raise InputError(f"The mask is for {len(mask)} images, and there are {len(made)}. Give one row for each.")
        return made

    @checked
    def stream(self, frames: Iterable[ImageLike], batch: int = 1, prefetch: int = 2, top_k: int = 5) -> Iterator[Any]:
        """The answer to each frame, in order: of a classifier its `top_k` best classes, else every output of `run` by name.

        Frames (paths, PIL images, uint8 arrays [height, width, 3]) are taken and prepared in one thread, `batch` at a time,
        and run in another, on a GPU in two, so that it computes while inputs and outputs go over the bus; the caller uses the
        answers meanwhile. At most twice `prefetch` batches wait, in front of the network and behind it together: a caller who
        is slow holds up the frames, and memory does not grow. An error is raised where the answer to its frame would be.
        Closing the iterator, or leaving its `for`, ends the threads.
        """
        for name, value in (("batch", batch), ("prefetch", prefetch), ("top_k", top_k)):
            if value < 1:
                raise UsageError(f"{name} is {value}, and must be at least 1.")
        classes = self.task.name == "image-classification" and self.config.num_labels > 0

        def run(feeds: Arrays, count: int) -> list[Any]:
            outputs = self.run(feeds)
            if classes:
                return [self._best(logits.astype(np.float64), top_k) for logits in outputs["logits"]]
            return [
                {name: array[i * (n := len(array) // count) : (i + 1) * n] for name, array in outputs.items()}
                for i in range(count)
            ]

        calls = self._runtime(self.image_sizes[0]).calls_at_once
        return pipelined(_several(frames, batch), batch, prefetch, self._feeds, run, calls)

    def close(self) -> None:
        """Frees the back end's memory, once the calls that are running have ended; the model cannot be run afterwards."""
        with self._opening:
            self._closed = True
        for runtime in self._runtimes.values():
            runtime.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _runtime(self, size: Size) -> Runtime:
        runtime = self._runtimes.get(size)
        if runtime is None or self._closed:
            with self._opening:
                if self._closed:
                    raise BackendError("This model is closed. Load it again to run it.")
                runtime = self._runtimes.get(size) or self._open(self._files[size])
                self._runtimes[size] = runtime
        return runtime

    def _size_of(self, pixels: object) -> Size:
        """The image size whose graph takes `pixels`; the first one's own check says what else is wrong with them."""
        shape = tuple(getattr(pixels, "shape", ()))
        if len(shape) == 4 and len(self.image_sizes) > 1:
            first = 1 if isinstance(self.preparation, Frames) else 2  # frames have their channels last
            size = (int(shape[first]), int(shape[first + 1]))
            if size not in self._files:
                raise InputError(
                    f'The input "{PIXELS}" has images of {size_text(size)} pixels, and this bundle has graphs for '
                    f"{', '.join(map(size_text, self.image_sizes))}. Resize them, or export for that size as well."
                )
            return size
        return self.image_sizes[0]

    def _batches(
        self, images: ImageLike | Iterable[ImageLike], batch_size: int, mask: NDArray[np.bool_] | None = None
    ) -> Iterator[Mapping[str, NDArray[Any]]]:
        if batch_size < 1:
            raise UsageError(f"batch_size is {batch_size}, and must be at least 1.")
        stream = iter(_several(images, batch_size))
        done = 0
        while batch := list(islice(stream, batch_size)):
            feeds = self._feeds(batch)
            if mask is not None:
                rows = mask if mask.ndim == 1 else mask[done : done + len(batch)]
                if mask.ndim > 2 or (mask.ndim == 2 and len(rows) < len(batch)):
                    raise InputError(f"The mask has shape {list(mask.shape)}; expected a row for each image.")
                feeds[MASK][:] = rows
            done += len(batch)
            yield self.run(feeds)

    def _feeds(self, images: list[Any]) -> Arrays:
        feeds: Arrays = {PIXELS: self.preparation(images)}
        for spec in self.inputs[1:]:  # a mask that hides nothing
            feeds[spec.name] = np.zeros((len(images), *(int(n) for n in spec.shape[1:])), dtype=spec.dtype)
        return feeds

    def _must_be(self, task: str, method: str) -> None:
        if self.task.name != task:
            raise UsageError(
                f"This bundle was exported for the task {self.task.name}, and {method}() needs {task}. Use run(), or export it "
                f"with --task {task}."
            )

    def _best(self, logits: NDArray[np.float64], top_k: int) -> list[Prediction]:
        odds = np.exp(logits - logits.max())
        scores = odds / odds.sum()
        best = np.argsort(-logits, kind="stable")[:top_k]
        return [Prediction(int(i), self.config.id2label[int(i)], float(scores[i])) for i in best]


def _several(images: Any, together: int) -> Iterable[Any]:
    """`images`, or one image in a list. Where several are taken before they are prepared together, those that a camera makes on
    the way are copied: it may use the same memory for the next one."""
    if isinstance(images, str | os.PathLike | np.ndarray) or not isinstance(images, Iterable):
        return [images]
    if isinstance(images, bytes | bytearray | IOBase) or hasattr(images, "__dlpack__"):
        return [images]  # none is an image, and the error should name it, and not its first byte, line or row
    if together == 1 or isinstance(images, Sequence):
        return images
    return (image.copy() if isinstance(image, np.ndarray) else image for image in images)
