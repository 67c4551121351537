"""Model repository of Triton Inference Server: a graph for its ONNX Runtime back end, or an engine for TensorRT."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path

from swin_deploy.bundle import Bundle
from swin_deploy.errors import UsageError
from swin_deploy.manifest import EngineEntry, TensorSpec
from swin_deploy.options import PublishSpec

from .base import publication, write_text

_LOG = logging.getLogger(__name__)
BATCH = 8  # default of the largest batch
DELAY = 2000  # microseconds that a request waits for others
TYPES = {"float32": "FP32", "float16": "FP16", "float64": "FP64"}


def write_triton(bundle: Bundle, spec: PublishSpec, folder: Path) -> None:
    """Write `NAME/config.pbtxt`, `NAME/labels.txt` and the model in `NAME/1/`."""
    chosen = publication(bundle, spec, engine=None)
    engine, graph = chosen.engine, chosen.graph
    if engine is not None and engine.backend != "tensorrt":
        raise UsageError(
            f"Triton runs engines of TensorRT, and {chosen.file} is one of TensorRT for RTX. Compile one with "
            f"`swin-deploy build-engine {bundle.path} --backend tensorrt`, or leave out --engine."
        )
    largest = _largest_batch(engine, (*graph.inputs, *chosen.outputs), chosen.batch)
    by_class = chosen.class_output()
    lines = [f'name: "{chosen.name}"', f'backend: "{"onnxruntime" if engine is None else "tensorrt"}"']
    lines += [f"max_batch_size: {largest}"]
    lines += [_tensor("input", one, largest) for one in graph.inputs]
    lines += [_tensor("output", one, largest, 'label_filename: "labels.txt"' * (one is by_class)) for one in chosen.outputs]
    batches = sorted({1, largest})
    if engine is None:
        lines.append("instance_group [ { kind: KIND_AUTO count: 1 } ]")
    else:
        batches = sorted({profile.batch[1] for profile in engine.profiles})
        numbers = ", ".join(f'"{number}"' for number in range(len(engine.profiles)))
        lines.append(f"instance_group [ {{ kind: KIND_GPU count: 1 profile: [ {numbers} ] }} ]")
        sizes = " ".join(f"graph_spec {{ batch_size: {batch} }}" for batch in batches)
        lines.append(f"optimization {{ cuda {{ graphs: true {sizes} }} }}")
        _LOG.info("The engine needs TensorRT %s in Triton, and a GPU of %s", engine.backend_version, engine.gpu)
    if largest and not (engine and min(profile.batch[0] for profile in engine.profiles) > 1):
        lines.append(f"dynamic_batching {{ max_queue_delay_microseconds: {DELAY} }}")
    lines += [_warm_up(graph.inputs, batch if largest else 0) for batch in (batches if largest else batches[:1])]
    place = folder / chosen.name
    write_text(place / "config.pbtxt", "\n".join(lines) + "\n")
    chosen.write_labels(place)
    chosen.write_model(place / "1" / ("model.onnx" if engine is None else "model.plan"))


def _largest_batch(engine: EngineEntry | None, tensors: Sequence[TensorSpec], wanted: int | None) -> int:
    """Return the largest batch; 0 if Triton cannot batch requests, since an axis of every tensor must be that of the batch."""
    if any(one.shape[:1] != ("batch",) for one in tensors):
        return 0
    if engine is None:
        return wanted or BATCH
    most = max(profile.batch[2] for profile in engine.profiles)
    if wanted is not None and wanted > most:
        raise UsageError(f"The engine runs batches of up to {most}. Pass --batch {most} or less.")
    return wanted or most


def _tensor(kind: str, one: TensorSpec, batch: int, more: str = "") -> str:
    dims = ", ".join(str(size) if isinstance(size, int) else "-1" for size in one.shape[1 if batch else 0 :])
    return f"{kind} [ {{ name: {json.dumps(one.name)} data_type: {_type(one)} dims: [ {dims} ] {more}}} ]".replace("  ", " ")


def _type(one: TensorSpec) -> str:
    return f"TYPE_{TYPES.get(one.dtype, one.dtype.upper())}"


def _warm_up(inputs: Sequence[TensorSpec], batch: int) -> str:
    parts = []
    for one in inputs:
        dims = ", ".join(str(size if isinstance(size, int) else 1) for size in one.shape[1 if batch else 0 :])
        value = f"{{ data_type: {_type(one)} dims: [ {dims} ] zero_data: true }}"
        parts.append(f"inputs {{ key: {json.dumps(one.name)} value: {value} }}")
    return f'model_warmup [ {{ name: "batch {max(batch, 1)}" batch_size: {batch} {" ".join(parts)} }} ]'
