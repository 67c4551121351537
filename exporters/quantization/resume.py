"""On-disk state of an interrupted quantization run. The next run resumes after the last finished layer."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from swin_deploy.bundle import inside
from swin_deploy.calib.collect import load_arrays, save_arrays

from .qdq import ActivationScale, LinearLayer, QuantizedLinear

if TYPE_CHECKING:
    import onnx


class ResumeState:
    """Files in `folder`, one for each finished layer. Those of another `key` are not found."""

    def __init__(self, folder: Path, key: str) -> None:
        self._folder, self._key = inside(folder, f"layers-{key[:32]}"), key

    @classmethod
    def for_run(cls, folder: Path, model: onnx.ModelProto, *facts: Any) -> ResumeState:
        """Return the state of the quantization of `model` with the options and data that `facts` identify."""
        digest = hashlib.sha256(repr(facts).encode())
        digest.update(model.SerializeToString(deterministic=True))
        return cls(folder, digest.hexdigest())

    def read(self, layers: Iterable[LinearLayer]) -> list[QuantizedLinear] | None:
        """Load finished layers; None if one of them is missing or damaged."""
        found = []
        for layer in layers:
            kept = load_arrays(self._file(layer), self._key)
            try:
                if kept is None or kept["values"].ndim != 2 or kept["scale"].shape != kept["values"].shape[:1]:
                    return None
                scale = ActivationScale(float(kept["activation"]), int(kept["zero_point"]))
            except (KeyError, TypeError, ValueError):
                return None
            found.append(QuantizedLinear(layer, kept["values"], kept["scale"], kept.get("bias"), scale))
        return found

    def save(self, done: QuantizedLinear) -> None:
        """Save a finished layer. Raises BundleError if that fails."""
        scale = {"activation": np.float64(done.activation.scale), "zero_point": np.int64(done.activation.zero_point)}
        arrays = {"values": done.values, "scale": done.scale} | ({} if done.bias is None else {"bias": done.bias})
        save_arrays(self._file(done.layer), self._key, {**scale, **arrays}, compress=False)

    def clear(self) -> None:
        """Remove all files: the run is finished."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _file(self, layer: LinearLayer) -> Path:
        return inside(self._folder, f"{layer.name}.npz")
