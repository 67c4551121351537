"""Inject single faults into graphs, and count how often `swin-deploy diff` names the right block and part.

    python benchmarks/faults.py [--faults 200] [--networks small-v1,small-v2,swin-tiny,swinv2-tiny] [--work DIR]
    python benchmarks/faults.py --right [--variants "swin-tiny;v2, window 8"]

Each fault changes one constant, attribute or node of a right graph in fp32, fp16 or INT8. The faulty graph is compared with the
right one, and with the fp32 graph in the layout for OpenVINO, in which names and constants are others. --right compares the
graphs of 28 small networks, or of --variants, with each other and with their checkpoints: all must be equal. Weights are
random, and seeds make every run the same. Needs the extras "export", "onnxruntime" and "openvino".
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

import swin_deploy
from swin_deploy.bundle import Bundle
from swin_deploy.config import SwinConfig
from swin_deploy.diagnosis.comparison import Difference, compared
from swin_deploy.diagnosis.faults import node_points
from swin_deploy.diagnosis.sides import Side, give_images, side_from
from swin_deploy.diagnosis.swin_structure import Point
from swin_deploy.errors import VerificationError
from swin_deploy.variants import find_variant

PRECISIONS = ("fp32", "fp16", "int8")
LAYOUTS = ("tensorrt", "openvino", "onnxruntime")
SMALL = {"image_size": (64, 64), "embed_dim": 32, "depths": (2, 2), "num_heads": (2, 4), "window_size": (4, 4)}
# Networks for --right, with the structure of published architectures and fewer channels and blocks: what differs from SMALL.
RIGHT: dict[str, dict[str, Any]] = {
    "v1": {},
    "v1, window 7": {"image_size": (56, 56), "window_size": (7, 7)},
    "v1, window 12": {"image_size": (96, 96), "window_size": (12, 12)},
    "v1, padded": {"image_size": (72, 72), "window_size": (7, 7)},
    "v1, padded, odd, not square": {"image_size": (60, 84), "window_size": (7, 7)},
    "v1, wide": {"image_size": (64, 96)},
    "v1, four stages": {"depths": (2, 2, 3, 1), "num_heads": (1, 2, 4, 8), "window_size": (4,) * 4},
    "v1, odd depths": {"depths": (1, 3)},
    "v1, no bias of queries, keys and values": {"qkv_bias": False},
    "v1, absolute positions": {"use_absolute_embeddings": True},
    "v1, patches of 2": {"image_size": (32, 32), "patch_size": (2, 2)},
    "v1, patches of 8, one channel": {"image_size": (128, 128), "patch_size": (8, 8), "num_channels": 1},
    "v1, four channels, other epsilon": {"num_channels": 4, "layer_norm_eps": 1e-6},
    "v1, tanh GELU": {"hidden_act": "gelu_new"},
    "v1, ReLU": {"hidden_act": "relu"},
    "v1, feature extraction": {"task": "feature-extraction"},
    "v1, masked image modeling": {"task": "masked-image-modeling", "encoder_stride": 8},
    "v1, backbone": {"task": "backbone", "out_features": ("stage1", "stage2")},
    "v2": {"version": 2},
    "v2, window 8": {"version": 2, "window_size": (8, 8)},
    "v2, window 16": {"version": 2, "image_size": (128, 128), "window_size": (16, 16)},
    "v2, fine-tuned": {"version": 2, "image_size": (96, 96), "window_size": (12, 6), "pretrained_window_sizes": (8, 6)},
    "v2, padded": {"version": 2, "image_size": (72, 88), "window_size": (8, 8)},
    "v2, no bias of queries and values, quick GELU": {"version": 2, "qkv_bias": False, "hidden_act": "quick_gelu"},
    "v2, four stages, SiLU": {
        "version": 2, "depths": (1, 2, 3, 2), "num_heads": (1, 2, 4, 8), "window_size": (4,) * 4, "hidden_act": "silu",
    },
    "v2, feature extraction, absolute positions": {"version": 2, "task": "feature-extraction", "use_absolute_embeddings": True},
    "v2, masked image modeling": {"version": 2, "task": "masked-image-modeling", "encoder_stride": 8},
    "v2, backbone, one head": {"version": 2, "task": "backbone", "num_heads": (1, 2)},
}  # fmt: skip


@dataclass(frozen=True)
class Injected:
    """A faulty graph, where its fault is, and what kind it is."""

    kind: str
    point: Point
    model: onnx.ModelProto


def config_of(name: str) -> SwinConfig:
    """Return the configuration of a network of this benchmark."""
    if name in RIGHT or name.startswith("small-v"):
        changes = {"version": int(name[-1])} if name.startswith("small-v") else {**RIGHT[name]}
        changes.pop("task", None)
        version = changes.pop("version", 1)
        trained = {"pretrained_window_sizes": (0,) * len(changes.get("depths", SMALL["depths"]))} if version == 2 else {}
        return SwinConfig(version=version, **{**SMALL, **trained, **changes})
    return dataclasses.replace(find_variant(name).config(), id2label={i: f"LABEL_{i}" for i in range(10)})


def bundles(
    name: str,
    folder: Path,
    precisions: Sequence[str] = PRECISIONS,
    task: str = "image-classification",
    layouts: Sequence[str] = ("tensorrt", "openvino"),
) -> dict[str, Path]:
    """Write the checkpoint of a network and its bundles, unless `folder` has them: "checkpoint", and bundles by layout."""
    from safetensors.torch import save_file

    from swin_deploy.exporters.typed_graphs import with_typed_graphs
    from swin_deploy.models.checkpoints import random_checkpoint
    from swin_deploy.runtimes.backends import runtime_to_check
    from swin_deploy.tasks import TaskSpec

    config, place = config_of(name), folder / name
    if not (place / "model.safetensors").exists():
        import torch

        place.mkdir(parents=True, exist_ok=True)
        generator = torch.Generator().manual_seed(len(name))
        found = {}
        for key, values in random_checkpoint(config, TaskSpec(task)).tensors.items():
            noise = torch.randn(values.shape, generator=generator)
            found[key] = values + (0.1 * noise if values.ndim == 1 or "table" in key else 0.02 * noise)
        (place / "config.json").write_text(json.dumps(config.to_dict()))
        save_file(found, place / "model.safetensors")
    images = np.random.default_rng(0).standard_normal((8, config.num_channels, *config.image_size), dtype=np.float32)
    made = {layout: place / layout for layout in layouts}
    for layout, path in made.items():
        if not path.exists():
            swin_deploy.export(weights=place, output=path, target=layout, task=task)
        held = {entry.precision for entry in Bundle.open(path).graphs.values()}
        if layout == "tensorrt" and "fp16" in precisions and "fp16" not in held:
            with_typed_graphs(Bundle.open(path), "fp16", runtime_to_check)
        # Layers of small networks stay in fp32 for OpenVINO, because they would not be faster in INT8.
        if layout in ("tensorrt", "onnxruntime") and "int8" in precisions and "int8" not in held:
            try:
                swin_deploy.quantize(path, list(images), precision="int8", target=layout)
            except VerificationError as error:  # random weights: the graph is not kept
                print(f"{name}: {layout} int8: {error}")
    return {**made, "checkpoint": place}


class Injector:
    """Makes faulty copies of the graph of `side`."""

    def __init__(self, side: Side, rng: np.random.Generator) -> None:
        self.side, self.rng, self.model = side, rng, onnx.ModelProto()
        self.model.CopyFrom(side.model)
        self.points = node_points(side)
        self.constants = {one.name: one for one in self.model.graph.initializer}
        self.nodes = {node.output[0]: node for node in self.model.graph.node}

    def pick(self, parts: str) -> tuple[Point, Any]:
        """Return a random linear layer or norm whose part matches, with its point."""
        structure = self.side.structure
        every = {**structure.linears, **structure.norms}
        chosen = [point for point in every if any(part in point.part for part in parts.split("|"))]
        point = chosen[self.rng.integers(len(chosen))]
        return point, every[point]

    def block(self, shifted: bool = False) -> tuple[int, int]:
        """Return a random block."""
        found = sorted(self.side.structure.attentions)
        if shifted:
            found = [at for at in found if len(self.side.structure.attentions[at].added) > 1]
        return found[self.rng.integers(len(found))]

    def write(self, node: Any, position: int, change: Callable[[Any], Any]) -> None:
        """Give `node` a constant of its own: what `change` makes of the one at `position`."""
        name = node.input[position]
        values = numpy_helper.to_array(self.constants[name])
        changed = np.asarray(change(values.astype(np.float32) if values.dtype.kind == "f" else values.copy()))
        made = numpy_helper.from_array(np.ascontiguousarray(changed.astype(values.dtype)), f"{name}/{node.name}/faulty")
        self.model.graph.initializer.append(made)
        node.input[position] = made.name

    def weight(self, layer: Any) -> tuple[Any, int]:
        """Return the node and the input that hold the weight of a layer: of its DequantizeLinear, if it has one."""
        node = self.nodes[layer.node.output[0]]
        if node.op_type == "ReduceSum":
            node = self.nodes[node.input[0]]
        position = next((p for p in (1, 0) if node.input[p] in self.constants), 1)
        while node.input[position] not in self.constants:
            inner = self.nodes[node.input[position]]
            if inner.op_type == "DequantizeLinear":
                return inner, 1
            node, position = inner, 0
        return node, position

    def third(self, point: Point, count: int) -> slice:
        """Return the rows of the part at `point` in a layer with `count` outputs."""
        if point not in self.side.structure.joined:
            return slice(count)
        number = ("query", "key", "value").index(point.part.rpartition(".")[2])
        return slice(number * count // 3, (number + 1) * count // 3)

    # -- kinds of faults. Each returns where the fault is, or None if the graph has no place for it. ------------------------

    def scaled_weight(self) -> Point | None:
        point, layer = self.pick("attention|mlp|reduction|norm1|norm2|merge.norm|head")
        factor = float(self.rng.choice([0.5, 0.7, 1.4, 2.0]))
        if not hasattr(layer, "eps"):
            node, position = self.weight(layer)
            rows = self.third(point, len(layer.weight))
            joined = point in self.side.structure.joined
            if joined and node.op_type == "DequantizeLinear" and not self.constants[node.input[1]].dims:
                return None  # one scale for all three

            def change(values: Any) -> Any:
                if values.ndim and len(values) == len(layer.weight):
                    values[rows] *= factor
                else:
                    values = values * factor
                return values

            self.write(node, position, change)
            return point
        node = self.nodes.get(layer.output)
        if node is None or node.op_type != "LayerNormalization":
            return None
        self.write(node, 1, lambda values: values * factor)
        return point

    def transposed_weight(self) -> Point | None:
        point, layer = self.pick("attention.output|attention.query|attention.value")
        node, position = self.weight(layer)
        if node.op_type == "DequantizeLinear":
            position = 0
        rows = self.third(point, len(layer.weight))

        def change(values: Any) -> Any:
            values[rows] = values[rows].T.copy()
            return values

        self.write(node, position, change)
        return point

    def mask_element(self) -> Point | None:
        at = self.block(shifted=True)
        add, name = self.side.structure.attentions[at].added[-1]

        def change(values: Any) -> Any:
            flat = values.reshape(-1)
            place = self.rng.choice(np.flatnonzero(flat < -50) if self.rng.random() < 0.5 else np.flatnonzero(flat > -50))
            flat[place] = 0 if flat[place] < -50 else -100
            return values

        node = self.nodes[add.output[0]]
        self.write(node, list(node.input).index(name), change)
        return Point(*at, "attention.mask")

    def bias_row(self) -> Point | None:
        at = self.block()
        add, name = self.side.structure.attentions[at].added[0]

        def change(values: Any) -> Any:
            rows = values.reshape(-1, values.shape[-1])
            row = self.rng.integers(len(rows))
            rows[row] = np.roll(rows[row], 1) if self.rng.random() < 0.5 else rows[row] * 2 + np.arange(rows.shape[1]) % 2
            return values

        node = self.nodes[add.output[0]]
        self.write(node, list(node.input).index(name), change)
        return Point(*at, "attention.bias")

    def overflow(self) -> Point | None:
        point, layer = self.pick("mlp.fc1|attention.output|mlp.fc2")
        node, position = self.weight(layer)
        if node.op_type == "DequantizeLinear" or self.side.precision != "fp16":
            return None
        self.write(node, position, lambda values: np.clip(values * 6e4 / np.abs(values).max(), -6e4, 6e4))
        return point

    def quantizer(self) -> Point | None:
        nodes = [
            node
            for node in self.model.graph.node
            if node.op_type == "QuantizeLinear" and node.output[0] in self.points and node.input[0] in self.points
        ]
        if not nodes:
            return None
        node = nodes[self.rng.integers(len(nodes))]
        factor = float(self.rng.choice([0.1, 0.25, 4.0, 8.0]))
        reader = next(one for one in self.model.graph.node if node.output[0] in one.input)
        which = self.rng.integers(3)
        for one, chosen in ((node, which != 1), (reader, which != 0)):
            if chosen:
                self.write(one, 1, lambda values: values * factor)
        return self.points[node.output[0]]

    def swapped_windows(self) -> Point | None:
        at = self.block(shifted=True)
        if at[1] == 0:
            return None  # its gather merges four tokens
        attention = self.side.structure.attentions[at]
        tokens = self.side.graph.tokens[attention.query].shape[-1]
        gathers = [node for node in self.side.graph.ancestors(attention.query) if node.op_type == "Gather"]
        if not gathers:
            return None
        node = self.nodes[gathers[0].output[0]]

        def change(values: Any) -> Any:
            grid = values.reshape(tokens, -1)
            grid[:, [0, -1]] = grid[:, [-1, 0]]
            return values

        before = self.side.graph.place[self.side.structure.attentions[at[0], at[1] - 1].context.output[0]]
        near = {one.output[0] for one in gathers}
        shared = node.input[1]  # by both copies of the gather, if it was moved before the norm
        for one in self.model.graph.node:
            after = self.side.graph.place.get(one.output[0], -1) > before
            if one.op_type == "Gather" and one.input[1] == shared and after and one.output[0] in near:
                self.write(one, 1, change)
        return Point(*at, "norm1" if self.side.structure.version == 1 else "attention.query")

    def epsilon(self) -> Point | None:
        point, norm = self.pick("norm")
        node = self.nodes.get(norm.output)
        if node is None or node.op_type != "LayerNormalization":
            return None
        kept = [one for one in node.attribute if one.name != "epsilon"]
        del node.attribute[:]
        node.attribute.extend([*kept, helper.make_attribute("epsilon", float(self.rng.choice([1e-3, 1e-12, 1e-6, 1e-2])))])
        return point

    def key_bias(self) -> Point | None:
        point, layer = self.pick("attention.key")
        node = self.nodes[layer.node.output[0]]
        if layer.bias is None or len(node.input) < 3 or node.input[2] not in self.constants:
            return None
        rows = self.third(point, len(layer.weight))
        if not np.asarray(layer.bias)[rows].any():
            return None

        def change(values: Any) -> Any:
            values[rows] = 0
            return values

        self.write(node, 2, change)
        return point

    def activation(self) -> Point | None:
        points = sorted(self.side.structure.activations)
        point = points[self.rng.integers(len(points))]
        node = next(
            (one for one in self.model.graph.node if one.op_type == "Gelu" and self.points[one.output[0]] == point), None
        )
        if node is None:
            return None
        tanh = self.rng.random() < 0.6
        del node.attribute[:]
        if tanh:
            node.attribute.append(helper.make_attribute("approximate", "tanh"))
        else:
            node.op_type = "Relu"
        return point

    def image_channels(self) -> Point | None:
        node = next(one for one in self.model.graph.node if one.op_type == "Conv")
        self.write(node, 1, lambda values: values[:, [2, 1, 0]])
        return Point(None, None, "input")


KINDS = {
    "weights scaled": Injector.scaled_weight,
    "weights transposed": Injector.transposed_weight,
    "mask element": Injector.mask_element,
    "bias row": Injector.bias_row,
    "fp16 overflow": Injector.overflow,
    "Q/DQ scale": Injector.quantizer,
    "swapped windows": Injector.swapped_windows,
    "epsilon": Injector.epsilon,
    "key bias": Injector.key_bias,
    "other activation": Injector.activation,
    "image channels": Injector.image_channels,
}


def injected(side: Side, seed: int) -> Injected:
    """Return a copy of the graph of `side` with the fault that follows from `seed`."""
    rng = np.random.default_rng(seed)
    for offset in range(len(KINDS)):
        kind = list(KINDS)[(seed + offset) % len(KINDS)]
        for _ in range(5):
            injector = Injector(side, rng)
            point = KINDS[kind](injector)
            if point is not None:
                return Injected(kind, point, injector.model)
    raise AssertionError("no fault fits this graph")


def verdict(found: Difference, point: Point, order: list[Point]) -> str:
    """Return "named", "neighbor", "elsewhere" or "missed"."""
    if found.first is None:
        return "missed"
    if found.first.point == point:
        return "named"
    if found.first.point not in order or point not in order:
        return "elsewhere"
    return "neighbor" if abs(order.index(found.first.point) - order.index(point)) <= 1 else "elsewhere"


def fresh(side: Side, model: onnx.ModelProto | None = None) -> Side:
    """Return a side without what was computed for it, with another graph if one is given."""
    return dataclasses.replace(side, model=side.model if model is None else model, feeds=dict(side.feeds))


def run_faults(given: argparse.Namespace, folder: Path) -> int:
    """Inject faults, and print how many are named."""
    networks = given.networks.split(",")
    precisions = given.precisions.split(",")
    results: dict[str, Counter[tuple[str, str]]] = {"same layout": Counter(), "fp32, other layout": Counter()}
    places: dict[str, Counter[str]] = {kind: Counter() for kind in results}
    slowest = 0.0
    seeds = iter(range(given.seed, given.seed + given.faults))
    share = -(-given.faults // (len(networks) * len(precisions)))
    for name in networks:
        made = bundles(name, folder, precisions)
        across = side_from(made["openvino"])
        for precision in precisions:
            right = side_from(f"{made['tensorrt']}:{precision}")
            give_images((right, across), None, 1)
            for _ in range(share):
                seed = next(seeds, None)
                if seed is None:
                    break
                fault = injected(right, seed)
                for against, first in (("same layout", right), ("fp32, other layout", across)):
                    start = time.perf_counter()
                    found = compared(first, fresh(right, fault.model))
                    slowest = max(slowest, time.perf_counter() - start)
                    said = verdict(found, fault.point, right.structure.points())
                    results[against][fault.kind, said] += 1
                    places[against][said] += 1
                    if said != "named":
                        named = "nothing" if found.first is None else f"{found.first.point.title()}: {found.first.cause}"
                        print(f"{name} {precision} seed {seed} ({fault.kind}, {against}): {fault.point.title()} -> {named}")
    for against, counts in results.items():
        total = sum(places[against].values())
        print(f"\nAgainst the graph of the {against}: {total} faults, {places[against]['named'] / max(total, 1):.1%} named, "
              f"{places[against]['neighbor']} at a neighbor, {places[against]['elsewhere']} elsewhere, "
              f"{places[against]['missed']} missed")  # fmt: skip
        print("| kind | named | neighbor | elsewhere | missed |\n|---|--:|--:|--:|--:|")
        for kind in KINDS:
            row = [counts[kind, said] for said in ("named", "neighbor", "elsewhere", "missed")]
            if any(row):
                print(f"| {kind} | {' | '.join(map(str, row))} |")
    print(f"\nslowest comparison: {slowest:.1f} s")
    return int(places["same layout"]["named"] < 0.95 * sum(places["same layout"].values()))


def right_pairs(precisions: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """Yield what must be equal: a layout in fp32 or the checkpoint, and a layout and its precision."""
    for precision in precisions:
        yield from ((first, "tensorrt", precision) for first in ("openvino", "onnxruntime", "checkpoint"))
        if precision == "int8":
            yield "checkpoint", "onnxruntime", precision


def run_right(given: argparse.Namespace, folder: Path) -> int:
    """Compare right graphs of many architectures, and print the false alarms."""
    results: list[bool] = []
    precisions = given.precisions.split(",")
    chosen = given.variants.split(";") if given.variants else list(RIGHT)
    for name in chosen:
        task = RIGHT.get(name, {}).get("task", "image-classification")
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = bundles(name, given.work or Path(scratch), precisions, task, LAYOUTS)
            for first, layout, precision in right_pairs(precisions):
                if not Bundle.open(made[layout]).graphs_of(precision):
                    continue
                sides = side_from(made[first]), side_from(f"{made[layout]}:{precision}")
                give_images(sides, None, 1)
                start = time.perf_counter()
                found = compared(*sides)
                results.append(not found.equal)
                named = "equal" if found.first is None else f"{found.first.point.title()}: {found.first.cause}"
                aligned = f"{len(found.points)} of {len(sides[0].structure.points())} points"
                seconds = time.perf_counter() - start
                print(f"{name}: {first} and {layout} {precision}: {named} ({aligned}, {seconds:.1f} s)", flush=True)
    print(f"{len(results)} pairs of right graphs of {len(chosen)} architectures, {sum(results)} false alarms")
    return int(any(results))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the first fault")
    parser.add_argument("--networks", default="small-v1,small-v2,swin-tiny,swinv2-tiny")
    parser.add_argument("--precisions", default=",".join(PRECISIONS))
    parser.add_argument("--work", type=Path, help="folder that keeps the bundles for the next run")
    parser.add_argument("--right", action="store_true", help="compare right graphs instead")
    parser.add_argument(
        "--variants", help="networks or architectures for --right, with semicolons between (default: 28 small networks)"
    )
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="swin-faults-") as scratch:
        folder = given.work or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        return (run_right if given.right else run_faults)(given, folder)


if __name__ == "__main__":
    sys.exit(main())
