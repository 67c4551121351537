"""Collect what a report shows, from the functions behind the other verbs and from the manifest."""

from __future__ import annotations

import datetime as dt
import json
import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swin_deploy.bundle import Bundle
from swin_deploy.errors import UsageError
from swin_deploy.manifest import EngineEntry, GraphEntry
from swin_deploy.options import EvaluateSpec, ReportSpec

if TYPE_CHECKING:
    from swin_deploy.calib.data import Samples
    from swin_deploy.exporters.inspection.costs import EngineCost

    from .image_views import ImageView

LIBRARIES = ("numpy", "Pillow", "onnx", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "tensorrt-rtx", "torch")
MOST_KERNELS = 20  # of an engine, those that move the most bytes
MOST_LABELS = 1000
BATCH = 8


@dataclass(frozen=True)
class ReportContents:
    """The figures of a report as JSON values, and the pictures of its images."""

    data: Mapping[str, Any]
    views: tuple[ImageView, ...]


def collect_report(bundle: Bundle, spec: ReportSpec) -> ReportContents:
    """Measure what `spec` asks for, and collect it with what the bundle stores."""
    bench = None if spec.bench is None else _bench_result(Path(spec.bench))
    evaluation = None if spec.evaluation is None else _evaluate_result(Path(spec.evaluation))
    verified = _verified(bundle, spec)
    bundle = Bundle.open(bundle.path, spec.trust)  # `verify` may have updated the manifest
    for file in bundle.files:
        bundle.verified_path(file)
    from swin_deploy.exporters.inspection.costs import inspect_bundle

    inspection = inspect_bundle(bundle, spec.gpu)
    views: tuple[ImageView, ...] = ()
    images: dict[str, Any] | None = None
    samples: Samples | None = None
    if spec.data is not None:
        from swin_deploy.calib.data import samples_for

        samples = samples_for(bundle, spec.data, spec.samples, spec.labels, skip=True)
        if evaluation is None:
            from swin_deploy.api.evaluate import evaluate_samples, json_of_evaluate

            options = EvaluateSpec(
                spec.data, ignore_labels=spec.ignore_labels, batch=BATCH, progress=spec.progress, trust=spec.trust
            )
            title = samples.source.title if not isinstance(spec.data, Path) else spec.data
            evaluation = json_of_evaluate(bundle, title, evaluate_samples(bundle, samples, options))
        from .image_views import views_of_images

        views, images = views_of_images(bundle, samples, spec.progress)
    from .activation_ranges import ranges_of_graph

    data = {
        "created": dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds"),
        "here": _here(),
        "bundle": _facts(bundle),
        "model": _model(bundle),
        "files": _files(bundle),
        "parity": _parity(bundle, verified),
        "verify": verified,
        "inspect": _without_layers(inspection.to_dict()),
        "graphs": _graphs(bundle),
        "engines": _engines(bundle),
        "kernels": {
            f"{one.name} {one.batch[1]}": found for one in inspection.engines if (found := _largest_kernels(one)) is not None
        },
        "evaluate": evaluation,
        "bench": bench,
        "tuning": [one.to_dict() for one in bundle.manifest.tuning],
        "quantized": _quantized(bundle, lambda file: ranges_of_graph(bundle, file, samples, spec.progress)),
        "images": images,
    }
    data |= {"overview": _overview(bundle, data)}
    return ReportContents({**data, "unverified": _unverified(bundle, data)}, views)


def figure_or_none(value: object) -> float | None:
    """Return a finite number; None for anything else, since nothing checks the facts of a manifest that only people read."""
    fits = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if fits else None  # type: ignore[arg-type]


