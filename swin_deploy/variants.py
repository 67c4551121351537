"""The table of published Swin V1 and V2 checkpoints, and the lookup by any of their names.

Sources: MODELHUB.md of microsoft/Swin-Transformer (top-1), timm's swin_transformer.py and swin_transformer_v2.py
(names, default tags) and its results/*.csv (parameters), the model pages under huggingface.co/microsoft.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from swin_deploy.config import OTHER_FAMILIES, SwinConfig
from swin_deploy.errors import UsageError

Task = Literal["image-classification", "masked-image-modeling"]


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One published checkpoint: architecture, names, accuracy and preprocessing.

    `top1` is Microsoft's figure in percent. The preprocessing is that of preprocessor_config.json on the hub: the whole image
    is resized to `image_size`. Accuracy at 224 and 256 was published with a centre crop (timm's crop_pct 0.9).
    """

    name: str
    aliases: tuple[str, ...] = ()
    version: int
    task: Task = "image-classification"
    image_size: int
    window_size: int | tuple[int, ...]  # a tuple holds one window per stage
    embed_dim: int
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    num_labels: int  # 0: no classifier
    pretrained_window_sizes: tuple[int, ...] = (0, 0, 0, 0)
    hub_id: str | None = None
    timm_name: str | None = None
    top1: float | None = None
    params_millions: float | None = None  # None: no source gives two decimals
    resample: int = 3  # Pillow's number for bicubic
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def config(self) -> SwinConfig:
        """Return the architecture, with the labels LABEL_0, LABEL_1 and so on."""
        window = self.window_size
        return SwinConfig(
            version=self.version,
            image_size=(self.image_size, self.image_size),
            embed_dim=self.embed_dim,
            depths=self.depths,
            num_heads=self.num_heads,
            window_size=(window,) * len(self.depths) if isinstance(window, int) else window,
            pretrained_window_sizes=self.pretrained_window_sizes,
            id2label={i: f"LABEL_{i}" for i in range(self.num_labels)},
        )


class ModelSize(NamedTuple):
    """The dimensions that "tiny", "small", "base" and "large" stand for."""

    embed_dim: int
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]


T = ModelSize(96, (2, 2, 6, 2), (3, 6, 12, 24))
S = ModelSize(96, (2, 2, 18, 2), (3, 6, 12, 24))
B = ModelSize(128, (2, 2, 18, 2), (4, 8, 16, 32))
L = ModelSize(192, (2, 2, 18, 2), (6, 12, 24, 48))
S3_BASE = ModelSize(96, (2, 2, 30, 2), (3, 6, 12, 24))

# timm's tag -> classes. The tag is the training data: ImageNet-1k, ImageNet-22k, or 22k and then 1k.
CLASSES = {"ms_in1k": 1000, "ms_in22k": 21841, "ms_in22k_ft_in1k": 1000, None: 0}


def _variant(
    name: str,
    size: ModelSize,
    image: int,
    window: int | tuple[int, ...],
    tag: str | None,  # None: SimMIM's encoders, which have no classifier and are not in timm
    top1: float | None = None,
    params: float | None = None,
    *aliases: str,
    on_hub: bool = True,
) -> Variant:
    version = 2 if name.startswith("swinv2") else 1
    stem = re.sub("-(in1k|(in)?22k.*)$", "", name).replace("-patch4" if version == 2 else "", "").replace("-", "_")
    return Variant(
        name=name,
        aliases=aliases,
        version=version,
        task="image-classification" if tag else "masked-image-modeling",
        **size._asdict(),
        image_size=image,
        window_size=window,
        num_labels=CLASSES[tag],
        # Fine-tuning with larger windows keeps the coordinates scaled to the windows of pre-training. The window of the
        # last stage was 6, because 192 pixels leave 6 tokens there (configs/swinv2/*_ft.yaml).
        pretrained_window_sizes=(12, 12, 12, 6) if version == 2 and tag == "ms_in22k_ft_in1k" else (0, 0, 0, 0),
        hub_id=f"microsoft/{name}" if on_hub else None,
        timm_name=f"{stem}.{tag}" if tag else None,
        top1=top1,
        params_millions=params,
    )


