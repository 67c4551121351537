"""OpenVINO on the CPU: the faster back end on Intel processors."""

from __future__ import annotations

import contextlib
import ctypes
import io
import logging
import mmap
import os
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import IO, Any

import numpy as np

from swin_deploy.bundle import TensorSpec, without_links
from swin_deploy.dependencies import require
from swin_deploy.errors import BackendError, UsageError, sentence
from swin_deploy.files import json_from
from swin_deploy.options import Array

from .base import Feeds, Pool, Runtime, keep_forever
from .openvino_rewrites import excluded_features, rewrite_for_kernels
from .user_cache import (
    STORING,
    file_identity,
    map_cached,
    read_cached,
    store_cached,
    stored_graph,
)

_LOG = logging.getLogger(__name__)
MOST_SIZES = 3  # batch sizes that a model compiles by itself; each holds the weights once more


class OpenVino(Runtime):
    """An ONNX model in OpenVINO, computed in the types of the graph, or in bf16. `threads` 0 lets OpenVINO choose.

    Between the 8-bit layers of a quantized model it computes in bf16 if the processor supports it, which is 4 to 14 % faster.
    The model is compiled for fixed batches only: a free batch is 5 to 20 % slower, and in bf16 its results differ. These are
    the sizes in `batches`; by default one image, the first larger batch that comes, and another one when it comes again.
    Batches of other sizes are run in parts.

    Raises BackendError if OpenVINO cannot load the model, UsageError for bf16 on a processor without it.
    """

    calls_to_warm = 2  # the second call of a batch may compile it

    def __init__(
        self,
        path: Path,
        threads: int = 0,
        device: str = "cpu",
        bf16: bool = False,
        batches: Sequence[int] = (),
        digest: str = "",
    ) -> None:
        ov = self._ov = require("openvino", "run models with the openvino back end")
        if device != "cpu":
            raise UsageError(f"The back end openvino runs on the CPU, not on {device}. Use onnxruntime for a GPU.")
        self._core, self._path, self._compiling = openvino_core(), path, threading.RLock()
        self._file, self._named = file_identity(path), tuple(dict.fromkeys(batches))
        self._fixed: dict[int, Pool[Any]] = {}  # batch size -> the graph that is compiled for it
        self._mapped: list[Any] = []  # files that these graphs refer to
        self._seen: set[int] = set()  # sizes that came once
        self._new: list[tuple[int, Any]] = []  # compiled graphs that are not stored yet
        self._keeping = False
        reported = "BF16" in self._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        self._able = reported and not excluded_features()
        if bf16 and not reported:
            raise UsageError("This processor does not compute in bf16 (it has neither AVX512_BF16 nor AMX). Use fp32.")
        if bf16 and not self._able:
            raise UsageError("ONEDNN_MAX_CPU_ISA forbids bf16, which would be slow then. Use fp32, or unset the variable.")
        self._key = (digest, threads, bf16) if digest else ()
        self._facts: Any = None  # _Facts, when the graph was read or found
        try:
            model = None
            for size in self._named or (1,):
                if (pool := self._imported(size)) is None:
                    model = model or self._read()
                    self._facts = self._facts or _facts_of(model, threads, bf16, self._able)
                    pool = self._compiled(model, size)
                self._fixed[size] = pool
                if not self._facts.any_batch:
                    break
        except RuntimeError as error:
            raise BackendError(f"OpenVINO cannot load {path}: {sentence(str(error))}.") from error
        title = f"openvino {ov.__version__.partition('-')[0]}"  # without the build
        super().__init__(title, self._facts.inputs, self._facts.outputs)

    def _run(self, feeds: Feeds, out: Mapping[str, Array] | None) -> Mapping[str, Array]:
        try:
            return self._graph(len(feeds[self.inputs[0].name])).use(self._infer, feeds, out)
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

    def _parts(self, feeds: Feeds) -> Sequence[int]:
        if not self._facts.any_batch:
            return super()._parts(feeds)
        count = len(feeds[self.inputs[0].name])
        try:
            if count in self._fixed or self._compiled_now(count):
                return ()
        except RuntimeError as error:
            raise BackendError(f"OpenVINO cannot compile {self._path}: {sentence(str(error))}.") from error
        sizes = set(self._fixed)
        if self._facts.quantized and not self._named and (2 in sizes or file_identity(self._path) == self._file):
            sizes = sizes - {1} | {2}  # it rounds 8-bit layers differently for one image, and alike for all larger batches
        return batches_for(count, tuple(sorted(sizes)))

    def _compiled_now(self, count: int) -> bool:
        """Compile a batch if it is the first larger one, or comes again, as the last batch of a data set does not."""
        if self._named or len(self._fixed) >= MOST_SIZES:
            return False
        with self._compiling:
            first = len(self._fixed) == 1
            if len(self._fixed) < MOST_SIZES and (first or (count in self._seen and file_identity(self._path) == self._file)):
                self._graph(count)
            self._seen.add(count)
            return count in self._fixed

    def _graph(self, count: int) -> Pool[Any]:
        """Return the graph for exactly this batch, after compiling it if that was not done yet."""
        size = count if self._facts.any_batch else next(iter(self._fixed))
        if (found := self._fixed.get(size)) is not None:
            return found
        with self._compiling:
            if size not in self._fixed:
                if file_identity(self._path) != self._file:
                    raise BackendError(
                        f"{self._path} was changed or removed after it was loaded, and must be compiled again for batches. "
                        "Load the bundle again."
                    )
                pool = self._imported(size) or self._compiled(self._read(), size)
                self._fixed = {**self._fixed, size: pool}  # other threads iterate over it
            return self._fixed[size]

    def _read(self) -> Any:
        with without_links(self._path) as path:
            return self._core.read_model(str(path))

    def _compiled(self, model: Any, size: int) -> Pool[Any]:
        start, model = time.perf_counter(), model.clone()  # other sizes are compiled from the same model
        if self._facts.any_batch:
            model.reshape({port: [size, *list(port.get_partial_shape())[1:]] for port in model.inputs})
            fixed = _specs(model.outputs)
            self._facts = replace(self._facts, outputs=tuple(map(partial(_of_free_batch, size), self._facts.outputs, fixed)))
        bf16 = self._facts.config["INFERENCE_PRECISION_HINT"] == "bf16"
        rewrite_for_kernels(model, size, bf16, self._facts.quantized)
        compiled = self._core.compile_model(model, "CPU", self._facts.config)
        _LOG.debug("Compiled %s for a batch of %d in %.1f s", self._path, size, time.perf_counter() - start)
        self._new.append((size, compiled))
        if self._keeping:
            self.keep()
        return self._pool_of(compiled)

    def _pool_of(self, compiled: Any) -> Pool[Any]:
        # A request serves one caller at a time. With two, one is prepared while the other computes with all threads.
        most = max(2, compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS"))
        return Pool(compiled.create_infer_request, most)

    def _imported(self, size: int) -> Pool[Any] | None:
        """Return the graph that an earlier process compiled for this batch; None if there is none."""
        file = stored_graph("openvino", size, *self._key) if self._key else None
        if file is None or (found := _mapped_graph(file)) is None:
            return None
        facts, mapped = found
        # OpenVINO refuses arrays that are read-only, but never writes into a compiled model: it maps its own in the same way.
        start = np.frombuffer(mapped, np.uint8).ctypes.data
        content = np.ctypeslib.as_array((ctypes.c_ubyte * len(mapped)).from_address(start))
        try:
            compiled = self._core.import_model(self._ov.Tensor(content, shared_memory=True), "CPU", facts.config)
        except RuntimeError as error:
            _LOG.info("The compiled graph %s is not used: %s", file, sentence(str(error)))
            with contextlib.suppress(OSError):
                file.unlink()
            return None
        self._facts = self._facts or facts
        self._mapped.append(mapped)
        if hasattr(mmap, "MADV_DONTNEED"):  # most of it was only copied; what is read again is mapped again
            mapped.madvise(mmap.MADV_DONTNEED)
        return self._pool_of(compiled)

    def keep(self) -> None:
        super().keep()
        self._keeping = True
        new, self._new = self._new, []
        if self._key and new:
            threading.Thread(target=self._store, args=(new,), name=STORING).start()

    def _store(self, compiled: list[tuple[int, Any]]) -> None:
        for size, graph in compiled:
            file = stored_graph("openvino", size, *self._key)
            if file is not None and _mapped_graph(file) is None:  # no other process was faster
                with contextlib.suppress(RuntimeError):
                    store_cached(file, partial(_write, graph, file.name), **asdict(self._facts))

    def _close(self) -> None:
        self._fixed = {}
        self._new = []
        self._mapped = []  # after what refers to it


def _mapped_graph(file: Path) -> tuple[_Facts, mmap.mmap] | None:
    """Return a stored graph and what is known about it; None if it is not there or not whole."""
    try:
        stated = json_from(read_cached(file.with_suffix(".json")), str(file))
        facts = _Facts(_specs_from(stated["inputs"]), _specs_from(stated["outputs"]), stated["config"], stated["quantized"])
        mapped = map_cached(file, stated["sha256"][file.name])
    except (ValueError, KeyError, TypeError):
        return None
    return (facts, mapped) if mapped is not None else None


def _write(graph: Any, name: str, folder: Path) -> None:
    """Write a compiled graph, of which OpenVINO would make a copy in memory."""
    with (folder / name).open("wb") as file:
        graph.export_model(_Stream(file))


class _Stream(io.BytesIO):
    """Passes everything on to a file. OpenVINO only writes into a BytesIO."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__()
        self.write, self.seek, self.tell = file.write, file.seek, file.tell  # type: ignore[method-assign]


@dataclass(frozen=True)
class _Facts:
    """What is known about a graph: inputs and outputs, how to compile it, and whether it has 8-bit layers."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    config: dict[str, Any]
    quantized: bool

    @property
    def any_batch(self) -> bool:
        """Whether the graph takes batches of any size."""
        return all(spec.shape[0] == "batch" for spec in self.inputs)


def _facts_of(model: Any, threads: int, bf16: bool, able: bool) -> _Facts:
    nodes = model.get_ops()
    quantized = any(node.get_type_name() == "FakeQuantize" for node in nodes)
    # By default OpenVINO computes fp32 models in bf16 on processors that support it.
    hint = "bf16" if bf16 or (quantized and able) else "f32"
    config = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": threads}
    if threads:  # OpenVINO would bind the threads of every model and process to the same first cores
        config["ENABLE_CPU_PINNING"] = False
    if any(map(_is_tiny_attention, nodes)):
        config["SNIPPETS_MODE"] = "DISABLE"  # OpenVINO 2026 crashes while it compiles some windows of 2x2 tokens
    return _Facts(_specs(model.inputs), _specs(model.outputs), config, quantized)


def _specs_from(stated: list[dict[str, Any]]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(one["name"], one["dtype"], tuple(one["shape"])) for one in stated)


@lru_cache(256)
def batches_for(count: int, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Return the fastest way to run `count` images in batches of these sizes, largest first; the last may be padded.

    A call takes as long as a quarter of an image, and each of its images the same time: measured with Swin-T and SwinV2-T.
    """
    best: list[tuple[float, int]] = [(0, 0)]  # for each number of images: the time, in images, and one of the batches
    for images in range(1, count + 1):
        best.append(min((size + 0.25 + best[max(0, images - size)][0], -size) for size in sizes))
    found = []
    while count > 0:
        found.append(-best[count][1])
        count -= found[-1]
    return tuple(sorted(found, reverse=True))


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


def _of_free_batch(size: int, spec: TensorSpec, fixed: TensorSpec) -> TensorSpec:
    """Return `spec` with the shape of `fixed`, its version for `size` images, and a free first axis ("batch" or "n*batch")."""
    first = fixed.shape[0]
    if spec.shape[0] != "batch" or "batch" in spec.shape[1:] or not isinstance(first, int):
        return spec
    return TensorSpec(spec.name, spec.dtype, ("batch" if first == size else f"{first // size}*batch", *spec.shape[1:]))


def _specs(ports: list[object]) -> tuple[TensorSpec, ...]:
    specs = []
    for port in ports:
        sizes = port.get_partial_shape()  # type: ignore[attr-defined]
        shape = tuple("batch" if size.is_dynamic else size.get_length() for size in sizes)
        dtype = np.dtype(port.get_element_type().to_dtype()).name  # type: ignore[attr-defined]
        specs.append(TensorSpec(port.get_any_name(), dtype, shape))  # type: ignore[attr-defined]
    return tuple(specs)
