"""quantize as a user runs it: for each target, what the manifest keeps, the engine, the accuracy, refusals."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from cli.exported import EXAMPLES, WEIGHTS, cli_here, contents, copied, digits_split, one_block, refused, result
from PIL import Image

import swin_deploy
from swin_deploy.bench.run import bench
from swin_deploy.bundle import Bundle
from swin_deploy.errors import BackendError, InputError, UsageError, VerificationError
from swin_deploy.exporters import typed_graphs as graphs
from swin_deploy.exporters.quantization.qdq import linear_layers

pytest.importorskip("onnxruntime", reason="ranges are measured with ONNX Runtime")
datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn has the digits")

IMAGES = EXAMPLES / "digits/images"


@pytest.fixture(scope="module")
def digits_data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Files of images: digits that the networks were trained on, and those that they were not."""
    data, folder = digits_split(), tmp_path_factory.mktemp("digits-data")
    np.savez(folder / "train.npz", images=data.train_images[:64])
    np.savez(folder / "test.npz", images=data.test_images[::3], labels=data.test_digits[::3])
    return folder / "train.npz", folder / "test.npz"


@pytest.mark.parametrize("version", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_for_tensorrt(version: int, digits_data: tuple[Path, Path], tmp_path: Path) -> None:
    """INT8 loses at most 0.3 points of top-1 on held-out digits, FP8 0.15, and engines take no more kernels than fp16."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX compiles the engines")
    path = copied(version, tmp_path / "b")
    train, test = digits_data
    kernels = {}
    for precision in ("int8", "fp8", "fp16"):
        if precision != "fp16":
            [score] = result(cli_here("quantize", "b", f"--{precision}", "--data", train, "--json", cwd=tmp_path))["graphs"]
            entry = Bundle.open(path).graphs[f"onnx/model_{precision}.onnx"]
            assert entry["calibration"]["samples"] == 64
            assert entry["on_samples"] == score
            assert score["sqnr_db"] > {"int8": 38, "fp8": 29}[precision]
        [engine] = result(cli_here("build-engine", "b", f"--{precision}", "--gpu", "sm_89", "--json", cwd=tmp_path))
        assert engine["precision"] == precision
        assert engine["profiles"][0]["fused_attention"] == 4
        kernels[precision] = engine["profiles"][0]["kernels"]
    assert max(kernels.values()) == kernels["fp16"]

    found = swin_deploy.evaluate(path, test)
    top1 = {score.precision: 100 * float(score.top1 or 0) for score in found.scores}
    assert top1["fp32"] - top1["int8"] <= 0.3
    assert top1["fp32"] - top1["fp8"] <= 0.15
    assert all(verdict.verified for verdict in swin_deploy.verify(path))


def onnx_metadata(file: Path) -> dict[str, str]:
    return {one.key: one.value for one in onnx.load(file).metadata_props}


@pytest.mark.parametrize(("target", "backend"), [("onnxruntime", "onnxruntime"), ("openvino", "openvino")])
def test_for_a_cpu(
    target: str, backend: str, digits_data: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(backend, reason="runs the graph")
    train, test = digits_data
    path = tmp_path / "b"
    if target == "onnxruntime":
        swin_deploy.export(weights=WEIGHTS[2], output=path, target=target)
        [_, score] = swin_deploy.quantize(path, train).scores
    else:  # a bundle for TensorRT has a form that OpenVINO runs as well
        copied(2, path)
        refused(cli_here("quantize", "b", "--data", train, "--target", target, cwd=tmp_path), "too small to be faster")
        monkeypatch.setattr("swin_deploy.exporters.quantization.for_cpu.SMALL", 1 << 10)
        [_, score] = swin_deploy.quantize(path, train, target=target).scores
    assert score.sqnr_db is not None
    assert score.sqnr_db > 44
    entry = Bundle.open(path).graphs["onnx/model_int8.onnx"]
    assert {layer["type"] for layer in entry["layers"]} == {"int8"}
    assert {layer["name"].rpartition(".")[2] for layer in entry["layers"]} >= {"fc1", "fc2"}
    found = swin_deploy.evaluate(path, test, backend=backend)
    top1 = {one.precision: 100 * float(one.top1 or 0) for one in found.scores}
    assert top1["fp32"] - top1["int8"] <= 0.3
    with swin_deploy.load(path, precision="int8", backend=backend) as model:
        assert [found[0].label for found in model.classify([IMAGES / "3.png", IMAGES / "7.png"])] == ["three", "seven"]
    assert entry["sum_bits"] == 16
    assert onnx_metadata(path / "onnx/model_int8.onnx")["sum_bits"] == "16"
    if target == "onnxruntime":
        written = (path / "onnx/model_int8.onnx").stat().st_mtime_ns
        swin_deploy.quantize(path, train)
        assert (path / "onnx/model_int8.onnx").stat().st_mtime_ns == written
        monkeypatch.setattr("swin_deploy.exporters.quantization.for_cpu.ALGORITHM", 1000)  # it is of another release
        swin_deploy.quantize(path, train)
        assert (path / "onnx/model_int8.onnx").stat().st_mtime_ns > written
        refused(cli_here("quantize", "b", "--fp8", "--data", train, cwd=tmp_path), "does not compute in FP8")
        refused(cli_here("quantize", "b", "--data", train, "--target", "tensorrt", cwd=tmp_path), "exported for onnxruntime")
        for precision in ("fp16", "fp8"):
            with pytest.raises(UsageError, match='Export it with "--target tensorrt" first'):
                swin_deploy.load(path, backend=backend, precision=precision)
    elif importlib.util.find_spec("tensorrt_rtx") is not None:
        refused(
            cli_here("build-engine", "b", "--int8", cwd=tmp_path), "an INT8 graph for openvino only", "swin-deploy quantize b"
        )


def test_the_command_that_is_named_for_a_missing_graph_makes_it(tmp_path: Path) -> None:
    path = copied(1, tmp_path / "a bundle")
    if importlib.util.find_spec("openvino") is not None:
        for precision, remedy in {"int8": "a bundle' --int8 --target openvino --data DIR", "fp8": "use int8"}.items():
            with pytest.raises(UsageError, match=remedy):
                swin_deploy.load(path, backend="openvino", precision=precision)
    with pytest.raises(UsageError, match="has no int8 graph") as refusal:
        swin_deploy.load(path, backend="onnxruntime", precision="int8")
    _, verb, *arguments = shlex.split(str(refusal.value).split("Create one: ")[1])
    assert arguments == [str(path), "--int8", "--target", "onnxruntime", "--data", "DIR"]
    assert cli_here(verb, *arguments[:-1], IMAGES, cwd=tmp_path).returncode == 0
    with swin_deploy.load(path, backend="onnxruntime", precision="int8") as model:
        assert model.precision == "int8"


def test_for_a_cpu_a_part_of_many_samples_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copied(1, tmp_path / "b")
    monkeypatch.setattr("swin_deploy.exporters.quantization.for_cpu.MAX_SAMPLES", 4)
    given = len([file for file in IMAGES.iterdir() if file.suffix == ".png"])
    told = cli_here("quantize", "b", "--data", IMAGES, "--target", "onnxruntime", "--batch", 2, cwd=tmp_path)
    assert f"Calibrating with 4 of the {given} samples, evenly spread" in told.stderr
    entry = Bundle.open(tmp_path / "b").graphs["onnx/model_int8.onnx"]
    assert (entry["calibrated_with"], entry["calibration"]["samples"]) == (4, given)
    counted = re.findall(r"\(layers? (\d+)(?: to (\d+))? of (\d+)\)", told.stderr)
    layers = [number for first, last, _ in counted for number in range(int(first), int(last or first) + 1)]
    assert layers == list(range(1, len(entry["layers"]) + 1))
    assert {int(count) for *_, count in counted} == {len(layers)}
    assert not list((tmp_path / "b/.calibration").glob("layers-*"))  # what is done is kept only until all is


def test_the_same_data_and_options_are_found_again(tmp_path: Path) -> None:
    copied(1, tmp_path / "b")
    sums = []
    for more in ([], [], ["--method", "minmax"], ["--keep", "stages.0.steps.block0.fc2"], ["--samples", "4"]):
        result(cli_here("quantize", "b", "--data", IMAGES, "--json", *more, cwd=tmp_path))
        sums.append(Bundle.open(tmp_path / "b").files["onnx/model_int8.onnx"]["sha256"])
    assert sums[0] == sums[1]
    assert len(set(sums)) == 4


def test_images_that_come_only_once(tmp_path: Path) -> None:
    """A generator, as a camera's frames are: it is read once, for the ranges and for the comparison."""
    frames = (np.asarray(Image.open(path).convert("RGB")) for path in sorted(IMAGES.glob("*.png")))
    with pytest.raises(TypeError, match="unexpected keyword argument 'quantization'"):
        swin_deploy.quantize(copied(1, tmp_path / "b"), frames, quantization="int8")
    [_, score] = swin_deploy.quantize(tmp_path / "b", frames, precision="int8").scores
    assert score.samples == len(list(IMAGES.glob("*.png")))


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--data", "absent"], ["absent"]),
        (["--data", "empty"], ["empty and its subfolders contain no image"]),
        (["--data", IMAGES, "--method", "guess"], ['Unknown method "guess"', "minmax, percentile, entropy, mse"]),
        (["--data", IMAGES, "--keep", "stages.9"], ['Unknown layer "stages.9"']),
        ([], ["--data"]),
        (["--samples", 4], ["--samples is about the images of --data"]),
        (["--labels", "labels.csv"], ["--labels is about"]),
        (["--method", "minmax"], ["--method is about"]),
        (["--data", IMAGES, "--min-speedup", "1", "--gpu", "gtx-1"], ['GPU "gtx-1"', "rtx-4090 (sm_89)"]),
        (["--fp8", "--data", IMAGES, "--min-speedup", "1", "--gpu", "rtx-3090"], ["rtx-3090 has no FP8"]),
        (["--data", IMAGES, "--max-drop", "1", "--labels", "labels.csv"], ['"dog" is not a class']),
    ],
    ids=lambda value: str(value[0]) if value else "no data",
)
def test_refusals(arguments: list[Any], parts: list[str], tmp_path: Path) -> None:
    copied(1, tmp_path / "b")
    (tmp_path / "empty").mkdir()
    (tmp_path / "labels.csv").write_text("".join(f"{number}.png,{number or 'dog'}\n" for number in range(10)))
    before = contents(tmp_path)
    refused(cli_here("quantize", "b", *arguments, cwd=tmp_path), *parts)
    assert contents(tmp_path) == before


