"""Maps the parameter names and axes of every framework to the canonical ones, and recognises who wrote a state dict.

Canonical names are those of Hugging Face files on disk, without the prefix. timm, Microsoft's code and torchvision store
query, key and value in one matrix (rows q, k, v). They put the downsampling after the stage (Microsoft, timm up to 0.6),
before the next stage (timm), or into a layer of its own (torchvision). TensorFlow has (in, out) kernels and HWIO convolutions.
OpenMMLab merges patches with nn.Unfold, which orders channels before places.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from swin_deploy.errors import CheckpointError
from swin_deploy.models.parameters import POSITIONS, Shape
from swin_deploy.qat_ranges import PARTS

from .base import FLOATING, Stored, StoredFile
from .parent_models import ParentModel, parent_from_names
from .swin_in_file import ASIDE, LEAF, FoundHead, FoundSwin, find_head, find_swin, plain_names

# Parameter names of other networks. The first match counts.
OTHER_NETWORKS = tuple(
    (re.compile(pattern), what)
    for pattern, what in (
        (r"\.attn\.meta_mlp\.", "timm's swinv2_cr, a different network from Swin V2"),
        (r"(^|\.)(swin2sr|first_convolution)\.", "Swin2SR, an image super-resolution network"),
        (r"(^|\.)(conv_first|residual_group)\.", "SwinIR or Swin2SR, which restore images"),
        (r"\.spatial_mlp\.", "Swin-MLP, which has multi-layer perceptrons in place of attention"),
        (r"\.(_moe_layer|moe_layer)\.|\.experts\.", "Swin-MoE, a mixture of experts"),
        (r"(^|\.)swinViT\.", "Swin UNETR, a network for volumes"),
        (
            r"(^|\.)(tscam_conv|logmel_extractor|audio_encoder)\.",
            "HTSAT or CLAP, an audio encoder: a Swin with a batch norm and a reshaped spectrogram before it",
        ),
        (r"(^|\.)cls_token$", "a Vision Transformer"),
    )
)
PATCH_WEIGHTS = re.compile(r"(.*\.)?(patch_embed\.proj|features\.0\.0)\.weight")
COUNTERS = re.compile(r"(.*\.)?(total_ops|total_params)")  # thop adds them to every module

Writer = Literal["hf", "timm", "microsoft", "torchvision", "tf", "openmmlab"]

# Tensors of fake-quantization modules: torch.ao, pytorch-quantization and NVIDIA ModelOpt (see qat_state.py).
QUANTIZER_TENSOR = re.compile(
    r"""(?:(?P<layer>.+?)\.)??
    (?P<what>weight_fake_quant | (?:quant\.)?activation_post_process(?:_\d+)? | _?\w+_quantizer)
    \.(?:activation_post_process\.)?(?P<field>[\w.]+)""",
    re.VERBOSE,
)
ROLES = {"weight_fake_quant": "weight", "activation_post_process": "output", "quant.activation_post_process": "input"}
ROLES |= {f"{sign}{role}_quantizer": role for sign in ("", "_") for role in ("input", "output", "weight")}

BLOCK = r"encoder\.layers\.\d+\.blocks\.\d+"
FP8_SCALE = re.compile(r"(.+\.weight)_scale(?:_inv)?|.+\.(?:input|activation)_scale")
FP8_EXPECTED = (
    "expected a floating-point tensor of 16 bits or more, or its scale. Save the weights before they are converted: "
    "model.to(torch.bfloat16).save_pretrained(FOLDER)"
)
IN_SWIN = re.compile(r"(encoder|embeddings|patch_embed|features)\.|(absolute_pos_embed|mask_token)$")
BUFFER = re.compile(rf"{BLOCK}\.(attn_mask|relative_position_index|relative_coords_table)")
CANONICAL = re.compile(
    rf"""embeddings\.((patch_embeddings\.projection|norm)\.(weight|bias)|position_embeddings|mask_token)
    | {BLOCK}\.(layernorm_(before|after)|attention\.output\.dense|intermediate\.dense|output\.dense)\.(weight|bias)
    | {BLOCK}\.attention\.self\.((query|key|value)\.(weight|bias)|relative_position_bias_table|logit_scale)
    | {BLOCK}\.attention\.self\.continuous_position_bias_mlp\.(0\.weight|0\.bias|2\.weight)
    | encoder\.layers\.\d+\.downsample\.(reduction\.weight|norm\.(weight|bias))
    | (layernorm|classifier(\.\d+)?|decoder\.0|hidden_states_norms\.(stem|stage\d+))\.(weight|bias)""",
    re.VERBOSE,
)

# OpenMMLab's names -> Microsoft's
OPENMMLAB = (
    (r"^stages\.", "layers."),
    (r"^patch_embed\.projection\.", "patch_embed.proj."),
    (r"\.attn\.w_msa\.", ".attn."),
    (r"\.ffn\.layers\.0\.0\.", ".mlp.fc1."),
    (r"\.ffn\.layers\.1\.", ".mlp.fc2."),
)
NUMBERED_NORM = re.compile(r"(?:hidden_states_norms\.|norm)(\d)\.(weight|bias)")

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
TENSORFLOW_AXES: dict[int, tuple[int, ...]] = {2: (1, 0), 4: (3, 2, 0, 1)}  # of kernels, by number of axes
# After the renaming in _canonical, torchvision and timm have these names, too.
MICROSOFT = (
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^patch_embed\.norm\.", "embeddings.norm."),
    (r"^absolute_pos_embed$", "embeddings.position_embeddings"),
    (r"^mask_token$", "embeddings.mask_token"),
    (r"^norm\.", "layernorm."),
    (r"^head\.(fc\.)?(?=\w+$)", "classifier."),
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
class CanonicalTensor:
    """A stored tensor, and how it becomes the canonical one."""

    stored: Stored
    name: str  # in the file
    third: int | None = None  # the third of the rows to take: query, key or value
    axes: tuple[int, ...] | None = None  # the order of the stored axes
    change: Callable[[Tensor], Tensor] | None = None  # another order of its numbers
    changed: Shape | None = None  # the shape after `change`, if it differs
    scale: Stored | None = None  # of fp8 weights: for all of them, for each row, or for each block

    @property
    def shape(self) -> Shape:
        shape = self.stored.shape if self.axes is None else tuple(self.stored.shape[axis] for axis in self.axes)
        if self.changed is not None:
            return self.changed
        return shape if self.third is None else (shape[0] // 3, *shape[1:])

    def read(self, where: str) -> Tensor:
        """Load the tensor in float32. Raises CheckpointError if it holds NaN or infinity."""
        tensor = self.stored.read()
        if self.scale is not None:
            tensor = tensor.to(torch.float32) * _repeated(self.scale.read().to(torch.float32), self.stored.shape)
        if self.third is not None:
            tensor = tensor.chunk(3)[self.third]
        if self.axes is not None:
            tensor = tensor.permute(self.axes)
        if self.change is not None:
            tensor = self.change(tensor)
        tensor = tensor.to(torch.float32)
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{where}: {self.name} holds NaN or infinity. The file is damaged, or its training diverged.")
        return tensor.contiguous()


def _repeated(scale: Tensor, shape: Shape) -> Tensor:
    """A scale for each row, or for each block of a matrix, as one for each number."""
    for axis in range(scale.dim()):
        scale = scale.repeat_interleave(-(-shape[axis] // max(scale.shape[axis], 1)), axis).narrow(axis, 0, shape[axis])
    return scale.reshape(scale.shape + (1,) * (len(shape) - scale.dim())) if scale.dim() else scale


@dataclass
class QuantizerState:
    """The tensors of one fake-quantization module, observer or quantizer on `layer` (its name in the file)."""

    layer: str
    what: str
    tensors: dict[str, Stored] = field(default_factory=dict)

    @property
    def role(self) -> str | None:
        """What it quantizes: the "input", "output" or "weight" of its layer. None if its name does not determine that."""
        return ROLES.get(self.what)

    @property
    def name(self) -> str:
        return f"{self.layer}.{self.what}" if self.layer else self.what


@dataclass(frozen=True)
class CanonicalStateDict:
    """The tensors of a file under canonical names."""

    writer: Writer
    tensors: Mapping[str, CanonicalTensor]
    buffers: Mapping[str, Stored]  # constants of the network; their shapes contain window and image sizes
    quantizers: list[QuantizerState] = field(default_factory=list)  # of quantization-aware training, see qat_state.py
    notes: tuple[str, ...] = ()
    other_head: str = ""  # tensors of a head that is not only linear layers in a row
    head_between: bool = False  # whether something without parameters is between the linear layers of the head
    parent: ParentModel | None = None  # the model around the Swin
    features_only: bool = False  # whether it is timm's network for feature maps

    @property
    def shapes(self) -> dict[str, Shape]:
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    def layers(self, layer: str) -> tuple[str, ...]:
        """Canonical names of a layer in the file: three if it computes query, key and value together."""
        name = _canonical(f"{layer}.weight", self.writer).removesuffix(".weight")
        return tuple(f"{name.removesuffix('qkv')}{part}" for part in PARTS) if name.endswith(".self.qkv") else (name,)


def canonical_state_dict(
    file: StoredFile, weights_key: str | None = None, parent: ParentModel | None = None
) -> CanonicalStateDict:
    """Find the Swin in `file`, rename its tensors canonically, and recognise from their names what wrote it.

    `weights_key` chooses one of several Swins in the file (see `find_swin`). `parent` is the model around it, if it is known.
    """
    where = str(file.path)
    swin, quantizers = FoundSwin("", file.tensors, {}), list[QuantizerState]()
    if not file.tensorflow:
        plain, quantizers = split_quantizers(plain_names(file.tensors, where))
        swin = find_swin(plain, weights_key, where)
    for one in quantizers:
        one.layer = one.layer.removeprefix(swin.prefix)
    _refuse_other_networks({f"{swin.prefix}{name}": stored for name, stored in swin.tensors.items()}, where)
    writer = _writer(swin.tensors, file.tensorflow, where)
    version = 2 if any(name.endswith(".logit_scale") for name in swin.tensors) else 1
    fused_v2 = writer == "torchvision" and version == 2
    tensors: dict[str, CanonicalTensor] = {}
    buffers: dict[str, Stored] = {}
    rest: dict[str, Stored] = {}  # heads, and what is not of the Swin
    unknown = []
    scales = {match[1]: stored for name, stored in swin.tensors.items() if (match := FP8_SCALE.fullmatch(name))}
    norms = _norm_names(swin.tensors, writer)
    for name, stored in swin.tensors.items():
        if FP8_SCALE.fullmatch(name):
            continue
        if name in norms:
            _add(tensors, {canonical: CanonicalTensor(stored, name) for canonical in norms[name]}, where)
            continue
        canonical = _canonical(name, writer, version)
        if BUFFER.fullmatch(canonical):
            buffers[canonical] = stored
            continue
        if canonical.endswith(".attention.self.k_bias"):  # timm's V2: a buffer of zeros
            continue
        found = _split(canonical, name, stored, fused_v2, where) if ".self.qkv." in canonical else {}
        of_head = canonical.startswith("classifier.") and writer != "tf"
        if not found and CANONICAL.fullmatch(canonical) and not of_head:
            axes = TENSORFLOW_AXES.get(len(stored.shape)) if writer == "tf" and "/kernel:" in name else None
            found = {canonical: _reordered(CanonicalTensor(stored, name, axes=axes), canonical, writer, version)}
        if not found and not of_head and IN_SWIN.match(canonical) and not COUNTERS.fullmatch(name):
            unknown.append(name)
        elif not found:
            rest[name] = stored
        _add(tensors, found, where)
    unknown += rest if writer == "tf" else ()
    if unknown:
        raise CheckpointError(
            f"{where} holds {len(unknown)} tensors that no Swin has: {', '.join(unknown[:3])}"
            f"{', ...' if len(unknown) > 3 else ''}. It is another network, or a damaged file."
        )
    width = max((t.shape[0] for name, t in tensors.items() if name.endswith(".output.dense.weight") and t.shape), default=0)
    head = find_head(rest, swin.outside, swin.prefix, width) if parent is None else None
    if parent is None and not (head and head.layers):
        parent = parent_from_names((swin.prefix, *swin.outside, *(f"{swin.prefix}{name}" for name in rest)))
    head = head if parent is None else None
    layers = head.layers if head else ()
    for place, layer in enumerate(layers):
        name = "classifier" if len(layers) == 1 else f"classifier.{place}"
        _add(tensors, {f"{name}.{leaf}": CanonicalTensor(stored, at) for leaf, (at, stored) in layer.items()}, where)
    used = {at for layer in layers for at, _ in layer.values()}
    left = {name: stored for name, stored in {**rest, **swin.outside}.items() if name not in used}
    other_head = head.note if head and not layers else ""
    if head is None and parent is None:  # layers under names that no classifier has
        other = [name for name, stored in left.items() if LEAF.search(name) and len(stored.shape) > 1]
        other_head = ", ".join([name for name in other if not ASIDE.fullmatch(name)][:3])
    for name, tensor in tensors.items():
        fp8 = re.match("float8|F8", tensor.stored.dtype)
        if fp8 and (scale := scales.get(tensor.name)):
            whole = tensor.stored.shape
            if len(scale.shape) > len(whole) or not all(0 < n <= of for n, of in zip(scale.shape, whole, strict=False)):
                raise CheckpointError(f"{where}: the scale of {tensor.name} has shape {list(scale.shape)} for {list(whole)}.")
            tensors[name] = replace(tensor, scale=scale)
        elif tensor.stored.dtype not in FLOATING:
            expected = FP8_EXPECTED if fp8 else "expected a floating-point tensor."
            raise CheckpointError(f"{where}: {tensor.name} is of type {tensor.stored.dtype}; {expected}")
    return CanonicalStateDict(
        writer,
        tensors,
        buffers,
        quantizers,
        notes=swin.notes + (_notes_on_rest(list(left), head) if parent is None else ()),
        other_head=other_head,
        head_between=bool(head and head.between),
        parent=parent and replace(parent, prefix=swin.prefix.rstrip("."), left=len(left)),
        features_only=writer == "timm" and any(name.startswith("layers_") for name in swin.tensors),
    )


def _add(tensors: dict[str, CanonicalTensor], found: Mapping[str, CanonicalTensor], where: str) -> None:
    for key, tensor in found.items():
        if key in tensors:
            raise CheckpointError(f"{where} holds {key} twice, as {tensors[key].name} and {tensor.name}. Expected it once.")
        tensors[key] = tensor


def _notes_on_rest(left: list[str], head: FoundHead | None) -> tuple[str, ...]:
    notes = (head.note,) if head and head.layers and head.note else ()
    if not left:
        return notes
    some = ", ".join(left[:4]) + (", ..." if len(left) > 4 else "")
    what = (
        "1 tensor that is not part of the Swin is"
        if len(left) == 1
        else f"{len(left)} tensors that are not part of the Swin are"
    )
    return (*notes, f"{what} left out: {some}")


def _norm_names(tensors: Mapping[str, Stored], writer: Writer) -> dict[str, tuple[str, ...]]:
    """The canonical names of the numbered norms of feature maps.

    transformers may number only the stages that it outputs: then their widths show the stage. A single norm of OpenMMLab is
    also the final norm.
    """
    found = {name: match for name in tensors if (match := NUMBERED_NORM.fullmatch(name))}
    if not found or writer not in ("hf", "microsoft", "openmmlab"):
        return {}
    numbers = {match[1] for match in found.values()}
    first = next((stored.shape for name, stored in tensors.items() if name.endswith("projection.weight")), ())
    stages = len({name.split(".blocks.")[0] for name in tensors if ".blocks." in name})
    names: dict[str, tuple[str, ...]] = {}
    for name, match in found.items():
        number = int(match[1])
        if writer == "hf" and len(numbers) < stages and first and tensors[name].shape:
            number = (tensors[name].shape[0] // max(first[0], 1)).bit_length() - 1
        names[name] = (f"hidden_states_norms.stage{number + 1}.{match[2]}",)
        if writer == "openmmlab" and len(numbers) == 1:
            names[name] += (f"layernorm.{match[2]}",)
    return names


def _reordered(tensor: CanonicalTensor, canonical: str, writer: Writer, version: int) -> CanonicalTensor:
    """Put the numbers of a tensor into the canonical order.

    nn.Unfold gives channel 0 of the four neighbours, then channel 1; elsewhere it is all channels of one neighbour, then of
    the next. The norm of V2 comes after the merge. Position embeddings of Microsoft's detectors are maps.
    """
    shape = tensor.stored.shape
    merges = canonical.endswith("reduction.weight") or (version == 1 and ".downsample.norm." in canonical)
    if writer == "openmmlab" and merges:
        return replace(tensor, change=_from_unfold)
    if canonical == POSITIONS and len(shape) == 4:
        return replace(
            tensor, change=lambda stored: stored.flatten(2).transpose(1, 2), changed=(shape[0], shape[2] * shape[3], shape[1])
        )
    return tensor


def _from_unfold(stored: Tensor) -> Tensor:
    return stored.reshape(*stored.shape[:-1], -1, 4)[..., [0, 2, 1, 3]].transpose(-1, -2).flatten(-2)


def _refuse_other_networks(tensors: Mapping[str, Stored], where: str) -> None:
    video = any(len(stored.shape) == 5 and PATCH_WEIGHTS.fullmatch(name) for name, stored in tensors.items())
    found = [what for pattern, what in OTHER_NETWORKS if any(pattern.search(name) for name in tensors)]
    found += ["Video Swin, a network for video with three-dimensional windows"] if video else []
    if found:
        raise CheckpointError(f"{where} is {found[0]}. swin-deploy supports image encoders and classifiers of Swin V1 and V2.")


def _writer(tensors: Mapping[str, Stored], tensorflow: bool, where: str) -> Writer:
    if tensorflow and any("/embeddings/patch_embeddings/" in name for name in tensors):
        return "tf"
    if "features.0.0.weight" in tensors and any(".attn.qkv." in name for name in tensors):
        return "torchvision"
    if any(re.match(r"((swin|swinv2)\.)?embeddings\.patch_embeddings\.", name) for name in tensors):
        return "hf"
    if "patch_embed.projection.weight" in tensors and any(name.startswith("stages.0.blocks.0.attn.w_msa.") for name in tensors):
        return "openmmlab"
    if "patch_embed.proj.weight" in tensors and any(name.startswith("layers_0.blocks.0.attn.") for name in tensors):
        return "timm"  # with features_only=True
    if "patch_embed.proj.weight" in tensors and any(name.startswith("layers.0.blocks.0.attn.") for name in tensors):
        before = any(name.startswith("layers.1.downsample.") for name in tensors)
        after = any(name.startswith("layers.0.downsample.") for name in tensors)
        # timm up to 0.6 has the names of Microsoft's code. Only its config.json distinguishes it.
        return "timm" if "head.fc.weight" in tensors or (before and not after) else "microsoft"
    raise CheckpointError(
        f"{where} holds {len(tensors)} tensors, and not those of a Swin (the first is {next(iter(tensors), 'none')}). Expected "
        f"a checkpoint of Swin V1 or V2 from transformers, timm, Microsoft's code, torchvision or OpenMMLab."
    )


def _canonical(name: str, writer: Writer, version: int = 1) -> str:
    if writer == "torchvision":
        name = _from_torchvision(name)
    elif writer == "timm":
        name = re.sub(r"^layers_(?=\d+\.)", "layers.", name)
    elif writer == "openmmlab":
        for pattern, new in OPENMMLAB:
            name = re.sub(pattern, new, name)
    if writer == "timm" or (writer == "openmmlab" and version == 2):  # they downsample at the start of stage i + 1, not after i
        name = re.sub(r"^layers\.(\d+)\.downsample\.", lambda m: f"layers.{int(m[1]) - 1}.downsample.", name)
    for pattern, new in {"hf": HUGGING_FACE, "tf": TENSORFLOW}.get(writer, MICROSOFT):
        name = re.sub(pattern, new, name)
    return name


def _from_torchvision(name: str) -> str:
    """Microsoft's name of a torchvision parameter. features.0 is the patch embedding, and odd layers are stages."""
    name = re.sub(r"^features\.0\.([02])\.", lambda m: f"patch_embed.{'norm' if m[1] == '2' else 'proj'}.", name)
    name = re.sub(r"\.mlp\.([03])\.", lambda m: f".mlp.fc{2 if m[1] == '3' else 1}.", name)
    if match := re.match(r"^features\.(\d{1,4})\.", name):
        layer = int(match[1])
        name = f"layers.{(layer - 1) // 2}.{'blocks' if layer % 2 else 'downsample'}.{name[match.end() :]}"
    return name


