"""Calibration passes: observations, the cache, and resuming an interrupted pass."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from tiny_network import INPUTS, PREPROCESSOR, TENSORS, images, network

from swin_deploy.calib.collect import collect
from swin_deploy.calib.data import Samples, samples_from
from swin_deploy.calib.observers import Observation, to_arrays
from swin_deploy.errors import BackendError, BundleError, InputError, UsageError


def data(count: int = 20, seed: int = 0) -> Samples:
    return samples_from(images(count, seed), PREPROCESSOR, INPUTS)


def bits(observations: dict[str, Observation]) -> dict[str, bytes]:
    return {key: array.tobytes() for key, array in to_arrays(observations).items()}


class Counted(Samples):
    """Samples that count how many were read, and raise KeyboardInterrupt after `stop_after` batches."""

    given: list[int] = []  # noqa: RUF012 - shared on purpose
    stop_after: int | None = None

    def batches(self, size: int, start: int = 0) -> Iterator[dict[str, np.ndarray]]:
        for number, feeds in enumerate(super().batches(size, start)):
            if number == Counted.stop_after:
                raise KeyboardInterrupt
            Counted.given.append(len(feeds["pixel_values"]))
            yield feeds


@pytest.fixture
def counted() -> Iterator[Counted]:
    made = data(20)
    Counted.given.clear()
    yield Counted(made.source, made.preprocessor, made.inputs, made.chosen)
    Counted.stop_after = None


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    onnx.save(network(), str(path))
    return path


def test_observations_equal_the_values_of_the_tensors(model: Path) -> None:
    whole = network()
    whole.graph.output.extend(onnx.ValueInfoProto(name=name) for name in ("flat", "hidden", "gelu"))
    session = ort.InferenceSession(whole.SerializeToString(), providers=["CPUExecutionProvider"])
    feeds = next(data().batches(20))
    expected = dict(zip(("flat", "hidden", "gelu"), session.run(["flat", "hidden", "gelu"], feeds), strict=True)) | feeds
    told: list[tuple[int, int]] = []
    for source in (model, str(model), network()):
        found = collect(source, TENSORS, data(), batch=8, progress=lambda phase, done, total: told.append((done, total)))
        assert tuple(found) == TENSORS
        for name, one in found.items():
            assert (one.samples, one.values) == (20, expected[name].size)
            assert one.low == pytest.approx(expected[name].min(), rel=1e-5)
            assert one.amax == pytest.approx(np.abs(expected[name]).max(), rel=1e-5)

    assert told == [(8, 20), (16, 20), (20, 20)] * 3


def test_external_weights(tmp_path: Path, model: Path) -> None:
    graph = network()
    apart = tmp_path / "apart" / "model.onnx"
    apart.parent.mkdir()
    onnx.save(graph, str(apart), save_as_external_data=True, location="weights", size_threshold=64)
    assert bits(collect(apart, TENSORS, data(), cache=tmp_path / "c")) == bits(collect(model, TENSORS, data()))
    onnx.save(network(1), str(apart), save_as_external_data=True, location="weights", size_threshold=64)  # the same graph file
    assert bits(collect(apart, TENSORS, data(), cache=tmp_path / "c")) == bits(collect(network(1), TENSORS, data()))


def test_finished_observations_are_reused(model: Path, tmp_path: Path, counted: Counted) -> None:
    cache = tmp_path / "cache"
    first = collect(model, TENSORS, counted, cache=cache)
    assert sum(counted.given) == 20
    assert bits(collect(model, TENSORS, counted, cache=cache)) == bits(first)
    assert list(collect(model, ["gelu"], counted, cache=cache)) == ["gelu"]
    assert sum(counted.given) == 20
    more = collect(model, [*TENSORS, "logits"], counted, cache=cache)  # one pass for the missing tensor
    assert sum(counted.given) == 40
    assert tuple(more) == (*TENSORS, "logits")
    assert bits({name: more[name] for name in TENSORS}) == bits(first)
    collect(network(1), TENSORS, counted, cache=cache)  # another graph
    collect(model, TENSORS, counted, batch=7, cache=cache)  # another batch size may round differently
    assert sum(counted.given) == 80
    assert len(list(cache.iterdir())) == 3


def test_damaged_cache_files_are_replaced(model: Path, tmp_path: Path, counted: Counted) -> None:
    cache = tmp_path / "cache"
    first = collect(model, TENSORS, counted, cache=cache)
    (file,) = cache.iterdir()
    intact = file.read_bytes()
    for damaged in (intact[:100], b"", intact[:-2000] + bytes(2000), intact[:2000] + bytes(500) + intact[2500:]):
        file.write_bytes(damaged)
        assert bits(collect(model, TENSORS, counted, cache=cache)) == bits(first)
    assert sum(counted.given) == 100


@pytest.mark.parametrize("stop", [0, 1, 4])
def test_an_interrupted_pass_resumes(model: Path, tmp_path: Path, counted: Counted, stop: int) -> None:
    expected = collect(model, TENSORS, data(), batch=3)
    Counted.stop_after = stop
    with pytest.raises(KeyboardInterrupt):
        collect(model, TENSORS, counted, batch=3, cache=tmp_path / "cache")
    Counted.stop_after = None
    counted.given.clear()
    assert bits(collect(model, TENSORS, counted, batch=3, cache=tmp_path / "cache")) == bits(expected)
    assert sum(counted.given) == 20 - 3 * stop
    assert [file.name for file in (tmp_path / "cache").iterdir() if "partial" in file.name or file.name.startswith(".")] == []


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_a_killed_pass_resumes_bit_identically(model: Path, tmp_path: Path) -> None:
    code = f"""
import sys
sys.path[:0] = {list(map(str, Path(__file__).parents[:2]))!r}
from test_collect import collect, data, TENSORS
def told(phase, done, total):
    print(done, flush=True)
    if done >= 40:
        sys.stdin.read()  # half-way: wait for the kill
collect({str(model)!r}, TENSORS, data(80), batch=4, cache={str(tmp_path / "cache")!r}, every=0, progress=told)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert [int(process.stdout.readline()) for _ in range(10)] == list(range(4, 44, 4))
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    told: list[int] = []
    found = collect(
        model, TENSORS, data(80), batch=4, cache=tmp_path / "cache", progress=lambda phase, done, total: told.append(done)
    )
    assert told == list(range(40, 84, 4))  # only the batch that was not yet saved is repeated
    assert bits(found) == bits(collect(model, TENSORS, data(80), batch=4))


def test_a_pass_over_other_data_does_not_resume(model: Path, tmp_path: Path) -> None:
    collect(model, TENSORS, data(20), cache=tmp_path)
    told: list[int] = []
    found = collect(model, TENSORS, data(20, seed=1), cache=tmp_path, progress=lambda phase, done, total: told.append(done))
    assert told == [8, 16, 20]
    assert bits(found) == bits(collect(model, TENSORS, data(20, seed=1)))


def test_refusals(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match='no tensor "w3"'):
        collect(model, ["gelu", "w3"], data())
    graph = network()
    graph.graph.node[1].op_type = "Sqrt"
    del graph.graph.node[1].input[1:]
    graph.graph.node[3].input[0] = "flat"  # square roots of negative numbers
    with pytest.raises((InputError, BackendError), match=r"hidden contains NaN|cannot load"):
        collect(graph, ["hidden"], data())
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(BundleError, match="cannot be written"):
        collect(model, ["gelu"], data(), cache=tmp_path / "file")
