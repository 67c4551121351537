"""ONNX Runtime on the CPU: the back end that every bundle runs on, and the one to embed by default."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from swin_deploy.errors import BackendError, MissingKernelError
from swin_deploy.requires import require
from swin_deploy.specs import TensorSpec

from .base import Array, Runtime

_DTYPES = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(uint8)": "uint8", "tensor(bool)": "bool"}


class OnnxRuntime(Runtime):
    """The ONNX model in the file `path`. `threads` is for the whole session; 0 lets ONNX Runtime choose.

    Raises BackendError when ONNX Runtime does not take the model, MissingKernelError when only its types are the reason.
    """

    def __init__(self, path: Path, threads: int = 0) -> None:
        ort = require("onnxruntime", "run ONNX models")
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3  # its errors reach us as exceptions; its hints are not for an application's log
        try:
            try:
                self._session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            except Exception as error:
                if "QuantizeLinear" not in str(error):
                    raise
                # 1.31 moves some of these in graphs for GPUs and then does not take what it made; as they stand it does.
                options.add_session_config_entry("session.disable_quant_qdq", "1")
                self._session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            if "NOT_IMPLEMENTED" in str(error):
                raise MissingKernelError(
                    f"ONNX Runtime {ort.__version__} has no CPU kernel for a type in {path.name} ({_sentence(error)}). Use the "
                    f"back end openvino, or another precision."
                ) from error
            raise BackendError(f"ONNX Runtime {ort.__version__} cannot load {path}: {_sentence(error)}") from error
        super().__init__(
            f"onnxruntime {ort.__version__}", _specs(self._session.get_inputs()), _specs(self._session.get_outputs())
        )
        self._names = [spec.name for spec in self.outputs]

    def _run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        try:
            results = self._session.run(self._names, dict(feeds))
        except Exception as error:
            raise BackendError(f"ONNX Runtime failed while running the model: {_sentence(error)}") from error
        return dict(zip(self._names, results, strict=True))

    def _close(self) -> None:
        del self._session


def _specs(nodes: list[object]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(n.name, _DTYPES[n.type], tuple(n.shape)) for n in nodes)  # type: ignore[attr-defined]


def _sentence(error: Exception) -> str:
    return " ".join(str(error).split())
