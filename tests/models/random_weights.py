"""Random weights for the models of transformers that the networks are compared with."""

from __future__ import annotations

import math
from typing import Any

import torch


def randomize(model: Any, seed: int, clamped_head: bool = True) -> Any:
    """Draw all parameters, none 0 or 1. With `clamped_head`, one attention scale is above its clamp of ln(100)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            if name.endswith("logit_scale"):
                values = 2.3 + 0.5 * values
                if clamped_head:
                    values[-1], clamped_head = math.log(100) + 0.7, False
            elif "norm" in name:
                values = 0.3 * values + float(name.endswith("weight"))
            elif name.endswith("bias"):
                values = 0.3 * values
            elif not name.endswith(("table", "position_embeddings", "mask_token")):
                values = values / values[0].numel() ** 0.5
            parameter.copy_(values)
    return model
