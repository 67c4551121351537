"""Every option of an engine, asked of the real TensorRT for RTX compiler, and every refusal of one that it lacks."""

from __future__ import annotations

import contextlib
import itertools
import json
import multiprocessing
import re
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from cli.exported import copied, digits
from engine_graphs import SM89, attention, linear

import swin_deploy
from swin_deploy.bundle import Bundle
from swin_deploy.dependencies import onnxruntime_session
from swin_deploy.errors import EngineError, UsageError
from swin_deploy.exporters.engines.build import layers_file
from swin_deploy.exporters.engines.engine_from_onnx import engine_from_onnx
from swin_deploy.exporters.engines.layer_report import report_from_log, reports_by_profile
from swin_deploy.exporters.engines.targets import check_gpu, compiler_options, name_of_options
from swin_deploy.exporters.passes.attention import unfused
from swin_deploy.gpus import cuda_devices
from swin_deploy.option_parsers import batch, memory
from swin_deploy.options import RTX_LACKS, EngineSpec

trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX compiles the graphs of these tests")

no_gpu = pytest.mark.skipif(bool(cuda_devices()), reason="this machine has a GPU: what is told where there is none")


class Raw:
    """The compiler itself, without this package: what it makes of a graph when one thing of its configuration is set."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def compile(self, model: onnx.ModelProto, setting: Any) -> bytes | None:
        raw = self

        class Logger(trt.ILogger):  # type: ignore[misc]
            def log(self, severity: Any, message: str) -> None:
                raw.said.append(f"{severity.name}: {message}")

        logger = Logger()
        builder = trt.Builder(logger)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, logger)
        assert parser.parse(model.SerializeToString())
        config = builder.create_builder_config()
        config.num_compute_capabilities = 1
        config.set_compute_capability(trt.ComputeCapability.SM89, 0)
        setting(config)
        plan = builder.build_serialized_network(network, config)
        return None if plan is None else bytes(plan)


FLAGS: dict[str, Any] = {
    "hardware": lambda config: setattr(config, "hardware_compatibility_level", trt.HardwareCompatibilityLevel.AMPERE_PLUS),
    "version": lambda config: config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE),
    "stripped": lambda config: config.set_flag(trt.BuilderFlag.STRIP_PLAN),
}


@pytest.mark.parametrize("number", [87, 88, 90, 100, 103, 110, 122])
def test_the_compiler_knows_no_other_gpus(number: int) -> None:
    """Jetson Orin, H100, B200, B300 and Thor: neither by a name nor by their number, which the bindings would pass on."""
    raw = Raw()
    with contextlib.suppress(Exception):
        raw.compile(linear(), lambda config: config.set_compute_capability(trt.ComputeCapability(number), 0))
    assert any("Compute capability is invalid or not supported" in line for line in raw.said)
    with pytest.raises(UsageError, match=f"sm_{number}|SM90"):
        check_gpu("tensorrt-rtx", f"sm_{number}")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_turing_has_no_such_matmuls(precision: str) -> None:
    with pytest.raises(UsageError, match=f"no {precision} matmuls for sm_75"):
        swin_deploy.build_engine(digits(1), precision=precision, gpus="sm_75,sm_86", backend="tensorrt-rtx")


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_attention_that_is_not_fused(precision: str, tmp_path: Path) -> None:
    path = copied(1, tmp_path / "b")
    [fused] = swin_deploy.build_engine(path, precision=precision, gpus="sm_120")
    [built] = swin_deploy.build_engine(path, precision=precision, gpus="sm_120", fused_attention=False)
    figures = [[one.entry["profiles"][0][name] for one in (fused, built)] for name in ("fused_attention", "kernels")]
    assert figures[0] == [4, 0]
    assert figures[1][0] < figures[1][1]
    assert "-unfused-" in built.file
    assert built.entry["options"] == {"fused_attention": False}
    before = onnx.load(path / f"onnx/model_{precision}.onnx")
    inputs = np.random.default_rng(0).standard_normal((2, 3, 32, 32)).astype(np.float32)
    if precision == "fp16":
        runs = [
            onnxruntime_session(model.SerializeToString()).run(None, {"pixel_values": inputs})
            for model in (before, unfused(before))
        ]
        assert np.array_equal(runs[0][0], runs[1][0])


def compiled_with(flag: str) -> tuple[bytes | None, list[str]]:
    raw = Raw()
    return raw.compile(attention(1), FLAGS[flag]), raw.said


@pytest.mark.parametrize(
    ("flag", "sentence"),
    [
        ("hardware", "setHardwareCompatibilityLevel() is unsupported in TensorRT-RTX"),
        ("version", "libnvinfer_lean"),
        pytest.param("stripped", "CUDA_SUCCESS", marks=no_gpu),
    ],
)
def test_what_the_compiler_lacks(flag: str, sentence: str) -> None:
    """In a process of its own: the compiler speaks to the first logger that a process gave it."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        plan, said = pool.apply(compiled_with, (flag,))
    assert plan is None or flag == "hardware"
    assert any(sentence in line for line in said)


