"""`swin-deploy bench`: its rows, consistent figures, the plot, and the end of all its processes."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli.exported import SCRIPT, cli, cli_here, exported_bundle, one_block, refused, result, started, stopped
from plotted import bar_widths

from swin_deploy.bench.baselines import COMPILED, Baselines
from swin_deploy.bench.race import BenchCase, reference_of
from swin_deploy.bench.run import plan_cases
from swin_deploy.bundle import Bundle
from swin_deploy.config import SwinConfig
from swin_deploy.errors import UsageError
from swin_deploy.gpus import CudaDevice, cuda_devices
from swin_deploy.models.checkpoints import checkpoint_from_path
from swin_deploy.models.torch_runtime import Placement, TorchNetwork
from swin_deploy.options import BenchSpec
from swin_deploy.parity import compare
from swin_deploy.runtimes import model_from_bundle
from swin_deploy.tasks import TaskSpec

psutil = pytest.importorskip("psutil", reason="bench measures memory with it")

QUICK = ("--seconds", 0.1, "--rounds", 2, "--json")
FIGURES = {
    "model": str, "backend": str, "device": str, "precision": str, "batch": int, "same_weights": bool, "run_by": str,
    "runs": int, "percentiles_ms": dict, "round_ms": list, "images_per_second": float,
    "cold_start_seconds": float, "peak_memory_mb": float, "ratio": dict, "relative_l2": (float, type(None)),
}  # fmt: skip


def bundle() -> Path:
    return exported_bundle("--weights", str(one_block()))


def consistent(rows: Any) -> None:
    """Every figure has its type, and is consistent with the others."""
    for row in rows:
        assert {name: isinstance(row[name], kind) for name, kind in FIGURES.items()} == dict.fromkeys(FIGURES, True)
        assert row.keys() == FIGURES.keys()
        percentiles = [row["percentiles_ms"][p] for p in ("50", "90", "95", "99")]
        assert 0 < percentiles[0] <= percentiles[1] <= percentiles[2] <= percentiles[3]
        assert row["images_per_second"] == pytest.approx(row["batch"] * 1000 / percentiles[0])
        assert row["runs"] >= len(row["round_ms"]) == 2
        assert 0 < row["cold_start_seconds"] < 600
        assert 10 < row["peak_memory_mb"] < 4000
        reference = next(other for other in rows if other["batch"] == row["batch"])
        quotients = sorted(a / b for a, b in zip(row["round_ms"], reference["round_ms"], strict=True))
        assert [row["ratio"][part] for part in ("low", "median", "high")] == pytest.approx(
            [float(np.quantile(quotients, q)) for q in (0.25, 0.5, 0.75)]
        )


def test_everything_on_this_machine_is_measured(tmp_path: Path) -> None:
    # A module in the current directory must not replace the installed one.
    (tmp_path / "swin_deploy").mkdir()
    (tmp_path / "swin_deploy/__init__.py").write_text("raise SystemExit('the wrong swin_deploy')")
    done = cli("bench", bundle(), *QUICK, cwd=tmp_path)
    found: Any = result(done)
    assert "--weights" in done.stderr  # the reason why there is no row of PyTorch
    rows = [(row["backend"], row["precision"], row["batch"]) for row in found["rows"]]
    skipped = [(one["backend"], one["precision"], one["batch"]) for one in found["skipped"]]
    wanted = [(backend, "fp32", batch) for backend in ("onnxruntime", "openvino") for batch in (1, 8)]
    assert [row for row in rows if row[1] == "fp32"] == wanted
    assert set(rows) | set(skipped) == {*wanted, ("openvino", "bf16", 1), ("openvino", "bf16", 8)}  # if the processor has it
    assert found["reference"].startswith("onnxruntime")
    if not cuda_devices():
        assert ({row["device"] for row in found["rows"]}, found["gpus"]) == ({"cpu"}, {})
    assert found["machine"]["cores"] == os.cpu_count()
    consistent(found["rows"])
    assert all(row["relative_l2"] < 1e-5 for row in found["rows"] if row["precision"] == "fp32")


def test_pytorch_is_the_reference_and_transformers_a_baseline(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    options = ("--weights", one_block(), "--baselines", "--backend", "onnxruntime", "--batch", 2, "--plot", "a.svg")
    done = cli_here("bench", bundle(), *options, *QUICK, cwd=tmp_path)
    found: Any = result(done)
    rows = found["rows"]
    assert [(row["model"], row["backend"]) for row in rows][:3] == [
        ("transformers", "pytorch"),
        ("swin-deploy", "onnxruntime"),
        ("transformers", "onnxruntime"),
    ]
    assert "transformers" in found["reference"]
    consistent(rows)
    assert rows[0]["ratio"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    assert all(row["relative_l2"] < 1e-5 for row in rows if row["same_weights"])  # all three run the same network
    drawn(tmp_path / "a.svg", rows)


def drawn(file: Path, rows: Any) -> None:
    """The plot has a bar for each row, as long as its figure, and an interval."""
    bars = [sum(widths) for widths in bar_widths(file.read_bytes())]
    medians = [float(np.median(row["round_ms"])) / row["batch"] for row in rows]
    assert bars == pytest.approx([bars[0] * one / medians[0] for one in medians], rel=1e-3)
    assert file.read_text().count('id="interval-') == len(rows)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_ends_its_processes(signum: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mark = f"bench-{os.getpid()}-{signum}-{tmp_path}"
    monkeypatch.setenv("BENCH_MARK", mark)
    process = started(SCRIPT, "bench", str(bundle()), "--backend", "onnxruntime", "--seconds", "600", cwd=tmp_path)
    code, said = stopped(process, "Measuring 2 candidates", signum, lambda: len(marked(mark)) > 1)  # it, and what it started
    assert code == 128 + signum
    assert len(said) == 1
    while marked(mark):  # they end by themselves, long before the 600 s of their measurement are over
        time.sleep(0.1)


def marked(mark: str) -> list[int]:
    """The processes with this text in their environment, and not in this one's alone."""
    found = [one.pid for one in psutil.process_iter(["environ"]) if (one.info["environ"] or {}).get("BENCH_MARK") == mark]
    return [pid for pid in found if pid != os.getpid()]


