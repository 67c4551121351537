"""Plan what to measure of a bundle, measure it, and put the result together."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from swin_deploy.bundle import Bundle, size_text
from swin_deploy.config import SwinConfig
from swin_deploy.dependencies import require
from swin_deploy.errors import BackendError, MissingDependencyError, UsageError
from swin_deploy.files import scratch_folder
from swin_deploy.gpus import cuda_devices
from swin_deploy.latency_budget import largest_batch
from swin_deploy.machine import Machine, this_machine
from swin_deploy.manifest import EngineEntry, GraphEntry
from swin_deploy.option_parsers import BundlePath, bundle_keywords
from swin_deploy.options import BenchSpec, Size

from .race import BenchCase, Measurement, Request, race, reference_of

BATCHES = (1, 8)
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class BenchResult:
    """The measurements, what they are compared with, the names of the GPUs in use, and the reasons for skipped cases.

    With a budget `latency_ms`, each row has the largest batch that keeps it, and its ratio is that of the times per image.
    """

    machine: Machine
    gpus: Mapping[str, str]
    reference: str
    rows: tuple[Measurement, ...]
    skipped: Mapping[BenchCase, str]
    latency_ms: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as JSON values."""
        return {
            **vars(self),
            "machine": asdict(self.machine),
            "rows": [row.to_dict() for row in self.rows],
            "skipped": [{**vars(case), "reason": reason} for case, reason in self.skipped.items()],
        }


@bundle_keywords(BenchSpec)
def bench(bundle: BundlePath, spec: BenchSpec) -> BenchResult:
    """Measure each candidate for the first image size of the bundle in its own process.

    What is named and does not run is an error; of the defaults it is skipped.
    """
    found, machine = Bundle.open(bundle, spec.trust), this_machine()
    config = found.config
    if spec.latency_ms is not None and found.static_batch is not None:
        raise UsageError(
            f"{found.path} was exported with --static-batch {found.static_batch} and runs no other. Leave out --latency-ms."
        )
    size, batches = found.image_size, batches_of(found, spec)
    for batch in batches:
        _check_batch(batch, config, size, machine)
    ours = plan_cases(found, spec)

    def check(skipped: Mapping[BenchCase, str]) -> None:
        """Raise the reason if nothing is left of something that was named, or nothing at all."""
        left = ours.keys() - skipped.keys()
        for name, named in (("backend", spec.backends), ("precision", spec.precisions), ("batch", spec.batches)):
            for value in named:
                if value not in {getattr(case, name) for case in left}:
                    raise BackendError(next(skipped[case] for case in ours if getattr(case, name) == value))
        if not left:
            raise BackendError(skipped[next(iter(ours))])

    with scratch_folder("bench") as scratch:
        from .baselines import Baselines

        baselines = Baselines(found, config, size, spec, scratch)
        devices = tuple(dict.fromkeys(case.device for case in ours))
        requests: dict[BenchCase, Request] = {**baselines.pytorch(batches, devices), **ours}
        if spec.baselines:
            requests |= baselines.exports(ours)
        if spec.latency_ms is not None:
            _LOG.info("Measuring %d candidates for %g s at each batch that is tried", len(requests), spec.seconds)
            fits = partial(_check_batch, config=config, size=size, machine=machine)
            rows, skipped = _within(spec.latency_ms, requests, spec, fits, check)
        else:
            _LOG.info("Measuring %d candidates for %g s each, after loading them", len(requests), spec.seconds)
            rows, skipped = race(requests, spec.seconds, spec.rounds, spec.progress, check)
    run_by = {row.case: row.run_by for row in rows}
    references = dict.fromkeys(reference_of(case, run_by, spec.latency_ms is None) for case in run_by)
    names = (run_by[one] + ("" if one.device == "cpu" else f" on {one.device}") for one in references)
    gpus = {device: _gpu_name(device) for device in dict.fromkeys(one.device for one in run_by) if device != "cpu"}
    return BenchResult(machine, gpus, ", ".join(dict.fromkeys(names)), rows, skipped, spec.latency_ms)


def _within(
    budget: float,
    requests: Mapping[BenchCase, Request],
    spec: BenchSpec,
    check_batch: Callable[[int], None],
    check: Callable[[Mapping[BenchCase, str]], None],
) -> tuple[tuple[Measurement, ...], dict[BenchCase, str]]:
    """Find and measure the largest batch of each case that keeps the budget; also return why the others have none.

    `check` is called with the cases that did not load, and may raise. Raises BackendError if no case keeps the budget.
    """
    rows: list[Measurement] = []
    unloaded: dict[BenchCase, str] = {}
    slow: dict[BenchCase, float] = {}
    for case, request in requests.items():
        try:
            found = _measured_within(budget, case, request, spec, check_batch)
        except BackendError as error:
            unloaded[case] = str(error)
            check(unloaded)
        else:
            if isinstance(found, Measurement):
                rows.append(found)
            else:
                slow[case] = found
    if not rows:
        fastest = min(slow, key=slow.__getitem__)
        raise BackendError(
            f"No candidate runs one image within {budget:g} ms. The fastest, {fastest}, takes {slow[fastest]:.4g} ms. Pass a "
            "larger --latency-ms."
        )
    cases = [row.case for row in rows]
    references = [reference_of(case, cases, same_batch=False) for case in cases]
    shown = [_per_image(row, rows[cases.index(reference)]) for row, reference in zip(rows, references, strict=True)]
    over = {case: f"One image takes {time:.4g} ms, and the budget is {budget:g} ms." for case, time in slow.items()}
    return tuple(shown), unloaded | over


