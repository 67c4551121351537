"""Rounding of weights, against every possible rounding, PyTorch's casts and ONNX Runtime's operators."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from small_graphs import model_from_text
from tiny_mlp import run

from swin_deploy.errors import InputError
from swin_deploy.exporters.quantization.gptq import (
    NEAREST,
    GptqRounding,
    InputChange,
    InverseFactor,
    LayerMoments,
    SecondMoments,
    best_activation_scale,
    gptq,
    input_moments,
    int8_scales,
    pair_sums,
    quantized_activation,
    rounded_linear,
    scale_of_range,
)
from swin_deploy.exporters.quantization.qdq import ActivationScale
from swin_deploy.machine import PAIR_LIMIT

RNG = np.random.default_rng(0)


def test_e4m3_is_that_of_torch() -> None:
    values = (RNG.standard_normal(4096) * np.exp(RNG.uniform(-8, 6, 4096))).astype(np.float32)
    wanted = torch.from_numpy(values).clamp(-448, 448).to(torch.float8_e4m3fn).float().numpy()
    np.testing.assert_array_equal(NEAREST["fp8"](values), wanted)


def test_activations_are_those_of_onnx_runtime() -> None:
    scale, values = ActivationScale(0.013, 77), (RNG.standard_normal((64, 8)) * 2).astype(np.float32)
    text = """q (float[64, 8] x) => (float[64, 8] y) {
        q = QuantizeLinear(x, scale, zero)
        y = DequantizeLinear(q, scale, zero)
    }"""
    model = model_from_text(text, scale=np.float32(scale.scale), zero=np.uint8(scale.zero_point))
    np.testing.assert_allclose(quantized_activation(values, scale), run(model, {"x": values}), rtol=1e-6)


def test_gptq_is_near_the_best_of_all_roundings() -> None:
    """Ten inputs that are mixtures of five: of all roundings up or down, GPTQ's is close to the best, the nearest is not."""
    inputs = RNG.standard_normal((500, 5)) @ RNG.standard_normal((5, 10)) + 0.1 * RNG.standard_normal((500, 10))
    gram = inputs.T @ inputs / 500
    ratios = []
    for _ in range(20):
        weight = RNG.uniform(-9, 9, (1, 10))
        choices = np.array(list(itertools.product(*((np.floor(w), np.ceil(w)) for w in weight[0]))))

        def damage(values: np.ndarray, weight: np.ndarray = weight) -> np.ndarray:
            return np.einsum("ni,ij,nj->n", values - weight, gram, values - weight)

        found = damage(gptq(weight, InverseFactor.of(gram), np.ones(1)))[0]
        ratios.append((found / damage(choices).min(), found / damage(np.rint(weight))[0]))
    best, nearest = np.exp(np.log(ratios).mean(axis=0))
    assert best < 2.5
    assert nearest < 0.35


def test_gptq_of_uncorrelated_inputs_is_the_nearest() -> None:
    weight = RNG.uniform(-100, 100, (5, 200))
    np.testing.assert_array_equal(gptq(weight, InverseFactor.of(np.eye(200)), np.ones(5)), np.rint(weight))


def test_inverse_factors_and_gptq_are_those_of_lapack_column_by_column() -> None:
    inputs = RNG.standard_normal((900, 300)) * RNG.uniform(0.1, 3, 300)
    hessian, weight = inputs.T @ inputs / 900, RNG.uniform(-100, 100, (7, 300))
    inverse = InverseFactor.of(hessian)
    np.testing.assert_allclose(inverse.times(weight.T), np.linalg.solve(hessian, weight.T), rtol=1e-9, atol=1e-9)
    order = np.argsort(-np.diag(hessian), kind="stable")
    factor = np.linalg.cholesky(np.linalg.inv(hessian[np.ix_(order, order)])).T
    np.testing.assert_allclose(inverse.factor, factor, rtol=1e-8, atol=1e-10)
    work, wanted = weight[:, order].copy(), np.empty_like(weight)
    for column in range(300):
        wanted[:, order[column]] = np.rint(np.clip(work[:, column], -127, 127))
        error = (work[:, column] - wanted[:, order[column]]) / factor[column, column]
        work[:, column:] -= np.outer(error, factor[column, column:])
    np.testing.assert_array_equal(gptq(weight, inverse, np.ones(7)), wanted)
    with pytest.raises(np.linalg.LinAlgError):
        InverseFactor.of(-hessian)


