"""Moments of what layers read, against the inputs themselves, and weights rounded by them."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from swin_deploy.errors import InputError
from swin_deploy.exporters.quantization.for_tensorrt import Changed
from swin_deploy.exporters.quantization.gptq import InputMoments, Repaired, balanced, changed_gram, grid, input_moments

RNG = np.random.default_rng(0)


def moments(x: np.ndarray) -> InputMoments:
    found = InputMoments.empty(x.shape[1])
    for part in np.array_split(x, 3):
        found.add(part.reshape(2, -1, x.shape[1]))
    return found


def test_the_moments_of_a_changed_input_are_those_of_the_input_changed() -> None:
    x = (RNG.standard_normal((60, 6)) + [0, 1, 2, 0, 0, 0]).astype(np.float32)
    change = Changed(RNG.standard_normal(6), RNG.uniform(0.5, 2, 6), {4: 1.5})
    changed = (x - change.shift) * change.factor
    changed[:, 4] = 1.5
    np.testing.assert_allclose(changed_gram(moments(x), change), changed.T @ changed / len(x), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(changed_gram(moments(x), Changed()), x.T @ x / len(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_a_weight_is_rounded_so_that_its_input_sees_less_of_it(kind: str) -> None:
    x = RNG.standard_normal((420, 6)) @ RNG.standard_normal((6, 24)) + 0.1 * RNG.standard_normal((420, 24)) + 1
    weight = RNG.standard_normal((16, 24)).astype(np.float32)
    steps = (np.abs(weight).max(axis=1) / grid(kind).top).astype(np.float32)
    rounding = Repaired({"fc2": moments(x)}, kind)
    numbers = rounding("fc2", weight, steps, Changed())
    assert numbers is not None
    np.testing.assert_array_equal(numbers, grid(kind).nearest(numbers))
    nearest = grid(kind).nearest(weight / steps[:, None])
    errors = [np.linalg.norm(x @ (codes * steps[:, None] - weight).T) for codes in (numbers, nearest)]
    assert errors[0] < 0.7 * errors[1]
    assert rounding("fc1", weight, steps, Changed()) is None


def test_one_pass_finds_what_layers_read_and_refuses_what_is_not_finite() -> None:
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 4]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Log", ["x"], ["y"])], "g", ends[:1], ends[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    x = RNG.uniform(1, 2, (10, 4)).astype(np.float32)
    found = input_moments(model, {"a": "y", "b": "y"}, [{"x": x[:7]}, {"x": x[7:]}], 1)
    np.testing.assert_allclose(found["a"].gram, np.log(x).T @ np.log(x), rtol=1e-5)
    assert found["b"].rows == 10
    with pytest.raises(InputError, match="y that is not finite; look for damaged images"):
        input_moments(model, {"a": "y"}, [{"x": x * 0}], 1)


def test_channels_are_balanced_by_powers_of_two_and_the_network_stays_what_it_was_to_the_bit() -> None:
    """A norm with one channel 20 times larger, which two layers read, one of them not quantised."""
    ort = pytest.importorskip("onnxruntime", reason="runs the graph")
    scale, shift = RNG.uniform(0.5, 2, 8), RNG.standard_normal(8)
    scale[3] *= 20
    constants = {"scale": scale, "shift": shift, "w1": RNG.standard_normal((6, 8)), "w2": RNG.standard_normal((5, 8))}
    constants["w1"][:, 3] /= 4
    nodes = [
        helper.make_node("LayerNormalization", ["x", "scale", "shift"], ["normed"], axis=-1),
        helper.make_node("Gemm", ["normed", "w1"], ["a"], "qkv/Gemm", transB=1),
        helper.make_node("Gemm", ["normed", "w2"], ["b"], "other/Gemm", transB=1),
    ]
    ends = {
        name: helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", n]) for name, n in (("x", 8), ("a", 6), ("b", 5))
    }
    tensors = [numpy_helper.from_array(value.astype(np.float32), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "g", [ends["x"]], [ends["a"], ends["b"]], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    x = RNG.standard_normal((400, 8)).astype(np.float32)
    before = input_moments(model, {"qkv": "normed"}, [{"x": x}], 1)
    made, after = balanced(model, before)

    def answers(one: onnx.ModelProto) -> list[np.ndarray]:
        return list(ort.InferenceSession(one.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"x": x}))

    for old, new in zip(answers(model), answers(made), strict=True):
        np.testing.assert_array_equal(old, new)
    largest = before["qkv"].largest, after["qkv"].largest
    factors = largest[0] / largest[1]
    np.testing.assert_array_equal(factors, np.exp2(np.rint(np.log2(factors))))
    assert factors[3] == factors.max() > 2
    assert largest[1].max() / np.median(largest[1]) < 0.5 * largest[0].max() / np.median(largest[0])
    again = input_moments(made, {"qkv": "normed"}, [{"x": x}], 1)["qkv"]
    np.testing.assert_allclose(after["qkv"].gram, again.gram, rtol=1e-5, atol=1e-2)
    np.testing.assert_allclose(after["qkv"].total, again.total, rtol=1e-4, atol=1e-3)
    np.testing.assert_array_equal(largest[1], again.largest)
