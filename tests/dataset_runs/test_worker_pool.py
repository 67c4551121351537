"""Processes give the results of one; those that die are replaced, and an image that kills them is a row."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli.exported import EXAMPLES, digits, exported_bundle, one_block

import swin_deploy
from swin_deploy.datasets import worker_pool
from swin_deploy.datasets.image_runner import Answers, ImageRunner, Job
from swin_deploy.datasets.image_sources import source_from
from swin_deploy.datasets.worker_pool import Chunk, Pace, WorkerPool, chunks_of, fastest_workers
from swin_deploy.errors import BackendError

LOAD = {"backend": "onnxruntime", "precision": "fp32", "device": "cpu", "trust": False}


def job(**fields: Any) -> Job:
    return Job(**{"bundle": str(digits(2)), "load": LOAD, "features": False, "width": 3, "threshold": -np.inf, **fields})


@dataclass(frozen=True)
class Killing(Job):
    """Reading the image 11.png kills the process of the pool that does it; 02.png does so while the file `once` exists."""

    once: str = ""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        from swin_deploy.preprocess import Preprocessor

        read, once = Preprocessor._pixels, Path(self.once)

        def pixels(this: Any, image: Any, label: str) -> Any:
            if "11.png" in label or ("02.png" in label and once.exists()):
                once.unlink(missing_ok=True)
                os.kill(os.getpid(), signal.SIGKILL)
            return read(this, image, label)

        Preprocessor._pixels = pixels  # type: ignore[method-assign]


def images(place: Path) -> list[str]:
    """Eighteen digits, of which one is damaged."""
    found = [EXAMPLES / f"digits/images/{number % 10}.png" for number in range(18)]
    for number, path in enumerate(found):
        (place / f"{number:02d}.png").write_bytes(path.read_bytes() if number != 7 else b"no image")
    return [str(place / f"{number:02d}.png") for number in range(18)]


def alone(paths: list[str], one: Job, batch: int) -> Answers:
    """What this process gives for all images."""
    return ImageRunner(one).run([paths[first : first + batch] for first in range(0, len(paths), batch)], {})


def joined(pairs: Iterator[tuple[Chunk, Answers]]) -> tuple[list[str], Answers]:
    keys, values, scores, errors = list[str](), [], [], dict[int, str]()
    for chunk, answers in pairs:
        errors |= {len(keys) + number: reason for number, reason in answers.errors.items()}
        keys += chunk.keys
        values.append(answers.values)
        scores.append(answers.scores)
    return keys, Answers(np.concatenate(values), np.concatenate(scores), None, errors, 0)


def same(found: Answers, wanted: Answers, but: tuple[int, ...] = ()) -> None:
    rows = [row for row in range(len(wanted.values)) if row not in but]
    for one, other in zip(found[:2], wanted[:2], strict=True):
        assert one[rows].tobytes() == other[rows].tobytes()
    assert found.errors == {**wanted.errors, **{row: found.errors[row] for row in but}}


def test_one_process_gives_what_classify_and_features_give(tmp_path: Path) -> None:
    paths = images(tmp_path)
    found = alone(paths, job(), 4)
    with swin_deploy.load(digits(2), **{**LOAD, "threads": 1}) as model:
        wanted = model.classify(paths, top_k=3, on_error="continue", batch_size=4)
    for row, best in enumerate(wanted):
        if row == 7:
            assert found.errors == {7: str(best)}
            assert "is not a valid image" in str(best)
        else:
            assert [(p.index, p.score) for p in best] == [*zip(found.values[row], found.scores[row], strict=True)]
    limited = alone(paths, job(threshold=0.5), 4)
    assert [list(row[:1]) for row in limited.above] == [[score > 0.5] for score in found.scores[:, 0]]
    bundle = exported_bundle("--weights", str(one_block()), "--task", "feature-extraction", "--output-attentions")
    vectors = alone(paths, job(bundle=str(bundle), features=True, width=64), 4)
    with swin_deploy.load(bundle, **{**LOAD, "threads": 1}) as model:
        good = [path for row, path in enumerate(paths) if row != 7]
        wanted = model.features(good, batch_size=1)["pooler_output"]
    assert np.delete(vectors.values, 7, axis=0) == pytest.approx(wanted, abs=1e-5)


def test_a_process_that_dies(tmp_path: Path) -> None:
    """An image that always kills is a row with the reason; one that kills once is like any other."""
    paths, once = images(tmp_path), tmp_path / "once"
    once.touch()
    with WorkerPool(Killing(**vars(job()), once=str(once)), 1) as pool:
        keys, found = joined(pool.map(chunks_of(source_from(paths), 4, 0, 0, Pace())))
    assert keys == paths
    assert not once.exists()
    same(found, alone(paths, job(), 4), (11,))
    assert "read this image ended without an error 2 times" in found.errors[11]


def test_the_last_chunks_are_small() -> None:
    """So that no process is still busy with a large one when the others have ended."""
    pace = Pace(batches=8, left=25, workers=2)
    sizes = [len(chunk.batches) for chunk in chunks_of(source_from(["a"] * 100), 4, 0, 0, pace)]
    assert (sum(sizes), sizes[0], pace.left) == (25, 6, 0)
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-4:] == [1] * 4


def test_a_batch_that_kills(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its images are left out, but not those of other batches."""
    pool, refused = WorkerPool(job(), 1), list[dict[int, str]]()

    def submit(executor: Any, work: Any, slot: int, batches: Any, without: dict[int, str], one_by_one: bool) -> Any:
        refused.append(dict(without))
        assert one_by_one == (len(refused) > 1)
        pool._marks[slot] = -3
        future = Future[Answers]()
        future.set_result(None) if without else future.set_exception(BrokenProcessPool())  # type: ignore[arg-type]
        return future

    monkeypatch.setattr(pool, "_submit", submit)
    with pool:
        assert len(list(pool.map(iter([Chunk([*"abcde"], [["a", "b"], ["c", "d"], ["e"]], 0, 5)])))) == 1
    assert [sorted(one) for one in refused] == [[], [], [], [2, 3]]


def test_processes_that_cannot_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_pool, "_begin", os._exit)
    monkeypatch.setattr(worker_pool, "FAILED_STARTS", 0)
    with WorkerPool(job(), 1) as pool, pytest.raises(BackendError, match="end before they read an image"):
        next(pool.map(iter([Chunk(["a"], [["a"]], 0, 1)])))


def test_processes_end_with_the_one_that_started_them() -> None:
    code = f"""
import os, signal
from swin_deploy.datasets.image_runner import Job
from swin_deploy.datasets.worker_pool import WorkerPool
pool = WorkerPool(Job({str(digits(2))!r}, {LOAD!r}, False, 3, 0.0), 1)
print(pool._submit(pool._executor, os.getpid).result(), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL
    while Path(f"/proc/{done.stdout.strip()}").exists():
        time.sleep(0.01)


def test_the_number_of_processes_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("swin_deploy.machine.usable_cores", lambda: 8)
    counts: list[Any] = []
    rates = {4: 98.0, 8: 100.0}
    monkeypatch.setattr(WorkerPool, "measured", lambda self, images, few: counts.append(few) or rates)
    assert [fastest_workers(job(), ["a"], "facts") for _ in range(2)] == [4, 4]
    assert counts == [[4, 8]]
    rates[4] = 50.0
    assert fastest_workers(job(), ["a"], "other facts") == 8
    assert fastest_workers(job(load={**LOAD, "device": "cuda:0"}), ["a"], "facts") == 1
