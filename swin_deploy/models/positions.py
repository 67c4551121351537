"""Absolute position embeddings, for the grid that the network is made for."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

from swin_deploy.config import SwinConfig
from swin_deploy.models.blocks import Tensors
from swin_deploy.models.parameters import POSITIONS


def position_embeddings(config: SwinConfig, grid: tuple[int, int], tensors: Tensors) -> Tensor | None:
    """[1, rows * columns, embed_dim], to be added to the embedded patches; None when the config has none.

    A table of another grid is interpolated as transformers does it (bicubic, align_corners False). Tables that
    transformers wrote in version 4, and V2's in every version, have one row too many, with which its own forward fails at
    the configured size; its interpolation takes that first row for a class token, which Swin does not have, and so it is
    left out here. An image that has exactly as many patches as the table has rows takes it as it is.
    """
    if not config.use_absolute_embeddings:
        return None
    table = tensors[POSITIONS]
    wanted = grid[0] * grid[1]
    if table.shape[1] == wanted and grid != config.grid() and table.shape[1] == math.prod(config.grid()) + 1:
        return table
    if table.shape[1] == math.prod(config.grid()) + 1:
        table = table[:, 1:]
    rows, columns = config.grid()
    if grid == (rows, columns):
        return table
    square = table.reshape(1, rows, columns, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(square, size=grid, mode="bicubic", align_corners=False)
    return resized.permute(0, 2, 3, 1).reshape(1, wanted, -1)
