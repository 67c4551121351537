"""The candidates of race.py: what each needs, how that is made, and the process that runs one of them.

Imported by processes of other environments, too, so this module imports only numpy and the standard library at first.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
SAMPLES = 8  # images that the distance from PyTorch in fp64 is measured on
CALIBRATION = {"swin-tiny": 16, "swinv2-tiny": 16}  # images of each INT8 graph; LARGE_CALIBRATION for other networks
LARGE_CALIBRATION = 6
NETWORKS = {
    "swin-tiny": "Swin-T 224",
    "swinv2-tiny": "SwinV2-T 256, window 8",
    "swin-base-384": "Swin-B 384, window 12",
    "swinv2-base-w16": "SwinV2-B 256, window 16",
}
TYPES = ("fp32", "bf16", "int8")
OWN_ENVIRONMENTS = {  # packages, and whether they are installed beside those of this environment, without dependencies
    "nncf": (("nncf==3.4.0", "openvino=={openvino}"), False),
    "torchao": (("torchao==0.18.0",), True),
    "timm": (("timm==1.0.31", "torchvision"), True),
}


@dataclass(frozen=True)
class Candidate:
    """One column of the race: how it is opened, from which artefact, and in which environment that is made."""

    title: str
    precision: str
    opener: str  # "bundle", "onnxruntime", "openvino", "eager", "compiled" or "limit"
    artefact: str  # a key of MAKERS, with BATCH for the number of images
    free: bool = False  # leave the batch axis free
    environment: str = ""  # a key of OWN_ENVIRONMENTS

    @property
    def ours(self) -> bool:
        """Whether the graph is one of this package."""
        return self.opener == "bundle"

    @property
    def limit(self) -> bool:
        """Whether only linear layers and attention products are computed."""
        return self.opener == "limit"

    @property
    def weights(self) -> str:
        """The network whose fp64 outputs the distance is measured from: transformers or timm."""
        return "timm" if self.artefact == "timm.onnx" else "transformers"


def _exports(short: str, source: str, precision: str) -> Iterator[tuple[str, Candidate]]:
    for runtime, name in (("onnxruntime", "ONNX Runtime"), ("openvino", "OpenVINO")):
        if precision == "bf16" and runtime == "onnxruntime":
            continue  # it has no kernels for bf16 on a CPU
        for free in (True, False):
            title = f"{source}' export, {name}" if source.endswith("s") else f"{source}'s export, {name}"
            batch = "free batch" if free else "fixed batch"
            key = "-".join(part for part in (short, runtime, "free" if free else "", precision) if part)
            yield key, Candidate(f"{title}, {batch}", precision, runtime, f"{source}.onnx", free)


REFERENCE = "transformers-onnxruntime-fp32"
CANDIDATES: dict[str, Candidate] = {
    "ours-onnxruntime-fp32": Candidate("**ours, ONNX Runtime**", "fp32", "bundle", "ours-onnxruntime"),
    "ours-openvino-fp32": Candidate("**ours, OpenVINO**", "fp32", "bundle", "ours-openvino"),
    **dict(_exports("transformers", "transformers", "fp32")),
    **dict(_exports("timm", "timm", "fp32")),
    "eager-fp32": Candidate("PyTorch eager", "fp32", "eager", "checkpoint"),
    "compile-fp32": Candidate("torch.compile (inductor, frozen)", "fp32", "compiled", "compiled-fp32-BATCH.pt2"),
    "limit-fp32": Candidate("limit: linear layers and attention products, oneDNN or MKL", "fp32", "limit", "checkpoint"),
    "ours-openvino-bf16": Candidate("**ours, OpenVINO**", "bf16", "bundle", "ours-openvino"),
    **dict(_exports("transformers", "transformers", "bf16")),
    **dict(_exports("timm", "timm", "bf16")),
    "eager-bf16": Candidate("PyTorch eager", "bf16", "eager", "checkpoint"),
    "compile-bf16": Candidate("torch.compile (inductor, frozen)", "bf16", "compiled", "compiled-bf16-BATCH.pt2"),
    "limit-bf16": Candidate("limit: linear layers and attention products, oneDNN", "bf16", "limit", "checkpoint"),
    "ours-onnxruntime-int8": Candidate("**ours, ONNX Runtime**", "int8", "bundle", "ours-onnxruntime-int8"),
    "ours-openvino-int8": Candidate("**ours, OpenVINO**", "int8", "bundle", "ours-openvino-int8"),
    "nncf-openvino-int8": Candidate("NNCF's default, OpenVINO, fixed batch", "int8", "openvino", "nncf.xml"),
    "nncf-openvino-free-int8": Candidate("NNCF's default, OpenVINO, free batch", "int8", "openvino", "nncf.xml", True),
    "static-onnxruntime-int8": Candidate("ONNX Runtime's static quantization", "int8", "onnxruntime", "static.onnx", True),
    "pt2e-int8": Candidate(
        "PyTorch's PT2E with the x86 inductor quantizer", "int8", "compiled", "compiled-int8-BATCH.pt2", environment="torchao"
    ),
    "limit-int8": Candidate("limit: linear layers in INT8, attention products, oneDNN", "int8", "limit", "checkpoint"),
}


# How artefacts are made. Each function runs in a process of its own, in the environment that ENVIRONMENT_OF names.


def make_checkpoint(name: str, folder: Path, _: int) -> None:
    """Write the network with random weights as transformers loads it, the images, and the fp64 logits."""
    import torch
    from quantization_networks import crops

    from swin_deploy.bench.baselines import transformers_folder, transformers_network
    from swin_deploy.models.checkpoints import random_checkpoint
    from swin_deploy.preprocess import Preprocessor
    from swin_deploy.tasks import TaskSpec
    from swin_deploy.variants import find_variant

    checkpoint = random_checkpoint(find_variant(name).config(), TaskSpec())
    count = CALIBRATION.get(name, LARGE_CALIBRATION)
    pixels = Preprocessor.imagenet(checkpoint.config.image_size)(crops(count + SAMPLES))
    made = folder / "checkpoint"
    transformers_folder(checkpoint, made)
    np.savez(made / "data.npz", calibration=pixels[:count], test=pixels[count:])
    network = transformers_network(made).double()
    with torch.no_grad():
        np.save(made / "logits.npy", network(torch.from_numpy(pixels[count:]).double()).numpy())


def make_ours(name: str, folder: Path, target: str) -> None:
    """Export the network for a runtime."""
    import swin_deploy

    swin_deploy.export(variant=name, random_weights=True, target=target, output=folder / f"ours-{target}", force=True)


def make_ours_int8(name: str, folder: Path, target: str) -> None:
    """Add the INT8 graph to the bundle of a runtime, which is exported again if it has one."""
    import swin_deploy
    from swin_deploy.bundle import Bundle

    bundle = folder / f"ours-{target}"
    if Bundle.open(bundle).graphs_of("int8"):
        make_ours(name, folder, target)
    with tempfile.TemporaryDirectory(prefix="swin-race-") as scratch:
        np.save(Path(scratch, "pixels.npy"), np.load(folder / "checkpoint/data.npz")["calibration"])
        swin_deploy.quantize(bundle, data=Path(scratch, "pixels.npy"), batch=4)


def make_transformers(_: str, folder: Path, __: int) -> None:
    """Export the network of transformers, with a free batch axis."""
    from swin_deploy.bench.baselines import torchscript_export, transformers_network

    shape = (2, *np.load(folder / "checkpoint/data.npz")["test"].shape[1:])
    exported = torchscript_export(transformers_network(folder / "checkpoint"), shape, free_batch=True)
    (folder / "transformers.onnx").write_bytes(exported)


def make_timm(name: str, folder: Path, _: int) -> None:
    """Export timm's network of the same architecture, every tensor random, and write its fp64 logits."""
    import torch

    from swin_deploy.bench.baselines import timm_network, torchscript_export
    from swin_deploy.variants import find_variant

    pixels = np.load(folder / "checkpoint/data.npz")["test"]
    config, draw = find_variant(name).config(), torch.Generator().manual_seed(0)
    network = timm_network(config, config.image_size)
    with torch.no_grad():
        for tensor_name, tensor in network.named_parameters():
            kept = tensor_name.endswith("logit_scale")
            spread = 0.0 if kept else 0.5 if "table" in tensor_name else 0.02 if tensor.ndim > 1 else 0.1
            tensor.add_(torch.randn(tensor.shape, generator=draw) * spread)
        (folder / "timm.onnx").write_bytes(torchscript_export(network, (2, *pixels.shape[1:]), free_batch=True))
        np.save(folder / "timm.npy", network.double()(torch.from_numpy(pixels).double()).numpy())