def test_layers_of_one_input_are_rounded_as_each_alone() -> None:
    seen, weights = RNG.standard_normal((500, 40)), [RNG.standard_normal((rows, 40)).astype(np.float32) for rows in (3, 5)]
    expected = seen + 0.1 * RNG.standard_normal((500, 40))

    def moments(*weights: Any) -> LayerMoments:
        made = LayerMoments(np.concatenate(weights))
        made.add(seen.copy(), expected.copy())
        return made

    biases = [None, np.ones(5, np.float32)]
    together = rounded_linear(weights, biases, moments(*weights))
    for weight, bias, found in zip(weights, biases, together, strict=True):
        [alone] = rounded_linear([weight], [bias], moments(weight))
        np.testing.assert_array_equal(found[0], alone[0])
        np.testing.assert_allclose(found[2], alone[2], rtol=1e-6)


def test_a_layer_gives_the_fp32_output_from_a_damaged_input() -> None:
    """Half of the input is damaged; the other half has the same information, and the layer learns to use that."""
    half = RNG.standard_normal((2000, 8)).astype(np.float32)
    expected = np.concatenate([half, half], axis=1)
    seen = expected.copy()
    seen[:, :8] = seen[:, :8] * 0.8 + 0.3
    weight, bias = RNG.standard_normal((4, 16)).astype(np.float32), RNG.standard_normal(4).astype(np.float32)
    moments = LayerMoments(weight)
    for part in range(0, 2000, 500):
        moments.add(seen[part : part + 500], expected[part : part + 500])
    [(values, scale, found)] = rounded_linear([weight], [bias], moments)
    wanted = expected @ weight.T + bias
    output = seen @ (values.astype(np.float32) * scale[:, None]).T + found
    untouched = np.linalg.norm(seen @ weight.T + bias - wanted)
    assert np.linalg.norm(output - wanted) < 0.05 * untouched
    np.testing.assert_allclose(output.mean(axis=0), wanted.mean(axis=0), atol=1e-4)


