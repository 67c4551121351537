"""Trace a network to an ONNX graph with a free batch axis, apply the graph passes, and check the operators."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from swin_deploy.bundle import TensorSpec
from swin_deploy.dependencies import installed, require
from swin_deploy.errors import ExportError
from swin_deploy.options import Size
from swin_deploy.parity import sample_inputs

from .external_data import PROTOBUF_LIMIT, Weights, embed_weights, take_weights, weight_bytes
from .passes import PASSES, PassRecord, run_passes
from .passes.base import OPSET, NetworkCheck

if TYPE_CHECKING:
    import onnx

    from swin_deploy.models.swin import SwinNetwork

BATCH = 1_000_003  # images in a traced batch; prime, and larger than any other axis

# The operators of a Swin with static shapes. Any other (Shape, If, Loop, Pad, ...) means that something depends on the input
# size at run time, which is slower everywhere and prevents fusions in TensorRT.
# fmt: off
OPERATORS = frozenset({
    "Add", "Clip", "Conv", "Div", "Gather", "Gelu", "Gemm", "LayerNormalization", "MatMul", "Mul", "ReduceL2", "ReduceMean",
    "Reshape", "Slice", "Softmax", "Split", "Transpose", "Unsqueeze", "Where",
    # embedded preprocessing
    "Cast", "Floor",
    # activations other than GELU
    "Erf", "Greater", "HardSwish", "LeakyRelu", "Max", "Min", "Mish", "Pow", "Relu", "Sigmoid", "Softplus", "Sqrt", "Sub",
    "Tanh",
})
# Repeat a constant for every image; OpenVINO folds them if the batch is known.
OF_OPENVINO = frozenset({"Concat", "Expand", "Shape"})
OF_POOLS = frozenset({"Concat", "ReduceMax"})  # of the tokens, other than their mean
# fmt: on


@dataclass(frozen=True)
class Traced:
    """An fp32 graph, its weights (which share memory with the network), and the passes that were applied."""

    model: onnx.ModelProto
    weights: Weights
    passes: tuple[PassRecord, ...]


def onnx_from_torch(network: SwinNetwork, image_size: Size, frames: TensorSpec | None = None) -> Traced:
    """Trace `network` to an fp32 graph for images, or `frames`, of one size, and apply the passes of its target."""
    require("onnxscript", "export to ONNX")
    inputs = network.task.inputs(network.config, image_size, frames)
    model, weights = _traced(network, inputs)
    _name_by_module(model)
    gs = require("onnx_graphsurgeon", "rewrite the ONNX graph")
    graph = gs.import_onnx(model)
    records = run_passes(graph, network.config, PASSES[network.target], _check(network, model, weights, inputs))
    graph.name = f"swin_v{network.config.version}"
    graph.producer_name = "swin-deploy"
    model = gs.export_onnx(graph)
    known = OPERATORS | (OF_OPENVINO if network.target == "openvino" else frozenset())
    known |= OF_POOLS if network.config.global_pool != "avg" else frozenset()
    foreign = sorted({node.op_type for node in model.graph.node} - known)
    if foreign:
        raise ExportError(
            f"The exporter wrote operators that a Swin with static shapes does not need: {', '.join(foreign)}. "
            f"Install the versions in constraints.txt and, if it persists, report it."
        )
    return Traced(model, weights, records)


def _check(network: SwinNetwork, model: Any, weights: Weights, inputs: tuple[TensorSpec, ...]) -> NetworkCheck | None:
    """The check of the rewrites; None without ONNX Runtime, beyond 2 GB, or if there are none."""
    if network.target != "openvino" or not installed("onnxruntime") or weight_bytes(weights) > PROTOBUF_LIMIT:
        return None

    def complete(light: Any) -> Any:
        whole = type(light)()
        whole.CopyFrom(light)
        embed_weights(whole, weights)
        return whole

    return NetworkCheck(model, sample_inputs(inputs), complete)


def _traced(network: SwinNetwork, specs: Sequence[TensorSpec]) -> tuple[Any, dict[str, Any]]:
    """Trace with a batch that no other axis is a multiple of, and then make it free; a symbolic batch takes twice as long.

    The graphs for OpenVINO repeat constants for every image, which only a symbolic batch expresses.
    """
    import onnx_ir
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    symbolic = network.target == "openvino"
    batch = 2 if symbolic else BATCH  # torch.export specializes on a batch of one
    with contextlib.nullcontext() if symbolic else FakeTensorMode():  # tensors without memory
        examples = [torch.zeros(batch, *(int(n) for n in one.shape[1:]), dtype=getattr(torch, one.dtype)) for one in specs]
    axis = torch.export.Dim("batch")
    with torch.no_grad(), _quiet():
        program = torch.onnx.export(
            network,
            tuple(examples),
            input_names=[spec.name for spec in specs],
            output_names=list(network.output_names),
            dynamic_shapes=tuple({0: axis} for _ in specs) if symbolic else None,
            opset_version=OPSET,
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    if program is None:
        raise ExportError("torch.onnx.export returned no program. Install the versions in constraints.txt.")
    weights = take_weights(program.model.graph)
    model = onnx_ir.to_proto(program.model)
    if not symbolic:
        _free_batch(model)
    return model, weights


def _free_batch(model: onnx.ModelProto) -> None:
    """Replace multiples of BATCH: by a name in the shapes of values, by -1 in the constants that Reshape reads."""
    import numpy as np
    from onnx import TensorProto, numpy_helper

    graph = model.graph
    for value in (*graph.input, *graph.value_info, *graph.output):
        for size in value.type.tensor_type.shape.dim:
            if size.dim_value and size.dim_value % BATCH == 0:
                times = size.dim_value // BATCH
                size.dim_param = "batch" if times == 1 else f"{times}*batch"
    reshapes = {node.input[1] for node in graph.node if node.op_type == "Reshape"}
    reshapes -= {name for node in graph.node if node.op_type != "Reshape" for name in node.input}
    for tensor in graph.initializer:
        if tensor.data_type != TensorProto.INT64 or tensor.data_location == TensorProto.EXTERNAL:
            continue
        values = numpy_helper.to_array(tensor)
        batches = (values > 0) & (values % BATCH == 0)
        if not batches.any():
            continue
        if tensor.name not in reshapes:
            raise ExportError(f"The constant {tensor.name} depends on the batch. Report it, with the options of the export.")
        tensor.CopyFrom(numpy_helper.from_array(np.where(batches, -1, values), tensor.name))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress what the exporter prints about its progress and about packages that Swin does not use."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _name_by_module(model: Any) -> None:
    """Name nodes by the module they come from (`stages.0.steps.block1.attention.qkv/Gemm`), and remove the metadata.

    Compilers show these names in their layer reports. The metadata of the exporter also holds stack traces with file names of
    this machine.
    """
    taken: dict[str, int] = {}
    for node in model.graph.node:
        scopes: Sequence[str] = ()
        for entry in node.metadata_props:
            if entry.key == "pkg.torch.onnx.name_scopes":
                scopes = [s.strip(" '\"") for s in entry.value.strip("[]").split(",")]
        name = f"{scopes[-2] if len(scopes) > 1 and scopes[-2] else 'swin'}/{node.op_type}"
        taken[name] = taken.get(name, 0) + 1
        node.name = name if taken[name] == 1 else f"{name}_{taken[name]}"
        del node.metadata_props[:]
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        del value.metadata_props[:]
    for initializer in model.graph.initializer:
        del initializer.metadata_props[:]
    del model.metadata_props[:]
    del model.graph.metadata_props[:]
