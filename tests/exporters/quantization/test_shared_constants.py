"""Equal, zero and tied constants, which PyTorch's exporter stores once: no pass may change what another node reads."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from onnx import numpy_helper
from tiny_mlp import mlp_model, run, samples
from traced import CONFIGS, LOGITS, WHOLE, traced_once

from swin_deploy.calib.collect import session_for
from swin_deploy.errors import PassError
from swin_deploy.exporters.passes import ENGINE_PASSES, Pass, run_passes
from swin_deploy.exporters.passes.base import NetworkCheck, add_node, constant
from swin_deploy.exporters.passes.cosine_attention import l2_norm_as_rms_norm
from swin_deploy.exporters.precision import typed_from_fp32
from swin_deploy.exporters.quantization.equalization import (
    GraphIndex,
    channels_of,
    equalize,
    equalize_all,
    equalized,
    with_own_constants,
)
from swin_deploy.exporters.quantization.for_cpu import quantize_for_cpu
from swin_deploy.exporters.quantization.for_tensorrt import quantized_from_fp32, quantized_layers
from swin_deploy.exporters.quantization.gptq import GptqRounding, input_moments
from swin_deploy.exporters.quantization.qdq import linear_layers
from swin_deploy.parity import compare, sqnr

Array = np.ndarray[Any, Any]
PIXELS = np.random.default_rng(0).standard_normal((4, 3, *WHOLE), dtype=np.float32)
FEED = {"pixel_values": PIXELS[:2]}


def ones_and_zeros(name: str, values: Array) -> Array:
    """As transformers initialises a network."""
    return np.full_like(values, "norm" in name and name.endswith("weight")) if values.ndim == 1 else values


def tied(name: str, values: Array) -> Array:
    """All weights of one shape are the same, and so are all vectors."""
    if values.ndim == 1:
        return np.full_like(values, 0.5)
    return np.random.default_rng(values.shape).normal(0, values.shape[-1] ** -0.5, values.shape).astype(values.dtype)


def zero_branches(name: str, values: Array) -> Array:
    """Blocks that add nothing at first: the norms after attention and MLP of Microsoft's V2, and the last layers of V1's."""
    return np.zeros_like(values) if "proj.weight" in name or "fc2" in name or ".norm1.weight" in name else values


def zero_attention(name: str, values: Array) -> Array:
    """Queries, keys and values of zeros."""
    return np.zeros_like(values) if ".qkv." in name else values


KINDS: tuple[Callable[[str, Array], Array], ...] = (ones_and_zeros, tied, zero_branches, zero_attention)


def edited(model: onnx.ModelProto, edit: Callable[[str, Array], Array]) -> None:
    weights = {name: node.op_type for node in model.graph.node for name in node.input}
    for tensor in model.graph.initializer:
        if tensor.data_type == tensor.FLOAT and weights.get(tensor.name) in ("Gemm", "LayerNormalization"):
            tensor.CopyFrom(numpy_helper.from_array(edit(tensor.name, numpy_helper.to_array(tensor)), tensor.name))


def stored_once(model: onnx.ModelProto) -> onnx.ModelProto:
    """`model` as PyTorch's exporter writes it: of equal constants only the first."""
    result, first, names = onnx.ModelProto(), dict[Any, str](), dict[str, str]()
    result.CopyFrom(model)
    for tensor in model.graph.initializer:
        key = tensor.data_type, tuple(tensor.dims), numpy_helper.to_array(tensor).tobytes()
        names[tensor.name] = first.setdefault(key, tensor.name)
    for node in result.graph.node:
        for position, name in enumerate(node.input):
            node.input[position] = names.get(name, name)
    kept = [tensor for tensor in model.graph.initializer if names[tensor.name] == tensor.name]
    del result.graph.initializer[:]
    result.graph.initializer.extend(kept)
    return result


@cache
def networks(version: int, edit: Callable[[str, Array], Array]) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """A network, and the same with equal constants stored once."""
    model = traced_once(CONFIGS[version])
    edited(model, edit)
    once = stored_once(model)
    assert len(once.graph.initializer) < len(model.graph.initializer)
    return model, onnx.shape_inference.infer_shapes(once)


each = pytest.mark.parametrize(
    ("version", "edit"),
    [
        pytest.param(v, edit, id=f"V{v}-{edit.__name__}", marks=() if v == 2 or edit is tied else pytest.mark.slow)
        for v in (1, 2)
        for edit in KINDS
    ],
)


