"""Choose what "auto" runs: measure the candidates that agree with PyTorch, and use the fastest.

The measurement is cached in the user's cache folder for this bundle, these libraries and this processor. `tune` stores it in
the bundle instead, for other machines of the same kind.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import json
import logging
import math
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from swin_deploy.bundle import Bundle, size_text
from swin_deploy.dependencies import installed_versions
from swin_deploy.errors import BackendError, BundleError, MissingDependencyError, MissingKernelError, UsageError, shown
from swin_deploy.files import json_from
from swin_deploy.gpus import cuda_devices, cuda_version
from swin_deploy.machine import processor_features, processor_name, usable_cores
from swin_deploy.options import Size
from swin_deploy.parity import Reference, Verdict, check_runtime, verdict_text

from .base import Runtime
from .user_cache import cache_folder, read_cached, write_cached

SECONDS, FEWEST_CALLS = 0.5, 7  # for each candidate
NOT_KNOWN = ""  # verdict on a candidate that was not measured yet
LOG = logging.getLogger("swin_deploy")
LIBRARIES = ("swin-deploy", "onnxruntime", "onnxruntime-gpu", "openvino", "torch", "numpy") + tuple(
    f"tensorrt{kind}{cuda}" for kind in ("", "-lean", "-rtx") for cuda in ("", "-cu12", "-cu13")
)


@dataclass(frozen=True)
class Candidate:
    """A way to run a bundle."""

    backend: str
    precision: str
    device: str

    def __str__(self) -> str:
        return f"{self.backend} {self.precision} on {self.device}"


@dataclass(frozen=True)
class Measured:
    """The result of measuring a candidate: the shortest time of a call with one image, because other load only adds to it.

    A candidate that `failed` to load or run is not cached, because that may differ next time.
    """

    candidate: Candidate
    milliseconds: float | None
    verdict: str
    failed: bool = False
    error: Exception | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Description:
    """What runs a model, and why. `graphs` has the file for each image size; `measured` is empty if there was one candidate."""

    bundle: str
    backend: str
    version: str
    device: str
    precision: str
    threads: int
    graphs: Mapping[Size, str]
    reason: str
    measured: tuple[Measured, ...] = ()
    batches: tuple[int, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the description as JSON values."""
        graphs = [{"image_size": list(size), "file": file} for size, file in self.graphs.items()]
        measured = [{**asdict(m.candidate), "milliseconds": m.milliseconds, "verdict": m.verdict} for m in self.measured]
        return {**asdict(replace(self, measured=())), "graphs": graphs, "measured": measured}

    def __str__(self) -> str:
        threads = f", {self.threads} threads" if self.threads else ""
        lines = [f"{self.bundle}: {self.backend} {self.version}, {self.precision}, on {self.device}{threads}"]
        lines += [f"  {size_text(size)}: {file}" for size, file in self.graphs.items()]
        lines += [f"  why: {self.reason}"]
        for row in self.measured:
            taken = "not timed" if row.milliseconds is None else f"{row.milliseconds:.2f} ms"
            lines.append(f"  {taken:>12}  {row.candidate}: {row.verdict}")
        return "\n".join(lines)


Kept = tuple[str, tuple[Measured, ...]]  # time of the measurement, results
Files = Mapping[Candidate, Mapping[Size, str]]  # what each candidate runs
LOADING = (BackendError, BundleError, MissingDependencyError, UsageError)  # errors of a candidate that does not load
Open = Callable[[Candidate], tuple[str, Runtime]]  # -> file of the first image size, runtime