# A name is that of the hub, without "microsoft/". A checkpoint that is not on the hub is named in the same style: its timm
# architecture and, if that has several checkpoints, the tag ("in1k", "in22k", "in22k-ft-in1k").
#
# The base names on the hub do not identify the weights. They were converted in January 2022 from what timm then loaded by
# the same name, which was 22kto1k for base and large, and 1k for tiny and small (timm 656757d2, swin_transformer.py:49-70).
# That is an inference from dates and code. It leaves the 1k checkpoints of base without a name.
#
# The first row of a timm architecture is timm's default (the order in its default_cfgs). For tiny that is 1k: "tiny 22k
# pretrain is worse than 1k".
VARIANTS: tuple[Variant, ...] = (
    # name, size, image, window, timm's tag, top-1, million parameters, aliases
    _variant("swin-tiny-patch4-window7-224", T, 224, 7, "ms_in1k", 81.2, 28.29, "swin-tiny"),
    _variant("swin-tiny-patch4-window7-224-in22k-ft-in1k", T, 224, 7, "ms_in22k_ft_in1k", 80.9, 28.29, on_hub=False),
    _variant("swin-tiny-patch4-window7-224-in22k", T, 224, 7, "ms_in22k", None, None, on_hub=False),
    _variant("swin-small-patch4-window7-224-in22k-ft-in1k", S, 224, 7, "ms_in22k_ft_in1k", 83.2, 49.61, on_hub=False),
    _variant("swin-small-patch4-window7-224", S, 224, 7, "ms_in1k", 83.2, 49.61, "swin-small"),
    _variant("swin-small-patch4-window7-224-in22k", S, 224, 7, "ms_in22k", None, None, on_hub=False),
    _variant("swin-base-patch4-window7-224", B, 224, 7, "ms_in22k_ft_in1k", 85.2, 87.77, "swin-base"),
    _variant("swin-base-patch4-window7-224-in1k", B, 224, 7, "ms_in1k", 83.5, 87.77, on_hub=False),
    _variant("swin-base-patch4-window7-224-in22k", B, 224, 7, "ms_in22k", None, None),
    _variant("swin-base-patch4-window12-384", B, 384, 12, "ms_in22k_ft_in1k", 86.4, 87.90, "swin-base-384"),
    _variant("swin-base-patch4-window12-384-in1k", B, 384, 12, "ms_in1k", 84.5, 87.90, on_hub=False),
    _variant("swin-base-patch4-window12-384-in22k", B, 384, 12, "ms_in22k", None, None),
    _variant("swin-large-patch4-window7-224", L, 224, 7, "ms_in22k_ft_in1k", 86.3, 196.53, "swin-large"),
    _variant("swin-large-patch4-window7-224-in22k", L, 224, 7, "ms_in22k", None, None),
    _variant("swin-large-patch4-window12-384", L, 384, 12, "ms_in22k_ft_in1k", 87.3, 196.74, "swin-large-384"),
    _variant("swin-large-patch4-window12-384-in22k", L, 384, 12, "ms_in22k", None, None),
    # "C24": 24 channels in each head. MODELHUB.md lists it beside Swin-MLP, which it is not.
    replace(
        _variant(
            "swin-tiny-c24-patch4-window8-256", T._replace(num_heads=(4, 8, 16, 32)), 256, 8, "ms_in1k", 81.6, on_hub=False
        ),
        timm_name=None,
    ),
    # S3, the searched windows and depths of AutoFormerV2; top-1 from AutoFormerV2/README.md of microsoft/Cream
    _variant("swin-s3-tiny-224", T, 224, (7, 7, 14, 7), "ms_in1k", 82.1, 28.33, "swin-s3-tiny", on_hub=False),
    _variant("swin-s3-small-224", S, 224, (14, 14, 14, 7), "ms_in1k", 83.7, 49.74, "swin-s3-small", on_hub=False),
    _variant("swin-s3-base-224", S3_BASE, 224, (7, 7, 14, 7), "ms_in1k", 84.0, 71.13, "swin-s3-base", on_hub=False),
    # SimMIM: encoders without a classifier. The hub's base is the one trained for 100 epochs, by the default of its
    # converter (transformers, convert_swin_simmim_to_pytorch.py); the published accuracies are of fine-tuned models.
    _variant("swin-base-simmim-window6-192", B, 192, 6, None),
    _variant("swin-large-simmim-window12-192", L, 192, 12, None),
    # V2
    _variant("swinv2-tiny-patch4-window8-256", T, 256, 8, "ms_in1k", 81.8, 28.35, "swinv2-tiny"),
    _variant("swinv2-tiny-patch4-window16-256", T, 256, 16, "ms_in1k", 82.8, 28.35, "swinv2-tiny-w16"),
    _variant("swinv2-small-patch4-window8-256", S, 256, 8, "ms_in1k", 83.7, 49.73, "swinv2-small"),
    _variant("swinv2-small-patch4-window16-256", S, 256, 16, "ms_in1k", 84.1, 49.73, "swinv2-small-w16"),
    _variant("swinv2-base-patch4-window8-256", B, 256, 8, "ms_in1k", 84.2, 87.92, "swinv2-base"),
    _variant("swinv2-base-patch4-window16-256", B, 256, 16, "ms_in1k", 84.6, 87.92, "swinv2-base-w16"),
    _variant("swinv2-base-patch4-window12-192-22k", B, 192, 12, "ms_in22k", None, 109.28),
    _variant("swinv2-base-patch4-window12to16-192to256-22kto1k-ft", B, 256, 16, "ms_in22k_ft_in1k", 86.2, 87.92),
    _variant(
        "swinv2-base-patch4-window12to24-192to384-22kto1k-ft", B, 384, 24, "ms_in22k_ft_in1k", 87.1, 87.92, "swinv2-base-384"
    ),
    _variant("swinv2-large-patch4-window12-192-22k", L, 192, 12, "ms_in22k", None, 228.77),
    _variant(
        "swinv2-large-patch4-window12to16-192to256-22kto1k-ft", L, 256, 16, "ms_in22k_ft_in1k", 86.9, 196.74, "swinv2-large"
    ),
    _variant(
        "swinv2-large-patch4-window12to24-192to384-22kto1k-ft", L, 384, 24, "ms_in22k_ft_in1k", 87.6, 196.74, "swinv2-large-384"
    ),
)

