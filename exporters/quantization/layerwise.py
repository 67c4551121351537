"""Run a network from one linear layer to the next over all samples; what later nodes need is kept, batch by batch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from swin_deploy.dependencies import EXACT_QDQ, onnxruntime_session, require
from swin_deploy.options import Array

from .equalization import inferred_values

if TYPE_CHECKING:
    import onnx

Kept = Array | Path  # an array, or the file that it is in
HELD = 1 << 30  # bytes of arrays that are kept in memory


class ArrayStore:
    """Keeps arrays in memory, and in files of `folder` beyond `HELD` bytes."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._held, self._files = folder, 0, 0

    def keep(self, array: Array) -> Kept:
        """Keep an array, and return what `read` and `drop` take."""
        if self._held + array.nbytes <= HELD:
            self._held += array.nbytes
            return array
        self._files += 1
        file = self._folder / f"{self._files}.npy"
        np.save(file, array)
        return file

    def read(self, kept: Kept) -> Array:
        """Return an array that is kept."""
        return np.asarray(np.load(kept)) if isinstance(kept, Path) else kept

    def drop(self, kept: Kept) -> None:
        """Keep an array no longer."""
        if isinstance(kept, Path):
            kept.unlink()
        else:
            self._held -= kept.nbytes


class LayerwiseRun:
    """A run of `model`, advanced tensor by tensor. `nodes` and `constants` may be changed as long as they have not run.

    `batches` are the inputs of each batch, kept in `store`. The run drops them when they are no longer needed.
    """

    def __init__(self, model: onnx.ModelProto, batches: list[dict[str, Kept]], store: ArrayStore) -> None:
        self.onnx = require("onnx", "quantize a model")
        self.model, self.store = model, store
        self.nodes = list(model.graph.node)
        self.constants = {tensor.name: tensor for tensor in model.graph.initializer}
        self.types = {value.name: value.type.tensor_type.elem_type for value in inferred_values(model)}
        self.done: set[str] = {value.name for value in model.graph.input}
        self.batches = batches

    def advance(self, target: str) -> Iterator[Array]:
        """Yield the tensor `target` of every batch. It can be asked for again until another one is."""
        nodes = self._missing(target)
        produced = {name for node in nodes for name in node.output}
        after = self.done | produced
        needed = {name for node in self.nodes if not set(node.output) <= after for name in node.input}
        needed |= {value.name for value in self.model.graph.output} | {target}
        live = needed & after - self.constants.keys()
        inputs = sorted({name for node in nodes for name in node.input if name} - produced - self.constants.keys())
        fetched = sorted(live & produced)
        session = self._session(nodes, inputs, fetched) if nodes else None
        for values in self.batches:
            if session is not None:
                made = session.run(fetched, {name: self.store.read(values[name]) for name in inputs})
                for name in values.keys() - live:
                    self.store.drop(values.pop(name))
                values |= {name: self.store.keep(array) for name, array in zip(fetched, made, strict=True)}
            yield self.store.read(values[target])
        self.done = after

    def _missing(self, target: str) -> list[Any]:
        """The nodes that `target` needs and that have not run, in order."""
        wanted, nodes = {target}, []
        for node in reversed(self.nodes):
            if wanted & set(node.output) and not set(node.output) <= self.done:
                nodes.append(node)
                wanted.update(name for name in node.input if name not in self.done)
        return nodes[::-1]

    def _session(self, nodes: list[Any], inputs: list[str], outputs: list[str]) -> Any:
        helper = self.onnx.helper
        used = {name for node in nodes for name in node.input}
        kinds = {name: helper.np_dtype_to_tensor_dtype(self.store.read(self.batches[0][name]).dtype) for name in inputs}
        graph = helper.make_graph(
            nodes,
            "step",
            [helper.make_tensor_value_info(name, kinds[name], None) for name in inputs],
            [helper.make_tensor_value_info(name, self.types.get(name, self.onnx.TensorProto.FLOAT), None) for name in outputs],
            [tensor for name, tensor in self.constants.items() if name in used],
        )
        step = helper.make_model(graph, opset_imports=self.model.opset_import, ir_version=self.model.ir_version)
        return onnxruntime_session(step.SerializeToString(), config=EXACT_QDQ)
