"""`--latency-ms`: the search, the roofline's choice beside `inspect`, a simulated GPU, and `bench` with a fake clock."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxruntime", reason="the simulated TensorRT computes with it")

from cli.exported import cli_here, copied, digits, refused, result
from fake_gpu import RELEASES, simulated

import swin_deploy
from swin_deploy.bench import run, worker
from swin_deploy.bench.race import Measurement
from swin_deploy.bundle import Bundle
from swin_deploy.errors import BackendError, UsageError
from swin_deploy.exporters.engines import build
from swin_deploy.exporters.engines.engine_from_onnx import Engine
from swin_deploy.exporters.engines.layer_report import report_from_log
from swin_deploy.latency_budget import largest_batch


@pytest.mark.parametrize("budget", [0.5, 1.5, 3.0, 10.0, 40.0, 1000.0])
@pytest.mark.parametrize(
    "time",
    [
        lambda batch: 1 + 0.1 * batch,
        lambda batch: 1.2 * batch,
        lambda batch: max(1.4, 0.2 * batch),
        lambda batch: 2.0 * -(-batch // 8),
        lambda batch: batch**1.5,
        lambda batch: 1.0 if batch < 100 else float("inf"),
        lambda batch: 1.0,
    ],
)
def test_the_largest_batch_is_found_with_few_trials(time: Callable[[int], float], budget: float) -> None:
    tried: list[int] = []
    best, taken = largest_batch(budget, lambda batch: (tried.append(batch), time(batch))[1])
    assert best == max((batch for batch in range(1, 257) if time(batch) <= budget), default=0)
    assert taken == time(best or 1)
    assert len(tried) == len(set(tried)) <= 14


def test_the_roofline_chooses_what_inspect_reports(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX compiles the engines")
    path = copied(1, tmp_path / "b")
    with caplog.at_level("INFO", "swin_deploy.exporters"):
        [built] = swin_deploy.build_engine(path, gpus="l4", backend="tensorrt-rtx", latency_ms=0.12)
    [inspected] = swin_deploy.inspect(path, gpu="l4").engines  # the other ones that were tried are gone
    assert inspected.roofline is not None
    milliseconds, batch = inspected.roofline.seconds * 1e3, inspected.batch[2]
    times = {int(one[1]): float(one[2]) for one in re.finditer(r"Batch (\d+): (\S+) ms, estimated", caplog.text)}
    assert milliseconds <= 0.12 < times[batch + 1]
    assert built.entry["batch_choice"] == {
        "latency_ms": 0.12, "milliseconds": pytest.approx(milliseconds, abs=1e-4), "by": "roofline", "gpu": "l4",
    }  # fmt: skip
    assert f"Batch {batch} is the largest within 0.12 ms" in caplog.text
    assert "estimated by the roofline of l4, not measured" in caplog.text
    assert {file.name for file in (path / "engines").iterdir()} == {
        Path(built.file).name, Path(build.layers_file(built.file)).name,
    }  # fmt: skip
    done = cli_here("build-engine", "b", "--gpu", "l4", "--latency-ms", "0.001", cwd=tmp_path)
    refused(done, "One image takes 0.0", "estimated by the roofline of l4", "the budget is 0.001 ms")
    assert [*Bundle.open(path).engines] == [built.file]


class Clocked:
    """A measuring process inside this one, whose calls take 2 ms and 0.25 ms for each image."""

    def __init__(self, request: Any) -> None:
        model, self._time = worker.open_request(request), 2 + 0.25 * request["batch"]
        assert model.run({"pixel_values": np.zeros((request["batch"], 3, 32, 32), np.float32)})["logits"].shape[0] > 0
        model.close()

    def __enter__(self) -> Clocked:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def milliseconds(self, seconds: float) -> list[float]:
        return [self._time, self._time, 100.0]


def test_on_the_gpu_the_engine_is_timed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = copied(1, tmp_path / "b")

    def compiled(graph: Path, spec: Any) -> Engine:
        plan = json.dumps({"graph": str(graph.absolute()), "profiles": spec.batches, "host_code": False}).encode()
        return Engine(plan, (report_from_log([]),), spec.backend, RELEASES[spec.backend], spec.gpu, 0.1)

    with pytest.MonkeyPatch.context() as patch, simulated(patch, "sm_89"), caplog.at_level("INFO", "swin_deploy.exporters"):
        patch.setattr(build, "engine_from_onnx", compiled)
        patch.setattr(worker, "Child", Clocked)
        [built] = swin_deploy.build_engine(path, latency_ms=5)
        assert [profile.batch for profile in built.entry.profiles] == [(12, 12, 12)]
        choice = {"latency_ms": 5.0, "milliseconds": 5.0, "by": "measurement", "gpu": "Simulated GPU"}
        assert built.entry["batch_choice"] == choice
        assert "measured on Simulated GPU" in caplog.text
        assert [*Bundle.open(path).engines] == [built.file]
        with pytest.raises(UsageError, match=r"One image takes 2\.25 ms \(measured on Simulated GPU\).*budget is 2 ms"):
            swin_deploy.build_engine(path, latency_ms=2)
        [again] = swin_deploy.build_engine(path, latency_ms=5)
        assert (again.file, again.reused) == (built.file, True)
        with pytest.raises(UsageError, match=r"roofline of .* on l4 is unknown"):  # another GPU of the same capability
            swin_deploy.build_engine(path, gpus="l4", latency_ms=5)


@pytest.mark.parametrize(
    ("verb", "options", "words"),
    [
        ("build-engine", ["--batch", "1"], ["Leave out --batch"]),
        ("build-engine", ["--batch", "1:8:32"], ["Leave out --batch"]),
        ("build-engine", ["--strip-weights", "--backend", "tensorrt"], ["Leave out --strip-weights"]),
        ("build-engine", ["--gpu", "sm_121"], ["no roofline for sm_121", "t4 (sm_75)", "rtx-5090 (sm_120)"]),
        ("bench", ["--batch", "8"], ["Leave out --batch"]),
        ("bench", ["--baselines"], ["baselines are exported for one batch"]),
    ],
)
def test_what_does_not_go_with_a_budget(verb: str, options: list[str], words: list[str], tmp_path: Path) -> None:
    if "sm_121" in options:
        pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX compiles for it")
    refused(cli_here(verb, digits(1), "--latency-ms", "5", *options, cwd=tmp_path), *words)
    refused(cli_here(verb, digits(1), "--latency-ms", "0", cwd=tmp_path), "latency_ms")


PER_IMAGE = {"onnxruntime": 2.0, "openvino": 0.5}


def raced(requests: Any, seconds: float, rounds: int, progress: Any, check: Any) -> tuple[tuple[Measurement, ...], Any]:
    """The race with a fake clock: ONNX Runtime runs up to 9 images."""
    [case] = requests
    check({case: "Memory ran out."} if case.batch > 9 and case.backend == "onnxruntime" else {})
    time = PER_IMAGE[case.backend] * case.batch
    percentiles = {50: time, 90: 3 * time, 95: 3 * time, 99: 4 * time}
    ratio = dict.fromkeys(("median", "low", "high"), 1.0)
    return (Measurement(case, case.backend, 9, percentiles, (time,) * 3, 1000 * case.batch / time, 1.0, 80.0, ratio, 0.0),), {}


def test_bench_finds_the_largest_batch_of_each_candidate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openvino", reason="the second candidate")
    monkeypatch.setattr(run, "race", raced)
    options = ("--backend", "onnxruntime", "--backend", "openvino", "--precision", "fp32", "--device", "cpu")

    def rows(budget: float) -> tuple[Any, Any]:
        found: Any = result(cli_here("bench", digits(1), *options, "--latency-ms", budget, "--json", cwd=tmp_path))
        assert found["latency_ms"] == budget
        return {
            row["backend"]: (row["batch"], row["percentiles_ms"]["50"], row["images_per_second"]) for row in found["rows"]
        }, found

    assert rows(10)[0] == {"onnxruntime": (5, 10, 500), "openvino": (20, 10, 2000)}
    found, whole = rows(25)
    assert found == {"onnxruntime": (9, 18, 500), "openvino": (50, 25, 2000)}
    assert [row["ratio"]["median"] for row in whole["rows"]] == [1.0, 0.25]
    found, whole = rows(1)
    assert found == {"openvino": (2, 1, 2000)}
    assert [(one["backend"], one["reason"]) for one in whole["skipped"]] == [
        ("onnxruntime", "One image takes 2 ms, and the budget is 1 ms.")
    ]
    done = cli_here("bench", digits(1), *options, "--latency-ms", 0.1, cwd=tmp_path)
    refused(done, "No candidate runs one image within 0.1 ms", "openvino fp32, batch 1, takes 0.5 ms")
    monkeypatch.setattr(run, "race", lambda requests, *_: _[3](dict.fromkeys(requests, "It does not load.")))
    with pytest.raises(BackendError, match="It does not load"):
        run.bench(digits(1), latency_ms=5, backends="openvino")
