"""`swin-deploy inspect`: a bundle, another ONNX file, both side by side, a plot, and what is refused."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import onnx
import pytest
from cli.exported import WEIGHTS, cli_here, contents, copied, digits, refused, result
from small_graphs import model_from_text

from swin_deploy.bench.baselines import torchscript_export, transformers_network

pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX compiles the engines of these tests")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a bundle `b` that has an fp32 engine, and the export of transformers of the same network, `theirs.onnx`."""
    pytest.importorskip("transformers", reason="its export is compared with")
    folder = tmp_path_factory.mktemp("inspect")
    copied(2, folder / "b")
    assert cli_here("build-engine", "b", "--fp32", "--gpu", "sm_89", cwd=folder).returncode == 0
    (folder / "theirs.onnx").write_bytes(torchscript_export(transformers_network(WEIGHTS[2]), (1, 3, 32, 32)))
    return folder


def test_a_bundle_in_a_table(place: Path) -> None:
    before = contents(place)
    done = cli_here("inspect", "b", cwd=place)
    assert done.returncode == 0, done.stderr
    graphs, engines = done.stdout.split("\n\n")
    assert [line.split()[0] for line in graphs.splitlines()[1:]] == ["b/onnx/model.onnx", "b/onnx/model_fp16.onnx"]
    assert "Gemm " in graphs
    [_, row] = engines.splitlines()
    assert row.startswith("b/engines/fp32-sm_89-tensorrt-rtx-")
    assert "unknown" not in row
    assert "Roofline of rtx-4090" in done.stderr
    assert "not a measurement" in done.stderr
    assert contents(place) == before


def test_a_baseline_beside_a_bundle(place: Path) -> None:
    """The same network has the same matmuls; only the rest differs."""
    before = contents(place)
    ours, theirs = result(cli_here("inspect", "b", "--compare", "theirs.onnx", "--json", cwd=place))
    assert ours["graphs"]["onnx/model.onnx"]["flops"] == theirs["graphs"]["theirs.onnx"]["flops"]
    [mine], [other] = ours["engines"], theirs["engines"]
    assert (other["precision"], other["gpu"], other["batch"]) == ("fp32", "sm_89", [1, 1, 1])
    assert 0 < mine["kernels"] < other["kernels"]
    table = cli_here("inspect", "b", "--compare", "theirs.onnx", "--gpu", "l4", cwd=place)
    rows = {line.split("  ")[0]: line.split() for line in table.stdout.split("\n\n")[2].splitlines()}
    assert rows["kernels"][-3:-1] == [str(mine["kernels"]), str(other["kernels"])]
    assert float(rows["kernels"][-1]) == pytest.approx(other["kernels"] / mine["kernels"], abs=0.01)
    assert "Roofline of l4" in table.stderr
    assert contents(place) == before


def test_a_plot(place: Path, tmp_path: Path) -> None:
    done = cli_here("inspect", place / "b", "--plot", "engines.svg", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert ET.parse(tmp_path / "engines.svg").getroot().tag.endswith("svg")
    refused(cli_here("inspect", place / "b", "--plot", "engines.gif", cwd=tmp_path), "engines.gif", ".svg, .png or .pdf")
    refused(cli_here("inspect", place / "b", "--plot", "no/engines.svg", cwd=tmp_path), "a folder that can be written")
    assert [file.name for file in tmp_path.iterdir()] == ["engines.svg"]


def test_a_bundle_without_engines_is_its_graphs(tmp_path: Path) -> None:
    found: Any = result(cli_here("inspect", digits(1), "--json", cwd=tmp_path))
    assert (len(found["graphs"]), found["engines"]) == (2, [])
    assert "engine" not in cli_here("inspect", digits(1), cwd=tmp_path).stdout
    done = cli_here("inspect", digits(1), "--compare", digits(2), cwd=tmp_path)
    assert "The two have no engines of the same" in done.stdout


def foreign(operator: str, domain: str, shape: str) -> onnx.ModelProto:
    model = model_from_text(f"g (float{shape} x) => (float{shape} y) {{ [first] y = {operator}(x) }}", 17)
    model.graph.node[0].domain = domain
    model.opset_import.append(onnx.helper.make_opsetid("example", 1))
    return model


def test_what_cannot_be_inspected_is_refused_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "text.onnx").write_text("mine")
    onnx.save(foreign("RollWindows", "example", "[1, 8]"), tmp_path / "unknown.onnx")
    onnx.save(foreign("Relu", "", "[batch, height]"), tmp_path / "free.onnx")
    onnx.save(foreign("Relu", "", "[4, 8]"), tmp_path / "four.onnx")
    before = contents(tmp_path)
    for arguments, parts in (
        (["absent"], ["no bundle at absent"]),
        (["absent.onnx"], ["no ONNX file absent.onnx"]),
        (["text.onnx"], ["text.onnx is not an ONNX graph"]),
        (["free.onnx"], ["only the first axis, the batch, to be dynamic"]),
        (["four.onnx"], ["fixed batch of 4", "(4, 4, 4)"]),
        (["four.onnx", "--gpu", "rtx4090"], ['Unknown GPU "rtx4090"', "rtx-4090"]),
        (["four.onnx", "--gpu", "h100", "--backend", "tensorrt-rtx"], ["does not support SM90"]),
        (["four.onnx", "--batch", "0"], ["Invalid batch"]),
    ):
        refused(cli_here("inspect", *arguments, cwd=tmp_path), *parts)
    done = cli_here("inspect", "unknown.onnx", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "node first (RollWindows)" in done.stderr.splitlines()[-1]
    assert done.stderr.splitlines()[-1].startswith("swin-deploy: TensorRT for RTX")
    assert contents(tmp_path) == before


def test_the_batch_of_a_foreign_file(tmp_path: Path) -> None:
    onnx.save(foreign("Relu", "", "[batch, 8]"), tmp_path / "x.onnx")
    found: Any = result(cli_here("inspect", "x.onnx", "--batch", "16", "--gpu", "rtx-5090", "--json", cwd=tmp_path))
    [engine] = found["engines"]
    assert (engine["batch"], engine["gpu"], engine["kernels"]) == ([16, 16, 16], "sm_120", 1)
    assert engine["bytes_moved"] == 2 * 16 * 8 * 4
    assert found["graphs"]["x.onnx"]["flops"] == {}


def test_a_file_that_kills_the_library_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from swin_deploy.bench.worker import Process

    begin = Process.__init__
    monkeypatch.setattr(Process, "__init__", lambda self, start: begin(self, "import os; os.kill(os.getpid(), 11)"))
    (tmp_path / "x.onnx").write_bytes(b"")
    refused(cli_here("inspect", "x.onnx", cwd=tmp_path), "The process that read x.onnx died with SIGSEGV.")
