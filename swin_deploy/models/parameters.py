"""The parameters of every Swin: canonical name -> shape, and random values for them.

Canonical names are those of Hugging Face files on disk, without the prefix `swin.` or `swinv2.`.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from swin_deploy.config import SwinConfig
from swin_deploy.tasks import TaskSpec, stage_names

Shape = tuple[int, ...]
POSITIONS = "embeddings.position_embeddings"


class LazyTensors(Mapping[str, Tensor]):
    """Tensors by canonical name. `read(name)` is called at each access."""

    def __init__(self, names: Iterable[str], read: Callable[[str], Tensor]) -> None:
        self._names, self._read = dict.fromkeys(names), read

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def parameters(config: SwinConfig, task: TaskSpec | None = None) -> dict[str, Shape]:
    """Return name -> shape of every parameter that `task` uses (default: image classification), in network order."""
    task = task or TaskSpec()
    c0 = config.embed_dim
    shapes: dict[str, Shape] = {
        "embeddings.patch_embeddings.projection.weight": (c0, config.num_channels, *config.patch_size),
        "embeddings.patch_embeddings.projection.bias": (c0,),
    }
    if config.patch_norm:
        shapes |= _norm("embeddings.norm", c0)
    if task.masked:
        shapes["embeddings.mask_token"] = (1, 1, c0)
    if config.use_absolute_embeddings:
        shapes[POSITIONS] = (1, math.prod(config.grid()), c0)
    for stage, depth in enumerate(config.depths):
        width = config.width(stage)
        for block in range(depth):
            shapes |= _block(config, stage, f"encoder.layers.{stage}.blocks.{block}")
        if stage + 1 < len(config.depths):
            merge = f"encoder.layers.{stage}.downsample"
            shapes[f"{merge}.reduction.weight"] = (2 * width, 4 * width)
            shapes |= _norm(f"{merge}.norm", 4 * width if config.version == 1 else 2 * width)
    return shapes | _head(config, task)


def _head(config: SwinConfig, task: TaskSpec) -> dict[str, Shape]:
    if task.name == "backbone":
        if not config.feature_norms:
            return {}
        widths = {name: config.width(max(i - 1, 0)) for i, name in enumerate(stage_names(config))}
        norms = [_norm(f"hidden_states_norms.{name}", widths[name]) for name in task.features(config)]
        return {name: shape for norm in norms for name, shape in norm.items()}
    shapes = _norm("layernorm", config.hidden_size) if config.final_norm else {}
    if task.name == "image-classification" and config.num_labels > 0:
        for place, (inputs, outputs) in enumerate(pairwise((config.pooled_size, *config.head_widths, config.num_labels))):
            shapes |= _linear(f"classifier.{place}" if config.head_widths else "classifier", inputs, outputs)
    if task.name == "masked-image-modeling":
        outputs = config.encoder_stride**2 * config.num_channels
        shapes |= {"decoder.0.weight": (outputs, config.hidden_size, 1, 1), "decoder.0.bias": (outputs,)}
    return shapes


def random_parameter(name: str, shape: Shape, seed: int) -> NDArray[np.float32]:
    """Draw random values for one parameter. They depend on its name and `seed` only.

    No parameter stays at zero or one, so a comparison sees every part of the network: biases, position tables and norm
    scales are random, too. Matrices preserve the variance of their inputs.
    """
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    values = rng.standard_normal(shape, dtype=np.float32)
    leaf = name.rsplit(".", 1)[-1]
    if leaf == "logit_scale":
        values = rng.uniform(math.log(3), math.log(40), shape).astype(np.float32)
    elif leaf == "relative_position_bias_table":
        values *= np.float32(0.5)
    elif "norm" in name:
        values = np.float32(leaf == "weight") + np.float32(0.1) * values
    elif leaf in ("bias", "position_embeddings", "mask_token"):
        values *= np.float32(0.1)
    else:
        values *= np.float32(1 / math.sqrt(math.prod(shape[1:])))
    return values


def _block(config: SwinConfig, stage: int, name: str) -> dict[str, Shape]:
    width, hidden, heads = config.width(stage), config.mlp_width(stage), config.num_heads[stage]
    attention = f"{name}.attention.self"
    shapes: dict[str, Shape] = _norm(f"{name}.layernorm_before", width)
    if config.version == 1:
        rows, columns = config.table_window(stage)
        shapes[f"{attention}.relative_position_bias_table"] = ((2 * rows - 1) * (2 * columns - 1), heads)
    else:
        shapes[f"{attention}.logit_scale"] = (heads, 1, 1)
        shapes |= _linear(f"{attention}.continuous_position_bias_mlp.0", 2, 512)
        shapes |= _linear(f"{attention}.continuous_position_bias_mlp.2", 512, heads, bias=False)
    for part in ("query", "key", "value"):
        bias = config.qkv_bias and not (config.version == 2 and part == "key")
        shapes |= _linear(f"{attention}.{part}", width, width, bias=bias)
    shapes |= _linear(f"{name}.attention.output.dense", width, width)
    shapes |= _norm(f"{name}.layernorm_after", width)
    shapes |= _linear(f"{name}.intermediate.dense", width, hidden)
    shapes |= _linear(f"{name}.output.dense", hidden, width)
    return shapes


def _linear(name: str, inputs: int, outputs: int, bias: bool = True) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {f"{name}.weight": (outputs, inputs)}
    if bias:
        shapes[f"{name}.bias"] = (outputs,)
    return shapes


def _norm(name: str, width: int) -> dict[str, Shape]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}
