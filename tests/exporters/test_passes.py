"""Each rewrite on the graphs of small networks: that it finds its places, changes no answer, and leaves what it promises."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import pytest
import torch
from onnx import checker
from small_graphs import model_from_text
from traced import CONFIGS, EVERYTHING, LOGITS, PADDED, WHOLE, traced_once

from swin_deploy.config import SwinConfig
from swin_deploy.errors import ExportError, PassError
from swin_deploy.exporters.external_data import embed_weights
from swin_deploy.exporters.onnx_from_torch import onnx_from_torch
from swin_deploy.exporters.passes import ENGINE_PASSES, PASSES, Pass, PassRecord, run_passes
from swin_deploy.exporters.passes.attention import attentions
from swin_deploy.exporters.passes.cosine_attention import MAX_L2_NORM, l2_norm_bounds
from swin_deploy.models.checkpoints import random_checkpoint
from swin_deploy.models.swin import SwinNetwork
from swin_deploy.parity import compare
from swin_deploy.tasks import TaskSpec

V1, V2 = CONFIGS[1], CONFIGS[2]
ONE_STAGE = {"depths": (2,), "num_heads": (2,), "window_size": (6,), "pretrained_window_sizes": (0,)}  # for what each block has
Edit = Callable[[dict[str, Any]], None]


def traced(config: SwinConfig, size: tuple[int, int], task: TaskSpec = LOGITS, edit: Edit | None = None) -> Any:
    if edit is None:
        return traced_once(config, size, task)
    tensors = dict(random_checkpoint(config, task).tensors)
    edit(tensors)
    result = onnx_from_torch(SwinNetwork(config, size, tensors, task).eval(), size)
    embed_weights(result.model, result.weights)
    return result.model


def rewritten(model: Any, config: SwinConfig) -> Any:
    graph = gs.import_onnx(model)
    run_passes(graph, config, ENGINE_PASSES)
    result = gs.export_onnx(graph)
    checker.check_model(result, full_check=True)
    return result


def answers(model: Any, size: tuple[int, int], names: list[str] | None = None) -> dict[str, Any]:
    runtime = pytest.importorskip("onnxruntime", reason="ONNX Runtime runs graphs before and after a rewrite")
    session = runtime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    pixels = np.random.default_rng(0).standard_normal((2, 3, *size), dtype=np.float32)
    names = names or [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {"pixel_values": pixels}), strict=True))


def without_biases(tensors: dict[str, Any]) -> None:
    """As transformers initialises a network; biases of zeros do not reach the graph."""
    for name in tensors:
        if name.endswith(".bias"):
            tensors[name] = torch.zeros_like(tensors[name])


CASES = {
    "zero biases": (replace(V1, **ONE_STAGE), PADDED, LOGITS, without_biases),
    "V2 zero biases": (replace(V2, **ONE_STAGE), PADDED, LOGITS, without_biases),
    "whole": (V1, WHOLE, LOGITS, None), "padded": (V1, PADDED, LOGITS, None),
    "every output": (V1, PADDED, EVERYTHING, None), "no qkv bias": (replace(V1, qkv_bias=False), PADDED, LOGITS, None),
    "no patch norm": (replace(V1, **ONE_STAGE, patch_norm=False), WHOLE, LOGITS, None),
    "V2 whole": (V2, WHOLE, LOGITS, None), "V2 padded": (V2, PADDED, LOGITS, None),
    "V2 every output": (V2, PADDED, EVERYTHING, None),
    "V2 no qkv bias": (replace(V2, **ONE_STAGE, qkv_bias=False), PADDED, LOGITS, None),
    "V2 no patch norm": (replace(V2, **ONE_STAGE, patch_norm=False), WHOLE, LOGITS, None),
    "V2 positions": (replace(V2, **ONE_STAGE, use_absolute_embeddings=True), WHOLE, LOGITS, None),
    "V2 enlarged": (V2, PADDED, LOGITS, None),
}  # fmt: skip


@cache
def both(name: str) -> tuple[SwinConfig, tuple[int, int], Any, Any]:
    config, size, task, edit = CASES[name]
    model = traced(config, size, task, edit)
    if name == "V2 enlarged":  # queries and keys whose products would be far beyond fp16
        graph = gs.import_onnx(model)
        for found in attentions(graph):
            table = found.qkv.inputs[1]
            rows = np.arange(len(table.values))[:, None] < len(table.values) * 2 // 3
            table.values = np.where(rows, table.values * np.float32(3000), table.values)
        model = gs.export_onnx(graph)
    return config, size, model, rewritten(model, config)


SLOW = {"V2 no patch norm", "V2 no qkv bias", "V2 zero biases"}  # the same of the other version is run always


@pytest.fixture(scope="module", params=[pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in CASES])
def case(request: pytest.FixtureRequest) -> tuple[SwinConfig, tuple[int, int], Any, Any]:
    """The config, the image size, and the graph before and after ENGINE_PASSES."""
    return both(request.param)


def test_engine_passes_change_no_answer(case: Any) -> None:
    _, size, before, after = case
    wanted = answers(before, size)
    for name, found in answers(after, size).items():
        agreement = compare(found, wanted[name])
        assert agreement.within(2e-5), (name, agreement)  # each is within 1e-5 of PyTorch


def test_no_bias_is_left_in_the_projection(case: Any) -> None:
    config, _, before, after = case
    for model, inputs in ((before, (2, 3) if config.qkv_bias else (2,)), (after, (2,))):
        found = [len(node.input) for node in model.graph.node if node.name.endswith("attention.qkv/Gemm")]
        assert len(found) == config.blocks
        assert set(found) <= set(inputs)


def test_nothing_is_gathered_after_a_norm(case: Any) -> None:
    """Except where the tokens are also an output, or a constant is added, and where padding is left out in the end."""
    config, _, _, after = case
    if len(after.graph.output) > 1 or config.use_absolute_embeddings:
        return
    graph = gs.import_onnx(after)
    gathered = [node.i().i() for node in graph.nodes if node.op == "Gather" and node.i().inputs[0].inputs]
    operators = ("Add", "LayerNormalization") if config.version == 2 else ("LayerNormalization",)  # V1 adds Gemms
    alone = [node for node in gathered if len(node.outputs[0].outputs) == 1]  # V2 gathers the tokens of its first addition
    assert not [node for node in alone if node.op in operators and not node.name.startswith("norm/")]  # the last norm


def test_queries_and_keys_are_in_range(case: Any) -> None:
    """No query or key of V2 has an L2 norm above MAX_L2_NORM, so that no matmul is beyond fp16."""
    config, size, _, after = case
    if config.version == 1:
        return
    imported = gs.import_onnx(after)
    names = [node.inputs[0].name for node in imported.nodes if node.op == "Mul" and node.inputs[0] is node.inputs[1]]
    assert len(names) == config.blocks
    extended = gs.import_onnx(after)
    extended.outputs = [*extended.outputs, *(extended.tensors()[name] for name in names)]
    for found in answers(gs.export_onnx(extended), size, names).values():
        assert np.linalg.norm(found, axis=-1).max() <= MAX_L2_NORM * (1 + 1e-5)


def test_weights_of_heads_are_multiplied_by_powers_of_two() -> None:
    _, _, before, after = both("V2 enlarged")
    projections = [node for node in gs.import_onnx(after).nodes if node.name.endswith("qkv/Gemm")]
    for attention, gemm in zip(attentions(gs.import_onnx(before)), projections, strict=True):
        old, new = attention.weight(), np.asarray(gemm.inputs[1].values, dtype=np.float64)
        factor = new / old
        assert set(np.unique(np.log2(factor)) % 1) == {0}
        assert factor[: len(factor) * 2 // 3].max() < 1
        assert (factor[len(factor) * 2 // 3 :] == 1).all()


def test_l2_norm_bounds_hold(case: Any) -> None:
    config, size, before, _ = case
    bounds = l2_norm_bounds(gs.import_onnx(before))
    graph = gs.import_onnx(before)
    names = [a.qkv.inputs[0].name for a in attentions(graph) if a.qkv.inputs[0].name in bounds]
    if config.version == 2:
        assert len(names) == config.blocks
    tensors = graph.tensors()
    graph.outputs = [*graph.outputs, *(tensors[name] for name in names)]
    for name, found in (answers(gs.export_onnx(graph), size, names) if names else {}).items():
        assert np.linalg.norm(found, axis=-1).max() <= bounds[name] * (1 + 1e-5)


def relu(*chain: str) -> Any:
    nodes = " ".join(f"{after} = Relu({before})" for before, after in pairwise(chain))
    return model_from_text(f"test (float[3] {chain[0]}) => (float[3] {chain[-1]}) {{ {nodes} }}")


def test_wrong_count_is_an_error() -> None:
    with pytest.raises(PassError) as caught:
        run_passes(gs.import_onnx(relu("x", "y")), V1, PASSES["tensorrt"])
    message = str(caught.value)
    assert '"attentions" found 0 places where this architecture has 3 (passes run before it: none)' in message
    assert "Please report it" in message
    assert isinstance(caught.value, ExportError)


def test_passes_run_in_order_and_are_recorded() -> None:
    seen: list[str] = []

    def step(name: str, count: int) -> Pass:
        def rewrite(graph: Any) -> int:
            seen.append(name)
            return count

        return Pass(name, rewrite, lambda config: 2)

    imported = gs.import_onnx(relu("x", "y"))
    assert run_passes(imported, V1, ()) == ()
    assert run_passes(imported, V1, (step("a", 2), step("b", 2))) == (PassRecord("a", 2), PassRecord("b", 2))
    with pytest.raises(PassError, match=r'"d" found 1 places .* has 2 \(passes run before it: c\)'):
        run_passes(imported, V1, (step("c", 2), step("d", 1), step("e", 2)))
    assert seen == ["a", "b", "c", "d"]


def test_nodes_left_over_are_removed_and_the_rest_sorted() -> None:
    """What a pass detaches is removed, and what it appends is sorted."""
    model = relu("x", "r", "y")

    def rewrite(graph: Any) -> int:
        last = graph.nodes[-1]
        middle = gs.Variable("middle", np.dtype(np.float32))
        graph.nodes.append(gs.Node("Sigmoid", inputs=[graph.inputs[0]], outputs=[middle]))
        last.inputs = [middle]
        return 1

    imported = gs.import_onnx(model)
    run_passes(imported, V1, (Pass("replace", rewrite, lambda config: 1),))
    assert [node.op for node in imported.nodes] == ["Sigmoid", "Relu"]
