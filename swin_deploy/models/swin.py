"""The Swin Transformer, V1 and V2, for one image size and one task. blocks.py explains its layers and its graph layout."""

from __future__ import annotations

from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swin_deploy.config import SwinConfig
from swin_deploy.models import windows
from swin_deploy.models.activations import ACTIVATIONS
from swin_deploy.models.blocks import (
    DEFAULT_EPS,
    Block,
    LayerNorm,
    Linear,
    PatchMerging,
    Tensors,
    below,
    position_embeddings,
    reorder,
    shift_mask,
    tensor_or_none,
)
from swin_deploy.options import TARGETS
from swin_deploy.tasks import TaskSpec


class PatchEmbedding(nn.Module):
    """Pixels [batch, channels, height, width] -> row-major tokens [patches * batch, embed_dim].

    A mask [batch, patches] (bool, true = hidden) replaces patches by the mask token.
    """

    position: Tensor | None
    mask_token: Tensor | None

    def __init__(self, config: SwinConfig, image_size: tuple[int, int], tensors: Tensors, masked: bool) -> None:
        super().__init__()
        self.grid, self.patch = config.grid(image_size), config.patch_size
        self.weight = nn.Parameter(tensors["embeddings.patch_embeddings.projection.weight"], requires_grad=False)
        self.bias = nn.Parameter(tensors["embeddings.patch_embeddings.projection.bias"], requires_grad=False)
        self.norm = LayerNorm(tensors, "embeddings.norm", DEFAULT_EPS) if config.patch_norm else nn.Identity()
        self.missing = tuple(max(g * p - s, 0) for g, p, s in zip(self.grid, self.patch, image_size, strict=True))
        position = position_embeddings(config, self.grid, tensors)
        self.register_buffer("position", None if position is None else position.transpose(0, 1))
        self.register_buffer("mask_token", tensors["embeddings.mask_token"] if masked else None)

    def forward(self, pixel_values: Tensor, mask: Tensor | None) -> Tensor:
        x: Tensor = self.norm(self.project(pixel_values).flatten(2).permute(2, 0, 1))
        if mask is not None and self.mask_token is not None:
            x = torch.where(mask.transpose(0, 1).unsqueeze(-1), self.mask_token, x)
        if self.position is not None:
            x = x + self.position
        return x.reshape(-1, x.shape[-1])

    def project(self, pixel_values: Tensor) -> Tensor:
        """Convolve patches: [batch, embed_dim, rows, columns]."""
        return F.conv2d(self.padded(pixel_values), self.weight, self.bias, stride=self.patch)

    def padded(self, pixel_values: Tensor) -> Tensor:
        """Pad images with zeros, right and bottom, to whole patches."""
        return F.pad(pixel_values, (0, self.missing[1], 0, self.missing[0])) if any(self.missing) else pixel_values


class Stage(nn.Module):
    """The blocks of one stage, each after the gather into its window order. Returns tokens and the last block's attention."""

    def __init__(
        self, config: SwinConfig, number: int, stage: windows.StageGrids, order: windows.Index, tensors: Tensors, joined: bool
    ) -> None:
        super().__init__()
        self.steps = nn.Sequential()
        masks = {grid.shift: shift_mask(config, grid) for grid in stage.grids}
        for j, grid in enumerate(stage.grids):
            target = grid.order()
            if (step := reorder(order, target)) is not None:
                self.steps.add_module(f"reorder{j}", step)
            order = target
            parts = below(tensors, f"encoder.layers.{number}.blocks.{j}.")
            keep = tensor_or_none(windows.padding_mask(order))
            self.steps.add_module(f"block{j}", Block(config, number, grid, parts, masks[grid.shift], keep, joined))
        self.order = order

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        probabilities = x
        for step in self.steps:
            if isinstance(step, Block):
                x, probabilities = step(x)
            else:
                x = step(x)
        return x, probabilities


class RowMajor(nn.Module):
    """Tokens [tokens * batch, channels] in window order -> [batch, height * width, channels] row by row, without padding."""

    def __init__(self, order: windows.Index, height: int, width: int) -> None:
        super().__init__()
        self.height, self.width = height, width
        self.reorder = reorder(order, np.arange(height * width))

    def forward(self, x: Tensor) -> Tensor:
        if self.reorder is not None:
            x = self.reorder(x)
        return x.reshape(self.height * self.width, -1, x.shape[-1]).transpose(0, 1)

    def as_map(self, x: Tensor) -> Tensor:
        """[batch, height * width, channels] -> [batch, channels, height, width]."""
        return x.transpose(1, 2).reshape(-1, x.shape[-1], self.height, self.width)