def choose(
    bundle: Bundle,
    candidates: Sequence[Candidate],
    open_first: Open,
    threads: int,
    failed: Mapping[Candidate, Exception] | None = None,
    tuned: Kept | None = None,
    anew: bool = False,
) -> tuple[Candidate, str, tuple[Measured, ...]]:
    """Return the fastest correct candidate, the reason, and the measurements: `tuned`, or made now or earlier on this machine.

    Candidates in `failed` are excluded this time. `anew` ignores earlier measurements. Raises BackendError if no candidate runs
    and agrees with PyTorch.
    """
    key: dict[str, Any] = {} if tuned else _key(bundle, candidates, threads)
    file = None if tuned else _cache_file(key)
    kept = tuned or (None if anew else _read(file, key, candidates))
    when, known = kept or (_now(), tuple(Measured(one, None, NOT_KNOWN) for one in candidates))
    lost = {one: Measured(one, None, str(error), True, error) for one, error in (failed or {}).items()}
    rows = _measured(bundle, [lost.get(row.candidate, row) for row in known], open_first)
    lasting = tuple(
        before if row.candidate in lost else Measured(row.candidate, None, NOT_KNOWN) if row.failed else row
        for before, row in zip(known, rows, strict=True)
    )
    if lasting != known and any(row.milliseconds is not None for row in rows):
        _write(file, key, when, lasting)
    timed = [row for row in rows if row.milliseconds is not None]
    if not timed and (error := rows[0].error) is not None and len({row.verdict for row in rows}) == 1:
        raise error  # all failed for the same reason
    if not timed:
        raise BackendError("No candidate runs this bundle: " + "; ".join(f"{r.candidate}: {r.verdict}" for r in rows))
    best = min(timed, key=lambda row: row.milliseconds or 0)
    those = f"the fastest of {len(timed)} that agree" if len(timed) > 1 else "the only one that agrees"
    where = ", stored in the bundle by tune" if tuned else ""
    reason = f"{those} with PyTorch, one image at a time, measured at {when}{where}"
    return best.candidate, reason, rows


def tuned_before(bundle: Bundle, files: Files, threads: int) -> Kept | None:
    """Return what `tune` stored in the bundle for all candidates on this kind of machine; None if it did not.

    The candidates are those of this machine, so a bundle cannot add one.
    """
    if not bundle.manifest.tuning:
        return None
    machine, facts = _machine(threads), {candidate: _facts(bundle, candidate, files[candidate]) for candidate in files}
    for tuning in reversed(bundle.manifest.tuning):
        if tuning.machine == machine:
            found = {one: next((row for row in tuning.candidates if row.has(fact)), None) for one, fact in facts.items()}
            rows = tuple(Measured(one, row.milliseconds, row.verdict) for one, row in found.items() if row is not None)
            if len(rows) == len(found) and any(row.milliseconds is not None for row in rows):
                LOG.info("Using the measurement that tune stored in %s at %s", bundle.path, tuning.measured)
                return tuning.measured, rows
    return None


def tuning_of(bundle: Bundle, files: Files, threads: int, rows: Sequence[Measured]) -> dict[str, Any]:
    """Return measurements as the JSON values that the manifest has for `tuned_before`."""
    facts = [_facts(bundle, row.candidate, files[row.candidate]) for row in rows]
    candidates = [
        {**fact, "milliseconds": row.milliseconds, "verdict": shown(row.verdict)} for fact, row in zip(facts, rows, strict=True)
    ]
    return {"measured": _now(), "machine": _machine(threads), "candidates": candidates}


def _machine(threads: int) -> dict[str, Any]:
    """Return what a measurement depends on besides the candidate, as JSON values. Named threads run on any number of cores."""
    return {
        "processor": processor_name(),
        "features": list(processor_features()),
        "system": f"{platform.system()} {platform.machine()}",
        "threads": threads,
        "cores": None if threads else usable_cores(),
        "gpus": [device.name for device in cuda_devices()],
        "cuda": cuda_version(),
    }


def _facts(bundle: Bundle, candidate: Candidate, files: Mapping[Size, str]) -> dict[str, Any]:
    """Return a candidate, the versions of its libraries, and the digest of what it runs, as JSON values."""
    graphs = [bundle.graphs.get(file) for file in files.values()]
    run = [*files.values(), *(graph.weights for graph in graphs if graph is not None and graph.weights)]
    digests = json.dumps([(file, bundle.files[file].sha256) for file in run])
    names = ("swin-deploy", *(name for name in LIBRARIES if name.startswith(candidate.backend)))
    digest = hashlib.sha256(digests.encode()).hexdigest()
    return {**asdict(candidate), "libraries": installed_versions(names), "files": digest}