def test_a_graph_in_which_nothing_is_quantized_is_refused(tmp_path: Path) -> None:
    path = copied(1, tmp_path / "b")
    model = onnx.load(str(path / "onnx/model.onnx"))
    keep = [part for layer in linear_layers(model) for part in ("--keep", layer.name)]
    before = contents(tmp_path)
    for more in ([], ["--max-drop", "1"]):
        refused(
            cli_here("quantize", "b", "--data", IMAGES, "--target", "onnxruntime", *keep, *more, cwd=tmp_path),
            "Nothing is left to quantize for onnxruntime",
        )
    assert contents(tmp_path) == before


def test_another_gate_judges_again(tmp_path: Path) -> None:
    """What was good enough with some labels may not be with others."""
    copied(1, tmp_path / "b")
    arguments = ["quantize", "b", "--target", "onnxruntime", "--data", IMAGES, "--max-drop", "0", "--json", "--labels", "l.csv"]
    found = []
    for shift in (0, 1):
        (tmp_path / "l.csv").write_text("".join(f"{number}.png,{(number + shift) % 10}\n" for number in range(10)))
        result(cli_here(*arguments, cwd=tmp_path))
        found.append(Bundle.open(tmp_path / "b").graphs["onnx/model_int8.onnx"]["calibration"]["labels"])
    assert found[0] != found[1]


def test_graphs_that_share_weights_change_together_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second run that is refused for one size leaves graphs of the first one, with the weights that are theirs."""
    path = tmp_path / "b"
    swin_deploy.export(weights=one_block(), output=path, image_sizes=[(32, 32), (16, 32)], target="onnxruntime")
    keep = ["stages.0.steps.block0.fc2"]
    before = swin_deploy.quantize(path, IMAGES).scores

    checked, check = [], graphs.check_graph

    def second_fails(reference: Any, open_graph: Any, model: Path, file: str, precision: str) -> Any:
        checked.append(file)
        verdict = check(reference, open_graph, model, file, precision)
        return (
            verdict if len(checked) == 1 else dataclasses.replace(verdict, tolerances=dict.fromkeys(verdict.tolerances, 1e-30))
        )

    with monkeypatch.context() as patch:
        patch.setattr(graphs, "check_graph", second_fails)
        with pytest.raises(
            VerificationError, match=r"too far from PyTorch.* layers are in 8 bits, and the rewritten fp32 network equals"
        ):
            swin_deploy.quantize(path, IMAGES, keep=keep)
    assert checked == ["onnx/model_int8.onnx", "onnx/model_16x32_int8.onnx"]
    assert swin_deploy.evaluate(path, IMAGES).scores == before
    assert not [file for file in contents(path) if "partial" in str(file)]

    frames = (np.asarray(Image.open(image).convert("RGB")) for image in sorted(IMAGES.glob("*.png")))
    with pytest.raises(InputError, match="prepared for one image size"):
        swin_deploy.quantize(path, frames)


def test_openvino_is_not_given_a_graph_for_tensorrt(tmp_path: Path) -> None:
    """It would give wrong results: asked for it is refused, else left out, and it never counts as verified."""
    pytest.importorskip("openvino", reason="what is refused")
    path = copied(2, tmp_path / "b")
    swin_deploy.quantize(path, IMAGES)
    done = cli_here("verify", path, "--backend", "openvino", "--json", cwd=tmp_path)
    found: Any = result(done)
    assert [(row["file"], row["verified"]) for row in found["graphs"]] == [
        ("onnx/model.onnx", True), ("onnx/model_fp16.onnx", True)
    ]  # fmt: skip
    assert found["not_verified"] == ["onnx/model_int8.onnx"]
    [line] = done.stderr.splitlines()
    assert "Not verified: onnx/model_int8.onnx" in line
    assert "built for TensorRT" in line
    options = ("evaluate", path, "--data", IMAGES, "--backend", "openvino")
    found = result(cli_here(*options, "--json", cwd=tmp_path))
    assert [row["precision"] for row in found["graphs"]] == ["fp32", "fp16"]
    assert found["not_evaluated"] == ["onnx/model_int8.onnx"]
    refused(cli_here(*options, "--precision", "int8", cwd=tmp_path), "built for TensorRT", "--int8 --target openvino")
    with pytest.raises(BackendError, match="built for TensorRT"):
        bench(path, backends=["openvino"], precisions=["int8"], batches=[1], seconds=0.1, rounds=1)
    assert [v.verified for v in swin_deploy.verify(path)] == [True] * 3


def test_engines_need_the_graph_and_a_gpu_that_can(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX compiles the engines")
    copied(1, tmp_path / "b")
    refused(
        cli_here("build-engine", "b", "--int8", "--gpu", "sm_89", cwd=tmp_path),
        "no INT8 graph",
        "swin-deploy quantize b --int8",
    )
    refused(
        cli_here("predict", "b", IMAGES / "3.png", "--precision", "int8", cwd=tmp_path), "no int8 graph", "swin-deploy quantize"
    )
    result(cli_here("quantize", "b", "--fp8", "--data", IMAGES, "--json", cwd=tmp_path))
    refused(cli_here("build-engine", "b", "--fp8", "--gpu", "sm_86", cwd=tmp_path), "sm_86 has no FP8 matmuls", "build int8")
    engines = result(cli_here("build-engine", "b", "--fp8", "--json", cwd=tmp_path))
    assert isinstance(engines, list)
    assert {engine["gpu"] for engine in engines} == {"sm_89", "sm_120"}
    assert json.loads((tmp_path / "b/manifest.json").read_text())["files"]["onnx/model_fp8.onnx"]["amplitudes"]


def test_the_gate_puts_back_as_few_layers_as_it_takes(tmp_path: Path) -> None:
    """Feature maps are to be nearer to fp32 than all layers in 8 bits leave them; as near as fp32 itself they cannot come."""
    swin_deploy.export(weights=one_block(), output=tmp_path / "b", task="backbone", target="onnxruntime")
    arguments = ["quantize", "b", "--data", IMAGES, "--json"]
    [score] = result(cli_here(*arguments, cwd=tmp_path))["graphs"]
    most = 0.7 * 100 * score["relative_l2"]
    [score] = result(cli_here(*arguments, "--max-drop", most, cwd=tmp_path))["graphs"]
    bundle = Bundle.open(tmp_path / "b")
    entry = bundle.graphs["onnx/model_int8.onnx"]
    ranking, gate = entry["sensitivity"], entry["gate"]
    assert 1 <= len(gate["put_back"]) < len(ranking)
    assert sorted(layer["name"] for layer in ranking[: len(gate["put_back"])]) == gate["put_back"]
    assert [layer["sqnr_db"] for layer in ranking] == sorted(layer["sqnr_db"] for layer in ranking)
    assert score["gate"] == gate
    assert "speed" not in score
    assert gate["loss"] <= most
    assert gate["loss"] == pytest.approx(100 * score["relative_l2"], rel=1e-3)
    assert {layer["name"] for layer in entry["layers"]} == {layer["name"] for layer in ranking} - set(gate["put_back"])
    if importlib.util.find_spec("matplotlib") is not None:
        picture = bundle.verified_path("onnx/model_int8.sensitivity.svg").read_text()
        assert all(layer["name"] in picture for layer in ranking)
        assert picture.count("#ee6677") == len(gate["put_back"]) + 2  # and fill and stroke in the legend

    before = contents(tmp_path)
    refused(
        cli_here(*arguments, "--max-drop", "0", cwd=tmp_path),
        "less accurate than requested",
        "relative L2",
        "the limit is 0",
        f"SQNR in dB with one quantized layer, at worst {ranking[0]['name']} {ranking[0]['sqnr_db']:.1f}, ",
        "the rewritten fp32 network equals the exported one (relative L2 ",
        code=3,
    )
    assert contents(tmp_path) == before

    result(cli_here(*arguments, cwd=tmp_path))
    assert "gate" not in Bundle.open(tmp_path / "b").graphs["onnx/model_int8.onnx"]
    assert not [file for file in (*Bundle.open(tmp_path / "b").files, *contents(tmp_path)) if "sensitivity" in file]


@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt"])
def test_what_is_not_faster_is_refused_and_nothing_kept(target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("swin_deploy.calib.accuracy_gate.ROUNDS", 2)
    monkeypatch.setattr("swin_deploy.calib.accuracy_gate.SECONDS", 0.1)
    if target == "tensorrt":
        pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX compiles the graphs")
        copied(1, tmp_path / "b")
    else:
        swin_deploy.export(weights=one_block(), output=tmp_path / "b", target=target)
    arguments = ["quantize", "b", "--data", IMAGES, "--json", "--min-speedup"]
    before = contents(tmp_path)
    refusal = refused(cli_here(*arguments, "1000", cwd=tmp_path), "slower than requested", "the minimum is 1000", code=3)
    than = {"onnxruntime": "measured on this machine in onnxruntime", "tensorrt": "roofline of rtx-4090"}[target]
    assert than in refusal
    left = contents(tmp_path)
    assert {name: left[name] for name in before} == before
    assert all(".calibration" in str(name) for name in set(left) - set(before))
    [score] = result(cli_here(*arguments, "0.01", cwd=tmp_path))["graphs"]
    speed = Bundle.open(tmp_path / "b").graphs["onnx/model_int8.onnx"]["speed"]
    assert score["speed"] == speed
    assert speed["speedup"] >= 0.01
    assert speed["than"] == {"onnxruntime": "fp32", "tensorrt": "fp16"}[target]
