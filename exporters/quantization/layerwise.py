"""Run a network from one linear layer to the next over all samples; what later nodes need is kept in files, one per batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from swin_deploy.dependencies import EXACT_QDQ, onnxruntime_session, require
from swin_deploy.errors import InputError
from swin_deploy.options import Array

from .equalization import inferred_values

if TYPE_CHECKING:
    import onnx

Feeds = Mapping[str, Array]
NO_SAMPLES = "There are no samples to calibrate with. Expected at least one batch."


class LayerwiseRun:
    """A run of `model`, advanced tensor by tensor. `nodes` and `constants` may be changed as long as they have not run."""

    def __init__(self, model: onnx.ModelProto, feeds: Iterable[Feeds], folder: Path) -> None:
        self.onnx = require("onnx", "quantize a model")
        self.model, self.folder = model, folder
        self.nodes = list(model.graph.node)
        self.constants = {tensor.name: tensor for tensor in model.graph.initializer}
        self.types = {value.name: value.type.tensor_type.elem_type for value in inferred_values(model)}
        self.done: set[str] = {value.name for value in model.graph.input}
        self.batches = 0
        folder.mkdir(parents=True, exist_ok=True)
        for feed in feeds:
            self._save(self.batches, feed)
            self.batches += 1
        if not self.batches:
            raise InputError(NO_SAMPLES)

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
        for batch in range(self.batches):
            values = self._load(batch)
            if session is not None:
                made = session.run(fetched, {name: values[name] for name in inputs})
                values |= dict(zip(fetched, made, strict=True))
                self._save(batch, {name: array for name, array in values.items() if name in live})
            yield values[target]
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
        kinds = {name: helper.np_dtype_to_tensor_dtype(array.dtype) for name, array in self._load(0).items()}
        graph = helper.make_graph(
            nodes,
            "step",
            [helper.make_tensor_value_info(name, kinds[name], None) for name in inputs],
            [helper.make_tensor_value_info(name, self.types.get(name, self.onnx.TensorProto.FLOAT), None) for name in outputs],
            [tensor for name, tensor in self.constants.items() if name in used],
        )
        step = helper.make_model(graph, opset_imports=self.model.opset_import, ir_version=self.model.ir_version)
        return onnxruntime_session(step.SerializeToString(), config=EXACT_QDQ)

    def _save(self, batch: int, values: Feeds) -> None:
        with (self.folder / str(batch)).open("wb") as file:
            for name, array in values.items():
                np.save(file, np.array(name))
                np.save(file, array)

    def _load(self, batch: int) -> dict[str, Array]:
        values, path = {}, self.folder / str(batch)
        size = path.stat().st_size
        with path.open("rb") as file:
            while file.tell() < size:
                name = str(np.load(file))
                values[name] = np.load(file)
        return values
