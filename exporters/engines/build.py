"""Compile the graphs of a bundle into engines, one for each image size and GPU."""

from __future__ import annotations

import json
import logging
import math
import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from swin_deploy.bundle import Bundle, size_text
from swin_deploy.dependencies import require
from swin_deploy.errors import BackendError, EngineError, UsageError
from swin_deploy.exporters.inspection.flops import cost_from_onnx
from swin_deploy.exporters.inspection.roofline import GPUS, GpuPeaks, capability_of, roofline_of_profile
from swin_deploy.exporters.precision import BF16_OPSET
from swin_deploy.exporters.typed_graphs import NO_CALIBRATION, Calibration, further_size, with_typed_graphs
from swin_deploy.gpus import cuda_devices
from swin_deploy.latency_budget import MOST_IMAGES, largest_batch
from swin_deploy.manifest import EngineEntry
from swin_deploy.options import QUANTIZED, TARGETS, EngineSpec, Size
from swin_deploy.parity import OpenGraph

from .engine_from_onnx import Engine, engine_from_onnx, resolve_backend
from .targets import COMPILERS, compiler_options, fingerprint, for_target, has_fp8, name_of_options, refuse_lacking, target_gpu

_LOG = logging.getLogger(__name__)
# Compiled for by TensorRT for RTX on a machine without a GPU: Ampere, Ada and Blackwell.
DEFAULT_GPUS = ("sm_86", "sm_89", "sm_120")
TimeEngine = Callable[[Bundle, str, int], float]  # the engine in this file, a batch -> median milliseconds on the first GPU


@dataclass(frozen=True)
class Built:
    """An engine in a bundle; `reused` if the bundle already had it, of the same graph, options, compiler and GPU."""

    file: str
    entry: EngineEntry
    reused: bool


def build_engines(
    bundle: Bundle,
    spec: EngineSpec,
    open_graph: OpenGraph,
    calibration: Calibration | None = None,
    time_engine: TimeEngine | None = None,
) -> tuple[Bundle, tuple[Built, ...]]:
    """Compile the graphs of one precision for each GPU of `spec`, and add the engines to the bundle.

    The graph of the precision is written and compared with PyTorch first if the bundle does not have it. One process at a
    time compiles into a bundle; another one waits and reuses what it finds then. `time_engine` is needed on a machine with the
    GPU if `spec` has a latency budget.
    """
    budget, spec = spec.latency_ms, replace(spec, latency_ms=None)
    precision = spec.precision
    if (target := bundle.manifest.target) != TARGETS[0]:
        raise UsageError(
            f"The bundle {bundle.path} was exported for {target}, and TensorRT needs another graph layout. "
            f'Export it again with "--target {TARGETS[0]}".'
        )
    _refuse_layout(bundle, precision)
    if (static := bundle.static_batch) is not None:
        if budget is not None:
            raise UsageError(
                f"{bundle.path} was exported with --static-batch {static}, and so are its engines. Leave out --latency-ms."
            )
        spec = _with_batch(bundle, spec, static)
    chosen = resolve_backend(spec.backend)
    gpus = spec.gpus
    if not gpus:
        able = [gpu for gpu in DEFAULT_GPUS if precision != "fp8" or has_fp8(gpu)]
        gpus = ("current",) if cuda_devices() or chosen == "tensorrt" else able
    targets: dict[str, str] = {}
    for gpu in gpus:
        targets.setdefault(target_gpu(chosen, capability_of(gpu)), gpu)
    specs = [for_target(spec, chosen, gpu) for gpu in targets]
    if precision == "fp8" and (without := [one.gpu for one in specs if not has_fp8(one.gpu)]):
        raise UsageError(f"{without[0]} has no FP8 matmuls; sm_89 and newer have. Pass newer GPUs, or build int8 or fp16.")
    if chosen == "tensorrt-rtx" and precision in ("fp32", "bf16") and "sm_75" in targets:
        raise UsageError(
            f"TensorRT for RTX has no {precision} matmuls for sm_75. Pass newer GPUs, or build int8 or fp16, which it compiles."
        )
    timed_on = {} if budget is None else {target: _timed_on(target, gpu, time_engine) for target, gpu in targets.items()}
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
            further = further_size(bundle, graph, number)
            for one in specs:
                if budget is None:
                    bundle, engine = _with_compiled(bundle, graph, one, further, release)
                else:
                    bundle, engine = _within(budget, bundle, graph, one, further, release, timed_on[one.gpu], time_engine)
                built.append(engine)
    return bundle, tuple(built)


def layers_file(engine: str) -> str:
    """Return the file that holds the layers of an engine, as the compiler described them."""
    return engine.removesuffix(".engine") + ".layers.json"


