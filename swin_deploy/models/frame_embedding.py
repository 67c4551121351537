"""Preprocessing as part of the network: it accepts frames instead of prepared pixels.

Frames are uint8 [batch, height, width, channels], or float32 [batch, channels, height, width] with pixels from 0 to 255.

Rescaling and normalization are folded into the convolution of the patch embedding. Resizing is two matmuls with constants, in
integers that float32 represents exactly, so every pixel equals that of Pillow. Most factors of one large matmul would be 0, so
each block of output lines is multiplied with the input pixels that it needs.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from swin_deploy.config import SwinConfig
from swin_deploy.errors import UsageError
from swin_deploy.frame_input import Frames
from swin_deploy.models.blocks import Tensors
from swin_deploy.models.swin import PatchEmbedding, SwinNetwork
from swin_deploy.options import Size
from swin_deploy.preprocess import Preprocessor

Weights = NDArray[np.int64]

PRECISION = 22  # fractional bits of Pillow's weights
UNIT = 1 << PRECISION
NEAREST = 0
BLOCK = 8  # output rows or columns computed together
GRANULES = (16, 8, 4, 2, 1)  # pixels of a row copied together


def accept_frames(network: SwinNetwork, image_size: Size, tensors: Tensors, frames: Frames) -> None:
    """Replace the patch embedding of `network` by one that preprocesses frames.

    `image_size` is that of the prepared image. GPU compilers support little more for uint8 than a cast, so the cast comes
    first there. Elsewhere bytes are moved before.
    """
    network.embeddings = FrameEmbedding(
        network.config, image_size, tensors, network.task.masked, frames, cast_first=network.target == "tensorrt"
    )


class FrameEmbedding(PatchEmbedding):
    """Frames -> the patch embedding of the preprocessed frames."""

    of_black: Tensor | None

    def __init__(
        self, config: SwinConfig, image_size: Size, tensors: Tensors, masked: bool, frames: Frames, cast_first: bool
    ) -> None:
        super().__init__(config, image_size, tensors, masked)
        self.cast_first, self.planar = cast_first, frames.layout == "nchw"
        inside, channels = frames.inside, config.num_channels
        mean, std = (inside.image_mean, inside.image_std) if inside.do_normalize else ((0.0,) * channels, (1.0,) * channels)
        rescale = inside.rescale_factor if inside.do_rescale else 1.0
        scale = torch.tensor([rescale / s for s in std], dtype=torch.float64).reshape(1, channels, 1, 1)
        black = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], dtype=torch.float64)
        # The convolution is linear: its result is that of a black frame plus that of the pixels. Padding is not black, so the
        # former differs between patches if an image is not a whole number of patches.
        image = self.padded(black.reshape(1, channels, 1, 1).expand(1, channels, *image_size))
        of_black = F.conv2d(image, self.weight.double(), self.bias.double(), stride=self.patch).float()
        self.register_buffer("of_black", of_black if any(self.missing) else None)
        self.bias = nn.Parameter(of_black[0, :, 0, 0].clone(), requires_grad=False)
        weight = (self.weight.double() * scale).float()
        self.weight = nn.Parameter(weight.flip(1) if frames.order == "bgr" else weight, requires_grad=False)
        self.resize = nn.Sequential()
        if frames.frame_size is not None:
            rows, columns = frame_weights(inside, frames.frame_size)
            if self.planar:
                self.resize.add_module("channels_last", ChannelsLast())
            elif cast_first:
                self.resize.add_module("cast", AsFloat())
            steps = [("columns", columns, Columns), ("rows", rows, Rows)]
            for name, weights, kind in steps[::-1] if rows_first(inside, frames.frame_size) else steps:
                if not _is_identity(weights):
                    self.resize.add_module(name, kind(weights, channels))

    def project(self, pixel_values: Tensor) -> Tensor:
        x = pixel_values
        if len(self.resize) > 0:
            x = self.resize(x).permute(0, 3, 1, 2).float()
        elif not self.planar:
            x = x.float().permute(0, 3, 1, 2) if self.cast_first else x.permute(0, 3, 1, 2).float()
        x = F.conv2d(self.padded(x), self.weight, self.bias if self.of_black is None else None, stride=self.patch)
        return x if self.of_black is None else x + self.of_black


class AsFloat(nn.Module):
    """uint8 -> float32."""

    def forward(self, x: Tensor) -> Tensor:
        return x.float()


class ChannelsLast(nn.Module):
    """[batch, channels, height, width] -> [batch, height, width, channels]."""

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1)


class Resampling(nn.Module):
    """Resizes one axis of frames [batch, height, width, channels]; the result holds integers from 0 to 255 in float32.

    `weights` [new, old] are those of Pillow. Output lines are computed in blocks of equal size. `index` gathers the input
    granules of all blocks; None if a single block needs all of them.
    """

    index: Tensor | None

    def __init__(self, weights: Weights, channels: int, granules: tuple[int, ...]) -> None:
        super().__init__()
        self.channels = channels
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
        """Round and clamp the sum to 8 bits, as Pillow does."""
        carried = high + torch.floor(low * 2.0**-self.shift)
        return torch.clamp(torch.floor(carried * 2.0 ** (self.shift - PRECISION) + 0.5), 0.0, 255.0)


class Columns(Resampling):
    """[batch, height, width, channels], float32 or uint8 -> [batch, height, new width, channels]."""

    factors: Tensor

    def __init__(self, weights: Weights, channels: int) -> None:
        super().__init__(weights, channels, GRANULES)
        # A column of the matrix is one colour of one output pixel, and reads that colour only.
        factors = np.einsum("bhlw,cd->bwchld", self.parts, np.eye(channels, dtype=np.float32))
        shape = (self.blocks, self.window * channels, 2 * self.size * channels)
        self.register_buffer("factors", torch.from_numpy(factors.reshape(shape)))

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        if self.index is not None:
            x = x.reshape(-1, height, width // self.granule, self.granule * self.channels).index_select(2, self.index)
        x = x.reshape(-1, height, self.blocks, self.window * self.channels).permute(0, 2, 1, 3).float()
        x, half = torch.matmul(x, self.factors), self.size * self.channels
        x = self.rounded(x[..., :half], x[..., half:])
        x = x.permute(0, 2, 1, 3).reshape(-1, height, self.blocks * self.size, self.channels)
        return x[:, :, : self.new]


class Rows(Resampling):
    """[batch, height, width, channels], float32 or uint8 -> [batch, new height, width, channels]."""

    factors: Tensor

    def __init__(self, weights: Weights, channels: int) -> None:
        super().__init__(weights, channels, (1,))
        self.register_buffer("factors", torch.from_numpy(self.parts.reshape(self.blocks, 2 * self.size, self.window)))

    def forward(self, x: Tensor) -> Tensor:
        width = x.shape[2]
        if self.index is not None:
            x = x.index_select(1, self.index)
        x = x.reshape(-1, self.blocks, self.window, width * self.channels).float()
        x = torch.matmul(self.factors, x)
        x = self.rounded(x[:, :, : self.size], x[:, :, self.size :])
        return x.reshape(-1, self.blocks * self.size, width, self.channels)[:, : self.new]


def _hamming(x: float) -> float:
    x = abs(x) * math.pi
    if x == 0:
        return 1.0
    return 0.0 if x >= math.pi else math.sin(x) / x * (0.54 + 0.46 * math.cos(x))


def _bicubic(x: float) -> float:
    a, x = -0.5, abs(x)
    if x < 1:
        return ((a + 2) * x - (a + 3)) * x * x + 1
    return (((x - 5) * x + 8) * x - 4) * a if x < 2 else 0.0


def _lanczos(x: float) -> float:
    def sinc(x: float) -> float:
        return 1.0 if x == 0 else math.sin(x * math.pi) / (x * math.pi)

    return sinc(x) * sinc(x / 3) if -3 <= x < 3 else 0.0


# Pillow's number -> the filter and its support
FILTERS: dict[int, tuple[Callable[[float], float], float]] = {
    1: (_lanczos, 3.0),
    2: (lambda x: max(1.0 - abs(x), 0.0), 1.0),  # bilinear
    3: (_bicubic, 2.0),
    4: (lambda x: 1.0 if -0.5 < x <= 0.5 else 0.0, 0.5),  # box
    5: (_hamming, 1.0),
}


def axis_weights(length: int, target: int, resample: int) -> Weights:
    """Return [target, length]: the weight of each input pixel in each output pixel, in units of 2^-22, as Pillow has it."""
    result = np.zeros((target, length), dtype=np.int64)
    if length == target:
        np.fill_diagonal(result, UNIT)
        return result
    if resample == NEAREST:
        step = length / target
        places = np.cumsum([step * 0.5, *[step] * (target - 1)]).astype(int)
        result[np.arange(target), np.minimum(places, length - 1)] = UNIT
        return result
    function, support = FILTERS[resample]
    scale = length / target
    stretch = max(scale, 1.0)
    support *= stretch
    for row in range(target):
        center = (row + 0.5) * scale
        first, end = max(int(center - support + 0.5), 0), min(int(center + support + 0.5), length)
        values = [function((place - center + 0.5) * (1.0 / stretch)) for place in range(first, end)]
        total = sum(values)
        for place, value in enumerate(values, start=first):
            scaled = (value / total if total else value) * UNIT
            result[row, place] = int(scaled - 0.5 if value < 0 else scaled + 0.5)
    return result


def frame_weights(preprocessor: Preprocessor, frame_size: Size) -> tuple[Weights, Weights]:
    """Return the weights of resize and crop for the rows and the columns of a frame. Outside the frame they are 0."""
    resized = preprocessor.resized_to(*frame_size)
    both = [axis_weights(length, target, preprocessor.resample) for length, target in zip(frame_size, resized, strict=True)]
    if preprocessor.do_center_crop and preprocessor.crop_size is not None:
        starts = [
            preprocessor.crop_offset(len(weights), side) for weights, side in zip(both, preprocessor.crop_size, strict=True)
        ]
        both = [_cropped(*one) for one in zip(both, preprocessor.crop_size, starts, strict=True)]
    return both[0], both[1]


def rows_first(preprocessor: Preprocessor, frame_size: Size) -> bool:
    """Return whether the installed Pillow resizes such a frame along its height first. Newer releases choose the order."""
    from PIL import Image

    height, width = preprocessor.resized_to(*frame_size)
    kind = Image.Resampling(preprocessor.resample)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, frame_size, dtype=np.uint8))
    made = noise.resize((width, height), kind)
    columns_first = noise.resize((width, noise.height), kind).resize((width, height), kind)
    return not np.array_equal(np.asarray(made), np.asarray(columns_first))


def split_exactly(weights: Weights) -> tuple[NDArray[np.float32], NDArray[np.float32], int]:
    """Split weights = high * 2^shift + low so that float32 sums them over pixels without rounding.

    Sums of products with 8-bit pixels stay below 2^24 in any order. Each weight fits into 11 bits, so TF32 is exact, too.
    """
    for shift in range(12, 0, -1):
        half = 1 << (shift - 1)
        low = (weights + half) % (2 * half) - half
        high = (weights - low) >> shift
        # In any order of addition, a partial sum lies between the sums of all negative and of all positive terms.
        signs = (np.clip(sign * part, 0, None) for part in (high, low) for sign in (1, -1))
        if max(255 * int(part.sum(axis=1).max()) for part in signs) < 1 << 24 and int(np.abs(high).max()) <= 1 << 11:
            return high.astype(np.float32), low.astype(np.float32), shift
    raise UsageError(
        f"Frames of {weights.shape[1]} pixels cannot be resized exactly to {len(weights)} in float32. Resize them before, and "
        f"export without --embed-resize."
    )


def _cropped(weights: Weights, side: int, first: int) -> Weights:
    result = np.zeros((side, weights.shape[1]), dtype=np.int64)
    inside = [row for row in range(side) if 0 <= first + row < len(weights)]
    result[inside] = weights[[first + row for row in inside]]
    return result


def _is_identity(weights: Weights) -> bool:
    return weights.shape[0] == weights.shape[1] and np.array_equal(weights, UNIT * np.eye(len(weights), dtype=np.int64))
