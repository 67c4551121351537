"""Compare graph layouts of the same Swin blocks in TensorRT for RTX: kernels and bytes.

    python benchmarks/graph_forms.py [--gpu sm_89] [--only TEXT]

Prints a table for four blocks of one stage (16 windows, 6 heads of 32 channels, a gather between blocks) in fp16 with random
weights, for one image and for eight. Engines are compiled and not run, so no GPU is needed. Needs the extras "export" and
"tensorrt-rtx".
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from swin_deploy.errors import EngineError
from swin_deploy.exporters.engines.engine_from_onnx import EngineSpec, engine_from_onnx

WINDOWS, HEADS, WIDTH, BLOCKS = 16, 6, 32, 4
CHANNELS = HEADS * WIDTH
HALF, FULL = TensorProto.FLOAT16, TensorProto.FLOAT


@dataclass
class Graph:
    """Builds an ONNX graph node by node; values are names."""

    tokens: int  # of a window
    order: str  # of the stream: "bwn", "bnw" or "nwb" (batch, window, token of a window)
    other: str = ""  # another difference: "erf", "merged", "folded"
    shifted: bool = False  # whether the current block has a mask
    nodes: list[Any] = field(default_factory=list)
    constants: list[Any] = field(default_factory=list)

    def op(self, kind: str, *inputs: Any, outputs: int = 1, **attributes: Any) -> Any:
        names = [f"v{len(self.nodes)}_{index}" for index in range(outputs)]
        given = [value if isinstance(value, str) else self.constant(value) for value in inputs]
        self.nodes.append(helper.make_node(kind, given, names, f"{kind}_{len(self.nodes)}", **attributes))
        return names if outputs > 1 else names[0]

    def constant(self, values: Any) -> str:
        self.constants.append(numpy_helper.from_array(np.asarray(values), f"c{len(self.constants)}"))
        return str(self.constants[-1].name)

    def weight(self, *shape: int) -> str:
        return self.constant(np.random.default_rng(len(self.constants)).normal(0, 0.02, shape).astype(np.float16))

    def reshape(self, x: str, *shape: int) -> Any:
        return self.op("Reshape", x, np.array(shape))

    def turn(self, x: str, *axes: int) -> Any:
        return self.op("Transpose", x, perm=list(axes))

    def linear(self, x: str, inputs: int, outputs: int, bias: bool = True) -> Any:
        return self.op("Gemm", x, self.weight(inputs, outputs), *([self.weight(outputs)] if bias else []))

    def norm(self, x: str) -> Any:
        if self.other == "folded":
            return self.op("LayerNormalization", x, np.ones(CHANNELS, np.float16))
        return self.op("LayerNormalization", x, self.weight(CHANNELS), self.weight(CHANNELS))

    def gelu(self, x: str) -> Any:
        if self.other != "erf":
            return self.op("Gelu", x)
        inner = self.op("Erf", self.op("Div", x, np.float16(2**0.5)))
        return self.op("Mul", self.op("Mul", x, self.op("Add", inner, np.float16(1))), np.float16(0.5))

    def cast(self, x: str, kind: int) -> Any:
        return self.op("Cast", x, to=kind)

    def gather(self, x: str) -> Any:
        count = WINDOWS * self.tokens
        index = np.random.default_rng(0).permutation(count)
        first = self.order == "nwb"
        split = self.reshape(x, *((count, -1) if first else (-1, count)), CHANNELS)
        return self.reshape(self.op("Gather", split, index, axis=0 if first else 1), -1, CHANNELS)

    def split(self, x: str) -> list[str]:
        return list(self.op("Split", x, outputs=3, axis=1, num_outputs=3))

    def windowed(self, x: str) -> Any:
        """[rows, channels] -> heads before tokens, windows before heads."""
        extents = {"b": -1, "w": WINDOWS, "n": self.tokens}
        split = self.reshape(x, *(extents[axis] for axis in self.order), HEADS, WIDTH)
        return self.turn(split, *(self.order.index(axis) for axis in self.order if axis != "n"), 3, self.order.index("n"), 4)

    def attend(self, scores: str, value: str) -> Any:
        """Bias, mask, softmax and values, then back to [rows, channels]."""
        masks = (WINDOWS, 1, 1) if self.order == "nwb" else (1, WINDOWS, 1)
        merged = self.other == "merged" and self.shifted
        bias = [n if merged else 1 for n in masks[:2]]
        scores = self.op("Add", scores, self.weight(*bias, HEADS, self.tokens, self.tokens))
        if self.shifted and not merged:
            scores = self.op("Add", scores, self.weight(*masks, self.tokens, self.tokens))
        context = self.op("MatMul", self.op("Softmax", scores, axis=-1), value)
        places = [axis for axis in self.order if axis != "n"]
        places[2:] = ["h", "n", "d"]
        return self.reshape(self.turn(context, *(places.index(axis) for axis in (*self.order, "h", "d"))), -1, CHANNELS)

    def keys(self, key: str) -> Any:
        return self.turn(key, 0, 1, 2, 4, 3)


Form = Callable[[Graph, str], str]


def one_projection(g: Graph, x: str, bias: bool = True) -> str:
    query, key, value = map(g.windowed, g.split(g.linear(x, CHANNELS, 3 * CHANNELS, bias)))
    return str(g.attend(g.op("MatMul", query, g.keys(key)), value))


def without_bias(g: Graph, x: str) -> str:
    return one_projection(g, x, bias=False)


def joint_transpose(g: Graph, x: str) -> str:
    split = g.reshape(g.linear(x, CHANNELS, 3 * CHANNELS), -1, WINDOWS, g.tokens, 3, HEADS, WIDTH)
    split = g.turn(split, 3, 0, 1, 4, 2, 5)
    query, key, value = (g.op("Gather", split, np.array(part), axis=0) for part in range(3))
    return str(g.attend(g.op("MatMul", query, g.keys(key)), value))


def three_projections(g: Graph, x: str) -> str:
    query, key, value = (g.windowed(g.linear(x, CHANNELS, CHANNELS)) for _ in range(3))
    return str(g.attend(g.op("MatMul", query, g.keys(key)), value))


def query_bias_alone(g: Graph, x: str) -> str:
    query, key, value = (g.windowed(g.linear(x, CHANNELS, CHANNELS, bias=part == 0)) for part in range(3))
    return str(g.attend(g.op("MatMul", query, g.keys(key)), value))


def product_by_part(g: Graph, x: str) -> str:
    made = g.op("MatMul", g.reshape(x, 1, -1, CHANNELS), g.weight(3, CHANNELS, CHANNELS))
    made = g.op("Add", made, g.weight(3, 1, CHANNELS))
    query, key, value = (g.windowed(g.op("Gather", made, np.array(part), axis=0)) for part in range(3))
    return str(g.attend(g.op("MatMul", query, g.keys(key)), value))


def product_by_head(g: Graph, x: str) -> str:
    shape = (-1, WINDOWS, 1, g.tokens, CHANNELS)
    made = g.op("MatMul", g.reshape(x, 1, *shape), g.weight(3, 1, 1, HEADS, CHANNELS, WIDTH))
    made = g.op("Add", made, g.weight(3, 1, 1, HEADS, 1, WIDTH))
    query, key, value = (g.op("Gather", made, np.array(part), axis=0) for part in range(3))
    return str(g.attend(g.op("MatMul", query, g.keys(key)), value))


def einsum(g: Graph, x: str) -> str:
    split = g.reshape(x, -1, WINDOWS, g.tokens, CHANNELS)
    made = (g.op("Einsum", split, g.weight(HEADS, CHANNELS, WIDTH), equation="bwnc,hcd->bwhnd") for _ in range(3))
    query, key, value = (g.op("Add", part, g.weight(1, 1, HEADS, 1, WIDTH)) for part in made)
    return str(g.attend(g.op("MatMul", query, g.keys(key)), value))


def turned_locally(g: Graph, x: str) -> str:
    """Window by window; tokens come first only inside attention."""
    g.order, kept = "nwb", g.order
    turned = g.reshape(g.turn(g.reshape(x, -1, WINDOWS, g.tokens, CHANNELS), 2, 1, 0, 3), -1, CHANNELS)
    made = g.reshape(one_projection(g, turned, bias=False), g.tokens, WINDOWS, -1, CHANNELS)
    g.order = kept
    return str(g.reshape(g.turn(made, 2, 1, 0, 3), -1, CHANNELS))


def unit(g: Graph, x: str) -> str:
    wide = g.cast(x, FULL)
    length = g.op("Max", g.op("ReduceL2", wide, np.array([-1]), keepdims=1), np.float32(1e-12))
    return str(g.cast(g.op("Div", wide, length), HALF))


def unit_vectors(g: Graph, x: str) -> str:
    query, key, value = map(g.windowed, g.split(g.linear(x, CHANNELS, 3 * CHANNELS)))
    return str(g.attend(g.op("MatMul", unit(g, query), g.keys(unit(g, key))), value))


def unit_vectors_jointly(g: Graph, x: str) -> str:
    split = g.reshape(g.linear(x, CHANNELS, 3 * CHANNELS), -1, WINDOWS, g.tokens, 3, HEADS, WIDTH)
    split = g.turn(split, 3, 0, 1, 4, 2, 5)
    both, value = g.op("Slice", split, [0], [2], [0]), g.op("Gather", split, np.array(2), axis=0)
    both = unit(g, both)
    query, key = (g.op("Gather", both, np.array(part), axis=0) for part in range(2))
    return str(g.attend(g.op("MatMul", query, g.keys(key)), value))


def layer_norm_as_length(g: Graph, x: str) -> str:
    """Not the same function (it subtracts the mean): is the compiler's own normalization one kernel?"""
    query, key, value = map(g.windowed, g.split(g.linear(x, CHANNELS, 3 * CHANNELS, bias=False)))
    query, key = (g.op("LayerNormalization", part, g.weight(WIDTH), g.weight(WIDTH)) for part in (query, key))
    return str(g.attend(g.op("MatMul", query, g.keys(key)), value))


