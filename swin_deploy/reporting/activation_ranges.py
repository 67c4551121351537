"""The ranges of the activations that an INT8 or FP8 graph quantizes, and how the values on images fill them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from swin_deploy.dependencies import onnxruntime_session, require
from swin_deploy.errors import BackendError, sentence
from swin_deploy.parity import decibels

if TYPE_CHECKING:
    import onnx

    from swin_deploy.bundle import Bundle
    from swin_deploy.calib.data import Samples
    from swin_deploy.options import Array, Progress

INSIDE, OUTSIDE = 64, 8  # bins of a histogram in the range, and on either side of it
LIMITS = {"INT8": (-128, 127), "UINT8": (0, 255), "FLOAT8E4M3FN": (-448, 448)}  # quantized values
EPILOGUE = ("Cast", "Sub", "Add", "Clip")  # between a tensor and its quantized values, see TensorRTWriter.in_epilogue
IMAGES, TENSORS = 4, 32  # that histograms are made of, and that are in memory at a time


@dataclass(frozen=True)
class QuantizedActivation:
    """A tensor that a graph quantizes: quantized = source / scale + zero point, limited to the values of the type `kind`."""

    layer: str
    source: str
    kind: str
    scale: float
    zero_point: float

    @property
    def low(self) -> float:
        """The smallest value that is represented."""
        return (LIMITS[self.kind][0] - self.zero_point) * self.scale

    @property
    def high(self) -> float:
        """The largest value that is represented."""
        return (LIMITS[self.kind][1] - self.zero_point) * self.scale


def quantized_activations(model: onnx.ModelProto, folder: Path) -> tuple[QuantizedActivation, ...]:
    """List the activations that a graph quantizes, in the order of the network, each once. `folder` has its weights."""
    import onnx

    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    writers = {name: node for node in model.graph.node for name in node.output}
    readers: dict[str, list[Any]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)

    def value(name: str) -> Array:
        return np.asarray(onnx.numpy_helper.to_array(constants[name], base_dir=str(folder)))

    found: dict[str, QuantizedActivation] = {}
    for node in model.graph.node:
        if node.op_type != "DequantizeLinear" or node.input[0] in constants or len(node.input) < 3:
            continue
        kind = onnx.TensorProto.DataType.Name(constants[node.input[2]].data_type) if node.input[2] in constants else ""
        if kind not in LIMITS or node.input[1] not in constants or value(node.input[1]).size != 1:
            continue
        writer = writers.get(node.input[0])
        while writer is not None and writer.op_type in EPILOGUE:
            writer = writers.get(writer.input[0])
        if writer is None or writer.op_type not in ("QuantizeLinear", "Mul"):
            continue
        zeros = (writer if writer.op_type == "QuantizeLinear" else node).input[2]  # DQ has none if the bias contains it
        scale, zero = (float(np.asarray(value(name), np.float64).reshape(-1)[0]) for name in (node.input[1], zeros))
        if not (math.isfinite(scale) and scale > 0):
            continue
        layer = _layer_name(writer.input[0], node, readers)
        found.setdefault(node.output[0], QuantizedActivation(layer, writer.input[0], kind, scale, zero))
    return tuple(found.values())


def _layer_name(source: str, node: Any, readers: Mapping[str, list[Any]]) -> str:
    """Return the module that reads a dequantized activation; for the output of a matmul, the module that writes it."""
    module, matmul, _ = source.partition("/Gemm_matmul")
    if matmul:
        return f"{module} output"
    names = [reader.name.rpartition("/")[0] for reader in readers.get(node.output[0], ())]
    name = next(filter(None, names), "") or node.name.rpartition("/")[0] or node.output[0]
    return name.removesuffix(".q") if name.endswith(".qkv.q") else name  # the three parts of a projection read the same


def ranges_of_graph(bundle: Bundle, file: str, samples: Samples | None, progress: Progress) -> list[dict[str, Any]]:
    """Return the range of every quantized activation of a graph and, with samples, the histogram of its values on them."""
    onnx = require("onnx", "read the ranges of the graph")
    path = bundle.verified_path(file)
    model = onnx.load(str(path), load_external_data=False)
    activations = quantized_activations(model, path.parent)
    rows = [
        {
            "layer": one.layer, "tensor": one.source, "type": one.kind.lower(), "scale": one.scale,
            "zero_point": one.zero_point, "low": one.low, "high": one.high,
        }
        for one in activations
    ]  # fmt: skip
    other_size = samples is not None and bundle.graphs[file].image_size != samples.image_size
    if samples is None or not rows or (other_size and samples.ready):  # prepared samples have one size
        return rows
    histograms = [_Histogram(one) for one in activations]
    total = min(IMAGES, len(samples))
    for done, (feeds, run) in enumerate(_runs(bundle, path, activations, samples), start=1):
        for start in range(0, len(histograms), TENSORS):
            part = histograms[start : start + TENSORS]
            for histogram, values in zip(part, run([one.activation.source for one in part], feeds), strict=True):
                histogram.add(values)
        progress("Measuring ranges", done, total)
    for row, histogram in zip(rows, histograms, strict=True):
        row["observed"] = histogram.to_dict()
    return rows


def _runs(
    bundle: Bundle, path: Path, activations: Iterable[QuantizedActivation], samples: Samples
) -> Iterator[tuple[Mapping[str, Array], Callable[[list[str], Mapping[str, Array]], list[Array]]]]:
    """Yield the inputs for each of the first images, and a function that returns the values of tensors as float32."""
    from swin_deploy.bundle import load_graph
    from swin_deploy.calib.data import preparation_and_inputs
    from swin_deploy.dependencies import EXACT_QDQ
    from swin_deploy.runtimes.emulate import emulated

    onnx = require("onnx", "read the ranges of the graph")

    def session(model: Any) -> Any:
        for name in dict.fromkeys(one.source for one in activations):
            model.graph.node.append(onnx.helper.make_node("Cast", [name], [f"{name}/observed"], to=onnx.TensorProto.FLOAT))
            model.graph.output.append(onnx.ValueInfoProto(name=f"{name}/observed"))
        # ONNX Runtime 1.31 moves Transposes of INT8 graphs of Swin V2 otherwise, and rejects the result.
        off = require("onnxruntime", "run a graph").GraphOptimizationLevel.ORT_DISABLE_ALL
        options = {"config": EXACT_QDQ, "graph_optimization_level": off, "enable_cpu_mem_arena": False}
        return onnxruntime_session(model.SerializeToString(), **options)

    model = load_graph(path)
    try:
        opened = session(model)
    except Exception as error:
        if "NOT_IMPLEMENTED" not in str(error):
            raise BackendError(f"ONNX Runtime cannot load {path} to read its ranges: {sentence(str(error))}.") from error
        opened = session(emulated(load_graph(path)))
    file = path.relative_to(bundle.path).as_posix()
    shown, batch = samples.with_size(*preparation_and_inputs(bundle, file)), bundle.static_batch or 1

    def run(names: list[str], feeds: Mapping[str, Array]) -> list[Array]:
        repeated = {name: np.repeat(array[:1], batch, axis=0) for name, array in feeds.items()}
        return list(opened.run([f"{name}/observed" for name in names], repeated))

    for feeds in islice(shown.batches(1), IMAGES):
        yield feeds, run


class _Histogram:
    """Counts the values of an activation, in bins of the same number of quantized values."""

    def __init__(self, activation: QuantizedActivation) -> None:
        self.activation = activation
        low, high = LIMITS[activation.kind]
        self._whole = activation.kind != "FLOAT8E4M3FN"
        self._width = (high - low + self._whole) / INSIDE
        self._first, self._limits = low - OUTSIDE * self._width, (low, high)
        self._counts = np.zeros(INSIDE + 2 * OUTSIDE, np.int64)
        self._low, self._high, self._clipped, self._signal, self._noise = math.inf, -math.inf, 0, 0.0, 0.0

    def add(self, values: Array) -> None:
        one, values = self.activation, values.reshape(-1)
        if not np.isfinite(values).all():
            values = values[np.isfinite(values)]
        if not values.size:
            return
        self._low, self._high = min(self._low, float(values.min())), max(self._high, float(values.max()))
        quantized = values * np.float32(1 / one.scale) + np.float32(one.zero_point)
        place = np.clip((quantized - np.float32(self._first)) * np.float32(1 / self._width), 0, len(self._counts) - 1)
        self._counts += np.bincount(place.astype(np.intp), minlength=len(self._counts))
        low, high = self._limits
        half = 0.5 if self._whole else 0.0
        self._clipped += int(((quantized < low - half) | (quantized > high + half)).sum())
        quantized -= np.clip(np.rint(quantized) if self._whole else quantized, low, high)
        self._signal += float(np.vdot(values, values))
        self._noise += float(np.vdot(quantized, quantized)) * one.scale**2

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as JSON values; `sqnr_db` is None without rounding error, and of FP8, whose steps differ."""
        known, values = math.isfinite(self._low), int(self._counts.sum())
        exact = self._whole and self._noise > 0 and self._signal > 0
        return {
            "low": self._low if known else None,
            "high": self._high if known else None,
            "values": values,
            "clipped": self._clipped / values if values else 0.0,
            "sqnr_db": decibels(self._signal, self._noise) if exact else None,
            "first": self._first,
            "width": self._width,
            "counts": self._counts.tolist(),
        }
