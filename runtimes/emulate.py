"""emulated: a typed graph computed in float32, with every result rounded to the type that the graph gives it.

ONNX Runtime has no bfloat16 kernels on a CPU, and few for float16; where it has none it computes in float32 and rounds
only now and then. The emulated graph rounds after every node, as a GPU does, which accumulates in float32 too.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from swin_deploy.dependencies import require

if TYPE_CHECKING:
    import onnx


def emulated_file(path: Path, folder: Path) -> Path:
    """A file in `folder` with the emulated copy of the graph at `path`, its weights beside it."""
    onnx = require("onnx", "compare a graph whose types the back end has no kernels for")
    target = folder / "emulated.onnx"
    onnx.save(emulated(onnx.load(str(path))), str(target), save_as_external_data=True, location="emulated.onnx_data")
    return target


def emulated(model: onnx.ModelProto) -> onnx.ModelProto:
    """A float32 copy of `model`, weights inside, that answers as the float16 or bfloat16 graph does up to summation order."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    narrow = {TensorProto.FLOAT16, TensorProto.BFLOAT16}
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph, types = copy.graph, {}
    for initializer in graph.initializer:
        if initializer.data_type in narrow:
            types[initializer.name] = initializer.data_type
            values = numpy_helper.to_array(initializer).astype(np.float32)
            initializer.CopyFrom(numpy_helper.from_array(values, initializer.name))
    nodes = []
    whole = {value.name for value in graph.input if value.type.tensor_type.elem_type == TensorProto.UINT8}  # and what moves it
    for node in model.graph.node:
        kept = onnx.NodeProto()
        kept.CopyFrom(node)
        kind = next((types[name] for name in node.input if name in types), None)
        if node.op_type == "Cast":
            kind = next(helper.get_attribute_value(a) for a in node.attribute if a.name == "to")
            if node.input[0] in whole:
                kept = helper.make_node("Cast", node.input, node.output, node.name, to=TensorProto.FLOAT)
            elif kind in {*narrow, TensorProto.FLOAT}:
                kept = helper.make_node("Identity", node.input, node.output, node.name)
        elif node.input and node.input[0] in whole:
            whole.update(node.output)
        nodes.append(kept)
        if kind not in narrow or node.op_type in ("Shape", "QuantizeLinear"):
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
