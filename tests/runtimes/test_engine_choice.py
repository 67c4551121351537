"""Which engine of a bundle is run here, and of each other one the sentence that says why not, with a command that works."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxruntime", reason="the simulated TensorRT computes with it")

from cli.exported import THREE, cli_here, copied, digits, refused, result
from engine_bundles import bundle_of, with_engines
from fake_gpu import RELEASES, install, simulated
from once import once

import swin_deploy
import swin_deploy.gpus
from swin_deploy.bench.run import plan_cases
from swin_deploy.bench.worker import open_request
from swin_deploy.bundle import Bundle
from swin_deploy.doctor.checks import InstalledGpu, run_engine
from swin_deploy.errors import BackendError, EngineError, MissingDependencyError, SwinDeployError, UsageError
from swin_deploy.exporters.engines.targets import target_gpu
from swin_deploy.options import BenchSpec
from swin_deploy.runtimes.gpu.engine_fit import engines_here, fitting_engines, incompatibility, rebuild_command

BATCHES = ((1, 1, 1), (1, 4, 8))


def compiled() -> Path:
    """The digits bundle with a real engine for sm_89 and two profiles."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX compiles the engine")

    def make(path: Path) -> None:
        copied(2, path)
        swin_deploy.build_engine(path, precision="fp16", backend="tensorrt-rtx", gpus=("sm_89",), batches=BATCHES)

    return once("digits-with-engine", make)


def on_gpus(patch: pytest.MonkeyPatch, *gpus: str) -> None:
    """A machine with these GPUs, as far as the driver is asked what there is; without any it has no driver."""
    if gpus:
        install(patch, *gpus)
    else:
        patch.setattr(swin_deploy.gpus, "cuda_driver", lambda: None)


def engine_of(path: Path) -> str:
    [file] = [file for file in Bundle.open(path).files if file.endswith(".engine")]
    return file


def no_gpu_sentence(backend: str) -> str:
    return f"The back end {backend} needs an NVIDIA GPU, and this machine has no usable one."


def again(path: Path, gpu: str) -> str:
    return f"swin-deploy build-engine {path} --fp16 --backend tensorrt-rtx --gpu {gpu} --batch 1 --batch 1:4:8"


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    on_gpus(monkeypatch)
    path = shutil.copytree(compiled(), tmp_path / "b")
    for call in (swin_deploy.load, swin_deploy.verify):
        with pytest.raises(UsageError, match=no_gpu_sentence("tensorrt-rtx")):
            call(path, backend="tensorrt-rtx", **({"precision": "fp16"} if call is swin_deploy.load else {"device": "cuda"}))
    arguments = ("b", "--backend", "tensorrt-rtx")
    refused(cli_here("verify", *arguments, "--device", "cuda", cwd=tmp_path), no_gpu_sentence("tensorrt-rtx"))
    refused(cli_here("verify", *arguments, cwd=tmp_path), "The back end tensorrt-rtx runs on cuda, not on cpu")
    refused(cli_here("predict", *arguments, str(THREE), cwd=tmp_path), no_gpu_sentence("tensorrt-rtx"))
    refused(cli_here("predict", *arguments, "--device", "cpu", str(THREE), cwd=tmp_path), "cannot run on cpu")
    refused(cli_here("bench", *arguments, cwd=tmp_path), no_gpu_sentence("tensorrt-rtx"))
    images = str(THREE.parent)
    refused(cli_here("evaluate", *arguments, "--data", images, cwd=tmp_path), no_gpu_sentence("tensorrt-rtx"))
    with swin_deploy.load(path) as model:  # auto passes over it
        assert model.describe().device == "cpu"
    row = run_engine(Bundle.open(path), engine_of(path), Bundle.open(path).files[engine_of(path)], ())
    assert (row.works, row.backend, row.precision) == (False, "tensorrt-rtx", "fp16")
    assert row.message.startswith(f"{engine_of(path)} was compiled for sm_89, and this machine has no usable NVIDIA GPU.")


