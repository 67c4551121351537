"""A bundle -> the same bundle with engines: the typed graph is written and checked once, then compiled for each GPU."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from swin_deploy.bundle import Bundle
from swin_deploy.dependencies import require
from swin_deploy.errors import UsageError
from swin_deploy.exporters.inspection.roofline import capability_of
from swin_deploy.exporters.typed_graphs import Calibration, Say, bytes_writer, further_size, with_typed_graphs
from swin_deploy.gpus import cuda_devices
from swin_deploy.parity import OpenGraph
from swin_deploy.specs import PRECISIONS, QUANTIZED, TARGETS, Size, size_text, target_of

from .engine_from_onnx import Engine, Log, Progress, engine_from_onnx, resolve_backend
from .engine_spec import BACKENDS, EngineSpec, fingerprint, has_fp8, target_gpu

# What TensorRT for RTX compiles for where there is no GPU to ask: Ampere, Ada and Blackwell.
DEFAULT_GPUS = ("sm_86", "sm_89", "sm_120")


@dataclass(frozen=True)
class Built:
    """One engine in a bundle. `reused` when it was there already, of this graph, spec, compiler and target."""

    file: str
    entry: Mapping[str, Any]
    reused: bool


def build_engines(
    bundle: Bundle,
    precision: str,
    *,
    backend: str,
    gpus: Sequence[str],
    spec_for: Callable[[str, str], EngineSpec],
    force: bool,
    open_graph: OpenGraph,
    say: Say,
    log: Log,
    progress: Progress | None = None,
    calibration: Calibration | None = None,
) -> tuple[Bundle, tuple[Built, ...]]:
    """The bundle with an engine for each of `gpus` in it (none given: this machine's GPU, else DEFAULT_GPUS).

    `spec_for(backend, gpu)` is called for every target before the first is compiled. One process at a time compiles into a
    bundle; another waits, and takes what it then finds. Raises EngineError when the compiler refuses, UsageError for a
    target, option or precision that it cannot build, VerificationError when the typed graph is not good enough.
    """
    if precision not in PRECISIONS:
        raise UsageError(f'There is no precision "{precision}". There are: {", ".join(PRECISIONS)}.')
    if (target := bundle.manifest.get("target", TARGETS[0])) != TARGETS[0]:
        raise UsageError(
            f"The bundle {bundle.path} was exported for {target}, and TensorRT needs another form of the graph. "
            f'Export it again with "--target {TARGETS[0]}".'
        )
    _refuse_form(bundle, precision)
    chosen = resolve_backend(backend)
    if not gpus:
        able = [gpu for gpu in DEFAULT_GPUS if precision != "fp8" or has_fp8(gpu)]
        gpus = ("current",) if cuda_devices() or chosen == "tensorrt" else able
    specs = [spec_for(chosen, gpu) for gpu in dict.fromkeys(target_gpu(chosen, capability_of(gpu)) for gpu in gpus)]
    if precision == "fp8" and (without := [spec.gpu for spec in specs if not has_fp8(spec.gpu)]):
        raise UsageError(
            f"{without[0]} has no FP8, which came with sm_89. Name newer GPUs with --gpu, or build --int8 or --fp16."
        )
    # Asked of the module: TensorRT is also installed under other names than its own (tensorrt-cu12, a system package).
    release = str(require(BACKENDS[chosen][0], "compile engines").__version__)
    built = []
    with bundle.compiling(lambda: say(f"Waiting for another process that compiles into {bundle.path}")) as bundle:
        for file, entry in bundle.graphs.items():
            if entry["precision"] == "fp32" and not (bundle.path / file).exists():
                bundle.verified_path(file)  # says what to do; the others can be made of it again
        _refuse_form(bundle, precision)  # which another process may have changed while this one waited
        if precision not in QUANTIZED:
            bundle = with_typed_graphs(bundle, precision, open_graph, say, calibration)
        graphs = [file for file, entry in bundle.graphs.items() if entry["precision"] == precision]
        for number, graph in enumerate(graphs):
            path, entry = bundle.verified_path(graph), bundle.files[graph]
            for spec in specs:
                file = _engine_file(spec, precision, further_size(bundle, graph, number), release)
                wanted: dict[str, Any] = {
                    "graph": graph,
                    "parent": entry["sha256"],
                    "backend": spec.backend,
                    "backend_version": release,
                    "gpu": spec.gpu,
                    "options": spec.options,
                }
                wanted["fingerprint"] = fingerprint({**wanted, "profiles": spec.profiles})
                known = bundle.files.get(file)
                if known is not None and not force and _is_there(bundle, file, wanted["fingerprint"]):
                    bundle.verified_path(file)
                    say(f"{file} is there already, compiled from this graph")
                    built.append(Built(file, known, reused=True))
                    continue
                bundle.refuse_read_only()
                say(f"Compiling {graph} for {spec.gpu} with {BACKENDS[chosen][1]}")
                engine = engine_from_onnx(path, spec, log, progress)
                bundle = _with_engine(
                    bundle, file, engine, spec, {"precision": precision, "image_size": entry["image_size"], **wanted}
                )
                built.append(Built(file, bundle.files[file], reused=False))
    return bundle, tuple(built)


def layers_file(engine: str) -> str:
    """Where a bundle keeps the layers of an engine, as the compiler described them."""
    return engine.removesuffix(".engine") + ".layers.json"


def _refuse_form(bundle: Bundle, precision: str) -> None:
    """Raises UsageError for a quantised graph that is not there, or not in the form for TensorRT."""
    if precision not in QUANTIZED:
        return
    held = [entry for entry in bundle.graphs.values() if entry["precision"] == precision]
    others = [made for entry in held if (made := target_of(entry)) != TARGETS[0]]
    if not held or others:
        what = f"an {precision} graph for {others[0]}" if others else f"no {precision} graph"
        command = ["swin-deploy", "quantize", str(bundle.path), f"--{precision}", "--data", "DIR"]
        raise UsageError(
            f"The bundle {bundle.path} holds {what}; TensorRT's takes images to measure ranges on. Make it with "
            f'"{shlex.join(command)}".'
        )


def _is_there(bundle: Bundle, file: str, wanted: str) -> bool:
    """Whether `file` is in the bundle and is the engine that is wanted, with its layers; what was deleted is made again."""
    known, layers = bundle.files[file], bundle.files.get(layers_file(file), {})
    whole = known.get("fingerprint") == wanted and layers.get("parent") == known["sha256"]
    return whole and all((bundle.path / name).exists() for name in (file, layers_file(file)))


def _with_engine(bundle: Bundle, file: str, engine: Engine, spec: EngineSpec, facts: Mapping[str, Any]) -> Bundle:
    """The bundle with the engine in it, and with its layers in a file beside it."""
    described = [
        {"batch": list(batch), **report.to_dict()} for batch, report in zip(spec.profiles, engine.reports, strict=True)
    ]
    entry = {
        **facts,
        "profiles": [{name: value for name, value in profile.items() if name != "layers"} for profile in described],
        "seconds": round(engine.seconds, 2),
        "agreement": "not verified",  # an engine can only be run on its own GPU
    }
    bundle = bundle.with_file(file, entry, bytes_writer(engine.plan))
    text = json.dumps({"profiles": described}) + "\n"
    return bundle.with_file(layers_file(file), {"parent": bundle.files[file]["sha256"]}, bytes_writer(text.encode()))


def _engine_file(spec: EngineSpec, precision: str, further: Size | None, release: str) -> str:
    parts = [precision, size_text(further) if further else "", spec.words, spec.gpu, spec.backend, release]
    return f"engines/{'-'.join(part for part in parts if part)}.engine"
