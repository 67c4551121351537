"""The verbs as the README uses them, from an empty directory to a named photograph."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from cli.exported import (
    FLOWER,
    THREE,
    WEIGHTS,
    cli,
    cli_here,
    copied,
    digits,
    exported_bundle,
    exported_into,
    one_block,
    refused,
    result,
)
from torch.utils.flop_counter import FlopCounterMode

from swin_deploy.bundle import Bundle
from swin_deploy.exporters.inspection.flops import cost_from_onnx
from swin_deploy.models.checkpoints import random_checkpoint
from swin_deploy.models.swin import SwinNetwork
from swin_deploy.tasks import TaskSpec
from swin_deploy.variants import find_variant

pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX compiles the engines of these tests")


FAST = ("--backend", "onnxruntime", "--precision", "fp32")  # measures nothing first, as auto does
LARGE = {"swin-tiny": (95, 224), "swinv2-tiny": (107, 256)}  # variant -> (most kernels for SM89, image size)


@dataclass(frozen=True)
class Made:
    """The directory the verbs ran in, and what export and build-engine printed."""

    folder: Path
    exported: dict[str, Any]
    engines: list[dict[str, Any]]


@pytest.fixture(scope="module", params=[pytest.param("swin-tiny", marks=pytest.mark.slow), "swinv2-tiny"])
def large(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """`export --variant` with random weights, then `build-engine --fp16` without naming the bundle."""
    folder = tmp_path_factory.mktemp(request.param)
    exported = exported_into(folder, "--variant", request.param, "--random-weights")
    engines: Any = result(cli_here("build-engine", "--fp16", "--gpu", "sm_89", "--json", cwd=folder))
    return Made(folder, exported, engines)


@pytest.fixture(scope="module", params=[pytest.param(1, marks=pytest.mark.slow), 2])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The same of a trained checkpoint, and `build-engine` without any argument at all."""
    folder = tmp_path_factory.mktemp("trained")
    exported = exported_into(folder, "--weights", str(WEIGHTS[request.param]))
    done = cli_here("build-engine", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert f"Using the newest bundle in this directory, {WEIGHTS[request.param].name}" in done.stderr
    engines: Any = result(cli_here("build-engine", "--json", cwd=folder))
    return Made(folder, exported, engines)


def check(made: Made, name: str) -> None:
    path = made.folder / name
    assert [entry.name for entry in made.folder.iterdir()] == [name]
    assert made.exported["bundle"] == name
    assert not list(path.rglob(".*"))
    graph = Bundle.open(path).files["onnx/model_fp16.onnx"]
    assert graph["agreement"]["verified"]
    assert {engine["parent"] for engine in made.engines} == {graph["sha256"]}
    verdicts: Any = result(cli_here("verify", name, "--json", cwd=made.folder))
    assert verdicts["files_intact"]
    assert {row["file"]: row["verified"] for row in verdicts["graphs"]} == {
        "onnx/model.onnx": True,
        "onnx/model_fp16.onnx": True,
    }
    assert {Path(name) / file for file in verdicts["not_verified"]} == {Path(e["engine"]) for e in made.engines}


def test_from_an_empty_directory_to_a_photograph(large: Made) -> None:
    name = large.exported["variant"]
    check(large, name)
    [engine] = large.engines
    assert (engine["graph"], engine["image_size"]) == ("onnx/model_fp16.onnx", [LARGE[name][1]] * 2)
    most, side = LARGE[name]
    [profile] = engine["profiles"]
    assert (engine["gpu"], engine["precision"], profile["batch"]) == ("sm_89", "fp16", [1, 1, 1])
    assert profile["kernels"] <= most
    assert profile["fused_attention"] == 12  # one for each block
    assert large.exported["task"]["name"] == "image-classification"
    graph = large.exported["files"]["onnx/model.onnx"]
    assert (graph["image_size"], graph["reference"]) == ([side, side], "reference.npz")
    assert graph["inputs"] == [{"name": "pixel_values", "dtype": "float32", "shape": ["batch", 3, side, side]}]
    [answer] = result(cli_here("predict", name, FLOWER, "-k", 3, *FAST, "--json", cwd=large.folder))
    assert answer["image"] == str(FLOWER)
    scores = [prediction["score"] for prediction in answer["predictions"]]
    assert len(scores) == 3
    assert scores == sorted(scores, reverse=True)


def test_operations_match_the_counter_of_torch(large: Made) -> None:
    """torch counts while the network runs, and we count in the exported graph."""
    file = large.folder / large.exported["bundle"] / "onnx/model.onnx"
    config = find_variant(large.exported["variant"]).config()
    network = SwinNetwork(config, config.image_size, random_checkpoint(config, TaskSpec()).tensors).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, 3, *config.image_size))
    cost = cost_from_onnx(file)
    assert cost.flops == {"float": counter.get_total_flops()}
    assert cost.parameters == pytest.approx(28.3e6, rel=0.04)  # the published count, and folded tables
    assert cost.parameter_bytes == 4 * cost.parameters
    assert sum(cost.nodes.values()) == len(onnx.load(file).graph.node)


