"""Compare the accuracy of our INT8 and FP8 graphs with that of other quantizers with their defaults, on the same data.

    python benchmarks/quantization.py --nncf PYTHON --modelopt PYTHON [--folder FOLDER] [--networks swin-digits,swin-tiny]

The networks are the trained digits and patches (see examples/), and Swin-T and SwinV2-T with random weights and the heavy tails
of trained ones (`heavy_tailed`), calibrated with 256 images and with 16 pieces of photographs. The first table has the ratio of
the energy of the fp32 logits to that of their error, in dB, on other samples; the second the share of these that is classified
right. Each graph is made in a process of its own, which may take 20 minutes of processor time and 12 GB of memory.

NNCF and ModelOpt need versions of numpy and onnx of their own: give the Python of an environment that has them
(pip install nncf==2.19.* openvino; pip install "nvidia-modelopt[onnx]==0.47.*"). With `--folder` what is made stays there, and
what is there is not made again. Needs the extras "export", "onnxruntime", "openvino" and "test" and scikit-image, and no
network.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from quantization_networks import NETWORKS, write_network

BATCH = 8
PROCESSOR_LIMIT, MEMORY_LIMIT = 20 * 60, 12e9  # seconds, bytes
LEFT_OUT = ("equalization", "ranges", "least squares", "gptq", "everything")

# Run by the Python of NNCF's environment, and of ModelOpt's: arguments are the folder, the result and the kind.
NNCF = """
import sys, numpy as np, nncf, openvino as ov
folder, result, kind = sys.argv[1:]
pixels = np.load(f"{folder}/data.npz")["calibration"]
model = ov.Core().read_model(f"{folder}/onnxruntime.onnx")
data = nncf.Dataset([{"pixel_values": pixels[i : i + 1]} for i in range(len(pixels))])
told = {"model_type": nncf.ModelType.TRANSFORMER} if "transformer" in result else {}
if kind == "fp8":
    told["mode"] = nncf.QuantizationMode.FP8_E4M3
ov.save_model(nncf.quantize(model, data, subset_size=len(pixels), **told), result, compress_to_fp16=False)
"""
MODELOPT = """
import sys, numpy as np
from modelopt.onnx.quantization import quantize
folder, result, kind = sys.argv[1:]
pixels = np.load(f"{folder}/data.npz")["calibration"]
quantize(f"{folder}/onnxruntime.onnx", quantize_mode=kind, calibration_data={"pixel_values": pixels}, output_path=result,
         calibration_eps=["cpu"], high_precision_dtype="fp32")
