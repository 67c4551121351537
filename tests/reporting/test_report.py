"""`report`: its figures are those of the other verbs, its texts are harmless, and attention maps are those of transformers."""

from __future__ import annotations

import hashlib
import html
import html.parser
import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from cli.exported import EXAMPLES, WEIGHTS, cli_here, digits, exported_bundle, one_block, refused, result

import swin_deploy
from swin_deploy.bundle import Bundle, _manifest_text
from swin_deploy.cli import cli
from swin_deploy.errors import UsageError

pytest.importorskip("vl_convert", reason="the extra report is not installed")
pytest.importorskip("jinja2", reason="the extra report is not installed")
IMAGES = EXAMPLES / "digits/images"
HOSTILE = "</script><script>alert(1)</script>\u202e<img src=x onerror=alert(2)>"


class Loaded(html.parser.HTMLParser):
    """Attributes of a page that load something or run code."""

    found: list[tuple[str, str]]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [(name, value or "") for name, value in attrs if name in ("src", "href") or name.startswith("on")]

    @classmethod
    def by(cls, page: str) -> list[tuple[str, str]]:
        parser = cls()
        parser.found = []
        parser.feed(page)
        return parser.found


def embedded(page: str, name: str) -> Any:
    """The JSON in a script element of a page."""
    [text] = re.findall(rf'<script type="application/json" id="{name}">(.*?)</script>', page, re.DOTALL)
    return json.loads(text)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network of one block with an INT8 graph of which the sensitivity was measured."""
    path = tmp_path_factory.mktemp("report") / "bundle"
    shutil.copytree(exported_bundle("--weights", str(one_block())), path)
    swin_deploy.quantize(path, IMAGES, precision="int8", max_drop=100, samples=4)
    return path


BENCH = {
    "machine": {"processor": HOSTILE},
    "reference": "onnxruntime",
    "rows": [
        {
            **{"model": "swin-deploy", "backend": "onnxruntime", "precision": "fp32", "batch": 1, "device": "cpu"},
            **{"percentiles_ms": {"50": 1.5, "90": 2, "99": 3}, "round_ms": [1.4, 1.5, 1.6], "images_per_second": 666.7},
            **{"cold_start_seconds": 0.5, "peak_memory_mb": 100, "relative_l2": None},
            "ratio": {"low": 1.0, "median": 1.0, "high": 1.0},
        }
    ],
}


def test_the_figures_are_those_of_the_other_verbs(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "bench.json").write_text(json.dumps(BENCH))
    asked = ("--data", IMAGES, "--samples", 4, "--verify", "onnxruntime", "--bench", "bench.json", "-o", "report.html")
    printed = result(cli_here("report", bundle, *asked, "--json", cwd=tmp_path))
    page = (tmp_path / "report.html").read_text()
    data = embedded(page, "data")
    assert data == printed
    verdicts = result(cli_here("verify", bundle, "--json", cwd=tmp_path))
    assert data["verify"] == {"onnxruntime": verdicts}
    shown = {(row["file"], row["from"]): row for row in data["parity"]}
    for row in verdicts["graphs"]:
        for origin in ("verify", "manifest"):
            assert shown[row["file"], origin]["verified"] == row["verified"]
            assert shown[row["file"], origin]["relative_l2"] == row["relative_l2"]
    assert data["inspect"] == result(cli_here("inspect", bundle, "--json", cwd=tmp_path))
    assert data["evaluate"] == result(cli_here("evaluate", bundle, "--data", IMAGES, "--samples", 4, "--json", cwd=tmp_path))
    assert data["bench"] == BENCH
    manifest = json.loads((bundle / "manifest.json").read_text())
    entry = manifest["files"]["onnx/model_int8.onnx"]
    [quantized] = data["quantized"]
    assert (quantized["sensitivity"], quantized["loss"]) == (entry["sensitivity"], entry["gate"]["loss"])
    assert {one["file"]: one["sha256"] for one in data["files"]} == {f: one["sha256"] for f, one in manifest["files"].items()}
    with swin_deploy.load(bundle, backend="onnxruntime", precision="fp32") as model:
        for one in data["images"]["images"]:
            [best] = model.classify([IMAGES / one["name"]])
            assert one["graphs"]["onnx/model.onnx"] == [vars(found) for found in best]
    for row in quantized["ranges"]:
        seen = row["observed"]
        assert sum(seen["counts"]) == seen["values"] > 0
        assert row["low"] == pytest.approx((-128 - row["zero_point"]) * row["scale"])
        inside = row["low"] - row["scale"] <= seen["low"] and seen["high"] <= row["high"] + row["scale"]
        assert (seen["clipped"] == 0) == inside or seen["clipped"] < 0.01
    assert HOSTILE[:9] not in re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    assert page.count("<script") == 4
    assert "\u202e" not in page


def test_an_empty_bundle_names_the_commands(tmp_path: Path) -> None:
    path = tmp_path / "a b"
    shutil.copytree(digits(2), path)
    config = json.loads((path / "config.json").read_text())
    config["id2label"]["0"] = HOSTILE
    _rewritten(path, "config.json", config)
    made = swin_deploy.report(path, output=tmp_path / "report.html")
    page = made.output.read_text()
    assert embedded(page, "data") == json.loads(json.dumps(made.data))
    assert embedded(page, "data")["model"]["labels"][0] == HOSTILE
    for words in ("--data DIR", "--int8", "build-engine", "bench"):
        assert words in page
    assert f"swin-deploy build-engine &#39;{path}&#39; --fp16" in page
    commands = [shlex.split(html.unescape(one)) for one in re.findall(r"<code>swin-deploy (.+?)</code>", page)]
    assert len(commands) >= 6
    for verb, *words in commands:
        command = cli.get_command(click.Context(cli), verb)
        assert command is not None
        known = {name for one in command.params for name in one.opts}
        assert {word for word in words if word.startswith("-")} <= known, (verb, words)
        assert verb == "export" or words[0] == str(path)
    assert page.count("<script") == 4
    assert "&lt;/script&gt;&lt;script&gt;alert(1)" in page
    assert not any(kind.startswith("on") or not value.startswith(("data:", "#")) for kind, value in Loaded.by(page))
    with pytest.raises(UsageError, match="exists"):
        swin_deploy.report(path, output=tmp_path / "report.html")


def _rewritten(path: Path, file: str, value: Any) -> None:
    """Write another JSON file into a bundle, with its digest."""
    (path / file).write_text(json.dumps(value))
    manifest = json.loads((path / "manifest.json").read_text())
    entry = manifest["files"][file]
    entry["sha256"] = hashlib.sha256((path / file).read_bytes()).hexdigest()
    entry["bytes"] = (path / file).stat().st_size
    manifest.pop("sha256")
    (path / "manifest.json").write_text(_manifest_text(manifest))


@pytest.mark.parametrize(
    ("content", "option"),
    [("[]", "--bench"), ('{"rows": [{}], "machine": {}}', "--bench"), ("{}", "--evaluation"), ("{", "--evaluation")],
)
def test_files_that_are_no_result_are_refused(content: str, option: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(content)
    refused(cli_here("report", digits(1), "-o", "r.html", option, "x.json", cwd=tmp_path), "x.json", "--json")
    refused(cli_here("report", digits(1), "-o", "r.html", "--ignore-labels", cwd=tmp_path), "--data")
    assert [one.name for one in tmp_path.iterdir()] == ["x.json"]


@pytest.mark.parametrize("version", [1, 2])
def test_attention_is_that_of_transformers(version: int) -> None:
    """Attention of every block that transformers returns, averaged over heads, in the order of its windows."""
    import torch
    import transformers

    from swin_deploy.reporting.image_views import _AttentionReader, attention_rollout, received_attention

    found = Bundle.open(digits(version))
    pixels = np.random.default_rng(0).normal(size=(1, found.config.num_channels, *found.image_size)).astype(np.float32)
    reader = _AttentionReader(found, "onnx/model.onnx")
    blocks = reader.blocks({"pixel_values": pixels})
    model = transformers.AutoModelForImageClassification.from_pretrained(WEIGHTS[version], attn_implementation="eager")
    with torch.no_grad():
        theirs = model(torch.from_numpy(pixels), output_attentions=True).attentions
    start = 0
    for stage, expected in zip(reader._stages, theirs, strict=True):
        last = start + len(stage.grids) - 1
        np.testing.assert_allclose(blocks[last], expected.mean(dim=1).numpy(), atol=1e-5)
        received = received_attention(stage, len(stage.grids) - 1, blocks[last])
        assert received.mean() == pytest.approx(1, abs=1e-6)
        start = last + 1
    assert attention_rollout(reader._stages, blocks).mean() == pytest.approx(1)


def test_layouts_have_the_same_attention() -> None:
    """OpenVINO's layout has four axes, in which the batch and the heads are one."""
    from swin_deploy.reporting.image_views import _AttentionReader

    found = []
    for target in ((), ("--target", "openvino")):
        bundle = Bundle.open(exported_bundle("--weights", str(one_block()), *target))
        pixels = np.random.default_rng(0).normal(size=(1, 3, *bundle.image_size)).astype(np.float32)
        found.append(_AttentionReader(bundle, "onnx/model.onnx").blocks({"pixel_values": pixels}))
    np.testing.assert_allclose(found[0], found[1], atol=1e-6)
