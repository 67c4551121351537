"""Reads timm's config.json as timm's two Swin classes read it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from swin_deploy.config import MOST_LABELS, SwinConfig, Window, complete_labels, sides, window_from
from swin_deploy.errors import CheckpointError, UsageError, sentence, shown
from swin_deploy.variants import find_variant

from .state_dict_names import CanonicalStateDict

# timm's name of an activation -> that of transformers
TIMM_ACTIVATIONS = {
    name: name for name in ("gelu", "quick_gelu", "relu", "relu6", "silu", "leaky_relu", "mish", "sigmoid", "tanh", "hardswish")
} | {"gelu_tanh": "gelu_pytorch_tanh", "swish": "silu", "hard_swish": "hardswish", "identity": "linear"}

# timm's arguments with the meaning of a field of SwinConfig -> the field, and how the value is read
FIELDS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "img_size": ("image_size", lambda value: sides(window_from(value))),
    "patch_size": ("patch_size", lambda value: sides(window_from(value))),
    "in_chans": ("num_channels", int),
    "global_pool": ("global_pool", lambda value: "avg" if value == "fast" else str(value).lower().removeprefix("fast")),
    "embed_dim": ("embed_dim", int),
    "depths": ("depths", lambda value: tuple(map(int, value))),
    "num_heads": ("num_heads", lambda value: tuple(map(int, value))),
    "always_partition": ("always_partition", bool),
    "mlp_ratio": ("mlp_ratio", lambda value: tuple(map(float, value)) if isinstance(value, list | tuple) else float(value)),
    "qkv_bias": ("qkv_bias", bool),
    "act_layer": ("hidden_act", lambda value: _activation(value)),
}

# The arguments that are read otherwise, or not at all: the tensors show them.
OTHER_ARGUMENTS = frozenset(("num_classes", "head_dim", "window_size", "pretrained_window_sizes", "patch_norm"))

# Arguments without effect on the trained network: of training, of initialization, and of create_model. An export has
# images of one size, so it is indifferent whether timm accepts others.
WITHOUT_EFFECT = frozenset((
    "strict_img_size", "dynamic_img_size", "drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate", "weight_init",
    "device", "dtype", "use_checkpoint", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_strict",
    "checkpoint_path", "cache_dir", "scriptable", "exportable", "no_jit", "features_only", "out_indices", "feature_cls",
))  # fmt: skip


def config_from_timm(raw: Mapping[str, Any], state_dict: CanonicalStateDict, where: str) -> tuple[SwinConfig, tuple[str, ...]]:
    """Read timm's config.json: {architecture, model_args, pretrained_cfg, num_classes}.

    timm writes model_args only if create_model was called with some, so the architecture's name determines the rest
    (timm/models/_hub.py, save_config_for_hf). Arguments are read as timm/models/swin_transformer.py reads them. The notes say
    what had to be assumed.
    """
    architecture = shown(str(raw.get("architecture")))
    try:
        base = find_variant(f"timm/{architecture.split('.')[0]}").config()
    except UsageError as error:
        raise CheckpointError(f"{where}: timm's architecture {error}") from error
    arguments = raw.get("model_args") or {}
    pretrained = raw.get("pretrained_cfg") or raw  # before timm 0.9 one object held both
    if not isinstance(arguments, Mapping) or not isinstance(pretrained, Mapping):
        raise CheckpointError(
            f"{where}: model_args and pretrained_cfg are not objects. Expected what timm's save_for_hf writes."
        )
    arguments = {key: value for key, value in arguments.items() if value is not None}  # as create_model does
    for key, value in arguments.items():
        if key not in FIELDS.keys() | OTHER_ARGUMENTS | WITHOUT_EFFECT and value is not False:
            raise CheckpointError(f"{where}: model_args has {shown(key)} = {shown(repr(value))}, which is not supported.")
    try:
        config, notes = _with_arguments(base, _defaults(raw, pretrained) | arguments, state_dict)
        labels, note = _labels(raw, pretrained, arguments)
        return dataclasses.replace(config, id2label=labels), notes + ((note,) if note else ())
    except (TypeError, ValueError, KeyError, IndexError, OverflowError) as error:
        raise CheckpointError(
            f"{where}: {shown(sentence(str(error)))}. Expected the arguments of timm's {architecture}."
        ) from error


def _defaults(raw: Mapping[str, Any], pretrained: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that follow from the other parts of config.json."""
    found: dict[str, Any] = {}
    if size := pretrained.get("input_size"):
        fixed = pretrained.get("fixed_input_size", True)
        found = {"in_chans": size[0], "img_size": list(size)[-2:] if fixed else 224}  # 224 is the default of both classes
    pools = [one["global_pool"] for one in (raw, pretrained) if one.get("global_pool") is not None]
    return found | ({"global_pool": pools[0]} if pools else {})


