"""Resizes position tables and embeddings for other window or image sizes, by the rules of the source framework."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from swin_deploy.config import SwinConfig, Window, window_text
from swin_deploy.errors import UsageError
from swin_deploy.models.blocks import position_embeddings
from swin_deploy.models.parameters import POSITIONS, LazyTensors
from swin_deploy.options import Size

from .base import Checkpoint

TABLE = re.compile(r"encoder\.layers\.(\d+)\.blocks\.\d+\.attention\.self\.relative_position_bias_table")

# How each framework resizes a Swin V1 position table (timm's layers/pos_embed_rel.py; Microsoft's utils.py).
V1_RULES = {
    "timm": "linearly between geometrically spaced offsets, as in timm",
    "microsoft": "by bicubic interpolation, as in Microsoft's code",
    "hf": "by bicubic interpolation, as in Microsoft's code; transformers has no rule of its own",
    "torchvision": "by bicubic interpolation, as in Microsoft's code; torchvision has no rule of its own",
}


def resize_windows(
    checkpoint: Checkpoint,
    *,
    window_size: tuple[Window, ...] | None = None,
    pretrained_window_sizes: tuple[Window, ...] | None = None,
    image_size: tuple[int, int] | None = None,
) -> Checkpoint:
    """Adapt a checkpoint to other windows and another image size.

    Position tables of V1 and absolute position embeddings are interpolated. The position bias of V2 is computed for the new
    window. The notes of the result say what was changed, and by whose rule. `window_size` is one window, or one per stage, in
    tokens, like `pretrained_window_sizes` (V2 only; 0 scales coordinates by the new window). `image_size` is (height, width).
    """
    old = checkpoint.config
    if pretrained_window_sizes is not None and old.version == 1:
        raise UsageError("This checkpoint is a Swin V1, and only Swin V2 has pretrained window sizes. Omit the option.")
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
        return tensor if match is None else _resized_table(tensor, *windows[int(match[1])], old.framework)

    before, after, raw = old.to_dict(), new.to_dict(), checkpoint.raw_config
    changed = {key: value for key, value in after.items() if before.get(key) != value}
    gone = before.keys() - after.keys()  # the classes of transformers, if they cannot build the new network
    return dataclasses.replace(
        checkpoint,
        config=new,
        tensors=LazyTensors(checkpoint.tensors, read),
        raw_config=None if raw is None else {key: raw[key] for key in raw if key not in gone} | changed,
        image_size=None if new.image_size == old.image_size else new.image_size,
        notes=(*checkpoint.notes, *_notes(old, new, windows, positions)),
    )


def _per_stage(values: tuple[Window, ...] | None, config: SwinConfig, what: str) -> tuple[Window, ...] | None:
    if values is None:
        return None
    stages = len(config.depths)
    if len(values) not in (1, stages):
        raise UsageError(f"{len(values)} {what} were given for {stages} stages. Pass one, or one per stage.")
    return values * stages if len(values) == 1 else values


def _resized_table(table: Tensor, old: Size, new: Size, framework: str) -> Tensor:
    """[(2 * height - 1) * (2 * width - 1), heads] for the `new` window."""
    if old == new:
        return table
    shape, wanted = (tuple(2 * side - 1 for side in window) for window in (old, new))
    square = table.reshape(*shape, -1)
    if framework == "timm":
        for axis in (0, 1):
            square = _along(square, axis, _geometric_offsets(old[axis], new[axis]), new[axis])
        return square.reshape(math.prod(wanted), -1)
    resized = F.interpolate(square.permute(2, 0, 1)[None], size=wanted, mode="bicubic", align_corners=False)
    return resized[0].permute(1, 2, 0).reshape(math.prod(wanted), -1)


def _geometric_offsets(old: int, new: int) -> NDArray[np.float64]:
    """[2 * old - 1]: the offsets of the old window, spread so that they reach as far as those of the new one.

    The distances grow by a constant ratio, which timm (after BEiT) finds by bisection between 1.01 and 1.5.
    """
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        ratio = (low + high) / 2
        low, high = (low, ratio) if (1 - ratio ** (old - 1)) / (1 - ratio) > new - 1 else (ratio, high)
    steps = np.cumsum([ratio**i for i in range(old - 1)])
    return np.concatenate([-steps[::-1], [0.0], steps])


def _along(values: Tensor, axis: int, offsets: NDArray[np.float64], window: int) -> Tensor:
    """Interpolate linearly along `axis`, from `offsets` to those of `window`; constant beyond the last."""
    wanted = np.arange(-(window - 1), window, dtype=np.float64)
    lines = np.moveaxis(values.numpy(), axis, -1)
    result = np.apply_along_axis(lambda line: np.interp(wanted, offsets, line), -1, lines)
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(result, -1, axis), dtype=np.float32))


def _notes(old: SwinConfig, new: SwinConfig, windows: list[tuple[Size, Size]], positions: bool) -> tuple[str, ...]:
    notes = []
    if any(before != after for before, after in windows):
        change = f"from {_listed([before for before, _ in windows])} to {_listed([after for _, after in windows])}"
        if old.version == 1:
            notes.append(f"the position tables were resized {change}, {V1_RULES[old.framework]}")
        else:
            notes.append(f"the position bias was computed for new windows, {change}")
    if new.version == 2 and (notes or new.pretrained_window_sizes != old.pretrained_window_sizes):
        kept = any(new.pretrained_window_sizes)
        by = f"the pretrained {list(new.pretrained_window_sizes)}" if kept else "the new windows, as in every framework"
        given = ",".join(window_text(before) for before, _ in windows)
        hint = "" if kept else f"; --pretrained-window-sizes {given} keeps each offset's bias"
        notes.append(f"its coordinates are divided by {by}{hint}")
    if positions:
        was, now = ("x".join(map(str, config.grid())) for config in (old, new))
        notes.append(f"the position embeddings were resized from {was} to {now} patches, by bicubic interpolation")
    return tuple(notes)


def _listed(windows: Sequence[Window]) -> str:
    """ "window 8" if all stages have it, else "windows 16, 16, 16, 8"."""
    names = [window_text(window) for window in windows]
    return f"window {names[0]}" if len(set(names)) == 1 else f"windows {', '.join(names)}"
