"""A bundle -> how fast it is on this machine, beside PyTorch and the exports of others."""

from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from swin_deploy.api.load import load
from swin_deploy.arguments import checked
from swin_deploy.bench.race import Candidate, LeftOut, Measurement, Progress, Request, race, reference_of
from swin_deploy.bundle import CONFIG, Bundle
from swin_deploy.config import SwinConfig
from swin_deploy.dependencies import installed, require
from swin_deploy.errors import BackendError, MissingDependencyError, UsageError
from swin_deploy.files import scratch_folder
from swin_deploy.machine import Machine, this_machine
from swin_deploy.specs import PRECISIONS, ExportSpec, Say, Size, silent, size_text

if TYPE_CHECKING:
    import torch

    from swin_deploy.models.checkpoints import Checkpoint

BATCHES = (1, 8)
COMPILED = "torch.compile"
LONGEST = 86_400.0  # seconds for each candidate


@dataclass(frozen=True)
class Bench:
    """What was measured on which machine, and the names of its GPUs by device ("cuda:0") where rows ran there.

    `reference` names the rows that others are compared with, one for each batch and device.
    """

    machine: Machine
    gpus: Mapping[str, str]
    reference: str
    rows: tuple[Measurement, ...]
    left_out: tuple[LeftOut, ...]

    def to_dict(self) -> dict[str, Any]:
        """The figures as JSON values."""
        return {
            "machine": self.machine.to_dict(),
            "gpus": dict(self.gpus),
            "reference": self.reference,
            "rows": [row.to_dict() for row in self.rows],
            "left_out": [{**vars(one.candidate), "reason": one.reason} for one in self.left_out],
        }


@checked
def bench(
    bundle: str | os.PathLike[str],
    *,
    backends: Sequence[str] = (),
    precisions: Sequence[str] = (),
    batches: Sequence[int] = (),
    device: str = "auto",
    threads: int = 0,
    seconds: float = 6.0,
    rounds: int = 10,
    weights: str | os.PathLike[str] | None = None,
    peers: bool = False,
    say: Say = silent,
    progress: Progress | None = None,
) -> Bench:
    """Latency, throughput, memory and cold start of a bundle's first image size here, each candidate in its own process.

    Without `backends`, `precisions` and `batches`: all back ends that are installed (TensorRT's where the bundle has engines
    that run here), the precisions whose graphs or engines the bundle holds (and OpenVINO's bf16), 1 and 8 images. `device` is
    "cpu", "cuda" or "cuda:1"; "auto" is the CPU and the first GPU, each with the back ends that run there. What of these does
    not run is left out; what was named and does not is an
    error. `seconds` is for each candidate, spread over `rounds` in which they take turns. Rows of PyTorch, the reference, are
    added where `weights` names the checkpoint that was exported, or the bundle has random weights. `peers` adds the exports of
    transformers and timm. Raises errors.UsageError for figures that cannot be meant, what loading raises, and
    errors.BackendError when a measuring process dies.
    """
    from swin_deploy.specs import MOST_THREADS

    found, machine = Bundle.open(bundle), this_machine()
    config = SwinConfig.from_dict(found.read_json(CONFIG))
    size, sizes = _image_size(found), tuple(dict.fromkeys(batches or BATCHES))
    if not 0.1 <= seconds <= LONGEST:
        raise UsageError(f"{seconds} seconds cannot be measured. Expected a number from 0.1 to {LONGEST:.0f}.")
    if rounds < 1 or not 0 <= threads <= MOST_THREADS:
        raise UsageError(f"{rounds} rounds and {threads} threads cannot be meant: from 1 up, and from 0 to {MOST_THREADS}.")
    for batch in sizes:
        _check_batch(batch, config, size, machine)
    ours = planned(found, backends, precisions, sizes, threads, device)

    def check(left_out: Sequence[LeftOut]) -> None:
        """Raises the reason where nothing is left of what was asked for by name, or nothing at all."""
        lost = [one for one in left_out if one.candidate in ours]
        left = ours.keys() - {one.candidate for one in lost}
        for name, named in (("backend", backends), ("precision", precisions), ("batch", batches)):
            for value in named:
                if value not in {getattr(candidate, name) for candidate in left}:
                    raise BackendError(next(one.reason for one in lost if getattr(one.candidate, name) == value))
        if not left:
            raise BackendError(lost[0].reason)

    with scratch_folder("bench") as scratch:
        others = Others(found, config, size, threads, scratch, say)
        places = tuple(dict.fromkeys(candidate.device for candidate in ours))
        requests: dict[Candidate, Request] = {**others.pytorch(weights, sizes, places), **ours}
        if peers:
            requests |= others.exports(ours)
        say(f"Measuring {len(requests)} row{'s' * (len(requests) > 1)}, {seconds:g} s each and the time that they take to load")
        raced = race(requests, seconds, rounds, progress or (lambda phase, step, steps: None), check)
    run_by = {row.candidate: row.run_by for row in raced.rows}
    references = dict.fromkeys(reference_of(candidate, run_by) for candidate in run_by)
    names = (run_by[one] + ("" if one.device == "cpu" else f" on {one.device}") for one in references)
    gpus = {place: _gpu_name(place) for place in dict.fromkeys(one.device for one in run_by) if place != "cpu"}
    return Bench(machine, gpus, ", ".join(dict.fromkeys(names)), raced.rows, raced.left_out)


