"""A C program with OpenVINO's C interface, openvino_client.c, compiled with the header and library of the Python package."""

import subprocess
from importlib.util import find_spec
from pathlib import Path

import numpy as np

ENVIRONMENTS = {"OpenVINO C": ["numpy", "openvino"]}


def logits(folder, pixels):
    place = Path(find_spec("openvino").origin).parent
    [library] = (place / "libs").glob("libopenvino_c.so*")
    source = Path(__file__).with_name("openvino_client.c")
    options = [f"-I{place / 'include'}", str(library), f"-Wl,-rpath,{library.parent}"]
    subprocess.run(["cc", "-Wall", "-o", "client", str(source), *options], check=True)
    pixels.tofile("pixels.bin")
    shape = map(str, (len(pixels), *pixels.shape[1:]))
    subprocess.run(["./client", str(folder / "onnx/model.onnx"), "pixels.bin", "logits.bin", *shape], check=True)
    return np.fromfile("logits.bin", np.float32).reshape(len(pixels), -1)
