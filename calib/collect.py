"""collect: one pass over data through ONNX Runtime, in which chosen tensors of a graph are observed; resumable and cached.

What is known after each batch is a value of its own, so that what is written to disk is never half of a batch. A pass that was
stopped, in whatever way, is taken up at the last batch that was written and ends with the same bits.
"""

from __future__ import annotations

import hashlib
import os
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from swin_deploy.bundle import disk_errors, sha256_of, write_whole
from swin_deploy.dependencies import onnxruntime_session, require
from swin_deploy.errors import BackendError, InputError, UsageError
from swin_deploy.specs import Array

from .observers import HALF, Observation, from_arrays, to_arrays

if TYPE_CHECKING:
    import onnx


def largest_values(
    model: onnx.ModelProto, data: Data, *, batch: int = 1, progress: Progress | None = None, threads: int = 0
) -> dict[str, float]:
    """Every float32 value that a node of `model` writes, by name -> its largest absolute value over all of `data`.

    `model` holds its weights, and types of inner values in value_info; it is not changed. The maximum is taken in the graph, so
    that memory is that of running it. `progress(done, total)` counts samples. Raises InputError where a value is not finite.
    """
    require("onnx", "observe the values of a graph")
    import numpy as np
    import onnx
    from onnx import TensorProto, helper

    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    floats = {
        value.name
        for value in (*model.graph.value_info, *model.graph.output)
        if value.type.tensor_type.elem_type == TensorProto.FLOAT
    }
    names = [name for node in model.graph.node for name in node.output if name in floats]
    for name in names:
        watched.graph.node.append(helper.make_node("Abs", [name], [f"{name}/absolute"]))
        watched.graph.node.append(helper.make_node("ReduceMax", [f"{name}/absolute"], [f"{name}/largest"], keepdims=0))
    asked = [f"{name}/largest" for name in names]
    run = session_for(watched, asked, threads)
    largest = np.zeros(len(names))
    done = 0
    for feeds in data.batches(batch):
        values = run(feeds)
        found = np.array([values[name] for name in asked], dtype=np.float64)
        if not np.isfinite(found).all():
            name = names[int(np.flatnonzero(~np.isfinite(found))[0])]
            raise InputError(
                f"The value {name} of the fp32 graph is not finite on the calibration samples from number {done} on. Expected "
                f"images like those that the network was trained on; leave these out."
            )
        largest = np.maximum(largest, found)
        done += len(next(iter(feeds.values())))
        if progress is not None:
            progress(done, len(data))
    return dict(zip(names, largest.tolist(), strict=True))


Progress = Callable[[int, int], None]
State = tuple[int, dict[str, Observation]]  # how many samples were seen, and what they showed
CACHE = ".calibration"  # where a bundle's observations may be kept, a folder in it
FORMAT = 1  # of the files; another number makes none of the old ones found


class Data(Protocol):
    """What a pass is made over (data.Samples is one): its size, what it is, and batches of feeds from any sample on."""

    @property
    def fingerprint(self) -> str: ...

    def __len__(self) -> int: ...

    def batches(self, size: int, start: int = 0) -> Iterator[dict[str, Array]]: ...


def collect(
    model: str | os.PathLike[str] | onnx.ModelProto,
    tensors: Sequence[str],
    data: Data,
    *,
    batch: int = 8,
    cache: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    threads: int = 0,
    every: float = 10.0,
) -> dict[str, Observation]:
    """An observation of each of `tensors` of the graph `model`, a file or a loaded one with its weights, over all of `data`.

    Memory is that of the model, one batch with the tensors' values, and about 0.3 MB a tensor. `cache` is a folder (for a
    bundle, CACHE in it): every `every` seconds, and at an interrupt, what is known so far is written there, and a pass over the
    same graph, data and batch size resumes from it; finished observations are kept and cost no further pass.
    `progress(done, total)` counts samples. Raises UsageError for a tensor that the graph does not have, InputError for one
    that becomes NaN.
    """
    wanted = tuple(dict.fromkeys(tensors))
    store = None if cache is None else _Store(Path(cache), _key(model, data, batch))
    known = {} if store is None else store.finished()
    missing = tuple(name for name in wanted if name not in known)
    if missing:
        state: State = (0, {}) if store is None else store.begun(missing)
        run = session_for(model, missing, threads)
        saved = time.monotonic()
        try:
            for feeds in data.batches(batch, state[0]):
                state = _advanced(state, run(feeds), missing, len(next(iter(feeds.values()))))
                if progress is not None:
                    progress(state[0], len(data))
                if store is not None and state[0] < len(data) and time.monotonic() - saved >= every:
                    store.keep(*state)
                    saved = time.monotonic()
        except KeyboardInterrupt:
            if store is not None:
                store.keep(*state)
            raise
        known = {**known, **state[1]}
        if store is not None:
            store.finish(known)
    return {name: known[name] for name in wanted}


