"""Put the weights back into engines built without them, from the graph that each was built from and optimized for."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from swin_deploy.bundle import Bundle
from swin_deploy.errors import EngineError, UntrustedEngineError, UsageError
from swin_deploy.gpus import cuda_devices, seen_first
from swin_deploy.tensorrt_log import log_callback

from .build import Built
from .engine_from_onnx import Watch, joined, load_compiler, natives_freed
from .targets import COMPILERS, fingerprint

_LOG = logging.getLogger(__name__)


def refit_engines(bundle: Bundle) -> tuple[Built, ...]:
    """Refit the engines of a bundle that lack weights, add them to it, and return them. Existing ones are reused."""
    stripped = [file for file, entry in bundle.engines.items() if entry.options.strip_weights]
    if not stripped:
        raise UsageError(
            f'No engine in {bundle.path} was built without weights. Build one with "swin-deploy build-engine --strip-weights", '
            "or use the engines as they are."
        )
    built = []
    with bundle.compiling(lambda: _LOG.info("Waiting for another process that compiles into %s", bundle.path)) as bundle:
        for file in stripped:
            entry = bundle.engines[file]
            facts = {**entry.to_dict(), "options": {**entry.options.chosen("strip_weights"), "refitted": True}}
            facts = {name: value for name, value in facts.items() if name not in ("bytes", "sha256", "seconds")}
            facts["refitted_from"] = entry.sha256
            facts["fingerprint"] = fingerprint({"refitted_from": entry.sha256, "graph": entry.parent})
            target = file.replace("-stripped-", "-refitted-")
            if target == file:
                target = file.removesuffix(".engine") + "-refitted.engine"
            known = bundle.engines.get(target)
            if known is not None and known.fingerprint == facts["fingerprint"] and _is_ours(bundle, target):
                bundle.verified_path(target)
                _LOG.info("Reusing %s", target)
                built.append(Built(target, known, reused=True))
                continue
            graph = bundle.graphs.get(entry.graph)
            if graph is None or graph.sha256 != entry.parent:
                raise EngineError(
                    f"{file} was built from another version of {entry.graph} and accepts only its weights. "
                    'Build it again with "swin-deploy build-engine --strip-weights".'
                )
            if (why := bundle.untrusted(file, "swin-deploy build-engine --strip-weights")) is not None:
                raise UntrustedEngineError(why)
            _LOG.info("Refitting %s from %s", file, entry.graph)
            with natives_freed():
                paths = bundle.verified_path(file), bundle.verified_path(entry.graph)
                plan = refitted_plan(entry.backend, entry.backend_version, entry.gpu, *paths)
            bundle = bundle.with_file(target, facts, plan)
            built.append(Built(target, bundle.engines[target], reused=False))
    return tuple(built)


def _is_ours(bundle: Bundle, file: str) -> bool:
    return bundle.place(file).exists() and not bundle.foreign(file)


def refitted_plan(backend: str, release: str, gpu: str, file: Path, graph: Path) -> bytes:
    """Return the engine `file`, built by `release` for `gpu`, with the weights of the ONNX file `graph`."""
    devices = cuda_devices()
    if not devices or devices[0].capability != gpu:
        here = f"{devices[0].capability} ({devices[0].name})" if devices else "none that is usable"
        first = seen_first(gpu)
        way = f"with {first[0]} before it" if first else "on the target machine"
        raise EngineError(
            f"{file} was compiled for {gpu}, where it must be refitted, and the NVIDIA GPU of this machine is {here}. Run "
            f"this {way}."
        )
    trt = load_compiler(backend)
    title = f"{COMPILERS[backend][1]} {trt.__version__}"
    if str(trt.__version__) != release:
        raise EngineError(f"{file} was compiled by release {release}, and {title} is installed here. Install that release.")
    watch = Watch()
    with log_callback(trt, watch.hear) as logger:
        return _refitted(trt, title, file, graph, watch, logger)


def _refitted(trt: Any, title: str, file: Path, graph: Path, watch: Watch, logger: Any) -> bytes:
    runtime = trt.Runtime(logger)
    runtime.engine_host_code_allowed = True  # version-compatible plans bring a runtime of their own
    engine = runtime.deserialize_cuda_engine(file.read_bytes())
    if engine is None:
        raise EngineError(f"{title} cannot load {file}: {joined(watch.errors)}. Compile it again.")
    refitter = trt.Refitter(engine, logger)
    weights = trt.OnnxParserRefitter(refitter, logger)
    if not weights.refit_from_file(str(graph)) or refitter.get_missing_weights() or not refitter.refit_cuda_engine():
        missing = [f"no weights for {name}" for name in refitter.get_missing_weights()]
        raise EngineError(f"{title} cannot refit {file}: {joined(watch.errors + missing)}. Compile it again with its weights.")
    serialization = engine.create_serialization_config()
    serialization.clear_flag(trt.SerializationFlag.EXCLUDE_WEIGHTS)
    plan = engine.serialize_with_config(serialization)
    watch.check()
    if plan is None:
        raise EngineError(f"{title} cannot write the refitted {file}: {joined(watch.errors)}. Compile it with its weights.")
    return bytes(plan)