def _with_compiled(bundle: Bundle, graph: str, spec: EngineSpec, further: Size | None, release: str) -> tuple[Bundle, Built]:
    """Compile a graph of the bundle for one GPU and add the engine, or reuse the one that the bundle has."""
    path, entry = bundle.verified_path(graph), bundle.graphs[graph]
    file = _engine_file(spec, entry.precision, further, release)
    wanted: dict[str, Any] = {
        "graph": graph,
        "parent": entry.sha256,
        "backend": spec.backend,
        "backend_version": release,
        "gpu": spec.gpu,
        "options": compiler_options(spec),
    }
    wanted["fingerprint"] = fingerprint({**wanted, "profiles": spec.batches})
    known = bundle.engines.get(file)
    if known is not None and not spec.force and _has(bundle, file, wanted["fingerprint"]):
        bundle.verified_path(file)
        _LOG.info("Reusing %s, which was compiled from this graph", file)
        return bundle, Built(file, known, reused=True)
    bundle.refuse_read_only()
    _LOG.info("Compiling %s for %s with %s", graph, spec.gpu, COMPILERS[spec.backend][1])
    engine = engine_from_onnx(path, spec)
    facts = {"precision": entry.precision, "image_size": list(entry.image_size), **wanted}
    bundle = _with_engine(bundle, file, engine, spec, facts)
    return bundle, Built(file, bundle.engines[file], reused=False)


def _timed_on(target: str, named: str, time_engine: TimeEngine | None) -> GpuPeaks | str:
    """Return the name of this machine's GPU if it is the one that is compiled for, otherwise the peaks for the roofline."""
    model = next((gpu for gpu in GPUS if gpu.name == named.lower()), None)
    for here in cuda_devices()[:1] if time_engine else ():
        words = set(re.split(r"\W+", here.name.lower()))
        if here.capability == target and (model is None or words.issuperset(model.name.split("-"))):
            return here.name
    peaks = model or next((gpu for gpu in GPUS if gpu.capability == target), None)
    if peaks is None:
        raise UsageError(
            f"--latency-ms has no roofline for {named}, and this machine does not have this GPU. Pass --batch, run this on a "
            f"machine with the GPU, or choose one of: {', '.join(f'{gpu.name} ({gpu.capability})' for gpu in GPUS)}."
        )
    return peaks


def _within(
    budget: float,
    bundle: Bundle,
    graph: str,
    spec: EngineSpec,
    further: Size | None,
    release: str,
    gpu: GpuPeaks | str,
    time_engine: TimeEngine | None,
) -> tuple[Bundle, Built]:
    """Add the engine with the largest batch that keeps the budget. Engines of other batches that were tried are removed."""
    flops, before, made = cost_from_onnx(bundle.verified_path(graph)).flops_per_image, set(bundle.engines), dict[int, Built]()
    name = gpu if isinstance(gpu, str) else gpu.name
    how = f"measured on {name}" if isinstance(gpu, str) else f"estimated by the roofline of {name}, not measured"

    def milliseconds(batch: int) -> float:
        nonlocal bundle
        try:
            bundle, built = _with_compiled(bundle, graph, replace(spec, batches=((batch,) * 3,)), further, release)
            made[batch] = built
            if isinstance(gpu, str):
                assert time_engine is not None
                found = time_engine(bundle, built.file, batch)
            else:
                bound = None if flops is None else roofline_of_profile(gpu, built.entry.profiles[0], flops)
                found = math.nan if bound is None else bound.seconds * 1e3
        except (BackendError, EngineError) as error:
            if batch == 1:
                raise
            _LOG.info("Batch %d does not run: %s", batch, error)
            return math.inf
        if math.isnan(found):
            raise UsageError(
                f"The roofline of {graph} on {name} is unknown: the compiler reports no bytes, or the GPU has no peak for its "
                "types. Pass --batch instead of --latency-ms."
            )
        _LOG.info("Batch %d: %.4g ms, %s", batch, found, how)
        return found

    batch = 0
    try:
        batch, time = largest_batch(budget, milliseconds)
    finally:
        for tried, one in made.items():
            if tried != batch and one.file not in before:
                bundle = bundle.without(layers_file(one.file)).without(one.file)
    if batch == 0:
        raise UsageError(
            f"One image takes {time:.4g} ms ({how}), and the budget is {budget:g} ms. Pass a larger --latency-ms, build a "
            "faster precision, or use a faster GPU."
        )
    most = (
        f", the most that is tried, within {budget:g} ms" if batch == MOST_IMAGES else f" is the largest within {budget:g} ms"
    )
    _LOG.info("Batch %d%s: %.4g ms, %s", batch, most, time, how)
    by = "measurement" if isinstance(gpu, str) else "roofline"
    choice = {"latency_ms": budget, "milliseconds": round(time, 4), "by": by, "gpu": name}
    file, reused = made[batch].file, made[batch].reused
    bundle = bundle.with_entry(file, {"batch_choice": choice})
    return bundle, Built(file, bundle.engines[file], reused)


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
