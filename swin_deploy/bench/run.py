"""Plan what to measure of a bundle, measure it, and put the result together."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from swin_deploy.bundle import Bundle, size_text
from swin_deploy.config import SwinConfig
from swin_deploy.dependencies import require
from swin_deploy.errors import BackendError, MissingDependencyError, UsageError
from swin_deploy.files import scratch_folder
from swin_deploy.gpus import cuda_devices
from swin_deploy.machine import Machine, this_machine
from swin_deploy.manifest import EngineEntry, GraphEntry
from swin_deploy.option_parsers import BundlePath, bundle_keywords
from swin_deploy.options import BenchSpec, Size

from .race import BenchCase, Measurement, Request, race, reference_of

BATCHES = (1, 8)
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class BenchResult:
    """The measurements, what they are compared with, the names of the GPUs in use, and the reasons for skipped cases."""

    machine: Machine
    gpus: Mapping[str, str]
    reference: str
    rows: tuple[Measurement, ...]
    skipped: Mapping[BenchCase, str]

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
        _LOG.info("Measuring %d candidates for %g s each, after loading them", len(requests), spec.seconds)
        rows, skipped = race(requests, spec.seconds, spec.rounds, spec.progress, check)
    run_by = {row.case: row.run_by for row in rows}
    references = dict.fromkeys(reference_of(case, run_by) for case in run_by)
    names = (run_by[one] + ("" if one.device == "cpu" else f" on {one.device}") for one in references)
    gpus = {device: _gpu_name(device) for device in dict.fromkeys(one.device for one in run_by) if device != "cpu"}
    return BenchResult(machine, gpus, ", ".join(dict.fromkeys(names)), rows, skipped)


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
    usual = BATCHES if bundle.static_batch is None else (bundle.static_batch,)
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
