"""Emulate fp16 and bf16 graphs in fp32, with the result of every node rounded to its type.

ONNX Runtime has no bf16 kernels on a CPU and few for fp16; without one it computes in fp32 and rounds only some results. The
emulated graph rounds after every node, like a GPU that accumulates in fp32.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from swin_deploy.bundle import load_graph
from swin_deploy.dependencies import require

if TYPE_CHECKING:
    import onnx


def emulated_file(path: Path, folder: Path) -> Path:
    """Write the emulated copy of the graph `path` and its weights into `folder`."""
    onnx = require("onnx", "compare a graph whose types the back end has no kernels for")
    target = folder / "emulated.onnx"
    onnx.save(emulated(load_graph(path)), str(target), save_as_external_data=True, location="emulated.onnx_data")
    return target


def emulated(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a float32 copy of `model` with the same results as the fp16 or bf16 graph, up to summation order."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    low_precision = {TensorProto.FLOAT16, TensorProto.BFLOAT16}
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph, types = copy.graph, {}
    for initializer in graph.initializer:
        if initializer.data_type in low_precision:
            types[initializer.name] = initializer.data_type
            values = numpy_helper.to_array(initializer).astype(np.float32)
            initializer.CopyFrom(numpy_helper.from_array(values, initializer.name))
    nodes = []
    frames = {value.name for value in graph.input if value.type.tensor_type.elem_type == TensorProto.UINT8}
    for node in model.graph.node:
        kept = onnx.NodeProto()
        kept.CopyFrom(node)
        kind = next((types[name] for name in node.input if name in types), None)
        if node.op_type == "Cast":
            kind = next(helper.get_attribute_value(a) for a in node.attribute if a.name == "to")
            if node.input[0] in frames:
                kept = helper.make_node("Cast", node.input, node.output, node.name, to=TensorProto.FLOAT)
            elif kind in {*low_precision, TensorProto.FLOAT}:
                kept = helper.make_node("Identity", node.input, node.output, node.name)
        elif node.input and node.input[0] in frames:
            frames.update(node.output)
        nodes.append(kept)
        if kind not in low_precision or node.op_type in ("Shape", "QuantizeLinear"):
            continue
        for position, name in enumerate(node.output):
            types[name] = kind
            exact, rounded = f"{name}/exact", f"{name}/rounded"
            kept.output[position] = exact
            nodes.append(helper.make_node("Cast", [exact], [rounded], to=kind))
            nodes.append(helper.make_node("Cast", [rounded], [name], to=TensorProto.FLOAT))
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)
    return copy
