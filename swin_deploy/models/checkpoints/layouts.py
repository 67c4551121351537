"""Parameter names and axes of each system, turned into the canonical ones: Hugging Face's on disk, without a prefix.

timm, Microsoft and torchvision keep query, key and value in one matrix (rows q, k, v), and downsample where they like:
after the stage (Microsoft, timm up to 0.6), before the next one (timm), or as a layer of its own (torchvision).
TensorFlow keeps (in, out) kernels and HWIO convolutions.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, cast

from torch import Tensor

from swin_deploy.errors import CheckpointError
from swin_deploy.models.checkpoints.base import usable
from swin_deploy.models.checkpoints.qat_state import Quantizer, separated
from swin_deploy.models.checkpoints.stored import FLOATING, Stored, StoredFile
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


System = Literal["hf", "timm", "microsoft", "torchvision", "tf"]

PARTS = ("query", "key", "value")

# Written by nn.DataParallel, torch.compile, and transformers' TimmWrapper.
PREFIXES = ("module.", "_orig_mod.", "timm_model.")

BLOCK = r"encoder\.layers\.\d+\.blocks\.\d+"
BUFFER = re.compile(rf"{BLOCK}\.(attn_mask|relative_position_index|relative_coords_table)")
CANONICAL = re.compile(
    rf"""embeddings\.((patch_embeddings\.projection|norm)\.(weight|bias)|position_embeddings|mask_token)
    | {BLOCK}\.(layernorm_(before|after)|attention\.output\.dense|intermediate\.dense|output\.dense)\.(weight|bias)
    | {BLOCK}\.attention\.self\.((query|key|value)\.(weight|bias)|relative_position_bias_table|logit_scale)
    | {BLOCK}\.attention\.self\.continuous_position_bias_mlp\.(0\.weight|0\.bias|2\.weight)
    | encoder\.layers\.\d+\.downsample\.(reduction\.weight|norm\.(weight|bias))
    | (layernorm|classifier|decoder\.0|hidden_states_norms\.(stem|stage\d+))\.(weight|bias)""",
    re.VERBOSE,
)

# transformers 5 renamed V1's modules; files on disk mostly keep the older names.
HUGGING_FACE = (
    (r"^(swin|swinv2)\.", ""),
    (r"\.attention\.(query|key|value)\.", r".attention.self.\1."),
    (r"\.attention\.q_proj\.", ".attention.self.query."),
    (r"\.attention\.k_proj\.", ".attention.self.key."),
    (r"\.attention\.v_proj\.", ".attention.self.value."),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
    (r"\.attention\.relative_position_bias\.relative_position_bias_table$", ".attention.self.relative_position_bias_table"),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
    (r"\.attention\.(?:self|relative_position_bias)\.(relative_position_index|relative_coords_table)$", r".\1"),
)
TENSORFLOW = (
    (r"^.*?(?:^|/)(swin/(?:embeddings|encoder|layernorm)/.*|(?:classifier|decoder/0)/(?:kernel|bias)):\d+$", r"\1"),
    (r"/", "."),
    (r"\.kernel$", ".weight"),
    (r"\.gamma$", ".weight"),
    (r"\.beta$", ".bias"),
    (r"\.positional_embeddings$", ".position_embeddings"),
    *HUGGING_FACE,
)
# After torchvision's and timm's own steps below, these three systems have the same names.
MICROSOFT = (
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^patch_embed\.norm\.", "embeddings.norm."),
    (r"^absolute_pos_embed$", "embeddings.position_embeddings"),
    (r"^mask_token$", "embeddings.mask_token"),
    (r"^norm\.", "layernorm."),
    (r"^head\.(fc\.)?", "classifier."),
    (r"^layers\.", "encoder.layers."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.attn\.q_bias$", ".attention.self.query.bias"),
    (r"\.attn\.v_bias$", ".attention.self.value.bias"),
    (r"\.attn\.(?:cpb_mlp|rpe_mlp)\.", ".attention.self.continuous_position_bias_mlp."),  # SimMIM's files say rpe_mlp
    (r"\.attn\.(relative_position_index|relative_coords_table)$", r".\1"),
    (r"\.attn\.", ".attention.self."),
)


@dataclass(frozen=True)
class Part:
    """A canonical tensor: what is stored, and how it becomes that tensor."""

    stored: Stored
    name: str  # in the file
    third: int | None = None  # which third of the rows: query, key or value
    axes: tuple[int, ...] | None = None  # the order of the stored axes

    @property
    def shape(self) -> Shape:
        shape = self.stored.shape if self.axes is None else tuple(self.stored.shape[axis] for axis in self.axes)
        return shape if self.third is None else (shape[0] // 3, *shape[1:])

    def read(self, where: str) -> Tensor:
        """The tensor in float32. Raises CheckpointError when it holds NaN or infinity."""
        tensor = self.stored.read()
        if self.third is not None:
            tensor = tensor.chunk(3)[self.third]
        if self.axes is not None:
            tensor = tensor.permute(self.axes)
        return usable(self.name, tensor, where).contiguous()


@dataclass(frozen=True)
class Layout:
    """A file's tensors under canonical names; `buffers` are what the system could compute anew, and tell sizes.

    `quantizers` are what quantisation-aware training left there, under the file's own names (see own_ranges.py).
    """

    system: System
    parts: Mapping[str, Part]
    buffers: Mapping[str, Stored]
    quantizers: list[Quantizer] = field(default_factory=list)

    @property
    def shapes(self) -> dict[str, Shape]:
        return {name: part.shape for name, part in self.parts.items()}


def layout_of(file: StoredFile) -> Layout:
    """The canonical tensors in `file`, with the system that wrote it, which its names tell.

    Raises CheckpointError for another network, for names that no Swin has, and for tensors of a type that weights never are.
    """
    where = str(file.path)
    tensors, quantizers = separated(_without_prefixes(file.tensors))
    tensors = _without_prefixes(tensors, quantizers)
    refuse_other_families({name: stored.shape for name, stored in tensors.items()}, where)
    system = _system(tensors, file.tensorflow, where)
    fused_v2 = system == "torchvision" and any(name.endswith(".logit_scale") for name in tensors)
    parts: dict[str, Part] = {}
    buffers: dict[str, Stored] = {}
    unknown = []
    for name, stored in tensors.items():
        canonical = _canonical(name, system)
        if BUFFER.fullmatch(canonical):
            buffers[canonical] = stored
            continue
        if canonical.endswith(".attention.self.k_bias"):  # timm's V2: a buffer of zeros
            continue
        found = _split(canonical, name, stored, fused_v2, where) if ".self.qkv." in canonical else {}
        if not found and CANONICAL.fullmatch(canonical):
            found = {canonical: Part(stored, name, axes=_axes(name, stored) if system == "tf" else None)}
        if not found:
            unknown.append(name)
        for key, part in found.items():
            if key in parts:
                raise CheckpointError(f"{where} holds {key} twice, as {parts[key].name} and {name}. Expected it once.")
            parts[key] = part
    if unknown:
        raise CheckpointError(
            f"{where} holds {len(unknown)} tensors that no Swin has: {', '.join(unknown[:3])}"
            f"{', ...' if len(unknown) > 3 else ''}. It is another network, or a damaged file."
        )
    for part in parts.values():
        if part.stored.dtype not in FLOATING:
            raise CheckpointError(f"{where}: {part.name} is of type {part.stored.dtype}; expected a floating-point tensor.")
    return Layout(system, parts, buffers, quantizers)


def canonical_layers(layer: str, system: System) -> tuple[str, ...]:
    """The canonical names of a layer of that system's file: three for one that is query, key and value."""
    name = _canonical(f"{layer}.weight", system).removesuffix(".weight")
    return tuple(f"{name.removesuffix('qkv')}{part}" for part in PARTS) if name.endswith(".self.qkv") else (name,)


