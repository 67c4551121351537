"""Measure the latency of our graphs on this CPU, relative to the fp32 export of transformers in ONNX Runtime.

    python benchmarks/cpu_forms.py [--variants swin-tiny,swinv2-tiny] [--rounds 20] [--clock wall]

Prints a table of ratios. Every candidate is loaded in its own process; rounds are interleaved, a few calls at a time. A ratio
is the median over the rounds, with quartiles. On a busy machine, use --clock cpu, which measures the processor time of one
thread. Both networks have the same random weights. Needs the extras "export", "onnxruntime", "openvino" and "test", and no
network.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

CALLS = 8  # of each candidate in each round
WRITER = "cpu_forms.write_graphs"  # writes the graphs of a variant; cpu_int8.py has its own
HEADER = (
    "| variant | candidate | lowest ms | lower quartile | median | ratio | quartiles of the ratio | distance from PyTorch |"
)


@dataclass(frozen=True)
class Candidate:
    """A graph and its back end; `bf16` is the hint of OpenVINO, `static` a fixed batch of one."""

    graph: str
    backend: str
    bf16: bool = False
    static: bool = True
    flush: bool = False  # ONNX Runtime treats denormal numbers as zero


CANDIDATES = {
    "transformers, ONNX Runtime": Candidate("transformers", "onnxruntime"),
    "transformers, ONNX Runtime, denormals as zero": Candidate("transformers", "onnxruntime", flush=True),
    "--target tensorrt, ONNX Runtime": Candidate("tensorrt", "onnxruntime"),
    "--target onnxruntime, ONNX Runtime": Candidate("onnxruntime", "onnxruntime"),
    "transformers, OpenVINO": Candidate("transformers", "openvino"),
    "--target tensorrt, OpenVINO, free batch": Candidate("tensorrt", "openvino", static=False),
    "--target tensorrt, OpenVINO": Candidate("tensorrt", "openvino"),
    "--target openvino, OpenVINO": Candidate("openvino", "openvino"),
    "transformers, OpenVINO bf16": Candidate("transformers", "openvino", bf16=True),
    "--target openvino, OpenVINO bf16": Candidate("openvino", "openvino", bf16=True),
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--variants", default="swin-tiny,swinv2-tiny", help="names, separated by commas")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: processor time of one thread")
    given = parser.parse_args(arguments)
    packages = ("swin-deploy", "torch", "transformers", "onnxruntime", "openvino")
    print(", ".join(f"{p} {version(p)}" for p in packages), f"; {os.cpu_count()} cores, {given.clock} clock")
    print(f"{HEADER}\n|---|---|--:|--:|--:|--:|--:|--:|", flush=True)
    for variant in given.variants.split(","):
        with tempfile.TemporaryDirectory(prefix="swin-cpu-") as scratch:
            alone(f"{WRITER}({variant!r}, {scratch!r})").wait()
            race(variant, Path(scratch), given.rounds, given.clock)
    return 0


def alone(call: str) -> subprocess.Popen[str]:
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import {call.split('.')[0]}; {call}"
    return subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def race(variant: str, folder: Path, rounds: int, clock: str) -> None:
    processes, distance = {}, {}
    for title, candidate in CANDIDATES.items():
        processes[title] = process = alone(f"cpu_forms.serve({asdict(candidate)!r}, {str(folder)!r}, {clock!r})")
        distance[title] = answer(process)
    times: dict[str, list[list[float]]] = {title: [] for title in processes}
    titles = list(processes)
    for number in range(rounds):
        first = number % len(titles)
        for title in titles[first:] + titles[:first]:
            process = processes[title]
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
            times[title].append(answer(process))
    for process in processes.values():
        process.communicate()
    rounds_of = {title: np.median(taken, axis=1) for title, taken in times.items()}
    for title, taken in times.items():
        ratios = rounds_of[title] / rounds_of[titles[0]]
        low, middle, high = np.quantile(ratios, (0.25, 0.5, 0.75))
        far = "" if title.startswith("transformers") else f"{distance[title]:.1e}"
        figures = " | ".join(f"{value:.1f}" for value in (np.min(taken), np.quantile(taken, 0.25), np.median(taken)))
        print(f"| {variant} | {title} | {figures} | {middle:.3f} | {low:.3f} to {high:.3f} | {far} |", flush=True)


def answer(process: subprocess.Popen[str]) -> Any:
    assert process.stdout is not None
    return json.loads(process.stdout.readline())


def write_graphs(name: str, folder: str) -> None:
    """Write every graph of the variant, an image, and the logits of PyTorch into `folder`."""
    import torch

    from swin_deploy.bench.baselines import torchscript_export, transformers_folder, transformers_network
    from swin_deploy.exporters.external_data import embed_weights
    from swin_deploy.exporters.onnx_from_torch import onnx_from_torch
    from swin_deploy.models.checkpoints import random_checkpoint
    from swin_deploy.models.swin import SwinNetwork
    from swin_deploy.options import TARGETS
    from swin_deploy.tasks import TaskSpec
    from swin_deploy.variants import find_variant

    checkpoint = random_checkpoint(find_variant(name).config(), TaskSpec())
    transformers_folder(checkpoint, Path(folder, "checkpoint"))
    network = transformers_network(Path(folder, "checkpoint"))
    shape = (1, 3, *checkpoint.config.image_size)
    pixels = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    with torch.no_grad():
        np.savez(f"{folder}/image.npz", pixels=pixels, logits=network(torch.from_numpy(pixels)).numpy())
    Path(folder, "transformers.onnx").write_bytes(torchscript_export(network, shape))
    for target in TARGETS:
        size = checkpoint.config.image_size
        traced = onnx_from_torch(SwinNetwork(checkpoint.config, size, checkpoint.tensors, TaskSpec(), target).eval(), size)
        embed_weights(traced.model, traced.weights)
        del traced.model.graph.value_info[:]  # as export does
        Path(folder, f"{target}.onnx").write_bytes(traced.model.SerializeToString())


def serve(raw: dict[str, Any], folder: str, clock: str) -> None:
    """Run the process of a candidate: print its distance from PyTorch, then for each line of stdin the times of some calls."""
    saved = np.load(f"{folder}/image.npz")
    infer = session(Candidate(**raw), folder, 1 if clock == "cpu" else 0, saved["pixels"])
    now = time.process_time if clock == "cpu" else time.perf_counter
    found, wanted = infer(), saved["logits"]
    print(json.dumps(float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))), flush=True)
    for _ in range(10):
        infer()
    for _ in sys.stdin:
        infer()  # other candidates have used the caches
        times = []
        for _ in range(CALLS):
            start = now()
            infer()
            times.append((now() - start) * 1e3)
        print(json.dumps(times), flush=True)


def session(candidate: Candidate, folder: str, threads: int, pixels: np.ndarray[Any, Any]) -> Callable[[], Any]:
    """Return a function that runs `pixels` once, with the settings of runtimes/."""
    path = f"{folder}/{candidate.graph}.onnx"
    if candidate.backend == "onnxruntime":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        if candidate.flush:
            options.add_session_config_entry("session.set_denormal_as_zero", "1")
        loaded = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return lambda: loaded.run(["logits"], {"pixel_values": pixels})[0]
    import openvino

    from swin_deploy.runtimes.openvino_rewrites import rewrite_for_kernels, transpose_keys_in_matmul

    core, precision = openvino.Core(), "bf16" if candidate.bf16 else "f32"
    model = core.read_model(path)
    if candidate.static:
        model.reshape(list(pixels.shape))
    if candidate.graph != "transformers" and candidate.static:
        rewrite_for_kernels(model, len(pixels), candidate.bf16, candidate.graph.startswith("int8"))
    elif candidate.graph != "transformers":
        transpose_keys_in_matmul(model, candidate.bf16)
    config = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads}
    request = core.compile_model(model, "CPU", config).create_infer_request()
    return lambda: np.array(request.infer({"pixel_values": pixels})["logits"])


if __name__ == "__main__":
    sys.exit(main())
