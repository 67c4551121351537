"""Give a graph with a free batch one number of images, for compilers that accept no other graphs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .base import set_nodes


def fix_batch(model: Any, weights: Mapping[str, Any], batch: int) -> dict[str, Any]:
    """Set the free axes of `model` for `batch` images, and compute what is constant then.

    Returns the weights that the model refers to: `weights`, and those that were computed.
    """
    import onnx
    from onnx import helper, numpy_helper
    from onnx.reference import ReferenceEvaluator

    graph = model.graph
    for value in (*graph.input, *graph.output):
        for axis in value.type.tensor_type.shape.dim:
            if axis.dim_param:
                axis.dim_value = int(axis.dim_param.rpartition("*")[0] or 1) * batch  # of "batch" or "16*batch"
    del graph.value_info[:]
    known = {tensor.name: tensor for tensor in graph.initializer}
    shapes = {value.name: [axis.dim_value for axis in value.type.tensor_type.shape.dim] for value in graph.input}

    def array(name: str) -> Any:
        """The constant `name`, or zeros in the shape of the input `name`, of which only the shape is read."""
        if name in shapes:
            return np.broadcast_to(np.float32(0), shapes[name])
        return np.asarray(weights[name]) if name in weights else numpy_helper.to_array(known[name])

    nodes = []
    for node in graph.node:
        if not all(name in known for name in node.input) and not (node.op_type == "Shape" and node.input[0] in shapes):
            nodes.append(onnx.NodeProto.FromString(node.SerializeToString()))
            continue
        read, made = (
            [helper.make_tensor_value_info(name, onnx.TensorProto.UNDEFINED, None) for name in names]
            for names in (node.input, node.output)
        )
        alone = helper.make_model(helper.make_graph([node], "constant", read, made), opset_imports=model.opset_import)
        feeds = {name: array(name) for name in node.input}
        for name, found in zip(node.output, ReferenceEvaluator(alone).run(None, feeds), strict=True):
            known[name] = numpy_helper.from_array(np.ascontiguousarray(found), name)
            graph.initializer.append(known[name])
    set_nodes(graph, nodes)
    return {tensor.name: weights[tensor.name] for tensor in graph.initializer if tensor.name in weights}
