"""The losses that the transformers classes return, on the outputs of SwinNetwork."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from swin_deploy.config import SwinConfig


def classification_loss(config: SwinConfig, logits: Tensor, labels: Tensor, problem_type: str | None = None) -> Tensor:
    """The scalar loss of logits [batch, labels]: mean squared error, cross entropy, or binary cross entropy.

    `problem_type` is "regression", "single_label_classification" or "multi_label_classification"; None decides as
    transformers does: one label is a regression, whole-number labels are classes, others are several labels at once.
    """
    if problem_type is None:
        whole = labels.dtype in (torch.int64, torch.int32)
        several = "single_label_classification" if whole else "multi_label_classification"
        problem_type = "regression" if config.num_labels == 1 else several
    if problem_type == "regression":
        if config.num_labels == 1:
            return F.mse_loss(logits.squeeze(), labels.squeeze())
        return F.mse_loss(logits, labels)
    if problem_type == "single_label_classification":
        return F.cross_entropy(logits.view(-1, config.num_labels), labels.view(-1))
    if problem_type == "multi_label_classification":
        return F.binary_cross_entropy_with_logits(logits, labels)
    raise ValueError(f'There is no problem type "{problem_type}".')


def reconstruction_loss(config: SwinConfig, pixel_values: Tensor, reconstruction: Tensor, bool_masked_pos: Tensor) -> Tensor:
    """The scalar loss of masked image modelling: mean absolute error over the pixels of masked patches and the channels.

    The mask [batch, patches] covers the image at hand; transformers takes its configured size and fails at any other.
    """
    rows, columns = config.grid((pixel_values.shape[2], pixel_values.shape[3]))
    mask = bool_masked_pos.reshape(-1, rows, columns)
    mask = mask.repeat_interleave(config.patch_size[0], 1).repeat_interleave(config.patch_size[1], 2)
    mask = mask.unsqueeze(1).to(pixel_values.dtype)
    # An image that is no whole number of patches or merged tokens is reconstructed larger than it is.
    height, width = pixel_values.shape[2:]
    errors = F.l1_loss(pixel_values, reconstruction[:, :, :height, :width], reduction="none")
    mask = mask[:, :, :height, :width]
    return (errors * mask).sum() / (mask.sum() + 1e-5) / config.num_channels
