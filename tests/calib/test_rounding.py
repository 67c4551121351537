"""Rounding on the grids, against every possible rounding, PyTorch's own casts and ONNX Runtime's own operators."""

from __future__ import annotations

import itertools

import numpy as np
import onnx
import pytest
import torch
from onnx import helper
from tiny_graphs import run

from swin_deploy.errors import UsageError
from swin_deploy.exporters.quantization.gptq import (
    Moments,
    best_activation_scale,
    gptq,
    grid,
    quantized_activation,
    rounded_linear,
    scale_of_range,
    weight_scales,
)
from swin_deploy.exporters.quantization.qdq import ActivationScale

RNG = np.random.default_rng(0)


def test_e4m3_is_that_of_torch() -> None:
    values = (RNG.standard_normal(4096) * np.exp(RNG.uniform(-8, 6, 4096))).astype(np.float32)
    wanted = torch.from_numpy(values).clamp(-448, 448).to(torch.float8_e4m3fn).float().numpy()
    np.testing.assert_array_equal(grid("fp8").nearest(values), wanted)


@pytest.mark.parametrize(("kind", "scale"), [("int8", ActivationScale(0.013, 77)), ("fp8", ActivationScale(0.013))])
def test_activations_are_those_of_onnx_runtime(kind: str, scale: ActivationScale) -> None:
    values = (RNG.standard_normal((64, 8)) * 2).astype(np.float32)
    code = onnx.TensorProto.UINT8 if kind == "int8" else onnx.TensorProto.FLOAT8E4M3FN
    constants = [
        helper.make_tensor("scale", onnx.TensorProto.FLOAT, [], [scale.scale]),
        helper.make_tensor("zero", code, [], [scale.zero_point]),
    ]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"]),
    ]
    ends = [[helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [64, 8])] for name in ("x", "y")]
    graph = helper.make_graph(nodes, "q", *ends, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    np.testing.assert_allclose(quantized_activation(values, scale, grid(kind)), run(model, {"x": values}), rtol=1e-6)


def test_gptq_is_near_the_best_of_all_roundings() -> None:
    """Ten inputs that are mixtures of five: of all roundings up or down, GPTQ's is close to the best, the nearest is not."""
    inputs = RNG.standard_normal((500, 5)) @ RNG.standard_normal((5, 10)) + 0.1 * RNG.standard_normal((500, 10))
    gram = inputs.T @ inputs / 500
    ratios = []
    for _ in range(20):
        weight = RNG.uniform(-9, 9, (1, 10))
        choices = np.array(list(itertools.product(*((np.floor(w), np.ceil(w)) for w in weight[0]))))

        def damage(codes: np.ndarray, weight: np.ndarray = weight) -> np.ndarray:
            return np.einsum("ni,ij,nj->n", codes - weight, gram, codes - weight)

        found = damage(gptq(weight, gram, np.ones(1), grid("int8")))[0]
        ratios.append((found / damage(choices).min(), found / damage(np.rint(weight))[0]))
    best, nearest = np.exp(np.log(ratios).mean(axis=0))
    assert best < 2.5
    assert nearest < 0.35


def test_gptq_of_uncorrelated_inputs_is_the_nearest() -> None:
    weight = RNG.uniform(-100, 100, (5, 200))
    np.testing.assert_array_equal(gptq(weight, np.eye(200), np.ones(5), grid("int8")), np.rint(weight))


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_a_layer_answers_the_fp32_input_from_the_damaged_one(kind: str) -> None:
    """Half of the input is damaged; the other half says the same, and the layer learns to listen to that."""
    half = RNG.standard_normal((2000, 8)).astype(np.float32)
    meant = np.concatenate([half, half], axis=1)
    seen = meant.copy()
    seen[:, :8] = seen[:, :8] * 0.8 + 0.3
    weight, bias = RNG.standard_normal((4, 16)).astype(np.float32), RNG.standard_normal(4).astype(np.float32)
    moments = Moments.empty(16)
    for part in range(0, 2000, 500):
        moments.add(seen[part : part + 500], meant[part : part + 500])
    codes, scale, found = rounded_linear(weight, bias, moments, grid(kind))
    wanted = meant @ weight.T + bias
    answered = seen @ (codes.astype(np.float32) * scale[:, None]).T + found
    untouched = np.linalg.norm(seen @ weight.T + bias - wanted)
    assert np.linalg.norm(answered - wanted) < (0.05 if kind == "int8" else 0.15) * untouched
    np.testing.assert_allclose(answered.mean(axis=0), wanted.mean(axis=0), atol=1e-4)


def test_dead_channels_are_no_obstacle() -> None:
    seen = RNG.standard_normal((100, 6)).astype(np.float32)
    seen[:, 2] = 0
    moments = Moments.empty(6)
    moments.add(seen, seen)
    codes, scale, bias = rounded_linear(np.ones((3, 6), np.float32), None, moments, grid("int8"))
    assert np.isfinite(scale).all()
    np.testing.assert_allclose(codes * scale[:, None], np.ones((3, 6)), atol=0.01)
    np.testing.assert_allclose(bias, 0, atol=1e-6)


def test_one_sided_values_take_all_codes_and_outliers_are_clipped() -> None:
    values = np.abs(RNG.standard_normal((5000, 4))).astype(np.float32) - 0.17
    assert scale_of_range(-0.17, 4.0, grid("int8"), symmetric=False).zero_point == 10
    assert scale_of_range(-0.17, 4.0, grid("int8"), symmetric=True).zero_point == 128
    values[0, 0] = 40
    ignored, heard = (
        best_activation_scale(values, float(values.min()), 40.0, np.array([heard, 1, 1, 1]), grid("int8"), symmetric=False)
        for heard in (0, 1)
    )
    assert ignored.scale < 0.35 * heard.scale
    assert heard.scale * 255 > 0.9 * 40


def test_a_row_of_zeros_has_a_scale() -> None:
    weight = np.array([[0.0, 0.0], [1.0, -2.0]])
    scales = weight_scales(weight, grid("int8"))
    assert scales[0] > 0
    assert scales[1] == pytest.approx(2 / 127)


def test_another_grid_is_refused() -> None:
    with pytest.raises(UsageError, match="int8, fp8"):
        grid("int4")