"""


@dataclass(frozen=True)
class Quantizer:
    """A row of the tables: "int8" or "fp8", made by "ort", "ours", "nncf" or "modelopt", and what that is told."""

    title: str
    kind: str
    maker: str
    how: str = ""

    @property
    def file(self) -> str:
        """What it writes: OpenVINO runs its own .xml, ONNX Runtime the rest."""
        name = "-".join(part for part in (self.maker, self.kind, self.how.replace(" ", "-")) if part)
        return f"{name}.{'xml' if self.maker == 'nncf' else 'onnx'}"


METHODS = ("MinMax", "Entropy", "Percentile", "Distribution")
QUANTIZERS = (
    *(Quantizer(f"ONNX Runtime, {method}", "int8", "ort", method) for method in METHODS),
    Quantizer("ONNX Runtime, MinMax, told: Gemm, by channel", "int8", "ort", "MinMax Gemm"),
    Quantizer("NNCF", "int8", "nncf"),
    Quantizer("NNCF, told: transformer", "int8", "nncf", "transformer"),
    Quantizer("ModelOpt", "int8", "modelopt"),
    Quantizer("swin-deploy, for ONNX Runtime and OpenVINO", "int8", "ours", "onnxruntime"),
    Quantizer("swin-deploy, for TensorRT", "int8", "ours", "tensorrt"),
    Quantizer("ONNX Runtime, Distribution, FP8", "fp8", "ort", "Distribution"),
    Quantizer("NNCF, FP8", "fp8", "nncf"),
    Quantizer("NNCF, told: transformer, FP8", "fp8", "nncf", "transformer"),
    Quantizer("ModelOpt, FP8", "fp8", "modelopt"),
    Quantizer("swin-deploy, for TensorRT, FP8", "fp8", "ours", "tensorrt"),
)
STEPS = (
    Quantizer("all", "int8", "ours", "onnxruntime"),
    *(Quantizer(f"without {step}", "int8", "ours", f"onnxruntime without {step}") for step in LEFT_OUT),
)


def by_onnxruntime(folder: Path, kind: str, how: str, result: Path) -> None:
    """quantize_static with a method; told "Gemm", it takes Gemm alone, and weights by channel."""
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            pixels = np.load(folder / "data.npz")["calibration"]
            self.batches = iter([{"pixel_values": pixels[i : i + BATCH]} for i in range(0, len(pixels), BATCH)])

        def get_next(self) -> dict[str, Any] | None:
            return next(self.batches, None)

    method, *told = how.split()
    more: dict[str, Any] = {"op_types_to_quantize": ["Gemm"], "per_channel": True} if told else {}
    if kind == "fp8":
        more |= {"activation_type": QuantType.QFLOAT8E4M3FN, "weight_type": QuantType.QFLOAT8E4M3FN}
    with tempfile.TemporaryDirectory(prefix="swin-quantization-") as scratch:
        prepared = Path(scratch, "prepared.onnx")
        quant_pre_process(str(folder / "onnxruntime.onnx"), str(prepared), skip_symbolic_shape=True)
        quantize_static(str(prepared), str(result), Reader(), calibrate_method=CalibrationMethod[method], **more)


def by_us(folder: Path, kind: str, how: str, result: Path) -> None:
    """As `swin-deploy quantize` does it for a target; "without" names a step that is left out of that for ONNX Runtime."""
    import onnx

    target, _, without = how.partition(" without ")
    pixels = np.load(folder / "data.npz")["calibration"]
    model = onnx.load(folder / f"{target}.onnx")
    if target == "tensorrt":
        result.write_bytes(for_tensorrt(model, folder, kind, pixels).SerializeToString())
        return
    from swin_deploy.exporters.quantization import for_cpu, gptq

    batch = BATCH if len(pixels) < 64 else 32

    def feeds() -> Any:
        return ({"pixel_values": pixels[i : i + batch]} for i in range(0, len(pixels), batch))

    def in_place(moments: gptq.LayerMoments) -> Any:  # as if the layer read the fp32 input
        gram, change, seen, expected = centred(moments)
        return gram, np.zeros_like(change), seen, expected

    centred = gptq.LayerMoments.centred
    patches = {
        "equalization": patch.object(for_cpu, "equalized_for_cpu", lambda model, *_: (model, {})),
        "ranges": patch.object(for_cpu, "best_activation_scale", lambda _, low, high, __: gptq.scale_of_range(low, high)),
        "least squares": patch.object(gptq.LayerMoments, "centred", in_place),
        "gptq": patch.object(gptq, "gptq", lambda weight, _, scale, **__: gptq.int8_rounded(weight / scale[:, None])),
    }
    with contextlib.ExitStack() as stack:
        for name in patches if without == "everything" else [without] if without else []:
            stack.enter_context(patches[name])
        made = for_cpu.quantize_for_cpu(model, "onnxruntime", feeds).model()
    result.write_bytes(made.SerializeToString())


@dataclass(frozen=True)
class Pixels:
    """Samples in memory, as calib.collect takes them."""

    pixels: Any
    fingerprint: str = ""

    def __len__(self) -> int:
        return len(self.pixels)

    def batches(self, size: int, start: int = 0) -> Any:
        return ({"pixel_values": self.pixels[i : i + size]} for i in range(start, len(self.pixels), size))


def for_tensorrt(model: Any, folder: Path, kind: str, pixels: Any) -> Any:
    """The graph with fp16 between."""
    from swin_deploy.calib.collect import collect
    from swin_deploy.config import SwinConfig
    from swin_deploy.exporters.quantization.equalization import equalized
    from swin_deploy.exporters.quantization.for_tensorrt import quantized_from_fp32, quantized_layers
    from swin_deploy.exporters.quantization.gptq import GptqRounding, input_moments
    from swin_deploy.exporters.quantization.qdq import linear_layers
    from swin_deploy.tasks import TaskSpec

    config = SwinConfig.from_dict(json.loads((folder / "config.json").read_text()))
    layers = {layer.name: layer.inputs for layer in quantized_layers(model, config, kind)}
    read = {layer.name: layer.input for layer in linear_layers(model) if layer.name in layers}
    model, moments = equalized(model, input_moments(model, read, Pixels(pixels).batches(BATCH), threads=1))
    seen = collect(model, [name for inputs in layers.values() for name in inputs], Pixels(pixels), batch=BATCH, threads=1)
    amax = {name: one.compute_amax("mse", kind) for name, one in seen.items()}
    return quantized_from_fp32(model, config, TaskSpec(), kind, amax, rounding=GptqRounding(moments, kind))[0]


def logits(path: Path, pixels: Any) -> Any:
    """What the graph at `path` answers."""
    batches = [pixels[i : i + 1] for i in range(len(pixels))]
    if path.suffix == ".xml":
        import openvino

        compiled = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        return np.concatenate([np.array(compiled({"pixel_values": batch})["logits"]) for batch in batches])
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if "fp8" in path.name or "tensorrt" in path.name:  # it has kernels of INT8 with fp32 between only
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(["logits"], {"pixel_values": batch})[0] for batch in batches])


def command(quantizer: Quantizer, folder: Path, given: argparse.Namespace) -> list[str]:
    """What makes the graph, in a process of its own."""
    result = str(folder / quantizer.file)
    if quantizer.maker in ("nncf", "modelopt"):
        code = {"nncf": NNCF, "modelopt": MODELOPT}[quantizer.maker]
        return [getattr(given, quantizer.maker), "-c", code, str(folder), result, quantizer.kind]
    return [
        sys.executable,
        str(Path(__file__).resolve()),
        "--make",
        quantizer.maker,
        str(folder),
        quantizer.kind,
        quantizer.how,
        result,
    ]


def made(order: Sequence[str], result: Path) -> dict[str, Any]:
    """Runs `order`, which writes `result`: what that took, and why it failed, if it did."""
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            order,
            stdout=subprocess.DEVNULL,
            stderr=said,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CPU, (PROCESSOR_LIMIT, PROCESSOR_LIMIT + 5)),
        )
        largest = 0.0
        while (found := os.wait4(process.pid, os.WNOHANG))[0] == 0:
            largest = max(largest, memory(process.pid))
            if largest > MEMORY_LIMIT:
                process.kill()
            time.sleep(0.1)
        said.seek(0)
        lines = [line for line in said.read().splitlines() if line.strip()]
    _, status, usage = found
    code = process.returncode = os.waitstatus_to_exitcode(status)
    facts: dict[str, Any] = {"seconds": usage.ru_utime + usage.ru_stime, "memory": max(largest, usage.ru_maxrss * 1024)}
    if largest > MEMORY_LIMIT:
        facts["fails"] = f"more than {MEMORY_LIMIT / 1e9:.0f} GB"
    elif code == -signal.SIGXCPU or facts["seconds"] > PROCESSOR_LIMIT:
        facts["fails"] = f"more than {PROCESSOR_LIMIT // 60} minutes"
    elif code or not result.exists():
        facts["fails"] = lines[-1][:160] if lines else f"exit code {code}"
    return facts


def memory(process: int) -> float:
    """Resident bytes of a process; 0 when it has ended."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{process}/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmRSS:"):
                return float(line.split()[1]) * 1024
    return 0.0


