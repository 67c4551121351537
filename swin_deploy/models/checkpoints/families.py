"""Networks that are easily taken for Swin V1 or V2: each is known by a parameter that Swin lacks, and refused by name."""

from __future__ import annotations

import re
from collections.abc import Mapping

from swin_deploy.errors import CheckpointError
from swin_deploy.models.parameters import Shape

# What a parameter's name shows. The first that matches counts.
MARKS = tuple(
    (re.compile(pattern), what)
    for pattern, what in (
        # OpenMMLab's downsample takes nn.Unfold's order of channels (mmdet/models/utils/ckpt_convert.py, swin_converter):
        # the same names with other weights, which a loader that goes by names would take and get wrong.
        (
            r"\.w_msa\.|\.ffn\.layers\.",
            "OpenMMLab's Swin (mmdetection, mmsegmentation, mmpretrain), whose patch merging orders its channels otherwise",
        ),
        (r"\.attn\.meta_mlp\.", "timm's swinv2_cr, a different network from Swin V2"),
        (r"^swin2sr\.|^first_convolution\.", "Swin2SR, an image super-resolution network"),
        (r"^conv_first\.|\.residual_group\.", "SwinIR or Swin2SR, which restore images"),
        (r"\.spatial_mlp\.", "Swin-MLP, which has multi-layer perceptrons in place of attention"),
        (r"\.(_moe_layer|moe_layer)\.|\.experts\.", "Swin-MoE, a mixture of experts"),
        (r"^swinViT\.", "Swin UNETR, a network for volumes"),
        (r"pixel_level_module\.", "MaskFormer or Mask2Former, a segmentation network"),
        (r"^decoder\.model\.decoder\.", "Donut, a document reader"),
        (
            r"^(neck|rpn_head|roi_head|bbox_head|decode_head|auxiliary_head)\.|^backbone\.",
            "a detector or a segmentation network that has a Swin inside",
        ),
        (r"(^|\.)cls_token$", "a Vision Transformer"),
    )
)
PATCH_WEIGHTS = ("patch_embed.proj.weight", "features.0.0.weight", "backbone.patch_embed.proj.weight")


def refuse_other_families(shapes: Mapping[str, Shape], where: str) -> None:
    """Raises CheckpointError, naming the network, when `shapes` (name -> shape) are those of another network than Swin."""
    if any(len(shapes.get(name, ())) == 5 for name in PATCH_WEIGHTS):
        raise refusal(where, "Video Swin, a network for video with three-dimensional windows")
    for mark, what in MARKS:
        if any(mark.search(name) for name in shapes):
            raise refusal(where, what)


def refusal(where: str, what: str) -> CheckpointError:
    """The error that says that `where` holds `what`."""
    return CheckpointError(f"{where} is {what}. swin-deploy takes image encoders and classifiers of Swin V1 and V2.")
