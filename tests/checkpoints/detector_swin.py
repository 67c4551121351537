"""A small Swin as the code of detectors and OpenMMLab computes it, written from their published sources, for comparison.

Parameters have OpenMMLab's names. `renamed` gives those of Microsoft's code for detectors.
"""

from __future__ import annotations

import math
import re
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MICROSOFT = (
    (r"^stages", "layers"), (r"patch_embed\.projection", "patch_embed.proj"), (r"attn\.w_msa", "attn"),
    (r"ffn\.layers\.0\.0", "mlp.fc1"), (r"ffn\.layers\.1", "mlp.fc2"),
)  # fmt: skip


class Msa(nn.Module):
    def __init__(self, width: int, heads: int, window: int, version: int) -> None:
        super().__init__()
        self.heads, self.window, self.version = heads, window, version
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias=version == 1), nn.Linear(width, width)
        side = torch.arange(window)
        y, x = (axis.flatten() for axis in torch.meshgrid(side, side, indexing="ij"))
        index = (y[:, None] - y + window - 1) * (2 * window - 1) + x[:, None] - x + window - 1
        self.register_buffer("relative_position_index", index)
        if version == 1:
            self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
            return
        self.logit_scale = nn.Parameter(torch.zeros(heads, 1, 1))
        self.cpb_mlp = nn.Sequential(nn.Linear(2, 512), nn.ReLU(), nn.Linear(512, heads, bias=False))
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))
        steps = torch.arange(1 - window, window) * 8.0 / (window - 1)
        table = torch.stack(torch.meshgrid(steps, steps, indexing="ij"), -1)[None]
        self.register_buffer("relative_coords_table", table.sign() * torch.log2(table.abs() + 1) / 3)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        count, tokens, width = x.shape
        qkv = self.qkv(x)
        if self.version == 2:
            qkv = qkv + torch.cat((self.q_bias, torch.zeros_like(self.v_bias), self.v_bias))
        q, k, v = qkv.reshape(count, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        if self.version == 1:
            scores, table = q @ k.mT / math.sqrt(width / self.heads), self.relative_position_bias_table
        else:
            scale = self.logit_scale.clamp(max=math.log(100)).exp()
            scores, table = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * scale, self.cpb_mlp(self.relative_coords_table)
            table = 16 * torch.sigmoid(table.reshape(-1, self.heads))
        scores = scores + table[self.relative_position_index.flatten()].reshape(tokens, tokens, -1).permute(2, 0, 1)
        if mask is not None:
            scores = (scores.reshape(-1, *mask.shape[:1], *scores.shape[1:]) + mask[:, None]).reshape(scores.shape)
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(count, tokens, width))


class SwinBlock(nn.Module):
    def __init__(self, width: int, heads: int, window: int, shift: int, version: int, always: bool) -> None:
        super().__init__()
        self.window, self.shift, self.version, self.always = window, shift, version, always
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn, self.ffn = nn.Module(), nn.Module()
        self.attn.w_msa = Msa(width, heads, window, version)
        self.ffn.layers = nn.ModuleList([nn.Sequential(nn.Linear(width, 2 * width), nn.GELU()), nn.Linear(2 * width, width)])

    def attention(self, x: Tensor) -> Tensor:  # [batch, height, width, channels]
        height, width = x.shape[1:3]
        side, shift = self.window, self.shift if self.always or min(height, width) > self.window else 0
        x = F.pad(x, (0, 0, 0, -width % side, 0, -height % side))
        batch, rows, columns, channels = x.shape
        x, mask = torch.roll(x, (-shift, -shift), (1, 2)), None
        if shift:
            region = torch.zeros(rows, columns)
            cuts = (slice(0, -side), slice(-side, -shift), slice(-shift, None))
            for number, (down, right) in enumerate(product(cuts, cuts)):
                region[down, right] = number
            region = region.reshape(rows // side, side, columns // side, side).transpose(1, 2).reshape(-1, side * side)
            mask = (region[:, None] != region[:, :, None]) * -100.0
        x = x.reshape(batch, rows // side, side, columns // side, side, channels).transpose(2, 3)
        x = self.attn.w_msa(x.reshape(-1, side * side, channels), mask)
        x = x.reshape(batch, rows // side, columns // side, side, side, channels).transpose(2, 3)
        return torch.roll(x.reshape(batch, rows, columns, channels), (shift, shift), (1, 2))[:, :height, :width]

    def forward(self, x: Tensor) -> Tensor:
        def mlp(x: Tensor) -> Tensor:
            return self.ffn.layers[1](self.ffn.layers[0](x))

        if self.version == 2:
            x = x + self.norm1(self.attention(x))
            return x + self.norm2(mlp(x))
        x = x + self.attention(self.norm1(x))
        return x + mlp(self.norm2(x))


class PatchMerging(nn.Module):
    def __init__(self, width: int, version: int, unfold: bool) -> None:
        super().__init__()
        self.version, self.unfold = version, unfold
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)
        self.norm = nn.LayerNorm(4 * width if version == 1 else 2 * width)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        if self.unfold:
            merged = F.unfold(x.permute(0, 3, 1, 2), 2, stride=2).transpose(1, 2)
            merged = merged.reshape(len(x), x.shape[1] // 2, x.shape[2] // 2, -1)
        else:
            merged = torch.cat([x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)], -1)
        return self.reduction(self.norm(merged)) if self.version == 1 else self.norm(self.reduction(merged))


class DetectorSwin(nn.Module):
    """`always` shifts windows on every map (mmdetection, mmsegmentation, Microsoft's detectors), else as in mmpretrain."""

    def __init__(self, outputs: tuple[int, ...], version: int = 1, always: bool = True, unfold: bool = True) -> None:
        super().__init__()
        self.outputs, self.version, self.unfold = outputs, version, unfold
        self.patch_embed = nn.Module()
        self.patch_embed.projection, self.patch_embed.norm = nn.Conv2d(3, 8, 4, 4), nn.LayerNorm(8)
        self.stages = nn.ModuleList()
        for i in range(3):
            stage = nn.Module()
            stage.blocks = nn.Sequential(*(SwinBlock(8 << i, 2, 4, shift, version, always) for shift in (0, 2)))
            if (version == 2 and i) or (version == 1 and i < 2):  # V2 merges at the start of a stage
                stage.downsample = PatchMerging(8 << (i - version + 1), version, unfold)
            self.stages.append(stage)
        for i in outputs:
            setattr(self, f"norm{i}", nn.LayerNorm(8 << i))

    def forward(self, pixels: Tensor) -> list[Tensor]:
        pixels = F.pad(pixels, (0, -pixels.shape[3] % 4, 0, -pixels.shape[2] % 4))
        x = self.patch_embed.norm(self.patch_embed.projection(pixels).permute(0, 2, 3, 1))
        found = []
        for i, stage in enumerate(self.stages):
            if i and self.version == 2:
                x = stage.downsample(x)
            x = stage.blocks(x)
            if i in self.outputs:
                found.append(getattr(self, f"norm{i}")(x).permute(0, 3, 1, 2))
            if i < 2 and self.version == 1:
                x = stage.downsample(x)
        return found


def renamed(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights under the names of Microsoft's code."""
    found = {}
    for name, tensor in weights.items():
        for pattern, new in MICROSOFT:
            name = re.sub(pattern, new, name)
        found[name] = tensor
    return found
