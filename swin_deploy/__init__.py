"""From a Swin Transformer checkpoint (V1 or V2) to a verified ONNX model and a TensorRT engine that runs on a device.

    import swin_deploy

    with swin_deploy.load("swinv2-tiny") as model:
        print(model.classify("photo.jpg")[0])

Loading and running a bundle needs numpy, Pillow and one back end. Exporting and compiling bring torch, onnx and TensorRT,
which are imported only when they are asked for.
"""

from __future__ import annotations

from swin_deploy.api.build_engine import build_engine, inspect, refit
from swin_deploy.api.evaluate import evaluate, verify
from swin_deploy.api.export import export
from swin_deploy.api.load import load
from swin_deploy.api.quantize import quantize

__version__ = "0.1.0"
__all__ = ["__version__", "build_engine", "evaluate", "export", "inspect", "load", "quantize", "refit", "verify"]
