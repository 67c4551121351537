"""Pack the bundles that tests/gpu runs on a device without PyTorch and transformers.

    python tests/gpu/pack.py bundles                       # with the extras export, onnxruntime and tensorrt-rtx
    SWIN_DEPLOY_TEST_BUNDLES=bundles pytest tests/gpu      # on the device

The digits models of Swin V1 and V2, each for images of 32 and 48 pixels, in fp32, fp16 and INT8 (for TensorRT), with engines of
TensorRT for RTX for the GPUs that it knows.
"""

from __future__ import annotations

import sys
from pathlib import Path

import swin_deploy
from swin_deploy.bundle import Bundle
from swin_deploy.dependencies import installed
from swin_deploy.exporters.typed_graphs import with_typed_graphs
from swin_deploy.runtimes.backends import runtime_from_onnx

DIGITS = Path(__file__).resolve().parents[2] / "examples/digits"
NAMES = {1: "swin-digits", 2: "swinv2-digits"}
SIZES = [(32, 32), (48, 48)]
BATCHES = [(1, 1, 1), (1, 4, 8)]
GPUS = ["sm_80", "sm_86", "sm_89", "sm_120"]


def pack(folder: Path, version: int, gpus: list[str]) -> Path:
    """Write the bundle of one Swin version into `folder`, with engines of TensorRT for RTX for `gpus`."""
    path = folder / NAMES[version]
    swin_deploy.export(weights=DIGITS / NAMES[version], image_sizes=SIZES, output=path)
    with_typed_graphs(Bundle.open(path), "fp16", runtime_from_onnx)
    swin_deploy.quantize(path, DIGITS / "images", precision="int8")
    for precision in ("fp16", "fp32", "int8") if gpus else ():
        swin_deploy.build_engine(path, precision=precision, backend="tensorrt-rtx", gpus=gpus, batches=BATCHES)
    return path


if __name__ == "__main__":
    for number in NAMES:
        print(pack(Path(sys.argv[1]), number, GPUS if installed("tensorrt_rtx") else []))
