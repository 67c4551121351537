"""What "auto" takes: the fastest that is correct, measured once; and what is named is never replaced."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from cli.exported import EXAMPLES, copied, digits
from engine_bundles import bundle_of
from fake_gpu import FakeDriver, module

import swin_deploy
import swin_deploy.gpus
from swin_deploy.bundle import Bundle
from swin_deploy.dependencies import EXACT_QDQ
from swin_deploy.errors import BackendError, BundleError, MissingDependencyError, UsageError
from swin_deploy.runtimes import autoselect as choice
from swin_deploy.runtimes import onnxruntime as onnxruntime_backend
from swin_deploy.runtimes.autoselect import Candidate, Measured, choose
from swin_deploy.runtimes.backends import runtime_from_onnx

ORT, OV = Candidate("onnxruntime", "fp32", "cpu"), Candidate("openvino", "fp32", "cpu")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/swin-deploy/auto"


def refuse(candidate: Candidate) -> Any:
    raise AssertionError(f"{candidate} was opened")


def rows_of(*milliseconds: float | None) -> Any:
    found = iter(milliseconds)

    def measure(bundle: Bundle, candidate: Candidate, open_first: Any, best: float) -> Measured:
        took = next(found)
        return Measured(candidate, took, "not verified" if took is None else "verified (relative L2 2.4e-07)")

    return measure


def test_measured_once_and_explained(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("openvino", reason="there would be nothing to choose")
    path = digits(2)
    caplog.clear()  # of what its export said
    caplog.set_level(logging.INFO, "swin_deploy")
    with swin_deploy.load(path, precision="fp32") as model:
        first = model.describe()
    assert (first.precision, first.device, first.graphs) == ("fp32", "cpu", {(32, 32): "onnx/model.onnx"})
    assert {row.candidate.backend for row in first.measured} == {"onnxruntime", "openvino"}
    assert all(row.milliseconds and row.verdict.startswith("verified (relative L2") for row in first.measured)
    fastest = min(first.measured, key=lambda row: row.milliseconds or 0)
    assert first.backend == fastest.candidate.backend
    assert "the fastest of 2 that agree with PyTorch" in first.reason
    text = str(first)
    assert all(part in text for part in ("32x32: onnx/model.onnx", f"{fastest.milliseconds:.2f} ms", first.version, "openvino"))
    assert json.loads(json.dumps(first.to_dict()))["measured"][0]["backend"] == "onnxruntime"
    [kept] = cache.iterdir()
    with swin_deploy.load(digits(2), precision="fp32") as model:
        assert model.describe() == first  # to the microsecond: it was not measured again
    assert caplog.messages == [f"Measuring once which of 2 candidates runs {digits(2)} fastest"]
    kept.write_text("no json")
    with swin_deploy.load(digits(2), precision="fp32") as model:
        assert model.describe().measured != first.measured


def test_the_fastest_of_those_that_agree(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle, third = Bundle.open(digits(2)), Candidate("onnxruntime", "fp16", "cpu")
    monkeypatch.setattr(choice, "_measure", rows_of(5.0, 3.0, None))
    best, reason, rows = choose(bundle, [ORT, OV, third], refuse, 0)
    assert (best, [row.milliseconds for row in rows]) == (OV, [5.0, 3.0, None])
    assert "the fastest of 2" in reason
    monkeypatch.setattr(choice, "_measure", rows_of(1.0, 3.0, 2.0))
    assert choose(bundle, [ORT, OV, third], refuse, 0)[2] == rows  # from the cache
    assert choose(bundle, [ORT, OV, third], refuse, 1)[0] == ORT  # with other threads, measured anew


def test_measured_anew_with_another_tensorrt_or_driver(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its packages are named after the CUDA that they are for, too; tensorrt itself only requires one of these."""
    bundle, driver, versions = Bundle.open(digits(2)), FakeDriver("sm_89"), dict[str, str]()
    monkeypatch.setattr(swin_deploy.gpus, "cuda_driver", lambda: driver)
    plain = choice.installed_versions
    monkeypatch.setattr(
        choice, "installed_versions", lambda names: plain(names) | {name: versions[name] for name in names if name in versions}
    )
    monkeypatch.setattr(choice, "_measure", rows_of(*range(1, 13)))
    measured = [choose(bundle, [ORT, OV], refuse, 0)[2]]
    for name in ("tensorrt-cu12", "tensorrt-cu13", "tensorrt-lean", "tensorrt-lean-cu13", ""):
        driver.version += not name
        versions |= {name: "11.4.0.106"} if name else {}
        measured.append(choose(bundle, [ORT, OV], refuse, 0)[2])
        assert choose(bundle, [ORT, OV], refuse, 0)[2] == measured[-1]
    assert [rows[0].milliseconds for rows in measured] == [1, 3, 5, 7, 9, 11]


