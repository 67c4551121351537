"""The order of tokens in windows, with cyclic shift, padding and masks, as constant index arrays. Pure numpy.

LayerNorm, linear layers and residual additions act on single tokens, so the network keeps its tokens in the window order of
the current block. The reverse, unroll and crop of one block and the pad, roll and partition of the next one then become a
single gather with a constant index, or nothing if the order does not change.

Positions are row-major numbers of the real tokens of a feature map; -1 is a padding token.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from swin_deploy.config import SwinConfig, Window, sides

Index = NDArray[np.int64]
PAD = -1


@dataclass(frozen=True)
class WindowGrid:
    """A feature map, cut into windows after a cyclic shift. Sizes are in tokens, pairs are (height, width).

    `roll_first` rolls the map and then pads it (timm), instead of the other way round (all other frameworks). `tokens_first`
    orders tokens by their place in the window and then by window, instead of window by window.
    """

    height: int
    width: int
    window: tuple[int, int]
    shift: tuple[int, int]
    roll_first: bool = False
    tokens_first: bool = True

    @property
    def padded(self) -> tuple[int, int]:
        """(height, width) after padding right and bottom to whole windows."""
        return -(-self.height // self.window[0]) * self.window[0], -(-self.width // self.window[1]) * self.window[1]

    @property
    def windows(self) -> int:
        rows, columns = self.padded
        return rows * columns // self.tokens_per_window

    @property
    def tokens_per_window(self) -> int:
        return self.window[0] * self.window[1]

    def order(self) -> Index:
        """Return [tokens_per_window * windows]: the row-major position of the token at each place, PAD for padding.

        `tokens_first` gives the windows axis a constant stride, which suits TensorRT. Window by window suits CPU caches.
        """
        tokens = np.arange(self.height * self.width).reshape(self.height, self.width)
        back = (-self.shift[0], -self.shift[1])
        grid = np.full(self.padded, PAD, dtype=np.int64)
        grid[: self.height, : self.width] = np.roll(tokens, back, (0, 1)) if self.roll_first else tokens
        windows = self._partition(grid if self.roll_first else np.roll(grid, back, (0, 1)))
        return np.asarray((windows.T if self.tokens_first else windows).reshape(-1))

    def mask(self, value: float) -> NDArray[np.float32] | None:
        """Return [windows, tokens, tokens]: `value` between tokens that the shift joined, else 0. None without a shift.

        Regions refer to the padded size. Padding tokens are not masked; they are keys in every implementation.
        """
        if self.shift == (0, 0):
            return None
        regions = np.zeros(self.padded, dtype=np.int64)
        for axis, (extent, window, shift) in enumerate(zip(self.padded, self.window, self.shift, strict=True)):
            band = np.zeros(extent, dtype=np.int64)
            band[extent - window : extent - shift] = 1
            band[extent - shift :] = 2 if shift else 1
            regions = regions * 3 + (band[:, None] if axis == 0 else band[None, :])
        region = self._partition(regions)
        return np.asarray(np.where(region[:, :, None] != region[:, None, :], value, 0), dtype=np.float32)

    def _partition(self, grid: Index) -> Index:
        rows, columns = (extent // window for extent, window in zip(grid.shape, self.window, strict=True))
        split = grid.reshape(rows, self.window[0], columns, self.window[1])
        return np.asarray(split.transpose(0, 2, 1, 3).reshape(rows * columns, self.tokens_per_window))


@dataclass(frozen=True)
class StageGrids:
    """The window grids of the blocks of one stage. `height` x `width` is its feature map, in tokens."""

    height: int
    width: int
    grids: tuple[WindowGrid, ...]


def stage_grids(
    config: SwinConfig, image_size: tuple[int, int], backbone: bool = False, tokens_first: bool = True
) -> tuple[StageGrids, ...]:
    """Plan the windows of every stage, for an image of `image_size` (height, width).

    Hugging Face's Swin V1 `backbone` shifts windows even if the map is not larger than one, like `config.always_partition`.
    """
    height, width = config.grid(image_size)
    result = []
    for index, depth in enumerate(config.depths):
        window = config.table_window(index)
        grids = []
        for block in range(depth):
            shift = (0, 0) if block % 2 == 0 else _shift(config, index, (height, width), window, backbone)
            grids.append(WindowGrid(height, width, window, shift, config.framework == "timm", tokens_first))
        result.append(StageGrids(height, width, tuple(grids)))
        height, width = -(-height // 2), -(-width // 2)
    return tuple(result)


def _shift(config: SwinConfig, stage: int, grid: tuple[int, int], window: tuple[int, int], backbone: bool) -> tuple[int, int]:
    """The cyclic shift of an odd block, by the rules of config.framework (from the source of each)."""
    half = sides(config.window_size[stage])[0] // 2, sides(config.window_size[stage])[1] // 2
    if config.always_partition or (backbone and config.framework == "hf" and config.version == 1):
        return half
    if config.framework == "timm":  # each axis by the configured image
        rows, columns = (-(-side // 2**stage) for side in config.grid())
        return (0 if rows <= window[0] else half[0]), (0 if columns <= window[1] else half[1])
    if config.framework == "torchvision":  # each axis by the padded map
        down, right = (-(-side // part) * part for side, part in zip(grid, window, strict=True))
        return (0 if window[0] >= down else half[0]), (0 if window[1] >= right else half[1])
    if config.framework == "hf" and config.version == 2:
        # By the height of the configured image, regardless of the size at run time.
        return (0, 0) if config.image_size[0] // config.patch_size[0] >> stage <= window[0] else half
    # Both axes by the shorter side. If that is shorter than the window, transformers' V1 fails, because its position table
    # stays as large as the window. Here the map is padded to one window, as in V2 and the backbone.
    return (0, 0) if min(grid) <= min(window) else half


def gather_index(source: Index, target: Index) -> Index | None:
    """Return [len(target)]: the index that gathers tokens from `source` order into `target` order.

    Both hold row-major positions. Padding is gathered from place 0; its value does not matter, because it is zeroed before
    use (see `padding_mask`). None if both orders are equal.
    """
    if np.array_equal(source, target):
        return None
    place = np.zeros(max(int(source.max()), int(target.max())) + 1, dtype=np.int64)
    real = source != PAD
    place[source[real]] = np.flatnonzero(real)
    return np.where(target == PAD, 0, place[target])


def padding_mask(order: Index) -> NDArray[np.float32] | None:
    """Return [len(order), 1, 1]: 1 for real tokens and 0 for padding. None without padding."""
    if (order != PAD).all():
        return None
    return np.asarray(order != PAD, dtype=np.float32)[:, None, None]


def merge_order(stage: StageGrids, target: Index) -> Index:
    """Return [len(target), 4]: the row-major positions in `stage` of the 2 x 2 neighbours that become each merged token.

    Their order is (row 0, column 0), (row 1, column 0), (row 0, column 1), (row 1, column 1), as in every implementation.
    PAD beyond an odd edge, and for all four of a padding token.
    """
    columns = -(-stage.width // 2)
    row, column = np.divmod(target, columns)
    down, right = np.array([(0, 0), (1, 0), (0, 1), (1, 1)]).T
    r, c = 2 * row[:, None] + down, 2 * column[:, None] + right
    inside = (r < stage.height) & (c < stage.width) & (target != PAD)[:, None]
    return np.where(inside, r * stage.width + c, PAD)


def relative_position_index(window: tuple[int, int]) -> Index:
    """Return [tokens, tokens]: the row of the relative position table for each query and key of a window."""
    row, column = np.divmod(np.arange(window[0] * window[1]), window[1])
    down = row[:, None] - row[None, :] + window[0] - 1
    right = column[:, None] - column[None, :] + window[1] - 1
    return np.asarray(down * (2 * window[1] - 1) + right)


def relative_coordinates(window: tuple[int, int], pretrained_window: Window) -> NDArray[np.float32]:
    """Return [(2 * height - 1) * (2 * width - 1), 2]: Swin V2's log-spaced coordinates, computed in float32 as elsewhere."""
    lines = [np.arange(-(side - 1), side, dtype=np.float32) for side in window]
    table = np.stack(np.meshgrid(*lines, indexing="ij"), axis=-1).reshape(-1, 2)
    trained = sides(pretrained_window)
    for axis, side in enumerate(trained if trained[0] > 0 else window):
        reach = side - 1
        if reach > 0:
            table[:, axis] /= np.float32(reach)
    table *= np.float32(8)
    return np.asarray(np.sign(table) * np.log2(np.abs(table) + 1) / np.log2(8), dtype=np.float32)
