"""Whether GELU's form and LayerNorm's scale and shift matter to a CPU runtime: graphs with them written otherwise, as a table.

    python benchmarks/cpu_small_forms.py [--variants swin-tiny,swinv2-tiny] [--rounds 20] [--clock wall]

As cpu_forms.py, with which it shares all but the candidates; every form answers the same, as the last column shows.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cpu_forms
import numpy as np
import onnx
from cpu_forms import Candidate
from onnx import helper, numpy_helper

CANDIDATES = {
    "transformers, ONNX Runtime": Candidate("transformers", "onnxruntime"),
    **{
        f"{title}, {words}": Candidate(f"{backend}{form}", backend)
        for backend, title in (("onnxruntime", "ONNX Runtime"), ("openvino", "OpenVINO"))
        for form, words in (("", "as it is"), ("_erf", "GELU by Erf, Div, Add, Mul"), ("_folded", "norms folded"))
    },
}


def by_erf(model: Any) -> None:
    """Every Gelu as what it stands for."""
    nodes = list(model.graph.node)
    del model.graph.node[:]
    for name, value in (("root", 2**0.5), ("one", 1.0), ("half", 0.5)):
        model.graph.initializer.append(numpy_helper.from_array(np.array(value, np.float32), f"gelu/{name}"))
    for node in nodes:
        if node.op_type != "Gelu":
            model.graph.node.append(node)
            continue
        x, y = node.input[0], node.output[0]
        steps = (
            ("Div", (x, "gelu/root"), f"{y}/0"), ("Erf", (f"{y}/0",), f"{y}/1"), ("Add", (f"{y}/1", "gelu/one"), f"{y}/2"),
            ("Mul", (x, f"{y}/2"), f"{y}/3"), ("Mul", (f"{y}/3", "gelu/half"), y),
        )  # fmt: skip
        model.graph.node.extend(helper.make_node(kind, inputs, [made]) for kind, inputs, made in steps)


def folded(model: Any) -> None:
    """Scale and shift of each LayerNormalization that only linear layers read, in these."""
    weights = {tensor.name: tensor for tensor in model.graph.initializer}

    def change(name: str, array: Any) -> None:
        weights[name].CopyFrom(numpy_helper.from_array(np.ascontiguousarray(array, np.float32), name))

    readers: dict[str, list[Any]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    for node in model.graph.node:
        behind = readers.get(node.output[0], [])
        if node.op_type != "LayerNormalization" or not behind or any(one.op_type != "Gemm" for one in behind):
            continue
        scale, shift = (numpy_helper.to_array(weights[name]) for name in node.input[1:])
        for one in behind:
            weight = numpy_helper.to_array(weights[one.input[1]])
            bias = numpy_helper.to_array(weights[one.input[2]]) if len(one.input) > 2 else np.zeros(len(weight), np.float32)
            if len(one.input) == 2:
                one.input.append(f"{one.input[1]}/shift")
                weights[one.input[2]] = model.graph.initializer.add()
            change(one.input[2], bias + weight @ shift)
            change(one.input[1], weight * scale)
        change(node.input[1], np.ones_like(scale))
        del node.input[2]


def write_graphs(name: str, folder: str) -> None:
    """The graphs of cpu_forms.py, and those for CPU runtimes in each form."""
    cpu_forms.write_graphs(name, folder)
    write_forms(folder)


def write_forms(folder: str) -> None:
    """Each form of the graphs in `folder`."""
    forms: dict[str, Callable[[Any], None]] = {"erf": by_erf, "folded": folded}
    for target in ("onnxruntime", "openvino"):
        for form, rewrite in forms.items():
            model = onnx.load(f"{folder}/{target}.onnx")
            rewrite(model)
            Path(folder, f"{target}_{form}.onnx").write_bytes(model.SerializeToString())


if __name__ == "__main__":
    cpu_forms.CANDIDATES = CANDIDATES
    cpu_forms.WRITER = "cpu_small_forms.write_graphs"
    sys.exit(cpu_forms.main())
