"""Graph rewrites, one per file, on onnx-graphsurgeon graphs. PASSES is the order in which every export runs them."""

from .base import Pass as Pass
from .base import PassRecord as PassRecord
from .base import run_passes as run_passes
from .gather_selects import GATHER_SELECTS

PASSES: tuple[Pass, ...] = (GATHER_SELECTS,)
