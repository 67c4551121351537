"""Graph rewrites, one per file, on onnx-graphsurgeon graphs.

PASSES is the order in which an export runs them, by target; ENGINE_PASSES is what a typed graph for a GPU compiler goes
through as well: forms that its kernels like and that a CPU has no use for.
"""

from .attention import ATTENTIONS
from .base import Pass as Pass
from .base import PassRecord as PassRecord
from .base import run_passes as run_passes
from .cosine_after_matmul import COSINE_AFTER_PRODUCT
from .gather_before_norm import GATHER_BEFORE_NORM
from .l2_norm_as_rms_norm import LENGTH_AS_RMS_NORM
from .qkv_without_bias import QUERY_BIAS_IN_NORM, VALUE_BIAS_IN_PROJECTION

PASSES: dict[str, tuple[Pass, ...]] = {"tensorrt": (ATTENTIONS,), "onnxruntime": (), "openvino": (LENGTH_AS_RMS_NORM,)}
ENGINE_PASSES: tuple[Pass, ...] = (
    VALUE_BIAS_IN_PROJECTION,
    QUERY_BIAS_IN_NORM,
    COSINE_AFTER_PRODUCT,
    GATHER_BEFORE_NORM,
)
