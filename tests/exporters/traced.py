"""Small graphs that the tests of several files start from, each traced once for all of them."""

from __future__ import annotations

import hashlib
from pathlib import Path

import onnx
from once import once

from swin_deploy.config import SwinConfig
from swin_deploy.exporters.onnx_from_torch import onnx_from_torch
from swin_deploy.exporters.weights import embed_weights
from swin_deploy.models.checkpoints import random_checkpoint
from swin_deploy.models.swin import SwinNetwork
from swin_deploy.tasks import TaskSpec


def _file(config: SwinConfig, size: tuple[int, int], task: TaskSpec) -> Path:
    def make(path: Path) -> None:
        network = SwinNetwork(config, size, random_checkpoint(config, task).tensors, task).eval()
        traced = onnx_from_torch(network, size)
        embed_weights(traced.model, traced.weights)
        path.write_bytes(traced.model.SerializeToString())

    return once(f"traced-{hashlib.sha256(repr((config, size, task)).encode()).hexdigest()[:16]}", make)


def traced_once(config: SwinConfig, size: tuple[int, int], task: TaskSpec) -> onnx.ModelProto:
    """The graph of random weights, with its weights inside it; the caller's own."""
    return onnx.load(_file(config, size, task))
