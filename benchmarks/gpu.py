"""Race our graphs against PyTorch and the export of transformers on a GPU, each beside the floor of the device.

    python benchmarks/gpu.py --work FOLDER                   # measure what is missing, for nine minutes; print the table
    python benchmarks/gpu.py --work FOLDER --minutes 5       # a piece; the next call continues
    python benchmarks/gpu.py --work FOLDER --device cpu --networks tiny --batches 1,2 --types fp32      # dry run, no GPU

Networks have random weights, the same for every candidate. All candidates of a cell (network, batch size, type) are loaded into
this process, compared with PyTorch in fp64 on the CPU for fresh random inputs, and measured in interleaved rounds: by the wall
clock, up to a synchronization, and by CUDA events. A cell in FOLDER/results is not measured again without --again.

The floor is the larger of two times: the bytes of the weights, inputs and outputs of every layer, divided by the copy bandwidth
measured on the device, and the operations, divided by its measured rate of a large matmul of the type.

Needs the extras "export" and "gpu" (ONNX Runtime with CUDA), and transformers. TensorRT and TensorRT for RTX are added if they
are installed and support the GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

NETWORKS = ("swin-tiny", "swin-base", "swinv2-tiny", "swinv2-base", "tiny")  # the last is for dry runs
BATCHES, TYPES = (1, 32, 8, 128), ("fp16", "fp32")  # in the order of their importance
ROUNDS, SECONDS, CHECKED = 7, 0.08, 2  # rounds; time of a candidate in each; images that are compared with fp64
PACKAGES = ("torch", "transformers", "onnxruntime-gpu", "onnxruntime", "tensorrt", "tensorrt-rtx")
CHOICES = {
    "ours, ONNX Runtime": "our graph in ONNX Runtime, arrays bound to device memory",
    "ours, ONNX Runtime, CUDA graph": "the same, launched as a CUDA graph",
    "ours, tensorrt": "our engine of TensorRT",
    "ours, tensorrt-rtx": "our engine of TensorRT for RTX",
    "transformers, ONNX Runtime": "the export of transformers, bound in the same way",
    "PyTorch": "transformers' network in eager mode",
    "torch.compile": "its default mode",
    "torch.compile, CUDA graph": "mode reduce-overhead",
    "torch.compile, max-autotune": "with channels_last inputs and weights",
}
COMPILED = "torch.compile"
TINY: Any = {"image_size": (64, 64), "embed_dim": 32, "depths": (1, 1), "num_heads": (1, 2), "window_size": (4, 4)}
Call = Callable[[], Any]  # one call, without a synchronization


@dataclass(frozen=True)
class Cell:
    """What is raced at once."""

    network: str
    batch: int
    precision: str

    def file(self, folder: Path) -> Path:
        return folder / f"{self.network}-{self.batch}-{self.precision}.json"


@dataclass(frozen=True)
class Floor:
    """Bytes and operations of a network for a batch, and what the device moves and computes in a second."""

    bytes: float
    operations: float
    bandwidth: float
    rate: float

    @property
    def ms(self) -> float:
        return 1e3 * max(self.bytes / self.bandwidth, self.operations / self.rate)

    @property
    def bound(self) -> str:
        return "memory" if self.bytes / self.bandwidth > self.operations / self.rate else "compute"


def cells(networks: Sequence[str], batches: Sequence[int], types: Sequence[str]) -> list[Cell]:
    """Return the cells in the order of their importance."""
    return [Cell(network, batch, precision) for batch, precision, network in product(batches, types, networks)]


class Device:
    """The GPU, or the CPU in its place for a dry run: synchronization, events, and memory that ONNX Runtime is bound to."""

    def __init__(self, name: str) -> None:
        import torch

        self.torch, self.name, self.cuda = torch, name, name.startswith("cuda")
        if self.cuda and not torch.cuda.is_available():
            raise SystemExit("This PyTorch finds no GPU. Pass --device cpu for a dry run.")
        self.device = torch.device(name)

    def synchronize(self) -> None:
        if self.cuda:
            self.torch.cuda.synchronize(self.device)

    def once(self, call: Call) -> tuple[float, float]:
        """Return the milliseconds of one call by the wall clock and by events on the device (on a CPU, both are the former)."""
        if not self.cuda:
            begun = time.perf_counter()
            call()
            return (1e3 * (time.perf_counter() - begun),) * 2
        events = [self.torch.cuda.Event(enable_timing=True) for _ in range(2)]
        begun = time.perf_counter()
        events[0].record()
        call()
        events[1].record()
        self.synchronize()
        return 1e3 * (time.perf_counter() - begun), events[0].elapsed_time(events[1])

    def measured(self, call: Call, seconds: float) -> tuple[float, float]:
        """Return the median of calls for so long, three at least."""
        end, found = time.perf_counter() + seconds, []
        while len(found) < 3 or time.perf_counter() < end:
            found.append(self.once(call))
        return statistics.median(wall for wall, _ in found), statistics.median(event for _, event in found)

    def rates(self, dtype: Any) -> tuple[float, float]:
        """Return bytes per second of a copy (read and written), and operations per second of a large matmul."""
        size = 1 << (28 if self.cuda else 24)
        source = self.torch.ones(size, device=self.device)
        target = self.torch.empty_like(source)
        width = 8192 if self.cuda else 512
        left = self.torch.randn(width, width, device=self.device, dtype=dtype)
        times = []
        for call in (lambda: target.copy_(source), lambda: left @ left):
            for _ in range(3):
                self.once(call)
            times.append(self.measured(call, 0.3 if self.cuda else 0.05)[1] / 1e3)
        return 8 * size / times[0], 2 * width**3 / times[1]

    def facts(self) -> dict[str, Any]:
        """Return the device, the driver and the versions."""
        found: dict[str, Any] = {"device": self.name, "versions": versions()}
        if self.cuda:
            from swin_deploy.doctor.checks import nvidia_smi

            found |= {"device": self.torch.cuda.get_device_name(self.device), "driver": nvidia_smi()[0]}
            found |= {"cuda": self.torch.version.cuda, "cudnn": self.torch.backends.cudnn.version()}
        return found


def versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


class Network:
    """A network of transformers with random weights, and everything that is made of it once, in its folder."""

    def __init__(self, name: str, folder: Path) -> None:
        import torch

        from swin_deploy.bench.baselines import transformers_folder, transformers_network
        from swin_deploy.config import SwinConfig
        from swin_deploy.models.checkpoints import random_checkpoint
        from swin_deploy.tasks import TaskSpec
        from swin_deploy.variants import find_variant

        self.torch, self.folder = torch, folder / name
        kept = self.folder / "transformers"
        if not (kept / "config.json").exists():
            config = SwinConfig(version=1, **TINY) if name == "tiny" else find_variant(name).config()
            transformers_folder(random_checkpoint(config, TaskSpec()), kept)
        self.model = transformers_network(kept).eval()
        self.size = int(json.loads((kept / "config.json").read_text())["image_size"])

    def images(self, batch: int, seed: int) -> Any:
        return self.torch.randn(batch, 3, self.size, self.size, generator=self.torch.Generator().manual_seed(seed))

    def exact(self, images: Any) -> np.ndarray:
        """Return the logits in fp64 on the CPU."""
        with self.torch.no_grad():
            return np.asarray(copy.deepcopy(self.model).double()(images.double()))

    def placed(self, device: Device, precision: str, channels_last: bool = False) -> Any:
        model = copy.deepcopy(self.model).to(device.device, self.torch.float16 if precision == "fp16" else self.torch.float32)
        return model.to(memory_format=self.torch.channels_last) if channels_last else model

    def work(self, element: int, batch: int) -> tuple[float, float]:
        """Return the bytes that layers read and write, for elements of so many bytes, and the operations of all matmuls."""
        from torch.utils.flop_counter import FlopCounterMode

        moved, torch = [0, 0], self.torch  # weights, activations of one image

        def count(layer: Any, inputs: Any, output: Any) -> None:
            moved[0] += sum(weight.numel() for weight in layer.parameters(recurse=False))
            moved[1] += inputs[0].numel() + output.numel()

        layers = [layer for layer in self.model.modules() if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d)]
        hooks = [layer.register_forward_hook(count) for layer in layers]
        with torch.no_grad(), FlopCounterMode(display=False) as flops:
            self.model(self.images(1, 0))
        for hook in hooks:
            hook.remove()
        return element * (moved[0] + batch * moved[1]), batch * flops.get_total_flops()

    def bundle(self, precision: str) -> Path:
        """Return our bundle, with the typed graph."""
        import swin_deploy
        from swin_deploy.bundle import Bundle
        from swin_deploy.exporters.typed_graphs import with_typed_graphs
        from swin_deploy.runtimes.backends import runtime_to_check

        path = self.folder / "bundle"
        if not path.exists():
            swin_deploy.export(weights=self.folder / "transformers", output=path)
        with_typed_graphs(Bundle.open(path), precision, runtime_to_check)
        return path

    def exported(self, precision: str) -> Path:
        """Return the export of transformers itself."""
        from swin_deploy.bench.baselines import torchscript_export

        path = self.folder / f"transformers-{precision}.onnx"
        if not path.exists():
            shape = (1, 3, self.size, self.size)
            path.write_bytes(torchscript_export(copy.deepcopy(self.model), shape, precision == "fp16", free_batch=True))
        return path


class Bound:
    """An ONNX file in ONNX Runtime, with its input and its logits in memory of the device that is bound to it."""

    def __init__(self, device: Device, path: Path, images: Any, graph: bool) -> None:
        from swin_deploy.dependencies import onnxruntime_session

        torch, provider = device.torch, "CUDAExecutionProvider" if device.cuda else "CPUExecutionProvider"
        options = {"enable_cuda_graph": "1", "use_tf32": "0"} if graph else {"use_tf32": "0"}
        if device.cuda:
            options["user_compute_stream"] = str(torch.cuda.current_stream().cuda_stream)
        quiet = {"session.intra_op.allow_spinning": "0"}  # its idle threads would slow down the other candidates
        providers = [(provider, options)] if device.cuda else [provider]
        session = onnxruntime_session(str(path), providers=providers, config=quiet)
        if provider not in session.get_providers():
            raise RuntimeError(f"ONNX Runtime did not start {provider}")
        [node], [logits] = session.get_inputs(), session.get_outputs()
        types = {"tensor(float16)": torch.float16, "tensor(float)": torch.float32}
        self.fed = images.to(device.device, types[node.type]).contiguous()
        self.made = torch.empty((len(images), int(logits.shape[1])), dtype=types[logits.type], device=device.device)
        self.session, self.binding, kind = session, session.io_binding(), "cuda" if device.cuda else "cpu"
        bound = (self.binding.bind_input, node.name, self.fed), (self.binding.bind_output, logits.name, self.made)
        for bind, name, tensor in bound:
            element = np.float16 if tensor.dtype == torch.float16 else np.float32
            bind(name, kind, 0, element, tuple(tensor.shape), tensor.data_ptr())

    def __call__(self) -> None:
        self.session.run_with_iobinding(self.binding)

    def logits(self) -> np.ndarray:
        return np.asarray(self.made.float().cpu())

    def close(self) -> None:
        """Free the binding before the session that it belongs to, and both before the memory."""
        self.binding = None
        self.session = None


def session_call(device: Device, path: Path, images: Any, graph: bool) -> tuple[Call, Callable[[], np.ndarray]]:
    """Return a call of an ONNX file, and a function that returns the logits of its last call."""
    bound = Bound(device, path, images, graph)
    return bound, bound.logits


def torch_call(device: Device, model: Any, images: Any, mode: str | None) -> tuple[Call, Callable[[], np.ndarray]]:
    torch, held = device.torch, {}
    fed = images.to(device.device, next(model.parameters()).dtype)
    if mode == "max-autotune":
        fed = fed.to(memory_format=torch.channels_last)
    run = model if mode is None else torch.compile(model, mode=None if mode == "default" else mode)

    def call() -> None:
        with torch.inference_mode():
            held["logits"] = run(fed)

    return call, lambda: np.asarray(held["logits"].float().cpu())


def engine_call(device: Device, path: Path, backend: str, cell: Cell, images: Any) -> tuple[Call, Callable[[], np.ndarray]]:
    import swin_deploy

    swin_deploy.build_engine(path, precision=cell.precision, backend=backend, batches=[cell.batch])
    model = swin_deploy.load(path, backend=backend, precision=cell.precision, device=device.name)
    fed, held = images.to(device.device).contiguous(), {}

    def call() -> None:
        held["logits"] = model.run({"pixel_values": fed})["logits"]

    return call, lambda: np.asarray(held["logits"])


def candidates(device: Device, network: Network, cell: Cell, images: Any) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield each candidate of a cell and the function that prepares it."""
    precision = cell.precision

    def ours() -> Path:
        return network.bundle(precision) / f"onnx/model{'' if precision == 'fp32' else '_fp16'}.onnx"

    yield "ours, ONNX Runtime", lambda: session_call(device, ours(), images, False)
    if device.cuda:
        yield "ours, ONNX Runtime, CUDA graph", lambda: session_call(device, ours(), images, True)
        for backend in ("tensorrt", "tensorrt-rtx"):
            yield (
                f"ours, {backend}",
                lambda backend=backend: engine_call(device, network.bundle(precision), backend, cell, images),
            )
    yield "transformers, ONNX Runtime", lambda: session_call(device, network.exported(precision), images, False)
    yield "PyTorch", lambda: torch_call(device, network.placed(device, precision), images, None)
    modes = {"": "default", ", CUDA graph": "reduce-overhead", ", max-autotune": "max-autotune"}
    for suffix, mode in modes.items() if device.cuda else [("", "default")]:
        yield (
            f"{COMPILED}{suffix}",
            lambda mode=mode: torch_call(device, network.placed(device, precision, mode == "max-autotune"), images, mode),
        )


