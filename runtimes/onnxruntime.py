"""ONNX Runtime: the back end that every bundle runs on, and the one to embed by default; on the CPU, or on a CUDA GPU."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from swin_deploy.errors import BackendError, MissingDependencyError, MissingKernelError
from swin_deploy.requires import require
from swin_deploy.specs import TensorSpec

from .base import Array, Feeds, Runtime
from .pool import Pool
from .tensors import DeviceTensor

_DTYPES = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(uint8)": "uint8", "tensor(bool)": "bool"}
MOST_BINDINGS = 256  # calls at a time; each costs next to nothing


class OnnxRuntime(Runtime):
    """The ONNX model in the file `path`. `threads` is for the whole session; 0 lets ONNX Runtime choose.

    `device` is "cpu", or a GPU such as "cuda:0"; where ONNX Runtime cannot start that, it is an error. Raises BackendError when
    it does not take the model, MissingKernelError when only its types are the reason, MissingDependencyError where it was
    built without CUDA.
    """

    provider = "CUDAExecutionProvider"
    providers: tuple[tuple[str, dict[str, str]], ...] = ((provider, {"use_tf32": "0"}),)  # TF32 would not be fp32

    def __init__(self, path: Path, threads: int = 0, device: str = "cpu") -> None:
        ort = require("onnxruntime", "run ONNX models")
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3  # its errors reach us as exceptions; its hints are not for an application's log
        providers = self._providers(ort, device)
        try:
            try:
                self._session = ort.InferenceSession(str(path), options, providers=providers)
            except Exception as error:
                if "QuantizeLinear" not in str(error):
                    raise
                # 1.31 moves some of these in graphs for GPUs and then does not take what it made; as they stand it does.
                options.add_session_config_entry("session.disable_quant_qdq", "1")
                self._session = ort.InferenceSession(str(path), options, providers=providers)
        except Exception as error:
            if "NOT_IMPLEMENTED" in str(error):
                kind = "CPU" if device == "cpu" else "GPU"
                raise MissingKernelError(
                    f"ONNX Runtime {ort.__version__} has no {kind} kernel for a type in {path.name} ({_sentence(error)}). Use "
                    f"the back end openvino, or another precision."
                ) from error
            raise BackendError(f"ONNX Runtime {ort.__version__} cannot load {path}: {_sentence(error)}") from error
        if device != "cpu" and self.provider not in self._session.get_providers():
            # It warns and goes on with the CPU when CUDA's libraries are missing or of another release.
            raise BackendError(
                f"ONNX Runtime {ort.__version__} could not start its {self.provider}, mostly because CUDA or cuDNN is missing "
                'or of another release than it was built for. Run: pip install "onnxruntime-gpu[cuda,cudnn]"'
            )
        super().__init__(
            f"onnxruntime {ort.__version__}",
            _specs(self._session.get_inputs()),
            _specs(self._session.get_outputs()),
            device,
        )
        self._names = [spec.name for spec in self.outputs]
        self._bindings: Pool[Any] = Pool(self._session.io_binding, MOST_BINDINGS)

    def _providers(self, ort: Any, device: str) -> list[Any]:
        if device == "cpu":
            return ["CPUExecutionProvider"]
        if self.provider not in ort.get_available_providers():
            raise MissingDependencyError(
                f"ONNX Runtime {ort.__version__} as it is installed has no {self.provider}, so it cannot run on {device}. "
                'Run: pip uninstall onnxruntime, then pip install "swin-deploy[gpu]"'
            )
        here = {"device_id": str(_number(device))}
        return [*((name, {**here, **options}) for name, options in self.providers), "CPUExecutionProvider"]

    def _run(self, feeds: Feeds, out: Mapping[str, Array] | None) -> Mapping[str, Array]:
        try:
            if out is None:
                results = self._session.run(self._names, feeds)
                return dict(zip(self._names, results, strict=True))
            with self._bindings.taken() as binding:
                for name, array in feeds.items():
                    if isinstance(array, DeviceTensor):
                        kind, number, pointer = "cuda", _number(self.device), array.pointer
                    else:
                        kind, number, pointer = "cpu", 0, array.ctypes.data
                    binding.bind_input(name, kind, number, array.dtype.type, array.shape, pointer)
                for name in self._names:
                    array = out[name]
                    binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
                if self.device != "cpu":
                    binding.synchronize_inputs()
                self._session.run_with_iobinding(binding)
                if self.device != "cpu":
                    binding.synchronize_outputs()
        except Exception as error:
            raise BackendError(f"ONNX Runtime failed while running the model: {_sentence(error)}") from error
        return out

    def _close(self) -> None:
        self._bindings.drain()
        del self._session, self._bindings


class OnnxRuntimeTensorRt(OnnxRuntime):
    """The same with ONNX Runtime's TensorRT provider, which compiles the graph while it is loaded; on a GPU only."""

    provider = "TensorrtExecutionProvider"
    providers = ((provider, {}), *OnnxRuntime.providers)  # what the first does not take is the second's


def _number(device: str) -> int:
    return int(device.partition(":")[2] or 0)


def _specs(nodes: list[Any]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(n.name, _DTYPES[n.type], tuple(n.shape)) for n in nodes)


def _sentence(error: Exception) -> str:
    return " ".join(str(error).split())
