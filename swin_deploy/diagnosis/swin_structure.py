"""Find the parts of a Swin in an ONNX graph, whoever exported it, by its linear layers, norms and softmaxes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from swin_deploy.errors import UsageError
from swin_deploy.options import Array

from .folded_graph import LAYOUT, QUANTIZE, FoldedGraph

# The parts of a block and of a network in the order of computation, by version.
BLOCK = {
    1: (
        "norm1", "attention.query", "attention.key", "attention.value", "attention.scale", "attention.bias", "attention.mask",
        "attention.softmax", "attention.output", "residual1", "norm2", "mlp.fc1", "mlp.activation", "mlp.fc2", "residual2",
    ),
    2: (
        "attention.query", "attention.key", "attention.value", "attention.scale", "attention.bias", "attention.mask",
        "attention.softmax", "attention.output", "norm1", "residual1", "mlp.fc1", "mlp.activation", "mlp.fc2", "norm2",
        "residual2",
    ),
}  # fmt: skip
MERGE = {1: ("merge.norm", "merge.reduction"), 2: ("merge.reduction", "merge.norm")}
PASSED = LAYOUT | QUANTIZE | {"Cast"}  # what a walk along one tensor passes


@dataclass(frozen=True, order=True)
class Point:
    """A place in a network. `stage` and `block` are None outside of blocks; a merge has only the stage before it."""

    stage: int | None
    block: int | None
    part: str

    def title(self) -> str:
        """Return the place in words."""
        if self.block is not None:
            return f"stage {self.stage}, block {self.block}, {self.part}"
        return self.part if self.stage is None else f"stage {self.stage}, {self.part}"


@dataclass
class LinearPart:
    """A linear layer: `weight` [outputs, inputs] and `bias`, as the graph uses them."""

    node: Any
    weight: Array
    bias: Array | None
    output: str  # after the bias
    input: str = ""  # before Q/DQ and factors of channels, which `weight` includes


@dataclass
class NormPart:
    """A LayerNorm; `nodes` are all of it if it is decomposed."""

    node: Any
    input: str
    output: str
    weight: Array | None
    bias: Array | None
    eps: float
    nodes: tuple[Any, ...] = ()


@dataclass
class Attention:
    """The nodes of an attention: constants that scale and that are added to the scores, and the tensors around them."""

    matmul: Any
    softmax: Any
    context: Any
    query: str
    key: str
    value: str
    scores: str  # scaled
    added: list[tuple[Any, str]]  # (Add, its constant)
    scales: list[tuple[Any, Array, str]]  # (node, factor, where: query, key or scores)
    cosine: bool


@dataclass
class Structure:
    """The parts of a Swin: norms and linear layers by point, attentions by block, and the tensors at each point."""

    version: int
    depths: tuple[int, ...]
    linears: dict[Point, LinearPart] = field(default_factory=dict)
    joined: dict[Point, LinearPart] = field(default_factory=dict)  # the layer that also computes this point's neighbors
    norms: dict[Point, NormPart] = field(default_factory=dict)
    attentions: dict[tuple[int, int], Attention] = field(default_factory=dict)
    tensors: dict[Point, str] = field(default_factory=dict)
    activations: dict[Point, tuple[str, str]] = field(default_factory=dict)  # input and output
    conv: Any = None

    def points(self) -> list[Point]:
        """Return every place of the network, in the order of computation."""
        found = [Point(None, None, "input"), Point(None, None, "patch_embed")]
        for stage, depth in enumerate(self.depths):
            for block in range(depth):
                found += [Point(stage, block, part) for part in BLOCK[self.version]]
            if stage + 1 < len(self.depths):
                found += [Point(stage, None, part) for part in MERGE[self.version]]
        return [*found, *(Point(None, None, part) for part in ("norm", "pooler", "head"))]


def structure_of(graph: FoldedGraph) -> Structure:
    """Find the parts of the Swin in `graph`. Raises UsageError if it has none."""
    return _Finder(graph).structure()


class _Finder:
    def __init__(self, graph: FoldedGraph) -> None:
        self.graph = graph
        self.norms = self._norms()
        inside = {id(node) for norm in self.norms for node in norm.nodes}
        self.linears = [one for node in graph.nodes if id(node) not in inside and (one := self._linear(node)) is not None]
        self.by_output = {one.node.output[0]: one for one in self.linears}
        self.softmaxes = [node for node in graph.nodes if node.op_type == "Softmax"]

    def structure(self) -> Structure:
        graph = self.graph
        attentions = [one for node in self.softmaxes if (one := self._attention(node)) is not None]
        if not attentions:
            raise UsageError("The graph has no window attention. Expected the graph of a Swin Transformer.")
        place = graph.place
        version = 2 if sum(one.cosine for one in attentions) * 2 > len(attentions) else 1
        parts = []
        for attention in attentions:
            query, key, value = (self._nearest(name) for name in (attention.query, attention.key, attention.value))
            projection = self._next_linear(attention.context.output[0])
            if query is None or key is None or value is None or projection is None:
                raise UsageError("The attention of the graph has no linear layers. Expected the graph of a Swin Transformer.")
            parts.append((query, key, value, projection))
        starts = [min(place[one.node.output[0]] for one in part[:3]) for part in parts]
        after: list[list[LinearPart]] = []  # the linear layers after each attention, up to the next one
        for number, part in enumerate(parts):
            first = place[part[3].node.output[0]]
            last = starts[number + 1] if number + 1 < len(parts) else len(graph.nodes)
            after.append([one for one in self.linears if first < place[one.node.output[0]] < last and one not in part])
        # A stage ends where a third layer follows the MLP: the reduction of the merge.
        depths, stage_of, block_of = [0], [], []
        for number, layers in enumerate(after):
            stage_of.append(len(depths) - 1)
            block_of.append(depths[-1])
            depths[-1] += 1
            if number + 1 < len(after) and len(layers) > 2:
                depths.append(0)
        made = Structure(version, tuple(depths))
        made.conv = next((node for node in graph.nodes if node.op_type == "Conv"), None)
        anchors: list[tuple[int, Point]] = []  # (place, linear layer): norms are known by those around them
        for number, (attention, part, layers) in enumerate(zip(attentions, parts, after, strict=True)):
            at = stage_of[number], block_of[number]
            made.attentions[at] = attention
            names = ("query", "key", "value", "output")
            for name, layer in zip(names, part, strict=True):
                point = Point(*at, f"attention.{name}")
                made.linears[point] = layer
                if name != "output" and sum(layer is one for one in part[:3]) > 1:
                    made.joined[point] = layer
            for name, layer in zip(("mlp.fc1", "mlp.fc2"), layers[:2], strict=False):
                made.linears[Point(*at, name)] = layer
            rest = layers[2:]
            if number + 1 < len(parts) and rest:
                made.linears[Point(at[0], None, "merge.reduction")] = rest[0]
            elif rest:
                made.linears[Point(None, None, "head")] = rest[-1]
        anchors = sorted(((place[one.node.output[0]], point) for point, one in made.linears.items()), key=lambda pair: pair[0])
        for linear in {id(one): one for one in made.linears.values()}.values():
            self._fold_input(linear)
        self._assign_norms(made, anchors)
        self._tensors(made)
        return made

    # -- norms -------------------------------------------------------------------------------------------------------------

    def _norms(self) -> list[NormPart]:
        graph, found = self.graph, []
        for node in graph.nodes:
            if node.op_type == "LayerNormalization":
                weight = self._constant(node, 1)
                bias = self._constant(node, 2)
                eps = graph.attribute(node, "epsilon", 1e-5)
                found.append(NormPart(node, node.input[0], node.output[0], weight, bias, float(eps), (node,)))
            elif node.op_type == "Sqrt" and (one := self._decomposed(node)) is not None:
                found.append(one)
        return sorted(found, key=lambda one: graph.place[one.output])

    def _decomposed(self, root: Any) -> NormPart | None:
        """(x - mean(x)) / sqrt(mean((x - mean(x))^2) + eps) * weight + bias, whose Sqrt is `root`."""
        graph = self.graph
        add = graph.writer.get(root.input[0])
        eps = None if add is None or add.op_type != "Add" else next((n for n in add.input if graph.is_constant(n)), None)
        if add is None or eps is None or graph.constant(eps).size != 1:
            return None
        mean = graph.writer.get(graph.data_inputs(add)[0])
        square = None if mean is None or mean.op_type != "ReduceMean" else graph.writer.get(mean.input[0])
        center = None if square is None or square.op_type not in ("Pow", "Mul") else graph.writer.get(square.input[0])
        while center is not None and center.op_type == "Cast":
            center = graph.writer.get(center.input[0])
        if mean is None or square is None or center is None or center.op_type != "Sub":
            return None
        nodes = [center, square, mean, add, root]
        first = graph.writer.get(center.input[1])
        if first is not None and first.op_type == "ReduceMean":
            nodes.append(first)
        divide = next((n for n in graph.readers.get(root.output[0], []) if n.op_type in ("Div", "Mul", "Reciprocal")), None)
        if divide is None:
            return None
        nodes.append(divide)
        if center.output[0] not in divide.input and graph.writer.get(divide.input[0]) is not center:
            # The division comes after fc1 in graphs for TensorRT: only the deviation is computed here.
            return NormPart(
                root, center.input[0], root.output[0], None, None, float(graph.constant(eps).ravel()[0]), tuple(nodes)
            )
        output, weight, bias = divide.output[0], None, None
        for kind in ("Mul", "Add"):
            readers = graph.readers.get(output, [])
            node = readers[0] if len(readers) == 1 else None
            while node is not None and node.op_type == "Cast":
                output = node.output[0]
                readers = graph.readers.get(output, [])
                node = readers[0] if len(readers) == 1 else None
            constant = None if node is None or node.op_type != kind else next(iter(self._constants(node)), None)
            if node is None or constant is None or graph.constant(constant).ndim != 1:
                break
            weight, bias = (graph.constant(constant), bias) if kind == "Mul" else (weight, graph.constant(constant))
            nodes.append(node)
            output = node.output[0]
        return NormPart(root, center.input[0], output, weight, bias, float(graph.constant(eps).ravel()[0]), tuple(nodes))

    def _assign_norms(self, made: Structure, anchors: list[tuple[int, Point]]) -> None:
        """Name norms by the linear layers around them."""
        graph = self.graph
        between: dict[int, list[NormPart]] = {}
        last = graph.place[self.softmaxes[-1].output[0]]
        for norm in self.norms:
            place = graph.place[norm.output]
            if place < last and self._next_linear(norm.output) is None:
                continue  # of a feature map that is an output
            between.setdefault(sum(where < place for where, _ in anchors), []).append(norm)
        before = [None, *(point for _, point in anchors)]
        after = [*(point for _, point in anchors), None]
        for gap, norms in between.items():
            for norm, point in zip(norms, self._norm_points(made, before[gap], after[gap], norms), strict=False):
                if point is not None:
                    made.norms[point] = norm

    def _norm_points(
        self, made: Structure, before: Point | None, after: Point | None, norms: list[NormPart]
    ) -> list[Point | None]:
        one = made.version == 1
        last = len(made.depths) - 1, made.depths[-1] - 1
        embed, final = Point(None, None, "patch_embed"), Point(None, None, "norm")
        if before is None:
            first = Point(0, 0, "norm1")
            if one and len(norms) == 1:  # without a norm of patches, or without the norm of the block
                straight = self.graph.writer.get(norms[0].input)
                moved = any(n.op_type == "Conv" for n in [straight] if n is not None)
                return [embed if moved and self._feeds_sum(norms[0]) else first]
            return [embed, first] if one else [embed]
        stage, block = before.stage, before.block
        if before.part.startswith("attention."):
            return [Point(stage, block, "norm2" if one else "norm1")]
        if before.part == "mlp.fc1":
            return [Point(stage, block, "norm2")]
        if before.part == "mlp.fc2":
            if one:
                if after is not None and after.part == "merge.reduction":
                    return [Point(stage, None, "merge.norm")]
                if after is None or after.part == "head":
                    return [final]
                return [Point(after.stage, after.block, "norm1")]
            own = Point(stage, block, "norm2")
            if (stage, block) == last:
                return [own, final] if len(norms) > 1 else [own if self._feeds_sum(norms[0]) else final]
            return [own]
        if before.part == "merge.reduction":
            if one:
                return [Point((stage or 0) + 1, 0, "norm1")]
            return [Point(stage, None, "merge.norm")]
        return [None]

    def _feeds_sum(self, norm: NormPart) -> bool:
        """Whether a residual addition reads the norm."""
        return any(self._is_sum(node) for node in self._readers_beyond(norm.output))

    # -- linear layers -----------------------------------------------------------------------------------------------------

    def _linear(self, node: Any) -> LinearPart | None:
        graph = self.graph
        if node.op_type == "Conv" and node.input[0] in graph.readers and graph.attribute(node, "kernel_shape") == [1, 1]:
            return None
        if (
            node.op_type == "ReduceSum"
            and (product := graph.writer.get(node.input[0])) is not None
            and product.op_type == "Mul"
        ):
            weights = [graph.constant(name) for name in self._constants(product)]
            if weights and weights[0].ndim == 2 and len(weights[0]) > 1:
                return self._with_bias(node, weights[0])
        if node.op_type not in ("Gemm", "MatMul") or not graph.is_constant(node.input[1]) or graph.is_constant(node.input[0]):
            return None
        weight = graph.constant(node.input[1])
        if weight.ndim != 2:
            return None
        if node.op_type == "Gemm":
            weight = weight if graph.attribute(node, "transB", 0) else weight.T
            weight = weight * graph.attribute(node, "alpha", 1.0)
            if len(node.input) > 2 and node.input[2]:
                return LinearPart(node, weight, self._constant(node, 2), node.output[0])
        else:
            weight = weight.T
        return self._with_bias(node, weight)

    def _fold_input(self, linear: LinearPart) -> None:
        """Set the input of a layer, before Q/DQ and before a product with one factor for each channel."""
        graph = self.graph
        name = linear.node.input[0]
        if linear.node.op_type == "ReduceSum":
            name = graph.data_inputs(graph.writer[name])[0]
        for _ in range(4):
            name = self._unquantized(name)
            node = graph.writer.get(name)
            factors = None if node is None or node.op_type != "Mul" else next(iter(self._constants(node)), None)
            if node is None or factors is None or graph.constant(factors).size != linear.weight.shape[1]:
                break
            if graph.constant(factors).shape[-1] != linear.weight.shape[1]:
                break
            linear.weight = linear.weight * graph.constant(factors).reshape(-1)
            name = graph.data_inputs(node)[0]
        linear.input = name

    def _with_bias(self, node: Any, weight: Array) -> LinearPart:
        """Return the layer with the bias that is added after its matmul; the division of a LayerNorm may be between."""
        graph, output = self.graph, node.output[0]
        passed = ("Cast", "Identity", *QUANTIZE, *(("Reshape",) if node.op_type == "ReduceSum" else ()))
        while len(readers := graph.readers.get(output, [])) == 1 and readers[0].op_type in passed:
            output = readers[0].output[0]
        if len(readers) == 1 and readers[0].op_type == "Add" and len(names := self._constants(readers[0])) == 1:
            bias = graph.constant(names[0])
            if bias.size == len(weight):
                return LinearPart(node, weight, bias.reshape(-1), readers[0].output[0])
        if len(readers) == 1 and readers[0].op_type == "Div":  # a LayerNorm's division, then the bias
            divided = readers[0].output[0]
            then = graph.readers.get(divided, [])
            if len(then) == 1 and then[0].op_type == "Add" and len(names := self._constants(then[0])) == 1:
                bias = graph.constant(names[0])
                if bias.size == len(weight):
                    return LinearPart(node, weight, bias.reshape(-1), then[0].output[0])
        return LinearPart(node, weight, None, node.output[0])

    def _nearest(self, name: str) -> LinearPart | None:
        return next((self.by_output[node.output[0]] for node in self.graph.ancestors(name) if node.output[0] in self.by_output),
                    None)  # fmt: skip

    def _next_linear(self, name: str) -> LinearPart | None:
        seen, todo = set(), [name]
        while todo:
            for node in self.graph.readers.get(todo.pop(0), []):
                if node.output[0] in self.by_output:
                    return self.by_output[node.output[0]]
                if node.output[0] not in seen:
                    seen.add(node.output[0])
                    todo += list(node.output)
        return None

    # -- attention ---------------------------------------------------------------------------------------------------------

    def _attention(self, softmax: Any) -> Attention | None:
        graph = self.graph
        added: list[tuple[Any, str]] = []
        scales: list[tuple[Any, Array, str]] = []
        name, scores, cosine = softmax.input[0], "", False
        while True:
            node = graph.writer.get(name)
            if node is None:
                return None
            data = graph.data_inputs(node)
            if node.op_type == "MatMul" and len(data) == 2:
                break
            constants = self._constants(node)
            if node.op_type == "Add" and constants:
                added.append((node, constants[0]))
            elif node.op_type == "Where" or node.op_type == "Sub":
                return None
            elif node.op_type in ("Mul", "Div") and constants:
                factor = graph.constant(constants[0]).astype(np.float64)
                scales.append((node, 1 / factor if node.op_type == "Div" else factor, "scores"))
                scores = scores or node.output[0]
            elif node.op_type in ("Div", "Mul"):
                cosine = True
                scores = scores or node.output[0]
                data = [one for one in data if self._leads_to_matmul(one)] or data
            elif node.op_type not in PASSED:
                return None
            if not data:
                return None
            name = data[0]
        added.reverse()
        scores = scores or node.output[0]
        context = next((one for one in self._readers_beyond(softmax.output[0]) if one.op_type == "MatMul"), None)
        if context is None:
            return None
        for operand, where in zip(node.input, ("query", "key"), strict=True):
            for one in graph.ancestors(operand, self.by_output):
                constants = self._constants(one)
                if one.op_type in ("ReduceL2", "ReduceSum", "LpNormalization", "ReduceMean"):
                    cosine = True
                if one.op_type in ("Mul", "Div") and constants and self._on_path(one, operand):
                    factor = graph.constant(constants[0]).astype(np.float64)
                    scales.append((one, 1 / factor if one.op_type == "Div" else factor, where))
        return Attention(node, softmax, context, node.input[0], node.input[1], context.input[1], scores, added, scales, cosine)

    def _on_path(self, node: Any, operand: str) -> bool:
        """Whether `node` is on the path of layout nodes, additions and multiplications that leads to `operand`."""
        name = operand
        while (writer := self.graph.writer.get(name)) is not None and writer.output[0] not in self.by_output:
            if writer is node:
                return True
            data = self.graph.data_inputs(writer)
            if not data:
                return False
            name = data[0]
        return False

    def _leads_to_matmul(self, name: str) -> bool:
        node = self.graph.writer.get(name)
        while node is not None and node.op_type in PASSED | {"Mul", "Div"}:
            node = self.graph.writer.get(node.input[0])
        return node is not None and node.op_type == "MatMul"

    # -- tensors at the points ---------------------------------------------------------------------------------------------

    def _tensors(self, made: Structure) -> None:
        graph, place, tensors = self.graph, self.graph.place, made.tensors
        for point, linear in made.linears.items():
            tensors[point] = linear.output
        for point, norm in made.norms.items():
            if norm.weight is not None:
                tensors[point] = norm.output
        sums = [node for node in graph.nodes if self._is_sum(node)]
        order = sorted(made.attentions)
        for number, at in enumerate(order):
            attention = made.attentions[at]
            for name in ("query", "key", "value"):
                point = Point(*at, f"attention.{name}")
                if point in made.joined:
                    tensors[point] = getattr(attention, name)
            tensors[Point(*at, "attention.scale")] = attention.scores
            tensors[Point(*at, "attention.softmax")] = attention.softmax.output[0]
            if attention.added:
                tensors[Point(*at, "attention.mask")] = attention.softmax.input[0]
            output, fc1, fc2 = (made.linears.get(Point(*at, part)) for part in ("attention.output", "mlp.fc1", "mlp.fc2"))
            if output is None or fc1 is None or fc2 is None:
                continue
            end = (
                place[made.linears[Point(*order[number + 1], "attention.query")].node.output[0]]
                if number + 1 < len(order)
                else len(graph.nodes)
            )
            merge = made.linears.get(Point(at[0], None, "merge.reduction"))
            if merge is not None and number + 1 < len(order) and order[number + 1][0] != at[0]:
                end = place[merge.node.output[0]]
            for part, first, last in (("residual1", output, place[fc1.node.output[0]]), ("residual2", fc2, end)):
                found = [one for one in sums if place[first.node.output[0]] < place[one.output[0]] < last]
                if found:
                    tensors[Point(*at, part)] = found[0].output[0]
            begin = fc2.input
            tensors[Point(*at, "mlp.activation")] = begin
            made.activations[Point(*at, "mlp.activation")] = fc1.output, begin
        if made.conv is not None and Point(None, None, "patch_embed") not in tensors:
            tensors[Point(None, None, "patch_embed")] = made.conv.output[0]
        head = made.linears.get(Point(None, None, "head"))
        if head is not None:
            tensors[Point(None, None, "pooler")] = head.input
        tensors[Point(None, None, "input")] = next(iter(graph.inputs))

    def _unquantized(self, name: str) -> str:
        """Return the tensor before Q/DQ, also where quantization is written in other operators."""
        node = self.graph.writer.get(name)
        if node is not None and node.op_type == "DequantizeLinear":
            node = self.graph.writer.get(node.input[0])
            if node is not None and node.op_type == "QuantizeLinear":
                return str(node.input[0])
            scaled = False
            while node is not None and node.op_type in ("Cast", "Sub", "Add", "Clip", "Mul", "Round"):
                if scaled and node.op_type != "Cast":
                    break
                scaled = node.op_type == "Mul" or scaled
                name = self.graph.data_inputs(node)[0]
                node = self.graph.writer.get(name)
        return name

    # -- helpers -----------------------------------------------------------------------------------------------------------

    def _constant(self, node: Any, position: int) -> Array | None:
        if len(node.input) <= position or not node.input[position] or not self.graph.is_constant(node.input[position]):
            return None
        return self.graph.constant(node.input[position])

    def _constants(self, node: Any) -> list[str]:
        return [name for name in node.input if name and self.graph.is_constant(name)]

    def _is_sum(self, node: Any) -> bool:
        return bool(node.op_type == "Add" and len(self.graph.data_inputs(node)) == 2)

    def _readers_beyond(self, name: str) -> list[Any]:
        """The readers of a tensor, beyond nodes that only move it."""
        found, todo = [], [name]
        while todo:
            for node in self.graph.readers.get(todo.pop(), []):
                if node.op_type in PASSED:
                    todo += list(node.output)
                else:
                    found.append(node)
        return found


def activation_kind(graph: FoldedGraph, structure: Structure, point: Point) -> str:
    """Return the name of the activation at `point`, from its operators."""
    inner, outer = structure.activations[point]
    nodes = list(graph.ancestors(outer, {inner}))
    names = {node.op_type for node in nodes}
    for node in nodes:
        if node.op_type == "Gelu":
            return "tanh GELU" if graph.attribute(node, "approximate", "none") == "tanh" else "GELU"
    if "Erf" in names:
        return "GELU"
    if "Tanh" in names:
        return "tanh GELU" if "Add" in names else "tanh"
    if "Sigmoid" in names:
        factors = [float(graph.constant(name).ravel()[0]) for node in nodes if node.op_type == "Mul" for name in node.input
                   if graph.is_constant(name)]  # fmt: skip
        return (
            "quick GELU" if any(abs(factor - 1.702) < 0.01 for factor in factors) else "SiLU" if "Mul" in names else "sigmoid"
        )
    plain = sorted(names - PASSED - {"Add", "Mul", "Div"})
    return ", ".join(plain) or "none"
