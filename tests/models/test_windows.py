"""Every index array against roll, pad and view in torch, and against the functions of transformers that it replaces."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from swin_deploy.config import SwinConfig
from swin_deploy.errors import UsageError
from swin_deploy.models import windows
from swin_deploy.models.windows import PAD, StageGrids, WindowGrid
from swin_deploy.options import FRAMEWORKS

# height, width, window, shift: whole windows, padding on one side, on both, one window, wide and tall
GRIDS = [
    (8, 8, 4, 0), (8, 8, 4, 2), (14, 14, 7, 3), (7, 7, 7, 0), (12, 20, 4, 2), (9, 8, 4, 2), (8, 10, 4, 2), (13, 6, 5, 2),
    (5, 17, 3, 1), (1, 1, 3, 0), (3, 2, 7, 3), (6, 6, 1, 0), (30, 30, 24, 12),
]  # fmt: skip


def partition(tokens: Any, height: int, width: int) -> Any:
    """[1, rows, columns, channels] -> [windows, height * width, channels], as the paper's code writes it."""
    _, rows, columns, channels = tokens.shape
    split = tokens.view(rows // height, height, columns // width, width, channels)
    return split.permute(0, 2, 1, 3, 4).reshape(-1, height * width, channels)


def square(height: int, width: int, window: int, shift: int) -> WindowGrid:
    return WindowGrid(height, width, (window, window), (shift, shift))


def numbered(height: int, width: int) -> Any:
    """[1, height, width, 1], numbered row by row from 1, to distinguish tokens from zero padding."""
    return torch.arange(1, height * width + 1).reshape(1, height, width, 1)


SHIFTS = [((4, 4), (2, 2)), ((4, 3), (2, 1)), ((4, 3), (0, 1)), ((5, 2), (2, 0))]
TWO_SIDES = [(*size, *sides) for size in ((9, 8), (13, 17), (8, 8), (3, 5)) for sides in SHIFTS]


@pytest.mark.parametrize("roll_first", [False, True])
@pytest.mark.parametrize(
    ("height", "width", "window", "shift"), [*((h, w, (side, side), (by, by)) for h, w, side, by in GRIDS), *TWO_SIDES]
)
def test_order_is_pad_roll_partition(
    height: int, width: int, window: tuple[int, int], shift: tuple[int, int], roll_first: bool
) -> None:
    """timm rolls the map before it pads it. Every other framework pads first."""
    grid = WindowGrid(height, width, window, shift, roll_first=roll_first)
    tokens, back = numbered(height, width), (-shift[0], -shift[1])
    missing = (0, 0, 0, -width % window[1], 0, -height % window[0])
    if roll_first:
        tokens = torch.nn.functional.pad(torch.roll(tokens, back, (1, 2)), missing)
    else:
        tokens = torch.roll(torch.nn.functional.pad(tokens, missing), back, (1, 2))
    expected = partition(tokens, *window) - 1
    assert grid.padded == tuple(tokens.shape[1:3])
    assert (grid.windows, grid.tokens_per_window) == tuple(expected.shape[:2])
    assert grid.order().tolist() == expected.permute(2, 1, 0).flatten().tolist()  # token by token, not window by window


@pytest.mark.parametrize("version", ["swin", "swinv2"])
@pytest.mark.parametrize(("height", "width", "window", "shift"), GRIDS)
def test_mask_is_that_of_transformers(version: str, height: int, width: int, window: int, shift: int) -> None:
    modeling = pytest.importorskip(f"transformers.models.{version}.modeling_{version}", reason="transformers is the reference")
    layer = getattr(modeling, {"swin": "SwinLayer", "swinv2": "Swinv2Layer"}[version])
    grid = square(height, width, window, shift)
    if not hasattr(layer, "get_attn_mask"):
        pytest.skip("transformers' own mask: this release builds it under another name")
    state = SimpleNamespace(window_size=window, shift_size=shift)
    expected = layer.get_attn_mask(state, *grid.padded, torch.float32, torch.device("cpu"))
    found = grid.mask(-100.0)
    if expected is None:
        assert found is None
    else:
        assert found is not None
        assert found.dtype == np.float32
        assert np.array_equal(found, expected.numpy())


@pytest.mark.parametrize(("height", "width"), [(8, 8), (7, 7), (7, 10), (10, 7), (1, 1), (2, 1), (15, 15)])
@pytest.mark.parametrize(("window", "shift"), [(4, 0), (4, 2), (3, 1)])
def test_merge_order_is_pad_slice_concatenate(height: int, width: int, window: int, shift: int) -> None:
    tokens = torch.nn.functional.pad(numbered(height, width), (0, 0, 0, width % 2, 0, height % 2))
    four = [tokens[:, row::2, column::2] for row, column in ((0, 0), (1, 0), (0, 1), (1, 1))]
    merged = torch.cat(four, -1)
    rows, columns = merged.shape[1:3]
    padded = torch.nn.functional.pad(merged, (0, 0, 0, -columns % window, 0, -rows % window))
    expected = partition(torch.roll(padded, (-shift, -shift), (1, 2)), window, window).transpose(0, 1).reshape(-1, 4) - 1
    target = square(rows, columns, window, shift).order()
    assert windows.merge_order(StageGrids(height, width, ()), target).tolist() == expected.tolist()


@pytest.mark.parametrize("window", [1, 2, 3, 7, 8, 12])
def test_relative_position_index_is_that_of_transformers(window: int) -> None:
    modeling = pytest.importorskip("transformers.models.swinv2.modeling_swinv2", reason="transformers is the reference")
    _, expected = modeling.Swinv2SelfAttention.create_coords_table_and_index(attention(window, 0))
    assert np.array_equal(windows.relative_position_index((window, window)), expected.numpy())


@pytest.mark.parametrize(
    ("window", "pretrained"), [(1, 0), (2, 0), (7, 0), (8, 0), (24, 12), (8, 12), (12, 6), (1, 6), (16, 0)]
)
def test_relative_coordinates_are_those_of_transformers(window: int, pretrained: int) -> None:
    modeling = pytest.importorskip("transformers.models.swinv2.modeling_swinv2", reason="transformers is the reference")
    expected, _ = modeling.Swinv2SelfAttention.create_coords_table_and_index(attention(window, pretrained))
    found = windows.relative_coordinates((window, window), pretrained)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected.numpy().reshape(-1, 2), rtol=3e-7, atol=0)


