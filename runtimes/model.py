"""Model: a loaded bundle, from images to answers. Needs numpy, Pillow and one back end; neither torch nor onnx."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from swin_deploy.bundle import CONFIG, PREPROCESSOR, Bundle
from swin_deploy.config import SwinConfig
from swin_deploy.errors import BackendError, InputError, UsageError
from swin_deploy.frames import Frames, preparation_for
from swin_deploy.preprocess import Preprocessor
from swin_deploy.specs import PRECISIONS, QUANTIZED, Size, TensorSpec, size_text
from swin_deploy.tasks import PIXELS, TaskSpec

from .backends import runtime_from_onnx
from .base import Runtime

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
    loaded at once, the others when they are needed.
    """

    def __init__(self, bundle: Bundle, files: Mapping[Size, str], precision: str, open_graph: Callable[[str], Runtime]) -> None:
        self.bundle, self.precision = bundle, precision
        self.config = SwinConfig.from_dict(bundle.read_json(CONFIG))
        self.task = TaskSpec.from_dict(bundle.manifest["task"])
        self.preprocessor = Preprocessor.from_dict(bundle.read_json(PREPROCESSOR))
        self.preparation = preparation_for(self.preprocessor, bundle.files[next(iter(files.values()))])
        self.image_sizes: tuple[Size, ...] = tuple(files)
        self._files, self._open = dict(files), open_graph
        self._runtimes: dict[Size, Runtime] = {}
        self._closed = False
        self._runtime(self.image_sizes[0])

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

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> Arrays:
        """Arrays in, arrays out: {"pixel_values": float32 [batch, 3, height, width]} -> {"logits": float32 [batch, labels]}.

        A graph with embedded preprocessing takes uint8 frames [batch, height, width, 3] in RGB. The task decides what else
        goes in and what comes out (`inputs`, `outputs`). Raises InputError when a feed does not fit, naming the image sizes
        that do.
        """
        return self._runtime(self._size_of(feeds.get(PIXELS))).run(feeds)

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

    def features(self, images: ImageLike | Iterable[ImageLike], batch_size: int = 8) -> Arrays:
        """Every output of a backbone or feature extractor for `images`, by name, the images along the first axis."""
        if self.task.name not in ("feature-extraction", "backbone"):
            self._must_be("feature-extraction", "features")
        batches = list(self._batches(images, batch_size))
        if not batches:
            raise InputError("There are no images. Give at least one.")
        return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}

    def close(self) -> None:
        """Frees the back end's memory; the model cannot be run afterwards."""
        self._closed = True
        for runtime in self._runtimes.values():
            runtime.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _runtime(self, size: Size) -> Runtime:
        if self._closed:
            raise BackendError("This model is closed. Load it again to run it.")
        if size not in self._runtimes:
            self._runtimes[size] = self._open(self._files[size])
        return self._runtimes[size]

    def _size_of(self, pixels: object) -> Size:
        """The image size whose graph takes `pixels`; the first one's own check says what else is wrong with them."""
        if isinstance(pixels, np.ndarray) and pixels.ndim == 4 and len(self.image_sizes) > 1:
            first = 1 if isinstance(self.preparation, Frames) else 2  # frames have their channels last
            size = (pixels.shape[first], pixels.shape[first + 1])
            if size not in self._files:
                raise InputError(
                    f'The input "{PIXELS}" has images of {size_text(size)} pixels, and this bundle has graphs for '
                    f"{', '.join(map(size_text, self.image_sizes))}. Resize them, or export for that size as well."
                )
            return size
        return self.image_sizes[0]

    def _batches(self, images: ImageLike | Iterable[ImageLike], batch_size: int) -> Iterator[Arrays]:
        if batch_size < 1:
            raise UsageError(f"batch_size is {batch_size}, and must be at least 1.")
        single = isinstance(images, str | os.PathLike | np.ndarray) or not isinstance(images, Iterable)
        stream = iter([images] if single else images)  # type: ignore[arg-type]
        while batch := list(islice(stream, batch_size)):
            feeds: Arrays = {PIXELS: self.preparation(batch)}  # type: ignore[arg-type]
            for spec in self.inputs[1:]:  # a mask that hides nothing
                feeds[spec.name] = np.zeros((len(batch), *(int(n) for n in spec.shape[1:])), dtype=spec.dtype)
            yield self.run(feeds)

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


def load_model(path: str | os.PathLike[str], precision: str = "fp32", backend: str = "onnxruntime", threads: int = 0) -> Model:
    """The bundle at `path`, loaded: its graphs of `precision`, run by `backend` ("onnxruntime" or "openvino") on the CPU.

    OpenVINO computes the fp32 graph in bf16 itself, where the processor does. Every file is checked against its sha256
    before it is read. `threads` 0 lets the back end choose. Raises BundleError
    for a folder that is no intact bundle, UsageError for a precision that it does not hold.
    """
    bundle = Bundle.open(path)
    if precision not in PRECISIONS:
        raise UsageError(f'There is no precision "{precision}". There are: {", ".join(PRECISIONS)}.')
    if not 0 <= threads <= MOST_THREADS:
        raise UsageError(f"threads is {threads}, and must be from 0 (the back end chooses) to {MOST_THREADS}.")
    in_bf16 = precision == "bf16" and backend == "openvino"
    files = {
        (int(entry["image_size"][0]), int(entry["image_size"][1])): file
        for file, entry in bundle.graphs.items()
        if entry["precision"] == ("fp32" if in_bf16 else precision)
    }
    if not files:
        held = dict.fromkeys(str(entry["precision"]) for entry in bundle.graphs.values())
        verb, data = ("quantize", " --data DIR") if precision in QUANTIZED else ("build-engine", "")
        raise UsageError(
            f"The bundle {bundle.path} holds no {precision} graph; it holds {', '.join(held)}. "
            f'Make it with "swin-deploy {verb} {bundle.path} --{precision}{data}".'
        )
    return Model(
        bundle, files, precision, lambda file: runtime_from_onnx(bundle.verified_path(file), backend, threads, in_bf16)
    )
