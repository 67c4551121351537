"""ONNX Runtime on the CPU. Runs every bundle, and is the default to embed."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from swin_deploy.bundle import TensorSpec
from swin_deploy.dependencies import EXACT_QDQ, EXACT_SUMS, onnxruntime_session, require
from swin_deploy.errors import BackendError, MissingKernelError, sentence, system_limit
from swin_deploy.files import json_from
from swin_deploy.machine import processor_features, saturates
from swin_deploy.options import Array

from .base import Feeds, Pool, Runtime
from .user_cache import (
    STORING,
    file_identity,
    map_cached,
    read_cached,
    store_cached,
    stored_graph,
    stored_weights,
)

_KINDS = ("float16", "uint8", "bool", "int64")
_DTYPES = {"tensor(float)": "float32", **{f"tensor({kind})": kind for kind in _KINDS}}
MOST_BINDINGS = 256  # concurrent calls

_LOG = logging.getLogger(__name__)


class OnnxRuntime(Runtime):
    """An ONNX model in ONNX Runtime. `threads` 0 lets ONNX Runtime choose.

    The optimized graph of a file whose `digest` is given is stored for the next load, which takes 0.1 s less.

    Raises BackendError if it cannot load the model, MissingKernelError if it has no kernel for a type in it.
    """

    def __init__(self, path: Path, threads: int = 0, device: str = "cpu", digest: str = "") -> None:
        ort = require("onnxruntime", "run ONNX models")
        self._path, self._digest = path, digest
        self._config: dict[str, str] = {}
        self._session: Any = None
        if digest:
            self._identity = file_identity(path)
            self._session = _stored_session(digest, threads)
        if self._session is None:
            start, providers = time.perf_counter(), ["CPUExecutionProvider"]
            self._session = opened(ort, path, threads, providers, "CPU")
            metadata = self._session.get_modelmeta().custom_metadata_map
            if metadata.get("sum_bits") == "16" and saturates(processor_features()):
                self._config = {EXACT_SUMS: "0"}  # nothing can saturate, and these kernels take 0.84 of the time
                self._session = None  # frees its weights
                self._session = opened(ort, path, threads, providers, "CPU", config=self._config)
            _LOG.debug("Compiled %s in %.1f s", path, time.perf_counter() - start)
        else:
            self._digest = ""  # there is nothing to store
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

    def keep(self) -> None:
        super().keep()
        if self._digest:
            threading.Thread(target=self._store, name=STORING).start()

    def _store(self) -> None:
        if (file := stored_graph("onnxruntime", self._digest)) is None or _whole(file):  # another process was faster
            return
        try:
            store_cached(file, partial(self._optimize, file))
        except Exception as error:  # noqa: BLE001 - ONNX Runtime has one class for each kind of error
            _LOG.debug("The optimized graph of %s is not stored: %s", self._path, sentence(str(error)))
        super().keep()

    def _optimize(self, file: Path, folder: Path) -> None:
        """Write the optimized graph and its weights into a folder, with the names of stored ones."""
        options = {
            **self._config,
            "session.optimized_model_external_initializers_file_name": stored_weights(file).name,
            "session.optimized_model_external_initializers_min_size_in_bytes": "1024",
            "session.disable_prepacking": "1",  # it copies the weights for the kernels of this session
        }
        onnxruntime_session(self._path, threads=1, config=options, optimized_model_filepath=str(folder / file.name))
        if file_identity(self._path) != self._identity:
            raise OSError(f"{self._path} was changed")

    def _close(self) -> None:
        self._session = self._bindings = None


def _whole(file: Path) -> bool:
    """Return whether a stored graph and its weights are there, unchanged."""
    try:
        digests = json_from(read_cached(file.with_suffix(".json")), str(file))["sha256"]
        return all(map_cached(one, digests[one.name]) is not None for one in (file, stored_weights(file)))
    except (ValueError, KeyError, TypeError):
        return False


def _stored_session(digest: str, threads: int) -> Any:
    """Open the graph that an earlier process optimized; None if there is none."""
    if (file := stored_graph("onnxruntime", digest)) is None or not _whole(file):
        return None
    level = require("onnxruntime", "run ONNX models").GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        return onnxruntime_session(file, threads=threads, graph_optimization_level=level)
    except Exception as error:  # noqa: BLE001 - ONNX Runtime has one class for each kind of error
        _LOG.info("The optimized graph %s is not used: %s", file, sentence(str(error)))
        with contextlib.suppress(OSError):
            file.unlink()
        return None


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
            if not any(
                part in str(error) for part in ("QuantizeLinear", "MatMulIntegerToFloat", "ShapeInferenceError", "float8")
            ):
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
