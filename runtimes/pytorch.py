"""PyTorch: the reference among the back ends. It runs the ONNX graph node by node, in the types that are written in it.

Others may fuse, and compute in wider types than the graph's; here every node's result is rounded to its type, as on a GPU that
fuses nothing. Products, norms and sums of narrow types are accumulated in float32, on a GPU as far as cuBLAS does so.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swin_deploy.dependencies import require
from swin_deploy.errors import BackendError, MissingDependencyError, UsageError, sentence
from swin_deploy.gpus import refuse_without_gpu
from swin_deploy.specs import Array, specs_from_onnx

from .base import Feeds, Runtime
from .dlpack import DeviceTensor

if TYPE_CHECKING:
    import onnx
    from torch import Tensor


@dataclass(frozen=True)
class Step:
    """A node: what it computes, of weights and values by name, what its results are called, and the values that nobody needs
    after it."""

    function: Callable[..., Any]
    inputs: tuple[Tensor | str | None, ...]
    outputs: tuple[str, ...]
    done: tuple[str, ...]


class PyTorch(Runtime):
    """The ONNX model in the file `path`, on the CPU or on a GPU such as "cuda:0".

    float32 is float32: convolutions are not computed in TF32, nor are products, unless the application itself has allowed that
    (torch.set_float32_matmul_precision). `threads` other than 0 has to be what the process has set
    (torch.set_num_threads), because PyTorch has no number of its own for each model; UsageError else. Raises
    MissingDependencyError without torch or onnx, or for a GPU where torch is built for CPUs, and BackendError for a graph with
    an operator that ours do not have.
    """

    def __init__(self, path: Path, threads: int = 0, device: str = "cpu") -> None:
        torch = self._torch = require("torch", "run models with the torch back end")
        onnx = require("onnx", "read the graph that the torch back end runs")
        if threads not in (0, torch.get_num_threads()):
            raise UsageError(
                f"PyTorch has one number of threads for the whole process, which is {torch.get_num_threads()} now, so a model "
                f"cannot have {threads}. Call torch.set_num_threads({threads}) first, or set OMP_NUM_THREADS={threads}."
            )
        if device != "cpu":
            self._check_gpu(device)
        try:
            model = onnx.load(str(path), load_external_data=False)
            self._steps = self._compiled(model.graph, path, device)
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
                f"PyTorch {torch.__version__} as it is installed is built without CUDA, so it cannot run on {device}. "
                "Install a build with CUDA: https://pytorch.org/get-started"
            )
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if number >= count:
            raise BackendError(f"PyTorch {torch.__version__} finds {count} GPUs here, so it cannot run on {device}.")

    def _compiled(self, graph: onnx.GraphProto, path: Path, device: str) -> tuple[Step, ...]:
        """The graph's nodes, ready to be called; the weights go to the device, one by one."""
        from onnx import TensorProto

        from .torch_operators import OPERATORS

        weights: dict[str, Tensor | None] = {"": None}
        whole: dict[str, Tensor] = {}  # shapes, axes and the like, which are read on the CPU
        for initializer in graph.initializer:
            values = self._tensor(initializer, path.parent)
            if initializer.data_type == TensorProto.INT64:
                whole[initializer.name] = values
            weights[initializer.name] = values.to(device)
        last = {name: number for number, node in enumerate(graph.node) for name in (*node.input, *node.output)}
        kept = {*weights, *(value.name for value in graph.output)}
        steps = []
        for number, node in enumerate(graph.node):
            operator = node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}"
            if operator not in OPERATORS:
                raise BackendError(
                    f"The back end torch has no operator {operator}, which {path.name} uses. Take another back end, such as "
                    "onnxruntime."
                )
            try:
                function = OPERATORS[operator](_whole_numbers(node, whole), **_attributes(node))
            except TypeError as error:
                raise BackendError(
                    f"The back end torch does not take the {operator} {node.name} of {path.name} as it is: "
                    f"{sentence(str(error))}. Take another back end, such as onnxruntime."
                ) from error
            done = {name for name in (*node.input, *node.output) if last[name] == number} - kept
            inputs = tuple(weights.get(name, name) for name in node.input)
            steps.append(Step(function, inputs, tuple(node.output), tuple(done)))
        return tuple(steps)

    def _tensor(self, initializer: onnx.TensorProto, folder: Path) -> Tensor:
        """The values, in memory of their own; those that lie in a file beside the graph are read from there."""
        import numpy as np
        from onnx import TensorProto, external_data_helper, numpy_helper

        from .torch_operators import torch_type

        if initializer.data_location == TensorProto.EXTERNAL:
            reference, initializer = initializer, TensorProto()  # a message keeps all that it ever held
            initializer.CopyFrom(reference)
            external_data_helper.load_external_data_for_tensor(initializer, str(folder))
            initializer.data_location = TensorProto.DEFAULT
        values = numpy_helper.to_array(initializer).copy()
        as_bytes: Tensor = self._torch.from_numpy(values.reshape(-1).view(np.uint8))  # of types that numpy itself does not have
        return as_bytes.view(torch_type(initializer.data_type)).reshape(values.shape)

    def _run(self, feeds: Feeds, out: Mapping[str, Array] | None) -> Mapping[str, Array]:
        try:
            with self._torch.inference_mode(), self._on_device():
                values = {name: self._fed(feed) for name, feed in feeds.items()}
                for step in self._steps:
                    found = step.function(*[values[one] if isinstance(one, str) else one for one in step.inputs])
                    values.update(zip(step.outputs, found if isinstance(found, tuple) else (found,), strict=True))
                    for name in step.done:
                        del values[name]
                if out is None:
                    return {spec.name: values[spec.name].cpu().numpy() for spec in self.outputs}
                for name, array in out.items():
                    self._shared(array).copy_(values[name])
                return out
        except Exception as error:
            raise BackendError(f"PyTorch failed while running the model: {sentence(str(error))}.") from error

    def _fed(self, feed: Array | DeviceTensor) -> Tensor:
        if isinstance(feed, DeviceTensor):
            tensor: Tensor = self._torch.from_dlpack(feed.owner)
            return tensor
        # It warns of memory that it must not write, though nothing here does.
        return self._shared(feed if feed.flags.writeable else feed.copy()).to(self.device)

    def _shared(self, array: Array) -> Tensor:
        """A tensor on the memory of a contiguous array, one image of a reversed batch as well."""
        flat: Tensor = self._torch.from_numpy(array.reshape(-1))
        return flat.reshape(array.shape)

    @contextlib.contextmanager
    def _on_device(self) -> Iterator[None]:
        """On a GPU its default stream, with which tensors that are handed over keep in order, whichever the caller uses."""
        if self.device == "cpu":
            yield
            return
        cuda = self._torch.cuda
        with cuda.device(self.device), cuda.stream(cuda.default_stream(self.device)):
            yield

    def _close(self) -> None:
        del self._steps
        if self.device != "cpu":
            self._torch.cuda.empty_cache()


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    from onnx import helper

    values = {one.name: helper.get_attribute_value(one) for one in node.attribute}
    return {name: value.decode() if isinstance(value, bytes) else value for name, value in values.items()}


def _whole_numbers(node: onnx.NodeProto, whole: Mapping[str, Tensor]) -> Callable[[int], list[int] | None]:
    """A function: the whole numbers of the node's input at a position, None where it is left out."""

    def numbers(position: int) -> list[int] | None:
        name = node.input[position] if position < len(node.input) else ""
        if not name:
            return None
        if name not in whole:
            raise TypeError(f"its input {name} is computed, and a constant is expected")
        found: list[int] = whole[name].reshape(-1).tolist()
        return found

    return numbers
