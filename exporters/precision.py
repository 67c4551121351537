"""A fp32 graph -> the same in fp16 or bf16 types, for compilers that take precision from the graph (TensorRT 10, 11, RTX).

Input and output stay float32, so that whoever feeds the fp32 graph feeds this one. Islands of fp32 stay where fp16 will
not do. The cosine attention of Swin V2 is always one: it divides by the lengths of queries and keys, which for a padding
token are 0, and no floor that fp16 can hold is below the lengths that occur (0/0; Hugging Face's half-precision Swin V2 is
all NaN there). Others are where values measured on calibration samples come near the largest fp16 number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np

from swin_deploy.config import SwinConfig
from swin_deploy.dependencies import require
from swin_deploy.errors import ExportError
from swin_deploy.tasks import TaskSpec

from .passes import ENGINE_PASSES, run_passes
from .passes.base import Graph, Pass, PassRecord
from .passes.cosine_after_matmul import islands

if TYPE_CHECKING:
    import onnx


Measure = Callable[[Any], Mapping[str, float]]

BF16_OPSET = 22  # the first whose every operator takes bfloat16


COSINE = "squared lengths of queries and keys: a padding token's are 0, and others are below what fp16 can hold"
WHOLE = "pixels are resized in whole numbers, as Pillow does it, and float32 holds them"
RESIZE = "embeddings.resize"
LARGEST = float(np.finfo(np.float16).max)
HEADROOM = 2.0  # measured values may be so many times larger on other images


@dataclass(frozen=True)
class Island:
    """Nodes that stay fp32: where (a module, or a node's name), how many, and why."""

    at: str
    nodes: int
    reason: str


@dataclass(frozen=True)
class TypedGraph:
    """A graph in the types of a precision, what each rewrite did, and what of it is still fp32."""

    model: onnx.ModelProto
    records: tuple[PassRecord, ...]
    islands: tuple[Island, ...]


def typed_from_fp32(
    model: onnx.ModelProto, config: SwinConfig, task: TaskSpec, precision: str, measure: Measure | None = None
) -> TypedGraph:
    """The graph in the types of `precision` ("fp16" or "bf16"), in the form that GPU compilers like.

    `measure`, for fp16, gives the largest absolute value of each value of a fp32 graph, by name, on calibration samples; what
    comes near the largest number of fp16 stays fp32. Raises ExportError where a weight does not fit into the type.
    """
    gs = require("onnx_graphsurgeon", f"write the {precision} graph")
    graph = gs.import_onnx(model)
    records = run_passes(graph, config, ENGINE_PASSES)
    wide = set(islands(graph))
    found = [
        Island(at, len(list(names)), COSINE) for at, names in groupby(sorted(wide), key=lambda name: name.rpartition("/")[0])
    ]
    if resized := resizing(graph):
        found.append(Island(RESIZE, len(resized), WHOLE))
        wide |= resized
    if measure is not None:
        beyond = _beyond(graph, measure(gs.export_onnx(graph)))
        found += [Island(name, 1, reason) for name, reason in beyond.items() if name not in wide]
        wide |= beyond.keys()
    records += run_passes(graph, config, (narrow_types(task, precision, wide, as_designed=measure is None),))
    typed = gs.export_onnx(graph)
    if precision == "bf16":
        for domain in typed.opset_import:
            domain.version = max(domain.version, BF16_OPSET) if not domain.domain else domain.version
    return TypedGraph(typed, records, tuple(found))


def narrow_types(task: TaskSpec, precision: str, wide: Set[str], as_designed: bool = True) -> Pass:
    """The pass; it inserts a Cast wherever a value crosses between fp32, in the nodes of `wide`, and the narrow type.

    There is one behind the image, one before each output, and three at each island of the design: vectors in, products in,
    cosines out. Frames have a Cast in the fp32 graph already. Where measured ranges decide, no number can be expected.
    """
    done: list[int] = []
    behind_image: list[int] = []

    def rewrite(graph: Graph) -> int:
        behind_image.append(0 if graph.inputs[0].dtype == np.uint8 and not resizing(graph) else 1)
        done.append(assign_types(graph, wide, narrow_type(precision)))
        return done[0]

    def expected(config: SwinConfig) -> int:
        in_islands = 3 * config.blocks if config.version == 2 else 0
        return behind_image[0] + len(task.output_names(config)) + in_islands if as_designed else done[0]

    return Pass(f"{precision}_types", rewrite, expected)


def _beyond(graph: Graph, largest: Mapping[str, float]) -> dict[str, str]:
    """The nodes that read or write what fp16 may not hold, by name, and why."""
    found = {}
    for node in graph.nodes:
        top = max((largest.get(tensor.name, 0.0) for tensor in (*node.inputs, *node.outputs)), default=0.0)
        if top * HEADROOM > LARGEST:
            found[str(node.name)] = f"reads or writes {top:.3g} on calibration samples, and fp16 ends at {LARGEST:.0f}"
    return found


def resizing(graph: Graph) -> set[str]:
    """The names of the nodes that resize frames; they stay fp32 in every precision."""
    return {str(node.name) for node in graph.nodes if str(node.name).startswith(RESIZE)}


def assign_types(graph: Graph, wide: Set[str], narrow: np.dtype[Any]) -> int:
    """The number of Casts inserted to make every floating node `narrow`, except those named in `wide`, which stay fp32.

    The graph's inputs and outputs stay float32. A value that several nodes of the other type read is cast once.
    """
    import onnx_graphsurgeon as gs

    constants: dict[str, Any] = {}
    casts: dict[tuple[str, bool], Any] = {}
    nodes = list(graph.nodes)
    is_wide = {tensor.name: node.name in wide for node in nodes for tensor in node.outputs}
    floating = {name for name, tensor in graph.tensors().items() if tensor.dtype == np.float32}

    def cast(tensor: Any, to_wide: bool) -> Any:
        key = (tensor.name, to_wide)
        if key not in casts:
            dtype = np.dtype(np.float32) if to_wide else narrow
            result = gs.Variable(f"{tensor.name}_{dtype.name}", dtype, tensor.shape)
            node = gs.Node("Cast", f"{tensor.name}/Cast_{dtype.name}", {"to": _onnx_type(dtype)}, [tensor], [result])
            graph.nodes.append(node)
            casts[key] = result
        return casts[key]

    for node in nodes:
        for position, tensor in enumerate(node.inputs):
            if tensor.name not in floating:
                continue
            if isinstance(tensor, gs.Constant):
                if node.name not in wide:
                    if tensor.name not in constants:
                        constants[tensor.name] = _narrow_constant(tensor, narrow)
                    node.inputs[position] = constants[tensor.name]
            elif is_wide.get(tensor.name, True) != (node.name in wide):  # a graph input counts as wide
                node.inputs[position] = cast(tensor, to_wide=node.name in wide)
    for position, output in enumerate(graph.outputs):
        if output.name in floating and not is_wide[output.name]:
            inner = gs.Variable(f"{output.name}_{narrow.name}", narrow, output.shape)
            for consumer in list(output.outputs):
                consumer.inputs = [inner if t is output else t for t in consumer.inputs]
            output.inputs[0].outputs = [inner if t is output else t for t in output.inputs[0].outputs]
            graph.nodes.append(
                gs.Node("Cast", f"{output.name}/Cast_float32", {"to": _onnx_type(np.dtype(np.float32))}, [inner], [output])
            )
            casts[(output.name, True)] = graph.outputs[position]
    for node in nodes:
        for tensor in node.outputs:
            if tensor.name in floating and not is_wide[tensor.name]:
                tensor.dtype = narrow
                if node.op == "Cast":  # of frames
                    node.attrs["to"] = _onnx_type(narrow)
    return len(casts)


def narrow_type(precision: str) -> np.dtype[Any]:
    """The numpy type of "fp16" or "bf16"."""
    if precision == "fp16":
        return np.dtype(np.float16)
    import ml_dtypes

    bfloat16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
    return bfloat16


def _narrow_constant(tensor: Any, narrow: np.dtype[Any]) -> Any:
    import onnx_graphsurgeon as gs

    with np.errstate(over="ignore"):
        values = tensor.values.astype(narrow)
    if not np.isfinite(values.astype(np.float32)).all():
        raise ExportError(
            f"{tensor.name} holds {float(np.abs(tensor.values).max()):.3g}, which {narrow.name} cannot represent. "
            f"Build the engine with --fp32."
        )
    return gs.Constant(f"{tensor.name}_{narrow.name}", values)


def _onnx_type(dtype: np.dtype[Any]) -> int:
    import onnx

    return int(onnx.helper.np_dtype_to_tensor_dtype(dtype))
