"""Model: a loaded bundle, from images to labels. Needs numpy, Pillow and one back end; neither torch nor onnx."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from swin_deploy.bundle import CONFIG, PREPROCESSOR, Bundle
from swin_deploy.config import SwinConfig
from swin_deploy.errors import UsageError
from swin_deploy.preprocess import Preprocessor
from swin_deploy.specs import PRECISIONS, TensorSpec, graph_file

from .backends import runtime_from_onnx
from .base import Runtime

if TYPE_CHECKING:
    from typing_extensions import Self

    from swin_deploy.preprocess import ImageLike


MOST_THREADS = 1024  # back ends start as many as they are told, until memory is gone


@dataclass(frozen=True)
class Prediction:
    """One class of one image: its number, its name, and its softmax probability."""

    index: int
    label: str
    score: float


class Model:
    """A bundle that is loaded and ready to run; use it as a context manager, or call `close`."""

    def __init__(self, bundle: Bundle, runtime: Runtime, precision: str) -> None:
        self.bundle, self.runtime, self.precision = bundle, runtime, precision
        self.config = SwinConfig.from_dict(bundle.read_json(CONFIG))
        self.preprocessor = Preprocessor.from_dict(bundle.read_json(PREPROCESSOR))

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return self.runtime.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return self.runtime.outputs

    @property
    def labels(self) -> Sequence[str]:
        """The name of every class, by its number."""
        return tuple(self.config.id2label.values())

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Arrays in, arrays out: {"pixel_values": float32 [batch, 3, height, width]} -> {"logits": float32 [batch, labels]}.

        Raises InputError when a feed does not fit `inputs`.
        """
        return self.runtime.run(feeds)

    def classify(self, images: ImageLike | Iterable[ImageLike], top_k: int = 5, batch_size: int = 8) -> list[list[Prediction]]:
        """The `top_k` best classes of every image, best first.

        `images` is one image or many: paths, PIL images, or uint8 arrays [height, width, 3] in RGB. They are prepared as the
        checkpoint's image processor does it, and run `batch_size` at a time, so that memory does not grow with their number.
        """
        if self.config.num_labels == 0:
            raise UsageError("This model has no classes: its checkpoint was saved with num_labels 0. Use run() instead.")
        if top_k < 1 or batch_size < 1:
            raise UsageError(f"top_k is {top_k} and batch_size is {batch_size}; both must be at least 1.")
        single = isinstance(images, str | os.PathLike | np.ndarray) or not isinstance(images, Iterable)
        stream = iter([images] if single else images)  # type: ignore[arg-type]
        found: list[list[Prediction]] = []
        while batch := list(islice(stream, batch_size)):
            pixels = self.preprocessor(batch)  # type: ignore[arg-type]
            for logits in self.run({self.inputs[0].name: pixels})[self.outputs[0].name]:
                found.append(self._best(logits.astype(np.float64), top_k))
        return found

    def close(self) -> None:
        """Frees the back end's memory; the model cannot be run afterwards."""
        self.runtime.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _best(self, logits: NDArray[np.float64], top_k: int) -> list[Prediction]:
        odds = np.exp(logits - logits.max())
        scores = odds / odds.sum()
        best = np.argsort(-logits, kind="stable")[:top_k]
        return [Prediction(int(i), self.config.id2label[int(i)], float(scores[i])) for i in best]


def load_model(path: str | os.PathLike[str], precision: str = "fp32", backend: str = "onnxruntime", threads: int = 0) -> Model:
    """The bundle at `path`, loaded: its graph of `precision`, run by `backend` ("onnxruntime" or "openvino") on the CPU.

    Every file is checked against its sha256 before it is read. `threads` 0 lets the back end choose. Raises BundleError
    for a folder that is no intact bundle, UsageError for a precision that it does not hold.
    """
    bundle = Bundle.open(path)
    if precision not in PRECISIONS:
        raise UsageError(f'There is no precision "{precision}". There are: {", ".join(PRECISIONS)}.')
    if not 0 <= threads <= MOST_THREADS:
        raise UsageError(f"threads is {threads}, and must be from 0 (the back end chooses) to {MOST_THREADS}.")
    file = graph_file(precision)
    if file not in bundle.files:
        held = [p for p in PRECISIONS if graph_file(p) in bundle.files]
        raise UsageError(
            f"The bundle {bundle.path} holds no {precision} graph; it holds {', '.join(held)}. "
            f'Make it with "swin-deploy build-engine {bundle.path} --{precision}".'
        )
    runtime = runtime_from_onnx(bundle.verified_path(file), backend, threads)
    try:
        return Model(bundle, runtime, precision)
    except BaseException:
        runtime.close()
        raise