def measured(device: Device, network: Network, cell: Cell, skip: Sequence[str]) -> dict[str, Any]:
    """Prepare, compare and race the candidates of a cell; return its result."""
    seed = int.from_bytes(np.random.default_rng().bytes(4), "little")
    images = network.images(cell.batch, seed)
    exact = network.exact(images[:CHECKED])
    calls: dict[str, Call] = {}
    rows: dict[str, dict[str, Any]] = {}
    for name, prepare in candidates(device, network, cell, images):
        if name in skip:
            continue
        begun = time.perf_counter()
        try:
            call, logits = prepare()
            for _ in range(4):  # compiles, captures
                call()
            device.synchronize()
            found = logits()[:CHECKED]
            calls[name] = call
            distance = float(np.linalg.norm(found - exact) / np.linalg.norm(exact))
            rows[name] = {"relative_l2": distance, "prepared_s": round(time.perf_counter() - begun, 1), "wall": [], "event": []}
        except Exception as error:  # noqa: BLE001 - a candidate that fails is a result
            rows[name] = {"failed": " ".join(str(error).split())[:300]}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            wall, event = device.measured(call, SECONDS)
            rows[name]["wall"].append(round(wall, 4))
            rows[name]["event"].append(round(event, 4))
    for call in calls.values():
        if isinstance(call, Bound):
            call.close()
    dtype = device.torch.float16 if cell.precision == "fp16" else device.torch.float32
    bandwidth, rate = device.rates(dtype)
    moved, operations = network.work(2 if cell.precision == "fp16" else 4, cell.batch)
    floor = Floor(moved, operations, bandwidth, rate)
    return {**asdict(cell), "seed": seed, "floor": {**asdict(floor), "ms": floor.ms, "bound": floor.bound}, "rows": rows}


