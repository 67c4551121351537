"""The two networks that are compared: what a text or a path names, its graph, its images and its intermediate tensors."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from swin_deploy.dependencies import EXACT_QDQ, require
from swin_deploy.errors import CheckpointError, UsageError, shown, unknown
from swin_deploy.files import scratch_folder
from swin_deploy.options import BACKEND_NAMES, COMPILERS, PRECISIONS, Array

from .folded_graph import FoldedGraph, run_with_outputs
from .swin_structure import Structure, structure_of

if TYPE_CHECKING:
    import onnx

    from swin_deploy.bundle import Bundle
    from swin_deploy.manifest import GraphEntry

READABLE = ("onnxruntime", "openvino", *COMPILERS)  # back ends that return the tensors inside a graph
UNREADABLE = 8  # tensors that a back end may fail to return
LIMIT = 2  # images that are compared unless --samples says more


@dataclass
class Side:
    """A network: `model` is its graph, `backend` runs it. `preprocessing` is None if nothing states it."""

    name: str
    model: onnx.ModelProto
    precision: str
    backend: str
    preprocessing: Any = None
    bundle: Bundle | None = None
    entry: GraphEntry | None = None
    feeds: dict[str, Array] = field(default_factory=dict)

    @property
    def input(self) -> Any:
        """The input that takes images."""
        constants = {tensor.name for tensor in self.model.graph.initializer}
        return next(value for value in self.model.graph.input if value.name not in constants)

    @cached_property
    def graph(self) -> FoldedGraph:
        return FoldedGraph(self.model, self.feeds)

    @cached_property
    def structure(self) -> Structure:
        return structure_of(self.graph)

    def shape(self) -> list[int]:
        """Return the shape of the images; 0 for a free axis."""
        return [axis.dim_value for axis in self.input.type.tensor_type.shape.dim]

    def run(self, names: list[str]) -> dict[str, Array]:
        """Return the tensors `names` for the images, without those that the back end cannot return."""
        from swin_deploy.errors import BackendError

        wanted = list(dict.fromkeys(names))
        while True:
            try:
                return self._run(wanted)
            except BackendError as error:  # OpenVINO cannot return some tensors, and says which
                number = re.search(r"output tensor with index: (\d+)", str(error))
                if number is None or int(number[1]) >= len(wanted) or len(wanted) < len(set(names)) - UNREADABLE:
                    raise
                del wanted[int(number[1])]

    def _run(self, names: list[str]) -> dict[str, Array]:
        if self.backend == "onnxruntime":
            return run_with_outputs(self._exact, self.feeds, names, config=EXACT_QDQ)
        from swin_deploy.runtimes.backends import runtime_from_onnx

        onnx = require("onnx", "compare graphs")
        copy = onnx.ModelProto()
        copy.CopyFrom(self.model)
        del copy.graph.output[:]
        wanted = list(dict.fromkeys(names))
        for value in copy.graph.input:
            if value.name in self.feeds:
                for axis, side in zip(value.type.tensor_type.shape.dim, self.feeds[value.name].shape, strict=True):
                    axis.dim_value = side
        types = {one.name: one for one in (*onnx.shape_inference.infer_shapes(copy).graph.value_info, *self.model.graph.output)}
        for name in wanted:
            kind = types[name].type.tensor_type.elem_type if name in types else onnx.TensorProto.FLOAT
            dims = types[name].type.tensor_type.shape.dim if name in types else ()
            shape = [axis.dim_value or "batch" for axis in dims] or None
            copy.graph.output.append(onnx.helper.make_tensor_value_info(name, kind, shape))
        with scratch_folder("diff") as folder:
            path = folder / "marked.onnx"
            onnx.save(copy, str(path), save_as_external_data=True, location="marked.onnx_data")
            with runtime_from_onnx(path, self.backend) as runtime:
                return {name: np.array(array) for name, array in runtime.run(self.feeds).items()}

    @cached_property
    def _exact(self) -> onnx.ModelProto:
        """The graph with every node rounded to its type, as on a device that has kernels for all types."""
        kinds = {tensor.data_type for tensor in self.model.graph.initializer}
        types = require("onnx", "compare graphs").TensorProto
        if not kinds & {types.FLOAT16, types.BFLOAT16}:
            return self.model
        from swin_deploy.runtimes.emulate import emulated

        return emulated(self.model)


def side_from(value: Any) -> Side:
    """Open what `value` names: BUNDLE[:PRECISION][@BACKEND], FILE.onnx[@BACKEND], or a checkpoint.

    Raises:
        UsageError: There is no such file, or the text is invalid.
    """
    text = os.fspath(value)
    place, backend, precision = text, "onnxruntime", ""
    if not Path(place).exists() and "@" in place:
        place, _, backend = place.rpartition("@")
        if backend not in BACKEND_NAMES:
            raise unknown("back end", backend, READABLE)
        if backend not in READABLE:
            raise UsageError(f"The tensors inside a network cannot be read in {backend}. Choose one of: {', '.join(READABLE)}.")
    if not Path(place).exists() and ":" in place:
        place, _, precision = place.rpartition(":")
        if precision not in PRECISIONS:
            raise unknown("precision", precision, PRECISIONS)
    path = Path(place)
    if not path.exists():
        raise UsageError(f"There is no {place}. Expected a bundle, an ONNX file, or a checkpoint, to compare.")
    if path.is_dir() and (path / "manifest.json").exists():
        if backend in COMPILERS:
            from .engine_side import side_of_engine

            return side_of_engine(text, path, precision or "fp32", backend)
        return _from_bundle(text, path, precision or "fp32", backend)
    if backend in COMPILERS:
        raise UsageError(f"{place} is not a bundle, and {backend} runs the engines of a bundle. Leave out @{backend}.")
    if precision:
        raise UsageError(f"{place} is not a bundle, and only a bundle has several precisions. Leave out :{precision}.")
    if path.suffix == ".onnx":
        return _from_onnx(text, path, backend)
    return _from_checkpoint(text, path, backend)


def _from_bundle(text: str, path: Path, precision: str, backend: str) -> Side:
    from swin_deploy.bundle import Bundle, load_graph
    from swin_deploy.runtimes.backends import misread

    bundle = Bundle.open(path)
    files = bundle.graphs_of(precision)
    if not files:
        held = dict.fromkeys(entry.precision for entry in bundle.graphs.values())
        raise UsageError(f"The bundle {path} has no {precision} graph. Choose one of: {', '.join(held)}.")
    file = next(iter(files))
    if (why := misread(bundle, file, backend)) is not None:
        raise UsageError(why)
    entry = bundle.graphs[file]
    preparation = entry.preprocessing
    stated = bundle.preprocessor if preparation is None else preparation
    return Side(text, load_graph(bundle.verified_path(file)), precision, backend, stated, bundle, entry)


def _from_onnx(text: str, path: Path, backend: str) -> Side:
    from swin_deploy.bundle import load_graph

    onnx = require("onnx", "compare graphs")
    try:
        model = load_graph(path)
    except Exception as error:
        raise UsageError(f"{path} is not an ONNX graph ({type(error).__name__}). Expected an .onnx file.") from error
    if not model.graph.node or not model.graph.input:
        raise UsageError(f"{path} is not an ONNX graph: it has no nodes. Expected an .onnx file.")
    sparse = [tensor.values for tensor in model.graph.sparse_initializer]
    known = {value.name for value in (*model.graph.input, *model.graph.initializer, *sparse)} | {""}
    for node in model.graph.node:
        if lacking := set(node.input) - known:
            reads = f"the node {shown(node.name)} reads {shown(min(lacking))}, which no node before it writes"
            raise UsageError(f"{path} is damaged: {reads}. Export it again.")
        known |= set(node.output)
    types = onnx.TensorProto
    kinds = {tensor.data_type for tensor in model.graph.initializer}
    quantized = {node.op_type for node in model.graph.node} & {"QuantizeLinear", "DequantizeLinear"}
    precision = "fp16" if types.FLOAT16 in kinds else "bf16" if types.BFLOAT16 in kinds else "fp32"
    if quantized:
        precision = "fp8" if types.FLOAT8E4M3FN in kinds else "int8"
    return Side(text, model, precision, backend)


def _from_checkpoint(text: str, path: Path, backend: str) -> Side:
    """Record the network of a checkpoint as a graph; `export` does the same and compares it with PyTorch."""
    from swin_deploy.exporters.checkpoint_from_request import checkpoint_from_request, natural_size, preprocessing_of
    from swin_deploy.exporters.external_data import embed_weights
    from swin_deploy.exporters.onnx_from_torch import onnx_from_torch
    from swin_deploy.models.swin import SwinNetwork
    from swin_deploy.options import ExportSpec

    failed = None
    for task in (None, "masked-image-modeling", "feature-extraction", "backbone"):  # the first one that it has weights for
        spec = ExportSpec(weights=path, task=task)
        try:
            checkpoint = checkpoint_from_request(spec)
            break
        except CheckpointError as error:
            failed = failed or error
    else:
        raise failed or AssertionError
    preprocessor = preprocessing_of(checkpoint, spec).preprocessor
    size = checkpoint.image_size or natural_size(preprocessor, checkpoint.config)
    network = SwinNetwork(checkpoint.config, size, checkpoint.tensors, checkpoint.task, "tensorrt").eval()
    traced = onnx_from_torch(network, size, None)
    embed_weights(traced.model, traced.weights)
    return Side(text, traced.model, "fp32", backend, preprocessor)


def give_images(sides: tuple[Side, Side], data: Any, samples: int | None) -> None:
    """Give both networks the same images: those of `data`, those of a bundle's reference, or noise.

    Raises:
        UsageError: The networks take images of different sizes.
    """
    shapes = [side.shape() for side in sides]
    if any(len(shape) != 4 for shape in shapes):
        raise UsageError("One of the graphs does not take images. Expected an input [batch, channels, height, width].")
    kinds = [side.input.type.tensor_type.elem_type for side in sides]
    uint8 = require("onnx", "compare graphs").TensorProto.UINT8
    if kinds.count(uint8) == 1:
        frames = sides[kinds.index(uint8)]
        raise UsageError(
            f"{frames.name} has its preprocessing inside, and the other graph has not. Compare two of the same kind."
        )
    if shapes[0][1:] != shapes[1][1:] and all(all(shape[1:]) for shape in shapes):
        a, b = ("x".join(map(str, shape[1:])) for shape in shapes)
        raise UsageError(f"The graphs take images of different sizes, {a} and {b}. Compare graphs for one image size.")
    fixed = [shape[0] for shape in shapes if shape[0]]
    count = fixed[0] if fixed else samples or LIMIT
    pixels = _pixels(sides, data, count, max(shapes, key=lambda shape: sum(map(bool, shape))))
    if fixed:
        pixels = np.resize(pixels, (count, *pixels.shape[1:]))
    for side in sides:
        constants = {tensor.name for tensor in side.model.graph.initializer}
        for value in side.model.graph.input:
            if value.name == side.input.name:
                side.feeds[value.name] = pixels
            elif value.name not in constants:
                dims = [axis.dim_value or count for axis in value.type.tensor_type.shape.dim]
                kind = require("onnx", "compare graphs").helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
                side.feeds[value.name] = np.zeros(dims, kind)


def _pixels(sides: tuple[Side, Side], data: Any, count: int, shape: list[int]) -> Array:
    from swin_deploy.parity import Reference

    bundle = next((side for side in sides if side.bundle is not None), None)
    if data is not None:
        if bundle is None or bundle.bundle is None:
            raise UsageError("--data needs the preprocessing of a bundle, and neither network is one. Leave out --data.")
        from swin_deploy.calib.data import samples_for

        chosen = samples_for(bundle.bundle, data, count, None)
        return np.asarray(next(iter(next(iter(chosen.batches(count))).values())))
    if bundle is not None and bundle.bundle is not None and bundle.entry is not None:
        feeds = Reference.load(bundle.bundle, bundle.entry.reference).feeds
        return np.resize(next(iter(feeds.values())), (count, *next(iter(feeds.values())).shape[1:]))
    onnx = require("onnx", "compare graphs")
    kind = onnx.helper.tensor_dtype_to_np_dtype(sides[0].input.type.tensor_type.elem_type)
    sides_given = [side or 224 for side in shape[2:]]
    size = (count, shape[1] or 3, *sides_given)
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, size).astype(kind) if kind == np.uint8 else rng.standard_normal(size).astype(kind)


Tensors = Mapping[str, Array]