def test_where_none_is_correct(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_measure", rows_of(None, None))
    with pytest.raises(BackendError, match=r"No candidate runs this bundle: onnxruntime fp32 on cpu: not verified"):
        choose(Bundle.open(digits(2)), [ORT, OV], refuse, 0)
    assert not cache.exists()


def test_what_fails_for_one_reason_says_only_that(cache: Path) -> None:
    def fails(candidate: Candidate) -> Any:
        raise UsageError("PyTorch has one number of threads for the whole process.")

    with pytest.raises(UsageError, match=r"^PyTorch has one number of threads for the whole process\.$"):
        choose(Bundle.open(digits(2)), [ORT, OV], fails, 0)


def test_a_quantised_graph_for_tensorrt_is_no_choice_without_it(cache: Path, tmp_path: Path) -> None:
    """OpenVINO computes wrong results from it and ONNX Runtime is slow; named, it runs where it is correct."""
    pytest.importorskip("openvino", reason="what is refused")
    path = bundle_of(tmp_path / "b")
    swin_deploy.quantize(path, EXAMPLES / "digits/images", precision="int8")
    with swin_deploy.load(path) as model:
        assert "int8" not in {row.candidate.precision for row in model.describe().measured}
    with swin_deploy.load(path, precision="int8") as model:
        assert (model.describe().backend, model.describe().measured) == ("onnxruntime", ())
    with pytest.raises(UsageError, match=r"INT8 graph in .* was built for TensorRT.*--int8 --target openvino"):
        swin_deploy.load(path, backend="openvino", precision="int8")
    swin_deploy.quantize(path, EXAMPLES / "digits/images", precision="int8", target="onnxruntime")
    with swin_deploy.load(path, backend="openvino", precision="int8") as model:
        assert model.describe().reason == "the only candidate on this machine"


def test_a_graph_that_is_gone_is_done_without(cache: Path, tmp_path: Path) -> None:
    path = copied(2, tmp_path / "b")
    (path / "onnx/model_fp16.onnx").unlink()
    with swin_deploy.load(path, backend="onnxruntime") as model:
        assert model.precision == "fp32"
        assert "model_fp16.onnx" in model.describe().measured[1].verdict
    with pytest.raises(BundleError, match=r"model_fp16\.onnx"):
        swin_deploy.load(path, backend="onnxruntime", precision="fp16")


def test_a_wrong_answer_is_not_timed(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A back end that answers with what its first class would be elsewhere is fast, and not taken."""
    pytest.importorskip("openvino", reason="there would be nothing to choose")
    from swin_deploy.runtimes.openvino import OpenVino

    right = OpenVino._run

    def wrong(self: OpenVino, feeds: Any, out: Any) -> Any:
        found = right(self, feeds, out)
        found["logits"][:] *= 1.001
        return found

    monkeypatch.setattr(OpenVino, "_run", wrong)
    with swin_deploy.load(digits(2), precision="fp32") as model:
        told = model.describe()
    assert told.backend == "onnxruntime"
    [row] = [row for row in told.measured if row.candidate.backend == "openvino"]
    assert row.milliseconds is None
    assert "the output logits differs by 1.0" in row.verdict


def test_what_failed_to_load_is_tried_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library that could not be imported just now is no reason to do without it for good; what was measured is kept."""
    pytest.importorskip("openvino", reason="there would be nothing to choose")
    from swin_deploy.runtimes.openvino import OpenVino

    def fails(self: OpenVino, *_: Any, **__: Any) -> None:
        raise MissingDependencyError("OpenVINO is needed, but it fails to import (libtbb.so.12).")

    with monkeypatch.context() as patch:
        patch.setattr(OpenVino, "__init__", fails)
        for _ in range(2):
            with swin_deploy.load(digits(2), precision="fp32") as model:
                broken = model.describe()
            assert broken.backend == "onnxruntime"
            assert "libtbb" in broken.measured[1].verdict
    with swin_deploy.load(digits(2), precision="fp32") as model:
        whole = model.describe()
    assert whole.measured[0] == broken.measured[0]
    assert whole.measured[1].milliseconds
    with swin_deploy.load(digits(2), precision="fp32") as model:
        assert model.describe().measured == whole.measured


def test_a_winner_that_does_not_load_any_more_is_done_without(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It won when it was measured. That it fails today is told, and not kept; named, it is not replaced."""
    pytest.importorskip("openvino", reason="the winner")
    from swin_deploy.runtimes.onnxruntime import OnnxRuntime
    from swin_deploy.runtimes.openvino import OpenVino

    monkeypatch.setattr(choice, "_measure", rows_of(5.0, 3.0))

    def taken() -> Any:
        with swin_deploy.load(digits(2), precision="fp32") as model:
            assert model.run({"pixel_values": np.zeros((1, 3, 32, 32), np.float32)})["logits"].shape == (1, 10)
            return model.describe()

    def fails(self: Any, *_: Any, **__: Any) -> None:
        raise BackendError(f"{type(self).__name__} does not start today.")

    first = taken()
    assert first.backend == "openvino"
    [kept] = cache.iterdir()
    content = kept.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(OpenVino, "__init__", fails)
        told = taken()
        assert told.backend == "onnxruntime"
        assert [(row.milliseconds, row.verdict) for row in told.measured][1] == (None, "OpenVino does not start today.")
        assert "the only one that agrees" in told.reason
        with pytest.raises(BackendError, match="OpenVino does not start today"):
            swin_deploy.load(digits(2), backend="openvino", precision="fp32")
        patch.setattr(OnnxRuntime, "__init__", fails)
        with pytest.raises(BackendError, match=r"No candidate runs this .*OnnxRuntime does not.*OpenVino does not start today"):
            taken()
    assert kept.read_bytes() == content
    assert taken() == first


def test_nothing_to_choose_is_not_measured(cache: Path) -> None:
    with swin_deploy.load(digits(2), backend="onnxruntime", precision="fp32") as model:
        assert model.describe().measured == ()
        assert model.describe().reason == "the only candidate on this machine"
    with swin_deploy.load(digits(2), backend="onnxruntime", device="cpu", precision="fp32") as model:
        assert model.describe().reason == "asked for by name"
    assert not cache.exists()


def test_no_place_for_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))  # not a folder: not even root can write into it
    monkeypatch.setattr(choice, "_measure", rows_of(2.0, 3.0))
    assert choose(Bundle.open(digits(2)), [ORT, OV], refuse, 0)[0] == ORT
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(choice.Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    monkeypatch.setattr(choice, "_measure", rows_of(3.0, 2.0))
    assert choose(Bundle.open(digits(2)), [ORT, OV], refuse, 0)[0] == OV


def test_auto_takes_every_precision_that_is_verified(cache: Path, tmp_path: Path) -> None:
    path = copied(2, tmp_path / "b")
    with swin_deploy.load(path, backend="onnxruntime") as model:
        assert [row.candidate.precision for row in model.describe().measured] == ["fp32", "fp16"]
    Bundle.open(path).with_entry("onnx/model_fp16.onnx", {"agreement": "not verified"})
    with swin_deploy.load(path, backend="onnxruntime") as model:
        assert (model.precision, model.describe().measured) == ("fp32", ())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"device": "tpu"}, 'Unknown device "tpu"'),
        ({"device": "cuda:x"}, "Unknown device"),
        ({"backend": "openvino", "device": "cuda"}, "openvino cannot run on cuda. Expected cpu"),
        ({"backend": "onnxruntime-tensorrt", "device": "cpu"}, "cannot run on cpu. Expected cuda"),
    ],
)
def test_devices_that_cannot_be_meant(arguments: dict[str, str], sentence: str) -> None:
    pytest.importorskip("openvino", reason="it would be missed first")
    with pytest.raises(UsageError, match=sentence):
        swin_deploy.load(digits(2), **arguments)


@pytest.mark.parametrize("backend", ["onnxruntime", "onnxruntime-tensorrt"])
def test_a_gpu_that_this_onnxruntime_has_no_provider_for(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told what to install, and nothing else is taken instead."""
    ort = pytest.importorskip("onnxruntime", reason="the back end under test")
    if "CUDAExecutionProvider" in ort.get_available_providers():
        pytest.skip("this ONNX Runtime has the CUDA provider")
    monkeypatch.setattr(swin_deploy.gpus, "cuda_driver", lambda: FakeDriver("sm_89"))
    with pytest.raises(MissingDependencyError, match=r'cannot run on cuda:1. Run: .*"swin-deploy\[gpu\]"'):
        swin_deploy.load(digits(2), backend=backend, device="cuda:1", precision="fp32")


@pytest.mark.parametrize("backend", ["onnxruntime", "onnxruntime-tensorrt", "torch"])
def test_without_a_gpu_nothing_is_to_be_installed(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    library = pytest.importorskip(backend.partition("-")[0], reason="the back end under test")
    if library.version.cuda if backend == "torch" else "CUDAExecutionProvider" in library.get_available_providers():
        pytest.skip(f"this {library.__name__} is built for CUDA, and says itself what is missing")
    monkeypatch.setattr(swin_deploy.gpus, "cuda_driver", lambda: None)
    with pytest.raises(UsageError, match=r"^Device cuda:1 is not available: .* no usable NVIDIA GPU\. Use the device cpu\.$"):
        swin_deploy.load(digits(2), backend=backend, device="cuda:1", precision="fp32")


def test_a_quantized_graph_that_onnxruntime_breaks_is_opened_with_fewer_optimizations(monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime 1.31 moves Q/DQ nodes and then Transposes of INT8 graphs of Swin V2 for TensorRT, and rejects the result."""
    ort, tried = pytest.importorskip("onnxruntime", reason="the back end under test"), []
    errors = ["Op (QuantizeLinear) [TypeInferenceError]", "Op (MatMul) [ShapeInferenceError] Incompatible dimensions"]

    def open_session(path: Path, **options: Any) -> str:
        tried.append(options)
        if len(tried) <= len(errors):
            raise RuntimeError(errors[len(tried) - 1])
        return "session"

    monkeypatch.setattr(onnxruntime_backend, "onnxruntime_session", open_session)
    assert onnxruntime_backend.opened(ort, Path("int8.onnx"), 1, ["CPUExecutionProvider"], "CPU") == "session"
    assert tried[1]["disabled_optimizers"] == ["QDQS8ToU8Transformer"]
    assert tried[2]["config"] == EXACT_QDQ
    tried.clear()
    errors.append("Op (MatMul) [ShapeInferenceError] Incompatible dimensions")
    assert onnxruntime_backend.opened(ort, Path("int8.onnx"), 1, ["CPUExecutionProvider"], "CPU") == "session"
    assert tried[3]["graph_optimization_level"] == ort.GraphOptimizationLevel.ORT_DISABLE_ALL


def test_the_plugin_for_tensorrt_for_rtx_is_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a plug-in that runs on the CPU: registered once, by its library, and the device is the one that was asked for."""
    ort = pytest.importorskip("onnxruntime", reason="the plug-in is its")
    name, calls = "NvTensorRTRTXExecutionProvider", []
    plugin = module("plugin", __version__="0.5.0", get_ep_name=lambda: name, get_library_path=lambda: "lib.so")
    monkeypatch.setitem(sys.modules, "onnxruntime_ep_nv_tensorrt_rtx", plugin)
    path = digits(2) / "onnx/model.onnx"
    monkeypatch.setattr(swin_deploy.gpus, "cuda_driver", lambda: None)
    with pytest.raises(UsageError, match=r"^Device cuda:0 is not available: .* no usable NVIDIA GPU\. Use the device cpu\.$"):
        swin_deploy.load(digits(2), backend="onnxruntime-tensorrt-rtx", device="cuda", precision="fp32")
    monkeypatch.setattr(swin_deploy.gpus, "cuda_driver", lambda: FakeDriver("sm_89", "sm_89"))
    monkeypatch.setattr(ort, "register_execution_provider_library", lambda *arguments: calls.append(arguments))
    devices = [SimpleNamespace(ep_name=name, number=number) for number in range(2)]
    monkeypatch.setattr(ort, "get_ep_devices", lambda: [SimpleNamespace(ep_name="CPUExecutionProvider"), *devices])
    monkeypatch.setattr(ort.SessionOptions, "add_provider_for_devices", lambda self, *arguments: calls.append(arguments))
    with pytest.raises(BackendError, match=f"could not start its plug-in provider {name}"):
        runtime_from_onnx(path, "onnxruntime-tensorrt-rtx", device="cuda")
    monkeypatch.setattr(ort.InferenceSession, "get_providers", lambda self: [name])
    with pytest.raises(UsageError, match=r"cuda:2 is not available to Nv.* supports 2 GPUs"):
        runtime_from_onnx(path, "onnxruntime-tensorrt-rtx", device="cuda:2")
    with runtime_from_onnx(path, "onnxruntime-tensorrt-rtx", device="cuda:1") as model:
        assert "NvTensorRTRTXExecutionProvider 0.5.0" in model.title
        feeds = {"pixel_values": np.zeros((2, 3, 32, 32), np.float32)}
        out = {"logits": np.full((2, 10), np.nan, np.float32)}
        assert model.run(feeds, out) is out
        assert np.array_equal(out["logits"], model.run(feeds)["logits"])
    assert calls == [(name, "lib.so"), (devices[:1], {}), (devices[1:], {})]


def test_a_back_end_that_is_not_installed_is_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "openvino", None)
    with pytest.raises(MissingDependencyError, match=r'"swin-deploy\[openvino\]"'):
        swin_deploy.load(digits(2), backend="openvino", precision="fp32")
    with swin_deploy.load(digits(2), precision="fp32") as model:
        assert model.describe().backend == "onnxruntime"
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(MissingDependencyError, match=r'No back end that runs models .*"swin-deploy\[onnxruntime\]"'):
        swin_deploy.load(digits(2), precision="fp32")