def test_each_way_not_to_fit_and_the_command_that_puts_it_right(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path, release = Path(shutil.copytree(compiled(), tmp_path / "b")), str(sys.modules["tensorrt_rtx"].__version__)
    bundle, file = Bundle.open(path), engine_of(path)
    entry = dict(bundle.files[file])

    def sentence(**changes: Any) -> str:
        Bundle.open(path).with_entry(file, {**entry, **changes})
        with pytest.raises(EngineError) as caught:
            swin_deploy.load(path, backend="tensorrt-rtx", precision="fp16")
        gpus = tuple(InstalledGpu("", capability, None) for capability in here)
        row = run_engine(Bundle.open(path), file, Bundle.open(path).files[file], gpus)
        assert (row.works, row.message) == (False, str(caught.value))  # doctor and load say the same
        return str(caught.value)

    here = ["sm_86"]
    on_gpus(monkeypatch, *here)
    assert sentence() == f'{file} was compiled for sm_89, and this machine has sm_86. Compile it with "{again(path, "sm_86")}".'
    here = ["sm_89"]
    on_gpus(monkeypatch, *here)
    assert sentence(backend_version="1.6.0.42") == (
        f"{file} needs tensorrt-rtx 1.6.0.42; installed: {release}. Install that release, or compile the engine with "
        f'"{again(path, "sm_89")}".'
    )
    assert sentence(options={"strip_weights": True}) == (
        f'{file} was compiled without its weights. Add them with "swin-deploy refit {path}".'
    )
    assert sentence(parent="0" * 64) == (
        f'{file} was compiled from another version of onnx/model_fp16.onnx. Compile it again with "{again(path, "sm_89")}".'
    )
    Bundle.open(path).with_entry(file, entry)
    with pytest.raises(UsageError, match=r"Unknown device \"cuda:2\". Choose one of: cuda:0 \(Simulated GPU\)"):
        swin_deploy.load(path, backend="tensorrt-rtx", precision="fp16", device="cuda:2")
    with pytest.raises(UsageError, match=r"has no int8 engine for tensorrt-rtx, only fp16. Build it with"):
        swin_deploy.load(path, backend="tensorrt-rtx", precision="int8")
    monkeypatch.setitem(sys.modules, "tensorrt", sys.modules["tensorrt_rtx"])
    with pytest.raises(UsageError, match=rf'has no fp16 engine for tensorrt. Build it .*{path} --fp16 --backend tensorrt"'):
        swin_deploy.load(path, backend="tensorrt", precision="fp16")
    with swin_deploy.load(path, backend="onnxruntime", precision="fp16") as model:  # the graph beside it
        assert model.run({"pixel_values": np.zeros((1, 3, 32, 32), np.float32)})["logits"].shape == (1, 10)


def test_a_quantised_graph_that_was_made_again_for_another_target(tmp_path: Path) -> None:
    """build-engine refuses that one, so it is made for TensorRT again first; both commands as they are printed."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX compiles the engine")
    pytest.importorskip("onnx_graphsurgeon", reason="graphs are rewritten with onnx-graphsurgeon")
    path, images = bundle_of(tmp_path / "a bundle"), THREE.parent
    quantize = ("quantize", path, "--data", images, "--samples", "2")
    assert cli_here(*quantize, cwd=tmp_path).returncode == 0
    [built] = swin_deploy.build_engine(path, precision="int8", backend="tensorrt-rtx", gpus=("sm_89",))
    release = str(built.entry["backend_version"])
    assert incompatibility(Bundle.open(path), built.file, ["sm_89"], release) is None
    assert cli_here(*quantize, "--target", "onnxruntime", cwd=tmp_path).returncode == 0
    said = str(incompatibility(Bundle.open(path), built.file, ["sm_89"], release))
    assert "Create the graph for TensorRT with" in said
    for command in re.findall(r'"(.*?)"', said):
        done = cli_here(*shlex.split(command.replace(" DIR", f" {shlex.quote(str(images))}"))[1:], cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert incompatibility(Bundle.open(path), built.file, ["sm_89"], release) is None


def test_the_command_makes_an_engine_that_fits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As it is printed. TensorRT itself then finds no driver here, and that is said, too."""
    path = Path(shutil.copytree(compiled(), tmp_path / "a bundle"))
    on_gpus(monkeypatch, "sm_86")
    with pytest.raises(EngineError) as caught:
        swin_deploy.load(path, backend="tensorrt-rtx", precision="fp16")
    match = re.search(r'Compile it with "(.*)"\.$', str(caught.value))
    assert match is not None
    command = shlex.split(match[1])
    assert command[0] == "swin-deploy"
    result(cli_here(*command[1:], "--json", cwd=tmp_path))
    [made] = engines_here(Bundle.open(path), "tensorrt-rtx", "cuda:0").values()
    assert (made["gpu"], [profile["batch"] for profile in made["profiles"]]) == ("sm_86", [list(batch) for batch in BATCHES])
    with pytest.raises(BackendError, match=r"TensorRT for RTX .* cannot run .*-sm_86-.*: .*CUDA driver.*compile it again"):
        swin_deploy.load(path, backend="tensorrt-rtx", precision="fp16")


def test_rebuilt_when_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = Path(shutil.copytree(compiled(), tmp_path / "b"))
    on_gpus(monkeypatch, "sm_86")
    times = []
    for precision in ("auto", "fp16"):
        with pytest.raises(BackendError, match=r"cannot run .*-sm_86-.*\.engine"):  # there is no driver for TensorRT to run it
            swin_deploy.load(path, backend="tensorrt-rtx", precision=precision, rebuild=True)
        [(file, made)] = engines_here(Bundle.open(path), "tensorrt-rtx", "cuda:0").items()
        assert (made["precision"], made["gpu"]) == ("fp16", "sm_86")
        assert [tuple(profile["batch"]) for profile in made["profiles"]] == list(BATCHES)
        times.append((path / file).stat().st_mtime_ns)
    assert times[0] == times[1]  # it fits now, and is not compiled again
    named = {"backend": "tensorrt-rtx", "precision": "fp16"}
    for options, sentence in (
        ({"precision": "fp16"}, "rebuild compiles an engine again and needs its back end, not auto"),
        ({**named, "precision": "fp99"}, 'Unknown precision "fp99"'),
        ({**named, "precision": "int8"}, "has no int8 engine"),
        ({**named, "device": "cpu"}, "cannot run on cpu"),
    ):
        with pytest.raises(UsageError, match=sentence):
            swin_deploy.load(path, rebuild=True, **options)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(MissingDependencyError, match=r'"swin-deploy\[tensorrt-rtx\]"'):
        swin_deploy.load(path, backend="tensorrt-rtx", precision="fp16", rebuild=True)


FITS = [
    # (what the manifest says, the GPU, the release that is installed, whether it fits)
    ({}, "sm_89", "11.4.0.106", True),
    ({}, "sm_86", "11.4.0.106", False),
    ({}, "sm_89", "11.4.1.6", False),
    ({"hardware_compatible": True}, "sm_86", "11.4.0.106", True),
    ({"hardware_compatible": True}, "sm_120", "11.4.0.106", True),
    ({"hardware_compatible": True}, "sm_75", "11.4.0.106", False),
    ({"hardware_compatible": True}, "sm_86", "11.4.1.6", False),
    ({"version_compatible": True}, "sm_89", "11.4.1.6", True),
    ({"version_compatible": True}, "sm_89", "11.3.9.1", False),
    ({"version_compatible": True}, "sm_89", "12.0.0.1", False),
    ({"version_compatible": True}, "sm_86", "11.5.0.1", False),
    ({"version_compatible": True, "hardware_compatible": True}, "sm_80", "11.5.0.1", True),
    ({"refitted": True}, "sm_89", "11.4.0.106", True),
    ({}, "sm_89", None, False),
    ({"version_compatible": True}, "sm_89", "11.0.0.1", True),  # these were compiled with 10.12
    ({"version_compatible": True}, "sm_89", "10.11.0.33", False),
    ({}, "sm_89", "11.0.0.1", False),
]


@pytest.mark.parametrize(("options", "gpu", "release", "fits"), FITS)
def test_what_options_allow(options: dict[str, bool], gpu: str, release: str | None, fits: bool, tmp_path: Path) -> None:
    path = copied(1, tmp_path / "b")
    made = "10.12.0.36" if release in ("11.0.0.1", "10.11.0.33") else RELEASES["tensorrt"]
    [file] = with_engines(path, "tensorrt", options=options, backend_version=made)
    for gpus in ([gpu], ["sm_75", gpu]):
        assert (incompatibility(Bundle.open(path), file, gpus, release) is None) == fits


def test_the_command_repeats_every_option(tmp_path: Path) -> None:
    path = copied(1, tmp_path / "b")
    options = {"workspace": 1 << 30, "optimization_level": 5, "version_compatible": True, "hardware_compatible": True}
    [file] = with_engines(path, "tensorrt", "fp16", profiles=((1, 8, 32),), options={**options, "refitted": True})
    assert rebuild_command(Bundle.open(path), file, ["sm_86"]) == (
        f"swin-deploy build-engine {path} --fp16 --backend tensorrt --batch 1:8:32 --workspace 1073741824 "
        "--optimization-level 5 --version-compatible --hardware-compatible"
    )


def test_the_command_for_another_gpu_than_the_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Full TensorRT compiles for the first GPU that it sees, and so does nothing for another one by itself."""
    path = copied(1, tmp_path / "b")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with simulated(monkeypatch, "sm_89", "sm_86"):
        with pytest.raises(UsageError, match=rf'"CUDA_VISIBLE_DEVICES=1 swin-deploy build-engine {path} --fp16 --backend tens'):
            swin_deploy.load(path, backend="tensorrt", precision="fp16", device="cuda:1")
        with pytest.raises(UsageError, match=rf'"swin-deploy build-engine {path} --fp16 --backend tensorrt-rtx --gpu sm_86"'):
            swin_deploy.load(path, backend="tensorrt-rtx", precision="fp16", device="cuda:1")
        [first] = with_engines(path, "tensorrt")
        command = f'"CUDA_VISIBLE_DEVICES=1 swin-deploy build-engine {path} --fp32 --backend tensorrt --batch 1 --batch 1:4:8"'
        said = f"{first} was compiled for sm_89, and this machine has sm_86. Compile it with {command}."
        for rebuild in (False, True):
            with pytest.raises(EngineError) as caught:
                swin_deploy.load(path, backend="tensorrt", precision="fp32", device="cuda:1", rebuild=rebuild)
            assert str(caught.value) == said
        [stripped] = with_engines(path, "tensorrt", gpu="sm_86", options={"strip_weights": True}, seconds=1.0)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-5e")
        assert str(incompatibility(Bundle.open(path), stripped, ["sm_86"], RELEASES["tensorrt"])).endswith(
            f'Add them with "CUDA_VISIBLE_DEVICES=GPU-5e swin-deploy refit {path}".'
        )
        with pytest.raises(EngineError, match=r"must be refitted.*Run this with CUDA_VISIBLE_DEVICES=GPU-5e before it\."):
            swin_deploy.refit(path)
        with pytest.raises(EngineError, match=r"asked for sm_86.*run this with CUDA_VISIBLE_DEVICES=GPU-5e before it"):
            target_gpu("tensorrt", "sm_86")
        with pytest.raises(EngineError, match=r"asked for sm_120.*run this on the target machine"):
            target_gpu("tensorrt", "sm_120")
        [rtx] = with_engines(path, "tensorrt-rtx")
        assert rebuild_command(Bundle.open(path), rtx, ["sm_86"]).startswith("swin-deploy build-engine ")
        assert rebuild_command(Bundle.open(path), first, ["sm_89"]).startswith("swin-deploy build-engine ")
        assert rebuild_command(Bundle.open(path), first, ["sm_120"]).startswith("swin-deploy build-engine ")


def test_of_several_engines_the_last_one_that_fits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = copied(1, tmp_path / "b")
    with simulated(monkeypatch, "sm_89"):
        [one] = with_engines(path, "tensorrt", profiles=((1, 1, 1),))
        [eight] = with_engines(path, "tensorrt", profiles=((1, 8, 8),))
        [elsewhere] = with_engines(path, "tensorrt", gpu="sm_86")
        assert fitting_engines(Bundle.open(path), "tensorrt", "fp32", "cuda:0") == {(32, 32): eight}
        assert [*engines_here(Bundle.open(path), "tensorrt", "cuda:0")] == [one, eight]
        with_engines(path, "tensorrt", profiles=((1, 1, 1),))  # made again
        with swin_deploy.load(path, backend="tensorrt", precision="fp32") as model:
            assert model.describe().graphs == {(32, 32): one}
            assert model.describe().reason == "the only candidate on this machine"
        assert incompatibility(Bundle.open(path), elsewhere, ["sm_86"], RELEASES["tensorrt"]) is None


def test_auto_takes_engines_that_fit_and_are_correct(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = copied(1, tmp_path / "b")
    with simulated(monkeypatch):
        with_engines(path, "tensorrt")
        with_engines(path, "tensorrt-rtx", gpu="sm_86")
        with swin_deploy.load(path, precision="fp32") as model:
            rows = {str(row.candidate): row for row in model.describe().measured}
            assert "tensorrt fp32 on cuda:0" in rows
            assert rows["tensorrt fp32 on cuda:0"].verdict.startswith("verified (relative L2")
            assert not any(name.startswith("tensorrt-rtx") for name in rows)
            fastest = min(rows.values(), key=lambda row: row.milliseconds or 0)
            assert model.describe().backend == fastest.candidate.backend
        with_engines(path, "tensorrt", "fp16")
        with swin_deploy.load(path, backend="tensorrt", precision="auto") as model:
            assert [row.candidate.precision for row in model.describe().measured] == ["fp32", "fp16"]


def test_auto_names_what_was_never_verified_and_the_command_for_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The graphs were made where there was nothing to run them with. The command is run as it is printed."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = copied(2, tmp_path / "a bundle")
    with simulated(monkeypatch):
        with_engines(path, "tensorrt", "fp16")
        for graph in Bundle.open(path).graphs:
            Bundle.open(path).with_entry(graph, {"agreement": "not verified"})
        with pytest.raises(UsageError, match=r"never compared with PyTorch: onnx/model.onnx, onnx/model_fp16.onnx\."):
            swin_deploy.load(path)
        with pytest.raises(UsageError, match=r"never compared with PyTorch: onnx/model_fp16.onnx\.") as caught:
            swin_deploy.load(path, backend="tensorrt")
        match = re.search(r'Run "(.*)", or name a precision\.$', str(caught.value))
        assert match is not None
        with swin_deploy.load(path, backend="tensorrt", precision="fp16") as model:  # named, it is taken
            assert model.precision == "fp16"
        images = str(THREE.parent)
        result(cli_here("evaluate", str(path), "--data", images, "--precision", "fp32", "--json", cwd=tmp_path))
        command = shlex.split(match[1])
        assert command == ["swin-deploy", "verify", str(path)]
        result(cli_here(*command[1:], "--json", cwd=tmp_path))
        agreements = [entry["agreement"] for entry in Bundle.open(path).graphs.values()]
        assert all(agreement["verified"] and agreement["relative_l2"] < 1e-2 for agreement in agreements)
        with swin_deploy.load(path, backend="tensorrt") as model:
            assert model.precision == "fp16"


def test_what_does_not_agree_is_not_entered_as_verified(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = copied(2, tmp_path / "b")
    bundle, file = Bundle.open(path), "onnx/model_fp16.onnx"
    graph = (digits(1) / file).read_bytes()  # of another network
    bundle.with_file(file, {**bundle.files[file], "agreement": "not verified"}, lambda place: place.write_bytes(graph))
    assert [verdict.verified for verdict in swin_deploy.verify(path)] == [True, False]
    assert Bundle.open(path).files[file]["agreement"] == "not verified"


def test_no_provider_for_the_gpu_that_was_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Only ONNX Runtime for CPUs is installed on a machine with a GPU."""
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    path = copied(2, tmp_path / "b")
    on_gpus(monkeypatch, "sm_89")
    with pytest.raises(
        MissingDependencyError, match=r'No installed back end runs graphs on cuda:0\. Run: pip .*"swin-deploy\[gpu\]"'
    ):
        swin_deploy.load(path, device="cuda")


def test_verify_evaluate_predict_and_bench_run_engines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path, images = copied(2, tmp_path / "b"), THREE.parent
    with simulated(monkeypatch):
        files = with_engines(path, "tensorrt", "fp16") + with_engines(path, "tensorrt", "fp32")
        [other] = with_engines(path, "tensorrt", "fp16", gpu="sm_86")
        on = ("b", "--backend", "tensorrt", "--json")
        found: Any = result(cli_here("verify", *on, "--device", "cuda", cwd=tmp_path))
        assert [(row["file"], row["verified"], row["backend"]) for row in found["graphs"]] == [
            (file, True, f"tensorrt {RELEASES['tensorrt']}") for file in files
        ]
        assert found["not_verified"] == [other]
        [prediction] = result(cli_here("predict", *on, "--precision", "fp16", str(THREE), cwd=tmp_path))  # type: ignore[misc]
        assert prediction["predictions"][0]["label"] == "three"
        scores: Any = result(cli_here("evaluate", *on, "--data", str(images), cwd=tmp_path))
        rows = [(row["file"], row["precision"], row["backend"].split()[0]) for row in scores["graphs"]]
        assert rows == [
            ("onnx/model.onnx", "fp32", "onnxruntime"),
            (files[1], "fp32", "tensorrt"),
            (files[0], "fp16", "tensorrt"),
        ]
        assert scores["graphs"][1]["relative_l2"] == 0  # the same graph, computed by the same library
        assert 0 < scores["graphs"][2]["relative_l2"] < 1e-2
        assert scores["not_evaluated"] == [other]
        refused(
            cli_here("evaluate", *on, "--data", str(images), "--precision", "bf16", cwd=tmp_path), "no bf16 engine that runs"
        )
        requests = plan_cases(Bundle.open(path), BenchSpec(batches=1))
        assert {(c.backend, c.precision) for c in requests if c.backend == "tensorrt"} == {
            ("tensorrt", "fp16"),
            ("tensorrt", "fp32"),
        }
        assert not [c for c in requests if c.backend == "tensorrt-rtx"]  # no engine for it
        in_bf16 = plan_cases(Bundle.open(path), BenchSpec(precisions="bf16", batches=1))
        assert not [c for c in in_bf16 if c.backend.startswith("tensorrt")]  # nor one in that precision
        assert [c.device for c in requests if c.backend == "tensorrt"] == ["cuda:0"] * 2
        with pytest.raises(SwinDeployError, match="has no engine for tensorrt-rtx"):
            plan_cases(Bundle.open(path), BenchSpec(backends="tensorrt-rtx"))
        with open_request({"bundle": str(path), "engine": files[0], "device": "cuda:0"}) as runtime:  # as doctor's process does
            assert runtime.run({"pixel_values": np.zeros((3, 3, 32, 32), np.float32)})["logits"].shape == (3, 10)


def test_a_verdict_of_an_engine_that_is_wrong(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = copied(2, tmp_path / "b")
    with simulated(monkeypatch):
        [file] = with_engines(path, "tensorrt", "fp16")
        bundle, other = Bundle.open(path), copied(2, tmp_path / "other")
        content = json.loads((path / file).read_text())
        content["graph"] = str(other / "onnx/model_fp16.onnx")
        (other / "onnx/model_fp16.onnx").write_bytes((digits(1) / "onnx/model_fp16.onnx").read_bytes())  # of another network
        facts = dict(bundle.files[file])
        bundle = bundle.with_file(file, facts, lambda place: place.write_text(json.dumps(content)))
        [verdict] = swin_deploy.verify(path, backend="tensorrt", device="cuda")
        assert not verdict.verified
        done = cli_here("verify", "b", "--backend", "tensorrt", "--device", "cuda", cwd=tmp_path)
        assert (done.returncode, "--no-fused-attention" in done.stderr) == (1, False)
        facts["profiles"] = [{**dict(profile), "fused_attention": 4} for profile in facts["profiles"]]
        bundle.with_file(file, facts, lambda place: place.write_text(json.dumps(content)))
        done = cli_here("verify", "b", "--backend", "tensorrt", "--device", "cuda", cwd=tmp_path)
        command = 'swin-deploy build-engine b --fp16 --backend tensorrt --batch 1 --batch 1:4:8 --no-fused-attention"'
        assert command in done.stderr
