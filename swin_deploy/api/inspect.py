"""Count what graphs and engines contain, compute and move."""

from __future__ import annotations

import json
import os
import sys
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
    it, in another process that may fail without harm to this one, and the engine is not kept.

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
    from swin_deploy.exporters.inspection.costs import inspect_bundle

    path = Path(bundle)
    is_file = os.path.isfile(path)  # noqa: PTH113 - Path.is_file raises for a name that is too long
    if path.suffix == ".onnx" or is_file:
        if not is_file:
            raise UsageError(f"There is no ONNX file {path}. Expected an ONNX file, or the folder of a bundle.")
        if spec.trex is not None:
            raise UsageError("--trex writes the layers of the engines of a bundle, and an ONNX file has none. Pass a bundle.")
        return _inspected_apart(path, spec)
    found = Bundle.open(path)
    if spec.batch != 1:
        raise UsageError(
            f"--batch applies to ONNX files only. The engines in bundle {path} have fixed batch ranges; build others with "
            f"`swin-deploy build-engine {path} --batch {spec.batch}`."
        )
    if spec.trex is not None:
        from swin_deploy.diagnosis.interchange import write_trex

        write_trex(found, Path(spec.trex))
    return inspect_bundle(found, spec.gpu)


def _inspected_apart(path: Path, spec: InspectSpec) -> Inspection:
    """Describe an ONNX file in another process: the libraries that read it may die of a malicious or damaged one."""
    from swin_deploy.bench.worker import Process, log_levels
    from swin_deploy.exporters.inspection.costs import Inspection

    question = {"path": str(path), "gpu": spec.gpu, "batch": spec.batch, "backend": spec.backend, "log": log_levels()}
    with Process("from swin_deploy.api.inspect import answer_with_figures; answer_with_figures()") as process:
        process.title = f"The process that read {path}"
        return Inspection.from_json(process.ask(question, spec.progress))


def answer_with_figures() -> None:
    """Describe the ONNX file that a line of JSON on stdin names, and answer with progress and, at last, its figures."""
    from swin_deploy.bench.worker import answers, forward_log
    from swin_deploy.exporters.inspection.costs import inspect_onnx

    with answers() as answer:
        question = json.loads(sys.stdin.readline())
        forward_log(answer, question.pop("log"))
        path = Path(question.pop("path"))
        found = inspect_onnx(path, InspectSpec(**question, progress=lambda *step: answer(progress=step)))
        answer(**found.to_json())
