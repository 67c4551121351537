"""On-disk state of an interrupted quantization run. The next run resumes after the last finished layer."""

from __future__ import annotations

import hashlib
import os
import shutil
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from swin_deploy.bundle import write_whole

from .qdq import ActivationScale, LinearLayer, QuantizedLinear

if TYPE_CHECKING:
    import onnx


class ResumeState:
    """Files in `folder`, one for each finished layer. Those of another `key` are not found."""

    def __init__(self, folder: Path, key: str) -> None:
        self._folder, self._key = folder / f"layers-{key[:32]}", key

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
            try:
                with np.load(self._file(layer), allow_pickle=False) as file:
                    kept = dict(file)  # every array is checked against its CRC-32
                if str(kept["key"]) != self._key:
                    return None
                scale = ActivationScale(float(kept["activation"]), int(kept["zero_point"]))
                found.append(QuantizedLinear(layer, kept["values"], kept["scale"], kept.get("bias"), scale))
            except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
                return None
        return found

    def save(self, done: QuantizedLinear) -> None:
        """Save a finished layer, atomically. Raises BundleError if that fails."""
        arrays: dict[str, Any] = {"values": done.values, "scale": done.scale}
        arrays |= {} if done.bias is None else {"bias": done.bias}

        def write(scratch: Path) -> None:
            with scratch.open("wb") as file:
                numbers = {"activation": np.float64(done.activation.scale), "zero_point": np.int64(done.activation.zero_point)}
                np.savez(file, key=np.array(self._key), **numbers, **arrays)
                file.flush()
                os.fsync(file.fileno())

        write_whole(self._file(done.layer), write)

    def clear(self) -> None:
        """Remove all files: the run is finished."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _file(self, layer: LinearLayer) -> Path:
        return self._folder / f"{layer.name}.npz"
