"""The interface of all back ends. Inputs and outputs are checked here, once for all of them."""

from __future__ import annotations

import os
import re
import threading
import weakref
from _thread import LockType, allocate_lock, get_ident
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np

from swin_deploy.bundle import TensorSpec
from swin_deploy.errors import BackendError, InputError
from swin_deploy.options import Array
from swin_deploy.tasks import PIXELS

from .dlpack import DeviceTensor, from_dlpack

if TYPE_CHECKING:
    from typing_extensions import Self

T = TypeVar("T")
R = TypeVar("R")
Feeds = dict[str, Any]  # contiguous, aligned numpy arrays; or DeviceTensor, for a runtime on a GPU


@dataclass(frozen=True)
class EngineFile:
    """An engine file whose sha256 was checked, with the inputs and outputs of its graph.

    `host_code`: it contains a runtime of its own, as version-compatible engines do. `cache`: where TensorRT for RTX stores the
    kernels that it compiles for this GPU. `again`: the command that compiles the engine again.
    """

    path: Path
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    host_code: bool = False
    cache: Path | None = None
    again: str = "swin-deploy build-engine"


class Runtime(ABC):
    """A loaded model. Any number of threads may call `run`.

    A back end implements `_run`, which must be thread-safe, and, if it holds resources, `_close`, which is called when no
    thread is inside `_run`, and once more if it was interrupted. `title` is library and version ("onnxruntime 1.31.1"),
    `device` is "cpu" or "cuda:0". After `calls_to_warm` calls of one shape further calls are not faster; `calls_at_once` calls
    keep the device busy.
    """

    calls_to_warm = 1
    calls_at_once = 1
    device_tensor: Callable[[Any, str], DeviceTensor] | None = None  # views a tensor on this runtime's GPU; None on the CPU

    def __init__(
        self, title: str, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...], device: str = "cpu"
    ) -> None:
        self.static_batch = static_batch_of(inputs)  # the number of images that the graph takes, if it is fixed
        self.inputs, self.outputs = of_any_batch(inputs, self.static_batch), of_any_batch(outputs, self.static_batch)
        self.title, self.device = title, device
        self._known = frozenset(spec.name for spec in inputs)
        self._closed = self._freed = self._forked = False
        self._process = os.getpid()
        self._calls: dict[LockType, int] = {}  # a held lock and the thread of every running call
        self._freeing = threading.RLock()
        _LOADED.add(self)

    def run(self, feeds: Mapping[str, Any], out: Mapping[str, Array] | None = None) -> Mapping[str, Array]:
        """Run the model on a numpy array, or tensor with `__dlpack__`, for each input; fill and return `out` if given.

        Raises InputError for an array that does not fit, BackendError if the back end failed or the model is closed. After an
        error the model can be run again.
        """
        ready, free = self._checked(feeds)
        shapes = [resolved(spec.shape, free) for spec in self.outputs]
        if out is not None:
            self._check_out(out, shapes, ready)
        # An interrupt may come after any call. A `with` on a plain lock and a single operation on a dict are safe.
        call = allocate_lock()
        with call:
            try:
                self._calls[call] = get_ident()
                if self._closed:
                    raise BackendError(self._refusal())
                if None in shapes:  # the graph does not state the shapes of its outputs
                    found = self._run(ready, None)
                    return found if out is None else _copied(found, out)
                if out is not None:
                    self._run_all(ready, out)
                    return out
                made = {spec.name: np.empty(shape or (), spec.dtype) for spec, shape in zip(self.outputs, shapes, strict=True)}
                self._run_all(ready, made)
                return made
            finally:
                self._calls.pop(call, None)
                if self._closed and not self._calls:
                    self._free()

    def close(self) -> None:
        """Wait for running calls, then free the resources of the back end. Closing twice has no effect.

        In a signal handler that interrupted `run`, it does not wait: the end of that call frees the resources.
        """
        if self._forked:
            return
        self._closed = True
        while calls := self._calls.copy():
            if get_ident() in calls.values():
                return
            for call in calls:
                with call:
                    pass
                self._calls.pop(call, None)
        self._free()

    def keep(self) -> None:
        """Prepare for long use: return the memory that only loading needed to the system, and store what was compiled."""
        with suppress(AttributeError, OSError, TypeError):  # not glibc, which keeps up to half as much again
            import ctypes

            ctypes.CDLL(None).malloc_trim(0)

    def _free(self) -> None:
        if self._forked:  # a thread of the parent may have held the lock
            return
        with self._freeing:
            if not self._freed:
                self._close()
                self._freed = True

    def _refusal(self) -> str:
        if self._forked:
            return (
                f"This model was loaded in process {self._process} and cannot run in its fork, process {os.getpid()}. Load it "
                'in each process, or start processes with "spawn" or "forkserver".'
            )
        return "This model is closed. Load it again to run it."

    @property
    def forked(self) -> bool:
        """Whether this process is a fork of the one that loaded the model."""
        return self._forked

    def leave_to_parent(self) -> None:
        """Refuse to run, and never free anything: the threads of the back end are not in this fork."""
        self._closed = self._forked = True
        keep_forever(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _run_all(self, feeds: Feeds, out: Mapping[str, Array]) -> None:
        """Run `feeds`, split into the batches of `_parts`. The last one is padded with its last image."""
        if not (parts := self._parts(feeds)):
            self._run(feeds, out)
            return
        start, count = 0, len(feeds[self.inputs[0].name])
        for size in parts:
            missing = max(0, start + size - count)
            part = {name: _part(feed, start, size, missing) for name, feed in feeds.items()}
            wanted = {name: (array, len(array) // count) for name, array in out.items()}
            made = {name: np.empty((size * rows, *array.shape[1:]), array.dtype) for name, (array, rows) in wanted.items()}
            self._run(part, made)
            for name, (array, rows) in wanted.items():
                array[start * rows : (start + size) * rows] = made[name][: (size - missing) * rows]
            start += size

    def _parts(self, feeds: Feeds) -> Sequence[int]:
        """Return the batch sizes that `feeds` are run in, which together hold all images; empty to run them as they are."""
        size, count = self.static_batch, 0 if self.static_batch is None else feeds[PIXELS].shape[0]
        return () if size is None or size == count else (size,) * -(-count // size)

    @abstractmethod
    def _run(self, feeds: Feeds, out: Mapping[str, Array] | None) -> Mapping[str, Array]:
        """Fill the contiguous arrays of `out` and return it; return new arrays if it is None."""

    def _close(self) -> None:  # noqa: B027 - most back ends free everything with their last reference
        pass

    def _checked(self, feeds: Mapping[str, Any]) -> tuple[Feeds, dict[str, int]]:
        """Return `feeds` as a back end needs them, and the size of every free axis."""
        if not isinstance(feeds, Mapping):
            raise InputError(f"The inputs are a {type(feeds).__name__}. Expected a dict with {_listed(self.inputs)}.")
        for name in feeds:
            if name not in self._known:
                raise InputError(f'The model has no input "{name}". Its inputs are: {_listed(self.inputs)}.')
        ready: Feeds = {}
        free: dict[str, int] = {}
        for spec in self.inputs:
            if spec.name not in feeds:
                raise InputError(f'The input "{spec.name}" is missing. The model takes {_listed(self.inputs)}.')
            array = feeds[spec.name]
            if not isinstance(array, np.ndarray | DeviceTensor):
                array = from_dlpack(spec, array, self.device, self.device_tensor)
            _check_array(spec, array, f'The input "{spec.name}"')
            for axis, size in zip(spec.shape, array.shape, strict=True):
                if isinstance(axis, str) and free.setdefault(axis, size) != size:
                    other = next(one.name for one in self.inputs if axis in one.shape)
                    raise InputError(
                        f'The input "{spec.name}" has a {axis} of {size}, and "{other}" one of {free[axis]}. Pass equal sizes.'
                    )
            if isinstance(array, DeviceTensor):
                if array.device != self.device:
                    raise InputError(
                        f'The input "{spec.name}" is on {array.device}, and the model runs on {self.device}. Move it there '
                        "first, or load the model for that device."
                    )
            elif not (array.flags.c_contiguous and array.flags.aligned):
                array = np.require(array, requirements=["C", "A"])
            ready[spec.name] = array
        return ready, free

    def _check_out(self, out: Mapping[str, Array], shapes: list[tuple[int, ...] | None], feeds: Feeds) -> None:
        if not isinstance(out, Mapping):
            raise InputError(f"out is a {type(out).__name__}. Expected a dict with {_listed(self.outputs)}.")
        used = [(name, array) for name, array in feeds.items() if isinstance(array, np.ndarray)]
        if len(out) != len(self.outputs) or any(spec.name not in out for spec in self.outputs):
            raise InputError(
                f"out has {', '.join(map(str, out)) or 'no arrays'}. Expected an array for each of {_listed(self.outputs)}."
            )
        for spec, shape in zip(self.outputs, shapes, strict=True):
            array, what = out[spec.name], f'The array for the output "{spec.name}"'
            if not isinstance(array, np.ndarray):
                raise InputError(f"{what} is a {type(array).__name__}. Expected a numpy array, {spec}.")
            _check_array(TensorSpec(spec.name, spec.dtype, shape or array.shape), array, what)
            if not (array.flags.c_contiguous and array.flags.aligned and array.flags.writeable):
                raise InputError(f"{what} is read-only or not contiguous. Expected a writeable, contiguous array.")
            for name, other in used:
                if np.may_share_memory(array, other):
                    raise InputError(f'{what} shares memory with "{name}". Expected separate arrays.')
            used.append((spec.name, array))


class Pool(Generic[T]):
    """Objects that serve one thread at a time, created as they are needed, up to a number.

    A thread that comes when all are in use waits. The object used last is handed out first, so that a single thread always
    gets the same one.
    """

    def __init__(self, make: Callable[[], T], most: int) -> None:
        self._make = make
        self._free: list[T] = []
        self._places = Places(most)

    def use(self, work: Callable[..., R], *arguments: Any) -> R:
        """Return `work(object, *arguments)`. After an error or interrupt the object is dropped: its state is unknown."""
        for _ in self._places.taken:
            try:
                try:
                    item = self._free.pop()  # appending and popping are atomic
                except IndexError:
                    item = self._make()
                found = work(item, *arguments)
                self._free.append(item)
                return found
            finally:
                self._places.give_back(True)
        raise AssertionError

    def drain(self) -> list[T]:
        """Remove and return the objects that are not in use."""
        free, self._free = self._free, []
        return free


class Places:
    """A semaphore that loses no place to an interrupt: `for _ in places.taken: try: ... finally: places.give_back(True)`.

    Python handles signals after calls and jumps, and `threading.Semaphore` consists of those. A `for` statement takes and
    stores an item without either, and a `SimpleQueue` is implemented in C.
    """

    def __init__(self, count: int) -> None:
        free: SimpleQueue[bool] = SimpleQueue()
        self.give_back, self.count_free = free.put, free.qsize
        self.taken = iter(free.get, None)
        for _ in range(count):
            free.put(True)


_LOADED: weakref.WeakSet[Runtime] = weakref.WeakSet()


def keep_forever(value: object) -> None:
    """Never free `value`, not even when the interpreter exits."""
    import ctypes

    ctypes.pythonapi.Py_IncRef(ctypes.py_object(value))


def _leave_all_to_parent() -> None:
    """Runs in a new process after a fork."""
    for runtime in tuple(_LOADED):
        runtime.leave_to_parent()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_all_to_parent)


def static_batch_of(inputs: tuple[TensorSpec, ...]) -> int | None:
    """Return the number of images that a graph with these inputs takes; None if any number."""
    first = inputs[0].shape[0] if inputs and inputs[0].name == PIXELS and inputs[0].shape else None
    return first if isinstance(first, int) else None


def of_any_batch(specs: tuple[TensorSpec, ...], size: int | None) -> tuple[TensorSpec, ...]:
    """Return `specs` of a graph for `size` images with a free batch; unchanged if `size` is None."""
    if size is None:
        return specs
    rows = [int(spec.shape[0]) // size for spec in specs]
    axes = ["batch" if each == 1 else f"{each}*batch" for each in rows]
    return tuple(replace(spec, shape=(axis, *spec.shape[1:])) for spec, axis in zip(specs, axes, strict=True))


def _part(feed: Any, start: int, size: int, missing: int) -> Array:
    if isinstance(feed, DeviceTensor):
        raise InputError(f"The graph takes {size} images at a time. Pass tensors on the GPU for exactly {size} images.")
    part = feed[start : start + size]
    return np.concatenate([part, np.repeat(part[-1:], missing, axis=0)]) if missing else part


def resolved(shape: tuple[int | str, ...], free: Mapping[str, int]) -> tuple[int, ...] | None:
    """Return `shape`, such as ("batch", 10) or ("16*batch", 2), with the sizes of its free axes; None if one is unknown."""
    sizes = []
    for size in shape:
        if isinstance(size, int):
            sizes.append(size)
        elif size in free:
            sizes.append(free[size])
        elif (match := re.fullmatch(r"(\d+)\*(\w+)", str(size))) and match[2] in free:
            sizes.append(int(match[1]) * free[match[2]])
        else:
            return None
    return tuple(sizes)


def _copied(found: Mapping[str, Array], out: Mapping[str, Array]) -> Mapping[str, Array]:
    for name, array in found.items():
        if out[name].shape != array.shape:
            raise InputError(
                f'The output "{name}" has shape {list(array.shape)}, and its array in out has {list(out[name].shape)}.'
            )
        np.copyto(out[name], array)
    return out


def _check_array(spec: TensorSpec, array: Array | DeviceTensor, what: str) -> None:
    if array.dtype != spec.dtype:
        todo = f'Convert it: array.astype("{spec.dtype}").'
        if {array.dtype.kind, np.dtype(spec.dtype).kind} == {"u", "f"}:  # after a cast they would run, and the results be wrong
            todo = "Image bytes and normalized pixels differ in scale, too: prepare images with model.preparation(images)."
        raise InputError(f"{what} has dtype {array.dtype}. Expected {spec}. {todo}")
    fits = len(array.shape) == len(spec.shape) and all(
        isinstance(wanted, str) or size == wanted for size, wanted in zip(array.shape, spec.shape, strict=True)
    )
    if not fits:
        raise InputError(f"{what} has shape {list(array.shape)}. Expected {spec}.")
    if 0 in array.shape:
        raise InputError(f"{what} has shape {list(array.shape)} and is empty. Expected {spec} with at least one image.")


def _listed(specs: tuple[TensorSpec, ...]) -> str:
    return ", ".join(str(spec) for spec in specs)
