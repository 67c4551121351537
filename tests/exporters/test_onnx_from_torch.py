"""The exported graph: what is in it, what is not, and that it answers as the network does."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto

from swin_deploy.config import SwinConfig
from swin_deploy.errors import ExportError, PassError
from swin_deploy.exporters.external_data import SMALLEST, embed_weights
from swin_deploy.exporters.onnx_from_torch import OPERATORS, OPSET, Traced, onnx_from_torch
from swin_deploy.exporters.passes import PassRecord
from swin_deploy.models.checkpoints import random_checkpoint
from swin_deploy.models.swin import SwinNetwork
from swin_deploy.parity import compare
from swin_deploy.tasks import TaskSpec

INPUT, OUTPUT = "pixel_values", "logits"

# Three stages whose maps are 13 x 18, 7 x 9 and 4 x 5 tokens: shifted, padded, and odd at merging.
FIELDS: dict[str, Any] = {
    "image_size": (52, 72), "embed_dim": 16, "depths": (2, 1, 1), "num_heads": (1, 2, 4), "window_size": (4, 4, 4),
    "pretrained_window_sizes": (0, 0, 0), "id2label": {i: str(i) for i in range(5)},
}  # fmt: skip


def config(version: int, **changes: Any) -> SwinConfig:
    return SwinConfig(**{"version": version, **FIELDS, **changes})


def smallest(**changes: Any) -> SwinConfig:
    """One block, for what does not depend on the network."""
    fields = {"depths": (1,), "num_heads": (1,), "window_size": (4,), "pretrained_window_sizes": (0,), "image_size": (16, 16)}
    return config(**{"version": 1, **fields, **changes})


def network(asked: SwinConfig) -> Any:
    return SwinNetwork(asked, asked.image_size, random_checkpoint(asked, TaskSpec()).tensors).eval()


def whole(made: Any, size: tuple[int, int]) -> tuple[Any, tuple[PassRecord, ...]]:
    """The graph with its weights inside it, and what each rewrite did."""
    traced = onnx_from_torch(made, size)
    embed_weights(traced.model, traced.weights)
    return traced.model, traced.passes


@pytest.fixture(scope="module", params=[1, 2], ids=["V1", "V2"])
def exported(request: pytest.FixtureRequest) -> tuple[SwinConfig, Any, Any, tuple[PassRecord, ...]]:
    asked = config(request.param)
    made = network(asked)
    return asked, made, *whole(made, asked.image_size)


@pytest.fixture
def model(exported: Any) -> Any:
    return exported[2]


def test_graph_answers_as_the_network_does(exported: Any) -> None:
    runtime = pytest.importorskip("onnxruntime", reason="ONNX Runtime runs exported graphs")
    asked, made, model, _ = exported
    session = runtime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for batch in (1, 2, 3, 7):
        pixels = np.random.default_rng(batch).standard_normal((batch, 3, *asked.image_size), dtype=np.float32)
        with torch.no_grad():
            (expected,) = made(torch.from_numpy(pixels))
        agreement = compare(session.run([OUTPUT], {INPUT: pixels})[0], expected.numpy())
        assert agreement.within(1e-5), agreement


def test_graph_is_valid_in_one_file_and_only_its_batch_is_dynamic(exported: Any, tmp_path: Path) -> None:
    asked, _, model, _ = exported
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    onnx.checker.check_model(str(tmp_path / "model.onnx"), full_check=True)
    assert onnx.load(tmp_path / "model.onnx") == model
    assert all(tensor.data_location == TensorProto.DEFAULT for tensor in model.graph.initializer)
    onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", OPSET)]
    assert OPSET == 20
    assert not model.functions
    (given,), (answer,) = model.graph.input, model.graph.output
    found = []
    for value in (given, answer):
        assert value.type.tensor_type.elem_type == TensorProto.FLOAT
        found.append((value.name, [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]))
    assert found == [(INPUT, ["batch", 3, *asked.image_size]), (OUTPUT, ["batch", 5])]


def test_operators(exported: Any) -> None:
    asked, _, model, records = exported
    found = {node.op_type for node in model.graph.node}
    assert found <= OPERATORS
    assert not found & {"Shape", "If", "Loop", "Pad", "Roll", "NonZero", "Concat", "Where", "Expand", "Cast", "Squeeze"}
    assert {node.domain for node in model.graph.node} == {""}
    assert all(attribute.type != onnx.AttributeProto.GRAPH for node in model.graph.node for attribute in node.attribute)
    assert records == (PassRecord("attentions", asked.blocks),)


def test_every_block_is_one_projection_and_one_softmax(exported: Any) -> None:
    asked, _, model, _ = exported
    names = [node.name for node in model.graph.node]
    for kind in ("attention.qkv/Gemm", "attention/Softmax", "attention.proj/Gemm", "fc1/Gemm", "fc2/Gemm"):
        assert sum(name.endswith(kind) for name in names) == asked.blocks, kind
    assert sum(re.fullmatch(r"merges\.\d+\.reduction/\w+", name) is not None for name in names) == len(asked.depths) - 1
    assert all(len(node.input) == 3 for node in model.graph.node if node.name.endswith("fc1/Gemm")), "a bias apart"


def test_nodes_and_weights_are_named_by_their_modules(exported: Any) -> None:
    _, made, model, _ = exported
    modules = {name for name, _ in made.named_modules() if name} | {"swin"}
    names = [node.name for node in model.graph.node]
    assert len(set(names)) == len(names)
    for node in model.graph.node:
        scope, _, operator = node.name.partition("/")
        assert scope in modules, node.name
        assert re.fullmatch(r"[A-Z]\w+", operator), node.name
    assert "stages.1.steps.block0.attention.qkv/Gemm" in names
    assert {name for name, _ in made.named_parameters()} <= {tensor.name for tensor in model.graph.initializer}


def test_graph_does_not_tell_on_whoever_exported(model: Any) -> None:
    """torch leaves stack traces in the metadata, with the paths of the machine."""
    text = model.SerializeToString()
    for sign in (b".py", b"site-packages", str(Path(__file__).parents[2]).encode(), b"stack_trace", b"pkg."):
        assert sign not in text, sign
    assert not model.metadata_props
    assert not model.graph.metadata_props
    nodes = (*model.graph.node, *model.graph.value_info, *model.graph.initializer, *model.graph.input, *model.graph.output)
    assert all(not item.metadata_props for item in nodes)
    assert all(not node.doc_string for node in model.graph.node)
    assert model.producer_name == "swin-deploy"


@pytest.mark.parametrize("version", [1, 2])
def test_export_is_reproducible_and_prints_nothing(version: int, capfd: pytest.CaptureFixture[str]) -> None:
    asked = smallest(version=version)
    first, again = (whole(network(asked), asked.image_size)[0] for _ in range(2))
    assert again.SerializeToString(deterministic=True) == first.SerializeToString(deterministic=True)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "act", ["gelu", "gelu_new", "quick_gelu", *(pytest.param(act, marks=pytest.mark.slow) for act in ("relu", "silu"))]
)
def test_activations_stay_in_the_operators(act: str) -> None:
    asked = smallest(hidden_act=act)
    model = onnx_from_torch(network(asked), asked.image_size).model
    count = [node.op_type for node in model.graph.node].count("Gelu")
    assert count == (1 if act in ("gelu", "gelu_new") else 0)


def test_function_without_translation_is_an_error() -> None:
    class Summed(torch.nn.Module):  # type: ignore[misc, name-defined, unused-ignore]
        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.inner = inner
            self.config, self.task, self.target = inner.config, inner.task, inner.target
            self.output_names = inner.output_names

        def forward(self, pixel_values: Any) -> Any:
            return (self.inner(pixel_values)[0].cumsum(1),)

    asked = smallest()
    with pytest.raises(ExportError, match=r"calls cumsum of torch, which has no translation to ONNX\. Please report it"):
        onnx_from_torch(Summed(network(asked)), asked.image_size)


def test_network_of_another_config_is_an_error() -> None:
    asked = smallest()
    made = network(asked)
    made.config = smallest(depths=(2,))
    with pytest.raises(PassError, match=r'"attentions" found 1 places where this architecture has 2'):
        onnx_from_torch(made, asked.image_size)


def test_large_weights_stay_apart_until_they_are_embedded() -> None:
    """The graph alone is small, and what it refers to is the network's own memory."""
    asked = smallest(embed_dim=64)
    made = network(asked)
    traced: Traced = onnx_from_torch(made, asked.image_size)
    apart = {t.name for t in traced.model.graph.initializer if t.data_location == TensorProto.EXTERNAL}
    assert apart == traced.weights.keys()
    assert apart >= {name for name, parameter in made.named_parameters() if parameter.nbytes >= SMALLEST}
    assert all(len(t.raw_data) < SMALLEST for t in traced.model.graph.initializer)
    name = next(name for name in apart if name.endswith("fc1.weight"))
    assert traced.weights[name].data_ptr() == dict(made.named_parameters())[name].data_ptr()
    embed_weights(traced.model, traced.weights)
    onnx.checker.check_model(traced.model, full_check=True)
