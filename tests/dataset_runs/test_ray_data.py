"""What actors and tasks of Ray do with tables, without Ray: benchmarks/classify_ray.py runs it on a cluster."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from cli.exported import EXAMPLES, digits

import swin_deploy
from swin_deploy.datasets import ray_data
from swin_deploy.datasets.image_runner import ImageRunner, Job
from swin_deploy.datasets.image_sources import source_from
from swin_deploy.datasets.worker_pool import Pace, chunks_of
from swin_deploy.dependencies import installed
from swin_deploy.errors import MissingDependencyError


def chunks(tables: Any) -> list[Any]:
    return [pickle.loads(one.as_py()) for table in tables for one in table.column(ray_data.CHUNK)]


def test_tables(tmp_path: Path) -> None:
    contents = [(EXAMPLES / f"digits/images/{number}.png").read_bytes() for number in range(10)]
    rows = {"image": [{"bytes": one, "path": f"{number}.png"} for number, one in enumerate(contents)]}
    pa.parquet.write_table(table := pa.table(rows), tmp_path / "a.parquet")
    source = source_from(str(tmp_path / "a.parquet"))
    [read] = chunks(ray_data._read(pa.table({"shard": [0], "skip": [4]}), source, 4))
    assert [read] == list(chunks_of(source, 4, 0, 4, Pace(ray_data.BATCHES)))
    assert [len(batch) for batch in read.batches] == [4, 2]
    [made] = chunks([ray_data._chunk(table, "image", None, 4)])
    assert (made.keys, [len(batch) for batch in made.batches]) == ([f"{number}.png" for number in range(10)], [4, 4, 2])
    load = {"backend": "onnxruntime", "precision": "fp32", "device": "cpu"}
    job = Job(str(digits(2)), load, False, 3, -np.inf)
    done = ray_data._Actor(job)(pa.table({ray_data.CHUNK: [pickle.dumps(made)]}))
    [(chunk, answers)] = [pickle.loads(one.as_py()) for one in done.column(ray_data.ANSWERS)]
    wanted = ImageRunner(job).run(made.batches, {})
    assert (chunk.keys, answers.scores.tobytes()) == (made.keys, wanted.scores.tobytes())


@pytest.mark.skipif(installed("ray"), reason="Ray is installed")
def test_ray_is_missing(tmp_path: Path) -> None:
    with pytest.raises(MissingDependencyError, match=r'pip install "swin-deploy\[ray\]"'):
        swin_deploy.classify_dataset(digits(2), EXAMPLES / "digits/images", output=tmp_path / "a.csv", ray="local")
