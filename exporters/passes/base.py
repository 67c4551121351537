"""Graph rewrites, each of which must rewrite as many places as the architecture has, and node helpers that they share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from swin_deploy.config import SwinConfig
from swin_deploy.errors import PassError

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


def run_passes(graph: Graph, config: SwinConfig, passes: Sequence[Pass]) -> tuple[PassRecord, ...]:
    """Run `passes` on `graph` in order and return their records. Raises PassError for a wrong number of places."""
    done: list[PassRecord] = []
    for step in passes:
        count, expected = step.rewrite(graph), step.expected(config)
        if count != expected:
            before = ", ".join(record.name for record in done) or "none"
            raise PassError(
                f'The graph rewrite "{step.name}" found {count} places where this architecture has {expected} (passes run '
                f"before it: {before}). This release does not know the graph that the installed torch and onnxscript "
                f"write. Install the versions in constraints.txt, and please report it."
            )
        graph.cleanup().toposort()
        done.append(PassRecord(step.name, count))
    return tuple(done)


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
