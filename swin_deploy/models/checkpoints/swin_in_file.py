"""Finds the Swin among all tensors of a file: the prefix of its names, which copy of the weights is meant, and its head."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from swin_deploy.errors import CheckpointError, UsageError

from .base import Stored

# Parts that torch.compile, FSDP, activation checkpointing and DeepSpeed insert into names.
INSERTED = re.compile(r"(?:(?<=\.)|^)_(?:orig_mod|fsdp_wrapped_module|fpw_module|checkpoint_wrapped_module|forward_module)\.")

# The patch embedding and the first block, as Microsoft's code and timm, transformers, torchvision and OpenMMLab name them.
FAMILIES = tuple(
    tuple(re.compile(rf"((?:[^.]+\.)*?){pattern}") for pattern in patterns)
    for patterns in (
        (r"patch_embed\.proj\.weight$", r"layers[._]0\.blocks\.0\."),
        (
            r"(?:swin\.|swinv2\.)?embeddings\.patch_embeddings\.projection\.weight$",
            r"(?:swin\.|swinv2\.)?encoder\.layers\.0\.blocks\.0\.",
        ),
        (r"features\.0\.0\.weight$", r"features\.1\.0\.attn\."),
        (r"patch_embed\.projection\.weight$", r"stages\.0\.blocks\.0\.attn\.w_msa\."),
    )
)
MOST_SWINS = 10  # each is compared with all others
# Names of averaged weights, and of copies that are not the trained network itself.
AVERAGED = re.compile(
    r"(?:.*[._])?(?:(?:model|net|student)?ema(?:model|net)?|teacher|averaged?|avg|swa|shadow)(?:[._].*)?", re.IGNORECASE
)
COPIES = re.compile(r"(?:.*[._])?(?:momentum|target|k|current)(?:[._].*)?", re.IGNORECASE)

# Weights that need more than a Swin: pattern of a name, what it is, how to get plain weights.
NOT_PLAIN = (
    (
        re.compile(r"(?:.*\.)?(?:lora_|ia3_|hada_|lokr_|oft_|boft_|vera_|base_layer\.|modules_to_save\.)"),
        "adapter weights (PEFT, LoRA) that are not merged",
        "Merge them and save the whole model: model.merge_and_unload().save_pretrained(FOLDER)",
    ),
    (
        re.compile(r".*\.(?:SCB|weight_format|quant_state\..+|(?:nested_)?(?:absmax|quant_map))$"),
        "weights that bitsandbytes quantized",
        "Save them in floating point: model.dequantize().save_pretrained(FOLDER)",
    ),
)
HEAD = re.compile(r"(?:(?!aux|dist|proj|rot|ssl)[a-z]+_)?(?:heads?|classifier|fc|cls|linear|logits|mlp)\d*", re.IGNORECASE)
OWN_HEADS = ("head", "classifier")  # of the frameworks
NETWORK = re.compile(
    r"(?:swin\.|swinv2\.)?(?:patch_embed|layers|stages|norm|features|embeddings|encoder|layernorm|head|classifier|fc)[._]"
)
LEAF = re.compile(r"\.(weight|bias|running_(mean|var))$")
# What a trainer adds that does not change the logits.
ASIDE = re.compile(
    r".*(loss|criterion|metric|accuracy|auroc|cent(er|re)|queue|counter|aux|proj|predictor|decoder|dist|ema|optimizer).*",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class FoundSwin:
    """The tensors of one Swin by their names after `prefix`, and the tensors of the model around it."""

    prefix: str
    tensors: Mapping[str, Stored]
    outside: Mapping[str, Stored]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class FoundHead:
    """Linear layers in a row. `layers` are their names in the file; what is between them is not in the file."""

    layers: tuple[Mapping[str, tuple[str, Stored]], ...]  # "weight" and "bias" -> name in the file, tensor
    between: bool = False  # whether something without parameters, such as an activation, is between two layers
    note: str = ""


def plain_names(tensors: Mapping[str, Stored], where: str) -> dict[str, Stored]:
    """Remove the parts that wrappers insert into names. Raises CheckpointError for weights that need more than a Swin."""
    for pattern, what, fix in NOT_PLAIN:
        if name := next(filter(pattern.match, tensors), None):
            raise CheckpointError(f"{where} holds {what} ({name}). {fix}")
    plain = {INSERTED.sub("", name): stored for name, stored in tensors.items()}
    if len(plain) < len(tensors):
        twice = [name for name in tensors if INSERTED.sub("", name) != name and INSERTED.sub("", name) in tensors]
        raise CheckpointError(f"{where} holds {INSERTED.sub('', twice[0])} twice, also as {twice[0]}. Expected it once.")
    return plain


def find_swin(tensors: Mapping[str, Stored], key: str | None, where: str) -> FoundSwin:
    """Find the Swin in the tensors of a file, in any dictionary and under any prefix.

    Averaged weights (EMA) are preferred to the plain ones. `key` names others: a part of their prefix, or "ema" or "model".
    """
    prefixes = list(dict.fromkeys(prefix for patterns in FAMILIES for prefix in _prefixes(tensors, *patterns)))
    if len(prefixes) > MOST_SWINS:
        raise CheckpointError(f"{where} holds {len(prefixes)} Swins. Expected at most {MOST_SWINS}.")
    if not prefixes:
        if key is not None:
            raise UsageError(f"{where} holds no Swin under {key}. Leave out --weights-key.")
        return FoundSwin("", tensors, {})
    under = {prefix: _under(prefix, prefixes, tensors) for prefix in prefixes}
    chosen, note = _chosen(under, key, where)
    inside = under[chosen]
    others = [_difference(prefix, chosen) for prefix in prefixes if prefix != chosen]
    first = f"{chosen.split('.')[0]}."
    outside = {
        name: stored
        for name, stored in tensors.items()
        if chosen and not name.startswith((chosen, *others)) and (key is None or name.startswith(first))
    }
    if chosen.endswith("encoder."):  # Microsoft's SimMIM has its decoder beside the encoder
        decoder = f"{chosen.removesuffix('encoder.')}decoder.0."
        for name in [name for name in outside if name.startswith(decoder)]:
            inside[f"decoder.0.{name.removeprefix(decoder)}"] = outside.pop(name)
    norms = f"{chosen.removesuffix('model.')}hidden_states_norms."  # MaskFormer's Swin has them beside its network
    for name in [name for name in outside if chosen.endswith("model.") and name.startswith(norms)]:
        inside[f"hidden_states_norms.{name.removeprefix(norms)}"] = outside.pop(name)
    return FoundSwin(chosen, inside, outside, (note,) if note else ())


def _prefixes(tensors: Mapping[str, Stored], patch: re.Pattern[str], block: re.Pattern[str]) -> Iterator[str]:
    blocks = {match[1] for name in tensors if (match := block.match(name))}
    for name in tensors:
        if (match := patch.match(name)) and match[1] in blocks:
            yield match[1]


def _under(prefix: str, prefixes: list[str], tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    """The tensors after `prefix`, without those of other Swins."""
    deeper = tuple(other for other in prefixes if other != prefix and other.startswith(prefix))
    return {
        name[len(prefix) :]: stored
        for name, stored in tensors.items()
        if name.startswith(prefix) and not (deeper and name.startswith(deeper))
    }


def _difference(prefix: str, chosen: str) -> str:
    """`prefix` up to the first part in which it differs from `chosen`."""
    parts = prefix.split(".")
    same = next((i for i, (a, b) in enumerate(zip(parts, chosen.split("."), strict=False)) if a != b), len(parts) - 1)
    return ".".join(parts[: same + 1]) + "."


def _chosen(under: Mapping[str, Mapping[str, Stored]], key: str | None, where: str) -> tuple[str, str]:
    """The prefix of the weights to load, and a note if there are others."""
    names = {prefix: prefix.rstrip(".") or "the top level" for prefix in under}
    groups = [[p for p in under if AVERAGED.fullmatch(p)], [], [p for p in under if COPIES.fullmatch(p)]]
    groups[2] = [p for p in groups[2] if p not in groups[0]]
    groups[1] = [p for p in under if p not in groups[0] + groups[2]]
    if key is not None:
        wanted = f".{key.strip('.')}."
        found = [p for p in under if f".{p}" == wanted] or [p for p in under if wanted in f".{p}"]
        found = found or {"ema": groups[0], "model": groups[1]}.get(key, [])
        if not found:
            raise UsageError(f"{where} holds no Swin under {key}. Expected one of {', '.join(names.values())}.")
        groups = [found]
    best = next(group for group in groups if group)
    best = [p for i, p in enumerate(best) if not any(_equal(under[p], under[q]) for q in best[:i])]
    left = [p for p in under if p not in best and not _equal(under[p], under[best[0]])]
    if key is not None:
        left = []
    differs = any(_shapes(under[p]) != _shapes(under[best[0]]) for p in left)
    if len(best) > 1 or differs:
        raise CheckpointError(
            f"{where} holds {len(names)} Swins: {', '.join(names.values())}. Choose one with --weights-key, for example "
            f"--weights-key {names[best[0]].rsplit('.', 1)[-1] if best[0] else 'model'}"
        )
    if not left:
        return best[0], f"the weights under {names[best[0]]} are used, by --weights-key" if key else ""
    kind = "averaged weights (EMA)" if AVERAGED.fullmatch(best[0]) else "weights"
    return best[0], (
        f"the {kind} under {names[best[0]]} are used, and not those under {', '.join(names[p] for p in left)}; "
        f"--weights-key chooses others"
    )


def _shapes(tensors: Mapping[str, Stored]) -> dict[str, tuple[int, ...]]:
    """The shapes of the network and its head, without what a trainer adds to one of several copies."""
    return {name: stored.shape for name, stored in tensors.items() if stored.shape and NETWORK.match(name)}


def _equal(one: Mapping[str, Stored], other: Mapping[str, Stored]) -> bool:
    """Return whether both are the same weights, as of one module with two names."""
    return _shapes(one) == _shapes(other) and all(torch.equal(one[name].read(), other[name].read()) for name in _shapes(one))


def find_head(inside: Mapping[str, Stored], outside: Mapping[str, Stored], prefix: str, width: int) -> FoundHead | None:
    """Find the classification head: linear layers in a row, the first one with `width` inputs, in or around the Swin.

    None without one. `layers` is empty if there is a head that is something else; its note says what.
    """
    own = {f"{prefix}{root}": group for root, group in _heads(inside).items()}
    groups = _heads(outside, prefix) | own
    root = next((f"{prefix}{name}" for name in OWN_HEADS if f"{prefix}{name}" in own), None)
    note = ""
    if root is not None:
        head = _chain(own[root], width) or _chain(own[root], None)
        if head is None:
            return FoundHead((), note=", ".join(list(own[root])[:3]))
    else:
        chains: dict[str, FoundHead] = {}
        for depth in range(prefix.count("."), -1, -1):  # the nearest first
            near = "".join(f"{part}." for part in prefix.split(".")[:depth])
            found = {at: chain for at, group in groups.items() if at.startswith(near) and (chain := _chain(group, width))}
            chains = chains or found
        if not chains:
            return None
        heads = {name for group in groups.values() for name in group}
        others = [n for n in (*inside, *outside) if LEAF.search(n) and n not in heads and not ASIDE.fullmatch(n)]
        exact = [at for at in chains if at.split(".")[-1] in ("fc", *OWN_HEADS)]
        if others or (len(chains) > 1 and len(exact) != 1):  # the head may be applied to the output of others
            return FoundHead((), note=", ".join(others[:3] or chains))
        root = (exact or list(chains))[0]
        head, note = chains[root], f"the head is {root}, by its name and its shape"
    layers, between = head.layers, head.between
    rest = {at: group for at, group in groups.items() if at != root}
    while (outputs := layers[-1]["weight"][1].shape[0]) != width:
        follows = {at: chain for at, group in rest.items() if (chain := _chain(group, outputs))}
        if len(follows) > 1:
            return FoundHead((), note=", ".join([root, *follows]))
        if not follows:
            break
        for at, chain in follows.items():
            layers, between = layers + chain.layers, True
            del rest[at]
    return FoundHead(layers, between, note)


def _heads(tensors: Mapping[str, Stored], prefix: str = "") -> dict[str, dict[str, Stored]]:
    """Path of a module that is named like a head -> its tensors by their whole names. Modules around `prefix` are no heads."""
    found: dict[str, dict[str, Stored]] = {}
    for name, stored in tensors.items():
        parts = name.split(".")
        paths = [
            ".".join(parts[: i + 1]) for i, p in enumerate(parts[:-1]) if HEAD.fullmatch(p) or _is_after(parts[: i + 1], prefix)
        ]
        root = next((path for path in paths if not prefix.startswith(f"{path}.")), None)
        if root is not None and stored.shape:
            found.setdefault(root, {})[name] = stored
    return found


def _is_after(parts: list[str], prefix: str) -> bool:
    """Return whether a module comes after the one with the Swin in an nn.Sequential."""
    *parent, last = parts
    around = prefix.split(".")[: len(parts)]
    return around[:-1] == parent and around[-1].isdigit() and last.isdigit() and int(last) > int(around[-1])


def _chain(group: Mapping[str, Stored], width: int | None) -> FoundHead | None:
    """The linear layers of a head in their order, None if it is anything but linear layers in a row of `width` inputs."""
    modules: dict[str, dict[str, tuple[str, Stored]]] = {}
    for name, stored in group.items():
        path, _, leaf = name.rpartition(".")
        modules.setdefault(path, {})[leaf] = (name, stored)
    paths = sorted(modules, key=_natural)
    for path in paths:
        shape = modules[path]["weight"][1].shape if "weight" in modules[path] else ()
        bias = modules[path]["bias"][1].shape if "bias" in modules[path] else shape[:1]
        if modules[path].keys() - {"weight", "bias"} or len(shape) != 2 or bias != shape[:1] or width not in (None, shape[1]):
            return None
        width = shape[0]
    numbers = [path.rpartition(".")[2] for path in paths]
    apart = [not (a.isdigit() and b.isdigit() and int(b) == int(a) + 1) for a, b in itertools.pairwise(numbers)]
    if len(set(apart)) > 1:
        return None
    return FoundHead(tuple(modules[path] for path in paths), any(apart))


def _natural(path: str) -> list[tuple[int, str]]:
    """A key that sorts head.2 and fc2 before head.10 and fc10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"\.|(?<=[a-z])(?=\d)", path)]
