"""Write a graph in the operators of another opset. The exporter and the passes write those of opset 20."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .base import set_nodes

REDUCTIONS = ("ReduceL2", "ReduceMax", "ReduceMean")  # ReduceSum reads its axes from an input since opset 13
# The opsets that introduced attributes and operators.
ATTRIBUTES = {
    **{(name, "noop_with_empty_axes"): 18 for name in REDUCTIONS},
    **{("Split", "num_outputs"): 18, ("Cast", "saturate"): 19, ("QuantizeLinear", "saturate"): 19},
}
OPERATORS = {"Mish": 18, "Gelu": 20}


def convert_opset(model: Any, opset: int) -> None:
    """Rewrite the operators of `model` as those of `opset`, 17 or later. What was one Gelu or Mish stays decomposed."""
    from onnx import helper, numpy_helper

    graph = model.graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    writer = _Decomposed()
    for node in graph.node:
        if opset < OPERATORS.get(node.op_type, 0):
            writer.add(node)
            continue
        settings = {one.name: one for one in node.attribute if opset >= ATTRIBUTES.get((node.op_type, one.name), 0)}
        inputs = list(node.input)
        if node.op_type in REDUCTIONS and opset < 18 and len(inputs) == 2:
            axes = numpy_helper.to_array(tensors[inputs.pop()])
            settings["axes"] = helper.make_attribute("axes", axes.tolist())
        elif node.op_type in REDUCTIONS and opset >= 18 and "axes" in settings:
            inputs.append(writer.constant(f"{node.name}/axes", np.array(settings.pop("axes").ints, np.int64)))
        elif node.op_type == "Split" and opset >= 18 and len(inputs) == 1:
            settings.setdefault("num_outputs", helper.make_attribute("num_outputs", len(node.output)))
        made = helper.make_node(node.op_type, inputs, node.output, node.name, node.doc_string, node.domain)
        made.attribute.extend(settings.values())
        writer.nodes.append(made)
    graph.initializer.extend(writer.constants.values())
    set_nodes(graph, writer.nodes)
    next(domain for domain in model.opset_import if not domain.domain).version = opset


class _Decomposed:
    """Collects nodes, and writes activations that an opset lacks as several."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: dict[str, Any] = {}

    def add(self, node: Any) -> None:
        """Write `node`, a float32 Gelu or Mish."""
        from onnx import helper

        (x,), (result,), first = node.input, node.output, len(self.nodes)

        def op(kind: str, *inputs: str | float) -> str:
            names = [one if isinstance(one, str) else self.constant(f"constant/{one:.9g}", np.float32(one)) for one in inputs]
            name = f"{node.name}/{kind}{len(self.nodes) - first}"
            self.nodes.append(helper.make_node(kind, names, [name], name))
            return name

        if node.op_type == "Mish":
            op("Mul", x, op("Tanh", op("Softplus", x)))
        elif any(one.s == b"tanh" for one in node.attribute):
            cubic = op("Add", x, op("Mul", op("Mul", op("Mul", x, x), x), 0.044715))
            op("Mul", op("Mul", x, op("Add", op("Tanh", op("Mul", cubic, math.sqrt(2 / math.pi))), 1.0)), 0.5)
        else:  # in this order ONNX Runtime, OpenVINO and TensorRT make one operation of it again
            op("Mul", op("Mul", x, op("Add", op("Erf", op("Div", x, math.sqrt(2))), 1.0)), 0.5)
        self.nodes[-1].output[0] = result

    def constant(self, name: str, value: Any) -> str:
        from onnx import numpy_helper

        self.constants[name] = numpy_helper.from_array(value, name)
        return name
