"""Every error that swin-deploy raises on purpose.

    SwinDeployError
    ├── UsageError               an argument that cannot be meant (unknown variant, unknown precision)
    ├── MissingDependencyError   a library that is not installed, with the command that installs it
    ├── CheckpointError          weights or a config that cannot be read, or do not fit together
    ├── BundleError              a bundle that is absent, damaged, or not writable
    ├── InputError               an array or image that the model does not take
    ├── ExportError              the ONNX graph could not be made
    │   └── PassError            a graph rewrite did not find what it was written for
    ├── EngineError              the TensorRT compiler refused the graph, or an engine does not fit this machine
    ├── BackendError             a back end failed while loading or running (its own error is the cause)
    ├── VerificationError        a model that runs, and disagrees with PyTorch
    └── GateError                an INT8 or FP8 graph that is less accurate or less fast than was asked for

Each message is one sentence or two: what happened, what was expected, what to do. The command line prints it without a
traceback and exits with `exit_code`: 2 for what the user can correct, 1 for a result that is simply not good enough, 3 for a
quantised graph that is not what was asked for.
"""

from __future__ import annotations


class SwinDeployError(Exception):
    """The base of all errors that are raised on purpose."""

    exit_code = 2


class UsageError(SwinDeployError):
    """An argument that cannot be meant."""


class MissingDependencyError(SwinDeployError, ImportError):
    """A library that this step needs is not installed."""


class CheckpointError(SwinDeployError):
    """Weights or a config that cannot be read, or that do not fit together."""


class BundleError(SwinDeployError):
    """A bundle that is absent, damaged, or not writable."""


class InputError(SwinDeployError, ValueError):
    """An array or an image that the model does not take."""


class ExportError(SwinDeployError):
    """The ONNX graph could not be made."""


class PassError(ExportError):
    """A graph rewrite did not find what it was written for."""


class EngineError(SwinDeployError):
    """The TensorRT compiler refused the graph or the target, or an engine does not fit this machine."""


class BackendError(SwinDeployError):
    """A back end failed while loading or running a model; its own error is the cause."""


class MissingKernelError(BackendError):
    """The back end has no kernel for an operator in the type that the graph gives it."""


class VerificationError(SwinDeployError):
    """A model that runs, and whose answers are not those of PyTorch."""

    exit_code = 1


class GateError(SwinDeployError):
    """A quantised graph that cannot be as accurate and as fast as was asked for."""

    exit_code = 3


def sentence(text: str) -> str:
    """`text` in one line, for the middle of a sentence."""
    return " ".join(text.split()).rstrip(".")