@each
def test_passes_for_engines(version: int, edit: Callable[[str, Array], Array]) -> None:
    apart, once = networks(version, edit)
    check = NetworkCheck(apart, FEED)
    graph = gs.import_onnx(once)
    records = run_passes(graph, CONFIGS[version], ENGINE_PASSES, check)
    assert ([record.name for record in records], check.left_out) == ([step.name for step in ENGINE_PASSES], {})
    wanted = run(apart, FEED)
    assert compare(run(gs.export_onnx(graph), FEED), wanted).within(1e-5)
    typed = typed_from_fp32(once, CONFIGS[version], LOGITS, "fp16", check=check).model
    assert compare(run(typed, FEED).astype(np.float32), wanted).within(1e-2)


def test_a_network_that_agrees_with_pytorch_is_accepted_without_the_one_before() -> None:
    apart, _ = networks(1, tied)
    wanted = run(apart, FEED)
    assert NetworkCheck(None, FEED, recorded=[wanted]).accepts(apart, "a", "b")
    other = NetworkCheck(apart, FEED, recorded=[wanted + 1])  # then it must agree with that
    assert other.accepts(apart, "a")
    assert other.distance == 0


def for_tensorrt(model: onnx.ModelProto, version: int, precision: str, check: NetworkCheck | None) -> onnx.ModelProto:
    """The quantized graph, as `quantize` makes it."""
    config = CONFIGS[version]
    read = {layer.name: layer.input for layer in linear_layers(model)}
    model, moments = equalized(model, input_moments(model, read, [{"pixel_values": PIXELS}], 1), check)
    names = sorted({name for layer in quantized_layers(model, config, precision) for name in layer.inputs})
    values = session_for(model, names, 1)(FEED)
    amax = {name: max(float(np.abs(values[name]).max()), 1e-6) for name in names}
    rounding = GptqRounding(moments, precision)
    return quantized_from_fp32(model, config, LOGITS, precision, amax, rounding=rounding, check=check)[0]


@each
def test_quantized_for_tensorrt(version: int, edit: Callable[[str, Array], Array]) -> None:
    """A network with constants that are stored once gives the same results as one in which each node has its own."""
    apart, once = networks(version, edit)
    precision = "int8" if version == 1 else "fp8"
    check = NetworkCheck(apart, FEED)
    found = run(for_tensorrt(once, version, precision, check), FEED, exact=True)
    assert check.left_out == {}
    np.testing.assert_array_equal(found, run(for_tensorrt(apart, version, precision, None), FEED, exact=True))
    assert sqnr(run(apart, FEED), found) > 15


@each
def test_quantized_for_cpu(version: int, edit: Callable[[str, Array], Array], monkeypatch: pytest.MonkeyPatch) -> None:
    target = "onnxruntime" if version == 1 else "openvino"
    monkeypatch.setattr("swin_deploy.exporters.quantization.for_cpu.SMALL", 0)
    apart, once = networks(version, edit)
    check = NetworkCheck(apart, FEED)
    made = quantize_for_cpu(once, target, lambda: iter([{"pixel_values": PIXELS}]), check=check)
    assert check.left_out == {}
    assert compare(run(made.base, FEED), run(apart, FEED)).within(1e-5)
    assert sqnr(run(apart, FEED), run(made.model(), FEED, exact=True)) > 30


def test_a_shared_constant_is_never_changed() -> None:
    model, feed = mlp_model(), next(iter(samples()()))
    assert with_own_constants(model) == model
    model.graph.node[2].CopyFrom(onnx.helper.make_node("Mul", ["hidden", "b1"], ["gelu"], "gelu"))  # the bias of fc1, again
    wanted = run(model, feed)
    [one] = [one for one in channels_of(GraphIndex(model), linear_layers(model)) if one.width == 40]
    one.written = {("b1", 0, 0, 40)}
    with pytest.raises(ValueError, match="with_own_constants"):
        equalize(model, one, np.ones(40, np.float32))
    own = with_own_constants(model)
    assert [node.input[-1] for node in own.graph.node[1:3]] == ["b1/fc1/Gemm/2", "b1"]
    np.testing.assert_array_equal(run(own, feed), wanted)


