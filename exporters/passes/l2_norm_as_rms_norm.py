"""x / length of x, in the form of an RMS norm: OpenVINO has a kernel for that, and takes three operations for the other."""

from __future__ import annotations

import numpy as np

from .attention import constant
from .base import Graph, Pass


def length_as_rms_norm(graph: Graph) -> int:
    """The number of divisions by the length (ReduceL2, Clip, Div) that are now divisions by the root of the mean square.

    Where Clip kept the length from zero, a number of that size is added to the mean square; zero stays zero.
    """
    import onnx_graphsurgeon as gs

    count = 0
    for divide in [node for node in graph.nodes if node.op == "Div"]:
        clip = divide.inputs[1].inputs[0] if divide.inputs[1].inputs else None
        if clip is None or clip.op != "Clip" or clip.i().op != "ReduceL2" or clip.i().inputs[0] is not divide.inputs[0]:
            continue
        x, width = divide.inputs[0], divide.inputs[0].shape[-1]
        least = float(clip.inputs[1].values) ** 2 / width
        count += 1

        def node(op: str, *inputs: gs.Tensor, name: str = divide.name, **attributes: int) -> gs.Tensor:
            made = gs.Variable(f"{name}/{op}", np.dtype(np.float32))
            graph.nodes.append(gs.Node(op, f"{name}/{op}", attributes, list(inputs), [made]))
            return made

        square = node("Pow", x, constant(f"{divide.name}/two", np.float32(2)))
        mean = node("ReduceMean", square, gs.Constant(f"{divide.name}/axis", np.array([-1])), keepdims=1)
        root = node("Sqrt", node("Add", mean, constant(f"{divide.name}/least", np.float32(least))))
        inverse = node("Div", constant(f"{divide.name}/one", np.float32(1)), root)
        even = constant(f"{divide.name}/even", np.full(width, width**-0.5, np.float32))
        divide.op, divide.inputs = "Mul", [node("Mul", x, inverse), even]
    return count


LENGTH_AS_RMS_NORM = Pass(
    "length_as_rms_norm", length_as_rms_norm, lambda config: 2 * config.blocks if config.version == 2 else 0
)