def _verified(bundle: Bundle, spec: ReportSpec) -> dict[str, Any]:
    from swin_deploy.api.evaluate import json_of_verify, verify
    from swin_deploy.runtimes.backends import BACKENDS

    found = {}
    for backend in dict.fromkeys(spec.verify):
        device = "cpu" if "cpu" in BACKENDS[backend].devices else "cuda"
        verdicts = verify(bundle.path, backend=backend, device=device, trust=spec.trust)
        found[backend] = json_of_verify(Bundle.open(bundle.path), verdicts)
    return found


def _here() -> dict[str, Any]:
    from swin_deploy import __version__
    from swin_deploy.dependencies import installed_versions
    from swin_deploy.machine import this_machine

    machine = this_machine()
    libraries = installed_versions(LIBRARIES)
    return {"machine": str(machine), "python": machine.python, "libraries": {"swin-deploy": __version__, **libraries}}


def _facts(bundle: Bundle) -> dict[str, Any]:
    manifest = bundle.manifest
    stated = manifest.preprocessing
    return {
        "path": str(bundle.path),
        "name": bundle.name or bundle.path.resolve().name,
        **{name: getattr(manifest, name) for name in ("created", "variant", "source", "weights_key", "target", "opset")},
        "framework": manifest.semantics,
        "task": bundle.task.to_dict(),
        "notes": list(manifest.notes),
        "tools": dict(manifest.tools),
        "preprocessing": bundle.preprocessor.summary(),
        "preprocessing_from": stated.source if stated else "",
        "preprocessing_assumed": stated.assumed if stated else "",
        "embedded": _or_none(next(iter(bundle.graphs_of("fp32").values())).preprocessing),
    }


def _or_none(record: Any) -> dict[str, Any] | None:
    return None if record is None else record.to_dict()


def _model(bundle: Bundle) -> dict[str, Any]:
    from swin_deploy.models.windows import stage_grids

    config, classes = bundle.config, bundle.task.name == "image-classification" and bundle.config.has_classes
    stages = [
        {
            "map": [plan.height, plan.width],
            "blocks": len(plan.grids),
            "channels": config.width(stage),
            "heads": config.num_heads[stage],
            "mlp": config.mlp_width(stage),
            "window": list(plan.grids[0].window),
            "shift": list(plan.grids[-1].shift),
            "windows": plan.grids[0].windows,
            "padded": plan.grids[0].padded != (plan.height, plan.width),
        }
        for stage, plan in enumerate(stage_grids(config, bundle.image_size, bundle.task.name == "backbone"))
    ]
    return {
        "version": config.version,
        "image_sizes": [list(size) for size in dict.fromkeys(one.image_size for one in bundle.graphs.values())],
        "channels": config.num_channels,
        "patch": list(config.patch_size),
        "classes": config.num_labels if classes else None,
        "labels": list(config.id2label.values())[:MOST_LABELS] if classes else [],
        "activation": config.score_activation if classes else None,
        "prediction": config.prediction if classes else None,
        "stages": stages,
    }


def _files(bundle: Bundle) -> list[dict[str, Any]]:
    names = {entry.sha256: file for file, entry in bundle.files.items()}
    return [
        {
            "file": file,
            "bytes": entry.bytes,
            "sha256": entry.sha256,
            "parent": entry.parent,
            "parent_file": None if entry.parent is None else names.get(entry.parent),
        }
        for file, entry in bundle.files.items()
    ]


def _graphs(bundle: Bundle) -> list[dict[str, Any]]:
    """Return the inputs and outputs of each graph, the rewrites that it has, and its nodes in a higher precision."""
    return [
        {
            "file": file,
            "opset": entry.opset,
            "inputs": [str(one) for one in entry.inputs],
            "outputs": [str(one) for one in entry.outputs],
            "passes": [{"name": str(one.get("name")), "count": figure_or_none(one.get("count"))} for one in entry.passes],
            "fallbacks": [
                {"at": str(one.get("at")), "nodes": figure_or_none(one.get("nodes")), "reason": str(one.get("reason"))}
                for one in entry.fallbacks
            ],
        }
        for file, entry in bundle.graphs.items()
    ]


