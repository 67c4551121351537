"""Classify with actors of Ray Data, on this machine or a cluster. Results come back in the order of the source."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from swin_deploy.dependencies import require
from swin_deploy.errors import UsageError

from .image_runner import Answers, ImageRunner, Job
from .image_sources import KEY, Source, columns_of, items_of
from .worker_pool import Chunk, Pace, chunks_of

CHUNK, ANSWERS = "chunk", "answers"
BATCHES = 8  # of a chunk
READ_CPUS = 0.1  # a share of a core, so that actors on all cores do not keep shards from being read


def is_dataset(source: Any) -> bool:
    """Return whether `source` is a dataset of Ray, without importing Ray."""
    return type(source).__module__.partition(".")[0] == "ray" and hasattr(source, "map_batches")


def dataset_source(dataset: Any) -> Source:
    """Return a source for a Ray dataset. It has no identity, so an interrupted command begins anew."""
    return Source("the Ray dataset", KEY, (), lambda shard, skip: iter(()), lambda source: "")


@dataclass(frozen=True)
class RayPool:
    """Actors that classify chunks, each with one core, and `gpus` GPUs or a share of one."""

    job: Job
    workers: int | None
    gpus: float

    def map(self, source: Source, batch: int, shard: int, skip: int) -> Iterator[tuple[Chunk, Answers]]:
        """Yield the chunks of a source and their results in order. Shards of images are read in tasks of Ray."""
        ray = require("ray.data", "classify with Ray")
        if source.column == KEY:
            places = [{"shard": n, "skip": skip * (n == shard)} for n in range(shard, len(source.shards))]
            dataset = ray.from_items(places, override_num_blocks=max(1, len(places))).map_batches(
                _read, batch_size=1, batch_format="pyarrow", fn_args=(source, batch), num_cpus=READ_CPUS
            )
        else:
            chunks = chunks_of(source, batch, shard, skip, Pace(BATCHES))
            dataset = ray.from_items([{CHUNK: pickle.dumps(chunk)} for chunk in chunks])
        return self._results(dataset)

    def map_dataset(self, dataset: Any, image: str | None, key: str | None, batch: int) -> Iterator[tuple[Chunk, Answers]]:
        """Yield the results of the images in a Ray dataset, in its order."""
        schema = dataset.schema()
        columns = columns_of(getattr(schema, "base_schema", schema), image, key, "The Ray dataset")
        chunks = dataset.map_batches(
            _chunk, batch_size=BATCHES * batch, batch_format="pyarrow", fn_args=(*columns, batch), num_cpus=READ_CPUS
        )
        return self._results(chunks)

    def _results(self, dataset: Any) -> Iterator[tuple[Chunk, Answers]]:
        data = require("ray.data", "classify with Ray")
        size = {"size": self.workers} if self.workers else {"min_size": 1}
        found = dataset.map_batches(
            _Actor,
            batch_size=1,
            batch_format="pyarrow",
            fn_constructor_args=(self.job,),
            compute=data.ActorPoolStrategy(**size),
            num_cpus=1,
            num_gpus=self.gpus,
        )
        found.context.execution_options.preserve_order, found.context.enable_progress_bars = True, False
        for table in found.iter_batches(batch_size=None, batch_format="pyarrow"):
            for answers in table.column(ANSWERS):
                yield pickle.loads(answers.as_py())


@contextmanager
def connected(address: str, workers: int | None) -> Iterator[None]:
    """Connect to Ray: "auto" or an address for a cluster that runs, "local" for one that ends with the block."""
    ray = require("ray", "classify with Ray")
    require("ray.data", "classify with Ray")
    ours = not ray.is_initialized()
    if ours:
        from swin_deploy.machine import usable_cores

        where = (
            {"address": address} if address != "local" else {"num_cpus": (workers or usable_cores()) + 1, "address": "local"}
        )
        try:
            ray.init(**where, log_to_driver=False, logging_level=logging.WARNING)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise UsageError(
                f"No Ray cluster answers at {address} ({str(error).splitlines()[0]}). Start one with ray start --head, or pass "
                f"local."
            ) from error
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # it would print its plan
    try:
        yield
    finally:
        if ours:
            ray.shutdown()


class _Actor:
    def __init__(self, job: Job) -> None:
        self._runner = ImageRunner(job)

    def __call__(self, table: Any) -> Any:
        arrow = require("pyarrow", "classify with Ray")
        made = []
        for one in table.column(CHUNK):
            chunk = pickle.loads(one.as_py())
            answers = self._runner.run(chunk.batches, {})
            made.append(pickle.dumps((Chunk(chunk.keys, [], chunk.shard, chunk.end), answers)))
        return arrow.table({ANSWERS: arrow.array(made, arrow.binary())})


def _read(table: Any, source: Source, batch: int) -> Iterator[Any]:
    """Yield the chunks of the shards in a table."""
    arrow = require("pyarrow", "classify with Ray")
    for place in table.to_pylist():
        one = Source(source.title, source.column, source.shards[: place["shard"] + 1], source.read, source.count, total=1)
        for chunk in chunks_of(one, batch, place["shard"], place["skip"], Pace(BATCHES)):
            yield arrow.table({CHUNK: arrow.array([pickle.dumps(chunk)], arrow.binary())})


def _chunk(table: Any, image: str, key: str | None, batch: int) -> Any:
    """Return a table of rows with images as one chunk."""
    arrow = require("pyarrow", "classify with Ray")
    items = [item for part in table.to_batches() for item in items_of(part, image, key, "row ", 0)]
    batches = [[one for _, one in items[first : first + batch]] for first in range(0, len(items), batch)]
    chunk = Chunk([name for name, _ in items], batches, 0, 0)
    return arrow.table({CHUNK: arrow.array([pickle.dumps(chunk)], arrow.binary())})
