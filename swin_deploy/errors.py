"""Every error that swin-deploy raises on purpose.

    SwinDeployError
    ├── UsageError               an argument is invalid (unknown variant, unknown precision)
    ├── MissingDependencyError   a library is not installed; the message names the command that installs it
    ├── CheckpointError          weights or a config cannot be read, or do not match
    ├── BundleError              a bundle is missing, damaged, or not writable
    ├── InputError               the model does not accept an array or image
    ├── ExportError              the ONNX graph could not be created
    │   └── PassError            a graph pass did not find the pattern that it rewrites
    ├── EngineError              the TensorRT compiler refused the graph, or an engine does not fit this machine
    ├── BackendError             a back end failed while loading or running (its own error is the cause)
    │   └── MissingKernelError   the back end has no kernel for an operator in the type that the graph uses
    ├── VerificationError        a model runs, but its results differ from PyTorch's
    └── GateError                an INT8 or FP8 graph is less accurate or slower than requested

A message states what happened, what was expected, and what to do, in up to three short sentences. The command line prints
it without a traceback and exits with `exit_code`: 2 for what the user can correct, 1 for a failed verification, 3 for a
quantized graph that misses its accuracy or speed limit.
"""

from __future__ import annotations

from collections.abc import Iterable


class SwinDeployError(Exception):
    """Base class of all errors that swin-deploy raises on purpose."""

    exit_code = 2


class UsageError(SwinDeployError):
    """An argument is invalid."""


class MissingDependencyError(SwinDeployError, ImportError):
    """A library that this step needs is not installed."""


class CheckpointError(SwinDeployError):
    """Weights or a config cannot be read, or do not match."""


class BundleError(SwinDeployError):
    """A bundle is missing, damaged, or not writable."""


class InputError(SwinDeployError, ValueError):
    """The model does not accept an array or image."""


class ExportError(SwinDeployError):
    """The ONNX graph could not be created."""


class PassError(ExportError):
    """A graph pass did not find the pattern that it rewrites."""


class EngineError(SwinDeployError):
    """The TensorRT compiler refused the graph or the target, or an engine does not fit this machine."""


class BackendError(SwinDeployError):
    """A back end failed while loading or running a model; its own error is the cause."""


class MissingKernelError(BackendError):
    """The back end has no kernel for an operator in the type that the graph uses."""


class VerificationError(SwinDeployError):
    """A model runs, but its results differ from PyTorch's."""

    exit_code = 1


class GateError(SwinDeployError):
    """A quantized graph is less accurate or slower than requested."""

    exit_code = 3


def unknown(kind: str, value: object, choices: Iterable[str]) -> UsageError:
    """Return the error for a name that is not one of `choices`.

    Args:
        kind: What is chosen, in the singular, such as "precision" or "back end".
        value: What was given.
        choices: All valid names, in the order to list them.
    """
    return UsageError(f'Unknown {kind} "{value}". Choose one of: {", ".join(choices)}.')


def sentence(text: str) -> str:
    """Return `text` on one line and without its final period, to embed it in a sentence."""
    return " ".join(text.split()).rstrip(".")