def divide_last(g: Graph, x: str, bias: str = "behind", jointly: bool = True) -> str:
    query, key, value = g.split(g.linear(x, CHANNELS, 3 * CHANNELS, bias=bias == "inside"))
    if bias == "before":
        query = g.op("Add", query, g.weight(CHANNELS))
    query, key, value = map(g.windowed, (query, key, value))
    if bias == "behind":
        query = g.op("Add", query, g.weight(1, 1, HEADS, 1, WIDTH))
    vectors = [g.op("Concat", query, key, axis=2)] if jointly else [query, key]
    wide = [g.cast(vector, FULL) for vector in vectors]
    squares = [g.op("ReduceSum", g.op("Mul", one, one), np.array([-1]), keepdims=1) for one in wide]
    of_query, of_key = g.op("Split", squares[0], outputs=2, axis=2, num_outputs=2) if jointly else squares
    area = g.op("Max", g.op("Mul", of_query, g.keys(of_key)), np.float32(1e-30))
    product = g.cast(g.op("MatMul", query, g.keys(key)), FULL)
    return str(g.attend(g.cast(g.op("Div", product, g.op("Sqrt", area)), HALF), value))


V1_FORMS: tuple[tuple[str, str, Form], ...] = (
    ("one projection, one transpose, three slices", "bwn", joint_transpose),
    ("one projection, split, three transposes", "bwn", one_projection),
    ("three projections", "bwn", three_projections),
    ("query, key and value by one product [3, C, C]", "bwn", product_by_part),
    ("heads in front by one product [3, h, C, d]", "bwn", product_by_head),
    ("heads in front by Einsum", "bwn", einsum),
    ("tokens in front, with bias", "nwb", one_projection),
    ("tokens in front, bias for the query alone", "nwb", query_bias_alone),
    ("windows in front, without bias", "bwn", without_bias),
    ("tokens in front of windows, batch outside, without bias", "bnw", without_bias),
    ("tokens in front inside attention only, without bias", "bwn", turned_locally),
    ("**tokens in front, batch inside, without bias**", "nwb", without_bias),
)
V2_FORMS: tuple[tuple[str, str, Form], ...] = (
    ("query and key normalised", "bwn", unit_vectors),
    ("query and key normalised as one tensor", "bwn", unit_vectors_jointly),
    ("tokens in front, normalised by LayerNormalization", "nwb", layer_norm_as_length),
    ("tokens in front, product divided by lengths, all biases", "nwb", lambda g, x: divide_last(g, x, "inside")),
    ("the same, bias of the query before its transpose", "nwb", lambda g, x: divide_last(g, x, "before")),
    ("the same, bias behind it, lengths computed apart", "nwb", lambda g, x: divide_last(g, x, "behind", jointly=False)),
    ("**the same, lengths computed together**", "nwb", divide_last),
)


