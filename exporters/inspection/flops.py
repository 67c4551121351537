"""Count the nodes, parameters and floating-point operations of an ONNX graph.

MatMul, Gemm and Conv count, a multiplication and an addition as two operations, as in torch.utils.flop_counter. Shapes are
those that onnx infers. No figure is estimated: with an unknown shape or an operator that is not counted, FLOPs are None.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swin_deploy.dependencies import require
from swin_deploy.errors import UsageError

if TYPE_CHECKING:
    import onnx

# Operators with matmuls that are not counted.
_UNCOUNTED = {
    "Attention", "ConvInteger", "ConvTranspose", "DeformConv", "Einsum", "GRU", "GroupQueryAttention", "If", "LSTM", "Loop",
    "MatMulInteger", "MultiHeadAttention", "QAttention", "QGemm", "QLinearConv", "QLinearMatMul", "RNN", "Scan",
}  # fmt: skip


@dataclass(frozen=True)
class GraphCost:
    """The figures of a graph for one batch size; `flops` maps the type that a matmul computes in to its operations.

    `parameters` counts the elements of all floating-point and quantized constants: weights, and tables that the export folded.
    """

    nodes: Mapping[str, int]
    parameters: int
    parameter_bytes: int
    flops: Mapping[str, int] | None
    batch: int

    @property
    def flops_per_image(self) -> dict[str, float] | None:
        return None if self.flops is None else {kind: count / self.batch for kind, count in self.flops.items()}

    @property
    def total_flops(self) -> int | None:
        return None if self.flops is None else sum(self.flops.values())

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as JSON values."""
        return asdict(self)


def cost_from_onnx(path: Path, batch: int = 1) -> GraphCost:
    """Count the graph in the file `path` for a batch of `batch` images."""
    onnx = require("onnx", "read the graph")
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:
        raise UsageError(f"{path} is not an ONNX graph ({type(error).__name__}). Expected an exported .onnx file.") from error
    if not model.graph.node:
        raise UsageError(f"{path} is not an ONNX graph: it has no nodes. Expected an exported .onnx file.")
    written = [name for node in model.graph.node for name in node.output if name]
    if len(written) > len(set(written)):  # folding such a graph takes minutes
        raise UsageError(f"{path} is not an ONNX graph: two of its nodes write one value. Expected an exported .onnx file.")
    return cost_of_model(model, batch)


def cost_of_model(model: onnx.ModelProto, batch: int = 1) -> GraphCost:
    """Count `model`; a free first axis of its inputs is set to `batch`, a fixed one is the batch."""
    import onnx

    known = {table.name for table in model.graph.initializer}
    for value in model.graph.input:
        dims = value.type.tensor_type.shape.dim
        if value.name not in known and dims and not dims[0].dim_value:
            dims[0].dim_value = batch
        elif value.name not in known and len(dims) == 4:
            batch = dims[0].dim_value
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")
    del model.graph.value_info[:]
    nodes = Counter(node.op_type for node in model.graph.node)
    flops = _flops(onnx.shape_inference.infer_shapes(model, data_prop=True))
    if flops is None and not _UNCOUNTED.intersection(nodes):
        flops = _flops(_folded(model))
    counted = ("FLOAT", "BFLOAT16", "DOUBLE", "INT4", "INT8")
    kinds = {number for name, number in onnx.TensorProto.DataType.items() if name.startswith(counted)}
    weights = [table for table in model.graph.initializer if table.data_type in kinds]
    bits = {kind: 8 * onnx.helper.tensor_dtype_to_np_dtype(kind).itemsize for kind in {table.data_type for table in weights}}
    return GraphCost(
        dict(nodes.most_common()),
        sum(math.prod(table.dims) for table in weights),
        sum(math.prod(table.dims) * bits[table.data_type] // 8 for table in weights),
        flops,
        batch,
    )


def _folded(model: onnx.ModelProto) -> onnx.ModelProto:
    """Fold the shapes that the graph computes, which other exporters write; a model with external data stays as it is."""
    import onnx

    if any(onnx.external_data_helper.uses_external_data(table) for table in model.graph.initializer):
        return model
    gs, ort = (require(module, "fold the shapes of the graph") for module in ("onnx_graphsurgeon", "onnxruntime"))
    folded: onnx.ModelProto = onnx.shape_inference.infer_shapes(model, data_prop=True)
    ort.set_default_logger_severity(4)  # it warns about every constant that it does not fold
    try:
        for _ in range(3):  # each round infers shapes that the next one needs
            graph = gs.import_onnx(folded)
            graph.fold_constants().cleanup()
            folded = onnx.shape_inference.infer_shapes(gs.export_onnx(graph), data_prop=True)
    finally:
        ort.set_default_logger_severity(2)  # its default
    return folded


def _flops(model: onnx.ModelProto) -> dict[str, int] | None:
    import onnx

    shapes: dict[str, tuple[int, ...]] = {table.name: tuple(table.dims) for table in model.graph.initializer}
    types: dict[str, int] = {table.name: table.data_type for table in model.graph.initializer}
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        tensor = value.type.tensor_type
        types[value.name] = tensor.elem_type
        if tensor.HasField("shape") and all(dim.HasField("dim_value") for dim in tensor.shape.dim):
            shapes[value.name] = tuple(dim.dim_value for dim in tensor.shape.dim)
    stored = {node.output[0]: types.get(node.input[0], 0) for node in model.graph.node if node.op_type == "DequantizeLinear"}
    counts: Counter[str] = Counter()
    for node in model.graph.node:
        if node.op_type in _UNCOUNTED:
            return None
        if node.op_type not in ("MatMul", "Gemm", "Conv"):
            continue
        left, right, result = (shapes.get(name) for name in (node.input[0], node.input[1], node.output[0]))
        if left is None or right is None or result is None:
            return None
        transposed = any(attribute.name == "transA" and attribute.i for attribute in node.attribute)
        each = math.prod(right[1:]) if node.op_type == "Conv" else left[-2 if transposed else -1]
        kinds = {stored.get(name, types.get(name, 0)) for name in node.input[:2]}
        kind = kinds.pop() if len(kinds) == 1 else types.get(node.output[0], 0)
        counts[onnx.TensorProto.DataType.Name(kind).lower()] += 2 * math.prod(result) * each
    return dict(counts)
