"""Small fp16 graphs for the compiler."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from swin_deploy.options import EngineSpec

HEADS, TOKENS, WIDTH = 3, 64, 32
SM89 = EngineSpec(backend="tensorrt-rtx", gpus="sm_89")


@contextlib.contextmanager
def compiler_messages() -> Iterator[list[tuple[str, str]]]:
    """Yield a list that collects (level, message) of everything TensorRT says meanwhile."""
    found: list[tuple[str, str]] = []
    handler, log = logging.Handler(), logging.getLogger("swin_deploy.tensorrt")
    handler.emit = lambda record: found.append((record.levelname, record.getMessage()))  # type: ignore[method-assign]
    before = log.level
    log.setLevel(logging.DEBUG)
    log.addHandler(handler)
    try:
        yield found
    finally:
        log.removeHandler(handler)
        log.setLevel(before)


def graph(nodes: list[onnx.NodeProto], inputs: dict[str, list], outputs: dict[str, list], **tables: np.ndarray):
    half = TensorProto.FLOAT16
    return helper.make_model(
        helper.make_graph(
            nodes,
            "graph",
            [helper.make_tensor_value_info(name, half, shape) for name, shape in inputs.items()],
            [helper.make_tensor_value_info(name, half, shape) for name, shape in outputs.items()],
            [numpy_helper.from_array(table.astype(np.float16), name) for name, table in tables.items()],
        ),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )


def attention(batch: int | str = "batch", blocks: int = 1) -> onnx.ModelProto:
    """MatMul, Add of a constant bias, Softmax, MatMul, each block feeding the next one's queries."""
    nodes, queries = [], "q"
    for block in range(blocks):
        result = "y" if block == blocks - 1 else f"y{block}"
        nodes += [
            helper.make_node("MatMul", [queries, "k"], [f"s{block}"], name=f"scores{block}"),
            helper.make_node("Add", [f"s{block}", "bias"], [f"a{block}"]),
            helper.make_node("Softmax", [f"a{block}"], [f"p{block}"], axis=-1),
            helper.make_node("MatMul", [f"p{block}", "v"], [result]),
        ]
        queries = result
    rows, columns = [batch, HEADS, TOKENS, WIDTH], [batch, HEADS, WIDTH, TOKENS]
    bias = np.random.default_rng(0).normal(size=(1, HEADS, TOKENS, TOKENS))
    return graph(nodes, {"q": rows, "k": columns, "v": rows}, {"y": rows}, bias=bias)


def linear(batch: int | str = "batch", width: int | str = 64) -> onnx.ModelProto:
    weights = np.random.default_rng(0).normal(size=(64, 64))
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Relu", ["h"], ["y"])]
    return graph(nodes, {"x": [batch, width, 64]}, {"y": [batch, width, 64]}, w=weights)
