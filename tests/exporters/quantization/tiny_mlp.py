"""A tiny MLP for the tests of quantization, made by hand: no exporter has to run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from small_graphs import model_from_text

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
    text = f"""mlp (float[rows, {WIDTH}] x) => (float[rows, {WIDTH}] y) {{
        ["norm"] normed = LayerNormalization <axis = -1> (x, scale, shift)
        ["fc1/Gemm"] hidden = Gemm <transB = 1> (normed, w1, b1)
        ["gelu"] gelu = Gelu(hidden)
        ["fc2/Gemm"] update = Gemm <transB = 1> (gelu, w2)
        ["add"] y = Add(x, update)
    }}"""
    return model_from_text(text, **arrays)


def samples(count: int = 4, rows: int = 64) -> Callable[[], Iterator[dict[str, Array]]]:
    """A function that yields the same `count` batches of inputs each time."""
    arrays = [np.random.default_rng(n).standard_normal((rows, WIDTH)).astype(np.float32) for n in range(count)]
    return lambda: ({"x": array} for array in arrays)


def run(model: onnx.ModelProto, feeds: dict[str, Array], exact: bool = False, output: str | None = None) -> Array:
    """One output, by default the first; `exact` computes Q/DQ without ONNX Runtime's own 8-bit kernels."""
    level = {"graph_optimization_level": ort.GraphOptimizationLevel.ORT_DISABLE_ALL, "config": EXACT_QDQ} if exact else {}
    session = onnxruntime_session(model.SerializeToString(), **level)
    found: Array = session.run(None if output is None else [output], feeds)[0]
    return found
