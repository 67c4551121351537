"""Move LayerNorms after gathers of tokens, which then cost a GPU nothing, and their division after fc1's matmul."""

from __future__ import annotations

from typing import Any

import numpy as np

from .base import Graph, Node, Pass, Tensor, add_node, blocks, constant, redirect


def gather_before_norm(graph: Graph) -> int:
    """Move gathers of tokens before the norm, and in V2 before the addition to the tokens. Returns the number of norms."""
    count = 0
    for norm in [node for node in graph.nodes if node.op == "LayerNormalization"]:
        add = _addition(norm)
        if add is None and not _is_of_patches(norm):
            continue
        count += 1
        end = norm if add is None else add
        chain = _gather_after(end)
        if not chain:
            continue
        norm.inputs[0] = _copied(graph, chain, norm.inputs[0])
        norm.outputs[0].shape = chain[-1].outputs[0].shape
        if add is not None:
            tokens = 1 - add.inputs.index(norm.outputs[0])
            add.inputs[tokens] = _copied(graph, chain, add.inputs[tokens])
            add.outputs[0].shape = chain[-1].outputs[0].shape
        old, new = chain[-1].outputs[0], end.outputs[0]
        chain[0].inputs.clear()
        redirect(old.outputs, old, new)
    return count


def _addition(norm: Node) -> Node | None:
    """The node that adds the output of `norm` to the tokens, if nothing else reads it."""
    reader, *others = norm.outputs[0].outputs or [None]
    if others or reader is None or reader.op != "Add":
        return None
    return None if any(isinstance(getattr(tensor, "values", None), np.ndarray) for tensor in reader.inputs) else reader


def _is_of_patches(norm: Node) -> bool:
    node = norm
    return all(node.inputs[0].inputs and (node := node.i()).op == op for op in ("Transpose", "Reshape", "Conv"))


def _gather_after(node: Node) -> list[Node]:
    """The Gather that alone reads the output of `node`, with the Reshape before and after it where there are any; or empty."""
    chain = [node]
    for op in ("Reshape", "Gather", "Reshape"):
        readers = chain[-1].outputs[0].outputs
        if len(readers) == 1 and readers[0].op == op:
            chain.append(readers[0])
        elif op == "Gather":
            return []
    return chain[1:]


def _copied(graph: Graph, chain: list[Node], tensor: Tensor) -> Tensor:
    """The output of a copy of `chain` that reads `tensor`."""
    for node in chain:
        before = node.outputs[0]
        name = f"{node.name}_{len(graph.nodes)}"
        tensor = add_node(graph, name, node.op, [tensor, *node.inputs[1:]], dtype=before.dtype, **node.attrs)
        tensor.shape = before.shape
    return tensor


def norm_after_matmul(graph: Graph, fallback: set[str]) -> int:
    """Let fc1 read the tokens, and divide its matmul by their deviation: one number per token. Returns the number of norms.

    One power of two shrinks weight and deviation, so that fp16 holds the matmul. `fallback` receives nodes that must stay fp32.
    """
    count = 0
    for matmul in [node for node in graph.nodes if node.op == "Gemm" and node.name.endswith("fc1/Gemm")]:
        norm = matmul.inputs[0].inputs[0] if matmul.inputs[0].inputs else None
        if norm is None or norm.op != "LayerNormalization" or len(norm.outputs[0].outputs) != 1:
            continue
        _divide_after(graph, matmul, norm, fallback)
        count += 1
    return count


def _divide_after(graph: Graph, matmul: Node, norm: Node, fallback: set[str]) -> None:
    import onnx_graphsurgeon as gs

    scale, *shifts = (np.asarray(tensor.values, np.float64) for tensor in norm.inputs[1:3])
    weight, *biases = (np.asarray(tensor.values, np.float64) for tensor in matmul.inputs[1:3])
    bias = sum((weight @ shift for shift in shifts), sum(biases, np.zeros(len(weight))))
    weight = weight * scale
    weight -= weight.mean(axis=1, keepdims=True)
    shrunk = 2.0 ** -max(0, int(np.ceil(np.log2(max(np.linalg.norm(weight, axis=1).max(), 1e-30)))))

    def fp32(op: str, *inputs: Any, **attributes: Any) -> Any:
        name = f"{norm.name}/Deviation{op}{len(graph.nodes)}"
        fallback.add(name)
        return add_node(graph, name, op, inputs, **attributes)

    tokens, axis = norm.inputs[0], constant(f"{norm.name}/axis", [-1], np.int64)
    centered = fp32("Sub", tokens, fp32("ReduceMean", tokens, axis, keepdims=1))
    variance = fp32("ReduceMean", fp32("Mul", centered, centered), axis, keepdims=1)
    epsilon = constant(f"{norm.name}/epsilon", [norm.attrs.get("epsilon", 1e-5)])
    deviation = fp32("Sqrt", fp32("Add", variance, epsilon))
    deviation = fp32("Mul", deviation, constant(f"{norm.name}/shrunk", [shrunk]))
    result, long = matmul.outputs[0], gs.Variable(f"{matmul.name}_matmul", np.dtype(np.float32))
    matmul.inputs, matmul.outputs = [tokens, constant(f"{matmul.name}_weight", weight * shrunk)], [long]
    divided = add_node(graph, f"{matmul.name}/Div", "Div", [long, deviation])
    added = add_node(graph, f"{matmul.name}/Add", "Add", [divided, constant(f"{matmul.name}_bias", bias)])
    added.inputs[0].outputs = [result]


GATHER_BEFORE_NORM = Pass("gather_before_norm", gather_before_norm, lambda config: config.patch_norm + 2 * blocks(2)(config))
