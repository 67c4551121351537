"""Models that have a Swin inside (detectors, segmenters, depth and document models): where it is, and what they read from it.

transformers states the Swin in a part of config.json. Other files are recognized by the names of the tensors around the Swin.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from swin_deploy.config import OTHER_FAMILIES, SwinConfig
from swin_deploy.errors import CheckpointError, UsageError, shown
from swin_deploy.variants import find_variant

MAPS, TOKENS = "backbone", "feature-extraction"  # the tasks of encoders
DEEPEST = 3  # configs in each other

# model_type of a Swin in transformers -> keys of config.json in which it differs from "swin" or "swinv2"
SWINS: Mapping[str, Mapping[str, Any]] = {
    "swin": {},
    "swinv2": {},
    "maskformer-swin": {"model_type": "swin", "always_partition": True},  # windows are shifted on every map
    "donut-swin": {"model_type": "swin", "final_norm": False},
}

# Models whose config.json names no Swin: names of tensors of which one must be in the file, what has them, and what it reads
# from the Swin. The first match counts.
PARTS = tuple(
    (re.compile(pattern), model, task)
    for pattern, model, task in (
        (r"(^|\.)pixel_level_module\.", "MaskFormer, Mask2Former or OneFormer", MAPS),
        (r"(^|\.)sem_seg_head\.", "MaskFormer or Mask2Former", MAPS),
        (r"(^|\.)vision_backbone\.", "OmDet-Turbo", MAPS),
        (r"(^|\.)(decode_head|auxiliary_head|segmentation_head|semantic_head|seg_head)\.", "a segmentation network", MAPS),
        (r"(^|\.)(rpn_head|rpn|roi_head|roi_heads|bbox_head|mask_head)\.", "a detector", MAPS),
        (r"(^|\.)(conv_encoder|input_proj|input_proj_vision|transformer\.(en|de)coder)\.", "a DETR or Grounding DINO", MAPS),
        (r"(^|\.)(class_labels_classifier|bbox_predictor|query_position_embeddings)\.", "a DETR", MAPS),
        (r"(^|\.)neck\.|(^|\.)fpn\.", "a detector or a segmentation network", MAPS),
        (r"(^|\.)scratch\.", "DPT", MAPS),
        (r"(^|\.)bb\.", "BiRefNet", MAPS),
        (r"(^|\.)(tagging_head|tag_encoder)\.", "RAM or Tag2Text", TOKENS),
        (r"(^|\.)decoder\.model\.decoder\.", "Donut", TOKENS),
        (r"(^|\.)(text_model|text_encoder)\.", "a model of images and text", TOKENS),
    )
)


@dataclass(frozen=True)
class ParentModel:
    """The model around a Swin. `config` and `timm` are what it states about the Swin: a config of transformers, or of timm."""

    name: str
    task: str  # what it reads from the Swin: feature maps (MAPS) or tokens (TOKENS)
    config: Mapping[str, Any] | None = None
    timm: Mapping[str, Any] | None = None
    out_features: tuple[str, ...] = ()  # of a Swin of timm
    prefix: str = ""  # of the Swin in the file
    left: int = 0  # number of its other tensors

    def note(self, outputs: str) -> str:
        """Return which part of the model is exported, and how many tensors are not."""
        where = f" (parameters under {self.prefix}.)" if self.prefix else ""
        what = f"exporting only the Swin encoder of {self.name}{where}: {outputs}"
        return f"{what}. {self.left} other tensors are not used"


def parent_from_config(raw: Mapping[str, Any]) -> ParentModel | None:
    """Find the Swin in a config.json of transformers. None if it has none that is known."""
    name = _name(raw)
    for key, part in _parts(raw):
        kind = part.get("model_type")
        task = MAPS if "backbone" in key else TOKENS
        if isinstance(kind, str) and kind in SWINS:
            config: dict[str, Any] = {"architectures": None, **part, **SWINS[kind]}
            if raw.get("model_type") == "maskformer":  # it replaces a "swin" by its own, and reads every stage
                stages = len(SwinConfig.from_dict(config).depths)
                config |= SWINS["maskformer-swin"]
                config |= {"out_features": [f"stage{i + 1}" for i in range(stages)], "out_indices": None}
            return ParentModel(name, task, config)
        if kind == "timm_backbone" and _is_swin(part.get("backbone")):
            return _timm(name, part["backbone"], part)
    if str(raw.get("encoder_name")).startswith("tu-") and _is_swin(raw["encoder_name"][3:]):  # segmentation_models_pytorch
        return _timm(str(shown(str(raw.get("_model_class")))), raw["encoder_name"][3:], {"in_chans": raw.get("in_channels")})
    backbone = raw.get("backbone")
    if not isinstance(raw.get("backbone_config"), Mapping) and _is_swin(backbone):
        given = raw.get("backbone_kwargs")
        given = given if isinstance(given, Mapping) else {}
        if "/" not in str(backbone) or raw.get("use_timm_backbone"):
            return _timm(name, str(backbone), given)
        try:
            return ParentModel(name, MAPS, {**find_variant(str(backbone)).config().to_dict(), **given})
        except UsageError as error:
            raise CheckpointError(f"config.json: backbone: {error}") from error
    return None


def refuse_other_model(raw: Mapping[str, Any]) -> None:
    """Raise CheckpointError for a config.json without a Swin."""
    found = [
        f"its {key} is {OTHER_FAMILIES.get(kind) or shown(repr(kind))}"
        for key, part in _parts(raw)
        if isinstance(kind := part.get("model_type"), str)
    ]
    if not found:
        SwinConfig.from_dict(raw)
    kind = shown(repr(raw.get("model_type")))
    raise CheckpointError(
        f"config.json: model_type {kind} is not a Swin, and has none inside ({'; '.join(found[:3])}). "
        f'swin-deploy supports "swin" and "swinv2", and models with such an encoder.'
    )


def parent_from_names(names: Iterable[str]) -> ParentModel | None:
    """Recognize a model by the names of all its tensors."""
    names = tuple(names)
    for pattern, model, task in PARTS:
        if any(map(pattern.search, names)):
            return ParentModel(model, task)
    return None


def _parts(raw: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The configs in a config.json, the outer ones first, with their keys."""
    level = [("", raw)]
    for _ in range(DEEPEST):
        level = [(key, part) for _, outer in level for key, part in outer.items() if isinstance(part, Mapping)]
        yield from level


def _is_swin(name: Any) -> bool:
    return isinstance(name, str) and re.match(r"(timm/|.*/)?swin(v2)?[_-](?!cr)", name) is not None


def _timm(name: str, architecture: str, given: Mapping[str, Any]) -> ParentModel:
    """timm's networks count feature maps from the first stage, and transformers hands these arguments on to timm."""
    names = ("img_size", "always_partition", "window_size", "in_chans")
    arguments = {key: given[key] for key in names if given.get(key) is not None}
    if given.get("num_channels") is not None:
        arguments.setdefault("in_chans", given["num_channels"])
    indices = given.get("out_indices")
    stages = tuple(f"stage{i + 1}" for i in indices if isinstance(i, int) and i >= 0) if isinstance(indices, list) else ()
    raw = {"architecture": architecture.rpartition("/")[2], "num_classes": 0, "model_args": arguments}
    return ParentModel(name, MAPS, timm=raw, out_features=stages)


def _name(raw: Mapping[str, Any]) -> str:
    """The class of a model, or its type."""
    classes = raw.get("architectures")
    known = classes[0] if isinstance(classes, list) and classes and isinstance(classes[0], str) else raw.get("model_type")
    return str(shown(str(known)))