def test_a_pass_that_changes_the_network_is_named_and_left_out(caplog: pytest.LogCaptureFixture) -> None:
    apart, once = networks(1, ones_and_zeros)

    def wrong(graph: Any) -> int:
        norms = [node for node in graph.nodes if node.op == "LayerNormalization"]
        norms[0].inputs[1].values = norms[0].inputs[1].values * np.float32(1.01)  # the weight of all norms
        return 1

    passes = (ENGINE_PASSES[0], Pass("wrong", wrong, lambda config: 1), *ENGINE_PASSES[1:])
    check, graph = NetworkCheck(once, FEED), gs.import_onnx(once)
    with caplog.at_level(logging.WARNING):
        records = run_passes(graph, CONFIGS[1], passes, check)
    assert [record.name for record in records] == [step.name for step in ENGINE_PASSES]
    assert list(check.left_out) == ["wrong"]
    assert 'The rewrite "wrong" changes the outputs of the fp32 network' in caplog.text
    assert compare(run(gs.export_onnx(graph), FEED), run(apart, FEED)).within(1e-5)
    assert "equals the exported one" in str(check)
    records = run_passes(gs.import_onnx(once), CONFIGS[1], passes, check)  # for another graph of the same network
    assert "wrong" not in [record.name for record in records]
    with pytest.raises(PassError, match="found 1 places"):
        run_passes(gs.import_onnx(once), CONFIGS[1], (Pass("miscounted", lambda graph: 1, lambda config: 2),))


def test_an_equalization_that_changes_the_network_is_left_out() -> None:
    model, feed = mlp_model(), next(iter(samples()()))
    one, other = sorted(channels_of(GraphIndex(model), linear_layers(model)), key=lambda one: one.width)
    factors = {one.width: np.linspace(0.5, 2, one.width, dtype=np.float32) for one in (one, other)}
    one.read = set()  # the layer that reads the channels is forgotten
    check = NetworkCheck(model, feed)
    made, kept = equalize_all(model, [(one, factors[16]), (other, factors[40])], check)
    assert [channels.width for channels, _ in kept] == [40]
    assert list(check.left_out) == ["channel equalization of normed"]
    assert compare(run(made, feed), run(model, feed)).within(1e-5)


def test_equal_queries_and_keys_have_one_l2_norm() -> None:
    x = gs.Variable("x", np.float32, ["n", 4, 8])
    graph = gs.Graph([], [x], [], opset=20, ir_version=10)
    squares = add_node(graph, "squares", "Mul", [x, x])
    total = add_node(graph, "sum", "ReduceSum", [squares, constant("axis", [-1], np.int64)], keepdims=1)
    norm = add_node(graph, "norm", "Sqrt", [total])
    unit = add_node(graph, "unit", "Div", [x, add_node(graph, "clip", "Clip", [norm, constant("least", 1e-12)])])
    unit.shape = x.shape
    cosine = add_node(graph, "cosine", "MatMul", [unit, add_node(graph, "swapped", "Transpose", [unit], perm=[0, 2, 1])])
    graph.outputs = [cosine]
    cosine.shape = ["n", 4, 4]
    feed = {"x": np.random.default_rng(0).standard_normal((2, 4, 8)).astype(np.float32)}
    wanted = run(gs.export_onnx(graph), feed)
    assert l2_norm_as_rms_norm(graph) == 2
    np.testing.assert_allclose(run(gs.export_onnx(graph.cleanup().toposort()), feed), wanted, atol=1e-6)


def test_a_row_of_zero_weights_keeps_its_bias() -> None:
    """Its scale is so small that its bias would not fit into int32."""
    model = mlp_model()
    weight, bias = (next(tensor for tensor in model.graph.initializer if tensor.name == name) for name in ("w1", "b1"))
    rows = numpy_helper.to_array(weight).copy()
    rows[:5] = 0
    weight.CopyFrom(numpy_helper.from_array(rows, "w1"))
    feed = next(iter(samples()()))
    quantized = quantize_for_cpu(model, "onnxruntime", samples()).model()
    quantized.graph.output.append(onnx.ValueInfoProto(name="hidden"))
    found = run(quantized, feed, exact=True, output="hidden")[:, :5]
    np.testing.assert_allclose(found, np.broadcast_to(numpy_helper.to_array(bias)[:5], found.shape), rtol=1e-3)
