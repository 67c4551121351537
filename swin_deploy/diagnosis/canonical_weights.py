"""Compare the parameters of two graphs with different layouts or types, after undoing what exporters fold and equalize.

Every comparison is of something that no legal rewrite changes. A LayerNorm and the linear layer after it are one linear map of
normalized tokens, whose mean is 0: the map is the same if all weights of a row change by one number. A bias of keys, and of
a whole row of scores, changes no probability. A factor on a row of the query may be undone in the same row of the key, and one
on a row of the value in the column of the output projection.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from swin_deploy.options import Array

from .comparison import MASKED, Fault, by_window
from .folded_graph import run_with_outputs
from .sides import Side
from .swin_structure import LinearPart, NormPart, Point, activation_kind

# Largest relative error of a parameter that a type explains, and of the least-squares factor between two.
WEIGHT = {"fp32": 1e-4, "fp16": 4e-3, "bf16": 2e-2, "int8": 0.3, "fp8": 0.3}
FACTOR = {"fp32": 2e-5, "fp16": 2e-3, "bf16": 1e-2, "int8": 0.07, "fp8": 0.07}
EIGHT_BITS = ("int8", "fp8")
ROUNDED = 0.1  # of an offset, by quantized weights
OTHER_IMAGES = 0.75  # of the correction of a bias, which quantization measured on other images


@dataclass(frozen=True)
class LinearMap:
    """A LayerNorm and a linear layer: `matrix` [outputs, channels] with rows of mean 0, and `offset` [outputs].

    `rounded` is the L2 norm of the products that the offset is summed from, which quantized weights change. `directions`
    are those in which a bias of the norm can change the offset: the columns of `matrix` and the means that it lacks.
    """

    matrix: Array
    offset: Array
    rounded: float = 0.0
    means: Array | None = None

    @property
    def directions(self) -> Array:
        return self.matrix if self.means is None else np.hstack([self.matrix, self.means])


class ParameterComparison:
    """Compares the parameters of `b` with those of `a`, whose networks have the same blocks."""

    def __init__(self, a: Side, b: Side) -> None:
        self.a, self.b = a, b
        self.version = b.structure.version
        self.tight = max(WEIGHT[a.precision], WEIGHT[b.precision])
        self.factor = max(FACTOR[a.precision], FACTOR[b.precision])
        self.quantized = a.precision in EIGHT_BITS or b.precision in EIGHT_BITS
        self.typed = not a.precision == b.precision == "fp32"

    def faults(self) -> Iterator[Fault]:
        """Yield what differs, in no particular order."""
        structure = self.b.structure
        yield from self._patches()
        for stage, depth in enumerate(structure.depths):
            stream = self._stream_factors(stage) if self.version == 2 and self.quantized else None
            for block in range(depth):
                at = stage, block
                yield from self._attention_inputs(at, stream)
                yield from self._output(at)
                yield from self._scores(at)
                yield from self._mlp(at, stream)
                if self.version == 2:
                    for part in ("norm1", "norm2"):
                        yield from self._norm(Point(*at, part), stream)
            if stage + 1 < len(structure.depths):
                yield from self._merge(stage, stream)
        yield from self._head()
        yield from self._norm_settings()

    # -- single parts ------------------------------------------------------------------------------------------------------

    def _patches(self) -> Iterator[Fault]:
        from .faults import describe

        point = Point(None, None, "patch_embed")
        convs = [one.structure.conv for one in (self.a, self.b)]
        if None in convs:
            return
        x, y = (
            side.graph.constant(conv.input[1]).astype(np.float64) for side, conv in zip((self.a, self.b), convs, strict=True)
        )
        if x.shape == y.shape and self._differ(x.reshape(len(x), -1), y.reshape(len(y), -1)):
            orders = [(2, 1, 0), (1, 0, 2), (0, 2, 1), (1, 2, 0), (2, 0, 1)] if x.shape[1] == 3 else []
            best = next((o for o in orders if not self._differ(x[:, o].reshape(len(x), -1), y.reshape(len(y), -1))), None)
            place, cause = point, describe(point, x, y)
            if best is not None:
                place = Point(None, None, "input")
                cause = f"Other preprocessing: the channels of images are in the order {best}."
            yield Fault(place, convs[1].input[1], cause)
            return
        biases = [
            side.graph.constant(conv.input[2]).astype(np.float64) if len(conv.input) > 2 else np.zeros(len(x))
            for side, conv in zip((self.a, self.b), convs, strict=True)
        ]
        if self._vectors_differ(biases[0], biases[1]):
            yield Fault(point, convs[1].input[-1], describe(point, *biases))
        elif self.version == 1 or not self.quantized:
            yield from self._norm(point, None)

    def _norm(self, point: Point, stream: Array | None) -> Iterator[Fault]:
        """Compare a norm whose output is used as it is."""
        ours, theirs = self._norms(point)
        if ours is None or theirs is None or ours.weight is None or theirs.weight is None:
            if (ours is None) != (theirs is None) and not self.quantized:
                yield Fault(point, "", "Missing norm: one graph has a LayerNormalization here, and the other has none.")
            return
        for name in ("weight", "bias"):
            x, y = (self._vector(getattr(one, name), len(ours.weight)) for one in (ours, theirs))
            if stream is not None:
                y = y * stream
            limit = 0.02 if self.quantized else self.tight
            if np.linalg.norm(x - y) > limit * max(float(np.linalg.norm(x)), 1e-6):
                yield Fault(point, theirs.output, self._cause(x, y, f"{name} of the norm"))
                return

    def _norm_settings(self) -> Iterator[Fault]:
        for point, theirs in self.b.structure.norms.items():
            ours = self.a.structure.norms.get(point)
            if ours is not None and not math.isclose(ours.eps, theirs.eps, rel_tol=0.02, abs_tol=1e-9):
                yield Fault(point, theirs.output, f"Wrong epsilon: {theirs.eps:.3g} instead of {ours.eps:.3g}.")
        missing = self.a.structure.norms.keys() - self.b.structure.norms.keys()
        for point in missing:
            yield Fault(point, "", "Missing norm: the graph has no LayerNormalization here.")

    def _attention_inputs(self, at: tuple[int, int], stream: Array | None) -> Iterator[Fault]:
        norm = Point(*at, "norm1") if self.version == 1 else None
        ours, theirs = ({part: self._map(side, Point(*at, f"attention.{part}"), norm, side is self.b, stream)
                         for part in ("query", "key", "value")} for side in (self.a, self.b))  # fmt: skip
        if any(one is None for one in (*ours.values(), *theirs.values())):
            return
        mine = {part: one for part, one in ours.items() if one is not None}
        wrong: dict[str, str] = {}
        change = np.zeros(1)  # of the offset of scaled queries
        scales = [self._total_scale(side, at) for side in (self.a, self.b)]
        rows: dict[str, Array] = {}
        for part in ("query", "key", "value"):
            x, y = ours[part], theirs[part]
            if x is None or y is None or x.matrix.shape != y.matrix.shape:
                continue
            mx, my, cx, cy = x.matrix, y.matrix, x.offset, y.offset
            if self.version == 1 and part == "query":
                mx, my, cx, cy = mx * scales[0], my * scales[1], cx * scales[0], cy * scales[1]
            found = (mx * my).sum(1) / np.maximum((mx * mx).sum(1), 1e-30)
            rows[part] = np.where(np.abs(found) < 1e-6, 1e-6, found)
            if self.version == 2 and part != "value" and self.typed:
                heads = self._heads(at)
                f = np.exp2(np.rint(np.log2(np.maximum(np.median(rows[part].reshape(heads, -1), axis=1), 1e-9))))
                low = 0.0 if self.b.precision != "fp32" else 1.0  # only typed graphs have such factors
                high = np.inf if self.a.precision != "fp32" else 1.0
                legal = np.clip(f, low, high).repeat(len(mx) // heads)
                my, cy = my / legal[:, None], cy / legal
                rows[part] = rows[part] / legal
            if self.quantized and (part == "value" or (self.version == 1 and np.std(np.log(np.abs(rows[part]))) > 0.02)):
                my, cy = my / rows[part][:, None], cy / rows[part]
            if part == "query" and self.version == 1:
                change = cy - cx
            if self._differ(mx, my):
                wrong[part] = self._cause(mx, my, "weight")
                continue
            matters = part == "query" or (part == "key" and self.version == 2)
            correction = self._correction(Point(*at, f"attention.{part}"), norm, mx - my)
            if matters and self._vectors_differ(cx, cy, mx, max(x.rounded, y.rounded), correction):
                held = [bool(self._layer_bias(side, Point(*at, f"attention.{part}")).any()) for side in (self.a, self.b)]
                missing = held == [True, False]
                wrong[part] = f"Missing bias: that of the {part} is 0." if missing else self._cause(cx, cy, "bias")
        if self.quantized and self.version == 1 and len(rows) == 3 and all("weight" not in cause for cause in wrong.values()):
            product = float(np.median(rows["query"] * rows["key"]))
            if product > 0 and abs(product - 1) > 0.03:
                factor = self._value_product(at) / math.sqrt(product)
                if abs(factor - 1) < 0.04:  # all three are scaled
                    cause = f"Scaled: the weight of the norm is {math.sqrt(product):.4g} times that of the other graph."
                    yield Fault(Point(*at, "norm1"), "", cause)
                    return
                expected = self._equalized(ours)
                # Equalization scales the bias of queries with their weights.
                part = "query"
                shown = False  # whether another weight of queries would show in their offset
                for side, one in ((self.a, ours["query"]), (self.b, theirs["query"])):
                    if one is not None:
                        own = np.linalg.norm(self._layer_bias(side, Point(*at, "attention.query"))) * abs(product - 1)
                        size = max(float(np.linalg.norm(one.offset)), 0.3 * float(np.linalg.norm(one.matrix)), one.rounded)
                        shown |= bool(own > 1.2 * ROUNDED * size)
                equalized = abs(float(np.median(rows["query"] / expected)) - 1) < 0.25
                if "query" not in wrong and (shown or equalized):
                    part = "key"
                wrong = {part: f"Scaled: the weight is {product:.4g} times that of the other graph."}
        if not wrong:
            return
        tensor = self.b.structure.linears[Point(*at, "attention.query")].output
        if self.version == 1 and len(wrong) == 3 and self._norm_is_wrong(norm, unknown=True):
            yield Fault(Point(*at, "norm1"), tensor, next(iter(wrong.values())).replace("weight", "weight of the norm"))
            return
        if norm is not None and "bias" in wrong.get("query", "") and (found := self._offsets_of_output(at)) is not None:
            weight, before, after = found
            own = [self._layer_bias(side, Point(*at, "attention.query")) for side in (self.a, self.b)]
            same = not self._vectors_differ(own[0] * scales[0], own[1] * scales[1])
            if same and not self.quantized and self._norm_is_wrong(norm):
                yield Fault(Point(*at, "norm1"), tensor, self._cause_of_norm_bias(norm))
                return
            both = np.concatenate([mine["query"].directions * scales[0], weight @ mine["value"].directions])
            if self._of_norm(both, np.concatenate([change, after - before])):
                yield Fault(Point(*at, "norm1"), tensor, self._cause_of_norm_bias(norm))
                return
        if self.version == 1 and list(wrong) == ["query"] and "Scaled" in wrong["query"] and self._other_scale(at):
            yield Fault(Point(*at, "attention.scale"), tensor, wrong["query"].replace("Scaled: the weight", "Wrong scale: it"))
            return
        for part, cause in wrong.items():
            yield Fault(Point(*at, f"attention.{part}"), tensor, cause)

    def _output(self, at: tuple[int, int]) -> Iterator[Fault]:
        point, value = Point(*at, "attention.output"), Point(*at, "attention.value")
        norm = Point(*at, "norm1") if self.version == 1 else None
        ours, theirs = (side.structure.linears.get(point) for side in (self.a, self.b))
        maps = [self._map(side, value, norm, False, None) for side in (self.a, self.b)]
        if ours is None or theirs is None or maps[0] is None or maps[1] is None or ours.weight.shape != theirs.weight.shape:
            return
        x, y = ours.weight.astype(np.float64), theirs.weight.astype(np.float64)
        _, before, after = self._offsets_of_output(at) or (x, np.zeros(1), np.zeros(1))
        if self.quantized:
            columns = (x * y).sum(0) / np.maximum((x * x).sum(0), 1e-30)
            mx, my = maps[0].matrix, maps[1].matrix
            if self.version == 2:
                stream = self._stream_factors(at[0])
                my = my / stream if stream is not None else my
            rows = (mx * my).sum(1) / np.maximum((mx * mx).sum(1), 1e-30)
            product = float(np.median(columns * rows))
            if abs(product - 1) > 0.04:
                spread = abs(float(np.median(columns)) - 1) <= abs(float(np.median(rows)) - 1)
                cause = f"Scaled: the weight is {product:.4g} times that of the other graph."
                yield Fault(value if spread else point, theirs.output, cause)
                return
            safe = np.where(np.abs(columns) < 1e-6, 1e-6, columns)
            y = y / safe
        if self._differ(x, y):
            yield Fault(point, theirs.output, self._cause(x, y, "weight"))
        elif self._vectors_differ(
            before, after, x, max(maps[0].rounded, maps[1].rounded), lambda: self._correction_of_output(at, y)
        ):
            # A bias of values counts as it was: in its own layer, unless that layer has none.
            own = self._vectors_differ(self._vector(ours.bias, len(x)), self._vector(theirs.bias, len(x)), x)
            cause = self._cause(before, after, "bias")
            biases = [self._layer_bias(side, value) for side in (self.a, self.b)]
            if own and not all(one.any() for one in biases) and theirs.bias is not None and np.any(theirs.bias):
                # One graph has the bias of values in the output projection.
                inner = np.linalg.lstsq(x, after - before, rcond=None)[0]
                own = any(one.any() for one in biases) and not any(self._alike(inner, one) for one in biases)
                own &= self._spread(inner) >= 0.5 * self._spread(after - before)
                if not own and not biases[1].any():
                    cause = "Missing bias: the bias of values is 0."
            yield Fault(point if own else value, theirs.output, cause)

    def _offsets_of_output(self, at: tuple[int, int]) -> tuple[Array, Array, Array] | None:
        """Return the weight of the output projection in `a`, and in both graphs its bias and what that of values adds to it."""
        point, value = Point(*at, "attention.output"), Point(*at, "attention.value")
        norm = Point(*at, "norm1") if self.version == 1 else None
        found = []
        for side in (self.a, self.b):
            layer, one = side.structure.linears.get(point), self._map(side, value, norm, False, None)
            if layer is None or one is None:
                return None
            weight = layer.weight.astype(np.float64)
            found.append((weight, self._vector(layer.bias, len(weight)) + weight @ one.offset))
        return (found[0][0], found[0][1], found[1][1]) if found[0][0].shape == found[1][0].shape else None

    def _layer_bias(self, side: Side, point: Point) -> Array:
        """Return the bias that the layer at `point` itself has."""
        layer = side.structure.linears[point]
        bias = self._vector(layer.bias, len(layer.weight))
        third = len(bias) // 3
        number = ("query", "key", "value").index(point.part.rpartition(".")[2])
        return bias[number * third : (number + 1) * third] if point in side.structure.joined else bias

    @staticmethod
    def _alike(x: Array, y: Array) -> bool:
        """Whether one vector is a multiple of the other."""
        return bool(abs(x @ y) > 0.97 * np.linalg.norm(x) * np.linalg.norm(y) > 0)

    @staticmethod
    def _spread(x: Array) -> float:
        """Return the share of elements that a vector consists of: 1 / n if all but one are 0."""
        return float(np.square(x).sum() ** 2 / max(len(x) * (x**4).sum(), 1e-60))

    def _of_norm(self, matrix: Array, change: Array) -> bool:
        """Whether another bias of a norm explains the change of the offsets of `matrix` [outputs, channels] after it."""
        if len(matrix) < 1.5 * matrix.shape[1]:
            return False
        rest = change - matrix @ np.linalg.lstsq(matrix, change, rcond=None)[0]
        return bool(np.linalg.norm(rest) < 0.4 * np.linalg.norm(change))

    def _cause_of_norm_bias(self, norm: Point) -> str:
        one = self.b.structure.norms.get(norm)
        if one is not None and one.weight is not None and (one.bias is None or not one.bias.any()):
            return "Missing bias: that of the norm is 0."
        return "Wrong bias of the norm."

    def _value_product(self, at: tuple[int, int]) -> float:
        """Return the factor on the product of value and output projection."""
        norm, value = Point(*at, "norm1"), Point(*at, "attention.value")
        maps = [self._map(side, value, norm, False, None) for side in (self.a, self.b)]
        layers = [side.structure.linears[Point(*at, "attention.output")].weight.astype(np.float64) for side in (self.a, self.b)]
        if maps[0] is None or maps[1] is None:
            return 1.0
        (mx, my), (x, y) = (maps[0].matrix, maps[1].matrix), layers
        columns = (x * y).sum(0) / np.maximum((x * x).sum(0), 1e-30)
        rows = (mx * my).sum(1) / np.maximum((mx * mx).sum(1), 1e-30)
        return max(float(np.median(columns * rows)), 1e-9)

    def _mlp(self, at: tuple[int, int], stream: Array | None) -> Iterator[Fault]:
        norm = Point(*at, "norm2") if self.version == 1 else None
        yield from self._after_norm(Point(*at, "mlp.fc1"), norm, stream)
        yield from self._after_norm(Point(*at, "mlp.fc2"), None, None)
        point = Point(*at, "mlp.activation")
        kinds = [activation_kind(s.graph, s.structure, point) for s in (self.a, self.b) if point in s.structure.activations]
        if len(set(kinds)) > 1:
            yield Fault(point, self.b.structure.tensors[point], f"Other activation: {kinds[1]} instead of {kinds[0]}.")

    def _merge(self, stage: int, stream: Array | None) -> Iterator[Fault]:
        norm, reduction = Point(stage, None, "merge.norm"), Point(stage, None, "merge.reduction")
        tiled = None if stream is None else np.tile(stream, 4)
        yield from self._after_norm(reduction, norm if self.version == 1 else None, tiled)
        if self.version == 2 and not self.quantized:
            yield from self._norm(norm, None)

    def _head(self) -> Iterator[Fault]:
        yield from self._after_norm(Point(None, None, "head"), Point(None, None, "norm"), None)

    def _after_norm(self, point: Point, norm: Point | None, stream: Array | None) -> Iterator[Fault]:
        ours, theirs = self._map(self.a, point, norm, False, None), self._map(self.b, point, norm, True, stream)
        if ours is None or theirs is None or ours.matrix.shape != theirs.matrix.shape:
            return
        layer = self.b.structure.linears[point]
        place, cause = None, ""
        if self._differ(ours.matrix, theirs.matrix):
            place, cause = point, self._cause(ours.matrix, theirs.matrix, "weight")
        elif self._vectors_differ(
            ours.offset, theirs.offset, ours.matrix, max(ours.rounded, theirs.rounded),
            self._correction(point, norm, ours.matrix - theirs.matrix),
        ):  # fmt: skip
            place, cause = point, self._cause(ours.offset, theirs.offset, "bias")
        if place is not None and norm is not None:
            if self._norm_is_wrong(norm, point):
                place, cause = norm, cause.replace("weight", "weight of the norm")
            elif self._norm_is_hidden(norm):
                if "bias" in cause and self._of_norm(ours.directions, theirs.offset - ours.offset):
                    place, cause = norm, self._cause_of_norm_bias(norm)
                elif "weight" in cause and self._scales_channels(norm, point, ours, theirs):
                    place, cause = norm, cause.replace("weight", "weight of the norm")
            elif "bias" in cause and theirs.offset.any() and self._norm_is_folded(norm):
                change = theirs.offset - ours.offset
                if not self._alike(change, ours.offset) and self._of_norm(ours.directions, change):
                    place, cause = norm, self._cause_of_norm_bias(norm)
        if place is not None:
            yield Fault(place, layer.output, cause)

    def _scores(self, at: tuple[int, int]) -> Iterator[Fault]:
        """Compare what is added to scores, and V2's factors of heads."""
        sides = (self.a, self.b)
        if self.version == 2:
            x, y = (self._head_scales(side, at) for side in sides)
            if (
                x is not None
                and y is not None
                and x.shape == y.shape
                and np.abs(x / y - 1).max() > min(max(self.factor, 2e-3), 1e-2)
            ):
                node = self.b.structure.attentions[at].scales
                yield Fault(Point(*at, "attention.scale"), node[0][0].output[0] if node else "", self._cause(x, y, "scale"))
        ours, theirs = (self._added(side, at) for side in sides)
        if ours is None or theirs is None or ours.shape[1:] != theirs.shape[1:]:
            return
        tensor = self.b.structure.attentions[at].softmax.input[0]
        count = max(len(ours), len(theirs))
        ours, theirs = (np.broadcast_to(one, (count, *one.shape[1:])) for one in (ours, theirs))
        largest = [one.max(axis=0) for one in (ours, theirs)]
        # A pair of tokens that only the mask of one graph excludes in every window.
        hidden = (np.abs(largest[0] - largest[1]) > -MASKED) & (count > 1)
        parts = []
        for one, bias in zip((ours, theirs), largest, strict=True):
            bias = np.where(hidden, np.maximum(*largest), bias)
            parts.append((bias, np.maximum(one - bias, 2 * MASKED)))
        off = np.abs(parts[0][1] - parts[1][1]) > 1.0
        precisions = {self.a.precision, self.b.precision}
        limit = 3e-4 if precisions == {"fp32"} else 1.6e-2 if "bf16" in precisions else 4e-3
        centered = [bias - bias.mean(-1, keepdims=True) for bias, _ in parts]
        size = max(1.0, float(np.abs(centered[0]).max()))
        beyond = np.abs(centered[0] - centered[1]) > limit * size
        if off.any():
            window, _, query, key = np.argwhere(off)[0]
            yield Fault(
                Point(*at, "attention.mask"), tensor,
                f"Wrong mask: {int(off.any(axis=1).sum())} elements differ, first: window {window}, query {query}, key {key}.",
            )  # fmt: skip
        elif beyond.any():
            _, query, key = np.argwhere(beyond)[0]
            yield Fault(
                Point(*at, "attention.bias"), tensor,
                f"Wrong bias row: {int(beyond.any(axis=(0, 2)).sum())} queries differ, first: query {query}, key {key}.",
            )  # fmt: skip

    # -- parameters --------------------------------------------------------------------------------------------------------

    def _norms(self, point: Point) -> tuple[NormPart | None, NormPart | None]:
        return self.a.structure.norms.get(point), self.b.structure.norms.get(point)

    def _map(self, side: Side, point: Point, norm: Point | None, streamed: bool, stream: Array | None) -> LinearMap | None:
        """Return the linear map at `point` of the normalized tokens before it, or of the tokens if `norm` is None."""
        structure = side.structure
        layer = structure.linears.get(point)
        if layer is None:
            return None
        weight, bias = layer.weight.astype(np.float64), self._vector(layer.bias, len(layer.weight))
        if point in structure.joined:
            third = len(weight) // 3
            number = ("query", "key", "value").index(point.part.rpartition(".")[2])
            weight, bias = weight[number * third : (number + 1) * third], bias[number * third : (number + 1) * third]
        bias = bias + self._late_bias(side, point, len(weight))
        if streamed and stream is not None:
            weight = weight / stream
        found = structure.norms.get(norm) if norm is not None else None
        if norm is None:
            return LinearMap(weight, bias)
        if found is not None and found.weight is not None:
            shift = self._vector(found.bias, weight.shape[1])
            offset, rounded = weight @ shift + bias, float(np.linalg.norm(weight * shift))
            weight = weight * found.weight
        else:
            offset, rounded = bias, 0.0
            weight = weight / self._shrunk(side, layer)
        means = weight.mean(1, keepdims=True)
        return LinearMap(weight - means, offset, rounded, means)

    def _late_bias(self, side: Side, point: Point, count: int) -> Array:
        """Return the bias that is added to queries or keys after the split into heads."""
        total = np.zeros(count)
        if point.block is None or point.part not in ("attention.query", "attention.key"):
            return total
        attention = side.structure.attentions[point.stage or 0, point.block]
        name = attention.query if point.part.endswith("query") else attention.key
        stop = side.structure.linears[point].node.output[0]
        for node in side.graph.ancestors(name, {stop}):
            for constant in node.input if node.op_type == "Add" else ():
                late = node.output[0] != side.structure.linears[point].output
                if late and side.graph.is_constant(constant) and side.graph.constant(constant).size == count:
                    total = total + side.graph.constant(constant).astype(np.float64).reshape(-1)
        return total

    def _shrunk(self, side: Side, layer: LinearPart) -> float:
        """Return the factor on the deviation by which the matmul of a layer is divided, if a norm's division is after it."""
        readers = side.graph.readers.get(layer.node.output[0], [])
        while len(readers) == 1 and readers[0].op_type == "Cast":
            readers = side.graph.readers.get(readers[0].output[0], [])
        if len(readers) != 1 or readers[0].op_type != "Div":
            return 1.0
        node = side.graph.writer.get(readers[0].input[1])
        while node is not None and node.op_type == "Cast":
            node = side.graph.writer.get(node.input[0])
        if node is None or node.op_type != "Mul":
            return 1.0
        factors = [side.graph.constant(name) for name in node.input if side.graph.is_constant(name)]
        return float(factors[0].ravel()[0]) if factors else 1.0

    def _stream_factors(self, stage: int) -> Array | None:
        """Return what each channel of the tokens of a stage is divided by in `b`: channel equalization of V2."""
        points = [Point(stage, block, part) for block in range(self.b.structure.depths[stage]) for part in ("norm1", "norm2")]
        points.append(Point(None, None, "patch_embed") if stage == 0 else Point(stage - 1, None, "merge.norm"))
        ratios = []
        for point in points:
            ours, theirs = self._norms(point)
            if ours is None or theirs is None or ours.weight is None or theirs.weight is None:
                continue
            x = ours.weight.astype(np.float64)
            y = theirs.weight.astype(np.float64)
            ratios.append(x / np.where(np.abs(y) < 1e-12, 1e-12, y))
        return np.median(ratios, axis=0) if ratios else None

    def _norm_is_folded(self, norm: Point) -> bool:
        """Whether the layer after the norm contains its bias in `b`, and not in `a`."""
        ours, theirs = (one is None or one.bias is None or not one.bias.any() for one in self._norms(norm))
        return theirs and not ours

    def _norm_is_hidden(self, norm: Point) -> bool:
        """Whether the weights after the norm contain those of the norm in `a`, and not in `b`, whose fault is named."""
        ours, theirs = (one is None or one.weight is None or bool((one.weight == 1).all()) for one in self._norms(norm))
        return ours and not theirs

    def _scales_channels(self, norm: Point, reader: Point, ours: LinearMap, theirs: LinearMap) -> bool:
        """Whether another weight of the norm explains the difference of two maps, and another weight of the layer does not."""
        x, y = ours.matrix, theirs.matrix
        factors = (x * y).sum(0) / np.maximum((x * x).sum(0), 1e-30)
        if np.linalg.norm(y - x * factors) > 0.2 * np.linalg.norm(y - x):
            return False
        for side in (self.a, self.b):
            one, layer = side.structure.norms.get(norm), side.structure.linears[reader]
            if one is not None and one.weight is not None and one.bias is not None and one.bias.any():
                mean = float(np.median(factors))
                added = layer.weight.astype(np.float64) @ one.bias.astype(np.float64)
                added = added * (mean - 1 if side is self.a else 1 - 1 / mean)
                change = theirs.offset - ours.offset
                return bool(np.linalg.norm(change) < np.linalg.norm(change - added))
        return bool(np.std(factors) > 0.05)

    def _norm_is_wrong(self, norm: Point | None, reader: Point | None = None, unknown: bool = False) -> bool:
        """Whether the norm's own parameters differ and the weights that read it do not, or cannot be distinguished.

        `unknown` is returned if the weights after the norm contain its weight.
        """
        if norm is None:
            return False
        ours, theirs = self._norms(norm)
        if ours is None or theirs is None:
            return ours is not theirs
        if ours.weight is None or theirs.weight is None:
            return unknown
        same = all(
            np.linalg.norm(self._vector(getattr(ours, name), len(ours.weight)) -
                           self._vector(getattr(theirs, name), len(ours.weight)))
            <= self.tight * max(float(np.linalg.norm(self._vector(getattr(ours, name), len(ours.weight)))), 1e-6)
            for name in ("weight", "bias")
        )  # fmt: skip
        if same:
            return False
        if reader is None:
            return True
        x, y = (side.structure.linears[reader].weight.astype(np.float64) for side in (self.a, self.b))
        return x.shape == y.shape and not self._differ(x, y)

    def _added(self, side: Side, at: tuple[int, int]) -> Array | None:
        """Return all that is added to the scores of one image [windows or 1, heads or 1, tokens, tokens], tokens in order."""
        attention = side.structure.attentions[at]
        ids = side.graph.tokens.get(attention.query)
        if ids is None or not attention.added:
            return None
        shape = (*ids.shape, ids.shape[-1])
        total = np.zeros((1,) * len(shape), np.float32)
        for node, name in attention.added:
            values = side.graph.constant(name).astype(np.float32)
            if node.input and values.ndim > len(shape):
                lead = math.prod(values.shape[:-3])
                if lead == math.prod(shape[:-3]):
                    values = values.reshape(*shape[:-3], *values.shape[-3:])
                else:
                    return self._reshaped(attention, side, ids)
            total = total + values
        try:
            full = np.broadcast_to(total, shape)
        except ValueError:
            return self._reshaped(attention, side, ids)
        found = by_window(ids, full, both=True, alike=True)
        return None if found is None else found[: len(found) // max(1, next(iter(side.feeds.values())).shape[0])]

    def _reshaped(self, attention: Any, side: Side, ids: Array) -> Array | None:
        """Same as `_added`, if scores have another number of axes while constants are added."""
        lead = math.prod(ids.shape[:-1])
        tokens = ids.shape[-1]
        total = np.zeros((lead, tokens, tokens), np.float32)
        images = next(iter(side.feeds.values())).shape[0]
        heads = lead // len(np.unique(ids.reshape(lead, tokens).max(axis=1)))
        windows = lead // heads // images
        for _, name in attention.added:
            values = side.graph.constant(name).astype(np.float32)
            masks = values.min(initial=0) <= MASKED if values.ndim < 4 else values.shape[-3] == 1
            values = values.reshape(-1, tokens, tokens)
            if len(values) == heads and not (masks and heads == windows):
                values = np.tile(values, (lead // heads, 1, 1))
            elif len(values) == windows:
                values = np.tile(values.repeat(heads, axis=0), (images, 1, 1))
            elif len(values) == windows * heads:
                values = np.tile(values, (images, 1, 1))
            elif len(values) != 1 and len(values) != lead:
                return None
            total += values
        found = by_window(ids.reshape(lead, tokens), total, both=True, alike=True)
        return None if found is None else found[: len(found) // images]

    def _head_scales(self, side: Side, at: tuple[int, int]) -> Array | None:
        """Return V2's factor of each head."""
        heads, total = self._heads(at), np.ones(1)
        for _, factor, where in side.structure.attentions[at].scales:
            values = factor.reshape(-1)
            if where != "scores" and values.size != heads and np.allclose(values, values.size**-0.5):
                continue  # of an RMS norm, which divides by the L2 norm otherwise
            if values.size > heads and values.size % heads == 0 and np.allclose(values, values[0]):
                values = values[:1]
            if values.size not in (1, heads) and values.size % heads == 0:
                values = values[:heads]
            if values.size not in (1, heads):
                return None
            total = total * values
        return np.broadcast_to(total, (heads,))

    def _total_scale(self, side: Side, at: tuple[int, int]) -> float:
        scales = [factor.reshape(-1)[0] for _, factor, _ in side.structure.attentions[at].scales]
        return float(np.prod(scales)) if scales else 1.0

    def _other_scale(self, at: tuple[int, int]) -> bool:
        """Whether a graph scales scores with another factor than V1 does."""
        expected = (len(self.b.structure.linears[Point(*at, "attention.output")].weight) // self._heads(at)) ** -0.5
        found = [self._total_scale(side, at) for side in (self.a, self.b) if side.structure.attentions[at].scales]
        return any(abs(one / expected - 1) > 1e-3 for one in found)

    def _heads(self, at: tuple[int, int]) -> int:
        attention = self.b.structure.attentions[at]
        ids = self.b.graph.tokens[attention.query]
        keys = ids.reshape(-1, ids.shape[-1]).max(axis=1)
        return int(len(keys) // len(np.unique(keys)))

    def _equalized(self, maps: Any) -> Array | None:
        """Return the factor that equalization gives each row of the query."""
        rows = [np.abs(maps[part].matrix).max(axis=1) for part in ("query", "key")]
        return np.asarray(np.clip(np.sqrt(rows[1] / np.maximum(rows[0], 1e-12)), 1 / 64, 64))

    def _correction(self, point: Point, norm: Point | None, lost: Array) -> Callable[[], Array]:
        """Return a function that returns what a layer loses on average, if its weights are smaller by `lost`."""
        return lambda: lost @ self._mean_input(point, norm)

    def _correction_of_output(self, at: tuple[int, int], weight: Array) -> Array:
        """Return the same for the output projection, whose quantized weight is `weight`, and the values before it."""
        point, value = Point(*at, "attention.output"), Point(*at, "attention.value")
        norm = Point(*at, "norm1") if self.version == 1 else None
        stream = self._stream_factors(at[0]) if self.version == 2 else None
        maps = [self._map(side, value, norm, side is self.b, stream) for side in (self.a, self.b)]
        right = self.a.structure.linears[point].weight.astype(np.float64)
        if maps[0] is None or maps[1] is None:
            return np.zeros(len(right))
        mx, my = maps[0].matrix, maps[1].matrix
        rows = (mx * my).sum(1) / np.maximum((mx * mx).sum(1), 1e-30)
        lost = mx - my / np.where(np.abs(rows) < 1e-6, 1e-6, rows)[:, None]
        mixed = (right - weight) @ (self._mean_input(point, None) - maps[0].offset)
        return np.asarray(mixed + right @ (lost @ self._mean_input(value, norm)))

    def _mean_input(self, point: Point, norm: Point | None) -> Array:
        """Return the mean of what the layer at `point` reads in `a`: of normalized tokens if `norm` is given."""
        found = None if norm is None else self.a.structure.norms.get(norm)
        if found is None:
            values = self._inputs[self.a.structure.linears[point].input].astype(np.float64)
        else:
            values = self._inputs[found.input].astype(np.float64)
            values = values - values.mean(-1, keepdims=True)
            values = values / np.sqrt(np.square(values).mean(-1, keepdims=True) + found.eps)
        return np.asarray(values.reshape(-1, values.shape[-1]).mean(axis=0))

    @cached_property
    def _inputs(self) -> dict[str, Array]:
        """The inputs of linear layers and norms in `a`."""
        structure = self.a.structure
        names = [one.input for one in structure.linears.values()] + [one.input for one in structure.norms.values()]
        return run_with_outputs(self.a.model, self.a.feeds, names)

    # -- distances ---------------------------------------------------------------------------------------------------------

    def _differ(self, x: Array, y: Array) -> bool:
        """Whether two matrices differ by more than the types explain, as a whole, in scale or in one row."""
        if not np.isfinite(y).all():
            return True
        if not x.any():
            return bool(y.any())
        size = max(float(np.linalg.norm(x)), 1e-30)
        if np.linalg.norm(x - y) > self.tight * size:
            return True
        return abs(float((x * y).sum()) / size**2 - 1) > self.factor

    def _vectors_differ(
        self,
        x: Array,
        y: Array,
        matrix: Array | None = None,
        rounded: float = 0.0,
        correction: Callable[[], Array] | None = None,
    ) -> bool:
        """Whether two biases differ, relative to them and to what their layer adds to them.

        Biases are not quantized, but quantized weights change what is summed into them: products with the L2 norm `rounded`.
        `correction` returns by how much a bias changes so that quantized weights keep the mean of the results.
        """
        size = float(np.linalg.norm(x))
        if self.quantized and matrix is not None:
            size = max(size, 0.3 * float(np.linalg.norm(matrix)), rounded)
            if np.linalg.norm(x - y) <= ROUNDED * size:
                return False
            if correction is None:
                return True
            expected = correction()
            limit = max(ROUNDED * size, OTHER_IMAGES * float(np.linalg.norm(expected)))
            return bool(np.linalg.norm(x - y + expected) > limit)
        if matrix is not None:
            size = max(size, float(np.linalg.norm(matrix)) * (1.0 if self.typed else 0.02))
        return bool(np.linalg.norm(x - y) > max(self.tight, 1e-4) * max(size, 1e-6))

    def _cause(self, x: Array, y: Array, what: str) -> str:
        if not np.isfinite(y).all():
            return f"Overflow: the {what} holds values that are not finite."
        if x.ndim == 2 and x.shape[0] == x.shape[1] and np.linalg.norm(x.T - y) < 0.5 * np.linalg.norm(x - y):
            return "Transposed weight."
        if not y.any():
            return f"Missing {what}: it is 0."
        if not x.any():
            return f"Wrong {what}: the other graph has none."
        factor = float((x * y).sum() / max(float((x * x).sum()), 1e-300))
        close = min(max(2 * self.tight, 0.02), ROUNDED if what == "bias" else 1.0)
        if np.linalg.norm(y - factor * x) <= close * np.linalg.norm(y) and abs(factor - 1) > 1e-5:
            word = "Wrong scale: it" if what == "scale" else f"Scaled: the {what}"
            return f"{word} is {factor:.4g} times that of the other graph."
        relative = np.linalg.norm(x - y) / max(float(np.linalg.norm(x)), 1e-30)
        return f"Wrong {what}: it differs by {relative:.2g} (relative L2)."

    @staticmethod
    def _vector(values: Array | None, count: int) -> Array:
        return np.zeros(count) if values is None else values.astype(np.float64).reshape(-1)


def parameter_faults(a: Side, b: Side) -> Iterator[Fault]:
    """Yield the parameters of `b` that compute something else than those of `a`."""
    yield from ParameterComparison(a, b).faults()
