"""Slice + Squeeze of one index -> one Gather.

torch's unbind(0) over the fused query, key and value becomes a Slice and a Squeeze for each; a Gather with a scalar index
says the same in one node.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from swin_deploy.config import SwinConfig

from .base import Graph, Pass


def rewrite(graph: Graph) -> int:
    """The number of Slice + Squeeze pairs replaced."""
    import onnx_graphsurgeon as gs

    count = 0
    for squeeze in [node for node in graph.nodes if node.op == "Squeeze"]:
        cut = squeeze.i() if squeeze.inputs[0].inputs else None
        if cut is None or cut.op != "Slice" or len(cut.outputs[0].outputs) != 1 or len(squeeze.inputs) != 2:
            continue
        numbers = [_scalar(tensor) for tensor in (*cut.inputs[1:], squeeze.inputs[1])]
        if None in numbers:
            continue
        start, end, *axis_and_step, squeezed = numbers
        axis, step = axis_and_step + [0, 1][len(axis_and_step) :]
        if (end, step, axis) != (start + 1, 1, squeezed):
            continue
        index = gs.Constant(f"{squeeze.name}_index", np.array(start, dtype=np.int64))
        graph.layer(
            name=squeeze.name.replace("Squeeze", "Select"),
            op="Gather",
            inputs=[cut.inputs[0], index],
            outputs=list(squeeze.outputs),
            attrs={"axis": axis},
        )
        squeeze.outputs.clear()
        count += 1
    return count


def _scalar(tensor: Any) -> Any:
    """The one number that a constant holds; None for anything else."""
    values = getattr(tensor, "values", None)
    return int(values.item()) if isinstance(values, np.ndarray) and values.size == 1 else None


def expected(config: SwinConfig) -> int:
    """Query, key and value of every block; V2 takes the value apart before it normalises query and key."""
    return config.blocks * (3 if config.version == 1 else 2)


GATHER_SELECTS = Pass("gather_selects", rewrite, expected)