def _with_arguments(
    base: SwinConfig, arguments: Mapping[str, Any], state_dict: CanonicalStateDict
) -> tuple[SwinConfig, tuple[str, ...]]:
    values = {field: _read(arguments, name, read) for name, (field, read) in FIELDS.items() if name in arguments}
    stages = len(values.get("depths", base.depths))
    values["window_size"] = _per_stage(_read(arguments, "window_size", _windows) or base.window_size, stages)
    if base.version == 2:
        trained = _read(
            arguments, "pretrained_window_sizes", lambda given: (given,) if isinstance(given, int) else tuple(given)
        )
        values["pretrained_window_sizes"] = _per_stage(tuple(map(window_from, trained or base.pretrained_window_sizes)), stages)
    config = dataclasses.replace(base, **values)
    windows, notes = _windows_in_tables(config, state_dict) if base.version == 1 else (config.window_size, ())
    own = [config.width(stage) // heads for stage, heads in enumerate(config.num_heads)]
    given = arguments.get("head_dim", own)
    if any(
        one not in (None, width) for one, width in zip(given if isinstance(given, list) else [given] * stages, own, strict=True)
    ):
        raise ValueError(f"head_dim is {given}, and only the widths of the stages divided by the heads are supported, {own}")
    return dataclasses.replace(config, window_size=windows), notes


def _read(arguments: Mapping[str, Any], name: str, read: Callable[[Any], Any]) -> Any:
    """Read an argument. None if it is not given; errors name it."""
    try:
        return read(arguments[name]) if name in arguments else None
    except (TypeError, ValueError, KeyError, OverflowError) as error:
        raise ValueError(f"{name}: {error}") from error


def _activation(name: Any) -> str:
    if not isinstance(name, str) or name not in TIMM_ACTIVATIONS:
        raise ValueError(f"{shown(repr(name))} is not supported; supported: {', '.join(TIMM_ACTIVATIONS)}")
    return TIMM_ACTIVATIONS[name]


def _windows(given: Any) -> tuple[Window, ...]:
    """One window for all stages, or one per stage. Two numbers are always one window (rows, columns)."""
    if isinstance(given, int) or (len(given) == 2 and isinstance(given[0], int)):
        return (window_from(given),)
    return tuple(map(window_from, given))


def _windows_in_tables(config: SwinConfig, state_dict: CanonicalStateDict) -> tuple[tuple[Window, ...], tuple[str, ...]]:
    """V1's windows according to the bias tables: timm reduces a window to the size of its feature map."""
    found, notes = list(config.window_size), []
    for stage, window in enumerate(config.window_size):
        shape = state_dict.shapes.get(f"encoder.layers.{stage}.blocks.0.attention.self.relative_position_bias_table")
        rows, columns = dataclasses.replace(config, framework="timm").table_window(stage)
        fits = rows != columns and shape and shape[0] == (2 * rows - 1) * (2 * columns - 1)
        largest = window if isinstance(window, int) and not fits else 0
        side = (math.isqrt(shape[0]) + 1) // 2 if shape else 0
        if side < largest and shape and shape[0] == (2 * side - 1) ** 2:
            found[stage] = side
            notes.append(f"the window of stage {stage} is {side}, the size of its bias table, and not {window}")
    return tuple(found), tuple(notes)


def _labels(
    raw: Mapping[str, Any], pretrained: Mapping[str, Any], arguments: Mapping[str, Any]
) -> tuple[dict[int, str], str | None]:
    """Return a label for each class, its description if timm has one, and a note if some have none."""
    count = next((int(s["num_classes"]) for s in (raw, arguments, pretrained) if s.get("num_classes") is not None), 1000)
    if not 0 <= count <= MOST_LABELS:
        raise ValueError(f"num_classes is {count}")
    names = raw.get("label_names") or pretrained.get("label_names") or raw.get("labels") or pretrained.get("labels")
    described = raw.get("label_descriptions") or pretrained.get("label_descriptions")
    descriptions = described if isinstance(described, Mapping) else {}
    if isinstance(names, list):
        names = dict(enumerate(names))
    if not isinstance(names, Mapping) or not 0 < len(names) <= count:
        return {i: f"LABEL_{i}" for i in range(count)}, None
    return complete_labels({i: descriptions.get(name, name) for i, name in names.items() if isinstance(name, str)}, count)


def _per_stage(values: tuple[Window, ...], stages: int) -> tuple[Window, ...]:
    """Repeat `values` for another number of stages, which is defined only if all of them are equal."""
    if len(values) == stages:
        return values
    if len(set(values)) > 1:
        raise ValueError(f"{stages} stages, but windows for {len(values)}")
    return values[:1] * stages
