"""Graphs for older runtimes: lower opsets, the lowest IR version, a fixed batch; what each file states about itself."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import transformers
from cli.exported import WEIGHTS, cli_here, exported_bundle, one_block, refused
from small_graphs import model_from_text
from traced import CONFIGS, EVERYTHING, LOGITS, PADDED, traced_once

import swin_deploy
from swin_deploy.bundle import Bundle
from swin_deploy.exporters.passes.base import complete_header
from swin_deploy.exporters.passes.static_batch import fix_batch
from swin_deploy.exporters.typed_graphs import with_typed_graphs
from swin_deploy.graph_check import check_structure
from swin_deploy.options import OPSETS
from swin_deploy.parity import compare
from swin_deploy.runtimes.backends import runtime_to_check
from swin_deploy.tasks import TaskSpec

ort = pytest.importorskip("onnxruntime", reason="ONNX Runtime runs the graphs")

IR = {17: 8, 18: 8, 19: 9, 20: 9, 21: 10, 22: 10, 23: 11, 24: 12, 25: 13, 26: 13}  # from ONNX's table of versions
X = np.random.default_rng(0).standard_normal((2, 6, 8)).astype(np.float32) * 3
NODES = [
    "Gelu(x)", "Gelu <approximate = 'tanh'> (x)".replace("'", '"'), "Mish(x)", "ReduceL2 <keepdims = 1> (x, axes)",
    "ReduceMax <keepdims = 1, noop_with_empty_axes = 0> (x, axes)", "ReduceMean <keepdims = 1> (x, axes)",
    "ReduceSum <keepdims = 1> (x, axes)", "Cast <to = 1, saturate = 1> (x)",
]  # fmt: skip


def run(model: Any, **feeds: Any) -> list[Any]:
    onnx.checker.check_model(model, full_check=True)
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, feeds)


@pytest.mark.parametrize("node", NODES)
@pytest.mark.parametrize("opset", [17, 18, 19])
def test_operators_of_lower_opsets(node: str, opset: int) -> None:
    body = f'["n"] s = {node} ["a"] a, b = Split <axis = 0, num_outputs = 2> (s) ["d"] y = Add(a, b)'
    model = model_from_text(f"g (float[2, 6, 8] x) => (float[1, n, 8] y) {{ {body} }}", axes=np.array([1]))
    (wanted,) = run(model, x=X)
    for version in (opset, 20, opset):  # and back
        complete_header(model, version)
        (found,) = run(model, x=X)
        assert (model.opset_import[0].version, model.ir_version) == (version, IR[version])
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
    assert len(model.graph.initializer) == len({tensor.name for tensor in model.graph.initializer})


@pytest.mark.parametrize(
    ("version", "task", "target"),
    [(1, LOGITS, "tensorrt"), (2, LOGITS, "tensorrt"), (1, EVERYTHING, "openvino"), (2, EVERYTHING, "onnxruntime")],
)
def test_opsets_and_static_batch(version: int, task: TaskSpec, target: str) -> None:
    assert list(IR) == list(OPSETS)
    pixels = np.random.default_rng(1).standard_normal((3, 3, *PADDED), dtype=np.float32)
    wanted = run(traced_once(CONFIGS[version], PADDED, task, target), pixel_values=pixels)
    for opset in (17, 18, OPSETS[-1]):
        model = traced_once(CONFIGS[version], PADDED, task, target)
        if opset != 18:
            assert fix_batch(model, {}, 3) == {}
            assert not any(node.op_type in ("Shape", "Expand") for node in model.graph.node)
            assert not any(axis.dim_param for value in (*model.graph.input, *model.graph.output)
                           for axis in value.type.tensor_type.shape.dim)  # fmt: skip
        complete_header(model, opset)
        facts = (model.opset_import[0].version, model.ir_version, model.producer_name, model.producer_version)
        assert facts == (opset, IR[opset], "swin-deploy", swin_deploy.__version__)
        for one, other in zip(run(model, pixel_values=pixels), wanted, strict=True):
            assert compare(one, other).relative_l2 < 5e-5


@pytest.fixture(scope="module")
def portable() -> Path:
    return exported_bundle("--weights", str(WEIGHTS[2]), "--opset", "17", "--static-batch", "2")


def test_bundle_of_a_lower_opset_and_a_static_batch(portable: Path, tmp_path: Path) -> None:
    """Calls of any number of images are split and padded; each answers as the graph with a free batch does."""
    bundle = Bundle.open(shutil.copytree(portable, tmp_path / "b"))
    plain = exported_bundle("--weights", str(WEIGHTS[2]))
    assert (bundle.manifest.opset, bundle.static_batch) == (17, 2)
    bundle = with_typed_graphs(bundle, "fp16", runtime_to_check)
    for file, entry in bundle.graphs.items():
        model = onnx.load(bundle.place(file))
        assert (entry.opset, model.opset_import[0].version, model.ir_version) == (17, 17, 8)
        assert entry.verified
        assert not model.graph.value_info
        shapes = [value.type.tensor_type.shape.dim for value in (*model.graph.input, *model.graph.output)]
        assert [shape[0].dim_value for shape in shapes] == [2, 2]
        check_structure(bundle.place(file), entry.inputs, entry.outputs)
    pixels = np.random.default_rng(2).standard_normal((5, 3, *bundle.image_size), dtype=np.float32)
    with swin_deploy.load(plain, backend="onnxruntime", precision="fp32") as model:
        wanted = model.run({"pixel_values": pixels})["logits"]
    for backend in ("onnxruntime", "openvino", "torch"):
        pytest.importorskip(backend, reason="runs the graph")
        with swin_deploy.load(bundle.path, backend=backend, precision="fp32") as model:
            assert model.inputs[0].shape[0] == "batch"
            for count in (1, 2, 5):
                found = model.run({"pixel_values": pixels[:count]})["logits"]
                np.testing.assert_allclose(found, wanted[:count], rtol=1e-3, atol=1e-4)


def test_attentions_of_a_static_batch(tmp_path: Path) -> None:
    """They have several rows for each image, here four windows, which the typed graph and padded batches keep together."""
    weights = one_block("feature-extraction")
    options = ("--task", "feature-extraction", "--output-attentions", "--static-batch", "3")
    bundle = Bundle.open(shutil.copytree(exported_bundle("--weights", str(weights), *options), tmp_path / "b"))
    assert with_typed_graphs(bundle, "fp16", runtime_to_check).graphs["onnx/model_fp16.onnx"].verified
    pixels = np.random.default_rng(3).standard_normal((5, 3, 32, 32), dtype=np.float32)
    network = transformers.SwinModel.from_pretrained(weights, attn_implementation="eager").eval()
    with torch.no_grad():
        (wanted,) = network(torch.from_numpy(pixels), output_attentions=True).attentions
    with swin_deploy.load(bundle.path, backend="onnxruntime", precision="fp32") as model:
        np.testing.assert_allclose(model.run({"pixel_values": pixels})["attentions.0"], wanted, rtol=1e-4, atol=1e-6)
    assert all(verdict.verified for verdict in swin_deploy.verify(bundle.path, backend="onnxruntime"))
    images = list(np.random.default_rng(4).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8))
    assert swin_deploy.evaluate(bundle.path, images).score("fp16").outputs["attentions.0"]["sqnr_db"] > 40


@pytest.mark.parametrize(
    ("command", "parts"),
    [
        (("build-engine", "--bf16"), ("exported with --opset 17, and bfloat16 needs opset 22",)),
        (("build-engine", "--batch", "4"), ("--static-batch 2, and so are its engines. Leave out --batch",)),
        (("quantize", "--data", "x"), ("--static-batch 2, and images are measured one at a time",)),
    ],
)
def test_refusals(portable: Path, command: tuple[str, ...], parts: tuple[str, ...], tmp_path: Path) -> None:
    refused(cli_here(command[0], portable, *command[1:], cwd=tmp_path), *parts)
