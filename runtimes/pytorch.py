"""Run an ONNX graph with PyTorch, node by node, as the reference among the back ends.

Other back ends fuse nodes and may compute in a wider type. This one rounds the result of every node to its type, like a GPU
without fusion. Matmuls, norms and sums of low precision accumulate in fp32, on a GPU as far as cuBLAS does.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from swin_deploy.bundle import load_weights, specs_from_onnx
from swin_deploy.dependencies import require
from swin_deploy.errors import BackendError, MissingDependencyError, UsageError, sentence
from swin_deploy.gpus import refuse_without_gpu
from swin_deploy.options import Array

from .base import Feeds, Runtime
from .dlpack import DeviceTensor

if TYPE_CHECKING:
    import onnx
    from torch import Tensor


@dataclass(frozen=True)
class NodeCall:
    """A node of the graph: its function, its inputs (weights, or names of values), its outputs, and values last used by it."""

    function: Callable[..., Any]
    inputs: tuple[Tensor | str | None, ...]
    outputs: tuple[str, ...]
    last_used: tuple[str, ...]


class PyTorch(Runtime):
    """An ONNX model in PyTorch. `threads` must be 0 or the number of the process, because PyTorch has only one.

    Convolutions never use TF32, and matmuls only if the application allows it with torch.set_float32_matmul_precision.
    """

    def __init__(self, path: Path, threads: int = 0, device: str = "cpu") -> None:
        torch = self._torch = require("torch", "run models with the torch back end")
        onnx = require("onnx", "read the graph that the torch back end runs")
        if threads not in (0, torch.get_num_threads()):
            raise UsageError(
                f"PyTorch uses {torch.get_num_threads()} threads in the whole process, so one model cannot use {threads}. "
                f"Call torch.set_num_threads({threads}) first, or set OMP_NUM_THREADS={threads}."
            )
        if _first_process() != os.getpid() and torch.get_num_threads() > 1:
            raise BackendError(
                f"This process is a fork of process {_first_process()}, in which PyTorch's threads stayed, and would wait for "
                'them. Call torch.set_num_threads(1) first, or start processes with "spawn" or "forkserver".'
            )
        if device != "cpu":
            self._check_gpu(device)
        try:
            model = onnx.load(str(path), load_external_data=False)
            self._nodes = self._compiled(model.graph, path, device)
            stored = {initializer.name for initializer in model.graph.initializer}
            inputs = [value for value in model.graph.input if value.name not in stored]
            super().__init__(f"torch {torch.__version__}", specs_from_onnx(inputs), specs_from_onnx(model.graph.output), device)
        except BackendError:
            raise
        except Exception as error:
            raise BackendError(f"PyTorch {torch.__version__} cannot load {path}: {sentence(str(error))}.") from error

    def _check_gpu(self, device: str) -> None:
        torch, number = self._torch, int(device.partition(":")[2])
        if torch.version.cuda is None:
            refuse_without_gpu(device)
            raise MissingDependencyError(
                f"The installed PyTorch {torch.__version__} is built without CUDA and cannot run on {device}. "
                "Install a build with CUDA: https://pytorch.org/get-started"
            )
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if number >= count:
            raise BackendError(f"PyTorch {torch.__version__} finds {count} GPUs on this machine and cannot run on {device}.")

    def _compiled(self, graph: onnx.GraphProto, path: Path, device: str) -> tuple[NodeCall, ...]:
        """Prepare the nodes of the graph, and copy the weights to the device one by one."""
        from onnx import TensorProto

        from .torch_operators import OPERATORS

        weights: dict[str, Tensor | None] = {"": None}
        integers: dict[str, Tensor] = {}  # shapes and axes, which are read on the CPU
        for initializer in graph.initializer:
            values = self._tensor(initializer, path.parent)
            if initializer.data_type == TensorProto.INT64:
                integers[initializer.name] = values
            weights[initializer.name] = values.to(device)
        last = {name: number for number, node in enumerate(graph.node) for name in (*node.input, *node.output)}
        kept = {*weights, *(value.name for value in graph.output)}
        nodes = []
        for number, node in enumerate(graph.node):
            operator = node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}"
            if operator not in OPERATORS:
                raise BackendError(
                    f"The back end torch does not support the operator {operator} in {path.name}. Use another back end, such "
                    "as onnxruntime."
                )
            try:
                function = OPERATORS[operator](_integers_of(node, integers), **_attributes(node))
            except TypeError as error:
                raise BackendError(
                    f"The back end torch does not support the {operator} {node.name} in {path.name}: {sentence(str(error))}. "
                    "Use another back end, such as onnxruntime."
                ) from error
            last_used = {name for name in (*node.input, *node.output) if last[name] == number} - kept
            inputs = tuple(weights.get(name, name) for name in node.input)
            nodes.append(NodeCall(function, inputs, tuple(node.output), tuple(last_used)))
        return tuple(nodes)

    def _tensor(self, initializer: onnx.TensorProto, folder: Path) -> Tensor:
        """Copy the values of an initializer, from the external data in `folder` if they are there."""
        from onnx import TensorProto, numpy_helper

        from .torch_operators import torch_type

        if initializer.data_location == TensorProto.EXTERNAL:
            reference, initializer = initializer, TensorProto()  # a protobuf message does not free the memory of its fields
            initializer.CopyFrom(reference)
            load_weights([initializer], folder)
        values = numpy_helper.to_array(initializer).copy()
        as_bytes: Tensor = self._torch.from_numpy(values.reshape(-1).view(np.uint8))  # numpy lacks some of the types
        return as_bytes.view(torch_type(initializer.data_type)).reshape(values.shape)

    def device_tensor(self, value: Any, device: str) -> DeviceTensor:
        """View a tensor of another library on this runtime's GPU; its pending work is ordered before the default stream."""
        with self._torch.cuda.device(device):
            tensor = self._torch.from_dlpack(value.__dlpack__(stream=1))  # 1: the legacy default stream
        dtype = np.dtype(str(tensor.dtype).removeprefix("torch."))
        return DeviceTensor(device, dtype, tuple(tensor.shape), tensor.data_ptr(), tensor)

    def _run(self, feeds: Feeds, out: Mapping[str, Array] | None) -> Mapping[str, Array]:
        try:
            # Unlike torch.inference_mode, an interrupt cannot leave it switched on.
            with self._torch._C._InferenceMode(True):
                if self.device == "cpu":
                    return self._compute(feeds, out)
                cuda = self._torch.cuda
                # The default stream keeps tensors of the caller in order, whichever stream they come from.
                with cuda.device(self.device), cuda.stream(cuda.default_stream(self.device)):
                    return self._compute(feeds, out)
        except Exception as error:
            raise BackendError(f"PyTorch failed while running the model: {sentence(str(error))}.") from error

    def _compute(self, feeds: Feeds, out: Mapping[str, Array] | None) -> Mapping[str, Array]:
        values = {name: self._fed(feed) for name, feed in feeds.items()}
        for node in self._nodes:
            found = node.function(*[values[one] if isinstance(one, str) else one for one in node.inputs])
            values.update(zip(node.outputs, found if isinstance(found, tuple) else (found,), strict=True))
            for name in node.last_used:
                del values[name]
        if out is None:
            return {spec.name: values[spec.name].cpu().numpy() for spec in self.outputs}
        for name, array in out.items():
            self._shared(array).copy_(values[name])
        return out

    def _fed(self, feed: Array | DeviceTensor) -> Tensor:
        if isinstance(feed, DeviceTensor):
            tensor: Tensor = feed.owner
            return tensor
        # from_numpy warns about read-only memory.
        return self._shared(feed if feed.flags.writeable else feed.copy()).to(self.device)

    def _shared(self, array: Array) -> Tensor:
        """Return a tensor that shares the memory of an array; reshaping drops strides that torch rejects."""
        flat: Tensor = self._torch.from_numpy(array.reshape(-1))
        return flat.reshape(array.shape)

    def _close(self) -> None:
        self._nodes = ()
        if self.device != "cpu":
            self._torch.cuda.empty_cache()


@functools.cache
def _first_process() -> int:
    """Return the process that first loaded a model, in it and in its forks."""
    return os.getpid()


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    from onnx import helper

    values = {one.name: helper.get_attribute_value(one) for one in node.attribute}
    if node.op_type == "Split":
        values.setdefault("num_outputs", len(node.output))  # before opset 18
    return {name: value.decode() if isinstance(value, bytes) else value for name, value in values.items()}


def _integers_of(node: onnx.NodeProto, integers: Mapping[str, Tensor]) -> Callable[[int], list[int] | None]:
    """Return a function that gives the integers of the constant input at a position, or None if it is left out."""

    def numbers(position: int) -> list[int] | None:
        name = node.input[position] if position < len(node.input) else ""
        if not name:
            return None
        if name not in integers:
            raise TypeError(f"its input {name} is computed, but only a constant is supported")
        found: list[int] = integers[name].reshape(-1).tolist()
        return found

    return numbers
