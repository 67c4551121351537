"""Preprocessing as part of the network: uint8 frames [batch, height, width, 3] instead of prepared pixels.

Rescaling and normalisation disappear in the patch embedding's convolution. Resizing is two products with constants, in whole
numbers that float32 holds, so that every pixel is the one that Pillow makes; of a product with all pixels of an axis most
factors would be 0, so it is done block by block, each with the pixels that it needs.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swin_deploy.config import SwinConfig
from swin_deploy.frames import CHANNELS, Frames
from swin_deploy.models.blocks import Tensors
from swin_deploy.models.resampling import PRECISION, UNIT, Weights, frame_weights, rows_first, split_exactly
from swin_deploy.models.swin import PatchEmbedding, SwinNetwork
from swin_deploy.specs import Size

BLOCK = 8  # new rows or columns that are computed together
GRANULES = (16, 8, 4, 2, 1)  # pixels of a row that are copied together


def take_frames(network: SwinNetwork, image_size: Size, tensors: Tensors, frames: Frames) -> None:
    """Lets `network`, of these `tensors` and for images of `image_size`, take what `frames` makes, uint8, and prepare it.

    Compilers for GPUs have little for uint8 but a cast, so for these it comes first; elsewhere bytes are moved, then cast.
    """
    network.embeddings = FrameEmbedding(
        network.config, image_size, tensors, network.task.masked, frames, cast_first=network.target == "tensorrt"
    )


class FrameEmbedding(PatchEmbedding):
    """uint8 frames [batch, height, width, 3] -> what the patch embedding makes of them once they are preprocessed."""

    of_black: Tensor | None

    def __init__(
        self, config: SwinConfig, image_size: Size, tensors: Tensors, masked: bool, frames: Frames, cast_first: bool
    ) -> None:
        super().__init__(config, image_size, tensors, masked)
        self.cast_first = cast_first
        inside = frames.inside
        mean, std = (inside.image_mean, inside.image_std) if inside.do_normalize else ((0.0,) * CHANNELS, (1.0,) * CHANNELS)
        rescale = inside.rescale_factor if inside.do_rescale else 1.0
        scale = torch.tensor([rescale / s for s in std], dtype=torch.float64).reshape(1, CHANNELS, 1, 1)
        black = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], dtype=torch.float64)
        # The convolution is linear: of a frame it is that of a black frame and the pixels' part. Padding is no black pixel,
        # so where images are no whole patches, the first differs from patch to patch.
        image = self.padded(black.reshape(1, CHANNELS, 1, 1).expand(1, CHANNELS, *image_size))
        of_black = F.conv2d(image, self.weight.double(), self.bias.double(), stride=self.patch).float()
        self.register_buffer("of_black", of_black if any(self.missing) else None)
        self.bias = nn.Parameter(of_black[0, :, 0, 0].clone(), requires_grad=False)
        self.weight = nn.Parameter((self.weight.double() * scale).float(), requires_grad=False)
        self.resize = nn.Sequential()
        if frames.frame_size is not None:
            rows, columns = frame_weights(inside, frames.frame_size)
            if cast_first:
                self.resize.add_module("cast", AsFloat())
            steps = [("columns", columns, Columns), ("rows", rows, Rows)]
            for name, weights, kind in steps[::-1] if rows_first(inside, frames.frame_size) else steps:
                if not _is_identity(weights):
                    self.resize.add_module(name, kind(weights))

    def project(self, pixel_values: Tensor) -> Tensor:
        if len(self.resize) > 0:
            x = self.resize(pixel_values).permute(0, 3, 1, 2).float()
        elif self.cast_first:
            x = pixel_values.float().permute(0, 3, 1, 2)
        else:
            x = pixel_values.permute(0, 3, 1, 2).float()
        x = F.conv2d(self.padded(x), self.weight, self.bias if self.of_black is None else None, stride=self.patch)
        return x if self.of_black is None else x + self.of_black


class AsFloat(nn.Module):
    """Bytes as float32."""

    def forward(self, x: Tensor) -> Tensor:
        return x.float()


class Resampling(nn.Module):
    """Frames [batch, height, width, 3] -> the same with other rows or columns, whole numbers from 0 to 255 in float32.

    `weights` [new, old] are those of Pillow. New lines are computed in blocks of equally many; `index` names the granules
    of each block's window, one block behind the other, None where there is one block that needs all.
    """

    index: Tensor | None

    def __init__(self, weights: Weights, granules: tuple[int, ...]) -> None:
        super().__init__()
        self.new, old = weights.shape
        high, low, self.shift = split_exactly(weights)
        granule = next(size for size in granules if old % size == 0)
        self.blocks = -(-self.new // BLOCK)
        firsts, needed = [], 1
        for block in range(self.blocks):
            used = np.flatnonzero(weights[block * BLOCK : (block + 1) * BLOCK].any(axis=0))
            first, last = (used[0] // granule, used[-1] // granule) if len(used) else (0, 0)
            firsts.append(int(first))
            needed = max(needed, int(last - first) + 1)
        size = BLOCK
        if self.blocks == 1 or needed * granule >= old:
            self.blocks, size, firsts, needed = 1, self.new, [0], old // granule
        firsts = [min(first, old // granule - needed) for first in firsts]
        self.granule, self.window, self.size = granule, needed * granule, size
        places = np.array([range(first, first + needed) for first in firsts])
        self.register_buffer("index", torch.from_numpy(places.reshape(-1)) if self.blocks > 1 else None)
        parts = np.zeros((self.blocks, 2, size, self.window), dtype=np.float32)
        for block, first in enumerate(firsts):
            lines = slice(block * size, min((block + 1) * size, self.new))
            for half, values in enumerate((high, low)):
                part = values[lines, first * granule : first * granule + self.window]
                parts[block, half, : len(part)] = part
        self.parts = parts  # [blocks, high and low, lines, window]

    def rounded(self, high: Tensor, low: Tensor) -> Tensor:
        """What Pillow makes of the sum: rounded, and cut to a byte."""
        carried = high + torch.floor(low * 2.0**-self.shift)
        return torch.clamp(torch.floor(carried * 2.0 ** (self.shift - PRECISION) + 0.5), 0.0, 255.0)


class Columns(Resampling):
    """[batch, height, width, 3], float32 or uint8 -> [batch, height, new width, 3]; colours stay side by side."""

    factors: Tensor

    def __init__(self, weights: Weights) -> None:
        super().__init__(weights, GRANULES)
        # A column of the product is one colour of one new pixel, and reads that colour only.
        factors = np.einsum("bhlw,cd->bwchld", self.parts, np.eye(CHANNELS, dtype=np.float32))
        shape = (self.blocks, self.window * CHANNELS, 2 * self.size * CHANNELS)
        self.register_buffer("factors", torch.from_numpy(factors.reshape(shape)))

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        if self.index is not None:
            x = x.reshape(-1, height, width // self.granule, self.granule * CHANNELS).index_select(2, self.index)
        x = x.reshape(-1, height, self.blocks, self.window * CHANNELS).permute(0, 2, 1, 3).float()
        x, half = torch.matmul(x, self.factors), self.size * CHANNELS
        x = self.rounded(x[..., :half], x[..., half:])
        x = x.permute(0, 2, 1, 3).reshape(-1, height, self.blocks * self.size, CHANNELS)
        return x[:, :, : self.new]


class Rows(Resampling):
    """[batch, height, width, 3], float32 or uint8 -> [batch, new height, width, 3]."""

    factors: Tensor

    def __init__(self, weights: Weights) -> None:
        super().__init__(weights, (1,))
        self.register_buffer("factors", torch.from_numpy(self.parts.reshape(self.blocks, 2 * self.size, self.window)))

    def forward(self, x: Tensor) -> Tensor:
        width = x.shape[2]
        if self.index is not None:
            x = x.index_select(1, self.index)
        x = x.reshape(-1, self.blocks, self.window, width * CHANNELS).float()
        x = torch.matmul(self.factors, x)
        x = self.rounded(x[:, :, : self.size], x[:, :, self.size :])
        return x.reshape(-1, self.blocks * self.size, width, CHANNELS)[:, : self.new]


def _is_identity(weights: Weights) -> bool:
    return weights.shape[0] == weights.shape[1] and np.array_equal(weights, UNIT * np.eye(len(weights), dtype=np.int64))
