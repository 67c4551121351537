"""The layers that a quantisation had done when it was stopped, kept in files, for the next one to go on behind them."""

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


class Stopped:
    """Files in `folder`, one for each layer; those of another `key` are not found."""

    def __init__(self, folder: Path, key: str) -> None:
        self._folder, self._key = folder / f"layers-{key[:32]}", key

    @classmethod
    def of(cls, folder: Path, model: onnx.ModelProto, *facts: Any) -> Stopped:
        """For the quantisation of `model` that `facts` tell from any other."""
        digest = hashlib.sha256(repr(facts).encode())
        digest.update(model.SerializeToString(deterministic=True))
        return cls(folder, digest.hexdigest())

    def read(self, layers: Iterable[LinearLayer]) -> list[QuantizedLinear] | None:
        """Those layers as they were left; None where one of them is missing or damaged."""
        found = []
        for layer in layers:
            try:
                with np.load(self._file(layer), allow_pickle=False) as file:
                    kept = dict(file)  # every array is checked against its CRC-32
                if str(kept["key"]) != self._key:
                    return None
                scale = ActivationScale(float(kept["activation"]), int(kept["zero_point"]))
                found.append(QuantizedLinear(layer, kept["codes"], kept["scale"], kept.get("bias"), scale))
            except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
                return None
        return found

    def keep(self, done: QuantizedLinear) -> None:
        """Writes a layer, whole or not at all. Raises BundleError where that cannot be."""
        arrays: dict[str, Any] = {"codes": done.codes, "scale": done.scale}
        arrays |= {} if done.bias is None else {"bias": done.bias}

        def write(scratch: Path) -> None:
            with scratch.open("wb") as file:
                numbers = {"activation": np.float64(done.activation.scale), "zero_point": np.int64(done.activation.zero_point)}
                np.savez(file, key=np.array(self._key), **numbers, **arrays)
                file.flush()
                os.fsync(file.fileno())

        write_whole(self._file(done.layer), write)

    def clear(self) -> None:
        """Removes all of them: the quantisation is finished."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _file(self, layer: LinearLayer) -> Path:
        return self._folder / f"{layer.name}.npz"