@pytest.mark.parametrize("channels", [40, 41])
def test_sums_of_two_products_fit_into_16_bits(channels: int) -> None:
    """And the outputs are nearer than with a scale for which any sum fits."""
    seen, weight = RNG.standard_normal((3000, channels)), RNG.standard_normal((8, channels)).astype(np.float32)
    weight[0, :2] = 3
    seen = (seen @ RNG.standard_normal((channels, channels))).astype(np.float32)
    moments = LayerMoments(weight)
    moments.add(seen.copy(), seen.copy())
    [(values, scale, _)] = rounded_linear([weight], [None], moments)
    pairs = values[:, : channels // 2 * 2].reshape(8, -1, 2).astype(int)
    largest = max(np.maximum(pairs, 0).sum(axis=2).max(), -np.minimum(pairs, 0).sum(axis=2).min())
    assert 255 * largest <= np.iinfo(np.int16).max
    assert largest >= pair_sums(values).max() > 120
    assert (pair_sums(values) <= PAIR_LIMIT).all()
    half = np.rint(weight / (scale := np.abs(weight).max(axis=1) / 63)[:, None]) * scale[:, None]
    [(values, scale, _)] = rounded_linear([weight], [None], moments)
    error = [np.linalg.norm(seen @ (one - weight).T) for one in (values * scale[:, None], half)]
    assert error[0] < error[1]


def test_moments_are_exact_far_from_zero() -> None:
    """Batch by batch, whether the outputs are fewer than the channels or not, of values with a mean of a thousand."""
    seen = (1000 + RNG.standard_normal((9000, 6))).astype(np.float32)
    expected = seen + RNG.standard_normal((9000, 6)).astype(np.float32)
    for outputs in (2, 8):
        weight = RNG.standard_normal((outputs, 6)).astype(np.float32)
        moments = LayerMoments(weight)
        for start in range(0, 9000, 1000):
            moments.add(seen[start : start + 1000].copy(), expected[start : start + 1000].copy())
        gram, change, mean, wanted = moments.centred()
        exact = seen.astype(np.float64), (expected.astype(np.float64) - seen) @ weight.T.astype(np.float64)
        deviation = exact[0] - exact[0].mean(axis=0)
        np.testing.assert_allclose(gram, deviation.T @ deviation / 9000, atol=1e-3)
        np.testing.assert_allclose(change, deviation.T @ exact[1] / 9000, atol=1e-3)
        np.testing.assert_allclose(mean, exact[0].mean(axis=0), rtol=1e-6)
        np.testing.assert_allclose(wanted, expected.mean(axis=0, dtype=np.float64), rtol=1e-6)


def test_dead_channels_and_rows_of_zeros_are_no_obstacle() -> None:
    seen = RNG.standard_normal((100, 6)).astype(np.float32)
    seen[:, 2] = 0
    moments = LayerMoments(np.ones((3, 6), np.float32))
    moments.add(seen, seen.copy())
    [(values, scale, bias)] = rounded_linear([np.ones((3, 6), np.float32)], [None], moments)
    assert np.isfinite(scale).all()
    np.testing.assert_allclose(values * scale[:, None], np.ones((3, 6)), atol=0.01)
    np.testing.assert_allclose(bias, 0, atol=1e-6)
    scales = int8_scales(np.array([[0.0, 0.0], [1.0, -2.0]]))
    assert scales[0] > 0
    assert scales[1] == pytest.approx(2 / 127)


def test_one_sided_values_use_the_whole_range_and_outliers_are_clipped() -> None:
    values = np.abs(RNG.standard_normal((5000, 4))).astype(np.float32) - 0.17
    assert scale_of_range(-0.17, 4.0).zero_point == 10
    values[0, 0] = 40
    ignored, counted = (
        best_activation_scale(values, float(values.min()), 40.0, np.array([weight, 1, 1, 1])) for weight in (0, 1)
    )
    assert ignored.scale < 0.35 * counted.scale
    assert counted.scale * 255 > 0.9 * 40


def moments_of(x: np.ndarray) -> SecondMoments:
    found = SecondMoments.empty(x.shape[1])
    for part in np.array_split(x, 3):
        found.add(part.reshape(2, -1, x.shape[1]))
    return found


def test_the_hessian_of_a_changed_input_is_that_of_the_input_changed() -> None:
    x = (RNG.standard_normal((60, 6)) + [0, 1, 2, 0, 0, 0]).astype(np.float32)
    change = InputChange(RNG.standard_normal(6), RNG.uniform(0.5, 2, 6), {4: 1.5})
    changed = (x - change.shift) * change.factor
    changed[:, 4] = 1.5
    np.testing.assert_allclose(change.hessian(moments_of(x)), changed.T @ changed / len(x), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(InputChange().hessian(moments_of(x)), x.T @ x / len(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("precision", "largest"), [("int8", 127), ("fp8", 448)])
def test_a_weight_is_rounded_such_that_its_output_changes_less(precision: str, largest: float) -> None:
    x = RNG.standard_normal((420, 6)) @ RNG.standard_normal((6, 24)) + 0.1 * RNG.standard_normal((420, 24)) + 1
    weight = RNG.standard_normal((16, 24)).astype(np.float32)
    scale = (np.abs(weight).max(axis=1) / largest).astype(np.float32)
    rounding, nearest = GptqRounding({"fc2": moments_of(x)}, precision), NEAREST[precision]
    values = rounding("fc2", weight, scale, InputChange())
    assert values is not None
    np.testing.assert_array_equal(values, nearest(values))
    errors = [np.linalg.norm(x @ (one * scale[:, None] - weight).T) for one in (values, nearest(weight / scale[:, None]))]
    assert errors[0] < 0.7 * errors[1]
    assert rounding("fc1", weight, scale, InputChange()) is None


def test_one_pass_measures_what_layers_read_and_refuses_what_is_not_finite() -> None:
    model = model_from_text("g (float[n, 4] x) => (float[n, 4] y) { y = Log(x) }")
    onnx.checker.check_model(model)
    x = RNG.uniform(1, 2, (10, 4)).astype(np.float32)
    found = input_moments(model, {"a": "y", "b": "y"}, [{"x": x[:7]}, {"x": x[7:]}], 1)
    np.testing.assert_allclose(found["a"].gram, np.log(x).T @ np.log(x), rtol=1e-5)
    assert found["b"].rows == 10
    with pytest.raises(InputError, match=r"value in y is not finite\. Look for damaged images"):
        input_moments(model, {"a": "y"}, [{"x": x * 0}], 1)