def ratio(rows: Mapping[str, Mapping[str, Any]], name: str, reference: str) -> float | None:
    """Return the median of the ratios of two candidates in the same rounds; None if one of them failed."""
    if "wall" not in rows.get(name, {}) or "wall" not in rows.get(reference, {}):
        return None
    return statistics.median(one / other for one, other in zip(rows[name]["wall"], rows[reference]["wall"], strict=True))


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """Return the results as a Markdown table; the ratio is to the fastest mode of torch.compile."""
    heads = ("network", "batch", "type", "candidate", "wall ms", "event ms", "floor ms", "to torch.compile", "relative L2")
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for one in results:
        rows = one["rows"]
        compiled = [name for name in rows if name.startswith(COMPILED) and "wall" in rows[name]]
        best = min(compiled, key=lambda name: statistics.median(rows[name]["wall"]), default="")
        for name, row in rows.items():
            at = f"| {one['network']} | {one['batch']} | {one['precision']} | {name} |"
            if "failed" in row:
                lines.append(f"{at} failed: {row['failed']} | | | | |")
                continue
            wall, event = (statistics.median(row[kind]) for kind in ("wall", "event"))
            share = ratio(rows, name, best)
            lines.append(
                f"{at} {wall:.3f} | {event:.3f} | {one['floor']['ms']:.3f} ({one['floor']['bound']}) | "
                f"{'-' if share is None else f'{share:.2f}'} | {row['relative_l2']:.1e} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of exports, engines and results")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--networks", default=",".join(NETWORKS[:4]))
    parser.add_argument("--batches", default=",".join(map(str, BATCHES)))
    parser.add_argument("--types", default=",".join(TYPES))
    parser.add_argument("--skip", action="append", default=[], choices=CHOICES, help="a candidate to leave out")
    parser.add_argument("--minutes", type=float, default=9.0, help="start no further cell after so long")
    parser.add_argument("--again", action="store_true", help="measure cells again that have a result")
    chosen = parser.parse_args()
    begun, device = time.monotonic(), Device(chosen.device)
    folder = chosen.work / "results" / chosen.device.replace(":", "")
    folder.mkdir(parents=True, exist_ok=True)
    wanted = cells(chosen.networks.split(","), [*map(int, chosen.batches.split(","))], chosen.types.split(","))
    networks: dict[str, Network] = {}
    for number, cell in enumerate(wanted):
        if cell.file(folder).exists() and not chosen.again:
            continue
        if time.monotonic() - begun > 60 * chosen.minutes:
            left = sum(not one.file(folder).exists() for one in wanted[number:])
            print(f"{left} cells are left. Run the same command again.")
            break
        if cell.network not in networks:
            networks[cell.network] = Network(cell.network, chosen.work)
        result = {**measured(device, networks[cell.network], cell, chosen.skip), **device.facts()}
        cell.file(folder).write_text(json.dumps(result, indent=1) + "\n")
        print(f"{cell.network}, batch {cell.batch}, {cell.precision}: {time.monotonic() - begun:.0f} s")
    results = [json.loads(one.file(folder).read_text()) for one in wanted if one.file(folder).exists()]
    (folder / "all.json").write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(device.facts()))
    print(table(results))


if __name__ == "__main__":
    main()
