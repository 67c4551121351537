"""What makes a quantised graph fast in OpenVINO; it answers the same everywhere.

Of small layers its bf16 product takes less time than rounding the input and the 8-bit product (5 % of all in Swin-T, 10 %
in SwinV2-T), and loses less. OpenVINO computes LayerNorm on `[rows, channels]` and what rounds its result as two
operations, the second in fp32; on `[1, rows, channels]` the rounding is compiled into the elementwise part.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from swin_deploy.requires import require

from .folding import Graph
from .observers import Observation
from .own import Own
from .placement import linear_layers, qdq_from_fp32, with_nodes
from .quantize import HEADS, Batches, Options, Quantized, SampleFeeds, quantize
from .stopped import Stopped

if TYPE_CHECKING:
    import onnx


@dataclass(frozen=True)
class Form:
    """A network in INT8 as a runtime takes it: the layers that are, by name, a record of each, and the graph with fewer."""

    quantized: Quantized
    target: str

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.quantized.layers)

    def graph(self, keep: Set[str] = frozenset()) -> onnx.ModelProto:
        """The graph; the layers `keep` are not quantised, the others as if these were."""
        layers = [layer for name, layer in self.quantized.layers.items() if name not in keep]
        made = qdq_from_fp32(self.quantized.base, layers)
        return made if self.target != "openvino" else norms_of_three_axes(made, {layer.layer.input for layer in layers})

    def records(self, keep: Set[str]) -> list[dict[str, Any]]:
        """What a manifest should know of each layer that is quantised."""
        return [record for record in self.quantized.records if record["name"] not in keep]


def quantized_for(
    target: str,
    model: onnx.ModelProto,
    feeds: SampleFeeds | None,
    method: str | None,
    keep: Set[str],
    say: Callable[[str], None],
    own: Own | None = None,
    stopped: Stopped | None = None,
) -> Form:
    """`model` in INT8 as "onnxruntime" or "openvino" runs it fastest.

    `feeds()` yields the samples batch by batch, None where `own` has every range; `method` finds ranges (one of
    ranges.METHODS; None: the least error behind the layer), `keep` names layers that stay as they are. A classifier that was
    trained in 8 bits is quantised like the others. `stopped` keeps what is done, for when it is stopped.
    """
    trained = own or Own()
    heads = HEADS - {layer.name for layer in linear_layers(model) if trained.covers([layer])}
    keep = heads | keep | (small_layers(model) if target == "openvino" else frozenset())
    ranges = None if method is None else partial(_interval, method)
    return Form(quantize(model, feeds, Options(keep=keep), ranges, say, own, stopped), target)


def _interval(method: str, name: str, values: Batches) -> tuple[float, float]:
    seen: Observation | None = None
    for batch in values():
        one = Observation.of(batch, len(batch), f"The tensor {name}")
        seen = one if seen is None else seen.merged(one)
    assert seen is not None
    return seen.interval(method)


SMALL = 1 << 16  # weights of one layer: 192 x 192 is small, 192 x 768 is not


def small_layers(model: onnx.ModelProto) -> frozenset[str]:
    """The layers of `model`, by name, that OpenVINO is not faster with in 8 bits: what to keep for it (see Options)."""
    sizes = {tensor.name: int(np.prod(tensor.dims)) for tensor in model.graph.initializer}
    return frozenset(layer.name for layer in linear_layers(model) if sizes[layer.weight] < SMALL)


def norms_of_three_axes(model: onnx.ModelProto, rounded: Set[str]) -> onnx.ModelProto:
    """`model` with a Reshape around each LayerNorm whose result is one of the tensors `rounded`, [rows, channels]."""
    onnx = require("onnx", "write the quantised graph")
    graph, nodes, constants = Graph(model), [], {}
    for node in model.graph.node:
        channels = graph.widths.get(node.output[0])
        if node.op_type != "LayerNormalization" or node.output[0] not in rounded or channels is None:
            nodes.append(node)
            continue
        name, make = node.output[0], onnx.helper.make_node
        for shape in ((1, -1, channels), (-1, channels)):
            key = "reshape/" + "x".join(map(str, shape))
            constants[key] = onnx.numpy_helper.from_array(np.array(shape, np.int64), key)
        norm = onnx.NodeProto.FromString(node.SerializeToString())
        norm.input[0], norm.output[0] = f"{name}/input", f"{name}/normed"
        nodes += [
            make("Reshape", [node.input[0], f"reshape/1x-1x{channels}"], [norm.input[0]], f"{node.name}/Reshape"),
            norm,
            make("Reshape", [norm.output[0], f"reshape/-1x{channels}"], [name], f"{node.name}/Reshape_2"),
        ]
    return with_nodes(model, nodes, constants.values())
