"""Count what graphs and engines contain, compute and move."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from swin_deploy.option_parsers import BundlePath, bundle_keywords
from swin_deploy.options import InspectSpec

if TYPE_CHECKING:
    from swin_deploy.exporters.inspection.costs import Inspection


@bundle_keywords(InspectSpec)
def inspect(bundle: BundlePath, spec: InspectSpec) -> Inspection:
    """Describe the graphs and engines of a bundle, or any ONNX file.

    Engines of a bundle are described from what the compiler reported when it built them. An ONNX file is compiled to measure
    it, and the engine is not kept.

    Args:
        bundle: Folder of the bundle, or an ONNX file.
        {options}

    Returns:
        Nodes, parameters and FLOPs of graphs; kernels, bytes and roofline of engines.

    Raises:
        UsageError: The file is not an ONNX graph, or an option is invalid.
        EngineError: The compiler refused the graph.
    """
    from swin_deploy.bundle import Bundle
    from swin_deploy.errors import UsageError
    from swin_deploy.exporters.inspection.costs import inspect_bundle, inspect_onnx

    path = Path(bundle)
    is_file = os.path.isfile(path)  # noqa: PTH113 - Path.is_file raises for a name that is too long
    if path.suffix == ".onnx" or is_file:
        if not is_file:
            raise UsageError(f"There is no ONNX file {path}. Expected an ONNX file, or the folder of a bundle.")
        return inspect_onnx(path, spec)
    found = Bundle.open(path)
    if spec.batch != 1:
        raise UsageError(
            f"--batch applies to ONNX files only. The engines in bundle {path} have fixed batch ranges; build others with "
            f"`swin-deploy build-engine {path} --batch {spec.batch}`."
        )
    return inspect_bundle(found, spec.gpu)
