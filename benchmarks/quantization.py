"""How much of the logits 8 bits keep: ours, and the quantisers of others with their defaults on the same data, as a table.

    python benchmarks/quantization.py [--networks swin-digits,swin-tiny] [--nncf PYTHON] [--modelopt PYTHON]

The networks are the trained digits, and Swin-T and SwinV2-T with random weights and the heavy tails of trained ones (see
`heavy_tailed`), calibrated with 256 digits and with 16 pieces of photographs. The figure is the ratio of the energy of the fp32
logits to that of their error, in dB, on other samples. NNCF and ModelOpt need versions of numpy and onnx of their own: give
the Python of an environment that has them. Needs the extras "export", "onnxruntime", "openvino" and "test", and no network.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
NETWORKS = ("swin-digits", "swinv2-digits", "swin-tiny", "swinv2-tiny")
BATCH = 8


def write_network(name: str, folder: Path) -> None:
    """The fp32 graph of the network, samples to calibrate with, and others to judge by (with their classes, if trained)."""
    from swin_deploy.exporters.onnx_from_torch import onnx_from_torch
    from swin_deploy.exporters.weights import embed_weights
    from swin_deploy.models.checkpoints import checkpoint_from_path, random_checkpoint
    from swin_deploy.models.swin import SwinNetwork
    from swin_deploy.preprocess import Preprocessor
    from swin_deploy.tasks import TaskSpec
    from swin_deploy.variants import find_variant

    folder.mkdir(parents=True, exist_ok=True)
    if name.endswith("digits"):
        sys.path.insert(0, str(ROOT / "examples/digits"))
        from digits import split

        checkpoint = checkpoint_from_path(ROOT / "examples/digits" / name, TaskSpec())
        data, tensors = split(), checkpoint.tensors
        assert checkpoint.preprocessor is not None
        preprocess = Preprocessor.from_dict(checkpoint.preprocessor)
        pixels = {"calibration": preprocess(list(data.train_images[:256])), "test": preprocess(list(data.test_images))}
        classes = data.test_digits
    else:
        checkpoint = random_checkpoint(find_variant(name).config(), TaskSpec(), 0)
        tensors = heavy_tailed(dict(checkpoint.tensors))
        images = crops(32)
        prepared = Preprocessor.imagenet(checkpoint.config.image_size)(images)
        pixels, classes = {"calibration": prepared[:16], "test": prepared[16:]}, np.zeros(0)
    size = checkpoint.config.image_size
    traced = onnx_from_torch(SwinNetwork(checkpoint.config, size, tensors, TaskSpec(), "onnxruntime").eval(), size)
    embed_weights(traced.model, traced.weights)
    del traced.model.graph.value_info[:]  # as export does
    (folder / "fp32.onnx").write_bytes(traced.model.SerializeToString())
    np.savez(folder / "data.npz", **pixels, classes=classes)


def heavy_tailed(tensors: dict[str, Any]) -> dict[str, Any]:
    """`tensors` with what training does to a Swin: a few channels of each LayerNorm are 5 to 30 times larger than the rest.

    In V1 the layers behind a norm see them; in V2, which normalises what it adds to the stream, the stream does. The columns
    that read such a channel are smaller, by the root of a typical factor: otherwise attention would only see these channels.
    """
    import torch

    second = any(name.endswith("logit_scale") for name in tensors)

    def large(width: int) -> Any:  # the same channels wherever there are so many
        return np.random.default_rng([7, width]).choice(width, max(2, width // 100), replace=False)

    for name, value in tensors.items():
        changed = value.clone()
        if "norm" in name and name.endswith("weight") and name != "layernorm.weight":
            factors = np.random.default_rng([len(value), sum(name.encode())]).uniform(5, 30, len(large(len(value))))
            changed[large(len(value))] *= torch.from_numpy(factors.astype(np.float32))
        elif name.endswith(("query.weight", "key.weight", "value.weight", "intermediate.dense.weight", "reduction.weight")):
            parts = 4 if second and "reduction" in name else 1
            width = value.shape[1] // parts
            for part in range(parts):
                changed[:, large(width) + part * width] /= 3.5
        tensors[name] = changed
    return tensors


def crops(count: int) -> list[Any]:
    """Pieces of the photographs in examples/, uint8 [side, side, 3]."""
    from PIL import Image

    photos = [np.asarray(Image.open(path).convert("RGB")) for path in sorted((ROOT / "examples/photos").glob("*.jpg"))]
    rng, found = np.random.default_rng(0), []
    for number in range(count):
        photo = photos[number % len(photos)]
        side = int(rng.integers(120, min(photo.shape[:2])))
        top, left = (int(rng.integers(0, extent - side + 1)) for extent in photo.shape[:2])
        piece = photo[top : top + side, left : left + side]
        found.append(piece[:, ::-1] if rng.random() < 0.5 else piece)
    return [np.ascontiguousarray(piece) for piece in found]


def onnxruntime_quantized(folder: Path, method: str, linear_only: bool = False) -> Path:
    """What quantize_static makes of the graph; with `linear_only` it is told to take Gemm alone, and weights per channel."""
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            pixels = np.load(folder / "data.npz")["calibration"]
            self.batches = iter([{"pixel_values": pixels[i : i + BATCH]} for i in range(0, len(pixels), BATCH)])

        def get_next(self) -> dict[str, Any] | None:
            return next(self.batches, None)

    prepared, result = folder / "prepared.onnx", folder / f"ort-{method}{'-gemm' if linear_only else ''}.onnx"
    if not prepared.exists():
        quant_pre_process(str(folder / "fp32.onnx"), str(prepared), skip_symbolic_shape=True)
    more: dict[str, Any] = {"op_types_to_quantize": ["Gemm"], "per_channel": True} if linear_only else {}
    quantize_static(str(prepared), str(result), Reader(), calibrate_method=CalibrationMethod[method], **more)
    return result


# Run by the Python of NNCF's environment, and of ModelOpt's: arguments are the folder and the result.
NNCF = """
import sys, numpy as np, nncf, openvino as ov
folder, result = sys.argv[1:]
pixels = np.load(f"{folder}/data.npz")["calibration"]
model = ov.Core().read_model(f"{folder}/fp32.onnx")
data = nncf.Dataset([{"pixel_values": pixels[i : i + 1]} for i in range(len(pixels))])
kind = {"model_type": nncf.ModelType.TRANSFORMER} if "transformer" in result else {}
ov.save_model(nncf.quantize(model, data, subset_size=len(pixels), **kind), result, compress_to_fp16=False)
"""
MODELOPT = """
import sys, numpy as np
from modelopt.onnx.quantization import quantize
folder, result = sys.argv[1:]
mode = "fp8" if "fp8" in result else "int8"
pixels = np.load(f"{folder}/data.npz")["calibration"]
quantize(f"{folder}/fp32.onnx", quantize_mode=mode, calibration_data={"pixel_values": pixels}, output_path=result,
         calibration_eps=["cpu"], high_precision_dtype="fp32")
