"""The largest absolute value of everything that a graph computes, over samples: what half precision would have to hold."""

from __future__ import annotations

from typing import TYPE_CHECKING

from swin_deploy.errors import InputError
from swin_deploy.requires import require

from .collect import Data, Progress, session_for

if TYPE_CHECKING:
    import onnx


def largest_values(
    model: onnx.ModelProto, data: Data, *, batch: int = 1, progress: Progress | None = None, threads: int = 0
) -> dict[str, float]:
    """Every float32 value that a node of `model` writes, by name -> its largest absolute value over all of `data`.

    `model` holds its weights, and types of inner values in value_info; it is not changed. The maximum is taken in the graph, so
    that memory is that of running it. `progress(done, total)` counts samples. Raises InputError where a value is not finite.
    """
    require("onnx", "observe the values of a graph")
    import numpy as np
    import onnx
    from onnx import TensorProto, helper

    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    floats = {
        value.name
        for value in (*model.graph.value_info, *model.graph.output)
        if value.type.tensor_type.elem_type == TensorProto.FLOAT
    }
    names = [name for node in model.graph.node for name in node.output if name in floats]
    for name in names:
        watched.graph.node.append(helper.make_node("Abs", [name], [f"{name}/absolute"]))
        watched.graph.node.append(helper.make_node("ReduceMax", [f"{name}/absolute"], [f"{name}/largest"], keepdims=0))
    asked = [f"{name}/largest" for name in names]
    run = session_for(watched, asked, threads)
    largest = np.zeros(len(names))
    done = 0
    for feeds in data.batches(batch):
        values = run(feeds)
        found = np.array([values[name] for name in asked], dtype=np.float64)
        if not np.isfinite(found).all():
            name = names[int(np.flatnonzero(~np.isfinite(found))[0])]
            raise InputError(
                f"The value {name} of the fp32 graph is not finite on the calibration samples from number {done} on. Expected "
                f"images like those that the network was trained on; leave these out."
            )
        largest = np.maximum(largest, found)
        done += len(next(iter(feeds.values())))
        if progress is not None:
            progress(done, len(data))
    return dict(zip(names, largest.tolist(), strict=True))