def make_nncf(_: str, folder: Path, __: int) -> None:
    """Quantize the export of transformers with the defaults of NNCF."""
    import nncf
    import openvino

    pixels = np.load(folder / "checkpoint/data.npz")["calibration"]
    data = nncf.Dataset([{"pixel_values": pixels[i : i + 1]} for i in range(len(pixels))])
    model = openvino.Core().read_model(folder / "transformers.onnx")
    openvino.save_model(nncf.quantize(model, data, subset_size=len(pixels)), folder / "nncf.xml", compress_to_fp16=False)


def make_static(_: str, folder: Path, __: int) -> None:
    """Quantize the export of transformers with the defaults of ONNX Runtime's static quantization."""
    from onnxruntime.quantization import CalibrationDataReader, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            pixels = np.load(folder / "checkpoint/data.npz")["calibration"]
            self.batches = iter([{"pixel_values": pixels[i : i + 1]} for i in range(len(pixels))])

        def get_next(self) -> dict[str, Any] | None:
            return next(self.batches, None)

    with tempfile.TemporaryDirectory(prefix="swin-race-") as scratch:
        prepared = Path(scratch, "prepared.onnx")
        quant_pre_process(str(folder / "transformers.onnx"), str(prepared), skip_symbolic_shape=True)
        quantize_static(str(prepared), str(folder / "static.onnx"), Reader())