"""


def by_other_python(python: str, code: str, folder: Path, name: str) -> Path:
    """`name` in `folder`, made by `code` in an environment of its own."""
    done = subprocess.run([python, "-c", code, str(folder), str(folder / name)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return folder / name


def logits(path: Path, pixels: Any) -> Any:
    """What the graph at `path` answers: OpenVINO runs its own .xml, ONNX Runtime the rest."""
    batches = [pixels[i : i + 1] for i in range(len(pixels))]
    if path.suffix == ".xml":
        import openvino

        compiled = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        return np.concatenate([np.array(compiled({"pixel_values": batch})["logits"]) for batch in batches])
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if "fp8" in path.name:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(["logits"], {"pixel_values": batch})[0] for batch in batches])


def ours(folder: Path, kind: str, symmetric: bool, without: str = "") -> Path:
    """What this package makes of the graph; `without` leaves one step out ("balance", "ranges", "least squares", "gptq")."""
    import onnx

    from swin_deploy.calib import quantize as steps
    from swin_deploy.calib import rounding
    from swin_deploy.calib.grids import scale_of_range

    pixels = np.load(folder / "data.npz")["calibration"]
    batch = BATCH if len(pixels) < 64 else 32

    def feeds() -> Any:
        return ({"pixel_values": pixels[i : i + batch]} for i in range(0, len(pixels), batch))

    def in_place(moments: rounding.Moments) -> Any:  # as if the input were the one that is meant
        gram, _, seen, meant = centred(moments)
        return gram, gram, seen, meant

    centred = rounding.Moments.centred
    patches = {
        "": [],
        "balance": [patch.object(steps, "balanced", lambda model, feeds, options: model)],
        "ranges": [
            patch.object(steps, "best_activation_scale", lambda _, low, high, __, *how: scale_of_range(low, high, *how))
        ],
        "least squares": [patch.object(rounding.Moments, "centred", in_place)],
        "gptq": [patch.object(rounding, "gptq", lambda weight, _, scale, kind: kind.nearest(weight / scale[:, None]))],
    }
    names = [name for name in patches if name] if without == "everything" else [without]
    with contextlib.ExitStack() as stack:
        for name in names:
            for change in patches[name]:
                stack.enter_context(change)
        options = steps.Options(kind=kind, symmetric=symmetric, threads=1)
        model = steps.quantize(onnx.load(folder / "fp32.onnx"), feeds, options).model
    result = folder / f"ours-{kind}.onnx"
    result.write_bytes(model.SerializeToString())
    return result


def candidates(given: argparse.Namespace) -> dict[str, Callable[[Path], Path]]:
    """What is compared: its title, and what makes a graph of the folder of a network."""
    if given.steps:
        left_out = ("", "balance", "ranges", "least squares", "gptq", "everything")
        return {f"without {w}" if w else "all": lambda f, w=w: ours(f, "int8", False, w) for w in left_out}
    methods = ("MinMax", "Entropy", "Percentile", "Distribution")
    every: dict[str, Callable[[Path], Path]] = {
        f"ONNX Runtime, {m}": lambda f, m=m: onnxruntime_quantized(f, m)  # type: ignore[misc]
        for m in methods
    }
    every["ONNX Runtime, MinMax, told: Gemm, per channel"] = lambda f: onnxruntime_quantized(f, "MinMax", True)
    if given.nncf:
        every["NNCF"] = lambda f: by_other_python(given.nncf, NNCF, f, "nncf.xml")
        every["NNCF, told: transformer"] = lambda f: by_other_python(given.nncf, NNCF, f, "nncf-transformer.xml")
    if given.modelopt:
        every["ModelOpt"] = lambda f: by_other_python(given.modelopt, MODELOPT, f, "modelopt-int8.onnx")
        every["ModelOpt, FP8"] = lambda f: by_other_python(given.modelopt, MODELOPT, f, "modelopt-fp8.onnx")
    every["swin-deploy"] = lambda f: ours(f, "int8", False)
    every["swin-deploy, symmetric"] = lambda f: ours(f, "int8", True)
    every["swin-deploy, FP8"] = lambda f: ours(f, "fp8", False)
    return every


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--networks", default=",".join(NETWORKS), help="names with commas between")
    parser.add_argument("--nncf", help="the Python of an environment with NNCF")
    parser.add_argument("--modelopt", help="the Python of an environment with ModelOpt")
    parser.add_argument("--only", default="", help="what the titles of the rows must hold")
    parser.add_argument("--steps", action="store_true", help="ours with one step left out, instead of others")
    given = parser.parse_args(arguments)
    print(", ".join(f"{p} {version(p)}" for p in ("swin-deploy", "onnx", "onnxruntime", "openvino")))
    print(
        "| network | quantiser | SQNR, dB | top-1 | top-1 of fp32 | processor time, s |\n|---|---|--:|--:|--:|--:|", flush=True
    )
    for name in given.networks.split(","):
        with tempfile.TemporaryDirectory(prefix="swin-quantization-") as scratch:
            folder = Path(scratch)
            write_network(name, folder)
            data = np.load(folder / "data.npz")
            reference = logits(folder / "fp32.onnx", data["test"])
            for title, make in candidates(given).items():
                if given.only in title:
                    print(f"| {name} | {title} | {row(make, folder, data, reference)} |", flush=True)
    return 0


def row(make: Callable[[Path], Path], folder: Path, data: Any, reference: Any) -> str:
    from swin_deploy.calib.quantize import sqnr

    start = os.times()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            path = make(folder)
        found = logits(path, data["test"])
    except Exception as error:  # noqa: BLE001 - a rival that fails is a row of the table
        return f"failed: {' '.join(str(error).split())[-150:]} | | | "
    spent = sum(os.times()[:4]) - sum(start[:4])
    right = [
        f"{100 * float((x.argmax(1) == data['classes']).mean()):.2f}" if len(data["classes"]) else ""
        for x in (found, reference)
    ]
    return f"{sqnr(reference, found):.1f} | {right[0]} | {right[1]} | {spent:.0f}"


if __name__ == "__main__":
    sys.exit(main())