def _engines(bundle: Bundle) -> list[dict[str, Any]]:
    return [
        {
            **{name: getattr(entry, name) for name in ("gpu", "backend", "backend_version", "graph", "seconds")},
            "file": file,
            "batches": [list(one.batch) for one in entry.profiles],
            "options": entry.options.chosen(),
        }
        for file, entry in bundle.engines.items()
    ]


def _overview(bundle: Bundle, data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a row for each graph and engine, with the main figures of all sections."""
    scores = {one["file"]: one for one in (data["evaluate"] or {"graphs": ()})["graphs"]}
    verdicts = {one["file"]: one for one in data["parity"]}  # the last one of a file: that of `verify`, if it ran
    bounds: dict[str, float] = {}
    for one in data["inspect"]["engines"]:
        if one["roofline"] is not None:
            bounds.setdefault(one["engine"], one["roofline"]["seconds"] * 1e3)
    rows = []
    entries: dict[str, GraphEntry | EngineEntry] = {**bundle.graphs, **bundle.engines}
    for file, entry in entries.items():
        weights = getattr(entry, "weights", None)
        score = scores.get(file, {})
        rows.append(
            {
                "file": file,
                "precision": entry.precision,
                "bytes": entry.bytes + (bundle.files[weights].bytes if weights else 0),
                "verified": verdicts[file]["verified"],
                "relative_l2": verdicts[file].get("relative_l2"),
                **{name: figure_or_none(score.get(name)) for name in ("top1", "top1_agreement", "sqnr_db")},
                **_fastest(data["bench"], bundle, file),
                "roofline_ms": bounds.get(file),
            }
        )
    return rows


def _fastest(bench: Mapping[str, Any] | None, bundle: Bundle, file: str) -> dict[str, Any]:
    """Return the least median time of one image, and who measured it: a result of `bench` names a precision, not a file."""
    from swin_deploy.runtimes.backends import BACKENDS

    entry, engines = bundle.files[file].to_dict(), bundle.engines
    best: tuple[float, str] | None = None
    for row in (bench or {"rows": ()})["rows"]:
        known = BACKENDS.get(row["backend"])
        fits = known is not None and known.engines == (file in engines) and row["precision"] == entry["precision"]
        if fits and row["model"] == "swin-deploy" and row["batch"] == 1 and list(bundle.image_size) == entry["image_size"]:
            measured = (row["percentiles_ms"]["50"], f"{row['backend']}, {row['device']}")
            best = measured if best is None else min(best, measured)
    return {"ms": best and best[0], "measured_by": best and best[1]}


def _parity(bundle: Bundle, verified: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the stored verdict of each graph, and those of the runs of `verify`."""
    rows = []
    for file, entry in bundle.graphs.items():
        stored: Mapping[str, Any] = {} if entry.agreement is None else entry.agreement.to_dict()
        figures = {"relative_l2": entry.agreement and entry.agreement.relative_l2}
        figures |= {
            name: figure_or_none(stored.get(name)) for name in ("tolerance_relative_l2", "max_abs", "cosine", "top1", "samples")
        }
        verdict = entry.agreement and entry.agreement.verified
        backend = str(stored.get("backend", ""))
        rows.append(
            {"file": file, "precision": entry.precision, "from": "manifest", "verified": verdict, **figures, "backend": backend}
        )
    for file, engine in bundle.engines.items():
        if not any(row["file"] == file for one in verified.values() for row in one["graphs"]):
            rows.append({"file": file, "precision": engine.precision, "from": "manifest", "verified": None, "backend": ""})
    for run in verified.values():
        for row in run["graphs"]:
            kept = (
                "file",
                "verified",
                "relative_l2",
                "tolerance_relative_l2",
                "max_abs",
                "cosine",
                "top1",
                "samples",
                "backend",
            )
            precision = bundle.files[row["file"]].to_dict()["precision"]
            rows.append({"precision": precision, "from": "verify", **{name: row.get(name) for name in kept}})
    return rows


def _without_layers(found: dict[str, Any]) -> dict[str, Any]:
    figures = ("kernels", "fused_attention", "bytes_moved", "roles", "types")  # an older layer report may lack some
    engines = [{**dict.fromkeys(figures), **one} for one in found["engines"]]
    for one in engines:
        one.pop("layers", None)
        one["roles"] = one["roles"] or {}
    return {**found, "engines": engines}


def _largest_kernels(cost: EngineCost) -> list[dict[str, Any]] | None:
    """Return the kernels of an engine that move the most bytes, by its layer report; None if it has no readable one."""
    from swin_deploy.exporters.engines.layer_report import EngineTensor

    def size(tensors: Any) -> int:
        return sum(
            EngineTensor(str(t["name"]), tuple(map(int, t["dims"])), str(t["datatype"])).bytes or 0 for t in tensors or ()
        )

    rows: list[dict[str, Any]] = []
    try:
        for number_of, layer in enumerate(one for one in cost.figures.layers if one.get("role")):
            parts = {part: size(layer.get(part)) for part in ("inputs", "constants", "outputs")}
            row = {"number": number_of, "name": str(layer["name"]), "role": str(layer["role"]), **parts}
            rows.append({**row, "bytes": sum(parts.values()), "tactic": str(layer.get("tactic", ""))})
    except (KeyError, TypeError, ValueError, AttributeError):
        return None
    return sorted(rows, key=lambda row: row["bytes"], reverse=True)[:MOST_KERNELS] or None


def _quantized(bundle: Bundle, ranges: Callable[[str], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return what `quantize` stored about each INT8 and FP8 graph."""
    found = []
    for file, entry in bundle.graphs.items():
        if entry.precision not in ("int8", "fp8"):
            continue
        ranking = [(one.get("name"), figure_or_none(one.get("sqnr_db"))) for one in entry.sensitivity or ()]
        layers = [(one.get("name"), figure_or_none(one.get("weight_sqnr_db"))) for one in entry.layers]
        gate = dict(entry.gate or {})
        kept = gate.get("put_back")
        found.append(
            {
                "file": file,
                "precision": entry.precision,
                "target": entry.target,
                "calibration": _or_none(entry.calibration) or {},
                "layers": [{"name": name, "weight_sqnr_db": db} for name, db in layers if isinstance(name, str)],
                "sensitivity": [{"name": name, "sqnr_db": db} for name, db in ranking if isinstance(name, str)],
                "kept": [name for name in kept if isinstance(name, str)] if isinstance(kept, list) else [],
                "loss": figure_or_none(gate.get("loss")),
                "unit": str(gate.get("unit", "")),
                "on_samples": dict(entry.on_samples or {}),
                "speed": dict(entry.speed or {}),
                "ranges": ranges(file),
            }
        )
    return found


def _unverified(bundle: Bundle, data: Mapping[str, Any]) -> list[dict[str, str]]:
    """List what nobody has checked, why that matters, and what to do."""
    path, found = shlex.quote(str(bundle.path)), []

    def add(what: str, why: str, todo: str = "") -> None:
        found.append({"what": what, "why": why, "todo": todo})

    rows: dict[str, list[Any]] = {}
    for row in data["parity"]:
        rows.setdefault(row["file"], []).append(row["verified"])
    for file, verdicts in rows.items():
        entry = bundle.files[file]
        if False in verdicts:
            add(file, "It disagrees with PyTorch.", f"swin-deploy export {path}")
        elif True not in verdicts and isinstance(entry, GraphEntry):
            add(file, "It was never compared with PyTorch.", f"swin-deploy verify {path}")
        elif True not in verdicts:
            backend = bundle.engines[file].backend
            why = "It was never compared with PyTorch: that needs its GPU."
            add(file, why, f"swin-deploy report {path} -o report.html --verify {backend}")
    for file, engine in bundle.engines.items():
        graph = bundle.graphs.get(engine.graph)
        if graph is None or graph.sha256 != engine.parent:
            add(file, "It was compiled from another version of its graph.", f"swin-deploy build-engine {path} --force")
    for file, graph in bundle.graphs.items():
        if graph.left_out:
            names = ", ".join(map(str, graph.left_out))
            add(file, f"Rewrites that changed the outputs were left out: {names}.")
    stated = bundle.manifest.preprocessing
    if stated and stated.assumed:
        add("Preprocessing", stated.assumed, "swin-deploy export --preprocessor FILE")
    if bundle.manifest.source.startswith("random weights"):
        add("Weights", "They are random, so labels and attention mean nothing.", "swin-deploy export --weights PATH")
    evaluated = data["evaluate"]
    if evaluated is None:
        add("Accuracy", "The graphs were not compared on images.", f"swin-deploy report {path} -o report.html --data DIR")
    elif evaluated["labels"] is None:
        add(
            "Accuracy",
            "The images have no labels, so the graphs are compared with fp32 only.",
            f"swin-deploy evaluate {path} --data DIR --labels FILE",
        )
    if data["bench"] is None and not data["tuning"]:
        add("Speed", "Nothing was measured.", f"swin-deploy bench {path} --json > bench.json")
    return found


def _evaluate_result(path: Path) -> dict[str, Any]:
    """Read the output of `evaluate --json`."""
    raw = _result(path, "evaluate")
    try:
        kept = {name: raw[name] for name in ("bundle", "data", "samples", "labels", "against", "fp32_against_pytorch")}
        graphs = [_figures(one, ("file", "precision", "backend"), ("samples",)) for one in raw["graphs"]]
        if not all(isinstance(kept[name], str | None) for name in ("data", "labels", "against")):
            raise ValueError("a text is none")
        return {**kept, "graphs": graphs, "not_evaluated": list(raw["not_evaluated"]), "failed": list(raw["failed"])}
    except (KeyError, TypeError, ValueError) as error:
        raise _no_result(path, "evaluate") from error


def _bench_result(path: Path) -> dict[str, Any]:
    """Read the output of `bench --json`."""
    raw = _result(path, "bench")
    try:
        rows = []
        for one in raw["rows"]:
            row = _figures(one, ("model", "backend", "precision", "device"), ("batch", "images_per_second", "peak_memory_mb"))
            _figures(one["percentiles_ms"], (), ("50", "90", "99"))
            _figures(one["ratio"], (), ("low", "median", "high"))
            if one["batch"] < 1 or not one["round_ms"] or None in map(figure_or_none, one["round_ms"]):
                raise ValueError("the times are none")
            rows.append(row)
        machine = raw["machine"]
        return {**raw, "rows": rows, "machine": {**machine, "processor": str(machine["processor"])}}
    except (KeyError, TypeError, ValueError) as error:
        raise _no_result(path, "bench") from error


def _figures(row: Mapping[str, Any], texts: Sequence[str], numbers: Sequence[str]) -> dict[str, Any]:
    """Return a row of a result. Raises ValueError if a text or number is none."""
    if not all(isinstance(row[name], str) for name in texts) or None in (figure_or_none(row[name]) for name in numbers):
        raise ValueError("the row has other types")
    return dict(row)


def _result(path: Path, verb: str) -> dict[str, Any]:
    from swin_deploy.files import json_file

    raw = json_file(path, UsageError, f"Expected the output of `swin-deploy {verb} --json`.")
    if not isinstance(raw, dict):
        raise _no_result(path, verb)
    return json.loads(json.dumps(raw))  # type: ignore[no-any-return]


def _no_result(path: Path, verb: str) -> UsageError:
    return UsageError(f"{path} is not a result of `{verb}`. Expected the output of `swin-deploy {verb} --json`.")
