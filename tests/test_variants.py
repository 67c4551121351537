"""The table of published checkpoints is complete, consistent, and agrees with the published sources."""

from __future__ import annotations

import math
import re
from collections import Counter
from typing import Any

import pytest
import torch
import transformers

from swin_deploy.errors import UsageError
from swin_deploy.models.checkpoints.state_dict_names import HUGGING_FACE
from swin_deploy.models.parameters import parameters
from swin_deploy.variants import VARIANTS, Variant, find_variant

BASE: dict[str, Any] = {"embed_dim": 128, "depths": [2, 2, 18, 2], "num_heads": [4, 8, 16, 32]}
LARGE: dict[str, Any] = {"embed_dim": 192, "depths": [2, 2, 18, 2], "num_heads": [6, 12, 24, 48]}

# default_cfgs of timm's swin_transformer.py and swin_transformer_v2.py: architecture -> tags, the default first
TIMM = {
    "swin_tiny_patch4_window7_224": ["ms_in1k", "ms_in22k_ft_in1k", "ms_in22k"],
    "swin_small_patch4_window7_224": ["ms_in22k_ft_in1k", "ms_in1k", "ms_in22k"],
    "swin_base_patch4_window7_224": ["ms_in22k_ft_in1k", "ms_in1k", "ms_in22k"],
    "swin_base_patch4_window12_384": ["ms_in22k_ft_in1k", "ms_in1k", "ms_in22k"],
    "swin_large_patch4_window7_224": ["ms_in22k_ft_in1k", "ms_in22k"],
    "swin_large_patch4_window12_384": ["ms_in22k_ft_in1k", "ms_in22k"],
    "swin_s3_tiny_224": ["ms_in1k"],
    "swin_s3_small_224": ["ms_in1k"],
    "swin_s3_base_224": ["ms_in1k"],
    "swinv2_tiny_window8_256": ["ms_in1k"],
    "swinv2_tiny_window16_256": ["ms_in1k"],
    "swinv2_small_window8_256": ["ms_in1k"],
    "swinv2_small_window16_256": ["ms_in1k"],
    "swinv2_base_window8_256": ["ms_in1k"],
    "swinv2_base_window16_256": ["ms_in1k"],
    "swinv2_base_window12_192": ["ms_in22k"],
    "swinv2_base_window12to16_192to256": ["ms_in22k_ft_in1k"],
    "swinv2_base_window12to24_192to384": ["ms_in22k_ft_in1k"],
    "swinv2_large_window12_192": ["ms_in22k"],
    "swinv2_large_window12to16_192to256": ["ms_in22k_ft_in1k"],
    "swinv2_large_window12to24_192to384": ["ms_in22k_ft_in1k"],
}


def test_the_table_is_complete_and_no_name_is_given_twice() -> None:
    assert Counter(variant.version for variant in VARIANTS) == {1: 22, 2: 12}
    assert sum(variant.hub_id is not None for variant in VARIANTS) == 24
    assert sum(variant.task == "masked-image-modeling" for variant in VARIANTS) == 2
    timm = [variant.timm_name for variant in VARIANTS if variant.timm_name]
    assert sorted(timm) == sorted(f"{name}.{tag}" for name, tags in TIMM.items() for tag in tags)
    names = [name for v in VARIANTS for name in (v.name, *v.aliases, v.hub_id, v.timm_name) if name is not None]
    assert max(Counter(name.lower().replace("_", "-") for name in names).values()) == 1


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)
def test_each_name_finds_its_variant(variant: Variant) -> None:
    names = [variant.name, *variant.aliases]
    if variant.hub_id:
        assert variant.hub_id == f"microsoft/{variant.name}"
        names += [variant.hub_id, f"hf_hub:{variant.hub_id}"]
    if variant.timm_name:
        names += [f"{prefix}{variant.timm_name}" for prefix in ("", "timm/", "hf_hub:", "hf-hub:timm/")]
    for name in names:
        for spelling in (name, name.upper(), name.replace("-", "_"), name.replace("_", "-"), f" {name} "):
            assert find_variant(spelling) is variant


@pytest.mark.parametrize("name", TIMM)
def test_a_timm_name_without_a_tag_means_timms_default(name: str) -> None:
    for prefix in ("timm/", "hf_hub:", "hf_hub:timm/"):
        assert find_variant(prefix + name).timm_name == f"{name}.{TIMM[name][0]}"
    # Where the hub has the same name, the bare one means the hub's.
    tag = "ms_in1k" if name == "swin_small_patch4_window7_224" else TIMM[name][0]
    assert find_variant(name).timm_name == f"{name}.{tag}"


@pytest.mark.parametrize(
    ("alias", "name", "top1"),
    [
        ("swin-tiny", "swin-tiny-patch4-window7-224", 81.2),
        ("swin-small", "swin-small-patch4-window7-224", 83.2),
        ("swin-base", "swin-base-patch4-window7-224", 85.2),
        ("swin-large", "swin-large-patch4-window7-224", 86.3),
        ("swinv2-tiny", "swinv2-tiny-patch4-window8-256", 81.8),
        ("swinv2-small", "swinv2-small-patch4-window8-256", 83.7),
        ("swinv2-base", "swinv2-base-patch4-window8-256", 84.2),
        ("swinv2-large", "swinv2-large-patch4-window12to16-192to256-22kto1k-ft", 86.9),
    ],
)
def test_a_short_name_means_the_best_known_checkpoint(alias: str, name: str, top1: float) -> None:
    variant = find_variant(alias)
    assert (variant.name, variant.top1) == (name, top1)


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v.params_millions], ids=lambda v: v.name)
def test_the_parameters_are_as_many_as_published(variant: Variant) -> None:
    assert variant.params_millions is not None
    count = sum(math.prod(shape) for shape in parameters(variant.config()).values())
    assert count / 1e6 == pytest.approx(variant.params_millions, abs=0.005)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)
