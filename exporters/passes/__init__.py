"""Graph rewrites on onnx-graphsurgeon graphs.

`PASSES` are the rewrites that an export runs for each target, in order. `ENGINE_PASSES` are the further rewrites of fp16 and
bf16 graphs: layouts that GPU compilers execute faster and that do not help on a CPU.
"""

from .attention import ATTENTIONS, QUERY_BIAS_IN_NORM, VALUE_BIAS_IN_PROJECTION
from .base import Pass as Pass
from .base import PassRecord as PassRecord
from .base import run_passes as run_passes
from .cosine_attention import COSINE_AFTER_MATMUL, L2_NORM_AS_RMS_NORM
from .layer_norms import GATHER_BEFORE_NORM

PASSES: dict[str, tuple[Pass, ...]] = {"tensorrt": (ATTENTIONS,), "onnxruntime": (), "openvino": (L2_NORM_AS_RMS_NORM,)}
ENGINE_PASSES: tuple[Pass, ...] = (VALUE_BIAS_IN_PROJECTION, QUERY_BIAS_IN_NORM, COSINE_AFTER_MATMUL, GATHER_BEFORE_NORM)
