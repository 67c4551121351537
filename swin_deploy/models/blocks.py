"""The layers of the Swin Transformer, V1 and V2, written for inference and export. swin.py joins them.

Everything that does not depend on the image is folded at construction: position bias (with V2's MLP and 16 * sigmoid), shift
masks, the softmax scale of V1, exp(clamp(logit_scale)) of V2, and all token positions. Tokens have the shape
[tokens * batch, channels] in the window order of the current block (windows.py), so a linear layer is one Gemm. The batch is
the inner axis and the only dynamic one, so the windows of all images form one axis with a constant stride
(docs/design/engine-graphs.md).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from swin_deploy.config import SwinConfig
from swin_deploy.models import windows
from swin_deploy.models.activations import ACTIVATIONS
from swin_deploy.models.parameters import POSITIONS, LazyTensors
from swin_deploy.models.windows import WindowGrid

Tensors = Mapping[str, Tensor]

# For the layers that transformers builds without config.layer_norm_eps: patch embedding and patch merging.
DEFAULT_EPS = 1e-5


class Linear(nn.Module):
    """x [rows, inputs] -> [rows, outputs]."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class LayerNorm(nn.Module):
    """x [..., channels] -> the same shape."""

    def __init__(self, tensors: Tensors, name: str, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(tensors[f"{name}.weight"], requires_grad=False)
        self.bias = nn.Parameter(tensors[f"{name}.bias"], requires_grad=False)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class Reorder(nn.Module):
    """Tokens [source * batch, channels] -> [target * batch, channels], gathered by a constant index."""

    index: Tensor

    def __init__(self, index: windows.Index, tokens: int) -> None:
        super().__init__()
        self.register_buffer("index", torch.from_numpy(index))
        self.tokens = tokens

    def forward(self, x: Tensor) -> Tensor:
        channels = x.shape[-1]
        return x.reshape(self.tokens, -1, channels).index_select(0, self.index).reshape(-1, channels)


class WindowAttention(nn.Module):
    """Window attention over tokens in the order of `grid`, [places * batch, channels], with a constant position bias.

    Returns the tokens, and the probabilities [batch * windows, heads, tokens, tokens]. With `joined`, query, key and value
    are one projection (for TensorRT); without, they are three (for CPUs).
    """

    bias: Tensor
    mask: Tensor | None
    scale: Tensor | None

    def __init__(
        self, config: SwinConfig, stage: int, grid: WindowGrid, tensors: Tensors, mask: Tensor | None, joined: bool
    ) -> None:
        super().__init__()
        self.heads, self.tokens, self.tokens_first = config.num_heads[stage], grid.tokens_per_window, grid.tokens_first
        self.places = (self.tokens, grid.windows) if self.tokens_first else (grid.windows, self.tokens)
        self.head_width = config.width(stage) // self.heads
        parts = _qkv(config, self.head_width, tensors)
        self.joined = joined
        if joined:
            self.qkv = _joined(parts)
        else:
            self.query, self.key, self.value = parts
        self.proj = Linear(tensors["attention.output.dense.weight"], tensors["attention.output.dense.bias"])
        self.register_buffer("bias", _position_bias(config, stage, tensors)[None, None])
        self.register_buffer("mask", mask)
        scale = tensors["attention.self.logit_scale"] if config.version == 2 else None
        self.register_buffer("scale", None if scale is None else scale.clamp(max=math.log(100)).exp().reshape(-1, 1, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        channels = x.shape[-1]
        parts = self.qkv(x).chunk(3, dim=-1) if self.joined else (self.query(x), self.key(x), self.value(x))
        query, key, value = (self._by_window(part) for part in parts)
        if self.scale is not None:
            query, key = _unit(query) * self.scale, _unit(key)
        scores = query @ key.transpose(-1, -2) + self.bias
        if self.mask is not None:
            scores = scores + self.mask
        probabilities = torch.softmax(scores, dim=-1)
        context = (probabilities @ value).permute(*((3, 0, 1, 2, 4) if self.tokens_first else (0, 3, 1, 2, 4)))
        attended = self.proj(context.reshape(-1, channels))
        return attended, probabilities.transpose(0, 1).reshape(-1, self.heads, self.tokens, self.tokens)

    def _by_window(self, x: Tensor) -> Tensor:
        """[places * batch, channels] -> [windows, batch, heads, tokens, head width]."""
        split = x.reshape(*self.places, -1, self.heads, self.head_width)
        return split.permute(*((1, 2, 3, 0, 4) if self.tokens_first else (0, 2, 3, 1, 4)))


class WindowAttention4D(WindowAttention):
    """Window attention with four axes, [windows, batch * heads, tokens, head width], which OpenVINO fuses into one kernel."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.bias = self.bias[0]
        self.mask = None if self.mask is None else self.mask[:, 0]
        self.scale = None if self.scale is None else self.scale[None]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        channels, batch = x.shape[-1], x.shape[0] // math.prod(self.places)
        query, key, value = self.query(x), self.key(x), self.value(x)
        if self.scale is not None:
            query, key = (_unit(part.reshape(-1, self.head_width)) for part in (query, key))
        scores = self._by_window(query) @ self._by_window(key).transpose(-1, -2)
        if self.scale is not None:
            scores = scores * _repeated(self.scale, batch)
        scores = scores + _repeated(self.bias, batch)
        if self.mask is not None:
            scores = scores + self.mask
        probabilities = torch.softmax(scores, dim=-1)
        attended = self.proj((probabilities @ self._by_window(value)).transpose(1, 2).reshape(-1, channels))
        by_image = probabilities.reshape(self.places[0], -1, self.heads, self.tokens, self.tokens).transpose(0, 1)
        return attended, by_image.reshape(-1, self.heads, self.tokens, self.tokens)

    def _by_window(self, x: Tensor) -> Tensor:
        """[windows * tokens * batch, channels] -> [windows, batch * heads, tokens, head width]."""
        return x.reshape(*self.places, -1, self.head_width).transpose(1, 2)


class Block(nn.Module):
    """One transformer block over tokens in its own window order. V1 has the norms before attention and MLP, V2 after.

    Returns the tokens and the attention probabilities.
    """

    pad_keep: Tensor | None

    def __init__(
        self,
        config: SwinConfig,
        stage: int,
        grid: WindowGrid,
        tensors: Tensors,
        mask: Tensor | None,
        keep: Tensor | None,
        joined: bool,
    ) -> None:
        super().__init__()
        self.version = config.version
        kind = WindowAttention if grid.tokens_first else WindowAttention4D
        self.attention = kind(config, stage, grid, tensors, mask, joined)
        self.norm1 = LayerNorm(tensors, "layernorm_before", config.layer_norm_eps)
        self.norm2 = LayerNorm(tensors, "layernorm_after", config.layer_norm_eps)
        self.fc1 = Linear(tensors["intermediate.dense.weight"], tensors["intermediate.dense.bias"])
        self.fc2 = Linear(tensors["output.dense.weight"], tensors["output.dense.bias"])
        self.activation = ACTIVATIONS[config.hidden_act]
        self.register_buffer("pad_keep", keep)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.version == 1:
            attended, probabilities = self.attention(self.zero_padding(self.norm1(x)))
            x = x + attended
            return x + self.mlp(self.norm2(x)), probabilities
        attended, probabilities = self.attention(self.zero_padding(x))
        x = x + self.norm1(attended)
        return x + self.norm2(self.mlp(x)), probabilities

    def mlp(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.fc2(self.activation(self.fc1(x))))

    def zero_padding(self, x: Tensor) -> Tensor:
        """Set padding to zero before attention. Gathers and residuals leave other values there."""
        return x if self.pad_keep is None else scale_tokens(x, self.pad_keep)


class PatchMerging(nn.Module):
    """Tokens of one stage -> tokens of the next: four neighbours are concatenated and projected to twice the channels."""

    edge_keep: Tensor | None

    def __init__(
        self, config: SwinConfig, tokens: int, tensors: Tensors, neighbours: Reorder | None, keep: Tensor | None
    ) -> None:
        super().__init__()
        self.tokens = tokens
        self.version = config.version
        self.neighbours = neighbours
        self.norm = LayerNorm(tensors, "norm", DEFAULT_EPS)
        self.reduction = Linear(tensors["reduction.weight"], None)
        self.register_buffer("edge_keep", keep)

    def forward(self, x: Tensor) -> Tensor:
        channels = x.shape[-1]
        if self.neighbours is not None:
            x = self.neighbours(x)
        if self.edge_keep is not None:
            x = scale_tokens(x, self.edge_keep)
        x = x.reshape(self.tokens, 4, -1, channels).transpose(1, 2).reshape(-1, 4 * channels)
        return cast(Tensor, self.reduction(self.norm(x)) if self.version == 1 else self.norm(self.reduction(x)))


def _qkv(config: SwinConfig, head_width: int, tensors: Tensors) -> list[Linear]:
    """The projections to query, key and value. The softmax scale of V1 is folded into that of the query."""
    parts = []
    for part in ("query", "key", "value"):
        weight, bias = tensors[f"attention.self.{part}.weight"], tensors.get(f"attention.self.{part}.bias")
        if part == "query" and config.version == 1:
            factor = 1 / math.sqrt(head_width)
            weight, bias = weight * factor, None if bias is None else bias * factor
        parts.append(Linear(weight, bias if config.qkv_bias else None))
    return parts


def _joined(parts: list[Linear]) -> Linear:
    """One projection for all `parts`. V2 has no key bias; it becomes 0."""
    weights, biases = [part.weight.data for part in parts], [part.bias for part in parts]
    filled = [torch.zeros(len(w)) if b is None else b.data for w, b in zip(weights, biases, strict=True)]
    return Linear(torch.cat(weights), None if all(bias is None for bias in biases) else torch.cat(filled))


def _unit(x: Tensor) -> Tensor:
    """x [..., head width], every vector divided by its L2 norm. Zero stays zero."""
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / norm.clamp_min(1e-12)


def _repeated(constant: Tensor, batch: int) -> Tensor:
    """[1, heads, ...] -> [1, batch * heads, ...]."""
    return constant.expand(batch, -1, -1, -1).reshape(1, -1, *constant.shape[2:])


def _position_bias(config: SwinConfig, stage: int, tensors: Tensors) -> Tensor:
    """[heads, tokens, tokens], added to the attention scores of every window.

    The maximum of each query is shifted to 0. Softmax does not change, and fp16 represents scores near 0 best; the bias of
    V2 would be up to 16.
    """
    window, heads = config.table_window(stage), config.num_heads[stage]
    tokens = window[0] * window[1]
    if config.version == 1:
        table = tensors["attention.self.relative_position_bias_table"]
    else:
        mlp = "attention.self.continuous_position_bias_mlp"
        coordinates = windows.relative_coordinates(window, config.pretrained_window_sizes[stage])
        hidden = F.relu(F.linear(torch.from_numpy(coordinates), tensors[f"{mlp}.0.weight"], tensors[f"{mlp}.0.bias"]))
        table = 16 * torch.sigmoid(F.linear(hidden, tensors[f"{mlp}.2.weight"]))
    index = torch.from_numpy(windows.relative_position_index(window).reshape(-1))
    bias = table[index].reshape(tokens, tokens, heads).permute(2, 0, 1)
    return bias - bias.amax(-1, keepdim=True)


def position_embeddings(config: SwinConfig, grid: tuple[int, int], tensors: Tensors) -> Tensor | None:
    """Return [1, rows * columns, embed_dim], which is added to the patches of `grid`. None if the config has no table.

    A table of another grid is interpolated as in transformers (bicubic, align_corners=False). Tables of transformers 4, and
    of V2 in every version, have one row too many. The forward pass of transformers then fails at the configured size, and its
    interpolation takes the first row for a class token, which Swin does not have. That row is ignored here, unless an image
    has exactly as many patches as the table has rows.
    """
    if not config.use_absolute_embeddings:
        return None
    table = tensors[POSITIONS]
    wanted, (rows, columns) = math.prod(grid), config.grid()
    if table.shape[1] == rows * columns + 1:
        if table.shape[1] == wanted:
            return table
        table = table[:, 1:]
    if grid == (rows, columns):
        return table
    square = table.reshape(1, rows, columns, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(square, size=grid, mode="bicubic", align_corners=False)
    return resized.permute(0, 2, 3, 1).reshape(1, wanted, -1)


def shift_mask(config: SwinConfig, grid: WindowGrid) -> Tensor | None:
    """Return the attention mask [windows, 1, 1, tokens, tokens], or None without a shift.

    transformers adds V2's mask of -100 twice, hence -200. The mask of V1 is -100 in every framework, but exp(-100) is a
    denormal number, which slows CPUs down, and exp(-200) is 0. Results differ only if a masked score exceeds all others of
    its query by more than 80. Larger masks leave fewer of 256 steps for the scores when another tool quantizes their sum.
    """
    value = -200.0 if config.version == 1 or config.framework == "hf" else -100.0
    mask = tensor_or_none(grid.mask(value))
    return None if mask is None else mask[:, None, None]


def reorder(source: windows.Index, target: windows.Index) -> Reorder | None:
    index = windows.gather_index(source, target)
    return None if index is None else Reorder(index, len(source))


def scale_tokens(x: Tensor, keep: Tensor) -> Tensor:
    """Multiply x [tokens * batch, channels] by keep [tokens, 1, 1], which is 1 for real tokens and 0 for padding."""
    tokens = x.reshape(keep.shape[0], -1, x.shape[-1])
    return (tokens * keep).reshape(-1, x.shape[-1])


def tensor_or_none(array: NDArray[np.float32] | None) -> Tensor | None:
    return None if array is None else torch.from_numpy(array)


def below(tensors: Tensors, prefix: str) -> Tensors:
    """Return the tensors whose names start with `prefix`, without it. A tensor is read when it is accessed."""
    names = (name.removeprefix(prefix) for name in tensors if name.startswith(prefix))
    return LazyTensors(names, lambda name: tensors[prefix + name])