def _gpu_name(device: str) -> str:
    from swin_deploy.gpus import cuda_devices

    found = dict(enumerate(cuda_devices()))
    number = int(device.partition(":")[2])
    return found[number].name if number in found else "unknown"


def _image_size(bundle: Bundle) -> Size:
    height, width = next(iter(bundle.graphs.values()))["image_size"]
    return int(height), int(width)


def _check_batch(batch: int, config: SwinConfig, size: Size, machine: Machine) -> None:
    """Raises UsageError for a batch whose pixels and first hidden layer alone do not fit into memory."""
    if batch < 1:
        raise UsageError(f"A batch of {batch} images cannot be meant. Expected a whole number from 1 up.")
    numbers = math.prod(size) * config.num_channels + math.prod(config.grid(size)) * config.mlp_width(0)
    if machine.free_memory is not None and batch * numbers * 4 > machine.free_memory:
        raise UsageError(
            f"A batch of {batch} images of {size_text(size)} pixels takes more than {batch * numbers * 4 / 1e9:.0f} GB, and "
            f"{machine.free_memory / 1e9:.1f} GB of memory are free here. Take a smaller one."
        )


def planned(
    bundle: Bundle, backends: Sequence[str], precisions: Sequence[str], batches: Sequence[int], threads: int, device: str
) -> dict[Candidate, Request]:
    """What there is to measure of the bundle itself. A back end asked for by name must be installed."""
    from swin_deploy.runtimes.backends import BACKENDS
    from swin_deploy.runtimes.gpu.engines import engines_here, engines_of, runnable_engines
    from swin_deploy.runtimes.model_from_bundle import devices_here

    if unknown := [name for name in backends if name not in BACKENDS]:
        raise UsageError(f'There is no back end "{unknown[0]}". There are: {", ".join(BACKENDS)}.')
    if unknown := [name for name in precisions if name not in PRECISIONS]:
        raise UsageError(f'There is no precision "{unknown[0]}". There are: {", ".join(PRECISIONS)}.')
    for name in backends:
        if not BACKENDS[name].installed:
            require(BACKENDS[name].found, "measure what it runs")
    # The back end torch is left out: PyTorch itself has rows, as the reference.
    usual = [name for name, one in BACKENDS.items() if one.installed and one.library != "torch"]
    found: dict[Candidate, Request] = {}
    for backend in dict.fromkeys(backends or usual):
        # Loading what was named says why it does not run there.
        named = [BACKENDS[backend].devices[0] if device == "auto" else device] if backends else []
        for place in devices_here(backend, device) or named:
            entries: Mapping[str, Any] = bundle.graphs
            if BACKENDS[backend].engines:
                on_gpu = runnable_engines if backends else engines_here  # the former says why there is none
                entries = on_gpu(bundle, backend, place) if place != "cpu" else engines_of(bundle, backend)
            held = dict.fromkeys(str(entry["precision"]) for entry in entries.values())
            asked = precisions or [*held, *(["bf16"] if backend == "openvino" else [])]
            if BACKENDS[backend].engines and not backends:
                asked = [precision for precision in asked if precision in held]
            for precision in dict.fromkeys(asked):
                for batch in batches:
                    request = {"bundle": str(bundle.path), "backend": backend, "precision": precision, "device": place}
                    found[Candidate("swin-deploy", backend, precision, batch, device=place)] = {**request, "threads": threads}
    if not found and device != "auto":
        raise UsageError(f"Nothing that is installed runs on {device}. Take another device, or see: swin-deploy doctor")
    if not found:
        raise MissingDependencyError(
            'Nothing is installed that runs a bundle. Run: pip install "swin-deploy[onnxruntime]", or see: swin-deploy doctor'
        )
    return found


