"""with_windows: the same weights for other windows, resized as the system that the checkpoint comes from does it."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from swin_deploy.config import SwinConfig
from swin_deploy.errors import UsageError
from swin_deploy.models.blocks import position_embeddings
from swin_deploy.models.checkpoints.base import Checkpoint, LazyTensors
from swin_deploy.models.parameters import POSITIONS

Window = tuple[int, int]

TABLE = re.compile(r"encoder\.layers\.(\d+)\.blocks\.\d+\.attention\.self\.relative_position_bias_table")

# How each system makes a Swin V1 position table for another window (timm's layers/pos_embed_rel.py; Microsoft's utils.py).
V1_RULES = {
    "timm": "linearly between geometrically spaced offsets, as timm does it",
    "microsoft": "by bicubic interpolation, as Microsoft's code does it",
    "hf": "by bicubic interpolation, as Microsoft's code does it; transformers has no rule of its own",
    "torchvision": "by bicubic interpolation, as Microsoft's code does it; torchvision has no rule of its own",
}


def with_windows(
    checkpoint: Checkpoint,
    *,
    window_size: tuple[int, ...] | None = None,
    pretrained_window_sizes: tuple[int, ...] | None = None,
    image_size: tuple[int, int] | None = None,
) -> Checkpoint:
    """`checkpoint` for a network that is built with these windows (one, or one for each stage) and this image size.

    V1's position tables are interpolated, V2's position bias is computed anew, and so are absolute position embeddings for
    another grid of patches. What was changed, and by whose rule, is in the notes of what is returned, and the checkpoint
    itself is returned when nothing changes. Raises UsageError for a number of windows that is not the number of stages.
    """
    old = checkpoint.config
    if pretrained_window_sizes is not None and old.version == 1:
        raise UsageError("Pretrained window sizes are Swin V2's; this checkpoint is a Swin V1. Leave them out.")
    new = dataclasses.replace(
        old,
        window_size=_per_stage(window_size, old, "window sizes") or old.window_size,
        pretrained_window_sizes=_per_stage(pretrained_window_sizes, old, "pretrained window sizes")
        or old.pretrained_window_sizes,
        image_size=image_size or old.image_size,
    )
    if new == old:
        return checkpoint
    stages = range(len(old.depths))
    windows = [(old.table_window(stage), new.table_window(stage)) for stage in stages]
    positions = old.use_absolute_embeddings and old.grid() != new.grid()

    def read(name: str) -> Tensor:
        if positions and name == POSITIONS:
            resized = position_embeddings(old, new.grid(), checkpoint.tensors)
            assert resized is not None
            return resized
        match = TABLE.fullmatch(name)
        tensor = checkpoint.tensors[name]
        return tensor if match is None else _resized_table(tensor, *windows[int(match[1])], old.semantics)

    return dataclasses.replace(
        checkpoint,
        config=new,
        tensors=LazyTensors(checkpoint.tensors, read),
        raw_config=None if checkpoint.raw_config is None else {**checkpoint.raw_config, **_changed_fields(old, new)},
        preprocessor=_preprocessor(checkpoint.preprocessor, None if new.image_size == old.image_size else new.image_size),
        notes=(*checkpoint.notes, *_notes(old, new, windows, positions)),
    )


def _per_stage(values: tuple[int, ...] | None, config: SwinConfig, what: str) -> tuple[int, ...] | None:
    if values is None:
        return None
    stages = len(config.depths)
    if len(values) not in (1, stages):
        raise UsageError(f"{len(values)} {what} were given for {stages} stages. Give one, or one for each stage.")
    return values * stages if len(values) == 1 else values


def _resized_table(table: Tensor, old: Window, new: Window, semantics: str) -> Tensor:
    """[(2 * height - 1) * (2 * width - 1), heads] for the `new` window."""
    if old == new:
        return table
    shape, wanted = (tuple(2 * side - 1 for side in window) for window in (old, new))
    square = table.reshape(*shape, -1)
    if semantics == "timm":
        for axis in (0, 1):
            square = _along(square, axis, _geometric_offsets(old[axis], new[axis]), new[axis])
        return square.reshape(math.prod(wanted), -1)
    resized = F.interpolate(square.permute(2, 0, 1)[None], size=wanted, mode="bicubic", align_corners=False)
    return resized[0].permute(1, 2, 0).reshape(math.prod(wanted), -1)


def _geometric_offsets(old: int, new: int) -> NDArray[np.float64]:
    """[2 * old - 1]: where the offsets of the old window are put, so that they reach as far as those of the new one.

    The steps between them grow by a constant ratio, which timm (after BEiT) finds by halving the interval from 1.01 to 1.5.
    """
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        ratio = (low + high) / 2
        if (1 - ratio ** (old - 1)) / (1 - ratio) > new - 1:
            high = ratio
        else:
            low = ratio
    steps = np.cumsum([ratio**i for i in range(old - 1)])
    return np.concatenate([-steps[::-1], [0.0], steps])


def _along(values: Tensor, axis: int, offsets: NDArray[np.float64], window: int) -> Tensor:
    """`values` interpolated linearly along `axis`, from `offsets` to those of `window`; constant beyond the last."""
    wanted = np.arange(-(window - 1), window, dtype=np.float64)
    lines = np.moveaxis(values.numpy(), axis, -1)
    result = np.apply_along_axis(lambda line: np.interp(wanted, offsets, line), -1, lines)
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(result, -1, axis), dtype=np.float32))


def _changed_fields(old: SwinConfig, new: SwinConfig) -> dict[str, Any]:
    before, after = old.to_dict(), new.to_dict()
    return {key: value for key, value in after.items() if before.get(key) != value}


def _preprocessor(raw: Mapping[str, Any] | None, size: tuple[int, int] | None) -> Mapping[str, Any] | None:
    """preprocessor_config.json for images of `size`; None leaves it as it is."""
    if raw is None or size is None:
        return raw
    sides = {"height": size[0], "width": size[1]}
    return {**raw, "size": sides, **({"crop_size": sides} if raw.get("do_center_crop") else {})}


def _notes(old: SwinConfig, new: SwinConfig, windows: list[tuple[Window, Window]], positions: bool) -> tuple[str, ...]:
    notes = []
    if any(before != after for before, after in windows):
        change = f"from {_listed([before for before, _ in windows])} to {_listed([after for _, after in windows])}"
        if old.version == 1:
            notes.append(f"the position tables were resized {change}, {V1_RULES[old.semantics]}")
        else:
            notes.append(f"the position bias was computed anew, {change}")
    if new.version == 2 and (notes or new.pretrained_window_sizes != old.pretrained_window_sizes):
        kept = any(new.pretrained_window_sizes)
        by = f"the pretrained {list(new.pretrained_window_sizes)}" if kept else "the new windows, as every system does"
        hint = "" if kept else f"; --pretrained-window-sizes {','.join(str(w[0][0]) for w in windows)} keeps each offset's bias"
        notes.append(f"its coordinates are divided by {by}{hint}")
    if positions:
        was, now = ("x".join(map(str, config.grid())) for config in (old, new))
        notes.append(f"the position embeddings were resized from {was} to {now} patches, by bicubic interpolation")
    return tuple(notes)


def _listed(windows: list[Window]) -> str:
    """ "window 8" where all stages have it, else "windows 16, 16, 16, 8"."""
    names = [str(rows) if rows == columns else f"{rows}x{columns}" for rows, columns in windows]
    return f"window {names[0]}" if len(set(names)) == 1 else f"windows {', '.join(names)}"
