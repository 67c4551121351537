"""What a user can get wrong: one clear sentence, exit code 2, an empty stdout, and nothing on disk that was not there."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli.exported import (
    FLOWER,
    THREE,
    WEIGHTS,
    cli,
    cli_here,
    cli_without,
    contents,
    copied,
    digits,
    files,
    one_block,
    refused,
    result,
    small_disk,
    stopped_at,
)

import swin_deploy
from swin_deploy.bundle import Bundle
from swin_deploy.cli import VERBS
from swin_deploy.errors import SwinDeployError
from swin_deploy.parity import Reference

NETWORK = WEIGHTS[2]
FILES = (
    "onnx/model.onnx",
    "onnx/model_fp16.onnx",
    "config.json",
    "preprocessor_config.json",
    "README.md",
    "labels.txt",
    "reference.npz",
    "manifest.json",
)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["export"], ["--variant", "--weights"]),
        (["export", "--variant", "swin-tinny", "--random-weights"], ["swin-tinny", "swin-deploy variants"]),
        (["export", "--variant", "", "--random-weights"], []),
        (["export", "--variant", "swin-tiny", "--random-weights", "--seed", "-1"], ["Invalid seed: '-1'"]),
        (["export", "--variant", "swin-tiny", "--random-weights", "--seed", "x"], ["Invalid seed: 'x'"]),
        (["export", "--variant", "swin-tiny", "--weights", NETWORK], ["is not a swin-tiny", "version is 2"]),
        (["export", "--weights", NETWORK, "--random-weights"], ["exclude each other"]),
        (["export", "--weights", "no/such/folder"], ["no checkpoint no/such/folder"]),
        (["export", "--weights", "x" * 300], ["no checkpoint"]),
        (["export", "--weights", NETWORK / "config.json"], ["config.json is not a checkpoint", "safetensors"]),
        (["export", "--weights", NETWORK.parent / "images"], ["images holds no weights", "model.safetensors"]),
        (["export", "--weights", NETWORK, "-o", "."], ["Choose another folder with -o"]),
        (["export", "--weights", NETWORK, "-o", "file"], ["not a bundle"]),
        (["export", "--weights", NETWORK, "-o", "file/below"], ["cannot be written"]),
        (["export", "--weights", NETWORK, "-o", "full", "--force"], ["full exists and is not a bundle"]),
        (["export", "--weights", NETWORK, "-o", "y" * 300], ["File name too long"]),
        (["export", "--variant", ""], ['No Swin variant is named ""']),
        (["build-engine", "B", "--gpu", ""], ["Invalid gpus: ''"]),
        (["evaluate", "B", "--data", ""], ["Invalid data: ''", "Expected a path"]),
        (["export", "--weights", "not/even/read", "-o", "B"], ["is an existing bundle", "--force"]),
        (["export", "--weights", "not/even/read/full"], ["full exists and is not a bundle"]),
        (["build-engine"], ["no bundle in"]),
        (["build-engine", "absent"], ["no bundle at absent"]),
        (["build-engine", "full"], ["full is not a bundle"]),
        (["build-engine", "y" * 300], ["File name too long"]),
        (["build-engine", "B", "--gpu", "sm_90"], ["SM90"]),
        (["build-engine", "B", "--gpu", "sm_89,rtx4090"], ["rtx4090"]),
        (["build-engine", "B", "--batch", "8:1"], ["MIN:OPT:MAX"]),
        (["build-engine", "B", "--batch", "8:1:32"], ["8:1:32", "MIN:OPT:MAX"]),
        (["build-engine", "B", "--batch", "0"], ['"0"', "MIN:OPT:MAX"]),
        (["build-engine", "B", "--backend", "tvm"], ["tvm"]),
        (["verify"], ["BUNDLE", "verify --help"]),
        (["verify", "B", "--backend", "tvm"], ["tvm", "onnxruntime"]),
        (["verify", "file"], ["no bundle at file"]),
        (["predict", "B"], ["IMAGE"]),
        (["predict", "B", "absent.png"], ["absent.png", "does not exist"]),
        (["predict", "B", THREE, "file", "--on-error", "stop"], ["file", "not a valid image"]),
        (["predict", "B", "full"], ["is a folder"]),
        (["predict", "B", "cut.jpg"], ["cut.jpg", "damaged"]),
        (["predict", "B", THREE, "-k", "0"], ["--top-k"]),
        (["predict", "B", THREE, "--precision", "int8"], ["int8", "fp32, fp16"]),
        (["predict", "B", THREE, "--backend", "tvm"], ["tvm"]),
        (["bench", "B", "--precision", "int8"], ["int8"]),
        (["bench", "B", "--batch", "0"], ["Invalid batches: '0'"]),
        (["bench", "B", "--batch", "100000000"], ["100000000 images of 32x32 pixels", "GB of memory are available"]),
        (["bench", "B", "--threads", "100000"], ["Invalid threads: '100000'", "1024"]),
        (["bench", "B", "--seconds", "nan"], ["Invalid seconds: 'nan'"]),
        (["bench", "B", "--seconds", "0"], ["Invalid seconds: '0'", "from 0.1 to 86400"]),
        (["bench", "B", "--backend", "tvm"], ["tvm", "onnxruntime"]),
        (["bench", "B", "--precision", "fp7"], ["fp7", "fp32"]),
        (["bench", "B", "--weights", WEIGHTS[1]], ["is not the network in", "version 1, not 2"]),
        (["bench", "B", "--plot", "no/a.svg"], ["no/a.svg", "a folder that can be written"]),
        (["doctor", "absent"], ["no bundle at absent"]),
        (["build-engine", "B", "--fp32", "--fp16"], ["--fp32 and --fp16 exclude each other"]),
        (["quantize", "B", "--int8", "--fp8", "--data", "full"], ["--int8 and --fp8 exclude each other"]),
        (["export", "--weights", NETWORK, "--seed", "3"], ["The seed 3", "--random-weights"]),
        (["inspect", "B", "--batch", "8"], ["--batch applies to ONNX files only", "swin-deploy build-engine", "--batch 8"]),
        (["inspect", "fifo"], ["no bundle at fifo", "it is not a folder"]),
        (["verify", "loop"], ["no bundle at loop", "it is a broken link"]),
        (["export", "--weights", NETWORK, "-o", "loop"], ["loop is a link that leads to itself"]),
        (
            ["evaluate", "B", "--data", NETWORK.parent / "images", "--labels", "nosuch"],
            ["nosuch does not exist", "1.jpg,cat"],
        ),
        (["bench", "absent"], ["no bundle at absent"]),
        (["exprot"], ["exprot", "swin-deploy --help"]),
        (["predict", "--frobnicate"], ["--frobnicate"]),
    ],
    ids=lambda value: " ".join(Path(str(v)).name[:20] for v in value) if isinstance(value, list) else None,
)
def test_one_sentence(arguments: list[Any], parts: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.txt").write_text("mine")
    (tmp_path / "cut.jpg").write_bytes(FLOWER.read_bytes()[:5000])
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "fifo")
    before = contents(tmp_path)
    if "--gpu" in arguments or "--batch" in arguments:
        pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX tells which GPUs it compiles for")
    refused(cli_here(*(digits(2) if a == "B" else a for a in arguments), cwd=tmp_path), *parts)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(("variant", "offline"), [("swin-tiny", "0"), ("swinv2-tiny", "1")])
def test_without_network_and_cache_the_ways_out_are_named(variant: str, offline: str, tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    done = cli("export", "--variant", variant, cwd=tmp_path, HF_HOME=str(tmp_path / "hf"), HF_HUB_OFFLINE=offline)
    refused(done, f"microsoft/{variant}", "--weights", "--random-weights")
    assert [path.name for path in tmp_path.iterdir() if path.name != "hf"] == []


def edited(**changes: Any) -> Callable[[Path], None]:
    config = json.loads((NETWORK / "config.json").read_text()) | changes
    return lambda folder: (folder / "config.json").write_text(json.dumps(config)) and None


def cut(size: int, name: str = "model.safetensors") -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size]) and None


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def preprocessed(text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "preprocessor_config.json").write_text(text) and None


@pytest.mark.parametrize(
    ("damage", "part"),
    [
        (cut(0), "model.safetensors is empty"),
        (cut(100), "truncated or damaged"),
        (cut(-1), "truncated or damaged"),
        (without("model.safetensors"), "holds no weights. Expected model.safetensors"),
        (without("config.json"), "window size of"),
        (cut(-30, "config.json"), "config.json cannot be read as JSON"),
        (edited(model_type="vit"), "Vision Transformer"),
        (edited(model_type=None), "model_type None"),
        (edited(depths=[2, 2, 2], num_heads=[2, 4, 8]), "lacks"),
        (edited(depths=None), "num_heads has 2 entries for 4 stages"),
        (edited(id2label={str(i): "x" for i in range(100_000)}), "classifier.weight has shape [10, 64]"),
        (edited(window_size=None), "whole number"),
        (preprocessed('{"image_processor_type": "GLPNImageProcessor"}'), "names GLPNImageProcessor"),
        (preprocessed('{"size": {"longest_edge": 32}}'), "longest_edge"),
        (preprocessed("{"), "preprocessor_config.json cannot be read as JSON"),
    ],
)
def test_a_checkpoint_that_is_none(damage: Callable[[Path], None], part: str, tmp_path: Path) -> None:
    shutil.copytree(NETWORK, tmp_path / "weights")
    damage(tmp_path / "weights")
    with pytest.raises(SwinDeployError) as caught:  # in this process, which has paid for the import of torch
        swin_deploy.export(weights=tmp_path / "weights", output=tmp_path / "b")
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2
    assert [path.name for path in tmp_path.iterdir()] == ["weights"]


def test_a_truncated_checkpoint_is_one_sentence(tmp_path: Path) -> None:
    shutil.copytree(NETWORK, tmp_path / "weights")
    cut(-1)(tmp_path / "weights")
    refused(cli_here("export", "--weights", "weights", "-o", "b", cwd=tmp_path), "truncated or damaged")
    assert [path.name for path in tmp_path.iterdir()] == ["weights"]


def test_the_files_of_a_bundle() -> None:
    assert sorted(files(digits(2))) == sorted(FILES)


@pytest.mark.parametrize("file", FILES)
def test_verify_finds_one_changed_byte_in_any_file(file: str, tmp_path: Path) -> None:
    bundle = copied(2, tmp_path / "b")
    whole = (bundle / file).read_bytes()
    for position in (0, len(whole) // 2, len(whole) - 1):
        (bundle / file).write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        refused(cli_here("verify", "b", cwd=tmp_path), file)
    (bundle / file).unlink()
    refused(cli_here("verify", "b", cwd=tmp_path), file)


def test_verify_fails_with_1_when_a_graph_disagrees(tmp_path: Path) -> None:
    """The files are intact, so this is a result and not a refusal: it is on stdout."""
    bundle = Bundle.open(copied(2, tmp_path / "b"))
    kept = Reference.load(bundle, "reference.npz")
    wrong = {name: output + np.float32(1) for name, output in kept.outputs.items()}
    bundle.with_file("reference.npz", {}, Reference(kept.feeds, wrong).save)
    done = cli_here("verify", "b", "--json", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (1, "")
    assert [row["verified"] for row in json.loads(done.stdout)["graphs"]] == [False, False]
    assert "DISAGREES" in cli_here("verify", "b", cwd=tmp_path).stdout


def test_export_sweeps_takes_an_empty_folder_and_overwrites_only_with_force(tmp_path: Path) -> None:
    export = ("export", "--weights", str(one_block()), "-o", "b/")
    if os.name != "nt":
        stopped_at("Tracing", 1, signal.SIGKILL, *export, cwd=tmp_path)
        assert all(left.name.startswith(".b.partial-") for left in tmp_path.iterdir())
        refused(cli_here("build-engine", cwd=tmp_path), "no bundle in")
    (tmp_path / "b").mkdir()
    assert cli_here(*export, cwd=tmp_path).stdout == "b\n"
    assert [path.name for path in tmp_path.iterdir()] == ["b"]  # and what the killed one left is gone
    (tmp_path / "b/notes.txt").write_text("of the old one")
    before = contents(tmp_path)
    refused(cli_here(*export, cwd=tmp_path), "--force")
    assert contents(tmp_path) == before
    manifest: Any = result(cli_here(*export, "--force", "--json", cwd=tmp_path))
    assert (manifest["bundle"], manifest["name"]) == ("b", "b")
    after = contents(tmp_path)
    assert before.keys() - after.keys() == {"b/notes.txt"}
    assert after["b/onnx/model.onnx"] == before["b/onnx/model.onnx"]  # the same weights make the same graph
    assert after.keys() <= before.keys()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for one bundle of the digits, and little more."""
    with small_disk(tmp_path / "disk", "1500k") as place:
        yield place


