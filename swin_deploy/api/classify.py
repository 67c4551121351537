"""Classify a whole data set into a file."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swin_deploy.errors import UsageError
from swin_deploy.option_parsers import BundlePath, bundle_keywords
from swin_deploy.options import ClassifySpec

if TYPE_CHECKING:
    from swin_deploy.bundle import Bundle
    from swin_deploy.datasets.image_runner import Answers, Job
    from swin_deploy.datasets.image_sources import Source
    from swin_deploy.datasets.result_files import ResultFile
    from swin_deploy.datasets.unfinished import Unfinished
    from swin_deploy.datasets.worker_pool import Chunk

_LOG = logging.getLogger(__name__)
PART_SECONDS, PART_VALUES = 10.0, 1 << 24  # after so many seconds or numbers, what is done is written
FEW = 8  # batches for each core; for fewer no measurement is worth its time


@dataclass(frozen=True)
class DatasetResult:
    """What `classify_dataset` did. `resumed` images were classified before; `workers` is None if Ray chose."""

    output: Path
    images: int
    failed: int
    resumed: int
    workers: int | None
    seconds: float
    backend: str
    precision: str
    device: str


@bundle_keywords(ClassifySpec)
def classify_dataset(bundle: BundlePath, spec: ClassifySpec) -> DatasetResult:
    """Classify all images of a data set in several processes, and write a row for each, in the order of the source.

    An image that cannot be read is a row with the reason. If the call is interrupted or killed, the same call resumes, and each
    image is in the result exactly once. Results do not depend on the number of processes or on interruptions. In a script, put
    the call under `if __name__ == "__main__":`, since the processes import it.

    Args:
        bundle: Folder of the bundle.
        {options}

    Returns:
        The number of images, and what ran them.

    Raises:
        InputError: The source has no image, or a shard of it is damaged.
        UsageError: The bundle has no classes or features, the output exists, or it was started with other options.
        BackendError: The processes end before they read an image.

    Example:
        >>> swin_deploy.classify_dataset("swinv2-tiny", "photos", output="photos.parquet").failed
    """
    from swin_deploy.bundle import Bundle
    from swin_deploy.datasets import ray_data
    from swin_deploy.datasets.image_sources import source_from
    from swin_deploy.datasets.result_files import result_file
    from swin_deploy.datasets.unfinished import unfinished
    from swin_deploy.errors import InputError

    found, output = Bundle.open(bundle, spec.trust), Path(spec.output)
    width, threshold = _width(found, spec)
    of_ray = ray_data.is_dataset(spec.source)
    source = ray_data.dataset_source(spec.source) if of_ray else source_from(spec.source, spec.image_column, spec.key_column)
    labels = None if spec.features else tuple(found.config.id2label.values())
    results = result_file(output, source.column, labels, width)
    with unfinished(output, results.ending) as kept, _resumable(kept):
        if complete := kept.finished():
            _LOG.info("%s was complete when the command was killed", output)
        elif output.exists() and not spec.force:
            raise UsageError(f"{output} exists. Pass --force to replace it, or choose another output.")
        else:
            kept.begin(_facts(found, source, spec), spec.force, anew=of_ray)
        job, resumed, workers, started = _job(found, spec, kept, width, threshold), kept.last.end, None, time.perf_counter()
        if resumed:
            _LOG.info("Resuming after %d images", resumed)
        if not complete:
            batch = 1 if found.preprocessor.varies else spec.batch
            with contextlib.ExitStack() as stack:
                workers, pairs = _started(stack, job, source, spec, kept, batch)
                _write(pairs, results, kept, source, spec)
            if not kept.last.end:
                raise InputError(f"{source.title} contains no image. Expected files such as JPEG or PNG.")
            kept.finish(results.join)
        seconds, last, load = time.perf_counter() - started, kept.last, job.load
        kept.remove()
    return DatasetResult(
        output, last.end, last.failed, resumed, workers, seconds, load["backend"], load["precision"], load["device"]
    )


@contextlib.contextmanager
def _resumable(kept: Unfinished) -> Iterator[None]:
    """Report with an error or an interrupt what the same command resumes from."""
    try:
        yield
    except BaseException as error:
        if kept.parts and not isinstance(error, UsageError):
            resumes = f"the same command resumes after {kept.last.end} images"
            if isinstance(error, KeyboardInterrupt):
                raise KeyboardInterrupt(resumes) from None
            _LOG.info("%s", resumes.capitalize())
        raise


def _width(bundle: Bundle, spec: ClassifySpec) -> tuple[int, float]:
    """Return how many classes or features an image gets, and the score that a class must exceed."""
    from swin_deploy.datasets.image_runner import POOLED
    from swin_deploy.tasks import class_limits, refuse_without_classes

    task, needed = bundle.task.name, "feature-extraction" if spec.features else "image-classification"
    if task != needed:
        what = "--features" if spec.features else "classify"
        hint = ", or pass --features" if task == "feature-extraction" else ""
        raise UsageError(
            f"{bundle.path} was exported for the task {task}, and {what} needs {needed}. Export it with --task {needed}{hint}."
        )
    if spec.features:
        if not bundle.task.add_pooling_layer:
            raise UsageError(f"{bundle.path} has no output {POOLED}. Export it without --no-pooling-layer.")
        return bundle.config.hidden_size, 0.0
    refuse_without_classes(bundle.config)
    top_k, threshold = class_limits(bundle.config, spec.top_k, spec.threshold)
    return min(top_k, bundle.config.num_labels), float(threshold)


def _facts(bundle: Bundle, source: Source, spec: ClassifySpec) -> dict[str, Any]:
    """Return what the rows of the result depend on, by the name that an error has for it."""
    from swin_deploy.dependencies import installed_versions
    from swin_deploy.runtimes.autoselect import LIBRARIES

    return {
        "bundle": bundle.digest,
        "source": [source.title, source.count(source)],
        "back end, precision or device": [spec.backend, spec.precision, spec.device, bool(spec.num_gpus)],
        "top_k, threshold or choice of features": [spec.top_k, spec.threshold, spec.features],
        "batch size": spec.batch,
        "column": [spec.image_column, spec.key_column],
        "version of a library": installed_versions((*LIBRARIES, "Pillow")),
    }


def _job(bundle: Bundle, spec: ClassifySpec, kept: Unfinished, width: int, threshold: float) -> Job:
    """Return what every process does, with the back end that is fastest here, or that a killed command had chosen."""
    from swin_deploy.datasets.image_runner import Job
    from swin_deploy.options import LoadSpec
    from swin_deploy.runtimes.model_from_bundle import model_from_bundle

    load: dict[str, Any] = {"backend": spec.backend, "precision": spec.precision, "device": spec.device, "trust": spec.trust}
    if spec.num_gpus:
        load["device"] = "cuda"  # each actor chooses on its own machine
    elif "auto" in load.values():
        load |= kept.state.get("chosen") or {}
        if "auto" in load.values():
            with model_from_bundle(bundle.path, LoadSpec(**load, threads=1)) as model:
                about = model.describe()
            load |= {"backend": about.backend, "precision": about.precision, "device": about.device}
            kept.save(chosen={name: load[name] for name in ("backend", "precision", "device")})
    return Job(str(bundle.path.absolute()), load, spec.features, width, threshold)


def _started(
    stack: contextlib.ExitStack, job: Job, source: Source, spec: ClassifySpec, kept: Unfinished, batch: int
) -> tuple[int | None, Iterator[tuple[Chunk, Answers]]]:
    """Start processes or actors; return their number and their results in order."""
    from swin_deploy.datasets import ray_data
    from swin_deploy.datasets.worker_pool import Pace, WorkerPool, chunks_of, fastest_workers
    from swin_deploy.machine import usable_cores

    place, of_ray = (kept.last.shard, kept.last.skip), ray_data.is_dataset(spec.source)
    if spec.ray is not None or of_ray:
        stack.enter_context(ray_data.connected(spec.ray or "local", spec.workers))
        pool = ray_data.RayPool(job, spec.workers, spec.num_gpus or 0)
        if of_ray:
            return spec.workers, pool.map_dataset(spec.source, spec.image_column, spec.key_column, batch)
        return spec.workers, pool.map(source, batch, *place)
    workers = spec.workers
    left = -(-(source.total - kept.last.end) // batch) if source.total else None
    if workers is None:
        workers = usable_cores() if job.load["device"] == "cpu" else 1
        first = next(chunks_of(source, batch, *place, Pace()), None)
        if first is not None and (left is None or left > FEW * workers):
            workers = fastest_workers(job, first.batches[0], [kept.state["facts"]["bundle"], {**job.load}])
    workers = max(1, workers if left is None else min(workers, left))
    _LOG.info("Classifying with %s %s on %s in %d processes", *list(job.load.values())[:3], workers)
    pace = Pace(left=left, workers=workers)
    chunks = chunks_of(source, batch, *place, pace)
    return workers, _paced(stack.enter_context(WorkerPool(job, workers)).map(chunks), pace)


def _paced(pairs: Iterator[tuple[Chunk, Answers]], pace: Any) -> Iterator[tuple[Chunk, Answers]]:
    for chunk, answers in pairs:
        pace.measured(chunk, answers.seconds)
        yield chunk, answers


def _write(
    pairs: Iterator[tuple[Chunk, Answers]], results: ResultFile, kept: Unfinished, source: Source, spec: ClassifySpec
) -> None:
    """Write results into parts. What was classified when an error or an interrupt comes is kept, too."""
    from swin_deploy.datasets.unfinished import Part

    waiting: list[tuple[Part, Any]] = []  # what a part would be that ended here, and its rows
    last = kept.last

    def write_part() -> None:
        pieces = [piece for part, piece in waiting if part.end > kept.last.end]
        if pieces:
            kept.add(last, lambda path: results.write(path, pieces))
        waiting.clear()

    begun, held = time.monotonic(), 0
    try:
        for chunk, answers in pairs:
            piece = results.piece(chunk.keys, answers)
            last = Part(last.end + len(chunk.keys), last.failed + len(answers.errors), chunk.shard, chunk.end)
            waiting.append((last, piece))
            held += answers.values.size
            spec.progress("Classifying", last.end, max(last.end, source.expected()))
            if held >= PART_VALUES or time.monotonic() - begun >= PART_SECONDS:
                write_part()
                begun, held = time.monotonic(), 0
        write_part()
    except BaseException:
        with contextlib.suppress(OSError):
            write_part()
        raise