def test_results_of_frames_are_not_compared_with_results_of_pixels(tmp_path: Path) -> None:
    weights = str(one_block())
    frames = exported_bundle("--weights", weights, "--embed-preprocess")
    options = ("--weights", weights, "--backend", "onnxruntime", "--batch", 1)
    found: Any = result(cli_here("bench", frames, *options, *QUICK, cwd=tmp_path))
    assert [(row["backend"], row["relative_l2"]) for row in found["rows"]] == [("pytorch", 0.0), ("onnxruntime", None)]


@pytest.fixture
def with_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine as if it had a GPU and the libraries for it."""
    ort, torch = pytest.importorskip("onnxruntime"), pytest.importorskip("torch")
    monkeypatch.setattr(model_from_bundle, "cuda_devices", lambda: (CudaDevice("NVIDIA L4", "sm_89"),))
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def plan(backends: tuple[str, ...] = (), device: str = "auto") -> dict[BenchCase, Any]:
    return dict(plan_cases(Bundle.open(bundle()), BenchSpec(backends=backends, precisions="fp32", batches=1, device=device)))


@pytest.mark.usefixtures("with_a_gpu")
def test_on_a_gpu_every_back_end_has_rows_on_its_devices() -> None:
    pytest.importorskip("openvino", reason="a back end that only runs on the CPU")
    found = plan()
    assert [(one.backend, one.device) for one in found] == [
        ("onnxruntime", "cpu"), ("onnxruntime", "cuda:0"), ("openvino", "cpu"), ("onnxruntime-tensorrt", "cuda:0"),
    ]  # fmt: skip
    assert all(request["device"] == one.device for one, request in found.items())
    assert [(one.backend, one.device) for one in plan(device="cpu")] == [("onnxruntime", "cpu"), ("openvino", "cpu")]
    on_second = {(one.backend, one.device) for one in plan(device="cuda:1")}
    assert on_second == {("onnxruntime", "cuda:1"), ("onnxruntime-tensorrt", "cuda:1")}
    assert [(one.backend, one.device) for one in plan(("torch",))] == [("torch", "cpu"), ("torch", "cuda:0")]
    # A named back end is planned in any case, and loading it reports why it does not run there.
    assert [(one.backend, one.device) for one in plan(("openvino",), "cuda:0")] == [("openvino", "cuda:0")]
    with pytest.raises(UsageError, match='Unknown device "gpu"'):
        plan(device="gpu")


@pytest.mark.usefixtures("with_a_gpu")
def test_on_a_gpu_pytorch_is_the_reference(tmp_path: Path) -> None:
    found = Bundle.open(bundle())
    config = SwinConfig.from_dict(found.read_json("config.json"))
    baselines = Baselines(found, config, (32, 32), BenchSpec(weights=one_block()), tmp_path)
    rows = {**baselines.pytorch((1, 8), ("cpu", "cuda:0")), **plan()}
    on_gpu = [(one.backend, one.precision) for one in rows if one.device == "cuda:0" and one.batch == 8]
    assert on_gpu == [("pytorch", "fp32"), ("pytorch", "fp16"), (COMPILED, "fp16")]
    for one in rows:
        reference = reference_of(one, rows)
        assert (reference.backend, reference.precision, reference.device) == ("pytorch", "fp32", one.device)


def test_a_missing_device(tmp_path: Path) -> None:
    if cuda_devices():
        pytest.skip("this machine has a GPU")
    done = cli_here("bench", bundle(), "--device", "cuda", "--backend", "onnxruntime", *QUICK, cwd=tmp_path)
    refused(done, "Device cuda:0 is not available: this machine has no usable NVIDIA GPU")
    refused(cli_here("bench", bundle(), "--device", "tpu", *QUICK, cwd=tmp_path), 'Unknown device "tpu"')


def test_pytorch_in_half_precision() -> None:
    """As it is measured on a GPU, but on the CPU."""
    checkpoint = checkpoint_from_path(one_block(), TaskSpec())
    feeds = {"pixel_values": np.random.default_rng(0).standard_normal((2, 3, 32, 32)).astype(np.float32)}
    exact, half = (
        TorchNetwork(checkpoint, TaskSpec(), (32, 32), placement=Placement("cpu", precision)).run(feeds)["logits"]
        for precision in ("fp32", "fp16")
    )
    assert half.dtype == np.float32
    assert 1e-5 < compare(half, exact).relative_l2 < 1e-2