def judged(quantizer: Quantizer, folder: Path, given: argparse.Namespace, data: Any, reference: Any) -> dict[str, Any]:
    """What is known of a row in one column, kept in the folder."""
    from swin_deploy.parity import sqnr

    path = folder / quantizer.file
    kept = path.with_name(f"{path.name}.json")
    if kept.exists():
        return dict(json.loads(kept.read_text()))
    facts = made(command(quantizer, folder, given), path)
    if "fails" not in facts:
        try:
            found = logits(path, data["test"])
            facts |= {"sqnr": sqnr(reference, found), "top1": top1(found, data["classes"])}
        except Exception as error:  # noqa: BLE001 - a rival's graph that does not run is a cell of the table
            facts["fails"] = " ".join(str(error).split())[:160]
    kept.write_text(json.dumps(facts))
    return facts


def top1(found: Any, classes: Any) -> float | None:
    """Percent; None without classes."""
    return 100 * float((found.argmax(1) == classes).mean()) if len(classes) else None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default=",".join(NETWORKS), help="names with commas between")
    parser.add_argument("--nncf", help="the Python of an environment with NNCF")
    parser.add_argument("--modelopt", help="the Python of an environment with ModelOpt")
    parser.add_argument("--folder", type=Path, help="where everything is kept")
    parser.add_argument("--only", default="", help="what the titles of the rows must hold")
    parser.add_argument("--steps", action="store_true", help="ours with one step left out, instead of others")
    parser.add_argument("--make", nargs=5, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.make:
        maker, folder, kind, how, result = given.make
        {"ort": by_onnxruntime, "ours": by_us}[maker](Path(folder), kind, how, Path(result))
        return 0
    rows = [q for q in (STEPS if given.steps else QUANTIZERS) if given.only in q.title and getattr(given, q.maker, "ours")]
    names = given.networks.split(",")
    with tempfile.TemporaryDirectory(prefix="swin-quantization-") as scratch:
        found = {name: column(name, (given.folder or Path(scratch)) / name, rows, given) for name in names}
    print(", ".join(f"{p} {version(p)}" for p in ("swin-deploy", "onnx", "onnxruntime", "openvino")))
    print(table("SQNR of the logits, dB", names, {q.title: [found[n][q.title] for n in names] for q in rows}, "sqnr"))
    trained = [name for name in names if found[name]["fp32"]["top1"] is not None]
    if trained:
        print(
            table(
                "top-1, %",
                trained,
                {title: [found[n][title] for n in trained] for title in ("fp32", *(q.title for q in rows))},
                "top1",
            )
        )
    return 0


def column(name: str, folder: Path, rows: Sequence[Quantizer], given: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """What is known of every row for one network."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "data.npz").exists():
        write_network(name, folder)
    data = dict(np.load(folder / "data.npz"))
    reference = logits(folder / "onnxruntime.onnx", data["test"])
    found: dict[str, dict[str, Any]] = {"fp32": {"top1": top1(reference, data["classes"])}}
    for quantizer in rows:
        found[quantizer.title] = facts = judged(quantizer, folder, given, data, reference)
        took = f"{facts['seconds']:.0f} s, {facts['memory'] / 1e9:.1f} GB"
        print(
            f"{name}, {quantizer.title}: {facts.get('fails') or round(facts['sqnr'], 2)} ({took})", file=sys.stderr, flush=True
        )
    return found


def table(title: str, names: Sequence[str], rows: dict[str, list[dict[str, Any]]], figure: str) -> str:
    digits = {"sqnr": 1, "top1": 2}[figure]
    lines = [f"\n| {title} | {' | '.join(names)} |", f"|---|{'--:|' * len(names)}"]
    for row, cells in rows.items():
        text = [f"fails: {c['fails']}" if "fails" in c else f"{c[figure]:.{digits}f}" for c in cells]
        lines.append(f"| {row} | {' | '.join(text)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