def attention(window: int, pretrained: int) -> SimpleNamespace:
    """The attributes of transformers' attention that its method reads."""
    return SimpleNamespace(
        window_size=(window, window),
        pretrained_window_size=(pretrained, pretrained),
        continuous_position_bias_mlp=torch.nn.Linear(2, 1),
    )


@pytest.mark.parametrize(("source", "target"), [(a, b) for a in GRIDS[:6] for b in GRIDS[:6] if a[:2] == b[:2]])
def test_gather_fetches_every_real_token(source: tuple[int, int, int, int], target: tuple[int, int, int, int]) -> None:
    before, after = square(*source).order(), square(*target).order()
    index = windows.gather_index(before, after)
    if index is None:
        assert np.array_equal(before, after)
        return
    real = after != PAD
    assert np.array_equal(before[index][real], after[real])
    assert index.min() >= 0
    assert index.max() < len(before)


def test_gather_and_keep_are_none_where_nothing_moves_or_is_padded() -> None:
    order = square(8, 8, 4, 2).order()
    assert windows.gather_index(order, order.copy()) is None
    assert windows.gather_index(np.arange(64), square(8, 8, 8, 0).order()) is None  # one window
    assert windows.padding_mask(order) is None


def test_keep_marks_padding() -> None:
    order = square(3, 5, 4, 0).order()
    keep = windows.padding_mask(order)
    assert keep is not None
    assert keep.shape == (len(order), 1, 1)
    assert keep.sum() == 15
    assert np.array_equal(keep.ravel() == 0, order == PAD)


def config(version: int, **fields: Any) -> SwinConfig:
    stages = len(fields.get("depths", (2, 2)))
    given = {"embed_dim": 8, "depths": (2, 2), "num_heads": (1,) * stages, "window_size": (4,) * stages, **fields}
    return SwinConfig(version=version, pretrained_window_sizes=(0,) * stages, **given)


def test_v1_shift_is_dropped_where_the_shorter_side_is_one_window_and_smaller_maps_are_padded() -> None:
    first, second = windows.stage_grids(config(1, image_size=(32, 64)), (32, 64))
    assert [grid.shift for grid in first.grids] == [(0, 0), (2, 2)]
    assert (second.height, second.width) == (4, 8)
    assert [(grid.window, grid.shift) for grid in second.grids] == [((4, 4), (0, 0))] * 2
    # transformers fails below the window, because its position table stays as large as that.
    _, second = windows.stage_grids(config(1, image_size=(64, 64)), (24, 64))
    assert (second.height, second.width) == (3, 8)
    assert [(grid.window, grid.shift, grid.padded) for grid in second.grids] == [((4, 4), (0, 0), (4, 8))] * 2


def test_v2_window_and_shift_come_from_the_configured_height() -> None:
    asked = config(2, image_size=(32, 64), window_size=(6, 6))
    for size in ((32, 64), (16, 16), (80, 80)):
        first, second = windows.stage_grids(asked, size)
        assert [(grid.window, grid.shift) for grid in first.grids] == [((6, 6), (0, 0)), ((6, 6), (3, 3))]
        assert [(grid.window, grid.shift) for grid in second.grids] == [((4, 4), (0, 0))] * 2


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("version", [1, 2])
def test_always_partition_keeps_windows_and_shifts_in_every_framework(version: int, framework: str) -> None:
    asked = config(version, image_size=(12, 64), framework=framework, always_partition=True)
    for stage in windows.stage_grids(asked, (12, 64)):
        assert [(grid.window, grid.shift) for grid in stage.grids] == [((4, 4), (0, 0)), ((4, 4), (2, 2))]
    assert SwinConfig.from_dict(asked.to_dict()).always_partition


def test_odd_maps_grow_when_they_are_halved() -> None:
    found = windows.stage_grids(config(1, depths=(1, 1, 1), image_size=(52, 44), window_size=(2, 2, 2)), (52, 44))
    assert [(stage.height, stage.width) for stage in found] == [(13, 11), (7, 6), (4, 3)]


def test_an_image_smaller_than_a_patch_is_nothing_to_torchvision() -> None:
    with pytest.raises(UsageError, match=r"1x64 pixels is smaller than a patch of \(4, 4\)"):
        SwinConfig(version=1, framework="torchvision").grid((1, 64))
    assert SwinConfig(version=1).grid((1, 64)) == (1, 16)