def _split(canonical: str, name: str, stored: Stored, without_key_bias: bool, where: str) -> dict[str, CanonicalTensor]:
    """Split one matrix or bias into query, key and value. torchvision's V2 ignores the key bias in its files."""
    if not stored.shape or not stored.shape[0] or stored.shape[0] % 3:
        raise CheckpointError(f"{where}: {name} has shape {list(stored.shape)}; expected rows for query, key and value.")
    parts = {
        canonical.replace(".qkv.", f".{part}."): CanonicalTensor(stored, name, third=third) for third, part in enumerate(PARTS)
    }
    if without_key_bias:
        parts.pop(canonical.replace(".qkv.bias", ".key.bias"), None)
    return parts if all(CANONICAL.fullmatch(key) for key in parts) else {}


def split_quantizers(tensors: Mapping[str, Stored]) -> tuple[Mapping[str, Stored], list[QuantizerState]]:
    """Separate weights from the tensors of quantizers. The names of layers inside a QuantWrapper become the plain ones."""
    found: dict[tuple[str, str], QuantizerState] = {}
    weights: dict[str, Stored] = {}
    for name, stored in tensors.items():
        if match := QUANTIZER_TENSOR.fullmatch(name):
            key = (match["layer"] or "", match["what"])
            found.setdefault(key, QuantizerState(*key)).tensors[match["field"]] = stored
        else:
            weights[name] = stored
    wrapped = {one.layer for one in found.values() if one.what == "quant.activation_post_process"}
    for one in found.values():
        one.layer = _unwrapped(one.layer, wrapped)
    return {_unwrapped(name, wrapped): stored for name, stored in weights.items()}, list(found.values())


def _unwrapped(name: str, wrapped: set[str]) -> str:
    parts = name.split(".") if wrapped else []
    for layer in (".".join(parts[:count]) for count in range(len(parts))):
        inside = f"{layer}.module" if layer else "module"
        if layer in wrapped and (name == inside or name.startswith(f"{inside}.")):
            return f"{layer}{name[len(inside) :]}".removeprefix(".")
    return name
