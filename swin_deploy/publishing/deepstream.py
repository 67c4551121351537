"""Configuration of DeepStream's nvinfer element, with the graph or an engine.

nvinfer computes factor * (pixel - offset), with one factor for all channels. So it normalizes exactly only if all standard
deviations are equal. A graph for raw frames (`export --embed-preprocess --input-layout nchw`) normalizes by itself.
"""

from __future__ import annotations

import logging
from pathlib import Path

from swin_deploy.bundle import Bundle
from swin_deploy.errors import UsageError
from swin_deploy.options import PublishSpec

from .base import Publication, number_text, publication, write_text

_LOG = logging.getLogger(__name__)
MODES = {"fp32": 0, "int8": 1, "fp16": 2}  # values of network-mode


def write_deepstream(bundle: Bundle, spec: PublishSpec, folder: Path) -> None:
    """Write `config_infer.txt`, the model, its engine if one was named, and `labels.txt`."""
    chosen = publication(bundle, spec, engine=None)
    engine, output = chosen.engine, chosen.class_output()
    chosen.refuse_frames("DeepStream")
    chosen.refuse_channels("DeepStream")
    if output is None:
        raise UsageError("The nvinfer configuration is for classifiers. Export for image classification.")
    if engine is not None and engine.backend != "tensorrt":
        raise UsageError(
            f"DeepStream runs engines of TensorRT, and {chosen.file} is one of TensorRT for RTX. Leave out --engine: nvinfer "
            f"compiles the graph."
        )
    precision = chosen.graph.precision if engine is None else engine.precision
    if precision not in MODES:
        raise UsageError(f"DeepStream has no mode for {precision}. Choose one of: {', '.join(MODES)}.")
    largest = max(profile.batch[2] for profile in engine.profiles) if engine else None
    batch = chosen.batch or largest or 1
    if largest is not None and batch > largest:
        raise UsageError(f"The engine runs batches of up to {largest}. Pass --batch {largest} or less.")
    height, width = chosen.pixels.image_size
    engine_name = f"model.onnx_b{batch}_gpu0_{precision}.engine"
    factor, offsets, error = _normalization(chosen)
    if error:
        _LOG.warning(
            "Warning: nvinfer has one scale for all channels, so its pixels are up to %.3f standard deviations off. For an "
            "exact graph, export with --embed-preprocess --input-layout nchw",
            error,
        )
    activation = bundle.config.score_activation
    if output.name == "logits":
        _LOG.warning(
            "Warning: nvinfer takes the outputs as probabilities, and these are logits.%s",
            "" if activation == "none" else f" For scores, export with --embed-postprocess {activation}",
        )
    pairs = {
        "gpu-id": 0,
        "gie-unique-id": 1,
        "process-mode": 1,
        "network-type": 1,
        "network-mode": MODES[precision],
        "batch-size": batch,
        "onnx-file": "model.onnx",
        "model-engine-file": engine_name,
        "labelfile-path": "labels.txt",
        "infer-dims": f"{bundle.preprocessor.channels};{height};{width}",
        "network-input-order": 0,
        "model-color-format": 2 if bundle.preprocessor.channels == 1 else int(chosen.bgr),
        "maintain-aspect-ratio": 0,
        "net-scale-factor": number_text(factor),
        "offsets": ";".join(map(number_text, offsets)),
        "output-blob-names": output.name,
        "classifier-threshold": 0,
    }
    write_text(folder / "config_infer.txt", "[property]\n" + "".join(f"{key}={value}\n" for key, value in pairs.items()))
    # One line: each line is an attribute with its classes. A last empty one would be lost.
    chosen.write_labels(folder, ";".join(label.replace(";", ",") or "_" for label in chosen.labels) + "\n")
    if engine is not None:
        chosen.write_model(folder / engine_name)
        chosen = Publication(bundle, engine.graph, spec)
    chosen.write_model(folder / "model.onnx")


def _normalization(chosen: Publication) -> tuple[float, list[float], float]:
    """Return nvinfer's factor and offsets, and the largest error of a pixel in units of the network's input."""
    scales, offsets = chosen.normalization()
    means = [0.0 - offset / scale for scale, offset in zip(scales, offsets, strict=True)]
    weighted = [(scale, max(mean, 255 - mean)) for scale, mean in zip(scales, means, strict=True)]

    def error(factor: float) -> float:
        return max(abs(factor - scale) * farthest for scale, farthest in weighted)

    # The best factor makes the errors of two channels equal.
    factor = min(((a * x + b * y) / (x + y) for a, x in weighted for b, y in weighted), key=error)
    return factor, means, error(factor)