def test_a_full_or_read_only_disk(disk: Path) -> None:
    copied(2, disk / "b")
    (disk / "ballast").write_bytes(bytes(shutil.disk_usage(disk).free - 150_000))
    before = contents(disk)
    refused(cli_here("export", "--weights", one_block(), "-o", "c", cwd=disk), "cannot be written: No space left")
    assert contents(disk) == before
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    refused(cli_here("export", "--weights", one_block(), "-o", "c", cwd=disk), "c cannot be written: Read-only")
    for verb, *options in (
        ("quantize", "--data", THREE.parent),
        ("build-engine", "--bf16"),
        ("build-engine", "--gpu", "sm_89"),
    ):
        said = refused(cli_here(verb, "b", *options, cwd=disk), "b cannot be written: it is read-only", "copy the bundle")
        assert "-o" not in said.split()
    assert cli_here("verify", "b", cwd=disk).returncode == 0
    assert cli_here("predict", "b", THREE, "--backend", "onnxruntime", cwd=disk).returncode == 0


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root, or Windows, reads files whatever their permissions")
def test_files_that_may_not_be_read(tmp_path: Path) -> None:
    path = copied(2, tmp_path / "b")
    for file in (path / "onnx/model.onnx", path / "manifest.json"):
        file.chmod(0)
        said = refused(cli_here("verify", "b", cwd=tmp_path), f"{file.name} cannot be read", "Permission denied", "permissions")
        assert "again" not in said  # it need not be exported again
    path.chmod(0)
    for verb, *options in (("verify", "b"), ("inspect", "b"), ("evaluate", digits(2), "--data", "b")):
        refused(cli_here(verb, *options, cwd=tmp_path), "b cannot be read: Permission denied. Change its permissions")
    path.chmod(0o700)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_behind_stdout(tmp_path: Path) -> None:
    done = cli("variants", cwd=tmp_path, prefix=["sh", "-c", '"$@" > /dev/full', "sh"])
    refused(done, "cannot be written to stdout: No space left on device. Redirect it")


