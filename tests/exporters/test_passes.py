"""Each rewrite on small graphs: where it matches, where it must not, and what happens when the count is off."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx", reason="rewrites act on ONNX graphs")
gs = pytest.importorskip("onnx_graphsurgeon", reason="rewrites act on onnx-graphsurgeon graphs")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from swin_deploy.config import SwinConfig  # noqa: E402
from swin_deploy.errors import ExportError, PassError  # noqa: E402
from swin_deploy.exporters.passes import PASSES, Pass, PassRecord, gather_selects, run_passes  # noqa: E402

V1 = SwinConfig(1, depths=(2, 2), num_heads=(1, 1), window_size=(7, 7), embed_dim=8)
V2 = SwinConfig(2, depths=(2, 3), num_heads=(1, 1), window_size=(7, 7), embed_dim=8)


def graph(nodes: Sequence[Any], outputs: Sequence[str] = ("y",), **constants: Any) -> Any:
    """A model with the input `x` [3, 2, 4], and 64-bit integers as constants."""
    return helper.make_model(
        helper.make_graph(
            nodes,
            "test",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [3, 2, 4])],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
            [numpy_helper.from_array(np.array(value, dtype=np.int64), name) for name, value in constants.items()],
        ),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )


def rewritten(model: Any) -> tuple[int, Any]:
    """How often gather_selects rewrote, and the model afterwards."""
    imported = gs.import_onnx(model)
    count = gather_selects.rewrite(imported)
    return count, gs.export_onnx(imported.cleanup().toposort())


def answers(model: Any) -> list[Any]:
    runtime = pytest.importorskip("onnxruntime", reason="ONNX Runtime runs graphs before and after a rewrite")
    session = runtime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return list(session.run(None, {"x": np.arange(24, dtype=np.float32).reshape(3, 2, 4)}))


def operators(model: Any) -> list[str]:
    return [node.op_type for node in model.graph.node]


SLICE = helper.make_node("Slice", ["x", "start", "end", "axis", "step"], ["part"])
SQUEEZE = helper.make_node("Squeeze", ["part", "axis"], ["y"])
PAIR = {"start": [1], "end": [2], "axis": [0], "step": [1]}


@pytest.mark.parametrize(
    ("cut", "constants"),
    [
        (SLICE, PAIR),
        (SLICE, {**PAIR, "start": [0], "end": [1]}),
        (SLICE, {"start": [3], "end": [4], "axis": [2], "step": [1]}),
        (SLICE, {**PAIR, "start": [-2], "end": [-1]}),
        (SLICE, {"start": [-2], "end": [-1], "axis": [-1], "step": [1]}),
        (helper.make_node("Slice", ["x", "start", "end", "axis"], ["part"]), {"start": [1], "end": [2], "axis": [1]}),
        (helper.make_node("Slice", ["x", "start", "end"], ["part"]), {"start": [2], "end": [3], "axis": [0]}),
    ],
)
def test_gather_selects(cut: Any, constants: dict[str, Any]) -> None:
    model = graph([cut, SQUEEZE], **constants)
    count, result = rewritten(model)
    assert count == 1
    assert operators(result) == ["Gather"]
    before, after = answers(model)[0], answers(result)[0]
    assert before.shape == after.shape
    assert np.array_equal(before, after)


def test_gather_selects_takes_query_key_and_value_apart() -> None:
    nodes = []
    for index, name in enumerate("qkv"):
        nodes.append(helper.make_node("Slice", ["x", f"n{index}", f"n{index + 1}", "n0"], [f"part_{name}"]))
        nodes.append(helper.make_node("Squeeze", [f"part_{name}", "n0"], [name], name=f"block/Squeeze_{index}"))
    model = graph(nodes, "qkv", n0=[0], n1=[1], n2=[2], n3=[3])
    count, result = rewritten(model)
    assert count == 3
    assert [(node.op_type, node.name) for node in result.graph.node] == [("Gather", f"block/Select_{i}") for i in range(3)]
    for before, after in zip(answers(model), answers(result), strict=True):
        assert np.array_equal(before, after)


@pytest.mark.parametrize(
    ("nodes", "outputs", "constants"),
    [
        pytest.param([SLICE, helper.make_node("Relu", ["part"], ["y"])], "y", PAIR, id="nothing is squeezed"),
        pytest.param(
            [helper.make_node("Slice", ["x", "start", "end", "cut", "step"], ["part"]), SQUEEZE], "y",
            {"start": [0, 0], "end": [1, 2], "cut": [0, 1], "step": [1, 1], "axis": [0]}, id="two axes are cut",
        ),
        pytest.param(
            [helper.make_node("Slice", ["x", "start", "end", "cut"], ["part"]),
             helper.make_node("Slice", ["part", "start", "end", "axis"], ["narrow"]),
             helper.make_node("Squeeze", ["narrow", "cut"], ["y"])], "y",
            {"start": [0], "end": [1], "cut": [0], "axis": [1]}, id="another axis is squeezed",
        ),
        pytest.param([SLICE, SQUEEZE], "y", {"start": [2], "end": [1], "axis": [0], "step": [-1]}, id="backwards"),
        pytest.param([SLICE, SQUEEZE], "y", {**PAIR, "start": [-1], "end": [99]}, id="the end is past the last"),
        pytest.param(
            [SLICE, SQUEEZE, helper.make_node("Relu", ["part"], ["z"])], "yz", PAIR, id="somebody else reads the slice"
        ),
        pytest.param(
            [SLICE, helper.make_node("Squeeze", ["part"], ["y"])], "y", PAIR, id="the squeezed axes are not said"
        ),
        pytest.param(
            [helper.make_node("Add", ["start", "step"], ["computed"]),
             helper.make_node("Slice", ["x", "start", "computed", "axis", "step"], ["part"]), SQUEEZE], "y", PAIR,
            id="the end is computed",
        ),
        pytest.param([helper.make_node("Squeeze", ["x"], ["y"])], "y", {}, id="the input is squeezed"),
    ],
)  # fmt: skip
def test_gather_selects_leaves_everything_else(nodes: Sequence[Any], outputs: str, constants: dict[str, Any]) -> None:
    model = graph(nodes, outputs, **constants)
    count, result = rewritten(model)
    assert count == 0
    assert sorted(operators(result)) == sorted(operators(model))
    for before, after in zip(answers(model), answers(result), strict=True):
        assert np.array_equal(before, after)


def test_gather_selects_keeps_a_slice_that_is_an_output() -> None:
    model = graph([SLICE, SQUEEZE], ("y", "part"), **PAIR)
    _, result = rewritten(model)
    for before, after in zip(answers(model), answers(result), strict=True):
        assert np.array_equal(before, after)


def test_gather_selects_expects_what_the_architecture_has() -> None:
    assert gather_selects.expected(V1) == 4 * 3
    assert gather_selects.expected(V2) == 5 * 2


def test_wrong_count_is_an_error() -> None:
    imported = gs.import_onnx(graph([SLICE, SQUEEZE], **PAIR))
    with pytest.raises(PassError) as caught:
        run_passes(imported, V1, PASSES["tensorrt"])
    message = str(caught.value)
    assert '"gather_selects" found 1 places where this architecture has 12 (passes run before it: none)' in message
    assert "install the versions in constraints.txt" in message
    assert isinstance(caught.value, ExportError)


def test_passes_run_in_order_and_are_recorded() -> None:
    seen: list[str] = []

    def step(name: str, count: int) -> Pass:
        def rewrite(graph: Any) -> int:
            seen.append(name)
            return count

        return Pass(name, rewrite, lambda config: 2)

    imported = gs.import_onnx(graph([helper.make_node("Relu", ["x"], ["y"])]))
    assert run_passes(imported, V1, ()) == ()
    assert run_passes(imported, V1, (step("a", 2), step("b", 2))) == (PassRecord("a", 2), PassRecord("b", 2))
    with pytest.raises(PassError, match=r'"d" found 1 places .* has 2 \(passes run before it: c\)'):
        run_passes(imported, V1, (step("c", 2), step("d", 1), step("e", 2)))
    assert seen == ["a", "b", "c", "d"]


def test_nodes_left_over_are_removed_and_the_rest_sorted() -> None:
    """What a pass detaches must not stay behind, and what it appends may come first."""
    model = graph([helper.make_node("Relu", ["x"], ["r"]), helper.make_node("Relu", ["r"], ["y"])])

    def rewrite(graph: Any) -> int:
        last = graph.nodes[-1]
        middle = gs.Variable("middle", np.dtype(np.float32))
        graph.nodes.append(gs.Node("Sigmoid", inputs=[graph.inputs[0]], outputs=[middle]))
        last.inputs = [middle]
        return 1

    imported = gs.import_onnx(model)
    run_passes(imported, V1, (Pass("replace", rewrite, lambda config: 1),))
    assert [node.op for node in imported.nodes] == ["Sigmoid", "Relu"]