def _without_prefixes(tensors: Mapping[str, Stored], quantizers: Iterable[Quantizer] = ()) -> Mapping[str, Stored]:
    """The tensors without what all their names begin with, as their `quantizers`; SimMIM puts the network under encoder."""
    for prefix in PREFIXES:
        if tensors and all(name.startswith(prefix) for name in tensors):
            tensors = _without(prefix, tensors, quantizers)
    if "encoder.patch_embed.proj.weight" in tensors:
        tensors = _without("encoder.", tensors, quantizers)
    return tensors


def _without(prefix: str, tensors: Mapping[str, Stored], quantizers: Iterable[Quantizer]) -> Mapping[str, Stored]:
    for one in quantizers:
        one.layer = one.layer.removeprefix(prefix)
    return {name.removeprefix(prefix): stored for name, stored in tensors.items()}


def _system(tensors: Mapping[str, Stored], tensorflow: bool, where: str) -> System:
    if tensorflow and any("/embeddings/patch_embeddings/" in name for name in tensors):
        return "tf"
    if "features.0.0.weight" in tensors and any(".attn.qkv." in name for name in tensors):
        return "torchvision"
    if any(re.match(r"((swin|swinv2)\.)?embeddings\.patch_embeddings\.", name) for name in tensors):
        return "hf"
    if "patch_embed.proj.weight" in tensors and any(name.startswith("layers.0.blocks.0.attn.") for name in tensors):
        before = any(name.startswith("layers.1.downsample.") for name in tensors)
        after = any(name.startswith("layers.0.downsample.") for name in tensors)
        # timm up to 0.6 has Microsoft's names; only the config.json beside it tells.
        return "timm" if "head.fc.weight" in tensors or (before and not after) else "microsoft"
    raise CheckpointError(
        f"{where} holds {len(tensors)} tensors, and not those of a Swin (the first is {next(iter(tensors), 'none')}). Expected "
        f"a checkpoint of Swin V1 or V2 from transformers, timm, Microsoft or torchvision."
    )


