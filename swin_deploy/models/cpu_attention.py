"""Window attention in the forms that CPU runtimes are fastest with; blocks.py has the one for TensorRT (docs/cpu.md).

A CPU pays for every copy. Here query, key and value are three projections with a transpose each, where one projection costs
a transpose of rank 6 and copies to take its result apart. For OpenVINO everything is of rank 4 and bias and mask are one
constant, because only then does it compute a block's attention as one kernel.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from swin_deploy.config import SwinConfig
from swin_deploy.models.blocks import Linear, Tensors, cosine_scale, position_bias, qkv_parts
from swin_deploy.models.windows import WindowGrid

LARGEST_BIAS = 2_000_000  # numbers; bias and mask of a block that have more of them when joined stay apart


class SplitAttention(nn.Module):
    """The same as blocks.Attention: tokens [batch * windows * tokens, channels] -> tokens and probabilities.

    `join` makes bias and mask one constant, [1, windows * heads, tokens, tokens], unless that is too large.
    """

    bias: Tensor
    mask: Tensor | None
    scale: Tensor | None

    def __init__(
        self, config: SwinConfig, stage: int, grid: WindowGrid, tensors: Tensors, mask: Tensor | None, join: bool
    ) -> None:
        super().__init__()
        self.heads, self.windows, self.tokens = config.num_heads[stage], grid.windows, grid.tokens_per_window
        self.head_width = config.width(stage) // self.heads
        self.query, self.key, self.value = (Linear(*part) for part in qkv_parts(config, self.head_width, tensors))
        self.proj = Linear(tensors["attention.output.dense.weight"], tensors["attention.output.dense.bias"])
        bias = position_bias(config, stage, tensors)
        self.joined = join and (mask is None or self.windows * bias.numel() <= LARGEST_BIAS)
        if not self.joined:
            bias = bias[None, None]
        elif mask is None:
            bias = bias[None]
        else:
            bias, mask = (bias + mask[0]).flatten(0, 1)[None], None
        self.by_window = self.joined and bias.shape[1] == self.heads
        self.register_buffer("bias", bias)
        self.register_buffer("mask", mask)
        self.register_buffer("scale", cosine_scale(tensors)[:, 0, 0, :, 0] if config.version == 2 else None)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        query, key, value = (self._split(step(x)) for step in (self.query, self.key, self.value))
        if self.scale is not None:
            query, key = (self._unit(part, factor) for part, factor in zip((query, key), self.scale, strict=True))
        query, key, value = (self._by_head(part) for part in (query, key, value))
        scores = query @ key.transpose(-1, -2) + self.bias
        if self.mask is not None:
            scores = scores + self.mask
        probabilities = torch.softmax(scores, dim=-1)
        context = probabilities @ value
        if self.joined and not self.by_window:
            context = context.reshape(-1, self.windows, self.heads, self.tokens, self.head_width)
        context = context.transpose(-2, -3).reshape(-1, x.shape[-1])
        return self.proj(context), probabilities.reshape(-1, self.heads, self.tokens, self.tokens)

    def _split(self, x: Tensor) -> Tensor:
        """[rows, channels] -> [batch * windows, tokens, heads, head width], or with batch and windows as two axes."""
        if self.by_window:
            return x.reshape(-1, self.tokens, self.heads, self.head_width)
        return x.reshape(-1, self.windows, self.tokens, self.heads, self.head_width)

    def _by_head(self, x: Tensor) -> Tensor:
        """[..., tokens, heads, head width] -> [..., heads, tokens, head width]; joined, windows and heads are one axis."""
        x = x.transpose(-2, -3)
        if self.joined and not self.by_window:
            return x.reshape(-1, self.windows * self.heads, self.tokens, self.head_width)
        return x

    def _unit(self, x: Tensor, factor: Tensor) -> Tensor:
        """Vectors of length `factor` [heads, 1] (scale of the query, 1 of the key)."""
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(1e-12)
        return cast(Tensor, x * (factor / norm))
