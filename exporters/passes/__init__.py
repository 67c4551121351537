"""Graph rewrites: `PASSES` of every export, by target, and `ENGINE_PASSES` of fp16 and bf16 graphs for GPU compilers."""

from .attention import ATTENTIONS, QUERY_BIAS_IN_NORM, VALUE_BIAS_IN_PROJECTION
from .base import Pass as Pass
from .base import PassRecord as PassRecord
from .base import run_passes as run_passes
from .cosine_attention import COSINE_AFTER_MATMUL, L2_NORM_AS_RMS_NORM
from .layer_norms import GATHER_BEFORE_NORM

PASSES: dict[str, tuple[Pass, ...]] = {"tensorrt": (ATTENTIONS,), "onnxruntime": (), "openvino": (L2_NORM_AS_RMS_NORM,)}
ENGINE_PASSES: tuple[Pass, ...] = (VALUE_BIAS_IN_PROJECTION, QUERY_BIAS_IN_NORM, COSINE_AFTER_MATMUL, GATHER_BEFORE_NORM)