def _canonical(name: str, system: System) -> str:
    if system == "torchvision":
        name = _from_torchvision(name)
    elif system == "timm":  # the downsample of stage i + 1 comes before it; here it is stage i's, after it
        name = re.sub(r"^layers\.(\d+)\.downsample\.", lambda m: f"layers.{int(m[1]) - 1}.downsample.", name)
    for pattern, new in {"hf": HUGGING_FACE, "tf": TENSORFLOW}.get(system, MICROSOFT):
        name = re.sub(pattern, new, name)
    return name


def _from_torchvision(name: str) -> str:
    """Microsoft's name of a torchvision parameter: features.0 is the patch embedding, odd layers are stages."""
    name = re.sub(r"^features\.0\.0\.", "patch_embed.proj.", name)
    name = re.sub(r"^features\.0\.2\.", "patch_embed.norm.", name)
    name = re.sub(r"\.mlp\.0\.", ".mlp.fc1.", name)
    name = re.sub(r"\.mlp\.3\.", ".mlp.fc2.", name)
    if match := re.match(r"^features\.(\d{1,4})\.", name):
        layer = int(match[1])
        name = f"layers.{(layer - 1) // 2}.{'blocks' if layer % 2 else 'downsample'}.{name[match.end() :]}"
    return name


def _split(canonical: str, name: str, stored: Stored, without_key_bias: bool, where: str) -> dict[str, Part]:
    """Query, key and value from one matrix, or one bias. torchvision's V2 zeroes the key's bias whatever the file says."""
    if not stored.shape or stored.shape[0] % 3:
        raise CheckpointError(f"{where}: {name} has shape {list(stored.shape)}; expected rows for query, key and value.")
    parts = {canonical.replace(".qkv.", f".{part}."): Part(stored, name, third=i) for i, part in enumerate(PARTS)}
    if without_key_bias:
        parts.pop(canonical.replace(".qkv.bias", ".key.bias"), None)
    return parts if all(CANONICAL.fullmatch(key) for key in parts) else {}


def _axes(name: str, stored: Stored) -> tuple[int, ...] | None:
    if "/kernel:" not in name:
        return None
    return cast("dict[int, tuple[int, ...]]", {2: (1, 0), 4: (3, 2, 0, 1)}).get(len(stored.shape))
