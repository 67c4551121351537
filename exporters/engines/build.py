"""Compile the graphs of a bundle into engines, one for each image size and GPU."""

from __future__ import annotations

import json
import logging
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from swin_deploy.bundle import Bundle, size_text
from swin_deploy.dependencies import require
from swin_deploy.errors import UsageError
from swin_deploy.exporters.inspection.roofline import capability_of
from swin_deploy.exporters.precision import BF16_OPSET
from swin_deploy.exporters.typed_graphs import NO_CALIBRATION, Calibration, further_size, with_typed_graphs
from swin_deploy.gpus import cuda_devices
from swin_deploy.manifest import EngineEntry
from swin_deploy.options import QUANTIZED, TARGETS, EngineSpec, Size
from swin_deploy.parity import OpenGraph

from .engine_from_onnx import Engine, engine_from_onnx, resolve_backend
from .targets import COMPILERS, compiler_options, fingerprint, for_target, has_fp8, name_of_options, refuse_lacking, target_gpu

_LOG = logging.getLogger(__name__)
# Compiled for by TensorRT for RTX on a machine without a GPU: Ampere, Ada and Blackwell.
DEFAULT_GPUS = ("sm_86", "sm_89", "sm_120")


@dataclass(frozen=True)
class Built:
    """An engine in a bundle; `reused` if the bundle already had it, of the same graph, options, compiler and GPU."""

    file: str
    entry: EngineEntry
    reused: bool


def build_engines(
    bundle: Bundle, spec: EngineSpec, open_graph: OpenGraph, calibration: Calibration | None = None
) -> tuple[Bundle, tuple[Built, ...]]:
    """Compile the graphs of one precision for each GPU of `spec`, and add the engines to the bundle.

    The graph of the precision is written and compared with PyTorch first if the bundle does not have it. One process at a
    time compiles into a bundle; another one waits and reuses what it finds then.
    """
    precision = spec.precision
    if (target := bundle.manifest.target) != TARGETS[0]:
        raise UsageError(
            f"The bundle {bundle.path} was exported for {target}, and TensorRT needs another graph layout. "
            f'Export it again with "--target {TARGETS[0]}".'
        )
    _refuse_layout(bundle, precision)
    if (static := bundle.static_batch) is not None:
        spec = _with_batch(bundle, spec, static)
    chosen = resolve_backend(spec.backend)
    gpus = spec.gpus
    if not gpus:
        able = [gpu for gpu in DEFAULT_GPUS if precision != "fp8" or has_fp8(gpu)]
        gpus = ("current",) if cuda_devices() or chosen == "tensorrt" else able
    targets = dict.fromkeys(target_gpu(chosen, capability_of(gpu)) for gpu in gpus)
    specs = [for_target(spec, chosen, gpu) for gpu in targets]
    if precision == "fp8" and (without := [one.gpu for one in specs if not has_fp8(one.gpu)]):
        raise UsageError(f"{without[0]} has no FP8 matmuls; sm_89 and newer have. Pass newer GPUs, or build int8 or fp16.")
    if chosen == "tensorrt-rtx" and precision in ("fp32", "bf16") and "sm_75" in targets:
        raise UsageError(
            f"TensorRT for RTX has no {precision} matmuls for sm_75. Pass newer GPUs, or build int8 or fp16, which it compiles."
        )
    # Asked of the module: TensorRT is also installed under other names than its own (tensorrt-cu12, a system package).
    compiler = require(COMPILERS[chosen][0], "compile engines")
    release = str(compiler.__version__)
    if chosen == "tensorrt":
        held = (bundle.graphs_of(precision) or bundle.graphs_of("fp32")).values()
        refuse_lacking(
            compiler, spec, BF16_OPSET if precision == "bf16" else max((entry.opset or 0 for entry in held), default=0)
        )
    built = []
    with bundle.compiling(lambda: _LOG.info("Waiting for another process that compiles into %s", bundle.path)) as bundle:
        for file in bundle.graphs_of("fp32"):
            if not bundle.place(file).exists():
                bundle.verified_path(file)  # raises and says what to do; the other graphs can be made again
        _refuse_layout(bundle, precision)  # another process may have changed it while this one waited
        if precision not in QUANTIZED:
            bundle = with_typed_graphs(bundle, precision, open_graph, calibration)
        graphs = list(bundle.graphs_of(precision))
        for number, graph in enumerate(graphs):
            path, entry = bundle.verified_path(graph), bundle.graphs[graph]
            for one in specs:
                file = _engine_file(one, precision, further_size(bundle, graph, number), release)
                wanted: dict[str, Any] = {
                    "graph": graph,
                    "parent": entry.sha256,
                    "backend": one.backend,
                    "backend_version": release,
                    "gpu": one.gpu,
                    "options": compiler_options(one),
                }
                wanted["fingerprint"] = fingerprint({**wanted, "profiles": one.batches})
                known = bundle.engines.get(file)
                if known is not None and not spec.force and _has(bundle, file, wanted["fingerprint"]):
                    bundle.verified_path(file)
                    _LOG.info("Reusing %s, which was compiled from this graph", file)
                    built.append(Built(file, known, reused=True))
                    continue
                bundle.refuse_read_only()
                _LOG.info("Compiling %s for %s with %s", graph, one.gpu, COMPILERS[chosen][1])
                engine = engine_from_onnx(path, one)
                facts = {"precision": precision, "image_size": list(entry.image_size), **wanted}
                bundle = _with_engine(bundle, file, engine, one, facts)
                built.append(Built(file, bundle.engines[file], reused=False))
    return bundle, tuple(built)


