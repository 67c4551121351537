"""build-engine and refit as a user runs them: options, refusals, two at once, cancelled, a full disk, progress."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from cli.exported import (
    HANG,
    OFFLINE,
    SCRIPT,
    THREE,
    cli_here,
    contents,
    copied,
    digits,
    refused,
    result,
    small_disk,
    started,
    stopped,
)

from swin_deploy.bundle import Bundle
from swin_deploy.gpus import cuda_devices

trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX compiles the engines of these tests")


no_gpu = pytest.mark.skipif(bool(cuda_devices()), reason="this machine has a GPU: what is told where there is none")
BUILD = ("build-engine", "b", "--gpu", "sm_89")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--batch", "1:8"], ["1:8", "MIN:OPT:MAX"]),
        (["--batch", "1", "--batch", "1"], ["each of them once"]),
        (["--batch", "4000000000"], ["4000000000", "MAX < 2^31"]),
        (["--workspace", "lots"], ["Invalid workspace 'lots'", "2GiB"]),
        (["--workspace", "0GiB"], ["Invalid workspace '0GiB'"]),
        (["--optimization-level", "6"], ["Invalid optimization_level: '6'", "from 0 to 5"]),
        (["--optimization-level", "5"], ["TensorRT for RTX has no optimization levels", "the same engine"]),
        (["--timing-cache", "timings"], ["TensorRT for RTX has no timing cache", "times nothing"]),
        (["--version-compatible"], ["TensorRT for RTX has no version-compatible engines", "lean runtime"]),
        (["--hardware-compatible"], ["TensorRT for RTX has no hardware-compatible engines", "each GPU"]),
        pytest.param(["--strip-weights"], ["without weights", "no usable NVIDIA GPU"], marks=no_gpu),
        pytest.param(["--backend", "tensorrt"], ["no usable NVIDIA GPU", "tensorrt-rtx"], marks=no_gpu),
        (["--bf16", "--data", "."], ["bf16 has the range of fp32", "Leave out the data"]),
        (["--data", "absent"], ["absent"]),
        (["--int3"], ["--int3"]),
    ],
    ids=lambda value: " ".join(value) if value and value[0].startswith("--") else None,
)
def test_an_option_is_refused_in_one_sentence(arguments: list[str], parts: list[str], tmp_path: Path) -> None:
    copied(2, tmp_path / "b")
    before = contents(tmp_path)
    refused(cli_here(*BUILD, *arguments, cwd=tmp_path), *parts)
    assert contents(tmp_path) == before


def test_ranges_measured_on_images_are_in_the_manifest(tmp_path: Path) -> None:
    """A graph is written again for other images, and its engine with it only where the graph is another one."""
    path = copied(2, tmp_path / "b")
    images = Path(__file__).parents[2] / "examples" / "digits" / "images"
    result(cli_here(*BUILD, "--json", "--data", str(images), "--samples", "2", cwd=tmp_path))
    entry = Bundle.open(path).graphs["onnx/model_fp16.onnx"]
    assert entry["ranges"]["samples"] == 2
    fallbacks = {one["at"]: (one["nodes"], one["reason"]) for one in entry["fallbacks"]}
    blocks = sum(json.loads((path / "config.json").read_text())["depths"])
    assert len(fallbacks) == blocks, "nothing in this network comes near 65504"
    assert all(name.endswith(".attention") and nodes == 9 for name, (nodes, _) in fallbacks.items())
    assert all("padding token" in reason for _, reason in fallbacks.values())
    [again] = result(cli_here(*BUILD, "--json", "--data", str(images), cwd=tmp_path))
    assert again["reused"]
    assert Bundle.open(path).graphs["onnx/model_fp16.onnx"]["ranges"]["samples"] > 2


def test_refit_has_nothing_to_do(tmp_path: Path) -> None:
    refused(cli_here("refit", digits(2), cwd=tmp_path), "built without weights", "--strip-weights")
    refused(cli_here("refit", "absent", cwd=tmp_path), "no bundle at absent")


@no_gpu
def test_refit_needs_the_gpu_of_the_engine(tmp_path: Path) -> None:
    """An engine that was stripped elsewhere: its bundle was brought to a machine without a GPU."""
    path = copied(2, tmp_path / "b")
    [engine] = result(cli_here(*BUILD, "--json", cwd=tmp_path))
    file = Path(engine["engine"]).relative_to("b")
    bundle, plan = Bundle.open(path), (tmp_path / engine["engine"]).read_bytes()
    entry = {**bundle.files[file.as_posix()], "options": {"strip_weights": True}}
    bundle.with_file("engines/fp16-stripped-sm_89.engine", entry, lambda target: target.write_bytes(plan) and None)
    before = contents(tmp_path)
    refused(cli_here("refit", "b", cwd=tmp_path), "was compiled for sm_89", "none that is usable", "on the target machine")
    assert contents(tmp_path) == before


def test_every_spec_is_an_engine_of_its_own_and_is_found_again(tmp_path: Path) -> None:
    copied(2, tmp_path / "b")
    specs: list[list[str]] = [
        [],
        ["--workspace", "1GiB"],
        ["--workspace", "512MiB"],
        ["--batch", "8"],
        ["--batch", "1", "--batch", "1:4:8"],
        ["--fp32", "--batch", "1", "--batch", "1:4:8", "--workspace", "1GiB"],
    ]
    made: list[Any] = [result(cli_here(*BUILD, *spec, "--json", cwd=tmp_path)) for spec in specs]
    assert [one["reused"] for [one] in made] == [False] * len(specs)
    assert len({one["engine"] for [one] in made}) == len({one["fingerprint"] for [one] in made}) == len(specs)
    assert [one["options"] for [one] in made[:3]] == [{}, {"workspace": 1 << 30}, {"workspace": 512 << 20}]
    again: list[Any] = [result(cli_here(*BUILD, *spec, "--json", cwd=tmp_path)) for spec in reversed(specs)]
    assert again == [[{**one, "reused": True}] for [one] in reversed(made)]
    table = cli_here(*BUILD, "--batch", "1", "--batch", "1:4:8", cwd=tmp_path).stdout.splitlines()
    assert [line.split()[1] for line in table[1:]] == ["1", "1:4:8"]
    assert len({line.split()[0] for line in table[1:]}) == 1
    [forced] = result(cli_here(*BUILD, "--force", "--json", cwd=tmp_path))
    assert (forced["reused"], forced["engine"]) == (False, made[0][0]["engine"])


def test_a_damaged_graph_is_not_read_and_not_needed(tmp_path: Path) -> None:
    """An engine of the fp16 graph does not need the fp32 one; what would be made of that is refused."""
    path = copied(2, tmp_path / "b")
    with (path / "onnx/model.onnx").open("ab") as file:
        file.write(b"x")
    assert cli_here(*BUILD, "--fp16", cwd=tmp_path).returncode == 0
    before = contents(path)
    refused(cli_here(*BUILD, "--bf16", cwd=tmp_path), "onnx/model.onnx is not the file that was exported")
    refused(cli_here("inspect", "b", cwd=tmp_path), "onnx/model.onnx is not the file that was exported")
    assert contents(path) == before


def test_an_engine_of_another_graph_or_compiler_is_not_taken(tmp_path: Path) -> None:
    path = copied(2, tmp_path / "b")
    [first] = result(cli_here(*BUILD, "--json", cwd=tmp_path))
    file = Path(first["engine"]).relative_to("b").as_posix()
    for change in ({"fingerprint": "of another release"}, {"fingerprint": None}):
        Bundle.open(path).with_entry(file, change)
        [again] = result(cli_here(*BUILD, "--json", cwd=tmp_path))
        assert (again["reused"], again["fingerprint"]) == (False, first["fingerprint"])


def test_a_gpu_may_be_named_and_is_its_compute_capability(tmp_path: Path) -> None:
    copied(2, tmp_path / "b")
    [engine] = result(cli_here("build-engine", "b", "--gpu", "RTX-4090,l4,sm_89", "--json", cwd=tmp_path))
    assert engine["gpu"] == "sm_89"
    refused(cli_here("build-engine", "b", "--gpu", "rtx-4091", cwd=tmp_path), "Unknown GPU 'rtx-4091'", "rtx-4090")
    refused(cli_here("build-engine", "b", "--gpu", "h200", "--backend", "tensorrt-rtx", cwd=tmp_path), "does not support SM90")


def test_the_second_of_two_at_once_waits_and_finds_the_first_ones_engine(tmp_path: Path) -> None:
    """And the engine of a fourth, for another GPU, is not lost."""
    path = copied(2, tmp_path / "b")
    command = [SCRIPT, *BUILD, "--batch", "1", "--batch", "1:4:8", "--json"]
    other = [part.replace("sm_89", "sm_86") for part in command]
    running = [started(*one, cwd=tmp_path) for one in (command, command, command, other)]
    done = [(*process.communicate(timeout=HANG), process.returncode) for process in running]
    assert [code for _, _, code in done] == [0, 0, 0, 0], done
    engines = [json.loads(out)[0] for out, _, _ in done[:3]]
    assert sorted(engine["reused"] for engine in engines) == [False, True, True]
    assert len({engine["sha256"] for engine in engines}) == 1
    assert sum("Compiling" in err for _, err, _ in done) == 2
    assert {entry.get("gpu") for entry in Bundle.open(path).files.values()} == {None, "sm_89", "sm_86"}
    assert cli_here("verify", "b", cwd=tmp_path).returncode == 0


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_one_that_waits_can_be_stopped(signum: signal.Signals, tmp_path: Path) -> None:
    path = copied(2, tmp_path / "b")
    before = contents(tmp_path)
    with Bundle.open(path).compiling(lambda: None):
        code, said = stopped(started(SCRIPT, *BUILD, cwd=tmp_path), "Waiting for another process", signum)
    word = "interrupted" if signum == signal.SIGINT else "terminated"
    assert (code, said) == (128 + signum, [f"swin-deploy: {word}; no partial files were left"])
    assert contents(tmp_path) == before
    assert result(cli_here(*BUILD, "--json", cwd=tmp_path))


def test_one_that_waited_looks_again(tmp_path: Path) -> None:
    """Another process has made the INT8 graph for ONNX Runtime meanwhile, which TensorRT's parser would not take."""
    path = copied(2, tmp_path / "b")
    assert cli_here("quantize", "b", "--data", THREE.parent, "--samples", "2", cwd=tmp_path).returncode == 0
    with Bundle.open(path).compiling(lambda: None):
        waiting = started(SCRIPT, *BUILD, "--int8", cwd=tmp_path)
        assert waiting.stderr is not None
        assert any("Waiting for another process" in line for line in iter(waiting.stderr.readline, ""))
        calibration = Bundle.open(path).files["onnx/model_int8.onnx"]["calibration"]
        Bundle.open(path).with_entry("onnx/model_int8.onnx", {"calibration": {**calibration, "target": "onnxruntime"}})
    assert "has an INT8 graph for onnxruntime only" in waiting.communicate(timeout=HANG)[1]
    assert waiting.returncode == 2
    assert not (path / "engines").exists()