@dataclass(frozen=True)
class Others:
    """The rows beside those of the bundle; what they need is written to `scratch`."""

    bundle: Bundle
    config: SwinConfig
    size: Size
    threads: int
    scratch: Path
    say: Say

    def pytorch(
        self, weights: str | os.PathLike[str] | None, batches: Sequence[int], devices: Sequence[str]
    ) -> dict[Candidate, Request]:
        """PyTorch itself, where the checkpoint is known: transformers' model, or without transformers this package's.

        On a GPU in fp32, in fp16, and in fp16 by torch.compile.
        """
        seed = re.fullmatch(r"random weights, seed (\d+)", str(self.bundle.manifest["source"]))
        if weights is not None:
            require("torch", "measure PyTorch")
        elif seed is None or self.bundle.manifest["notes"] or not installed("torch"):
            what = "torch is not installed" if seed else "the checkpoint that was exported is not named (--weights)"
            self.say(f"No rows of PyTorch: {what}")
            return {}
        path, number = None if weights is None else str(weights), int(seed[1]) if seed else 0
        checkpoint, model = checkpoint_of(self.bundle, path, number), "swin-deploy"
        request: dict[str, Any] = {"torch": str(self.bundle.path), "weights": path, "seed": number, "threads": self.threads}
        if self._transformers_has_it():
            from swin_deploy.bench.baselines import transformers_folder

            model, request = "transformers", {"transformers": str(self.scratch / "same"), "threads": self.threads}
            transformers_folder(checkpoint, self.scratch / "same")
        found: dict[Candidate, Request] = {}
        for device in devices:
            ways = [("pytorch", "fp32")]
            if device != "cpu":
                if not require("torch", "measure PyTorch").cuda.is_available():
                    self.say(f"No rows of PyTorch on {device}: torch is installed without CUDA")
                    continue
                ways += [("pytorch", "fp16"), (COMPILED, "fp16")]
            for (backend, precision), batch in itertools.product(ways, batches):
                placed = {"size": self.size, "placement": (device, precision, backend == COMPILED)}
                found[Candidate(model, backend, precision, batch, device=device)] = {**request, **placed}
        return found

    def exports(self, ours: Iterable[Candidate]) -> dict[Candidate, Request]:
        """What transformers and timm export of this architecture, run by the back ends of `ours`."""
        found: dict[Candidate, Request] = {}
        for model, make in (("transformers", self._transformers), ("timm", self._timm)):
            if not installed(model) or not installed("torch"):
                self.say(f"No rows of {model}: it is not installed" + (" (pip install timm)" if model == "timm" else ""))
                continue
            if self.bundle.manifest["task"]["name"] != "image-classification":
                self.say(f"No rows of {model}: it is compared as an image classifier, and this bundle is none")
                continue
            try:
                network, same = make()
                for one in ours:
                    if one.backend in ("onnxruntime", "openvino"):
                        file = self._exported(model, network, one.batch)
                        bf16 = (one.backend, one.precision) == ("openvino", "bf16")
                        theirs = Candidate(model, one.backend, "bf16" if bf16 else "fp32", one.batch, same, one.device)
                        request = {"onnx": str(file), "backend": one.backend, "bf16": bf16, "threads": self.threads}
                        found[theirs] = {**request, "device": one.device}
            except Exception as error:  # noqa: BLE001 - what fails in their code ends their rows only
                self.say(f"No rows of {model}: its export failed ({' '.join(str(error).split())[:300]})")
        return found

    def _transformers_has_it(self) -> bool:
        classifier = self.bundle.manifest["task"]["name"] == "image-classification" and self.config.num_labels > 0
        plain = classifier and self.bundle.manifest["task"]["output_hidden_states"] is False
        return plain and self.config.framework == "hf" and self.config.patch_norm and installed("transformers")

    def _transformers(self) -> tuple[torch.nn.Module, bool]:
        from swin_deploy.bench.baselines import transformers_folder, transformers_network
        from swin_deploy.models.checkpoints import random_checkpoint
        from swin_deploy.tasks import TaskSpec

        folder = self.scratch / "same"
        same = folder.exists()
        if not same:
            folder = self.scratch / "random"
            transformers_folder(random_checkpoint(self.config, TaskSpec()), folder)
        return transformers_network(folder), same

    def _timm(self) -> tuple[torch.nn.Module, bool]:
        from swin_deploy.bench.baselines import timm_network

        return timm_network(self.config, self.size), False

    def _exported(self, model: str, network: torch.nn.Module, batch: int) -> Path:
        from swin_deploy.bench.baselines import exported_by_its_user

        file = self.scratch / f"{model}-{batch}.onnx"
        if not file.exists():
            self.say(f"Exporting the network of {model} for {batch} images")
            file.write_bytes(exported_by_its_user(network, (batch, self.config.num_channels, *self.size)))
        return file