OTHERS = {
    "erf": "GELU by Erf, Div, Add and Mul",
    "merged": "bias and mask as one constant",
    "folded": "LayerNorm's scale and shift folded into what reads it",
}


def model(form: Form, version: int, order: str, batch: int, gather_last: bool, other: str = "") -> onnx.ModelProto:
    g = Graph(49 if version == 1 else 64, order, other)
    count, first = WINDOWS * g.tokens, order == "nwb"
    x = g.reshape(g.turn("x", 1, 0, 2) if first else "x", -1, CHANNELS)
    for block in range(BLOCKS):
        g.shifted = block % 2 == 1
        made = g.linear(form(g, g.norm(x) if version == 1 else x), CHANNELS, CHANNELS)
        x = g.op("Add", x, made if version == 1 else g.norm(made))
        made = g.gelu(g.linear(g.norm(x) if version == 1 else x, CHANNELS, 4 * CHANNELS))
        made, moves = g.linear(made, 4 * CHANNELS, CHANNELS), block + 1 < BLOCKS
        if moves and not gather_last:
            x, made = g.gather(x), g.gather(made)
        x = g.op("Add", x, made if version == 1 else g.norm(made))
        x = g.gather(x) if moves and gather_last else x
    x = g.reshape(x, *((count, -1) if first else (-1, count)), CHANNELS)
    x = g.turn(x, 1, 0, 2) if first else x
    value = [helper.make_tensor_value_info(name, HALF, [batch, count, CHANNELS]) for name in ("x", x)]
    graph = helper.make_graph(g.nodes, "forms", value[:1], value[1:], g.constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def figures(made: onnx.ModelProto, gpu: str, batch: int) -> str:
    try:
        spec = EngineSpec(backend="tensorrt-rtx", gpus=gpu, batches=((batch, batch, batch),))
        report = engine_from_onnx(made.SerializeToString(), spec).report
    except EngineError as error:
        return f"{error} | |"
    return f"{report.kernels} | {report.fused_attention} | {(report.bytes_moved or 0) / 1e6:.1f} MB"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gpu", default="sm_89", help="GPU to compile for")
    parser.add_argument("--only", default="", help="only layouts whose title contains this text")
    given = parser.parse_args(arguments)
    print("| layout | kernels | fused | moved | kernels, 8 images | fused | moved |\n|---|--:|--:|--:|--:|--:|--:|")
    rows: list[tuple[str, int, str, Form, bool, str]] = []
    rows += [(f"V1: {title}", 1, order, form, True, "") for title, order, form in V1_FORMS]
    rows += [(f"V1: the last, {title}", 1, "nwb", without_bias, True, other) for other, title in OTHERS.items()]
    rows += [(f"V2: {title}", 2, order, form, True, "") for title, order, form in V2_FORMS]
    rows.append(("V2: the same, **gathers in front of the norm**", 2, "nwb", divide_last, False, ""))
    rows += [
        (f"V2: the last, {title}", 2, "nwb", divide_last, False, other) for other, title in OTHERS.items() if other != "folded"
    ]
    for title, version, order, form, gather_last, other in rows:
        if given.only in title:
            found = [figures(model(form, version, order, batch, gather_last, other), given.gpu, batch) for batch in (1, 8)]
            print(f"| {title} | {' | '.join(found)} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
