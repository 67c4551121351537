"""How fast the INT8 graphs are on this CPU against transformers' own fp32 export in ONNX Runtime, as a table of ratios.

    python benchmarks/cpu_int8.py [--variants swin-tiny,swinv2-tiny] [--rounds 20] [--clock wall]

As cpu_forms.py, with which it shares all but the candidates. Weights are random and calibrated with two random images: no
time depends on them. With ONEDNN_MAX_CPU_ISA=AVX512_CORE_VNNI in the environment, OpenVINO computes as on a processor with
VNNI and without AMX; its bf16 is then emulated, and no candidate. ONNX Runtime ignores the variable.
Needs the extras "export", "onnxruntime", "openvino" and "test", and no network.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import cpu_forms
import numpy as np
from cpu_forms import Candidate

CANDIDATES = {
    "transformers, ONNX Runtime": Candidate("transformers", "onnxruntime"),
    "fp32, ONNX Runtime": Candidate("onnxruntime", "onnxruntime"),
    "INT8, ONNX Runtime": Candidate("int8_onnxruntime", "onnxruntime"),
    "fp32, OpenVINO": Candidate("openvino", "openvino"),
    "bf16, OpenVINO": Candidate("openvino", "openvino", bf16=True),
    "INT8 as for ONNX Runtime, OpenVINO bf16": Candidate("int8_onnxruntime", "openvino", bf16=True),
    "INT8, OpenVINO": Candidate("int8_openvino", "openvino"),
    "INT8, OpenVINO bf16": Candidate("int8_openvino", "openvino", bf16=True),
}


def write_graphs(name: str, folder: str) -> None:
    """The graphs of cpu_forms.py, and INT8 ones for each target."""
    import onnx

    from swin_deploy.exporters.quantization.for_cpu import quantize_for_cpu

    cpu_forms.write_graphs(name, folder)
    pixels = np.load(f"{folder}/image.npz")["pixels"]

    def feeds() -> Any:
        return ({"pixel_values": np.roll(pixels, step, axis=3)} for step in (0, 1))

    for target in ("onnxruntime", "openvino"):
        model = onnx.load(f"{folder}/{target}.onnx")
        graph = quantize_for_cpu(model, target, feeds).model()
        Path(folder, f"int8_{target}.onnx").write_bytes(graph.SerializeToString())


if __name__ == "__main__":
    cpu_forms.CANDIDATES = CANDIDATES
    cpu_forms.WRITER = "cpu_int8.write_graphs"
    sys.exit(cpu_forms.main())