def _measured_within(
    budget: float, case: BenchCase, request: Request, spec: BenchSpec, check_batch: Callable[[int], None]
) -> Measurement | float:
    """Return the figures of the largest batch that keeps the budget, or the time of one image if that is over it."""
    measured: dict[int, Measurement] = {}

    def check(unloaded: Mapping[BenchCase, str]) -> None:
        for reason in unloaded.values():
            raise BackendError(reason)

    def milliseconds(batch: int) -> float:
        one = replace(case, batch=batch)
        try:
            check_batch(batch)
            [measured[batch]], _ = race({one: request}, spec.seconds, spec.rounds, spec.progress, check)
        except (BackendError, UsageError) as error:
            if batch == 1:
                raise
            _LOG.info("%s does not run: %s", one, error)
            return math.inf
        median = measured[batch].percentiles_ms[50]
        _LOG.info("%s: median of %.4g ms", one, median)
        return median

    batch, time = largest_batch(budget, milliseconds)
    return measured[batch] if batch else time


def _per_image(row: Measurement, reference: Measurement) -> Measurement:
    """Return `row` with the ratio of the times per image; outputs of other batches are not compared."""
    ours, theirs = (np.asarray(one.round_ms) / one.case.batch for one in (row, reference))
    low, middle, high = np.quantile(ours / theirs, (0.25, 0.5, 0.75)).tolist()
    return replace(row, ratio={"median": middle, "low": low, "high": high}, relative_l2=None)


def _gpu_name(device: str) -> str:
    found, number = cuda_devices(), int(device.partition(":")[2])
    return found[number].name if number < len(found) else "unknown"


def _check_batch(batch: int, config: SwinConfig, size: Size, machine: Machine) -> None:
    """Raise UsageError if the pixels and the first hidden layer of a batch do not fit into memory."""
    needed = 4 * batch * (math.prod(size) * config.num_channels + math.prod(config.grid(size)) * config.mlp_width(0))
    if machine.free_memory is not None and needed > machine.free_memory:
        raise UsageError(
            f"A batch of {batch} images of {size_text(size)} pixels needs more than {needed / 1e9:.0f} GB, and "
            f"{machine.free_memory / 1e9:.1f} GB of memory are available. Use a smaller batch."
        )


def batches_of(bundle: Bundle, spec: BenchSpec) -> tuple[int, ...]:
    """Return the batch sizes to measure: those of `spec`, or the static batch of the bundle, or the default."""
    usual = (1,) if spec.latency_ms is not None else BATCHES if bundle.static_batch is None else (bundle.static_batch,)
    return tuple(dict.fromkeys(spec.batches or usual))


def plan_cases(bundle: Bundle, spec: BenchSpec) -> dict[BenchCase, Request]:
    """Return what to measure of the bundle itself, and what the process of each case loads."""
    from swin_deploy.runtimes.backends import BACKENDS
    from swin_deploy.runtimes.gpu.engine_fit import engines_here, engines_of, runnable_engines
    from swin_deploy.runtimes.model_from_bundle import devices_here

    for name in spec.backends:
        if not BACKENDS[name].installed:
            require(BACKENDS[name].found, "measure a model")
    # The back end torch is not a default, because PyTorch itself is measured as the reference.
    usual = [name for name, one in BACKENDS.items() if one.installed and one.library != "torch"]
    found: dict[BenchCase, Request] = {}
    for backend in dict.fromkeys(spec.backends or usual):
        engines = BACKENDS[backend].engines
        # A back end that is named is planned even if it does not run there: loading it reports the reason.
        named = [BACKENDS[backend].devices[0] if spec.device == "auto" else spec.device] if spec.backends else []
        for device in devices_here(backend, spec.device) or named:
            entries: Mapping[str, GraphEntry | EngineEntry] = bundle.graphs
            if engines:
                on_gpu = runnable_engines if spec.backends else engines_here  # runnable_engines raises if there is none
                entries = on_gpu(bundle, backend, device) if device != "cpu" else engines_of(bundle, backend)
            held = dict.fromkeys(entry.precision for entry in entries.values())
            asked = spec.precisions or (*held, *(["bf16"] if backend == "openvino" else []))
            if engines and not spec.backends:
                asked = tuple(precision for precision in asked if precision in held)
            for precision in dict.fromkeys(asked):
                request = {"bundle": str(bundle.path), "backend": backend, "precision": precision, "device": device}
                for batch in batches_of(bundle, spec):
                    case = BenchCase("swin-deploy", backend, precision, batch, device=device)
                    found[case] = {**request, "threads": spec.threads, "trust": spec.trust}
    if not found and spec.device != "auto":
        raise UsageError(f"No installed back end runs on {spec.device}. Use another device, or see: swin-deploy doctor")
    if not found:
        raise MissingDependencyError(
            'No back end is installed. Run: pip install "swin-deploy[onnxruntime]", or see: swin-deploy doctor'
        )
    return found
