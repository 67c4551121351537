"""LayerNorm in front of fc1 -> fc1 of the tokens themselves, and the division by their deviation behind it.

The norm's kernel then writes one number for each token instead of all channels; taking the mean away and multiplying by the
norm's weight are in fc1's weight. fp16 holds the product: the rows of the weight are shrunk, by one power of two that the
deviation is shrunk by as well, so far that none is longer than 1.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from swin_deploy.exporters.quantization.qdq import Quantizer

from .attention import constant
from .base import Graph


def norm_behind_product(graph: Graph, quantizer: Quantizer) -> int:
    """The number of norms rewritten; the nodes that compute deviations stay fp32 (`quantizer.wide`)."""
    count = 0
    for product in [node for node in graph.nodes if node.op == "Gemm" and node.name.endswith("fc1/Gemm")]:
        norm = product.inputs[0].inputs[0] if product.inputs[0].inputs else None
        if norm is None or norm.op != "LayerNormalization" or len(norm.outputs[0].outputs) != 1:
            continue
        _rewrite(product, norm, quantizer)
        count += 1
    return count


def _rewrite(product: Any, norm: Any, quantizer: Quantizer) -> None:
    import onnx_graphsurgeon as gs

    scale, *shifts = (np.asarray(tensor.values, np.float64) for tensor in norm.inputs[1:3])
    weight, *biases = (np.asarray(tensor.values, np.float64) for tensor in product.inputs[1:3])
    bias = sum((weight @ shift for shift in shifts), sum(biases, np.zeros(len(weight))))
    weight = weight * scale
    weight -= weight.mean(axis=1, keepdims=True)
    shrunk = 2.0 ** -max(0, int(np.ceil(np.log2(max(np.linalg.norm(weight, axis=1).max(), 1e-30)))))

    def wide(op: str, *inputs: Any, **attributes: Any) -> Any:
        name = f"{norm.name}/Deviation{op}{len(quantizer.graph.nodes)}"
        quantizer.wide.add(name)
        return quantizer.node(name, op, list(inputs), **attributes)

    tokens, axis = norm.inputs[0], Quantizer.constant(f"{norm.name}/axis", np.array([-1]))
    centered = wide("Sub", tokens, wide("ReduceMean", tokens, axis, keepdims=1))
    variance = wide("ReduceMean", wide("Mul", centered, centered), axis, keepdims=1)
    least = constant(f"{norm.name}/epsilon", np.array(norm.attrs.get("epsilon", 1e-5)))
    deviation = wide("Sqrt", wide("Add", variance, least))
    deviation = wide("Mul", deviation, constant(f"{norm.name}/shrunk", np.array(shrunk)))
    result, long = product.outputs[0], gs.Variable(f"{product.name}_product", np.dtype(np.float32))
    product.inputs, product.outputs = [tokens, constant(f"{product.name}_weight", weight * shrunk)], [long]
    divided = quantizer.node(f"{product.name}/Div", "Div", [long, deviation])
    added = quantizer.node(f"{product.name}/Add", "Add", [divided, constant(f"{product.name}_bias", bias)])
    added.inputs[0].outputs = [result]
