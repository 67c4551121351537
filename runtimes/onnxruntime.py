"""ONNX Runtime on the CPU. Runs every bundle, and is the default to embed."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from swin_deploy.bundle import TensorSpec
from swin_deploy.dependencies import EXACT_QDQ, onnxruntime_session, require
from swin_deploy.errors import BackendError, MissingKernelError, sentence, system_limit
from swin_deploy.options import Array

from .base import Feeds, Pool, Runtime

_KINDS = ("float16", "uint8", "bool", "int64")
_DTYPES = {"tensor(float)": "float32", **{f"tensor({kind})": kind for kind in _KINDS}}
MOST_BINDINGS = 256  # concurrent calls

_LOG = logging.getLogger(__name__)


class OnnxRuntime(Runtime):
    """An ONNX model in ONNX Runtime. `threads` 0 lets ONNX Runtime choose.

    Raises BackendError if it cannot load the model, MissingKernelError if it has no kernel for a type in it.
    """

    def __init__(self, path: Path, threads: int = 0, device: str = "cpu") -> None:
        ort = require("onnxruntime", "run ONNX models")
        self._session = opened(ort, path, threads, ["CPUExecutionProvider"], "CPU")
        super().__init__(f"onnxruntime {ort.__version__}", *specs_of(self._session), device)
        self._names = [spec.name for spec in self.outputs]
        self._bindings: Any = Pool(self._session.io_binding, MOST_BINDINGS)

    def _run(self, feeds: Feeds, out: Mapping[str, Array] | None) -> Mapping[str, Array]:
        try:
            if out is None:
                results = self._session.run(self._names, feeds)
                return dict(zip(self._names, results, strict=True))
            self._bindings.use(self._run_bound, feeds, out)
        except Exception as error:
            raise failed(error) from error
        return out

    def _run_bound(self, binding: Any, feeds: Feeds, out: Mapping[str, Array]) -> None:
        for name, array in feeds.items():
            binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        for name in self._names:
            array = out[name]
            binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        self._session.run_with_iobinding(binding)

    def _close(self) -> None:
        self._session = self._bindings = None


def opened(ort: Any, path: Path, threads: int, providers: Sequence[Any], kind: str, **options: Any) -> Any:
    """Open a session with these providers; `kind` (CPU or GPU) is named in errors."""
    # Without deterministic compute, a mean over many tokens on a GPU depends on the order of the additions.
    open_session = partial(
        onnxruntime_session, path, threads=threads, providers=providers, use_deterministic_compute=kind == "GPU", **options
    )
    try:
        try:
            return open_session()
        except Exception as error:
            if not any(part in str(error) for part in ("QuantizeLinear", "MatMulIntegerToFloat", "ShapeInferenceError")):
                raise
            # ONNX Runtime 1.31 rewrites some Q/DQ nodes or Transposes in graphs for GPUs, and rejects the result.
            for fewer in ({"disabled_optimizers": ["QDQS8ToU8Transformer"]}, {"config": EXACT_QDQ}):
                with contextlib.suppress(Exception):
                    return open_session(**fewer)
            _LOG.debug("ONNX Runtime runs %s without optimizations: %s", path, sentence(str(error)))
            return open_session(graph_optimization_level=ort.GraphOptimizationLevel.ORT_DISABLE_ALL)
    except Exception as error:
        if "NOT_IMPLEMENTED" in str(error):
            raise MissingKernelError(
                f"ONNX Runtime {ort.__version__} has no {kind} kernel for a type in {path.name} ({sentence(str(error))}). Use "
                f"the back end openvino, or another precision."
            ) from error
        reason = sentence(system_limit(error) or str(error))
        raise BackendError(f"ONNX Runtime {ort.__version__} cannot load {path}: {reason}.") from error


def specs_of(session: Any) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Return the inputs and the outputs of a session."""
    return _specs(session.get_inputs()), _specs(session.get_outputs())


def failed(error: Exception) -> BackendError:
    """Return the error for a failed run."""
    return BackendError(f"ONNX Runtime failed while running the model: {sentence(str(error))}.")


def _specs(nodes: list[Any]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(n.name, _DTYPES[n.type], tuple(n.shape)) for n in nodes)
