"""Tiny networks of transformers, trained for some steps with torch.ao's fake quantization around their linear layers."""

from __future__ import annotations

import copy
import functools
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.ao.quantization import (
    FakeQuantize,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    QConfig,
    QuantWrapper,
    disable_observer,
    prepare_qat,
)

FIELDS = {
    "image_size": 32, "patch_size": 4, "embed_dim": 32, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4,
    "num_labels": 6, "drop_path_rate": 0.0,
}  # fmt: skip
TENSOR = {"observer": MovingAverageMinMaxObserver, "averaging_constant": 0.1}
ASYMMETRIC = FakeQuantize.with_args(**TENSOR, dtype=torch.quint8, quant_min=0, quant_max=255)
INT8 = {"dtype": torch.qint8, "quant_min": -128, "quant_max": 127}
SYMMETRIC = FakeQuantize.with_args(**TENSOR, **INT8, qscheme=torch.per_tensor_symmetric)
PER_CHANNEL = {"observer": MovingAveragePerChannelMinMaxObserver, "qscheme": torch.per_channel_symmetric, "ch_axis": 0}
BY_CHANNEL = FakeQuantize.with_args(**PER_CHANNEL, **INT8)


def pixels(count: int, seed: int) -> Any:
    """[count, 3, 32, 32], smooth enough to look like anything."""
    noise = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(noise, size=(32, 32), mode="bilinear") * 1.5


def network(version: int) -> Any:
    """A network of random weights none of which is so small that it hides."""
    torch.manual_seed(version)
    name = {1: "Swin", 2: "Swinv2"}[version]
    model = getattr(transformers, f"{name}ForImageClassification")(getattr(transformers, f"{name}Config")(**FIELDS))
    for key, value in model.named_parameters():
        if value.ndim == 2 and "bias" not in key:
            torch.nn.init.normal_(value, std=value.shape[1] ** -0.5)
        elif key.endswith(".bias"):
            torch.nn.init.normal_(value, std=0.1)
    return model


def wrapped(model: Any, activation: Any, weight: Any, outputs: bool) -> Any:
    """`model` with a QuantWrapper around every linear layer, prepared for training.

    With `outputs`, what the last layer of each attention and MLP writes is rounded, too.
    """
    qconfig = QConfig(activation=activation, weight=weight)
    linear = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "continuous_position" not in n]
    for name in linear:
        parent = model.get_submodule(name.rpartition(".")[0])
        inner = model.get_submodule(name)
        inner.qconfig = qconfig
        setattr(parent, name.rpartition(".")[2], QuantWrapper(inner))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao is to move to torchao
        prepare_qat(model.train(), inplace=True)
    for name in linear:
        if not (outputs and name.endswith(("fc2", "o_proj", "output.dense"))):
            model.get_submodule(f"{name}.module").activation_post_process = torch.nn.Identity()
    return model


@functools.cache
def trained(version: int, symmetric: bool = False, by_channel: bool = True, outputs: bool = False) -> Any:
    """A network after a few steps of training with fake quantization, in eval mode."""
    model = wrapped(network(version), SYMMETRIC if symmetric else ASYMMETRIC, BY_CHANNEL if by_channel else SYMMETRIC, outputs)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    for step in range(6):
        feed = pixels(8, step)
        labels = (feed.mean(dim=(1, 2, 3)) * 20).long() % 6
        model(pixel_values=feed, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval().apply(disable_observer)


def saved(model: Any, folder: Path, state: dict[str, Any] | None = None) -> Path:
    """A checkpoint folder as its training script would write it."""
    folder.mkdir()
    model.config.save_pretrained(folder)
    torch.save(model.state_dict() if state is None else state, folder / "pytorch_model.bin")
    return folder


def answers(model: Any, feed: Any) -> Any:
    with torch.no_grad():
        return model(pixel_values=feed).logits.numpy()


def without_rounding(model: Any) -> Any:
    """The same weights in fp32."""
    return copy.deepcopy(model).apply(torch.ao.quantization.disable_fake_quant)
