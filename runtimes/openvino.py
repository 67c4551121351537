"""OpenVINO on the CPU: the faster back end on Intel processors."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np

from swin_deploy.bundle import TensorSpec, without_links
from swin_deploy.dependencies import require
from swin_deploy.errors import BackendError, UsageError, sentence
from swin_deploy.options import Array

from .base import Feeds, Pool, Runtime, keep_forever


class OpenVino(Runtime):
    """An ONNX model in OpenVINO, computed in the types of the graph, or in bf16. `threads` 0 lets OpenVINO choose.

    Between the 8-bit layers of a quantized model it computes in bf16 if the processor supports it, which is 4 to 14 % faster.
    The model is compiled for a batch of one, which is 3 to 7 % faster than for a free batch and the only way to fuse
    attention. The first larger batch compiles it once more, for any batch.

    Raises BackendError if OpenVINO cannot load the model, UsageError for bf16 on a processor without it.
    """

    def __init__(self, path: Path, threads: int = 0, device: str = "cpu", bf16: bool = False) -> None:
        ov = self._ov = require("openvino", "run models with the openvino back end")
        if device != "cpu":
            raise UsageError(f"The back end openvino runs on the CPU, not on {device}. Use onnxruntime for a GPU.")
        self._core, self._path, self._compiling = openvino_core(), path, threading.RLock()
        self._file = _identity(path)
        able = "BF16" in self._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        if bf16 and not able:
            raise UsageError("This processor does not compute in bf16 (it has neither AVX512_BF16 nor AMX). Use fp32.")
        try:
            model = self._read()
            quantized = any(node.get_type_name() == "FakeQuantize" for node in model.get_ops())
            # By default OpenVINO computes fp32 models in bf16 on processors that support it.
            hint = "bf16" if bf16 or (quantized and able) else "f32"
            self._config: dict[str, Any] = {
                "PERFORMANCE_HINT": "LATENCY",
                "INFERENCE_PRECISION_HINT": hint,
                "INFERENCE_NUM_THREADS": threads,
            }
            if threads:  # OpenVINO would bind the threads of every model and process to the same first cores
                self._config["ENABLE_CPU_PINNING"] = False
            if any(map(_is_tiny_attention, model.get_ops())):
                self._config["SNIPPETS_MODE"] = "DISABLE"  # OpenVINO 2026 crashes while it compiles some windows of 2x2 tokens
            inputs, outputs = _specs(model.inputs), _specs(model.outputs)
            if all(spec.shape[0] == "batch" for spec in inputs):
                model.reshape({port: [1, *list(port.get_partial_shape())[1:]] for port in model.inputs})
                outputs = tuple(map(_of_free_batch, outputs, _specs(model.outputs)))
            self._single = self._requests(model)
        except RuntimeError as error:
            raise BackendError(f"OpenVINO cannot load {path}: {sentence(str(error))}.") from error
        super().__init__(f"openvino {ov.__version__.partition('-')[0]}", inputs, outputs)  # without the build

    def _run(self, feeds: Feeds, out: Mapping[str, Array] | None) -> Mapping[str, Array]:
        try:
            return self._pool(feeds).use(self._infer, feeds, out)
        except RuntimeError as error:
            raise BackendError(f"OpenVINO failed while running the model: {sentence(str(error))}.") from error

    def _infer(self, request: Any, feeds: Feeds, out: Mapping[str, Array] | None) -> Mapping[str, Array]:
        arrays = [feeds[spec.name] for spec in self.inputs]
        arrays = [array if array.flags.writeable else array.copy() for array in arrays]  # it refuses read-only memory
        for number, array in enumerate(arrays):
            request.set_input_tensor(number, self._ov.Tensor(array, shared_memory=True))
        for number, spec in enumerate(self.outputs) if out is not None else ():
            request.set_output_tensor(number, self._ov.Tensor(out[spec.name], shared_memory=True))  # type: ignore[index]
        request.infer(share_outputs=True)  # otherwise it copies all outputs once more
        if out is not None:
            return out
        return {spec.name: np.array(request.get_output_tensor(n).data) for n, spec in enumerate(self.outputs)}

    def _pool(self, feeds: Feeds) -> Pool[Any]:
        if self.static_batch or all(len(feeds[spec.name]) == 1 or spec.shape[0] != "batch" for spec in self.inputs):
            return self._single
        with self._compiling:
            return self._any

    @cached_property
    def _any(self) -> Pool[Any]:
        if _identity(self._path) != self._file:
            raise BackendError(
                f"{self._path} was changed or removed after it was loaded, and must be compiled again for batches. Load the "
                f"bundle again."
            )
        return self._requests(self._read())

    def _read(self) -> Any:
        with without_links(self._path) as path:
            return self._core.read_model(str(path))

    def _requests(self, model: Any) -> Pool[Any]:
        compiled = self._core.compile_model(model, "CPU", self._config)
        # A request serves one caller at a time. With two, one is prepared while the other computes with all threads.
        most = max(2, compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS"))
        return Pool(compiled.create_infer_request, most)

    def _close(self) -> None:
        self.__dict__.pop("_any", None)
        self.__dict__.pop("_single", None)


def _is_tiny_attention(node: Any) -> bool:
    """Return whether a node is the softmax of windows with less than 4x4 tokens."""
    if node.get_type_name() != "Softmax":
        return False
    keys = list(node.get_output_partial_shape(0))[-1]
    return bool(keys.is_static and keys.get_length() < 16)


_CREATING = threading.RLock()


def openvino_core() -> Any:
    """Return the one `ov.Core` of this process, which is never freed.

    Each `ov.Core` installs an alternate signal stack on the thread that creates it and restores the previous one when it is
    freed. Freed in another order or on another thread, that leaves a stack in unmapped memory, and the next signal that Python
    handles kills the process.
    """
    with _CREATING:
        return _create_core()


@cache
def _create_core() -> Any:
    core = require("openvino", "run models with the openvino back end").Core()
    if hasattr(os, "register_at_fork"):  # freed in a fork, it waits for threads that are not there
        os.register_at_fork(after_in_child=_keep_core)
    return core


def _keep_core() -> None:
    global _CREATING
    _CREATING = threading.RLock()  # a thread that is not in this fork may have held it
    if _create_core.cache_info().currsize:
        keep_forever(_create_core())


def _of_free_batch(spec: TensorSpec, single: TensorSpec) -> TensorSpec:
    """Return `spec` with the shape of `single`, its version for one image, and a free first axis ("batch" or "n*batch")."""
    first = single.shape[0]
    if spec.shape[0] != "batch" or "batch" in spec.shape[1:] or not isinstance(first, int):
        return spec
    return TensorSpec(spec.name, spec.dtype, ("batch" if first == 1 else f"{first}*batch", *spec.shape[1:]))


def _identity(path: Path) -> tuple[int, ...] | None:
    """Return what changes when the file is written or replaced; None if it does not exist."""
    try:
        found = path.stat()
    except OSError:
        return None
    # A copy that keeps the times can get the number of the removed file. Only the time of the last change tells them apart.
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _specs(ports: list[object]) -> tuple[TensorSpec, ...]:
    specs = []
    for port in ports:
        sizes = port.get_partial_shape()  # type: ignore[attr-defined]
        shape = tuple("batch" if size.is_dynamic else size.get_length() for size in sizes)
        dtype = np.dtype(port.get_element_type().to_dtype()).name  # type: ignore[attr-defined]
        specs.append(TensorSpec(port.get_any_name(), dtype, shape))  # type: ignore[attr-defined]
    return tuple(specs)
