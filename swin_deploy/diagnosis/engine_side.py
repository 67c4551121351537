"""An engine as a side of a comparison: the tensors inside it, and the first part that its compiler gets wrong.

A diagnostic engine is compiled from the graph of the engine with the same options. Every tensor that is compared is one of its
outputs. A compiler fuses less around an output, so that a fault of a fused kernel may disappear. Then parts of the graph are
compiled alone, with the tensors of ONNX Runtime as inputs.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from swin_deploy.dependencies import EXACT_QDQ, require
from swin_deploy.errors import UsageError
from swin_deploy.files import scratch_folder
from swin_deploy.options import Array, EngineSpec

from .comparison import EXPECTED, GROWN, Difference, Fault
from .folded_graph import run_with_outputs
from .sides import LIMIT, Side
from .swin_structure import MERGE, Point

_LOG = logging.getLogger(__name__)
DEVICE = "cuda:0"
ALONE = 0.2  # share of what a type explains in a network that it explains in a part with exact inputs
WORSE = 10.0  # a part is not the first wrong one if a later one is so many times worse
Part = tuple[str | None, list[tuple[Point, list[str]]]]  # the tensor that it starts from, and the ends of its pieces


@dataclass
class EngineSide(Side):
    """The network of an engine; `model` is the graph that it was compiled from, `spec` how."""

    file: str = ""
    spec: EngineSpec = field(default_factory=EngineSpec)
    marked: dict[str, Array] = field(default_factory=dict)  # outputs of the diagnostic engine
    timings: bytes = b""
    known: dict[int, dict[str, Array]] = field(default_factory=dict)  # tensors of ONNX Runtime by number of images

    def shape(self) -> list[int]:
        """Return the shape of the images, as many as one call of the engine takes."""
        fitting = [min(max(LIMIT, low), high) for low, _, high in self.spec.batches]
        return [min(fitting, key=lambda count: abs(count - LIMIT)), *super().shape()[1:]]

    @property
    def limit(self) -> float:
        """The relative L2 distance that the types explain between two engines of this graph."""
        return min(EXPECTED[self.precision], EXPECTED["bf16"])

    @property
    def static(self) -> int | None:
        """The number of images that the graph takes; None if any number."""
        from swin_deploy.runtimes.base import static_batch_of

        assert self.entry is not None
        return static_batch_of(self.entry.inputs)

    @property
    def outputs(self) -> list[str]:
        return [value.name for value in self.model.graph.output]

    @cached_property
    def answers(self) -> dict[str, Array]:
        """The outputs of the engine itself."""
        from swin_deploy.runtimes.gpu.engine_fit import open_engine

        assert self.bundle is not None
        with open_engine(self.bundle, self.file, DEVICE) as runtime:
            return {name: np.array(array) for name, array in runtime.run(self.feeds).items()}

    def _run(self, names: list[str]) -> dict[str, Array]:
        count = len(next(iter(self.feeds.values())))
        if not any(low <= count <= high for low, _, high in self.spec.batches):
            raise UsageError(f"{self.file} does not take {count} images at a time, and the other network does.")
        answers, inner = self.answers, [name for name in names if name not in self.outputs]
        if inner:
            _LOG.info("Compiling a diagnostic engine of %s", self.file)
            found = self.compiled(None, [*inner, *self.outputs])
            self.marked = {name: found[name] for name in self.outputs}
            answers = {**found, **answers}
        return {name: answers[name] for name in names}

    def reference(self, names: list[str], images: int = 0) -> dict[str, Array]:
        """Return the tensors `names` as ONNX Runtime computes them, for so many images instead of all."""
        known = self.known.setdefault(images, {})
        if missing := [name for name in names if name not in known]:
            feeds = {name: np.resize(one, (images or len(one), *one.shape[1:])) for name, one in self.feeds.items()}
            known |= run_with_outputs(self._exact, feeds, missing, config=EXACT_QDQ)
        return {name: known[name] for name in names}

    @cached_property
    def _types(self) -> dict[str, int]:
        inferred = require("onnx", "compare graphs").shape_inference.infer_shapes(self.model).graph
        return {value.name: value.type.tensor_type.elem_type for value in (*inferred.value_info, *inferred.output)}

    def needs(self, start: str | None, ends: list[str]) -> tuple[set[int], set[str]]:
        """Return the nodes between `start` and `ends`, by index, and the names that these read from elsewhere."""
        nodes = self.model.graph.node
        writer = {name: index for index, node in enumerate(nodes) for name in node.output if name}
        found: set[int] = set()
        read: set[str] = set()
        todo = list(ends)
        while todo:
            name = todo.pop()
            index = None if name == start else writer.get(name)
            if index is None:
                read.add(name)
            elif index not in found:
                found.add(index)
                todo += [one for one in nodes[index].input if one]
        return found, read

    def compiled(self, start: str | None, ends: list[str], fused: bool = True) -> dict[str, Array]:
        """Compile the graph from `start` to `ends` alone, as the engine was compiled, and return the tensors `ends`.

        Tensors inside the graph are inputs and outputs as [batch, values], because they may have the batch on any axis.
        """
        from swin_deploy.exporters.engines.engine_from_onnx import engine_from_onnx
        from swin_deploy.manifest import TensorSpec
        from swin_deploy.runtimes.backends import runtime_from_engine
        from swin_deploy.runtimes.base import EngineFile, of_any_batch

        assert self.entry is not None
        onnx = require("onnx", "compare graphs")
        helper, types = onnx.helper, onnx.TensorProto
        count = len(next(iter(self.feeds.values())))
        static = self.static
        indices, read = self.needs(start, ends)
        tensors = self.reference([name for name in dict.fromkeys([*ends, *([start] if start else [])]) if name])
        model = onnx.ModelProto(ir_version=self.model.ir_version, opset_import=self.model.opset_import)
        graph = model.graph
        graph.name = "part"
        graph.initializer.extend(one for one in self.model.graph.initializer if one.name in read)
        graph.input.extend(one for one in self.model.graph.input if one.name in read)
        given = [one for one in of_any_batch(self.entry.inputs, static) if one.name in read]
        made = [one for one in of_any_batch(self.entry.outputs, static) if one.name in ends]
        feeds = {name: feed for name, feed in self.feeds.items() if name in read}

        def plain(name: str, tensor: str) -> tuple[Any, TensorSpec]:
            """Describe the input or output `name` that holds `tensor`."""
            kind = types.FLOAT16 if self._types.get(tensor) == types.FLOAT16 else types.FLOAT
            values = tensors[tensor].size // count
            spec = TensorSpec(name, "float16" if kind == types.FLOAT16 else "float32", ("batch", values))
            return helper.make_tensor_value_info(name, kind, [static or "batch", values]), spec

        def reshaped(source: str, target: str, shape: list[int], kind: int | None) -> None:
            """Add nodes that write `source` in another shape and, unless `kind` is None, in that type."""
            if kind is not None:
                graph.node.append(helper.make_node("Cast", [source], [f"{target}/cast"], f"{target}/cast", to=kind))
            graph.initializer.append(helper.make_tensor(f"{target}/shape", types.INT64, [len(shape)], shape))
            source = source if kind is None else f"{target}/cast"
            graph.node.append(helper.make_node("Reshape", [source, f"{target}/shape"], [target], f"{target}/reshaped"))

        def cast(tensor: str, kind: int) -> int | None:
            return None if self._types.get(tensor, types.FLOAT) in (types.FLOAT, types.FLOAT16) else kind

        if start is not None:
            shape = list(tensors[start].shape)
            if not static:
                more = self.reference([start], count + 1)[start].shape
                shape = [-1 if size != other else size for size, other in zip(shape, more, strict=True)]
            name = f"{start}/given"
            value, spec = plain(name, start)
            graph.input.append(value)
            given.append(spec)
            feeds[name] = tensors[start].reshape(count, -1).astype(spec.dtype)
            reshaped(name, start, shape, cast(start, self._types.get(start, types.FLOAT)))
        graph.node.extend(self.model.graph.node[index] for index in sorted(indices))
        outputs = {}
        for end in ends:
            if end in self.outputs:
                graph.output.append(next(value for value in self.model.graph.output if value.name == end))
                outputs[end] = end
                continue
            value, spec = plain(f"{end}/marked", end)
            graph.output.append(value)
            made.append(spec)
            outputs[end] = spec.name
            reshaped(end, spec.name, [-1, spec.shape[1]], cast(end, types.FLOAT))  # type: ignore[list-item]
        with scratch_folder("diff") as folder:
            path, plan, timings = folder / "part.onnx", folder / "part.engine", folder / "timings"
            onnx.save(model, str(path), save_as_external_data=True, location="part.onnx_data")
            spec_now = replace(self.spec, fused_attention=fused and self.spec.fused_attention)
            if self.backend == "tensorrt":
                timings.write_bytes(self.timings)
                spec_now = replace(spec_now, timing_cache=timings)
            plan.write_bytes(engine_from_onnx(path, spec_now).plan)
            self.timings = timings.read_bytes() if timings.exists() else b""
            file = EngineFile(plan, tuple(given), tuple(made), host_code=self.spec.version_compatible)
            with runtime_from_engine(file, self.backend, DEVICE) as runtime:
                found = {name: np.array(array) for name, array in runtime.run(feeds).items()}
        return {end: found[name].reshape(tensors[end].shape) for end, name in outputs.items()}

    def error(self, start: str | None, ends: list[str], fused: bool = True) -> float:
        """Return the largest relative L2 error of `ends` if the graph from `start` is compiled alone."""
        _LOG.info("Compiling the part of %s from %s to %s", self.file, start or "the images", ends[0])
        return distance(self.reference(ends), self.compiled(start, ends, fused))


def distance(right: dict[str, Array], found: dict[str, Array]) -> float:
    """Return the largest relative L2 distance of the tensors `found` from those of the same names in `right`."""
    worst = 0.0
    for name, array in found.items():
        a, b = right[name].astype(np.float64), array.astype(np.float64)
        one = float(np.linalg.norm(a - b) / max(np.linalg.norm(a), 1e-30))
        worst = max(worst, one if math.isfinite(one) else math.inf)
    return worst


def side_of_engine(text: str, path: Path, precision: str, backend: str) -> EngineSide:
    """Open an engine of the bundle at `path` that runs on this machine.

    Raises:
        UsageError: There is no usable GPU, or the bundle has no such engine.
        EngineError: No engine fits the GPU; the message has the command that compiles one.
    """
    from swin_deploy.bundle import Bundle, load_graph
    from swin_deploy.runtimes.gpu.engine_fit import fitting_engines, gpu_of, rebuild_options

    bundle = Bundle.open(path)
    file = next(iter(fitting_engines(bundle, backend, precision, DEVICE).values()))
    options = rebuild_options(bundle.engines[file])
    spec = EngineSpec(**{**options, "batches": tuple(map(tuple, options["batches"])), "gpus": (gpu_of(DEVICE, backend),)})
    graph, entry = bundle.graph_file_of(file), bundle.graph_of(file)
    stated = bundle.preprocessor if entry.preprocessing is None else entry.preprocessing
    model = load_graph(bundle.verified_path(graph))
    return EngineSide(text, model, precision, backend, stated, bundle, entry, file=file, spec=spec)


def with_fault_of_compiler(found: Difference, side: Side) -> Difference:
    """Return `found`, with the part that the compiler of an engine gets wrong if the diagnostic engine does not show it."""
    if not isinstance(side, EngineSide) or not side.marked:
        return found
    apart = distance(side.answers, side.marked)
    if apart <= side.limit:
        return found
    _LOG.warning(
        "%s gives other results than its graph with more outputs (relative L2 distance %.2g). Compiling parts of the graph to "
        "find the one that is wrong.", side.file, apart,
    )  # fmt: skip
    others = (one for one in (found.first, *found.others) if one is not None and not one.cause.startswith(GROWN))
    return replace(found, first=fault_of_compiler(side), others=tuple(others))


def fault_of_compiler(side: EngineSide) -> Fault:
    """Compile smaller and smaller parts of the graph of an engine, and return the first one that is wrong."""
    boundaries = _boundaries(side)
    halves = [name for point, name in side.structure.tensors.items() if point.part == "residual1"]
    count = len(next(iter(side.feeds.values())))
    for images in (0,) if side.static else (0, count + 1):  # all in one run
        side.reference([*halves, *(name for _, names in boundaries for name in names)], images)
    (start, ends), error = _first_wrong(side, (None, boundaries))
    point = ends[-1][0]
    middle = side.structure.tensors.get(Point(point.stage, point.block, "residual1"))
    if len(ends) == 1 and middle is not None and _separates(side, middle, *ends[0][1]):
        (start, ends), error = _first_wrong(side, (start, [(replace(point, part="residual1"), [middle]), *ends]), error)
    point, names = ends[-1]
    alone = ALONE * side.limit
    if len(ends) > 1 or not error > alone:
        which = f"from {ends[0][0].title()} to {point.title()} together" if len(ends) > 1 else "as a whole only"
        cause = f"The compiler gets the network wrong on this GPU, {which}: each part, compiled alone, is right."
        return Fault(point, names[0], cause)
    attention = None if point.block is None else side.structure.attentions.get((point.stage or 0, point.block))
    written = {name for index in side.needs(start, names)[0] for name in side.model.graph.node[index].output}
    if attention is not None and attention.softmax.output[0] in written:
        point = replace(point, part="attention.output")
        without = side.error(start, names, fused=False) if side.spec.fused_attention else math.inf
        if without <= max(alone, error / WORSE):
            return Fault(replace(point, part="attention.softmax"), attention.softmax.output[0], _fused(side, error))
    elif point.part == "residual2":
        point = replace(point, part="mlp.fc2")
    cause = f"The compiler gets this part wrong on this GPU: compiled alone, its relative L2 error is {error:.2g}."
    return Fault(point, names[0], f"{cause} Use another release of TensorRT.")


def _fused(side: EngineSide, error: float) -> str:
    from swin_deploy.runtimes.gpu.engine_fit import gpu_of, rebuild_command

    assert side.bundle is not None
    again = rebuild_command(side.bundle, side.file, [gpu_of(DEVICE, side.backend)], fused_attention=False)
    return (
        f"The compiler's fused attention is wrong on this GPU: its relative L2 error is {error:.2g}, and it is right without "
        f'fusion. Compile the engine without it: "{again}".'
    )


def _boundaries(side: EngineSide) -> list[tuple[Point, list[str]]]:
    """Return the ends of blocks and merges that one tensor passes, and the outputs."""
    structure = side.structure
    parts = {"patch_embed", "residual2", MERGE[structure.version][-1]}
    found: list[tuple[Point, list[str]]] = []
    for point in structure.points():
        name = structure.tensors.get(point)
        if point.part in parts and name is not None and (not found or _separates(side, found[-1][1][0], name)):
            found.append((point, [name]))
    while found and not _separates(side, found[-1][1][0], *side.outputs):
        found.pop()
    last = next(point for point in reversed(structure.points()) if point in structure.tensors)
    return [*found, (last, side.outputs)]


def _separates(side: EngineSide, start: str | None, *ends: Any) -> bool:
    """Whether `ends` depend on the images only through `start`."""
    return start is None or side.input.name not in side.needs(start, list(ends))[1]


def _first_wrong(side: EngineSide, part: Part, error: float = math.inf) -> tuple[Part, float]:
    """Halve `part`, which is wrong by `error`, as long as a half is wrong, and return what is left with its error."""
    start, ends = part
    alone = ALONE * side.limit
    while len(ends) > 1:
        middle = len(ends) // 2
        halves = (start, ends[:middle]), (ends[middle - 1][1][0], ends[middle:])
        errors = [side.error(first, pieces[-1][1]) for first, pieces in halves]
        if not max(errors) > alone:
            break
        chosen = not (errors[0] > alone and errors[0] * WORSE >= errors[1])
        (start, ends), error = halves[chosen], errors[chosen]
    return (start, ends), error