class Head(nn.Sequential):
    """A classifier of several linear layers, with an activation between them."""

    def __init__(self, config: SwinConfig, tensors: Tensors) -> None:
        names = [f"classifier.{place}" for place in range(len(config.head_widths) + 1)]
        super().__init__(*(Linear(tensors[f"{name}.weight"], tensors[f"{name}.bias"]) for name in names))
        self.activation = ACTIVATIONS[config.head_act]

    def forward(self, x: Tensor) -> Tensor:
        for place, layer in enumerate(self):
            x = layer(self.activation(x) if place else x)
        return x


class SwinNetwork(nn.Module):
    """pixel_values [batch, channels, height, width] (and bool_masked_pos [batch, patches]) -> the outputs of `task`.

    The outputs are a tuple in the order of `task.output_names(config)`; `named` returns them as a dict. `tensors` are all
    parameters (see `parameters`), in float32. `target` is the runtime, which selects the graph layout; all compute the same.
    """

    def __init__(
        self,
        config: SwinConfig,
        image_size: tuple[int, int],
        tensors: Tensors,
        task: TaskSpec | None = None,
        target: str = TARGETS[0],
    ) -> None:
        super().__init__()
        self.target = target
        self.config, self.task = config, task or TaskSpec()
        self.output_names = self.task.output_names(config)
        self.embeddings = PatchEmbedding(config, image_size, tensors, self.task.masked)
        backbone = self.task.name == "backbone"
        plan = windows.stage_grids(config, image_size, backbone=backbone, tokens_first=target != "openvino")
        order = np.arange(plan[0].height * plan[0].width)
        self.stem_rows = RowMajor(order, plan[0].height, plan[0].width)
        self.stages, self.merges = nn.ModuleList(), nn.ModuleList()
        self.rows_before, self.rows_after = nn.ModuleList(), nn.ModuleList()
        for i, stage in enumerate(plan):
            module = Stage(config, i, stage, order, tensors, joined=target == "tensorrt")
            self.stages.append(module)
            order = module.order
            self.rows_before.append(RowMajor(order, stage.height, stage.width))
            if i + 1 < len(plan):
                after = plan[i + 1]
                target_order = after.grids[0].order()  # of the first block of the next stage
                neighbours = windows.merge_order(stage, target_order)
                beyond_edge = (neighbours == windows.PAD).any(axis=1) & (target_order != windows.PAD)
                neighbours = neighbours.reshape(-1)
                keep = tensor_or_none(windows.padding_mask(neighbours)) if beyond_edge.any() else None
                parts = below(tensors, f"encoder.layers.{i}.downsample.")
                self.merges.append(PatchMerging(config, len(target_order), parts, reorder(order, neighbours), keep))
                order = target_order
                self.rows_after.append(RowMajor(order, after.height, after.width))
        self.rows_after.append(self.rows_before[-1])
        # Pooling is independent of the order of tokens, but must not include padding.
        self.tokens = None if config.global_pool == "" or windows.padding_mask(order) is not None else len(order)
        if backbone:
            names = self.task.features(config) if config.feature_norms else ()
            norms = {name: LayerNorm(tensors, f"hidden_states_norms.{name}", DEFAULT_EPS) for name in names}
            self.norms = nn.ModuleDict(norms)
        else:
            self.norm = LayerNorm(tensors, "layernorm", config.layer_norm_eps) if config.final_norm else nn.Identity()
        if self.task.name == "image-classification":
            self.classifier: nn.Module = (
                Head(config, tensors)
                if config.head_widths
                else Linear(tensors["classifier.weight"], tensors["classifier.bias"])
                if config.num_labels
                else nn.Identity()
            )
        if self.task.name == "masked-image-modeling":
            weight = tensors["decoder.0.weight"]  # a 1 x 1 convolution, which is a linear layer on tokens
            self.decoder = Linear(weight.reshape(len(weight), -1), tensors["decoder.0.bias"])

    def forward(self, pixel_values: Tensor, bool_masked_pos: Tensor | None = None) -> tuple[Tensor, ...]:
        outputs: dict[str, Tensor] = {}
        backbone = self.task.name == "backbone"
        x = self.embeddings(pixel_values, bool_masked_pos)
        self._hidden(outputs, 0, self.stem_rows, x)
        self._feature(outputs, "stem", self.stem_rows, x)
        for i, stage in enumerate(self.stages):
            x, outputs[f"attentions.{i}"] = stage(x)
            before = cast(RowMajor, self.rows_before[i])
            self._feature(outputs, f"stage{i + 1}", before, x)
            if backbone:
                self._hidden(outputs, i + 1, before, x)
            if i < len(self.merges):
                x = self.merges[i](x)
            if not backbone:
                self._hidden(outputs, i + 1, cast(RowMajor, self.rows_after[i]), x)
        if not backbone:
            self._head(outputs, self.norm(x))
        return tuple(outputs[name] for name in self.output_names)

    def named(self, pixel_values: Tensor, bool_masked_pos: Tensor | None = None) -> dict[str, Tensor]:
        """Return the outputs by name."""
        return dict(zip(self.output_names, self(pixel_values, bool_masked_pos), strict=True))

    def _head(self, outputs: dict[str, Tensor], x: Tensor) -> None:
        rows = cast(RowMajor, self.rows_before[-1])
        if self.task.name == "masked-image-modeling":
            outputs["reconstruction"] = self._reconstruct(rows(x), rows)
            return
        if self.task.name == "image-classification":
            pooled = (
                self._pooled(rows(x), 1) if self.tokens is None else self._pooled(x.reshape(self.tokens, -1, x.shape[-1]), 0)
            )
            outputs["logits"] = self._map(self.classifier(pooled))
            return
        outputs["last_hidden_state"] = rows(x)
        outputs["pooler_output"] = self._map(self._pooled(outputs["last_hidden_state"], 1))

    def _pooled(self, tokens: Tensor, axis: int) -> Tensor:
        """Pool over the tokens along `axis`: [batch, channels]. Without pooling, the rows [batch * tokens, channels].

        Reductions keep their axis: OpenVINO fuses the ranges that NNCF puts before one wrongly otherwise.
        """
        kind = self.config.global_pool
        pools = [tokens.mean(axis, keepdim=True)] if "avg" in kind else []
        pools += [tokens.amax(axis, keepdim=True)] if "max" in kind else []
        if kind == "avgmax":
            pools = [0.5 * pools[0] + 0.5 * pools[1]]
        x = torch.cat(pools, -1) if len(pools) > 1 else pools[0] if pools else tokens
        return x.reshape(-1, x.shape[-1])

    def _map(self, pooled: Tensor) -> Tensor:
        """Rows of tokens that were not pooled -> [batch, height, width, channels], as in timm."""
        rows = cast(RowMajor, self.rows_before[-1])
        return pooled if self.config.global_pool else pooled.reshape(-1, rows.height, rows.width, pooled.shape[-1])

    def _reconstruct(self, tokens: Tensor, rows: RowMajor) -> Tensor:
        """Tokens [batch, height * width, channels] -> pixels; each token becomes encoder_stride x encoder_stride pixels."""
        side, channels = self.config.encoder_stride, self.config.num_channels
        x = self.decoder(tokens.reshape(-1, tokens.shape[-1]))
        x = x.reshape(-1, rows.height, rows.width, channels, side, side).permute(0, 3, 1, 4, 2, 5)
        return cast(Tensor, x).reshape(-1, channels, rows.height * side, rows.width * side)

    def _hidden(self, outputs: dict[str, Tensor], number: int, rows: RowMajor, x: Tensor) -> None:
        if not self.task.output_hidden_states:
            return
        tokens = rows(x)
        as_map = self.task.name == "backbone" and self.config.version == 1 and self.config.backbone_maps
        outputs[f"hidden_states.{number}"] = rows.as_map(tokens) if as_map else tokens
        outputs[f"reshaped_hidden_states.{number}"] = rows.as_map(tokens)

    def _feature(self, outputs: dict[str, Tensor], name: str, rows: RowMajor, x: Tensor) -> None:
        if self.task.name != "backbone" or name not in self.task.features(self.config):
            return
        tokens = rows(x)
        if self.config.feature_norms:
            tokens = self.norms[name](tokens)
        outputs[f"feature_maps.{self.task.features(self.config).index(name)}"] = rows.as_map(tokens)
