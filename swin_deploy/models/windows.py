"""Where every token stands: window order, cyclic shift, padding and masks, as index arrays known before any image.

LayerNorm, linear layers and residual adds act on each token alone, so the network carries its tokens in the window order
of the block at hand. Pad, roll and partition of one block and reverse, unroll and crop of the block before then collapse
into one gather with a constant index, and into none when the order does not change. Pure numpy; no torch.

Positions: "row-major" numbers the real tokens of a feature map, row by row; -1 stands for a padding token.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from swin_deploy.config import SwinConfig
from swin_deploy.errors import CheckpointError

Index = NDArray[np.int64]
PAD = -1


@dataclass(frozen=True)
class WindowGrid:
    """A feature map of `height` x `width` tokens, cut into `window` x `window` windows after a cyclic `shift`."""

    height: int
    width: int
    window: int
    shift: int

    @property
    def padded(self) -> tuple[int, int]:
        """Height and width after padding right and bottom to whole windows (before the roll, as transformers does)."""
        return -(-self.height // self.window) * self.window, -(-self.width // self.window) * self.window

    @property
    def windows(self) -> int:
        rows, columns = self.padded
        return rows * columns // self.window**2

    @property
    def tokens_per_window(self) -> int:
        return self.window**2

    def order(self) -> Index:
        """[windows * tokens_per_window]: the row-major position of the token at each place, PAD where there is none."""
        grid = np.full(self.padded, PAD, dtype=np.int64)
        grid[: self.height, : self.width] = np.arange(self.height * self.width).reshape(self.height, self.width)
        return self._partition(np.roll(grid, (-self.shift, -self.shift), (0, 1))).reshape(-1)

    def mask(self, value: float) -> NDArray[np.float32] | None:
        """[windows, tokens, tokens]: `value` between tokens that the roll brought together, 0 elsewhere; None unshifted.

        Regions are cut on the padded size; padding tokens are not masked (every implementation lets them be keys).
        """
        if self.shift == 0:
            return None
        regions = np.zeros(self.padded, dtype=np.int64)
        for axis, extent in enumerate(self.padded):
            band = np.zeros(extent, dtype=np.int64)
            band[extent - self.window : extent - self.shift] = 1
            band[extent - self.shift :] = 2
            regions = regions * 3 + (band[:, None] if axis == 0 else band[None, :])
        region = self._partition(regions)
        return np.asarray(np.where(region[:, :, None] != region[:, None, :], value, 0), dtype=np.float32)

    def _partition(self, grid: Index) -> Index:
        rows, columns = (extent // self.window for extent in grid.shape)
        split = grid.reshape(rows, self.window, columns, self.window)
        return np.asarray(split.transpose(0, 2, 1, 3).reshape(rows * columns, self.tokens_per_window))


@dataclass(frozen=True)
class Stage:
    """The grids of one stage's blocks, in order. `height` x `width` is its feature map, in tokens."""

    height: int
    width: int
    grids: tuple[WindowGrid, ...]


def stages(config: SwinConfig, image_size: tuple[int, int]) -> tuple[Stage, ...]:
    """Every stage that an image of `image_size` (height, width in pixels) passes through."""
    height, width = config.grid(image_size)
    result = []
    for index, depth in enumerate(config.depths):
        grids = tuple(_grid(config, index, block, height, width) for block in range(depth))
        result.append(Stage(height, width, grids))
        height, width = -(-height // 2), -(-width // 2)
    return tuple(result)


def _grid(config: SwinConfig, stage: int, block: int, height: int, width: int) -> WindowGrid:
    window = config.trained_window(stage)
    shift = 0 if block % 2 == 0 else config.window_size[stage] // 2
    if config.version == 2:
        # Decided from the configured image, whatever the size at run time, and from its height for both axes.
        configured_rows = config.image_size[0] // config.patch_size[0] >> stage
        return WindowGrid(height, width, window, 0 if configured_rows <= window else shift)
    smaller = min(height, width)
    if smaller < window:
        raise CheckpointError(
            f"Stage {stage} of this Swin V1 has a feature map of {height} x {width} tokens, smaller than its window of "
            f"{window}; its position table cannot be applied (transformers fails here too). Use a larger image, or a "
            f"checkpoint with a smaller window."
        )
    return WindowGrid(height, width, window, 0 if smaller <= window else shift)


def gather(source: Index, target: Index) -> Index | None:
    """[len(target)]: where to fetch each place of `target` from, in a stream that stands in `source` order.

    Both hold row-major positions. Padding places are fetched from place 0: what they hold does not matter, because
    whoever reads padding zeroes it first (see `keep`). None when the stream already stands in that order.
    """
    if np.array_equal(source, target):
        return None
    place = np.zeros(max(int(source.max()), int(target.max())) + 1, dtype=np.int64)
    real = source != PAD
    place[source[real]] = np.flatnonzero(real)
    return np.where(target == PAD, 0, place[target])


def keep(order: Index) -> NDArray[np.float32] | None:
    """[len(order), 1]: 1 for real tokens and 0 for padding; None when there is no padding."""
    if (order != PAD).all():
        return None
    return np.asarray(order != PAD, dtype=np.float32)[:, None]


def merge_order(stage: Stage, target: Index) -> Index:
    """[len(target), 4]: the row-major positions in `stage` of the 2 x 2 neighbours behind each merged token.

    Their order is (row 0, column 0), (row 1, column 0), (row 0, column 1), (row 1, column 1), as in every
    implementation; PAD beyond an odd edge, and for all four of a padding token.
    """
    columns = -(-stage.width // 2)
    row, column = np.divmod(target, columns)

    def neighbours() -> Iterator[Index]:
        for down, right in ((0, 0), (1, 0), (0, 1), (1, 1)):
            r, c = 2 * row + down, 2 * column + right
            inside = (r < stage.height) & (c < stage.width) & (target != PAD)
            yield np.where(inside, r * stage.width + c, PAD)

    return np.stack(list(neighbours()), axis=1)


def relative_position_index(window: int) -> Index:
    """[window^2, window^2]: the row of the relative position table for each query and key."""
    row, column = np.divmod(np.arange(window**2), window)
    down = row[:, None] - row[None, :] + window - 1
    right = column[:, None] - column[None, :] + window - 1
    return np.asarray(down * (2 * window - 1) + right)


def relative_coordinates(window: int, pretrained_window: int) -> NDArray[np.float32]:
    """[(2 * window - 1)^2, 2]: Swin V2's log-spaced coordinates, in float32 like the reference computes them."""
    line = np.arange(-(window - 1), window, dtype=np.float32)
    table = np.stack(np.meshgrid(line, line, indexing="ij"), axis=-1).reshape(-1, 2)
    reach = (pretrained_window if pretrained_window > 0 else window) - 1
    if reach > 0:
        table /= np.float32(reach)
    table *= np.float32(8)
    return np.asarray(np.sign(table) * np.log2(np.abs(table) + 1) / np.log2(8), dtype=np.float32)