def _now() -> str:
    return dt.datetime.now().astimezone().isoformat(timespec="seconds")


def _measured(bundle: Bundle, known: Sequence[Measured], open_first: Open) -> tuple[Measured, ...]:
    """Return `known` with the missing measurements made."""
    rows = list(known)
    unknown = sum(row.verdict == NOT_KNOWN for row in rows)
    if unknown and not any(row.milliseconds is not None for row in rows):
        LOG.info("Measuring once which of %d candidates runs %s fastest", unknown, bundle.path)
    elif unknown:
        LOG.info("Trying %d of %d candidates for %s again, which failed before", unknown, len(rows), bundle.path)
    for number, row in enumerate(rows):
        if row.verdict == NOT_KNOWN:
            best = min((one.milliseconds for one in rows if one.milliseconds is not None), default=math.inf)
            rows[number] = _measure(bundle, row.candidate, open_first, best)
    return tuple(rows)


def _measure(bundle: Bundle, candidate: Candidate, open_first: Open, best: float = math.inf) -> Measured:
    """Measure one candidate, loaded alone, because the threads of two back ends in one process disturb each other.

    Stops early if two calls take more than three times the `best` milliseconds so far.
    """
    try:
        file, runtime = open_first(candidate)
    except LOADING as error:
        return Measured(candidate, None, str(error), not isinstance(error, MissingKernelError | UsageError), error)
    with runtime:
        reference = Reference.load(bundle, bundle.graph_of(file).reference)
        try:
            verdict: Verdict = check_runtime(reference, runtime, file, candidate.precision, together=False)
            if not verdict.verified:
                return Measured(candidate, None, verdict.mismatch())
            feeds = {name: feed[:1] for name, feed in reference.feeds.items()}
            out = runtime.run(feeds)
            times: list[float] = []
            begun = time.perf_counter()
            while len(times) < FEWEST_CALLS or time.perf_counter() - begun < SECONDS:
                if len(times) > 1 and min(times) > 3 * best:
                    break
                start = time.perf_counter()
                runtime.run(feeds, out)
                times.append((time.perf_counter() - start) * 1e3)
        except BackendError as error:
            return Measured(candidate, None, str(error), failed=True)
    return Measured(candidate, min(times), verdict_text(verdict.agreement.relative_l2))


def _key(bundle: Bundle, candidates: Sequence[Candidate], threads: int) -> dict[str, Any]:
    """Return everything that the choice depends on, as JSON values."""
    return {
        "bundle": bundle.digest,
        "candidates": [asdict(candidate) for candidate in candidates],
        "libraries": installed_versions(LIBRARIES),
        "machine": {**_machine(threads), "cores": usable_cores(), "visible": os.environ.get("CUDA_VISIBLE_DEVICES", "")},
    }


def _cache_file(key: Mapping[str, Any]) -> Path | None:
    """Return the cache file for `key`; None without a cache folder."""
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    folder = cache_folder("auto")
    return folder / f"{name}.json" if folder else None


def _read(file: Path | None, key: Mapping[str, Any], candidates: Sequence[Candidate]) -> Kept | None:
    """Return a cached measurement; None if there is none, or it cannot be read."""
    try:
        raw = json_from(read_cached(file), str(file))
        if raw["key"] != key:
            return None
        rows = tuple(
            Measured(candidate, None if ms is None else float(ms), str(verdict))
            for candidate, (ms, verdict) in zip(candidates, raw["rows"], strict=True)
        )
        return str(raw["when"]), rows
    except (ValueError, KeyError, TypeError):
        return None


def _write(file: Path | None, key: Mapping[str, Any], when: str, rows: Sequence[Measured]) -> None:
    """Cache a measurement, if the folder can be written."""
    text = json.dumps({"key": key, "when": when, "rows": [(row.milliseconds, row.verdict) for row in rows]}, indent=2)
    write_cached(file, text.encode())