def test_a_full_disk_leaves_no_engine(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "1500k") as place:
        copied(2, place / "b")
        before = contents(place)
        refused(cli_here(*BUILD, cwd=place), ".engine cannot be written: No space left")
        assert contents(place) == before | {"b/engines": ""}
        assert cli_here("verify", "b", cwd=place).returncode == 0


def test_on_a_terminal_the_progress_is_a_bar_that_is_removed(tmp_path: Path) -> None:
    pty = pytest.importorskip("pty", reason="this system has no such terminals")
    import fcntl
    import struct
    import termios

    copied(2, tmp_path / "b")
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))  # tqdm shows nothing without a width
    process = subprocess.Popen(
        [SCRIPT, *BUILD, "--json"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=slave, env={**os.environ, **OFFLINE}
    )
    os.close(slave)
    said = b""
    while True:
        try:
            piece = os.read(master, 4096)
        except OSError:  # how a terminal says that nobody holds its other end any more
            break
        if not piece:
            break
        said += piece
    os.close(master)
    out, _ = process.communicate()
    assert process.returncode == 0
    assert json.loads(out)[0]["gpu"] == "sm_89"
    assert re.search(rb"\r[A-Z][\w ]+: +\d+%\|[^\r\n]*\| \d+/\d+ \[", said), said
    assert not re.search(rb"\| \d+/\d+ \[[^\r\n]*\r?\n", said)  # none of them stays
