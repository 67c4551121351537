"""Export a checkpoint to a bundle."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from swin_deploy.option_parsers import keywords
from swin_deploy.options import ExportSpec

if TYPE_CHECKING:
    from swin_deploy.bundle import Bundle

MODULES = ("torch", "onnx", "onnx_graphsurgeon")


@keywords(ExportSpec)
def export(spec: ExportSpec) -> Bundle:
    """Export a checkpoint to ONNX, compare the graphs with PyTorch, and write them as a bundle.

    Nothing is written if a step fails or a graph disagrees with PyTorch.

    Args:
        {options}

    Returns:
        The bundle that was written.

    Raises:
        CheckpointError: The checkpoint cannot be read, or its weights do not fit its configuration.
        UsageError: An option is invalid, or a bundle exists and `force` is not set.
        MissingDependencyError: torch or onnx is not installed.
        VerificationError: A graph disagrees with PyTorch.

    Example:
        >>> bundle = swin_deploy.export("swinv2-tiny", image_sizes=[256, "256x320"])
    """
    from swin_deploy.bundle import replaceable_path
    from swin_deploy.dependencies import installed, require
    from swin_deploy.exporters.bundle_from_checkpoint import bundle_from_checkpoint
    from swin_deploy.exporters.checkpoint_from_request import bundle_name, checkpoint_from_request
    from swin_deploy.runtimes.backends import runtime_to_check

    for module in MODULES:
        if not installed(module):  # found before torch is imported, which takes seconds
            require(module, "export a model")
    path = Path(spec.output or bundle_name(spec.variant, spec.weights))
    if os.path.lexists(path):
        replaceable_path(path, spec.force)  # before the work, and again after it
    return bundle_from_checkpoint(checkpoint_from_request(spec), path, spec, runtime_to_check)
