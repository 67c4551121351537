"""Run batches of images through a bundle, in whichever process they are."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from swin_deploy.errors import InputError

from .image_sources import Image, Unreadable

if TYPE_CHECKING:
    from swin_deploy.options import Array
    from swin_deploy.runtimes.model import Model

LOGITS, POOLED = "logits", "pooler_output"


@dataclass(frozen=True)
class Job:
    """What every process does: a bundle, keywords of `load`, and what is returned for an image.

    `width` is the number of classes or features that are returned; classes must have a score above `threshold`.
    """

    bundle: str
    load: Mapping[str, Any]
    features: bool
    width: int
    threshold: float


class Answers(NamedTuple):
    """The results of some images: class indices and scores, best first, or features; and errors by the number of the image.

    The rows of images with an error are zeros. `above` is False for classes that are left out; None if none is.
    """

    values: Array  # int32 [images, classes], or float32 [images, features]
    scores: Array | None
    above: Array | None
    errors: dict[int, str]
    seconds: float


def no_mark(image: int) -> None:
    """Record nothing."""


class ImageRunner:
    """Loads the bundle when it is first needed."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self._model: Model | None = None

    @property
    def model(self) -> Model:
        """The loaded bundle. Only this thread computes: there is a process for each core."""
        if self._model is None:
            from swin_deploy.options import LoadSpec
            from swin_deploy.runtimes.model_from_bundle import model_from_bundle

            self._model = model_from_bundle(self.job.bundle, LoadSpec(**self.job.load, threads=1))
        return self._model

    def run(
        self,
        batches: Sequence[Sequence[Image]],
        refused: Mapping[int, str],
        mark: Callable[[int], None] = no_mark,
        one_by_one: bool = False,
    ) -> Answers:
        """Return the results of batches, whose images are numbered together. Damaged ones only have an error.

        `refused` has errors of images that are not read. `mark` is called with -(n + 1) before the batch that begins with
        image n is read and run and, if images are read `one_by_one`, with n + 1 before image n is read.
        """
        import numpy as np

        started, first, errors = time.perf_counter(), 0, dict(refused)
        count = sum(map(len, batches))
        values = np.zeros((count, self.job.width), np.float32 if self.job.features else np.int32)
        scores = None if self.job.features else np.zeros(values.shape, np.float64)
        for batch in batches:
            rows = [number for number in range(first, first + len(batch)) if number not in errors]
            images: list[Any] = [batch[number - first] for number in rows]
            mark(-first - 1)
            try:
                if one_by_one or any(isinstance(image, Unreadable) for image in images):
                    raise InputError("read one by one")
                pixels = [self.model.preparation(images)] if images else []
            except InputError:
                rows, pixels = self._read(rows, images, errors, mark)
                mark(-first - 1)
            for some, output in self._outputs(rows, pixels, errors):
                if scores is None:
                    values[some] = output
                else:
                    values[some], scores[some] = self._best(output)
            first += len(batch)
        above = None if scores is None or self.job.threshold == -np.inf else ~(scores <= self.job.threshold)
        return Answers(values, scores, above, errors, time.perf_counter() - started)

    def _read(
        self, rows: list[int], images: list[Any], errors: dict[int, str], mark: Callable[[int], None]
    ) -> tuple[list[int], list[Array]]:
        """Read images one by one. Return the numbers of those that could be read, and their pixels."""
        readable: list[int] = []
        pixels: list[Array] = []
        for number, image in zip(rows, images, strict=True):
            mark(number + 1)
            try:
                if isinstance(image, Unreadable):
                    raise InputError(str(image))
                pixels.append(self.model.preparation([image]))
                readable.append(number)
            except InputError as error:
                errors[number] = str(error)
        return readable, pixels

    def _outputs(self, rows: list[int], pixels: list[Array], errors: dict[int, str]) -> list[tuple[list[int], Array]]:
        """Run prepared images together or, if they do not fit together, one by one."""
        import numpy as np

        if not rows:
            return []
        if len({one.shape[1:] for one in pixels}) == 1:
            together = pixels[0] if len(pixels) == 1 else np.concatenate(pixels)
            try:
                return [(rows, self.model.run(self.model.feeds(together))[POOLED if self.job.features else LOGITS])]
            except InputError as error:
                if len(rows) == 1:
                    errors[rows[0]] = str(error)
                    return []
                pixels = [together[place : place + 1] for place in range(len(rows))]
        return [found for row, one in zip(rows, pixels, strict=True) for found in self._outputs([row], [one], errors)]

    def _best(self, logits: Array) -> tuple[Array, Array]:
        """Return the indices and scores of the best classes, as `Model.classify` does for one image."""
        import numpy as np

        from swin_deploy.tasks import scores_from_logits

        scores = scores_from_logits(logits, self.model.config.score_activation)
        best = np.argsort(-logits, axis=-1, kind="stable")[:, : self.job.width]
        return best, np.take_along_axis(scores, best, axis=-1)


def parent_watched() -> None:
    """End this process when the one that started it is gone; a pool of the standard library would wait for ever."""
    import multiprocessing
    import threading

    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True, name="swin-deploy parent").start()