def test_a_row_agrees_with_its_own_names(variant: Variant) -> None:
    """Image size, window and classes in the name are those of the fields."""
    config = variant.config()
    assert config.image_size == (variant.image_size,) * 2
    assert str(variant.image_size) in variant.name
    if isinstance(variant.window_size, int):
        assert f"window{variant.window_size}-" in variant.name or f"to{variant.window_size}-" in variant.name
    if variant.task == "masked-image-modeling":
        assert config.num_labels == 0
        assert "classifier.weight" not in parameters(config)
    else:
        assert config.num_labels == (21841 if variant.name.endswith("22k") else 1000)
    assert (sum(variant.pretrained_window_sizes) > 0) == ("to1k" in variant.name)


# What differs from the defaults of transformers' SwinConfig and Swinv2Config (which are tiny, 224 pixels, window 7)
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "swin-tiny": {},
    "swin-base": BASE,
    "swin-base-384": {"image_size": 384, "window_size": 12, **BASE},
    "swinv2-tiny": {"image_size": 256, "window_size": 8},
    "swinv2-base": {"image_size": 256, "window_size": 8, **BASE},
    "swinv2-base-patch4-window12-192-22k": {"num_labels": 21841, "image_size": 192, "window_size": 12, **BASE},
    "swinv2-large": {"image_size": 256, "window_size": 16, "pretrained_window_sizes": [12, 12, 12, 6], **LARGE},
}


def canonical_name(name: str) -> str:
    for pattern, new in HUGGING_FACE:
        name = re.sub(pattern, new, name)
    return name


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_architecture_is_that_of_transformers(name: str) -> None:
    kind: Any = transformers.Swinv2Config if name.startswith("swinv2") else transformers.SwinConfig
    theirs = kind(**{"num_labels": 1000, **ARCHITECTURES[name]})
    ours = find_variant(name).config()
    raw = ours.to_dict()
    for key in ("image_size", "patch_size", "embed_dim", "window_size", "mlp_ratio", "qkv_bias", "layer_norm_eps"):
        assert raw[key] == getattr(theirs, key), key
    for key in ("depths", "num_heads", "pretrained_window_sizes"):
        assert list(raw.get(key, [])) == list(getattr(theirs, key, [])), key
    with torch.device("meta"):
        model_class: Any = transformers.AutoModelForImageClassification
        model = model_class.from_config(theirs)
    named = [(canonical_name(key), value) for key, value in model.named_parameters() if not key.endswith(".mask_token")]
    needed = {key: tuple(value.shape) for key, value in named}
    assert needed == parameters(ours)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("swinv2-tinny", "swinv2-tiny"),
        ("Swin_Smal", "swin-small"),
        ("microsoft/swin-tiny-patch4-window7-244", "swin-tiny-patch4-window7-224"),
        ("timm/swinv2_base_window8_265", "swinv2-base-patch4-window8-256"),
    ],
)
def test_a_misspelt_name_is_answered_with_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(UsageError) as caught:
        find_variant(name)
    message = str(caught.value)
    assert f'"{name}"' in message
    assert "`swin-deploy variants`" in message
    suggested = message.split("The nearest names are ")[1].split(". `")[0].split(", ")
    assert nearest in suggested
    assert len(suggested) <= 3


@pytest.mark.parametrize("name", ["", "swin", "swin-base-1k", "microsoft/swin-base-patch4-window7-224-in1k"])
def test_nothing_is_guessed(name: str) -> None:
    """The last is our name for a checkpoint that is not on the hub."""
    with pytest.raises(UsageError):
        find_variant(name)
    with pytest.raises(UsageError, match=r'^No Swin variant is named "resnet50"\. `swin-deploy variants` lists'):
        find_variant("resnet50")


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("swinv2_cr_tiny_ns_224.sw_in1k", "swinv2_cr"),
        ("timm/swinv2_cr_small_224", "swinv2_cr"),
        ("caidas/swin2SR-classical-sr-x2-64", "Swin2SR"),
        ("swinir", "SwinIR"),
        ("SwinIR-M_x4", "SwinIR"),
        ("swin3d_t", "Video Swin"),
        ("video-swin-base", "Video Swin"),
        ("swin_mlp_tiny_c24_patch4_window8_256", "Swin-MLP"),
        ("swin-moe-small", "Swin-MoE"),
        ("facebook/maskformer-swin-base-ade", "MaskFormer"),
        ("google/vit-base-patch16-224", "a Vision Transformer"),
    ],
)
def test_other_families_are_refused_with_what_they_are(name: str, what: str) -> None:
    with pytest.raises(UsageError) as caught:
        find_variant(name)
    assert str(caught.value).startswith(f'"{name}" is ')
    assert what in str(caught.value)