def test_a_reader_that_leaves_early(tmp_path: Path) -> None:
    done = cli("variants", cwd=tmp_path, prefix=["sh", "-c", '"$@" | head -n 1', "sh"])
    assert done.stdout.startswith("short name")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("module", "arguments", "extra"),
    [
        ("torch", ["export", "--weights", NETWORK], "export"),
        ("onnx", ["export", "--weights", NETWORK], "export"),
        ("safetensors", ["export", "--weights", NETWORK], "export"),
        ("huggingface_hub", ["export", "--variant", "swin-tiny"], "hub"),
        ("tensorrt_rtx", ["build-engine", "B"], "tensorrt-rtx"),
        ("tensorrt_rtx", ["build-engine", "B", "--backend", "tensorrt-rtx"], "tensorrt-rtx"),
        ("onnxruntime", ["verify", "B"], "onnxruntime"),
        ("onnxruntime", ["predict", "B", THREE, "--backend", "onnxruntime"], "onnxruntime"),
        ("onnxruntime", ["bench", "B", "--backend", "onnxruntime"], "onnxruntime"),
        ("openvino", ["verify", "B", "--backend", "openvino"], "openvino"),
    ],
)
def test_a_missing_library_comes_with_its_command(module: str, arguments: list[Any], extra: str, tmp_path: Path) -> None:
    done = cli_without([module], *(digits(2) if a == "B" else a for a in arguments), cwd=tmp_path)
    refused(done, f'pip install "swin-deploy[{extra}]"')
    assert list(tmp_path.iterdir()) == []


def test_export_and_engines_without_onnxruntime_claim_no_verification(tmp_path: Path) -> None:
    done = cli_without(["onnxruntime"], "export", "--weights", one_block(), "-o", "b", "--json", cwd=tmp_path)
    manifest: Any = result(done)
    assert manifest["files"]["onnx/model.onnx"]["agreement"] == "not verified"
    assert "Not compared, because ONNX Runtime is not installed" in done.stderr
    assert all(row["verified"] for row in result(cli_here("verify", "b", "--json", cwd=tmp_path))["graphs"])  # type: ignore[index,call-overload]


@pytest.mark.parametrize("verb", [None, *VERBS])
@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help_needs_no_library(verb: str | None, option: str, tmp_path: Path) -> None:
    heavy = ("torch", "onnx", "onnxruntime", "numpy", "PIL", "tensorrt_rtx", "openvino", "safetensors")
    done = cli_without(heavy, *([verb] if verb else []), option, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("Usage: swin-deploy")


def test_version(tmp_path: Path) -> None:
    assert swin_deploy.__version__ in cli("--version", cwd=tmp_path).stdout
