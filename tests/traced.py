"""Small graphs that the tests of several files start from, each traced once for all of them."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping
from dataclasses import replace
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

# What most tests of graphs start from: a shifted block, a merge of patches, and an image of 12 x 12 tokens in windows of 6, or
# of 11 x 13, which are padded.
WHOLE, PADDED = (48, 48), (44, 52)
V1 = SwinConfig(
    1, image_size=WHOLE, embed_dim=32, depths=(2, 1), num_heads=(2, 4), window_size=(6, 6), pretrained_window_sizes=(0, 0),
    id2label={i: str(i) for i in range(6)}, encoder_stride=8,
)  # fmt: skip
CONFIGS = {1: V1, 2: replace(V1, version=2)}
LOGITS = TaskSpec()
EVERYTHING = TaskSpec("feature-extraction", output_hidden_states=True, output_attentions=True)


def _file(config: SwinConfig, size: tuple[int, int], task: TaskSpec, target: str) -> Path:
    def make(path: Path) -> None:
        network = SwinNetwork(config, size, random_checkpoint(config, task).tensors, task, target).eval()
        traced = onnx_from_torch(network, size)
        embed_weights(traced.model, traced.weights)
        path.write_bytes(traced.model.SerializeToString())

    return once(f"traced-{hashlib.sha256(repr((config, size, task, target)).encode()).hexdigest()[:16]}", make)


def traced_once(
    config: SwinConfig, size: tuple[int, int] = WHOLE, task: TaskSpec = LOGITS, target: str = TARGETS[0]
) -> onnx.ModelProto:
    """The graph of random weights, with its weights inside it; the caller's own."""
    return onnx.load(_file(config, size, task, target))


def answers_of_torch(model: onnx.ModelProto, feeds: Mapping[str, np.ndarray[Any, Any]]) -> Mapping[str, np.ndarray[Any, Any]]:
    """What PyTorch answers with every node rounded to its type, as on a GPU; ONNX Runtime on a CPU rounds only now and then."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        onnx.save(model, str(path))
        with runtime_from_onnx(path, "torch") as runtime:
            return runtime.run(feeds)
