"""Turn a fp32 graph into one with fp16 or bf16 types, for compilers that take the precision from the graph.

Inputs, outputs and some fallback nodes stay fp32: V2's cosine attention, because fp16 cannot hold a floor below the L2 norms
that occur (Hugging Face's half-precision V2 gives NaN at padding), and nodes whose measured values come near the fp16 maximum.
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
from .passes.base import Graph, NetworkCheck, Pass, PassRecord, Tensor, add_node, redirect
from .passes.cosine_attention import cosine_fallback

if TYPE_CHECKING:
    import onnx

Measure = Callable[[Any], Mapping[str, float]]  # of a fp32 graph: the amax of each value, by name
BF16_OPSET = 22  # the first with bfloat16 for every operator
QDQ_OLDEST = 19  # the first with fp16 scales: TensorRT before 10.6 reads opsets up to 20
# Of graphs with Q/DQ, unless --opset asks for another. ONNX Runtime 1.31 moves Q/DQ nodes to where it rejects their types: INT8
# since opset 21, FP8 before it.
QDQ_OPSETS = {"int8": 20, "fp8": 21}
COSINE = "squared L2 norms of queries and keys: those of padding tokens are 0, and others are below the range of fp16"
RESIZING = "pixels are resized in whole numbers, as Pillow does it, and float32 holds them"
RESIZE = "embeddings.resize"
FP16_MAX = float(np.finfo(np.float16).max)
HEADROOM = 2.0  # values of other images may be this many times larger than the measured ones


@dataclass(frozen=True)
class FallbackNodes:
    """Nodes that stay fp32: where (a module, or a node's name), how many, and why."""

    at: str
    nodes: int
    reason: str


@dataclass(frozen=True)
class TypedGraph:
    """A graph in the types of a precision, the records of its rewrites, and its fp32 fallback nodes."""

    model: onnx.ModelProto
    records: tuple[PassRecord, ...]
    fallbacks: tuple[FallbackNodes, ...]


def typed_from_fp32(
    model: onnx.ModelProto,
    config: SwinConfig,
    task: TaskSpec,
    precision: str,
    measure: Measure | None = None,
    check: NetworkCheck | None = None,
) -> TypedGraph:
    """Make the graph in the types of `precision`. `measure`, for fp16, returns the amax of each value on samples.

    `check` compares the rewritten fp32 network with `model`.
    """
    gs = require("onnx_graphsurgeon", f"write the {precision} graph")
    graph = gs.import_onnx(model)
    records = run_passes(graph, config, ENGINE_PASSES, check)
    counted = measure is None and not (check and check.left_out)
    fallback = set(cosine_fallback(graph))
    by_module = groupby(sorted(fallback), key=lambda name: name.rpartition("/")[0])
    found = [FallbackNodes(at, len(list(names)), COSINE) for at, names in by_module]
    if resized := resize_nodes(graph):
        found.append(FallbackNodes(RESIZE, len(resized), RESIZING))
        fallback |= resized
    if measure is not None:
        beyond = _beyond_fp16(graph, measure(gs.export_onnx(graph)))
        found += [FallbackNodes(name, 1, reason) for name, reason in beyond.items() if name not in fallback]
        fallback |= beyond.keys()
    records += run_passes(graph, config, (types_pass(task, precision, fallback, counted),))
    typed = gs.export_onnx(graph)
    if precision == "bf16":
        raise_opset(typed, BF16_OPSET)
    return TypedGraph(typed, records, tuple(found))


def raise_opset(model: onnx.ModelProto, version: int) -> None:
    """Raise the version of the standard operators of `model`, if it is lower."""
    for domain in model.opset_import:
        if not domain.domain:
            domain.version = max(domain.version, version)


def types_pass(
    task: TaskSpec,
    precision: str,
    fallback: Set[str],
    counted: bool = True,
    more: Callable[[SwinConfig], int] = lambda config: 0,
) -> Pass:
    """Make the pass that casts between fp32, in which the nodes `fallback` stay, and `precision`.

    If `counted`, Casts are after an image, before each output, three at each cosine attention, and `more`.
    """
    done: list[int] = []
    after_image: list[int] = []

    def rewrite(graph: Graph) -> int:
        after_image.append(0 if graph.inputs[0].dtype == np.uint8 and not resize_nodes(graph) else 1)
        done.append(assign_types(graph, fallback, low_precision(precision)))
        return done[0]

    def expected(config: SwinConfig) -> int:
        in_attention = 3 * config.blocks if config.version == 2 else 0
        return after_image[0] + len(task.output_names(config)) + in_attention + more(config) if counted else done[0]

    return Pass(f"{precision}_types", rewrite, expected)


def _beyond_fp16(graph: Graph, amax: Mapping[str, float]) -> dict[str, str]:
    """The nodes that read or write values that fp16 may not hold, by name, and the reason."""
    found = {}
    for node in graph.nodes:
        top = max((amax.get(tensor.name, 0.0) for tensor in (*node.inputs, *node.outputs)), default=0.0)
        if top * HEADROOM > FP16_MAX:
            found[str(node.name)] = f"reads or writes {top:.3g} on calibration samples, and fp16 ends at {FP16_MAX:.0f}"
    return found


def resize_nodes(graph: Graph) -> set[str]:
    """Return the names of the nodes that resize frames. They stay fp32 in every precision."""
    return {str(node.name) for node in graph.nodes if str(node.name).startswith(RESIZE)}


def assign_types(graph: Graph, fallback: Set[str], low: np.dtype[Any]) -> int:
    """Make every floating-point node `low`, except for `fallback`, inputs and outputs. Returns the number of Casts inserted."""
    import onnx_graphsurgeon as gs

    fp32 = np.dtype(np.float32)
    constants: dict[str, Any] = {}
    casts: dict[tuple[str, bool], Any] = {}
    nodes = list(graph.nodes)
    is_fp32 = {tensor.name: node.name in fallback for node in nodes for tensor in node.outputs}
    floating = {name for name, tensor in graph.tensors().items() if tensor.dtype == np.float32}

    def cast(tensor: Tensor, to_fp32: bool) -> Tensor:
        key = (tensor.name, to_fp32)
        if key not in casts:
            dtype = fp32 if to_fp32 else low
            name, output = f"{tensor.name}/Cast_{dtype.name}", f"{tensor.name}_{dtype.name}"
            casts[key] = add_node(graph, name, "Cast", [tensor], output, dtype, to=_onnx_type(dtype))
            casts[key].shape = tensor.shape
        return casts[key]

    for node in nodes:
        for position, tensor in enumerate(node.inputs):
            if tensor.name not in floating:
                continue
            if isinstance(tensor, gs.Constant):
                if node.name not in fallback:
                    constants[tensor.name] = constants.get(tensor.name) or _low_constant(tensor, low)
                    node.inputs[position] = constants[tensor.name]
            elif is_fp32.get(tensor.name, True) != (node.name in fallback):  # a graph input counts as fp32
                node.inputs[position] = cast(tensor, to_fp32=node.name in fallback)
    for position, output in enumerate(graph.outputs):
        if output.name in floating and not is_fp32[output.name]:
            inner = gs.Variable(f"{output.name}_{low.name}", low, output.shape)
            redirect(output.outputs, output, inner)
            output.inputs[0].outputs = [inner if tensor is output else tensor for tensor in output.inputs[0].outputs]
            graph.nodes.append(gs.Node("Cast", f"{output.name}/Cast_float32", {"to": _onnx_type(fp32)}, [inner], [output]))
            casts[(output.name, True)] = graph.outputs[position]
    for node in nodes:
        for tensor in node.outputs:
            if tensor.name in floating and not is_fp32[tensor.name]:
                tensor.dtype = low
                if node.op == "Cast":  # of frames
                    node.attrs["to"] = _onnx_type(low)
    return len(casts)


def low_precision(precision: str) -> np.dtype[Any]:
    """Return the numpy type of "fp16" or "bf16"."""
    if precision == "fp16":
        return np.dtype(np.float16)
    import ml_dtypes

    bfloat16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
    return bfloat16


def _low_constant(tensor: Tensor, low: np.dtype[Any]) -> Tensor:
    import onnx_graphsurgeon as gs

    with np.errstate(over="ignore"):
        values = tensor.values.astype(low)
    if not np.isfinite(values.astype(np.float32)).all():
        raise ExportError(
            f"{tensor.name} holds {float(np.abs(tensor.values).max()):.3g}, which {low.name} cannot represent. "
            f"Build the engine with --fp32."
        )
    return gs.Constant(f"{tensor.name}_{low.name}", values)


def _onnx_type(dtype: np.dtype[Any]) -> int:
    import onnx

    return int(onnx.helper.np_dtype_to_tensor_dtype(dtype))
