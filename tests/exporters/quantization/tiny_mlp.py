"""A tiny MLP for the tests of quantization, made by hand: no exporter has to run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from swin_deploy.dependencies import EXACT_QDQ, onnxruntime_session

Array = np.ndarray[Any, Any]
WIDTH = 16


def mlp_model(large: float = 1) -> onnx.ModelProto:
    """x [rows, 16] -> LayerNormalization, two channels `large` -> Gemm -> Gelu -> Gemm without bias, x added -> y."""
    rng = np.random.default_rng(0)

    def values(*shape: int) -> Array:
        return (rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)

    scale = np.ones(WIDTH, np.float32)
    scale[[3, 11]] = large
    arrays = {"scale": scale, "shift": values(WIDTH), "w1": values(40, WIDTH), "b1": values(40), "w2": values(WIDTH, 40)}
    nodes = [
        helper.make_node("LayerNormalization", ["x", "scale", "shift"], ["normed"], "norm", axis=-1),
        helper.make_node("Gemm", ["normed", "w1", "b1"], ["hidden"], "fc1/Gemm", transB=1),
        helper.make_node("Gelu", ["hidden"], ["gelu"], "gelu"),
        helper.make_node("Gemm", ["gelu", "w2"], ["update"], "fc2/Gemm", transB=1),
        helper.make_node("Add", ["x", "update"], ["y"], "add"),
    ]
    graph = helper.make_graph(
        nodes,
        "mlp",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["rows", WIDTH])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["rows", WIDTH])],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def samples(count: int = 4, rows: int = 64) -> Callable[[], Iterator[dict[str, Array]]]:
    """A function that yields the same `count` batches of inputs each time."""
    arrays = [np.random.default_rng(n).standard_normal((rows, WIDTH)).astype(np.float32) for n in range(count)]
    return lambda: ({"x": array} for array in arrays)


def run(model: onnx.ModelProto, feeds: dict[str, Array], exact: bool = False, output: str | None = None) -> Array:
    """One output, by default the first; `exact` computes Q/DQ without ONNX Runtime's own 8-bit kernels."""
    session = onnxruntime_session(model.SerializeToString(), config=EXACT_QDQ if exact else {})
    found: Array = session.run(None if output is None else [output], feeds)[0]
    return found
