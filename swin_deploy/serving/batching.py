"""The models of a service, the threads that run them, and the queue of requests before them."""

from __future__ import annotations

import io
import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, fields
from queue import Empty, Full, Queue
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

import swin_deploy
from swin_deploy.errors import BackendError, InputError, SwinDeployError
from swin_deploy.machine import usable_cores
from swin_deploy.option_parsers import BundlePath
from swin_deploy.options import Array, LoadSpec, ServeSpec
from swin_deploy.preprocess import TIFF_SIGNATURES

if TYPE_CHECKING:
    from swin_deploy.runtimes.model import Model

LOG = logging.getLogger(__name__)
FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")  # Pillow decodes some others by programs
MOST_WORKERS, GPU_WORKERS, BATCH = 8, 4, 8
WORTHWHILE = 0.95  # time per image in a batch over the time alone
RUNS = 3  # of each batch size that is measured


class RefusedError(SwinDeployError):
    """A request that is refused, with its status code of HTTP."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


class Work(Protocol):
    """What a request asks for. Requests whose works are equal are run together."""

    def __call__(self, model: Model, requests: list[Any]) -> Sequence[Any]:
        """Return a result, or the error in its place, for each request."""
        ...


@dataclass(frozen=True)
class Classification:
    """Classify image files, as the pipeline of transformers returns it."""

    top_k: int

    def __call__(self, model: Model, requests: list[Any]) -> Sequence[Any]:
        found = model.classify(requests, top_k=self.top_k, batch_size=len(requests), on_error="continue")
        return [
            best if isinstance(best, InputError) else [{"label": one.label, "score": one.score} for one in best]
            for best in found
        ]


@dataclass(frozen=True)
class Features:
    """Return every output for image files, by name, without the batch axis."""

    def __call__(self, model: Model, requests: list[Any]) -> Sequence[Any]:
        return [{name: array[0] for name, array in model.features(image).items()} for image in requests]


@dataclass(frozen=True)
class Tensors:
    """Run prepared arrays."""

    def __call__(self, model: Model, requests: list[Mapping[str, Array]]) -> Sequence[Any]:
        return [model.run(feeds) for feeds in requests]


@dataclass(frozen=True)
class _Request:
    work: Work
    content: Any
    answer: Future[Any]


class Workers:
    """Threads that take requests from a queue and run them, each with a model of its own where models cannot be shared.

    A thread takes its share of the waiting requests, up to `batch`, and runs those of the same kind together: nobody waits for
    a batch to fill. Requests that were accepted are answered before `close` returns.
    """

    def __init__(self, bundle: BundlePath, spec: ServeSpec) -> None:
        """Load the models. Raises what `swin_deploy.load` raises."""
        self.spec, cores = spec, usable_cores()
        count = spec.workers or min(cores, MOST_WORKERS)
        options = {one.name: getattr(spec, one.name) for one in fields(LoadSpec) if hasattr(spec, one.name)}
        options["threads"] = threads = spec.threads or (0 if spec.backend == "torch" else max(1, cores // count))
        self.model = swin_deploy.load(bundle, **options)
        about = self.model.describe()
        named: dict[str, Any] = {
            "backend": about.backend,
            "precision": about.precision,
            "device": about.device,
            "trust": spec.trust,
        }
        if about.device != "cpu" and spec.workers is None:
            count = GPU_WORKERS
        # OpenVINO runs one call at a time, and threads of ONNX Runtime that calls share are slower than separate ones.
        alone = about.device == "cpu" and (about.backend == "openvino" or (about.backend == "onnxruntime" and threads > 1))
        self._models = [self.model]
        self._models += [swin_deploy.load(bundle, threads=threads, **named) for _ in range(count - 1) if alone]
        self.batch = self._best_batch() if spec.batch is None else spec.batch
        for model in self._models:
            model.warm_up()
            if self.batch > 1:
                model.warm_up(self.batch)
        self.observe: Callable[[int], Any] = lambda size: None  # called with the size of each batch
        self._queue: Queue[_Request | None] = Queue(spec.queue)
        self._closed = False
        self._threads = [
            threading.Thread(target=self._run, args=(self._models[i % len(self._models)],), daemon=True, name=f"worker {i}")
            for i in range(count)
        ]
        for thread in self._threads:
            thread.start()
        LOG.info(
            "Loaded %s: %s %s, %s, on %s; %d workers with %s threads, up to %d images together",
            *(bundle, about.backend, about.version, about.precision, about.device, count, threads or "all", self.batch),
        )

    def submit(self, work: Work, content: Any) -> Future[Any]:
        """Queue a request and return its future answer. Raises RefusedError if too many are waiting."""
        request = _Request(work, content, Future())
        if self._closed:
            raise RefusedError(503, "This service is ending. Send the request to another one.")
        try:
            self._queue.put_nowait(request)
        except Full:
            raise RefusedError(
                503, f"{self.spec.queue} requests are waiting already. Send the request again later, or start more services."
            ) from None
        return request.answer

    @property
    def waiting(self) -> int:
        """Number of requests in the queue."""
        return self._queue.qsize()

    def close(self) -> None:
        """Answer the requests that were accepted, then free the models."""
        self._closed = True
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join()
        for model in self._models:
            model.close()

    def _run(self, model: Model) -> None:
        while (first := self._queue.get()) is not None:
            taken = [first]
            share = math.ceil((1 + self._queue.qsize()) / len(self._threads))
            while len(taken) < min(share, self.batch):
                try:
                    following = self._queue.get_nowait()
                except Empty:
                    break
                if following is None:  # the end, which another thread may see first
                    self._queue.put(None)
                    break
                taken.append(following)
            groups: dict[Work, list[_Request]] = {}
            for request in taken:
                if request.answer.set_running_or_notify_cancel():
                    groups.setdefault(request.work, []).append(request)
            for work, requests in groups.items():
                _answer(work, model, requests)
                self.observe(len(requests))

    def _best_batch(self) -> int:
        """Return BATCH if the first model runs so many images in less time per image than one, else 1."""
        if self.model.preprocessor.varies:
            return 1
        taken = {}
        for size in (1, BATCH):
            feeds = {spec.name: np.zeros((size, *(int(n) for n in spec.shape[1:])), spec.dtype) for spec in self.model.inputs}
            self.model.run(feeds)
            times = []
            for _ in range(RUNS):
                start = time.perf_counter()
                self.model.run(feeds)
                times.append(time.perf_counter() - start)
            taken[size] = min(times) / size
        return BATCH if taken[BATCH] < WORTHWHILE * taken[1] else 1


def _answer(work: Work, model: Model, requests: list[_Request]) -> None:
    try:
        found = work(model, [request.content for request in requests])
    except Exception as error:  # noqa: BLE001 - raised again where the answers are awaited
        found = [error] * len(requests)
    for request, one in zip(requests, found, strict=True):
        if isinstance(one, Exception):
            request.answer.set_exception(one)
        else:
            request.answer.set_result(one)


def refuse_image(content: bytes, most: int) -> None:
    """Raise RefusedError for a file that is not an image, or has more than `most` pixels. Nothing is decoded."""
    from PIL import Image, UnidentifiedImageError

    if not content:
        raise RefusedError(422, "The body is empty. Send the bytes of an image file.")
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            width, height = image.size
    except UnidentifiedImageError:
        if content[:4] in TIFF_SIGNATURES:  # with several bands, which our own reader knows
            return
        raise RefusedError(415, "The body is not a valid image. Send a file such as JPEG or PNG.") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        width = height = most
    except Exception as error:  # noqa: BLE001 - of a damaged file, which the reader explains
        LOG.debug("The header of an image is damaged: %s", error)
        return
    if width * height > most:
        raise RefusedError(413, f"The image has {width}x{height} pixels or more, and the limit is {most}. Make it smaller.")


def failure_of(error: BaseException) -> RefusedError:
    """Return the error with its status: 422 for what the client can correct, 500 for anything else."""
    if isinstance(error, RefusedError):
        return error
    if isinstance(error, SwinDeployError) and not isinstance(error, BackendError):
        return RefusedError(422, str(error))
    LOG.error("A request failed", exc_info=error)
    return RefusedError(500, str(error) if isinstance(error, SwinDeployError) else "The service failed. See its log.")