def make_compiled(precision: str) -> Callable[[str, Path, int], None]:
    """Return a function that compiles the network of transformers with inductor, frozen, for one batch size."""

    def make(_: str, folder: Path, batch: int) -> None:
        import torch

        from swin_deploy.bench.baselines import transformers_network

        network, data = transformers_network(folder / "checkpoint"), np.load(folder / "checkpoint/data.npz")
        pixels = torch.from_numpy(repeated(data["test"], batch))
        if precision == "bf16":
            network, pixels = network.bfloat16(), pixels.bfloat16()
        result = folder / f"compiled-{precision}-{batch}.pt2"
        with torch.no_grad():
            program = torch.export.export(network, (pixels,))
            if precision == "int8":
                program = torch.export.export(quantized_by_pt2e(program, data["calibration"], batch), (pixels,))
            scratch = result.with_suffix(".new.pt2")
            torch._inductor.aoti_compile_and_package(program, package_path=str(scratch), inductor_configs={"freezing": True})
            scratch.replace(result)

    return make


def quantized_by_pt2e(program: Any, calibration: Any, batch: int) -> Any:
    """Return the program with static INT8 as in the tutorial of torchao for x86."""
    import torch
    import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer as x86
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(program.module(), quantizer)
    for start in range(0, len(calibration), batch):
        prepared(torch.from_numpy(repeated(calibration[start : start + batch], batch)))
    return convert_pt2e(prepared)


MAKERS: dict[str, Callable[[str, Path, Any], None]] = {
    "checkpoint": make_checkpoint,
    "ours-onnxruntime": lambda name, folder, _: make_ours(name, folder, "onnxruntime"),
    "ours-openvino": lambda name, folder, _: make_ours(name, folder, "openvino"),
    "ours-onnxruntime-int8": lambda name, folder, _: make_ours_int8(name, folder, "onnxruntime"),
    "ours-openvino-int8": lambda name, folder, _: make_ours_int8(name, folder, "openvino"),
    "transformers.onnx": make_transformers,
    "timm.onnx": make_timm,
    "nncf.xml": make_nncf,
    "static.onnx": make_static,
    "compiled-fp32-BATCH.pt2": make_compiled("fp32"),
    "compiled-bf16-BATCH.pt2": make_compiled("bf16"),
    "compiled-int8-BATCH.pt2": make_compiled("int8"),
}
NEEDS = {  # others: "checkpoint"
    "checkpoint": "",
    "nncf.xml": "transformers.onnx",
    "static.onnx": "transformers.onnx",
    "ours-onnxruntime-int8": "ours-onnxruntime",
    "ours-openvino-int8": "ours-openvino",
}
ENVIRONMENT_OF = {"nncf.xml": "nncf", "timm.onnx": "timm", "compiled-int8-BATCH.pt2": "torchao"}


