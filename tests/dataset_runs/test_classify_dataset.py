"""`classify` writes one row for each image, even if it is killed and resumed, and refuses invalid arguments."""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from cli.exported import EXAMPLES, cli_here, contents, digits, exported_bundle, one_block, refused

import swin_deploy
from swin_deploy.api import classify
from swin_deploy.datasets.image_runner import Answers
from swin_deploy.datasets.unfinished import unfinished
from swin_deploy.datasets.worker_pool import Chunk, Pace, chunks_of
from swin_deploy.errors import InputError, SwinDeployError, UsageError

NAMED: dict[str, Any] = {"backend": "onnxruntime", "precision": "fp32", "device": "cpu"}
FLAGS = [part for name, value in NAMED.items() for part in (f"--{name}", value)]
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir"}


def listed(place: Path, count: int = 7) -> Path:
    """A text file of paths, which the stand-in for a network does not open."""
    path = place / "images.txt"
    path.write_text("".join(f"{number}.png\n" for number in range(count)))
    return path


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> dict[int, BaseException]:
    """Answers that only depend on the name of an image; an error, if the returned dictionary has one, before a row."""
    errors: dict[int, BaseException] = {}

    def started(stack: Any, job: Any, source: Any, spec: Any, kept: Any, batch: int) -> tuple[int, Iterator[Any]]:
        def pairs() -> Iterator[tuple[Chunk, Answers]]:
            done = kept.last.end
            for chunk in chunks_of(source, batch, kept.last.shard, kept.last.skip, Pace()):
                if done in errors:
                    raise errors.pop(done)
                done += len(chunk.keys)
                numbers = np.array([[int(key.partition(".")[0]) % 10] for key in chunk.keys], np.int32)
                failed = {row: "no" for row, number in enumerate(numbers) if number == 3}
                yield chunk, Answers(numbers, numbers / 10, None, failed, 0.0)

        return 1, pairs()

    monkeypatch.setattr(classify, "_started", started)
    monkeypatch.setattr(classify, "PART_SECONDS", 0.0)
    return errors


def run(place: Path, **options: Any) -> classify.DatasetResult:
    options = {"output": place / "out.jsonl", "top_k": 1, "batch": 2, **NAMED, **options}
    return swin_deploy.classify_dataset(digits(2), place / "images.txt", **options)


def killed(work: Callable[[], object], place: Path, change: int) -> bool:
    """Whether a fork of this process that does `work` was killed before that change of the files in a folder."""
    process = os.fork()
    if process == 0:
        left = change

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal left
            written = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            if (written or event in CHANGES) and str(place) in str(arguments[0]):
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        try:
            work()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(process, 0)[1])


def test_killed_before_each_change(tmp_path: Path, no_network: Any) -> None:
    whole = tmp_path / "whole"
    whole.mkdir()
    listed(whole)
    assert (found := run(whole)).images == 7
    assert (found.failed, found.resumed) == (1, 0)
    wanted, resumed = contents(whole), set()
    for change in itertools.count(1):
        place = tmp_path / str(change)
        place.mkdir()
        listed(place)
        if not killed(lambda place=place: run(place), place, change):  # type: ignore[misc]
            break
        if not (place / "out.jsonl").exists() or (place / ".out.jsonl.unfinished/state.json").exists():
            again = run(place)
            assert (again.images, again.failed) == (7, 1), f"change {change}"
            resumed.add(again.resumed)
        else:  # only the empty folder was left
            with pytest.raises(UsageError, match="exists"):
                run(place)
        assert contents(place) == wanted, f"change {change}"
    assert change > 20
    assert resumed == {0, 2, 4, 6, 7}


def test_an_error_keeps_what_is_done(tmp_path: Path, no_network: dict[int, BaseException]) -> None:
    listed(tmp_path)
    run(tmp_path, output=tmp_path / "whole.csv")
    no_network.update({2: InputError("a shard is damaged"), 4: KeyboardInterrupt()})
    arguments = ("classify", digits(2), "images.txt", "-o", "out.csv", "-k", 1, "--batch", 2, *FLAGS)
    refused(cli_here(*arguments, cwd=tmp_path), "a shard is damaged")
    said = refused(cli_here(*arguments, cwd=tmp_path), code=130)
    assert said == "swin-deploy: interrupted; the same command resumes after 4 images"
    done = cli_here(*arguments, "--json", cwd=tmp_path)
    assert (done.returncode, "Resuming after 4 images" in done.stderr) == (1, True)
    assert (tmp_path / "out.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images.txt", "out.csv", "whole.csv"]


