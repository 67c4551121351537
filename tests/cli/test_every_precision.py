"""Every precision of every kind of bundle through every verb: several sizes, external weights, and files that are links."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli.exported import contents, exported_bundle, one_block

import swin_deploy
from swin_deploy.bundle import Bundle, load_graph, weights_file
from swin_deploy.exporters.external_data import WeightFile
from swin_deploy.options import PRECISIONS, QUANTIZED

IMAGES = [np.random.default_rng(n).integers(0, 255, (40, 40, 3), np.uint8) for n in range(2)]
GRAPH = "onnx/model.onnx"


def one_size(path: Path) -> None:
    shutil.copytree(exported_bundle("--weights", str(one_block())), path)


def two_sizes(path: Path) -> None:
    shutil.copytree(exported_bundle("--weights", str(one_block()), "--image-size", "32x32", "--image-size", "16x24"), path)


def external(path: Path) -> None:
    """As a network of more than 2 GB."""
    one_size(path)
    bundle, model, file = Bundle.open(path), load_graph(path / GRAPH), weights_file("fp32")
    entry = {name: value for name, value in bundle.files[GRAPH].items() if name not in ("sha256", "bytes")}
    bundle = bundle.with_file(file, {}, lambda target: WeightFile(target, Path(file).name).take(model))
    bundle.with_file(GRAPH, {**entry, "weights": file}, model.SerializeToString())


def linked(path: Path, link: Callable[[Path, Path], Any]) -> None:
    source = path.with_name("source")
    external(source)
    for number, file in enumerate(sorted(file for file in source.rglob("*") if file.is_file())):
        target, blob = path / file.relative_to(source), path.with_name("blobs") / str(number % 2) / str(number)
        target.parent.mkdir(parents=True, exist_ok=True)
        blob.parent.mkdir(parents=True, exist_ok=True)
        file.rename(blob)
        link(blob, target)


KINDS: dict[str, Callable[[Path], None]] = {
    "two sizes": two_sizes, "external weights": external,
    "symbolic links": lambda path: linked(path, lambda blob, file: file.symlink_to(blob)),  # a cache of Hugging Face
    "hard links": lambda path: linked(path, os.link),  # cp -al
}  # fmt: skip


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=pytest.mark.slow if kind == "hard links" else ()) for kind in KINDS])
def test_every_precision_through_every_verb(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="runs and quantizes the graphs")
    compiler = pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX compiles the engines")
    path = tmp_path / "bundle"
    KINDS[kind](path)
    others = contents(tmp_path / "blobs") if (tmp_path / "blobs").exists() else {}
    sizes = len(Bundle.open(path).graphs)
    for precision in PRECISIONS:
        if precision in QUANTIZED:
            scores = swin_deploy.quantize(path, IMAGES, precision=precision, target="tensorrt").scores
            assert {score.precision for score in scores} == {"fp32", precision}
        built = swin_deploy.build_engine(path, precision=precision, backend="tensorrt-rtx", gpus=["sm_89"])
        assert [one.entry["backend_version"] for one in built] == [compiler.__version__] * sizes
    verdicts = swin_deploy.verify(path)
    assert {verdict.precision for verdict in verdicts if verdict.verified} == set(PRECISIONS)
    assert len(verdicts) == sizes * len(PRECISIONS)
    assert len(swin_deploy.inspect(path).engines) == sizes * len(PRECISIONS)
    found = {}
    for backend in ("onnxruntime", "openvino", "torch"):
        for precision in ("fp32", "bf16", "fp8") if backend == "torch" else ("fp32",):
            with swin_deploy.load(path, backend=backend, precision=precision) as model:
                found[backend, precision] = model.run({"pixel_values": np.ones((1, 3, 32, 32), np.float32)})["logits"]
    for (_, precision), logits in found.items():
        np.testing.assert_allclose(logits, found["onnxruntime", "fp32"], atol=1e-4 if precision == "fp32" else 0.1)
    swin_deploy.quantize(path, IMAGES, target="onnxruntime")
    with swin_deploy.load(path, backend="onnxruntime", precision="int8") as model:
        assert len(model.classify(IMAGES)) == len(IMAGES)
    assert others == (contents(tmp_path / "blobs") if others else {})