def level(number: int) -> Any:
    return lambda config: setattr(config, "builder_optimization_level", number)


def test_the_compiler_makes_the_same_of_every_optimization_level() -> None:
    """Why --optimization-level is refused. When this fails, a release has begun to heed it, and the refusal can go."""
    plans = [Raw().compile(attention(1), level(number)) for number in (0, 3, 5)]
    assert plans[0] is not None
    assert plans[0] == plans[1] == plans[2]


def test_the_compiler_does_nothing_with_a_timing_cache() -> None:
    def setting(config: Any) -> None:
        with pytest.warns(DeprecationWarning, match="Timing cache operations are no-ops in TensorRT-RTX"):
            config.set_timing_cache(config.create_timing_cache(b""), False)

    assert Raw().compile(attention(1), setting) is not None


OPTIONS = {"optimization_level": 5, "timing_cache": Path("timings"), "version_compatible": True, "hardware_compatible": True}


@pytest.mark.parametrize("option", RTX_LACKS)
def test_what_tensorrt_for_rtx_lacks_is_refused_with_the_reason(option: str) -> None:
    with pytest.raises(UsageError) as caught:
        EngineSpec(backend="tensorrt-rtx", gpus="sm_89", **{option: OPTIONS[option]})
    assert str(caught.value).startswith(f"TensorRT for RTX has no {RTX_LACKS[option]}. Leave out the option")
    assert getattr(EngineSpec(backend="tensorrt", gpus="sm_89", **{option: OPTIONS[option]}), option) == OPTIONS[option]


@no_gpu
def test_stripping_without_a_gpu_is_refused() -> None:
    with pytest.raises(EngineError, match="needs a GPU to build engines without weights"):
        EngineSpec(backend="tensorrt-rtx", gpus="sm_89", strip_weights=True)
    assert compiler_options(EngineSpec(backend="tensorrt", gpus="sm_89", strip_weights=True)) == {"strip_weights": True}