def layers_file(engine: str) -> str:
    """Return the file that holds the layers of an engine, as the compiler described them."""
    return engine.removesuffix(".engine") + ".layers.json"


def _with_batch(bundle: Bundle, spec: EngineSpec, batch: int) -> EngineSpec:
    """Return `spec` with the only batch that the graphs of the bundle take."""
    only = ((batch,) * 3,)
    if spec.batches not in (EngineSpec().batches, only):
        raise UsageError(f"{bundle.path} was exported with --static-batch {batch}, and so are its engines. Leave out --batch.")
    if spec.data is not None and batch > 1:
        raise UsageError(NO_CALIBRATION.format(bundle.path, batch))
    return replace(spec, batches=only)


def _refuse_layout(bundle: Bundle, precision: str) -> None:
    """Raise UsageError if the bundle has no quantized graph of the precision that was made for TensorRT."""
    if precision not in QUANTIZED:
        return
    held = bundle.graphs_of(precision).values()
    others = [entry.target for entry in held if entry.target != TARGETS[0]]
    if not held or others:
        has = f"has an {precision.upper()} graph for {others[0]} only" if others else f"has no {precision.upper()} graph"
        command = ["swin-deploy", "quantize", str(bundle.path), f"--{precision}", "--data", "DIR"]
        raise UsageError(f"The bundle {bundle.path} {has}. Create one for TensorRT: {shlex.join(command)}")


def _has(bundle: Bundle, file: str, wanted: str) -> bool:
    """Return whether this machine wrote this very engine into the bundle, and neither it nor its layers were deleted."""
    known, layers = bundle.engines[file], bundle.files.get(layers_file(file))
    whole = known.fingerprint == wanted and layers is not None and layers.parent == known.sha256
    return whole and not bundle.foreign(file) and all(bundle.place(name).exists() for name in (file, layers_file(file)))


def _with_engine(bundle: Bundle, file: str, engine: Engine, spec: EngineSpec, facts: Mapping[str, Any]) -> Bundle:
    """Return the bundle with the engine and, in a file beside it, its layers."""
    described = [{"batch": list(batch), **report.to_dict()} for batch, report in zip(spec.batches, engine.reports, strict=True)]
    entry = {
        **facts,
        "profiles": [{name: value for name, value in profile.items() if name != "layers"} for profile in described],
        "seconds": round(engine.seconds, 2),
        "agreement": "not verified",  # an engine runs only on its own GPU
    }
    bundle = bundle.with_file(file, entry, engine.plan)
    text = json.dumps({"profiles": described}) + "\n"
    return bundle.with_file(layers_file(file), {"parent": bundle.files[file].sha256}, text.encode())


def _engine_file(spec: EngineSpec, precision: str, further: Size | None, release: str) -> str:
    parts = [precision, size_text(further) if further else "", name_of_options(spec), spec.gpu, spec.backend, release]
    return f"engines/{'-'.join(part for part in parts if part)}.engine"
