"""Run calibration data through a graph in ONNX Runtime and observe its tensors.

An interrupted pass resumes after the last batch saved and gives the same bits as an uninterrupted one.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from swin_deploy.bundle import disk_errors, sha256_of, without_links, write_whole
from swin_deploy.dependencies import onnxruntime_session, require
from swin_deploy.errors import BackendError, InputError, UsageError, sentence
from swin_deploy.files import read_arrays
from swin_deploy.options import Array, Progress, no_progress

from .observers import HALF, Observation, from_arrays, to_arrays

if TYPE_CHECKING:
    import onnx

CACHE = ".calibration"  # folder in a bundle for cached observations
PHASE = "Measuring ranges"
WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"
State = tuple[int, dict[str, Observation]]  # number of samples seen, and their observations
CACHE_BYTES = 1 << 31  # of the arrays in one cache file; a tensor takes 0.3 MB
_FORMAT = 2  # of the cache files; files of another format are ignored


class CalibrationData(Protocol):
    """The part of calib.data.Samples that a pass needs."""

    @property
    def fingerprint(self) -> str: ...

    def __len__(self) -> int: ...

    def batches(self, size: int, start: int = 0) -> Iterator[dict[str, Array]]: ...


def collect(
    model: str | os.PathLike[str] | onnx.ModelProto,
    tensors: Sequence[str],
    data: CalibrationData,
    *,
    batch: int = 8,
    cache: str | os.PathLike[str] | None = None,
    progress: Progress = no_progress,
    threads: int = 0,
    every: float = 10.0,
) -> dict[str, Observation]:
    """Observe tensors of a graph over all of `data`.

    Memory use is that of the model and one batch with the observed values, plus about 0.3 MB per tensor.

    Args:
        model: An ONNX file, or a loaded graph with its weights.
        tensors: Names of inputs and node outputs. UsageError is raised if the graph has no such tensor.
        data: Calibration samples. InputError is raised if a value is NaN or infinite.
        batch: Samples per run.
        cache: Folder for observations. The state of an unfinished pass is saved there; a pass over the same graph, data and
            batch size resumes from it. Finished observations are reused.
        progress: Called after each batch, in samples.
        threads: Number of CPU threads; 0 for ONNX Runtime's default.
        every: Seconds between two saves of an unfinished pass.
    """
    wanted = tuple(dict.fromkeys(tensors))
    store = None if cache is None else _Store(Path(cache), _key(model, data, batch))
    known = {} if store is None else store.finished()
    missing = tuple(name for name in wanted if name not in known)
    if missing:
        state: State = (0, {}) if store is None else store.unfinished(missing)
        run = session_for(model, missing, threads)
        saved = time.monotonic()
        try:
            for feeds in data.batches(batch, state[0]):
                values, count = run(feeds), len(next(iter(feeds.values())))
                fresh = {name: Observation.of(values[name], count, f"The tensor {name}") for name in missing}
                before = state[1]
                merged = {name: before[name].merged(one) if name in before else one for name, one in fresh.items()}
                state = (state[0] + count, merged)
                progress(PHASE, state[0], len(data))
                if store is not None and state[0] < len(data) and time.monotonic() - saved >= every:
                    store.save(*state)
                    saved = time.monotonic()
        except KeyboardInterrupt:
            if store is not None:
                store.save(*state)
            raise
        known = {**known, **state[1]}
        if store is not None:
            store.finish(known)
    return {name: known[name] for name in wanted}


def amax_of_values(
    model: onnx.ModelProto, data: CalibrationData, *, batch: int = 1, progress: Progress = no_progress, threads: int = 0
) -> dict[str, float]:
    """Return the amax of every float32 value in a graph over all of `data`. It is computed in the graph to save memory.

    `model` holds its weights and the types of its values in value_info; it is not changed. Raises InputError for NaN.
    """
    require("onnx", "observe the values of a graph")
    from onnx import TensorProto, helper

    watched = _copy(model)
    floats = {
        value.name
        for value in (*model.graph.value_info, *model.graph.output)
        if value.type.tensor_type.elem_type == TensorProto.FLOAT
    }
    names = [name for node in model.graph.node for name in node.output if name in floats]
    for name in names:
        watched.graph.node.append(helper.make_node("Abs", [name], [f"{name}/absolute"]))
        watched.graph.node.append(helper.make_node("ReduceMax", [f"{name}/absolute"], [f"{name}/amax"], keepdims=0))
    outputs = [f"{name}/amax" for name in names]
    run = session_for(watched, outputs, threads)
    amax = np.zeros(len(names))
    done = 0
    for feeds in data.batches(batch):
        values = run(feeds)
        found = np.array([values[name] for name in outputs], dtype=np.float64)
        if not np.isfinite(found).all():
            name = names[int(np.flatnonzero(~np.isfinite(found))[0])]
            raise InputError(
                f"The value {name} of the fp32 graph is not finite for the calibration samples from number {done} on. "
                f"Expected images like those that the network was trained on. Remove these samples."
            )
        amax = np.maximum(amax, found)
        done += len(next(iter(feeds.values())))
        progress(PHASE, done, len(data))
    return dict(zip(names, amax.tolist(), strict=True))


def session_for(
    model: str | os.PathLike[str] | onnx.ModelProto, tensors: Sequence[str], threads: int
) -> Callable[[Mapping[str, Array]], Mapping[str, Array]]:
    """Open a graph in ONNX Runtime and return a function from feeds to the values of `tensors`."""
    import onnx

    require("onnxruntime", "run the graph on calibration data")
    graph = _copy(model)
    inputs = {value.name for value in graph.graph.input}
    outputs = {name for node in graph.graph.node for name in node.output if name}
    if unknown := [name for name in tensors if name not in inputs | outputs]:
        raise UsageError(f'The graph has no tensor "{unknown[0]}". Expected the name of an input or of a node\'s output.')
    fetched = [name for name in tensors if name in outputs]
    del graph.graph.output[:]
    graph.graph.output.extend(onnx.ValueInfoProto(name=name) for name in fetched)
    try:
        with contextlib.nullcontext() if isinstance(model, onnx.ModelProto) else without_links(Path(model)) as file:
            folder = {} if file is None else {WEIGHTS_FOLDER: str(file.absolute().parent)}
            # A memory arena would hold the memory of the largest batch twice.
            session = onnxruntime_session(graph.SerializeToString(), threads=threads, config=folder, enable_cpu_mem_arena=False)
    except Exception as error:
        raise BackendError(f"ONNX Runtime cannot load the graph for calibration: {sentence(str(error))}.") from error

    def run(feeds: Mapping[str, Array]) -> Mapping[str, Array]:
        needed = {value.name: feeds[value.name] for value in session.get_inputs()}
        try:
            results = session.run(fetched, needed) if fetched else []
        except Exception as error:
            raise BackendError(f"ONNX Runtime failed on calibration data: {sentence(str(error))}.") from error
        return {**feeds, **dict(zip(fetched, results, strict=True))}

    return run


class _Store:
    """Two files in a cache folder: finished observations, and those of an unfinished pass."""

    def __init__(self, folder: Path, key: str) -> None:
        self._whole, self._part = folder / f"ranges-{key[:32]}.npz", folder / f"ranges-{key[:32]}.partial.npz"
        self._key = key

    def finished(self) -> dict[str, Observation]:
        return _observations(load_arrays(self._whole, self._key))[1]

    def unfinished(self, tensors: Sequence[str]) -> State:
        state = _observations(load_arrays(self._part, self._key))
        return state if tuple(state[1]) == tuple(tensors) else (0, {})

    def save(self, done: int, observations: Mapping[str, Observation]) -> None:
        save_arrays(self._part, self._key, {"done": np.int64(done), **to_arrays(observations)})

    def finish(self, observations: Mapping[str, Observation]) -> None:
        save_arrays(self._whole, self._key, to_arrays(observations))
        with disk_errors(self._part):
            self._part.unlink(missing_ok=True)


def _observations(arrays: Mapping[str, Array] | None) -> State:
    """Return the state in a cache file; an empty one if it holds anything else, since it can be made again."""
    try:
        return (0, {}) if arrays is None else (int(arrays.get("done", 0)), from_arrays(arrays))
    except (ValueError, KeyError, TypeError):
        return 0, {}


def load_arrays(path: Path, key: str) -> dict[str, Array] | None:
    """Return the arrays of a file; None if it is missing, damaged or has another key, since it can be made again."""
    try:
        arrays = read_arrays(path, CACHE_BYTES)
        return arrays if str(arrays["key"]) == key else None
    except (InputError, ValueError, KeyError):
        return None


def save_arrays(path: Path, key: str, arrays: Mapping[str, Any], compress: bool = True) -> None:
    """Write arrays and their key to a file, atomically. Raises BundleError if that fails."""
    save = np.savez_compressed if compress else np.savez

    def write(scratch: Path) -> None:
        with scratch.open("wb") as file:
            save(file, key=np.array(key), **arrays)
            file.flush()
            os.fsync(file.fileno())

    write_whole(path, write)


def _key(model: str | os.PathLike[str] | onnx.ModelProto, data: CalibrationData, batch: int) -> str:
    """Hash everything that decides the bits of an observation: graph, weights, data, and how it is computed."""
    ort = require("onnxruntime", "run the graph on calibration data")
    digest = hashlib.sha256(f"{_FORMAT} {HALF} {batch} {ort.__version__} {data.fingerprint} ".encode())
    if isinstance(model, str | os.PathLike):
        digest.update(sha256_of(Path(model)).encode())
        tensors = _copy(model).graph.initializer
        for location in sorted({e.value for t in tensors for e in t.external_data if e.key == "location"}):
            digest.update(sha256_of(Path(model).parent / location).encode())
    else:
        digest.update(model.SerializeToString(deterministic=True))
    return digest.hexdigest()


def _copy(model: str | os.PathLike[str] | onnx.ModelProto) -> onnx.ModelProto:
    """Load or copy a graph; external weights stay in their files."""
    require("onnx", "observe tensors of a graph")
    import onnx

    if isinstance(model, str | os.PathLike):
        return onnx.load(str(model), load_external_data=False)
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy
