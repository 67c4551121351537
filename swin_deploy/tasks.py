"""TaskSpec: the task head of a network, and the names, types and shapes of its inputs and outputs.

Names are those of the transformers classes. Elements of tuples are numbered (`hidden_states.0`).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from swin_deploy.bundle import TensorSpec
from swin_deploy.config import SwinConfig
from swin_deploy.errors import UsageError, unknown
from swin_deploy.option_parsers import number, whole
from swin_deploy.options import TASKS as TASKS
from swin_deploy.options import Array

PIXELS, MASK = "pixel_values", "bool_masked_pos"


@dataclass(frozen=True)
class TaskSpec:
    """A task and its options."""

    name: str = "image-classification"  # one of TASKS
    output_hidden_states: bool = False
    output_attentions: bool = False
    add_pooling_layer: bool = True  # whether feature extraction has the pooled output
    use_mask_token: bool = False  # whether feature extraction has the input `bool_masked_pos`, as masked modelling always has
    out_features: tuple[str, ...] = ()  # of a backbone: "stem", "stage1", or "0", "-1"; empty: those of the checkpoint

    def __post_init__(self) -> None:
        if self.name not in TASKS:
            raise unknown("task", self.name, TASKS)
        features: object = self.out_features
        if isinstance(features, str):
            raise UsageError(f'out_features is the text "{features}". Expected a list of names, such as ["stage1"].')
        if self.out_features and self.name != "backbone":
            raise UsageError(f"The task {self.name} has no output features. Omit them, or choose the task backbone.")
        if (self.use_mask_token or not self.add_pooling_layer) and self.name != "feature-extraction":
            raise UsageError(
                f"The task {self.name} has no options for the mask token and the pooling layer. Omit them, or choose the task "
                f"feature-extraction."
            )

    @property
    def masked(self) -> bool:
        """Whether the network has the input `bool_masked_pos`."""
        return self.name == "masked-image-modeling" or self.use_mask_token

    def features(self, config: SwinConfig) -> tuple[str, ...]:
        """Return the stages whose feature maps a backbone outputs, in the order of the network."""
        known = stage_names(config)
        by_number = {str(i): known[i] for i in range(-len(known), len(known))}
        wanted = [by_number.get(name, name) for name in self.out_features or config.out_features or known[-1:]]
        if missing := [name for name in wanted if name not in known]:
            raise unknown("feature", missing[0], known)
        return tuple(name for name in known if name in wanted)

    def inputs(
        self, config: SwinConfig, image_size: tuple[int, int], frames: TensorSpec | None = None
    ) -> tuple[TensorSpec, ...]:
        """Return the inputs: pixel_values float32 [batch, channels, height, width], and bool_masked_pos bool [batch, patches].

        `frames` is pixel_values of a graph with embedded preprocessing.
        """
        rows, columns = config.grid(image_size)
        pixels = frames or TensorSpec(PIXELS, "float32", ("batch", config.num_channels, *image_size))
        return (pixels, TensorSpec(MASK, "bool", ("batch", rows * columns))) if self.masked else (pixels,)

    def output_names(self, config: SwinConfig) -> tuple[str, ...]:
        """Return the names of all outputs, in the order of the network."""
        stages = len(config.depths)
        names = {
            "image-classification": ["logits"],
            "masked-image-modeling": ["reconstruction"],
            "feature-extraction": ["last_hidden_state"] + ["pooler_output"] * self.add_pooling_layer,
        }.get(self.name) or [f"feature_maps.{i}" for i in range(len(self.features(config)))]
        if self.output_hidden_states:
            names += [f"hidden_states.{i}" for i in range(stages + 1)]
            if self.name != "backbone":
                names += [f"reshaped_hidden_states.{i}" for i in range(stages + 1)]
        if self.output_attentions:
            names += [f"attentions.{i}" for i in range(stages)]
        return tuple(names)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "out_features": list(self.out_features)}

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> TaskSpec:
        return cls(**{**raw, "out_features": tuple(raw["out_features"])})


def stage_names(config: SwinConfig) -> tuple[str, ...]:
    """Return the feature maps that a backbone can output: "stem", "stage1", ..."""
    return ("stem", *(f"stage{i + 1}" for i in range(len(config.depths))))


def refuse_without_classes(config: SwinConfig) -> None:
    """Raise UsageError for a network whose logits are not those of classes."""
    if not config.has_classes:
        why = "num_labels 0" if config.num_labels == 0 else "no pooling (global_pool ''), so its logits form a map"
        raise UsageError(f"This model has no classes: its checkpoint has {why}. Use run() instead.")


def class_limits(config: SwinConfig, top_k: int | None, threshold: float | None) -> tuple[int, float]:
    """Return how many classes to return, and the score that they must exceed."""
    several = config.num_labels > 1 and config.prediction in ("labels", "values")
    if threshold is None:
        threshold = 0.5 if several and config.prediction == "labels" and top_k is None else -np.inf
    else:
        threshold = number(0)("threshold", threshold)
    most = max(config.num_labels, 1) if several else 5
    return most if top_k is None else whole(1)("top_k", top_k), threshold


def scores_from_logits(logits: Array, activation: str) -> Array:
    """Apply the activation "softmax", "sigmoid" or "none" to logits [..., classes], in float64."""
    logits = logits.astype(np.float64)
    if activation == "sigmoid":
        return np.asarray(np.exp(-np.logaddexp(0, -logits)))
    if activation == "none":
        return logits
    odds = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(odds / odds.sum(axis=-1, keepdims=True))