def test_what_does_not_resume(tmp_path: Path, no_network: dict[int, BaseException]) -> None:
    listed(tmp_path)

    def interrupted(**options: Any) -> None:
        no_network[4] = KeyboardInterrupt()
        with pytest.raises(KeyboardInterrupt, match="resumes after 4 images"):
            run(tmp_path, **options)

    interrupted()
    with unfinished(tmp_path / "out.jsonl", ".jsonl"), pytest.raises(UsageError, match="Another command is writing"):
        run(tmp_path)
    for options, what in (({"top_k": 2}, "top_k"), ({"batch": 4}, "batch size"), ({"precision": "fp16"}, "precision")):
        with pytest.raises(UsageError, match=f"started with another .*{what}"):
            run(tmp_path, **options)
    with pytest.raises(UsageError, match="started with another bundle"):
        swin_deploy.classify_dataset(digits(1), tmp_path / "images.txt", output=tmp_path / "out.jsonl")
    listed(tmp_path, 8)
    with pytest.raises(UsageError, match="started with another source"):
        run(tmp_path)
    assert (run(tmp_path, force=True).resumed, len((tmp_path / "out.jsonl").read_text().splitlines())) == (0, 8)
    with pytest.raises(UsageError, match=r"out.jsonl exists. Pass --force"):
        run(tmp_path)
    interrupted(force=True)
    assert run(tmp_path, force=True).resumed == 4
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["images.txt", "out.jsonl"]


def test_a_command_with_processes(tmp_path: Path) -> None:
    """The whole of it, on a folder with a damaged image."""
    for number in range(10):
        (tmp_path / f"{number}.png").write_bytes(
            (EXAMPLES / f"digits/images/{number}.png").read_bytes()[: 99 if number == 4 else None]
        )
    done = cli_here("classify", digits(2), tmp_path, "-o", "out.parquet", "-k", 2, "--json", *FLAGS, cwd=tmp_path)
    assert (done.returncode, "1 of 10 images cannot be read" in done.stderr) == (1, True), done.stderr
    assert json.loads(done.stdout)["images"] == 10
    rows = pq.read_table(tmp_path / "out.parquet").to_pylist()
    with swin_deploy.load(digits(2), threads=1, **NAMED) as model:
        wanted = model.classify([tmp_path / f"{number}.png" for number in range(10)], top_k=2, on_error="continue")
    for number, (row, best) in enumerate(zip(rows, wanted, strict=True)):
        assert row["path"] == str(tmp_path / f"{number}.png")
        if number == 4:
            assert (row["labels"], row["error"]) == ([], str(best))
        else:
            got = [*zip(row["indices"], row["labels"], row["scores"], strict=True)]
            assert got == [(p.index, p.label, p.score) for p in best]
            assert row["error"] is None


FEATURES = ("--weights", "--task", "feature-extraction", "--output-attentions")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"output": "out.txt"}, r"Expected .parquet, .jsonl, .csv"),
        ({"output": "none/out.csv"}, "not a file in an existing folder"),
        ({"features": True}, "--features needs feature-extraction"),
        ({"bundle": "features"}, "classify needs image-classification.*or pass --features"),
        ({"num_gpus": 1}, "Pass --ray"),
        ({"features": True, "top_k": 1}, "--top-k is for classes"),
        ({"ray": "local", "num_gpus": 1, "device": "cpu"}, "but --device is cpu"),
        ({"source": "none.txt"}, "does not exist"),
        ({"workers": 0}, "whole number"),
        ({"batch": "x"}, "whole number"),
    ],
)
def test_refusals(options: dict[str, Any], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    listed(tmp_path)
    options = {"bundle": digits(2), "source": "images.txt", "output": "out.csv", **options}
    if options["bundle"] == "features":
        options["bundle"] = exported_bundle(FEATURES[0], str(one_block()), *FEATURES[1:])
    with pytest.raises(SwinDeployError, match=sentence):
        swin_deploy.classify_dataset(options.pop("bundle"), **options)
    assert [path.name for path in tmp_path.iterdir()] == ["images.txt"]