def checkpoint_of(bundle: Bundle, weights: str | None, seed: int) -> Checkpoint:
    """The checkpoint that was exported: the one at `weights`, or random weights."""
    from swin_deploy.exporters.checkpoint_from_request import checkpoint_from_request
    from swin_deploy.models.checkpoints import random_checkpoint
    from swin_deploy.models.torch_runtime import refuse_other_network
    from swin_deploy.tasks import TaskSpec

    task = TaskSpec.from_dict(bundle.manifest["task"])
    if weights is None:
        return random_checkpoint(SwinConfig.from_dict(bundle.read_json(CONFIG)), task, seed)
    semantics, size = str(bundle.manifest["semantics"]), _image_size(bundle)
    checkpoint = checkpoint_from_request(ExportSpec(weights=weights, task=task, image_sizes=[size], framework=semantics))
    refuse_other_network(weights, checkpoint.config, bundle)
    return checkpoint


def serve() -> None:
    """The measuring process."""
    from swin_deploy.bench.worker import answering

    answering(_opened)


def _opened(request: dict[str, Any]) -> Any:
    """What a request of `bench` or `doctor` names, loaded: it has `title`, `inputs` and `run`."""
    if "torch" in request or "transformers" in request:
        return _opened_by_torch(request)
    from swin_deploy.runtimes.backends import BACKENDS, runtime_from_onnx

    if "engine" in request:
        from swin_deploy.runtimes.gpu.engines import open_engine

        return open_engine(Bundle.open(request["bundle"]), request["engine"], request["device"])
    backend, threads = request["backend"], request["threads"]
    device = request.get("device", BACKENDS[backend].devices[0])
    if "onnx" in request:
        return runtime_from_onnx(Path(request["onnx"]), backend, threads, request["bf16"], device)
    if backend == "torch" and threads:
        require("torch", "measure what it runs").set_num_threads(threads)
    model = load(request["bundle"], precision=request["precision"], backend=backend, device=device, threads=threads)
    return SimpleNamespace(title=f"{backend} {model.describe().version}", inputs=model.inputs, run=model.run)


def _opened_by_torch(request: dict[str, Any]) -> Any:
    import torch

    from swin_deploy.models.torch_runtime import Placement, TorchNetwork
    from swin_deploy.tasks import TaskSpec

    if request["threads"]:
        torch.set_num_threads(request["threads"])
    size, placement = (int(request["size"][0]), int(request["size"][1])), Placement(*request["placement"])
    if "transformers" in request:
        from swin_deploy.bench.baselines import TransformersNetwork

        return TransformersNetwork(Path(request["transformers"]), size, placement)
    bundle = Bundle.open(request["torch"])
    checkpoint = checkpoint_of(bundle, request["weights"], request["seed"])
    return TorchNetwork(checkpoint, TaskSpec.from_dict(bundle.manifest["task"]), size, placement=placement)
