"""What a pass is: one rewrite of one graph, which knows beforehand how many places it must find.

A pass mutates the graph that it is handed and returns how often it rewrote. The runner compares that count with what the
architecture implies; a pass that matched too little or too much is an error, because it means that the exporter's output
is not the graph the pass was written for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from swin_deploy.config import SwinConfig
from swin_deploy.errors import PassError

Graph = Any  # onnx_graphsurgeon.Graph, which is not imported at module level


@dataclass(frozen=True)
class Pass:
    """`rewrite(graph)` returns the number of places rewritten; `expected(config)` the number that there must be."""

    name: str
    rewrite: Callable[[Graph], int]
    expected: Callable[[SwinConfig], int]


@dataclass(frozen=True)
class PassRecord:
    """What a pass did, for the manifest."""

    name: str
    count: int


def run_passes(graph: Graph, config: SwinConfig, passes: Sequence[Pass]) -> tuple[PassRecord, ...]:
    """The record of every pass, after running them on `graph` in order. Raises PassError on a count that is off."""
    done: list[PassRecord] = []
    for step in passes:
        count, expected = step.rewrite(graph), step.expected(config)
        if count != expected:
            before = ", ".join(record.name for record in done) or "none"
            raise PassError(
                f'The graph rewrite "{step.name}" found {count} places where this architecture has {expected} (passes run '
                f"before it: {before}). This release does not know the graph that the installed torch and onnxscript "
                f"write; install the versions in constraints.txt, and please report it."
            )
        graph.cleanup().toposort()
        done.append(PassRecord(step.name, count))
    return tuple(done)