INVALID_RANGES = [(0, 1, 1), (4, 2, 8), (1, 8, 4), (1, 1), (1, 1, 1.0), (True, 1, 1)]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"workspace": 0}, "Invalid workspace 0"),
        ({"workspace": True}, "Invalid workspace True"),
        ({"optimization_level": 6}, "Invalid optimization_level: 6.*0 to 5"),
        ({"optimization_level": -1}, "Invalid optimization_level: -1"),
        ({"batches": ()}, r"Invalid batches: \(\).*one or more"),
        ({"batches": ((1, 8, 1 << 31),)}, "Invalid batch range"),
        *(({"batches": (one,)}, "Invalid batch range") for one in INVALID_RANGES),
        ({"timing_cache": Path("no/such/folder/timings")}, "timings is not a file in an existing folder"),
        ({"timing_cache": Path()}, "is not a file in an existing folder"),
    ],
)
def test_an_invalid_option(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        EngineSpec(backend="tensorrt", gpus="sm_89", **options)
    assert "\n" not in str(caught.value)


def test_sizes_in_words() -> None:
    sizes = {"2GiB": 2 << 30, "512mib": 512 << 20, "1.5 GiB": 3 << 29, "500MB": 500_000_000, "4096": 4096}
    assert {text: memory("workspace", text) for text in sizes} == sizes
    for text in ("", "0", "GiB", "2 giga", "-1GiB", "1e9", "0.1"):
        with pytest.raises(UsageError, match="Invalid workspace"):
            memory("workspace", text)
    assert [batch("batch", text) for text in ("8", "1:8:32")] == [(8, 8, 8), (1, 8, 32)]
    for text in ("", "8:1", "a", "1:2:3:4", "-1", "1:8:"):
        with pytest.raises(UsageError, match="MIN:OPT:MAX"):
            batch("batch", text)


def test_no_two_specs_share_their_words() -> None:
    sm89 = EngineSpec(backend="tensorrt", gpus="sm_89")
    specs = [
        replace(sm89, batches=profiles, workspace=workspace, optimization_level=level, version_compatible=version,
                hardware_compatible=hardware, strip_weights=stripped)
        for profiles in (((1, 1, 1),), ((8, 8, 8),), ((1, 8, 32),), ((1, 1, 1), (1, 8, 32)), ((1, 8, 32), (1, 1, 1)))
        for workspace in (None, 1, 1 << 30)
        for level in (None, 0, 5)
        for version, hardware, stripped in itertools.product((False, True), repeat=3)
    ]  # fmt: skip
    assert len({name_of_options(spec) for spec in specs}) == len(specs) == 360
    many = [
        replace(sm89, batches=tuple((1, n, m) for n in range(1, 40)), strip_weights=s) for m in (50, 51) for s in (False, True)
    ]
    assert len({name_of_options(spec) for spec in many}) == 4
    assert max(len(name_of_options(spec)) for spec in (*specs, *many)) <= 110
    assert all(re.fullmatch(r"[a-z0-9_-]*", name_of_options(spec)) for spec in (*specs, *many))


def test_the_workspace_is_a_limit() -> None:
    """A fused attention needs some; the compiler says how much it asked for."""
    model = attention().SerializeToString()
    assert engine_from_onnx(model, replace(SM89, workspace=1 << 30)).plan
    with pytest.raises(
        EngineError, match=r"could not compile the graph for sm_89: .*Requested size was \d+ bytes.*enough memory"
    ):
        engine_from_onnx(model, replace(SM89, workspace=1024))


def test_every_batch_is_an_optimisation_profile_with_a_report_of_its_own() -> None:
    profiles = ((1, 1, 1), (1, 4, 8), (2, 2, 2))
    model = attention().SerializeToString()
    single = [engine_from_onnx(model, replace(SM89, batches=(one,))) for one in profiles]
    engine = engine_from_onnx(model, replace(SM89, batches=profiles))
    assert [report.kernels for report in engine.reports] == [one.report.kernels for one in single]
    assert [report.bytes_moved for report in engine.reports] == [one.report.bytes_moved for one in single]
    assert [report.fused_attention for report in engine.reports] == [1, 1, 1]
    assert engine.report is engine.reports[0]
    assert len(engine.plan) > max(len(one.plan) for one in single)


def test_profiles_that_cannot_be_told_apart_leave_every_figure_unsaid() -> None:
    line = "Name: {}, LayerType: kgen, Inputs: [], Outputs: [ {{ Name: z, Dimensions: [2], Datatype: Half }}], TacticName: t"
    for names in (("a_myl0_0", "b"), ("a_myl0_0", "b_myl0_1"), ("a_myl0_0", "b_myl2_0")):
        report = report_from_log([line.format(name) for name in names])
        assert report.kernels == 2
        first, second = reports_by_profile(report, 2)
        assert (first.kernels, second.kernels, first.bytes_moved) == (None, None, None)
        assert reports_by_profile(report, 1) == (report,)


def test_a_profile_that_is_impossible_is_told_in_the_words_of_the_compiler() -> None:
    most = (1 << 31) - 1
    spec = replace(SM89, batches=((1_000_000, most, most),))
    with pytest.raises(EngineError, match="kOPT values for profile 0 violate shape constraints: x: tensor volume exceeds"):
        engine_from_onnx(linear().SerializeToString(), spec)
    two = replace(SM89, batches=((1, 1, 1), (4, 4, 4)))
    with pytest.raises(UsageError, match=r"fixed batch of 4.*\(1, 1, 1\), \(4, 4, 4\)"):
        engine_from_onnx(linear(4).SerializeToString(), two)


def test_the_progress_of_two_profiles_is_told() -> None:
    steps: list[tuple[str, int, int]] = []
    spec = replace(SM89, batches=((1, 1, 1), (1, 4, 8)), progress=lambda *step: steps.append(step))
    engine_from_onnx(linear().SerializeToString(), spec)
    assert {"Building engine", "Optimizing graph"} <= {phase for phase, _, _ in steps}
    assert all(0 <= step <= count for _, step, count in steps)


def test_a_thread_that_waits_finds_what_the_first_one_compiled(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Two builds of one engine in one process; tests/cli has those of two processes."""
    path, built = copied(2, tmp_path / "b"), []

    def build() -> None:
        built.extend(swin_deploy.build_engine(path, gpus=["sm_89"]))

    threads = [threading.Thread(target=build) for _ in range(3)]
    with caplog.at_level("INFO", "swin_deploy.exporters"):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(one.reused for one in built) == [False, True, True]
    assert len({one.entry["sha256"] for one in built}) == 1
    assert sum(line.startswith("Compiling") for line in caplog.messages) == 1


def test_the_layers_are_kept_beside_the_engine(tmp_path: Path) -> None:
    path = copied(1, tmp_path / "b")
    [built] = swin_deploy.build_engine(path, gpus=["sm_89"], batches=[(1, 1, 1), (1, 4, 8)], workspace=1 << 30)
    assert built.file == f"engines/fp16-b1-b1_4_8-workspace1073741824-sm_89-tensorrt-rtx-{trt.__version__}.engine"
    assert built.entry["options"] == {"workspace": 1 << 30}
    kept = json.loads(Bundle.open(path).verified_path(layers_file(built.file)).read_text())
    for profile, figures in zip(kept["profiles"], built.entry["profiles"], strict=True):
        assert "layers" not in figures
        assert {**figures, "layers": profile["layers"]} == profile
        with_outputs = sum(bool(layer["outputs"]) and layer["kind"] != "shape_call" for layer in profile["layers"])
        assert with_outputs >= figures["kernels"] > 0
    assert [profile["batch"] for profile in kept["profiles"]] == [[1, 1, 1], [1, 4, 8]]
    [other] = swin_deploy.build_engine(path, gpus=["sm_89"])
    assert (other.file, other.reused) == (f"engines/fp16-sm_89-tensorrt-rtx-{trt.__version__}.engine", False)
