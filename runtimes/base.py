"""Runtime: one loaded model behind one small interface, whatever runs it. Feeds are checked here, once for all."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from swin_deploy.errors import BackendError, InputError
from swin_deploy.specs import TensorSpec

if TYPE_CHECKING:
    from typing_extensions import Self

Array = NDArray[Any]


class Runtime(ABC):
    """A loaded model. `inputs` and `outputs` say what it takes and gives, `title` what runs it ("onnxruntime 1.31.1").

    `run` runs it; `close` lets it go. A back end implements `_run` and, if it holds anything, `_close`.
    """

    def __init__(self, title: str, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> None:
        self.title, self.inputs, self.outputs = title, inputs, outputs
        self._closed = False

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Every output by name, in new arrays. `feeds` holds an array for each input.

        Raises InputError when an input is missing, unknown, or of another dtype or shape than `inputs` says, and
        BackendError when the back end fails.
        """
        if self._closed:
            raise BackendError("This model is closed. Load it again to run it.")
        self._check(feeds)
        return self._run(feeds)

    def close(self) -> None:
        """Frees what the back end holds; closing twice does nothing."""
        if not self._closed:
            self._closed = True
            self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @abstractmethod
    def _run(self, feeds: Mapping[str, Array]) -> dict[str, Array]: ...

    def _close(self) -> None:  # noqa: B027 - most back ends free everything with their last reference
        pass

    def _check(self, feeds: Mapping[str, Array]) -> None:
        known = {spec.name for spec in self.inputs}
        for name in feeds:
            if name not in known:
                raise InputError(f'The model has no input "{name}". Its inputs are: {_listed(self.inputs)}.')
        free: dict[str, int] = {}
        for spec in self.inputs:
            if spec.name not in feeds:
                raise InputError(f'The input "{spec.name}" is missing. The model takes {_listed(self.inputs)}.')
            _check_array(spec, feeds[spec.name], free)


def _check_array(spec: TensorSpec, array: object, free: dict[str, int]) -> None:
    if not isinstance(array, np.ndarray):
        raise InputError(f'The input "{spec.name}" is a {type(array).__name__}; expected a numpy array, {spec}.')
    if array.dtype != np.dtype(spec.dtype):
        raise InputError(
            f'The input "{spec.name}" has dtype {array.dtype}; expected {spec}. Convert it: array.astype("{spec.dtype}").'
        )
    fits = array.ndim == len(spec.shape) and all(
        size == wanted if isinstance(wanted, int) else size > 0 and free.setdefault(wanted, size) == size
        for size, wanted in zip(array.shape, spec.shape, strict=True)
    )
    if not fits:
        raise InputError(f'The input "{spec.name}" has shape {list(array.shape)}; expected {spec}.')


def _listed(specs: tuple[TensorSpec, ...]) -> str:
    return ", ".join(str(spec) for spec in specs)