def repeated(pixels: Any, batch: int) -> Any:
    """Return `batch` images: the first of `pixels`, and all of them again as often as necessary."""
    return np.ascontiguousarray(np.resize(pixels, (batch, *pixels.shape[1:])))


# The process of a candidate.

Run = Callable[[Any], Any]  # pixels -> logits


def serve() -> None:
    """Open what the first line on stdin asks for, and answer its logits' distance; then time calls for each further line."""
    sys.path.insert(0, str(ROOT))
    from swin_deploy.bench.worker import answers, peak_memory

    with answers() as answer:
        request = json.loads(sys.stdin.readline())
        candidate, folder, batch = CANDIDATES[request["candidate"]], Path(request["folder"]), int(request["batch"])
        pixels = np.load(folder / "checkpoint/data.npz")["test"]
        run = OPENERS[candidate.opener](candidate, folder, batch)
        distance = None if candidate.limit else distance_of(run, candidate, folder, pixels, batch)
        feeds = repeated(pixels, batch)
        run(feeds)
        answer(distance=distance, peak_memory=peak_memory())
        last = 0.0
        while line := sys.stdin.readline():
            seconds = float(json.loads(line)["seconds"])
            times: list[float] = []
            if last < 300:  # milliseconds: other candidates have used the caches, which a long call does not notice
                run(feeds)
            end = time.perf_counter() + seconds
            while not times or time.perf_counter() < end:
                start = time.perf_counter()
                run(feeds)
                last = (time.perf_counter() - start) * 1e3
                times.append(last)
            answer(ms=times, peak_memory=peak_memory())


def distance_of(run: Run, candidate: Candidate, folder: Path, pixels: Any, batch: int) -> float:
    """Return the relative L2 distance of the logits of SAMPLES images from those of PyTorch in fp64."""
    wanted = np.load(folder / ("timm.npy" if candidate.weights == "timm" else "checkpoint/logits.npy"))
    found = [np.array(run(repeated(pixels[start:], batch))) for start in range(0, len(pixels), batch)]
    logits = np.concatenate(found)[: len(wanted)].astype(np.float64)
    return float(np.linalg.norm(logits - wanted) / np.linalg.norm(wanted))


def open_bundle(candidate: Candidate, folder: Path, batch: int) -> Run:
    """Load our bundle as a user does; OpenVINO compiles it for this batch size."""
    import swin_deploy

    bundle = candidate.artefact.removesuffix("-int8")
    runtime = bundle.partition("-")[2]
    batches = (batch,) if runtime == "openvino" else ()
    model = swin_deploy.load(folder / bundle, backend=runtime, precision=candidate.precision, batches=batches)
    return lambda pixels: model.run({"pixel_values": pixels})["logits"]


