"""What the verbs print can be encoded, whatever a label holds, and JSON stays JSON."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from cli.exported import THREE, cli_here, copied, digits, result

from swin_deploy.bundle import CONFIG, Bundle
from swin_deploy.cli import output


def test_labels_with_half_a_character(tmp_path: Path) -> None:
    path = tmp_path / "b"
    shutil.copytree(digits(2), path)
    bundle = Bundle.open(path)
    config = bundle.read_json(CONFIG)
    config["id2label"]["3"] = "drei \ud83d"
    bundle.with_file(CONFIG, {}, lambda file: file.write_text(json.dumps(config)) and None)
    [answer] = result(
        cli_here("predict", path, THREE, "--backend", "onnxruntime", "--precision", "fp32", "--json", cwd=tmp_path)
    )
    best: Any = answer["predictions"][0]
    assert best["label"] == "drei \ud83d"
    done = cli_here("predict", path, THREE, "--backend", "onnxruntime", "--precision", "fp32", cwd=tmp_path)
    assert done.returncode == 0
    assert re.fullmatch(r"Run by onnxruntime \S+, fp32, on cpu\n", done.stderr)
    assert "drei \\ud83d" in done.stdout


def test_progress_without_a_terminal_is_a_line_every_ten_seconds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr(output.time, "monotonic", lambda: now[0])
    console = output.Console()
    for step in range(40):
        console("Compiling", step, 40)
        now[0] += 1
    assert capsys.readouterr().err == "".join(
        f"[{n:6.1f} s] Compiling: {n} of 40 (1/s, {40 - n} s left)\n" for n in (10, 20, 30)
    )


def test_verify_shows_no_top_1_agreement_of_a_multi_label_network(tmp_path: Path) -> None:
    bundle = Bundle.open(copied(2, tmp_path / "b"))
    config = bundle.read_json(CONFIG) | {"problem_type": "multi_label_classification"}
    bundle.with_file(CONFIG, {}, lambda file: file.write_text(json.dumps(config)) and None)
    for file, cell in (("b", "-"), (digits(2), "100%")):
        table = cli_here("verify", file, cwd=tmp_path).stdout.splitlines()
        assert [line.split()[5] for line in table[1:]] == [cell, cell]
