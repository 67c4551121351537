"""Graph rewrites, one per file, on onnx-graphsurgeon graphs. PASSES is the order in which an export runs them, by target."""

from .base import Pass as Pass
from .base import PassRecord as PassRecord
from .base import run_passes as run_passes
from .gather_selects import GATHER_SELECTS

# Only TensorRT's form has query, key and value in one tensor, to be taken apart.
PASSES: dict[str, tuple[Pass, ...]] = {"tensorrt": (GATHER_SELECTS,), "onnxruntime": (), "openvino": ()}
