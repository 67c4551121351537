"""TaskSpec: what a network is asked for, and the names, types and shapes of what goes in and comes out.

Names are those of the transformers classes; tuples are numbered outputs (`hidden_states.0`).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from swin_deploy.config import SwinConfig
from swin_deploy.errors import UsageError
from swin_deploy.specs import TensorSpec

TASKS = ("image-classification", "feature-extraction", "backbone", "masked-image-modeling")
PIXELS, MASK = "pixel_values", "bool_masked_pos"


@dataclass(frozen=True)
class TaskSpec:
    """A task and its options. `out_features` ("stem", "stage1", ..., or their numbers "0", "1", "-1") is for the backbone;
    empty: its own.

    `use_mask_token` adds the input `bool_masked_pos` to feature extraction; masked image modelling always has it.
    `add_pooling_layer` is feature extraction's.
    """

    name: str = "image-classification"
    output_hidden_states: bool = False
    output_attentions: bool = False
    add_pooling_layer: bool = True
    use_mask_token: bool = False
    out_features: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.name not in TASKS:
            raise UsageError(f'There is no task "{self.name}". There are: {", ".join(TASKS)}.')
        features: object = self.out_features
        if isinstance(features, str):
            raise UsageError(f'out_features is the text "{features}"; expected a list of names, such as ["stage1"].')
        if self.out_features and self.name != "backbone":
            raise UsageError(f"Output features belong to the task backbone; {self.name} has none. Leave them out.")
        if (self.use_mask_token or not self.add_pooling_layer) and self.name != "feature-extraction":
            raise UsageError(
                f"A mask token or no pooling layer can be chosen for the task feature-extraction; {self.name} has its own."
            )

    @property
    def masked(self) -> bool:
        """Whether there is an input `bool_masked_pos`."""
        return self.name == "masked-image-modeling" or self.use_mask_token

    def features(self, config: SwinConfig) -> tuple[str, ...]:
        """The stages whose feature maps a backbone gives, in the order of the network."""
        known = stage_names(config)
        by_number = {str(i): known[i] for i in range(-len(known), len(known))}
        wanted = [by_number.get(name, name) for name in self.out_features or config.out_features or known[-1:]]
        unknown = [name for name in wanted if name not in known]
        if unknown:
            raise UsageError(f'There is no feature "{unknown[0]}" in this network. There are: {", ".join(known)}.')
        return tuple(name for name in known if name in wanted)

    def inputs(
        self, config: SwinConfig, image_size: tuple[int, int], frame_size: tuple[int, int] | None = None
    ) -> tuple[TensorSpec, ...]:
        """pixel_values float32 [batch, channels, height, width], and bool_masked_pos bool [batch, patches] where masked.

        With `frame_size`, of a graph that prepares frames itself, pixel_values are uint8 [batch, height, width, 3].
        """
        rows, columns = config.grid(image_size)
        pixels = TensorSpec(PIXELS, "float32", ("batch", config.num_channels, *image_size))
        if frame_size is not None:
            pixels = TensorSpec(PIXELS, "uint8", ("batch", *frame_size, config.num_channels))
        return (pixels, TensorSpec(MASK, "bool", ("batch", rows * columns))) if self.masked else (pixels,)

    def output_names(self, config: SwinConfig) -> tuple[str, ...]:
        """The names of all outputs, in the order in which the network returns them."""
        stages = len(config.depths)
        names: list[str]
        if self.name == "image-classification":
            names = ["logits"]
        elif self.name == "masked-image-modeling":
            names = ["reconstruction"]
        elif self.name == "backbone":
            names = [f"feature_maps.{i}" for i in range(len(self.features(config)))]
        else:
            names = ["last_hidden_state"] + ["pooler_output"] * self.add_pooling_layer
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
    """The features that a backbone can give: "stem", "stage1", ..."""
    return ("stem", *(f"stage{i + 1}" for i in range(len(config.depths))))