# Start of another network's name (without hyphens) -> what it is.
_FAMILIES = {name.replace("-", "").replace("_", ""): what for name, what in OTHER_FAMILIES.items()} | {
    "maskformerswin": "MaskFormer, which has a Swin inside: pass it with --weights",
    "donutswin": "Donut's Swin, which --weights accepts",
    "swinir": "SwinIR, an image restoration network",
    "swin3d": "Video Swin, a network for video with three-dimensional windows",
    "videoswin": "Video Swin, a network for video with three-dimensional windows",
    "swinmlp": "Swin-MLP, which has multi-layer perceptrons in place of attention",
    "swinmoe": "Swin-MoE, a mixture of experts",
}


def find_variant(name: str) -> Variant:
    """Find a variant by its name, an alias, or its name on the hub or in timm, in upper or lower case, with - or _.

    "swin_small_patch4_window7_224" is a different checkpoint on the hub and in timm. It means that of the hub, and with the
    prefix "timm/" that of timm. Raises UsageError, with the nearest names, if there is no such variant.
    """
    key = _key(name)
    if key.startswith("hf-hub:"):  # timm's way to name a repository; without an owner it can only be its own
        key = key.removeprefix("hf-hub:")
        key = key if "/" in key else f"timm/{key}"
    if key in _BY_NAME:
        return _BY_NAME[key]
    bare = key.rsplit("/", 1)[-1]
    for start, what in _FAMILIES.items():
        if bare.replace("-", "").startswith(start):
            raise UsageError(
                f'"{name}" is {what}. swin-deploy supports Swin V1 and V2. `swin-deploy variants` lists the checkpoints.'
            )
    ours = [known for variant in VARIANTS for known in (variant.name, *variant.aliases)]
    near = difflib.get_close_matches(bare, ours, n=3)
    hint = f" The nearest names are {', '.join(near)}." if near else ""
    raise UsageError(f'No Swin variant is named "{name}".{hint} `swin-deploy variants` lists them all.')


def _key(name: str) -> str:
    return name.strip().lower().replace("_", "-")


def _by_name() -> dict[str, Variant]:
    found: dict[str, Variant] = {}
    for variant in VARIANTS:
        timm = (variant.timm_name, f"timm/{variant.timm_name}") if variant.timm_name else ()
        found |= {_key(name): variant for name in (variant.name, *variant.aliases, variant.hub_id, *timm) if name}
    for variant in VARIANTS:  # timm's name without a tag means its default, unless the hub has the name, too
        if variant.timm_name:
            untagged = _key(variant.timm_name.split(".")[0])
            for name in (untagged, f"timm/{untagged}"):
                found.setdefault(name, variant)
    return found


_BY_NAME = _by_name()