def _advanced(state: State, values: Mapping[str, Array], tensors: Sequence[str], count: int) -> State:
    """The state after a further batch of `count` samples."""
    done, before = state
    fresh = {name: Observation.of(values[name], count, f"The tensor {name}") for name in tensors}
    return done + count, {name: before[name].merged(one) if name in before else one for name, one in fresh.items()}


class _Store:
    """Two files of a folder: observations that are finished, and those of a pass that is not."""

    def __init__(self, folder: Path, key: str) -> None:
        self._whole, self._part = folder / f"ranges-{key[:32]}.npz", folder / f"ranges-{key[:32]}.partial.npz"
        self._key = key

    def finished(self) -> dict[str, Observation]:
        arrays = self._read(self._whole)
        return {} if arrays is None else from_arrays(arrays)

    def begun(self, tensors: Sequence[str]) -> State:
        """How many samples a stopped pass over the same tensors has seen, and what it knows."""
        arrays = self._read(self._part)
        if arrays is None or tuple(arrays["names"]) != tuple(tensors):
            return 0, {}
        return int(arrays["done"]), from_arrays(arrays)

    def keep(self, done: int, observations: Mapping[str, Observation]) -> None:
        self._write(self._part, {"done": np.int64(done), **to_arrays(observations)})

    def finish(self, observations: Mapping[str, Observation]) -> None:
        self._write(self._whole, to_arrays(observations))
        with disk_errors(self._part):
            self._part.unlink(missing_ok=True)

    def _read(self, path: Path) -> dict[str, Array] | None:
        """The arrays of a file; None for one that is absent, damaged or of another key: all that can be made again."""
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = dict(file)  # every array is checked against its CRC-32
            return arrays if str(arrays["key"]) == self._key else None
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None

    def _write(self, path: Path, arrays: Mapping[str, Any]) -> None:
        def write(scratch: Path) -> None:
            with scratch.open("wb") as file:
                np.savez_compressed(file, key=np.array(self._key), **arrays)
                file.flush()
                os.fsync(file.fileno())

        write_whole(path, write)


def _key(model: str | os.PathLike[str] | onnx.ModelProto, data: Data, batch: int) -> str:
    """What decides the bits of an observation: the graph and its weights, the data, and how it is computed."""
    ort = require("onnxruntime", "run the graph on calibration data")
    digest = hashlib.sha256(f"{FORMAT} {HALF} {batch} {ort.__version__} {data.fingerprint} ".encode())
    if isinstance(model, str | os.PathLike):
        digest.update(sha256_of(Path(model)).encode())
        for location in _weight_files(_graph(model)):
            digest.update(sha256_of(Path(model).parent / location).encode())
    else:
        digest.update(model.SerializeToString(deterministic=True))
    return digest.hexdigest()


def _graph(model: str | os.PathLike[str] | onnx.ModelProto) -> onnx.ModelProto:
    """A copy of the graph to be changed; weights in files of their own stay there."""
    require("onnx", "observe tensors of a graph")
    import onnx

    if isinstance(model, str | os.PathLike):
        return onnx.load(str(model), load_external_data=False)
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy


def _weight_files(model: onnx.ModelProto) -> list[str]:
    return sorted({e.value for t in model.graph.initializer for e in t.external_data if e.key == "location"})


def session_for(
    model: str | os.PathLike[str] | onnx.ModelProto, tensors: Sequence[str], threads: int
) -> Callable[[Mapping[str, Array]], Mapping[str, Array]]:
    """A function from feeds to the values of `tensors`."""
    import onnx

    require("onnxruntime", "run the graph on calibration data")
    graph = _graph(model)
    given = {value.name for value in graph.graph.input}
    made = {name for node in graph.graph.node for name in node.output if name}
    if unknown := [name for name in tensors if name not in given | made]:
        raise UsageError(
            f'The graph has no tensor "{unknown[0]}", which was to be observed. Name an input, or a node\'s output.'
        )
    asked = [name for name in tensors if name in made]
    del graph.graph.output[:]
    graph.graph.output.extend(onnx.ValueInfoProto(name=name) for name in asked)
    config = {}
    if isinstance(model, str | os.PathLike):
        config["session.model_external_initializers_file_folder_path"] = str(Path(model).resolve().parent)
    try:  # a memory arena would hold the memory of the largest batch twice
        session = onnxruntime_session(graph.SerializeToString(), threads=threads, config=config, enable_cpu_mem_arena=False)
    except Exception as error:
        raise BackendError(f"ONNX Runtime cannot load the graph to be observed: {' '.join(str(error).split())}") from error

    def run(feeds: Mapping[str, Array]) -> Mapping[str, Array]:
        needed = {value.name: feeds[value.name] for value in session.get_inputs()}
        try:
            results = session.run(asked, needed) if asked else []
        except Exception as error:
            raise BackendError(f"ONNX Runtime failed on calibration data: {' '.join(str(error).split())}") from error
        return {**feeds, **dict(zip(asked, results, strict=True))}

    return run