def test_a_trained_model_all_the_way(trained: Made) -> None:
    name = trained.exported["name"]
    check(trained, name)
    assert [engine["gpu"] for engine in trained.engines] == ["sm_86", "sm_89", "sm_120"]
    assert all(engine["reused"] for engine in trained.engines)
    assert {engine["profiles"][0]["fused_attention"] for engine in trained.engines} == {4}
    for precision in ("fp32", "fp16"):
        done = cli_here("predict", name, THREE, "--backend", "onnxruntime", "--precision", precision, cwd=trained.folder)
        assert re.search(r"3\.png +1 +\d\d\.\d\d% +three\n", done.stdout), done.stdout


def test_other_targets_join_the_ones_that_are_there(trained: Made) -> None:
    name = trained.exported["name"]
    [fp32] = result(cli_here("build-engine", name, "--fp32", "--gpu", "sm_89", "--json", cwd=trained.folder))
    [wide] = result(cli_here("build-engine", name, "--batch", "1:4:8", "--gpu", "sm_89", "--json", cwd=trained.folder))
    assert (fp32["precision"], wide["profiles"][0]["batch"]) == ("fp32", [1, 4, 8])
    assert fp32["parent"] == Bundle.open(trained.folder / name).files["onnx/model.onnx"]["sha256"]
    held = {file for file in Bundle.open(trained.folder / name).files if file.endswith(".engine")}
    assert len(held) == 5


def test_what_was_deleted_is_made_again_and_what_was_changed_is_refused(tmp_path: Path) -> None:
    path, build = copied(2, tmp_path / "b"), ("build-engine", "b", "--gpu", "sm_89")
    [engine] = result(cli_here(*build, "--json", cwd=tmp_path))
    (tmp_path / engine["engine"]).unlink()
    (path / "onnx/model_fp16.onnx").unlink()
    [again] = result(cli_here(*build, "--json", cwd=tmp_path))
    assert not again["reused"]
    assert cli_here("verify", "b", cwd=tmp_path).returncode == 0
    fp32 = (path / "onnx/model.onnx").rename(path / "away")  # is noticed although the engine is there
    refused(cli_here(*build, cwd=tmp_path), "model.onnx cannot be read", "Export the bundle again")
    fp32.rename(path / "onnx/model.onnx")
    for file in (again["engine"], "b/onnx/model_fp16.onnx"):
        whole = (tmp_path / file).read_bytes()
        (tmp_path / file).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        done = cli_here(*build, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (2, "")
        assert "is not the file that was" in done.stderr
    assert cli_here(*build, "--force", cwd=tmp_path).returncode == 2  # no engine is compiled from a graph that was changed


def test_predict_says_that_it_measures(tmp_path: Path) -> None:
    """The first time, which for a large network takes most of a minute; and not where nothing is to choose."""
    first, second = (cli_here("predict", digits(2), THREE, cwd=tmp_path, XDG_CACHE_HOME=str(tmp_path)) for _ in range(2))
    [line] = [line for line in first.stderr.splitlines() if "Measuring" in line]
    assert re.match(r"\[ *\d+\.\d s\] Measuring once which of \d candidates runs .* fastest$", line)
    named = cli_here("predict", digits(2), THREE, "--precision", "fp32", "--backend", "onnxruntime", cwd=tmp_path)
    for done in (second, named):
        assert (done.returncode, done.stderr.count("\n")) == (0, 1), done.stderr
        assert done.stderr.startswith("Run by ")
    # What is wrong is said before anything is measured, whose figures would be kept.
    never = {"XDG_CACHE_HOME": str(tmp_path / "other")}
    for image in ("absent.png", "."):
        assert cli_here("predict", digits(2), THREE, image, "--on-error", "stop", cwd=tmp_path, **never).returncode == 2
    path = exported_bundle("--weights", str(one_block()), "--task", "feature-extraction", "--output-attentions")
    refused(cli_here("predict", path, THREE, cwd=tmp_path, **never), "the task feature-extraction, but predict needs")
    assert not Path(never["XDG_CACHE_HOME"]).exists()


def test_variants_are_listed(tmp_path: Path) -> None:
    listed: Any = result(cli("variants", "--json", cwd=tmp_path))
    assert {alias for variant in listed for alias in variant["aliases"]} >= set(LARGE)
    table = cli("variants", cwd=tmp_path)
    assert table.stdout.count("\n") == len(listed) + 1
    assert table.stderr == ""


def test_a_bundle_is_its_folder_wherever_that_is(tmp_path: Path) -> None:
    """Moved, renamed, with blanks and other letters in its name, through a link, from inside, with a slash behind."""
    place = tmp_path / "mit Leer zeichen"
    place.mkdir()
    path = copied(1, place / "Zürich 湖.v1")
    (tmp_path / "link").symlink_to(path)
    for cwd, named in (
        (place, "Zürich 湖.v1/"),
        (tmp_path, "link"),
        (path, "."),
        (path / "onnx", ".."),
        (tmp_path, "./mit Leer zeichen/../link"),
    ):
        [answer] = result(cli_here("predict", named, THREE, *FAST, "--json", cwd=cwd))
        assert answer["predictions"][0]["label"] == "three"
    [inside] = result(cli_here("build-engine", "--gpu", "sm_89", "--json", cwd=path))
    assert (path / inside["engine"]).is_file()
    assert json.loads((path / "manifest.json").read_text())["name"] == "swin-digits"
