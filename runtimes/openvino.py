"""OpenVINO on the CPU: the faster back end on Intel processors."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from swin_deploy.errors import BackendError, UsageError
from swin_deploy.requires import require
from swin_deploy.specs import TensorSpec

from .base import Array, Runtime


class OpenVino(Runtime):
    """The ONNX model in the file `path`, computed in its own precision, or with `bf16` in that. `threads` 0: OpenVINO chooses.

    It is compiled for one image at a time, which is 3 to 7 % faster than for a free batch and the only way to fuse
    attention; the first larger batch has it compiled once more, for any. Raises BackendError when OpenVINO does not take it,
    UsageError for bf16 on a processor that has none.
    """

    def __init__(self, path: Path, threads: int = 0, bf16: bool = False) -> None:
        ov = require("openvino", "run models with the openvino back end")
        # Left alone, OpenVINO computes fp32 models in bf16 on processors that have it; the graph's types decide here.
        hint = "bf16" if bf16 else "f32"
        self._config = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": threads}
        self._core, self._path = ov.Core(), path
        if bf16 and "BF16" not in self._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            raise UsageError("This processor does not compute in bf16 (it has neither AVX512_BF16 nor AMX). Take fp32.")
        try:
            model = self._core.read_model(str(path))
            inputs, outputs = _specs(model.inputs), _specs(model.outputs)
            if all(spec.shape[0] == "batch" for spec in inputs):
                model.reshape({port: [1, *list(port.get_partial_shape())[1:]] for port in model.inputs})
            self._single = self._core.compile_model(model, "CPU", self._config).create_infer_request()
        except RuntimeError as error:
            raise BackendError(f"OpenVINO cannot load {path}: {_sentence(error)}") from error
        self._any: Any = None
        self._turn = threading.Lock()  # a request serves one caller at a time, and refuses the others
        super().__init__(f"openvino {ov.__version__}", inputs, outputs)

    def _run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        try:
            with self._turn:
                results = self._request(feeds).infer(dict(feeds))
                return {spec.name: np.array(results[spec.name]) for spec in self.outputs}
        except RuntimeError as error:
            raise BackendError(f"OpenVINO failed while running the model: {_sentence(error)}") from error

    def _request(self, feeds: Mapping[str, Array]) -> Any:
        if all(len(feeds[spec.name]) == 1 or spec.shape[0] != "batch" for spec in self.inputs):
            return self._single
        if self._any is None:
            self._any = self._core.compile_model(str(self._path), "CPU", self._config).create_infer_request()
        return self._any

    def _close(self) -> None:
        del self._single, self._any, self._core


def _sentence(error: Exception) -> str:
    return " ".join(str(error).split())


def _specs(ports: list[object]) -> tuple[TensorSpec, ...]:
    specs = []
    for port in ports:
        sizes = port.get_partial_shape()  # type: ignore[attr-defined]
        shape = tuple("batch" if size.is_dynamic else size.get_length() for size in sizes)
        dtype = np.dtype(port.get_element_type().to_dtype()).name  # type: ignore[attr-defined]
        specs.append(TensorSpec(port.get_any_name(), dtype, shape))  # type: ignore[attr-defined]
    return tuple(specs)
