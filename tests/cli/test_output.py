"""What the verbs print can be encoded, whatever a label holds, and JSON stays JSON."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from cli.exported import THREE, cli_here, digits, result

from swin_deploy.bundle import CONFIG, Bundle


def test_labels_with_half_a_character(tmp_path: Path) -> None:
    path = tmp_path / "b"
    shutil.copytree(digits(2), path)
    bundle = Bundle.open(path)
    config = bundle.read_json(CONFIG)
    config["id2label"]["3"] = "drei \ud83d"
    bundle.with_file(CONFIG, {}, lambda file: file.write_text(json.dumps(config)) and None)
    [answer] = result(cli_here("predict", path, THREE, "--json", cwd=tmp_path))  # type: ignore[misc]
    best: Any = answer["predictions"][0]
    assert best["label"] == "drei \ud83d"
    done = cli_here("predict", path, THREE, "--backend", "onnxruntime", "--precision", "fp32", cwd=tmp_path)
    assert done.returncode == 0
    assert re.fullmatch(r"Run by onnxruntime \S+, fp32, on cpu\n", done.stderr)
    assert "drei \\ud83d" in done.stdout
