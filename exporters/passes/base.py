"""Graph rewrites, each of which must rewrite as many places as the architecture has, and node helpers that they share.

A rewrite never writes into a constant, which other nodes may read as well: it gives its node a constant of its own.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from swin_deploy.config import SwinConfig
from swin_deploy.dependencies import onnxruntime_session, require
from swin_deploy.errors import PassError
from swin_deploy.options import Array
from swin_deploy.parity import compare

_LOG = logging.getLogger(__name__)
OPSET = 20  # the first with a Gelu operator; every runtime since 2024 supports it
SAME = 1e-5  # relative L2 distance of the outputs of a rewritten fp32 network from those of the network before

Graph = Any  # onnx_graphsurgeon.Graph, which is not imported at module level
Node = Any  # onnx_graphsurgeon.Node
Tensor = Any  # onnx_graphsurgeon.Variable or Constant


@dataclass(frozen=True)
class Pass:
    """`rewrite(graph)` returns the number of places rewritten; `expected(config)` is the number that there must be."""

    name: str
    rewrite: Callable[[Graph], int]
    expected: Callable[[SwinConfig], int]


@dataclass(frozen=True)
class PassRecord:
    """The entry of a pass in the manifest."""

    name: str
    count: int


@dataclass
class NetworkCheck:
    """Compares rewritten fp32 networks with the fp32 network `model` on `feeds`.

    Attributes:
        complete: Makes a model that ONNX Runtime can load, if weights are elsewhere.
        recorded: Outputs of PyTorch for `feeds`. A network that agrees with them is accepted without running `model`.
        left_out: How far the rewrites that were left out move the outputs, by name.
        distance: Relative L2 distance of the outputs of the network accepted last; None before.
    """

    model: Any
    feeds: Mapping[str, Array]
    complete: Callable[[Any], Any] = lambda model: model
    recorded: Sequence[Array] = ()
    left_out: dict[str, float] = field(default_factory=dict)
    distance: float | None = None
    known: set[tuple[str, ...]] = field(default_factory=set)  # passes whose result was accepted

    def accepts(self, model: Any, *rewrites: str) -> bool:
        """Return whether `model` computes the same. If it does not, leave out its only rewrite, with a warning."""
        outputs = self._outputs(model)
        distance, limit = self._distance(outputs, self.__dict__.get("_wanted", self.recorded)), SAME
        if not distance <= limit:
            distance = self._distance(outputs, self._wanted)
        if not distance <= limit:  # rounding alone may change the outputs of some networks by more
            limit = max(SAME, 4 * self._noise)
        if distance <= limit:
            self.distance = distance
            self.known.add(rewrites)
            if len(rewrites) == 1:
                self.__dict__["_wanted"] = outputs  # the next rewrite is compared with this network
            return True
        if len(rewrites) == 1:
            self.left_out[rewrites[0]] = distance
            _LOG.warning(
                'The rewrite "%s" changes the outputs of the fp32 network by %.1e (relative L2), so it is left out. Please '
                "report it.", rewrites[0], distance,
            )  # fmt: skip
        return False

    def __str__(self) -> str:
        """A clause about what was measured."""
        if self.distance is None:
            return "no rewrite changed the fp32 network"
        return f"the rewritten fp32 network equals the exported one (relative L2 {self.distance:.0e})"

    def _distance(self, outputs: Sequence[Array], wanted: Sequence[Array]) -> float:
        if not wanted:
            return math.inf
        return max(compare(one, other).relative_l2 for one, other in zip(outputs, wanted, strict=True))

    def _outputs(self, model: Any, **options: Any) -> list[Array]:
        session = onnxruntime_session(self.complete(model).SerializeToString(), **options)
        return [np.asarray(output) for output in session.run(None, dict(self.feeds))]

    @cached_property
    def _wanted(self) -> list[Array]:
        return self._outputs(self.model)

    @cached_property
    def _noise(self) -> float:
        """How far another order of additions moves the outputs."""
        off = require("onnxruntime", "run a graph").GraphOptimizationLevel.ORT_DISABLE_ALL
        return self._distance(self._outputs(self.model, graph_optimization_level=off), self._wanted)


def run_passes(
    graph: Graph, config: SwinConfig, passes: Sequence[Pass], check: NetworkCheck | None = None
) -> tuple[PassRecord, ...]:
    """Run `passes` on `graph` in order and return their records. Raises PassError for a wrong number of places.

    With `check`, the rewritten network is compared with the one before. If they differ, passes are run and compared one by one,
    and those that change the outputs are left out.
    """
    if check is not None:
        passes = [step for step in passes if step.name not in check.left_out]
    before, names = None if check is None else graph.copy(), tuple(step.name for step in passes)
    done = _run(graph, config, passes, counted=check is None or not check.left_out)
    if (
        check is None
        or names in check.known
        or not any(record.count for record in done)
        or check.accepts(_exported(graph), *names)
    ):
        return done
    _restore(graph, before)
    done = ()
    for step in passes:
        before = graph.copy()
        one = _run(graph, config, (step,), counted=not check.left_out)
        if not one[0].count or check.accepts(_exported(graph), step.name):
            done += one
        else:
            _restore(graph, before)
    return done


def _run(graph: Graph, config: SwinConfig, passes: Sequence[Pass], counted: bool) -> tuple[PassRecord, ...]:
    done: list[PassRecord] = []
    for step in passes:
        count, expected = step.rewrite(graph), step.expected(config)
        if counted and count != expected:
            before = ", ".join(record.name for record in done) or "none"
            raise PassError(
                f'The graph rewrite "{step.name}" found {count} places where this architecture has {expected} (passes run '
                f"before it: {before}). Please report it, with the options of the export."
            )
        graph.cleanup().toposort()
        done.append(PassRecord(step.name, count))
    return tuple(done)


def _exported(graph: Graph) -> Any:
    return require("onnx_graphsurgeon", "rewrite the graph").export_onnx(graph)


def _restore(graph: Graph, before: Graph) -> None:
    graph.nodes, graph.inputs, graph.outputs = before.nodes, before.inputs, before.outputs


def set_nodes(graph: Any, nodes: Iterable[Any]) -> None:
    """Replace the nodes of an ONNX graph by new ones, and drop the constants that none of them reads."""
    del graph.node[:]
    graph.node.extend(nodes)
    read = {name for node in graph.node for name in node.input}
    for place in reversed(range(len(graph.initializer))):
        if graph.initializer[place].name not in read:
            del graph.initializer[place]


def complete_header(model: Any, opset: int | None = None) -> None:
    """Set what an ONNX file states about itself: opset, the lowest IR version that has it, and its producer.

    Stored shapes of values are removed: a change of types makes them wrong, and where the batch is free, ONNX Runtime plans its
    memory 5 to 13 % slower with them.
    """
    import onnx

    from swin_deploy import __version__

    imported = next(domain for domain in model.opset_import if not domain.domain)
    opset = opset or int(imported.version)
    if min(opset, imported.version) < OPSET:
        from .operator_sets import convert_opset

        convert_opset(model, opset)
    imported.version = opset
    model.ir_version = onnx.helper.find_min_ir_version_for(model.opset_import)
    model.producer_name, model.producer_version = "swin-deploy", __version__
    del model.graph.value_info[:]


def blocks(version: int) -> Callable[[SwinConfig], int]:
    """Return an `expected` for passes that rewrite each block of one version of Swin."""
    return lambda config: config.blocks if config.version == version else 0


def constant(name: str, values: Any, dtype: Any = np.float32) -> Tensor:
    """Make a constant, float32 by default."""
    import onnx_graphsurgeon as gs

    return gs.Constant(name, np.asarray(values, dtype, order="C"))


def add_node(
    graph: Graph, name: str, op: str, inputs: Iterable[Tensor], output: str = "", dtype: Any = np.float32, **attributes: Any
) -> Tensor:
    """Append a node to `graph` and return the variable that it writes."""
    import onnx_graphsurgeon as gs

    result = gs.Variable(output or f"{name}_output", np.dtype(dtype))
    graph.nodes.append(gs.Node(op, name, attributes, list(inputs), [result]))
    return result


def redirect(readers: Iterable[Node], old: Tensor, new: Tensor) -> None:
    """Let `readers` read `new` in place of `old`."""
    for reader in list(readers):
        reader.inputs = [new if tensor is old else tensor for tensor in reader.inputs]


def add_after(graph: Graph, node: Node, values: Tensor) -> None:
    """Add the constant `values` to what `node` writes, for all its readers."""
    import onnx_graphsurgeon as gs

    before = node.outputs[0]
    after = gs.Variable(f"{values.name}_added", before.dtype, before.shape)
    redirect(before.outputs, before, after)
    graph.nodes.append(gs.Node("Add", f"{values.name}/Add", {}, [before, values], [after]))
