"""Count what graphs and engines contain, compute and move."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from swin_deploy.options import BundlePath, Progress, no_progress

if TYPE_CHECKING:
    from swin_deploy.exporters.inspection.costs import Inspection


def inspect(
    path: BundlePath, *, gpu: str | None = None, batch: int = 1, backend: str = "auto", progress: Progress = no_progress
) -> Inspection:
    """Describe the graphs and engines of a bundle, or any ONNX file.

    Args:
        path: A bundle, whose engines are described from what the compiler reported, or an ONNX file, which is compiled.
        gpu: GPU whose published peaks give the roofline, such as "rtx-4090" or "sm_89". A file is compiled for it.
        batch: Batch size to compile a file for.
        backend: Compiler of a file: "auto", "tensorrt" or "tensorrt-rtx".
        progress: Called with a phase, the steps done and the steps in all.

    Returns:
        Nodes, parameters and FLOPs of graphs; kernels, bytes and roofline of engines.

    Raises:
        UsageError: The file is not an ONNX graph, or an option is invalid.
    """
    from swin_deploy.exporters.inspection.costs import inspect_path

    return inspect_path(Path(path), gpu, batch, backend, progress)
