"""Model and .modelinfo file for the element onnxinference of GStreamer (1.28 and newer)."""

from __future__ import annotations

from pathlib import Path

from swin_deploy.bundle import Bundle
from swin_deploy.errors import UsageError
from swin_deploy.manifest import TensorSpec
from swin_deploy.options import PublishSpec

from .base import number_text, publication, write_text

# Identifiers of GStreamer's tensor registry. The decoder computes the softmax of the first.
LOGITS, PROBABILITIES = "classification-generic-out", "classification-generic-softmaxed-out"


def write_gstreamer(bundle: Bundle, spec: PublishSpec, folder: Path) -> None:
    """Write the model, `<model>.onnx.modelinfo` and `labels.txt`."""
    chosen = publication(bundle, spec)
    output = chosen.class_output()
    if chosen.bgr:
        raise UsageError("GStreamer passes the channels in the order rgb. Export without --input-order.")
    if output is None:
        raise UsageError("GStreamer decodes the tensors of classifiers only. Export for image classification.")
    chosen.refuse_batch("GStreamer")
    chosen.refuse_channels("GStreamer")
    if output.name == "logits" and (activation := bundle.config.score_activation) != "softmax":
        way = "Use another program" if activation == "none" else f"Export with --embed-postprocess {activation}"
        raise UsageError(
            f"GStreamer computes the softmax of logits, and the activation of this network is {activation}. {way}."
        )
    identity = LOGITS if output.name == "logits" else PROBABILITIES
    scales, offsets = chosen.normalization()
    ranges = ";".join(
        f"{number_text(offset)},{number_text(offset + 255 * scale)}" for scale, offset in zip(scales, offsets, strict=True)
    )
    sections = [f"[modelinfo]\nversion=1.0\ngroup-id={identity}\n"]
    sections += [_section(one, "input", f"ranges={ranges}\n") for one in chosen.graph.inputs[:1]]
    for one in chosen.graph.outputs:
        sections.append(_section(one, "output", f"id={identity if one is output else one.name}\n"))
    write_text(folder / f"{chosen.name}.onnx.modelinfo", "\n".join(sections))
    chosen.write_labels(folder)
    chosen.write_model(folder / f"{chosen.name}.onnx")


def _section(one: TensorSpec, direction: str, more: str) -> str:
    dims = ",".join(str(size) if isinstance(size, int) else "-1" for size in one.shape)
    return f"[{one.name}]\ndir={direction}\ntype={one.dtype}\ndims={dims}\ndims-order=row-major\n{more}"
