"""Infers SwinConfig from tensors, for frameworks that save no config beside them: Microsoft's code and torchvision.

Most of it follows from shapes. Window and image sizes follow from buffers: relative_position_index and relative_coords_table
have the size of the window, and attn_mask has one row per window and masks the pairs that the cyclic shift joined.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from swin_deploy.config import MOST_STAGES, SwinConfig, Window, sides, window_from
from swin_deploy.errors import CheckpointError
from swin_deploy.models.parameters import Shape
from swin_deploy.tasks import stage_names

from .base import DAMAGED, Stored
from .state_dict_names import CanonicalStateDict

Size = tuple[int, int]

PROJECTION = "embeddings.patch_embeddings.projection.weight"
LARGEST_BUFFER = 1 << 25  # numbers in attn_mask or relative_position_index; Swin V2-L for 384 pixels has 5 million
DEFAULT_SIZE = {1: (224, 224), 2: (256, 256)}  # of the published checkpoints


def infer_config(
    state_dict: CanonicalStateDict, image_size: Size | None, extras: Mapping[str, Any], where: str
) -> tuple[SwinConfig, tuple[str, ...]]:
    """Infer the architecture from a state dict, with notes on what had to be assumed.

    `image_size` (height, width) is used if the file does not determine it.
    """
    inference = _Inference(state_dict, extras, where)
    config, notes = inference.config(image_size)
    if state_dict.parent is not None and state_dict.parent.name == "Donut":
        config = replace(config, final_norm="layernorm.weight" in state_dict.shapes)
    if state_dict.features_only:
        config = replace(config, out_features=stage_names(config)[1:])
    return config, notes + inference.notes_on_shifts(config.always_partition)


class _Inference:
    def __init__(self, state_dict: CanonicalStateDict, extras: Mapping[str, Any], where: str) -> None:
        self.shapes, self.buffers = state_dict.shapes, state_dict.buffers
        self.writer, self.where = state_dict.writer, where
        self.extras = extras
        self.version = 2 if any(name.endswith(".logit_scale") for name in self.shapes) else 1
        self.depths = self._depths()
        norms = {name.split(".")[1] for name in self.shapes if name.startswith("hidden_states_norms.")}
        self.norms = tuple(sorted(norms)) if self.writer != "openmmlab" or len(norms) > 1 else ()  # of feature maps

    def config(self, image_size: Size | None) -> tuple[SwinConfig, tuple[str, ...]]:
        embed_dim, channels, *patch = self._shape(PROJECTION, 4)
        stages = range(len(self.depths))
        windows = tuple(self._window(stage) for stage in stages)
        size, notes = self._image_size((patch[0], patch[1]), windows, image_size)
        config = SwinConfig(
            version=self.version,
            image_size=size,
            patch_size=(patch[0], patch[1]),
            num_channels=channels,
            embed_dim=embed_dim,
            depths=self.depths,
            num_heads=tuple(self._heads(stage) for stage in stages),
            window_size=windows,
            mlp_ratio=self._mlp_ratio(),
            qkv_bias="encoder.layers.0.blocks.0.attention.self.query.bias" in self.shapes,
            use_absolute_embeddings="embeddings.position_embeddings" in self.shapes,
            encoder_stride=self._encoder_stride(channels),
            pretrained_window_sizes=tuple(self._pretrained_window(stage, windows[stage]) for stage in stages)
            if self.version == 2
            else SwinConfig.pretrained_window_sizes,
            always_partition=self._always_partition((patch[0], patch[1]), windows),
            out_features=self.norms,
            map_norms=True if self.norms and self.version == 2 else None,
            id2label={i: f"LABEL_{i}" for i in range(self._labels())},
        )
        return config, notes

    def _shape(self, name: str, axes: int) -> Shape:
        shape = self.shapes.get(name)
        if shape is None:
            raise CheckpointError(
                f"{self.where} lacks {name}, which determines the architecture. It is another network, or damaged."
            )
        if len(shape) != axes or not all(shape):
            raise CheckpointError(f"{self.where}: {name} has shape {list(shape)}; expected {axes} sizes, none of them 0.")
        return shape

    def _labels(self) -> int:
        last = max((name for name in self.shapes if re.fullmatch(r"classifier(\.\d)?\.weight", name)), default="")
        return (*self.shapes.get(last, ()), 0)[0]

    def _always_partition(self, patch: Size, windows: tuple[Window, ...]) -> bool:
        """Return whether the file follows the code of detectors, which computes its masks for each image.

        Microsoft's classifier saves an attn_mask for each map that is larger than the window, and reduces the window on others.
        """
        if self.writer == "openmmlab":
            return "layernorm.weight" not in self.shapes  # mmpretrain has it
        if self.writer != "microsoft" or any(name.endswith(".attn_mask") for name in self.buffers):
            return False
        shifting = [stage for stage, depth in enumerate(self.depths) if depth > 1]
        saved = bool(shifting) and self._buffer(0, "relative_position_index") is not None
        return bool(self.norms) or (saved and self._side_without_masks(patch, windows) is None)

    def notes_on_shifts(self, always: bool) -> tuple[str, ...]:
        """Return a note on when windows are shifted, if Microsoft's code has several rules for it and no mask shows which."""
        if self.writer == "openmmlab":
            kind = "every size, as in mmdetection and mmsegmentation" if always else "more than one window, as in mmpretrain"
            return (f"windows are shifted on maps of {kind}",)
        if self.writer != "microsoft" or any(name.endswith(".attn_mask") for name in self.buffers):
            return ()
        if always:
            return ("windows are shifted on maps of every size, as in detectors: the file has no attn_mask",)
        if self.buffers:
            return ()
        return ("the file has no buffers, so the shifts of Microsoft's classifier are assumed; detectors: --always-partition",)

    def _depths(self) -> tuple[int, ...]:
        blocks: dict[int, set[int]] = {}
        for name in self.shapes:
            if match := re.match(r"encoder\.layers\.(\d{1,4})\.blocks\.(\d{1,4})\.", name):
                blocks.setdefault(int(match[1]), set()).add(int(match[2]))
        depths = tuple(len(blocks.get(stage, ())) for stage in range(len(blocks)))
        for stage, depth in enumerate(depths):
            if not depth or blocks[stage] != set(range(depth)):
                raise CheckpointError(
                    f"{self.where} lacks a stage or a block before the last one. It is damaged; fetch it again."
                )
        if not 0 < len(depths) <= MOST_STAGES:
            raise CheckpointError(
                f"{self.where} holds {len(depths)} stages of Swin blocks. Expected a checkpoint of Swin V1 or V2, with at most "
                f"{MOST_STAGES} stages."
            )
        return depths

    def _attention(self, stage: int, name: str, axes: int) -> Shape:
        return self._shape(f"encoder.layers.{stage}.blocks.0.attention.self.{name}", axes)

    def _heads(self, stage: int) -> int:
        if self.version == 1:
            return self._attention(stage, "relative_position_bias_table", 2)[1]
        return self._attention(stage, "logit_scale", 3)[0]

    def _buffer(self, stage: int, name: str) -> Stored | None:
        found = self.buffers.get(f"encoder.layers.{stage}.blocks.0.{name}")
        return None if found is None else self._readable(name, found)

    def _readable(self, name: str, buffer: Stored) -> Stored:
        """Refuse a buffer that no Swin has before it is read: it may have the size of the whole file."""
        if not 0 < math.prod(buffer.shape) <= LARGEST_BUFFER or not re.fullmatch(r"b?float\d+|u?int\d+", buffer.dtype):
            raise CheckpointError(
                f"{self.where}: {name} has shape {list(buffer.shape)} and type {buffer.dtype}, as in no Swin."
            )
        return buffer

    def _window(self, stage: int) -> Window:
        """The window: the table has (2 * height - 1) * (2 * width - 1) rows, and the index (height * width) ** 2 numbers.

        The first row of the index counts down, and skips numbers where the next row of the window starts.
        """
        index, coordinates = self._buffer(stage, "relative_position_index"), self._buffer(stage, "relative_coords_table")
        rows = self._attention(stage, "relative_position_bias_table", 2)[0] if self.version == 1 else 0
        if self.version == 2 and coordinates is not None and len(coordinates.shape) == 4:
            height, width = (coordinates.shape[1] + 1) // 2, (coordinates.shape[2] + 1) // 2
            fits = coordinates.shape == (1, 2 * height - 1, 2 * width - 1, 2)
        elif index is not None:
            tokens = math.isqrt(math.prod(index.shape))
            height = width = math.isqrt(tokens)
            if width**2 != tokens or (rows and rows != (2 * width - 1) ** 2):
                first = index.read().reshape(-1)[:tokens]
                width = int((first != first[:1] - torch.arange(tokens)).to(torch.uint8).argmax()) or tokens
                height = tokens // width
            fits = (height * width) ** 2 == math.prod(index.shape) and rows in (0, (2 * height - 1) * (2 * width - 1))
            fits = fits and (width < tokens or tokens == 1)  # windows of one row and of one column have the same index
        elif self.version == 1:
            height = width = (math.isqrt(rows) + 1) // 2
            fits = (2 * width - 1) ** 2 == rows
        else:
            raise CheckpointError(
                f"The window size of {self.where} is unknown: the weights of Swin V2 do not depend on it, and the file has no "
                f"buffers. Pass the folder with config.json, or a file with buffers."
            )
        if not fits:
            raise CheckpointError(
                f"{self.where}: the position table of stage {stage} is not that of a square window, and no "
                f"relative_position_index shows its height and width. Pass a folder with config.json, or a file with this "
                f"buffer."
            )
        return window_from((height, width))

    def _mlp_ratio(self) -> float:
        """The ratio of hidden to stage width. Hidden widths are truncated to integers, so the last stage is most precise."""
        width = self._shape(PROJECTION, 4)[0]
        hidden = [self._shape(f"encoder.layers.{i}.blocks.0.intermediate.dense.weight", 2)[0] for i in range(len(self.depths))]
        ratio = hidden[-1] / (width << len(hidden) - 1)
        if [int(ratio * (width << stage)) for stage in range(len(hidden))] != hidden:
            raise CheckpointError(
                f"{self.where}: the MLPs have widths {hidden}. Expected one multiple of the widths of their stages."
            )
        return ratio

    def _encoder_stride(self, channels: int) -> int:
        rows = (*self.shapes.get("decoder.0.weight", ()), 0)[0]
        stride = math.isqrt(rows // channels)
        if stride**2 * channels != rows:
            raise CheckpointError(
                f"{self.where}: the decoder has {rows} outputs. Expected a square number for each of {channels} channels."
            )
        return stride or 32

    def _pretrained_window(self, stage: int, window: Window) -> Window:
        """V2's pretrained window. On each axis, the maximum of the table is log2(8 * (side - 1) / (pretrained - 1) + 1) / 3."""
        table = self._buffer(stage, "relative_coords_table")
        if table is None or window == 1:
            return 0
        if table.shape[-1:] != (2,):
            raise CheckpointError(
                f"{self.where}: relative_coords_table of stage {stage} has shape {list(table.shape)}. {DAMAGED}"
            )
        found = []
        for side, largest in zip(sides(window), table.read().to(torch.float32).reshape(-1, 2).amax(0).tolist(), strict=True):
            exact = 8 * (side - 1) / (2 ** (3 * largest) - 1) + 1 if 0 < largest < 8 else 0.0
            # A table in bfloat16 has 3 digits, which are enough to distinguish windows.
            if abs(exact - round(exact)) > 0.3 or round(exact) < 2:
                raise CheckpointError(
                    f"{self.where}: relative_coords_table of stage {stage} holds values that Swin V2 never computes. "
                    f"The file is damaged."
                )
            found.append(round(exact))
        trained = window_from(found)
        return 0 if trained == window else trained

    def _image_size(self, patch: Size, windows: tuple[Window, ...], given: Size | None) -> tuple[Size, tuple[str, ...]]:
        """The image size that the file was trained for, and a note if it had to be assumed."""
        exact = self._size_from_masks(patch, windows) or self._size_from_training()
        if exact:
            return exact, ()
        if "embeddings.position_embeddings" in self.shapes:
            return self._size_from_positions(self._shape("embeddings.position_embeddings", 3)[1], patch, given)
        side = self._side_without_masks(patch, windows)
        if given and side in (None, min(given)):
            return given, ()
        if side is None and (trained := self._size_from_arguments()):
            return trained, (f"image size {trained[0]}x{trained[1]} is that of the training arguments in the file",)
        size = (side, side * patch[1] // patch[0]) if side else DEFAULT_SIZE[self.version]
        why = f"the file shows only that the shorter side is {side}" if side else "the file does not contain it"
        return size, (f"image size {size[0]}x{size[1]} is assumed: {why}",)

    def _size_from_masks(self, patch: Size, windows: tuple[Window, ...]) -> Size | None:
        """From the first attn_mask [windows, tokens, tokens]. Only the last window of each row or column has masked pairs."""
        for name, mask in self.buffers.items():
            match = re.fullmatch(r"encoder\.layers\.(\d{1,4})\.blocks\.\d+\.attn_mask", name)
            if match is None or int(match[1]) >= len(windows):
                continue
            stage = int(match[1])
            height, width = sides(windows[stage])
            count, tokens = mask.shape[0] if mask.shape else 0, height * width
            if count == 0 or mask.shape != (count, tokens, tokens):
                raise CheckpointError(
                    f"{self.where}: {name} has shape {list(mask.shape)}. Expected {tokens} tokens per window."
                )
            joined = (self._readable(name, mask).read() != 0).flatten(1).any(dim=1)
            columns = int(joined.to(torch.uint8).argmax()) + 1
            if not bool(joined.any()) or count % columns:
                raise CheckpointError(f"{self.where}: {name} holds a mask that Swin never computes. The file is damaged.")
            return count // columns * (height << stage) * patch[0], columns * (width << stage) * patch[1]
        return None

    def _side_without_masks(self, patch: Size, windows: tuple[Window, ...]) -> int | None:
        """The shorter side of the image if no stage shifts: Microsoft's code then uses windows as large as the feature map."""
        silent = [stage for stage, depth in enumerate(self.depths) if depth > 1]
        if self.writer != "microsoft" or not silent or not self._buffer(0, "relative_position_index"):
            return None
        found = {(min(sides(windows[stage])) << stage) * patch[0] for stage in silent}
        return found.pop() if len(found) == 1 else None

    def _size_from_training(self) -> Size | None:
        """From the yacs config in training checkpoints of Microsoft's code."""
        size: Any = self.extras
        for key in ("config", "DATA", "IMG_SIZE"):
            size = size.get(key) if isinstance(size, Mapping) else None
        return (size, size) if isinstance(size, int) and size > 0 else None

    def _size_from_arguments(self) -> Size | None:
        """From the arguments of timm's and other training scripts: one side, two, or channels and both."""
        found = [self.extras.get(name) for name in ("args", "hyper_parameters", "config")]
        for arguments in (one for one in found if isinstance(one, Mapping)):
            for key in ("img_size", "input_size", "image_size"):
                size = arguments.get(key)
                size = [size, size] if isinstance(size, int) else size
                if isinstance(size, list) and len(size) in (2, 3) and all(isinstance(n, int) and 0 < n <= 8192 for n in size):
                    return size[-2], size[-1]
        return None

    def _size_from_positions(self, count: int, patch: Size, given: Size | None) -> tuple[Size, tuple[str, ...]]:
        side = math.isqrt(count)
        if given and math.prod(math.ceil(g / p) for g, p in zip(given, patch, strict=True)) == count:
            return given, ()
        if side**2 != count:
            raise CheckpointError(
                f"{self.where} has absolute position embeddings for {count} patches, which do not form a square"
                + (f", and an image of {given[0]}x{given[1]} has another number." if given else ".")
                + " Pass the image size that it was trained for."
            )
        size = (side * patch[0], side * patch[1])
        return size, (f"image size {size[0]}x{size[1]} is assumed: the position embeddings show only the number of patches",)