def open_onnxruntime(candidate: Candidate, folder: Path, batch: int) -> Run:
    """Open an ONNX file with the defaults of ONNX Runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if not candidate.free:
        options.add_free_dimension_override_by_name("batch", batch)
    session = onnxruntime.InferenceSession(str(folder / candidate.artefact), options, providers=["CPUExecutionProvider"])
    return lambda pixels: session.run(["logits"], {"pixel_values": pixels})[0]


def open_openvino(candidate: Candidate, folder: Path, batch: int) -> Run:
    """Open a file with OpenVINO; INT8 with bf16 between quantized layers where the processor has it, its default.

    OpenVINO chooses bf16 even if ONEDNN_MAX_CPU_ISA forbids it. Then fp32 is requested.
    """
    import openvino

    core = openvino.Core()
    model = core.read_model(folder / candidate.artefact)
    if not candidate.free:
        model.reshape([batch, *list(model.input(0).get_partial_shape())[1:]])
    config: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
    if candidate.precision != "int8" or not bf16_is_fast():
        config["INFERENCE_PRECISION_HINT"] = "bf16" if candidate.precision == "bf16" else "f32"
    request = core.compile_model(model, "CPU", config).create_infer_request()

    def run(pixels: Any) -> Any:
        request.set_input_tensor(0, openvino.Tensor(pixels, shared_memory=True))
        request.infer(share_outputs=True)
        return np.array(request.get_output_tensor(0).data)

    return run


def by_torch(function: Any, precision: str) -> Run:
    """Run a function of PyTorch on arrays."""
    import torch

    wanted = torch.bfloat16 if precision == "bf16" else torch.float32

    def run(pixels: Any) -> Any:
        with torch.inference_mode():
            return function(torch.from_numpy(pixels).to(wanted)).float().numpy()

    return run


def open_eager(candidate: Candidate, folder: Path, _: int) -> Run:
    """Load the network of transformers in PyTorch."""
    import torch

    from swin_deploy.bench.baselines import transformers_network

    network = transformers_network(folder / candidate.artefact)
    return by_torch(network.to(torch.bfloat16) if candidate.precision == "bf16" else network, candidate.precision)


def open_compiled(candidate: Candidate, folder: Path, batch: int) -> Run:
    """Load what inductor has compiled ahead of time."""
    import torch

    package = torch._inductor.aoti_load_package(str(folder / candidate.artefact.replace("BATCH", str(batch))))
    return by_torch(package, candidate.precision)


def open_limit(candidate: Candidate, folder: Path, batch: int) -> Run:
    """Compute the linear layers and the attention products of the network, each alone, in the fastest kernel that is found."""
    import torch

    from swin_deploy.config import SwinConfig

    config = SwinConfig.from_dict(json.loads((folder / candidate.artefact / "config.json").read_text()))
    with torch.inference_mode():
        calls: list[Callable[[], Any]] = []
        shared: dict[tuple[int, ...], int] = {}  # which kernel is the fastest for a shape
        for kind, count, *shape in products(config, batch):
            ways = linear_kernels if kind == "linear" else attention_kernels
            for _ in range(count):
                kernels = list(ways(candidate.precision, *shape))
                key = (kind == "linear", *shape)
                if key not in shared:
                    shared[key] = int(np.argmin([fastest(kernel) for kernel in kernels]))
                calls.append(kernels[shared[key]])

    def run(_: Any) -> None:
        with torch.inference_mode():
            for call in calls:
                call()

    return run


def products(config: Any, batch: int) -> Iterator[tuple[Any, ...]]:
    """Yield ("linear", how many, rows, inputs, outputs) and ("attention", how many, matrices, tokens, width)."""
    side, patch = config.image_size[0], config.patch_size[0] if isinstance(config.patch_size, tuple) else config.patch_size
    grid = side // patch
    yield "linear", 1, batch * grid * grid, config.num_channels * patch * patch, config.width(0)
    for stage, depth in enumerate(config.depths):
        width, window = config.width(stage), min(config.table_window(stage)[0], grid)
        padded = -(-grid // window) * window
        inside, tokens = batch * padded * padded, batch * grid * grid
        heads = config.num_heads[stage]
        yield "linear", depth, inside, width, 3 * width
        yield "attention", depth, inside // window**2 * heads, window**2, width // heads
        yield "linear", depth, inside, width, width
        yield "linear", depth, tokens, width, config.mlp_width(stage)
        yield "linear", depth, tokens, config.mlp_width(stage), width
        if stage + 1 < len(config.depths):
            grid = -(-grid // 2)
            yield "linear", 1, batch * grid * grid, 4 * width, 2 * width
    yield "linear", 1, batch, config.width(len(config.depths) - 1), config.num_labels


_ROWS: dict[tuple[Any, ...], Any] = {}  # inputs are shared by the layers of a shape, weights are not


def linear_kernels(precision: str, rows: int, inputs: int, outputs: int) -> Iterator[Callable[[], Any]]:
    """Yield ways to compute a linear layer with bias."""
    import torch

    if precision == "int8":
        x = _ROWS.setdefault(("int8", rows, inputs), torch.randint(0, 255, (rows, inputs), dtype=torch.uint8))
        weight = torch.ops.onednn.qlinear_prepack(
            torch.randint(-127, 127, (inputs, outputs), dtype=torch.int8).t().contiguous(), None
        )
        scales, zeros = torch.full((outputs,), 0.01), torch.zeros(outputs, dtype=torch.int64)
        bias = torch.zeros(outputs)
        image, filters = as_image(x), as_image(torch.randint(-127, 127, (outputs, inputs), dtype=torch.int8), filters=True)
        once = ([1, 1], [0, 0], [1, 1], 1)  # stride, padding, dilation and groups of a convolution with 1x1 kernels
        filters = torch.ops.onednn.qconv_prepack(filters, scales, 0.02, 128, *once, list(image.shape))
        for kind in (None, torch.bfloat16 if bf16_is_fast() else torch.float32):
            of_result = (1.0 if kind else 0.05, 0 if kind else 128, kind, "none", [], "")
            yield lambda of_result=of_result: torch.ops.onednn.qlinear_pointwise(
                x, 0.02, 128, weight, scales, zeros, bias, *of_result
            )
            yield lambda of_result=of_result: torch.ops.onednn.qconv_pointwise(
                image, 0.02, 128, filters, scales, zeros, bias, *once, *of_result
            )
        return
    kind = torch.bfloat16 if precision == "bf16" else torch.float32
    x = _ROWS.setdefault((kind, rows, inputs), torch.randn(rows, inputs, dtype=kind))
    weight, bias = torch.randn(outputs, inputs, dtype=kind), torch.zeros(outputs, dtype=kind)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    yield lambda: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    image, once = as_image(x), ([0, 0], [1, 1], [1, 1], 1)  # padding, stride, dilation, groups
    filters = torch.ops.mkldnn._reorder_convolution_weight(as_image(weight, filters=True), *once, list(image.shape))
    yield lambda: torch.ops.mkldnn._convolution_pointwise(image, filters, bias, *once, "none", [], "")
    if precision == "fp32":
        yield lambda: torch.nn.functional.linear(x, weight, bias)


def as_image(matrix: Any, filters: bool = False) -> Any:
    """Return [1, columns, rows, 1] with the columns last in memory; as filters, [rows, columns, 1, 1]."""
    import torch

    image = matrix[:, :, None, None] if filters else matrix.t()[None, :, :, None]
    return image.contiguous(memory_format=torch.channels_last)


def attention_kernels(precision: str, matrices: int, tokens: int, width: int) -> Iterator[Callable[[], Any]]:
    """Yield ways to multiply queries with keys and probabilities with values."""
    import torch

    kind = torch.bfloat16 if precision == "bf16" or (precision == "int8" and bf16_is_fast()) else torch.float32
    key = (kind, matrices, tokens, width)
    if key not in _ROWS:
        _ROWS[key] = torch.randn(3, matrices, tokens, width, dtype=kind)
    query, keys, values = _ROWS[key]
    yield lambda: torch.bmm(torch.bmm(query, keys.transpose(1, 2)), values)
    yield lambda: torch.nn.functional.scaled_dot_product_attention(query[None], keys[None], values[None])


def bf16_is_fast() -> bool:
    """Whether the processor multiplies bf16 in AMX or AVX-512."""
    from swin_deploy.runtimes.openvino_rewrites import usable_features

    return any("bf16" in feature for feature in usable_features())


def fastest(call: Callable[[], Any]) -> float:
    """Return the shortest of four times of a call."""
    times = []
    for _ in itertools.repeat(None, 4):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


OPENERS: dict[str, Callable[[Candidate, Path, int], Run]] = {
    "bundle": open_bundle,
    "onnxruntime": open_onnxruntime,
    "openvino": open_openvino,
    "eager": open_eager,
    "compiled": open_compiled,
    "limit": open_limit,
}


def main(arguments: Sequence[str]) -> None:
    """Make one artefact: its name, the network, the folder, the batch size."""
    sys.path.insert(0, str(ROOT))
    artefact, network, folder, batch = arguments
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(folder).parent / "inductor"))
    MAKERS[artefact](network, Path(folder), int(batch))


if __name__ == "__main__":
    main(sys.argv[1:])
