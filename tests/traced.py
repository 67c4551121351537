"""Small graphs that the tests of several files start from, each traced once for all of them."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from once import once

from swin_deploy.config import SwinConfig
from swin_deploy.exporters.external_data import embed_weights
from swin_deploy.exporters.onnx_from_torch import onnx_from_torch
from swin_deploy.models.checkpoints import random_checkpoint
from swin_deploy.models.swin import SwinNetwork
from swin_deploy.options import TARGETS
from swin_deploy.runtimes.backends import runtime_from_onnx
from swin_deploy.tasks import TaskSpec


def _file(config: SwinConfig, size: tuple[int, int], task: TaskSpec, target: str) -> Path:
    def make(path: Path) -> None:
        network = SwinNetwork(config, size, random_checkpoint(config, task).tensors, task, target).eval()
        traced = onnx_from_torch(network, size)
        embed_weights(traced.model, traced.weights)
        path.write_bytes(traced.model.SerializeToString())

    return once(f"traced-{hashlib.sha256(repr((config, size, task, target)).encode()).hexdigest()[:16]}", make)


def traced_once(config: SwinConfig, size: tuple[int, int], task: TaskSpec, target: str = TARGETS[0]) -> onnx.ModelProto:
    """The graph of random weights, with its weights inside it; the caller's own."""
    return onnx.load(_file(config, size, task, target))


def answers_of_torch(model: onnx.ModelProto, feeds: Mapping[str, np.ndarray[Any, Any]]) -> Mapping[str, np.ndarray[Any, Any]]:
    """What PyTorch answers with every node rounded to its type, as on a GPU; ONNX Runtime on a CPU rounds only now and then."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        onnx.save(model, str(path))
        with runtime_from_onnx(path, "torch") as runtime:
            return runtime.run(feeds)
