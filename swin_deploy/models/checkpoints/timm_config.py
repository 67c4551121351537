"""Reads timm's config.json as timm's two Swin classes read it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from swin_deploy.config import SwinConfig
from swin_deploy.errors import CheckpointError, UsageError
from swin_deploy.variants import find_variant

from .state_dict_names import CanonicalStateDict

MOST_LABELS = 1_000_000  # a name is created for each

# timm's name of an activation -> that of transformers
TIMM_ACTIVATIONS = {name: name for name in ("gelu", "quick_gelu", "relu", "silu")} | {
    "gelu_tanh": "gelu_pytorch_tanh",
    "swish": "silu",
}

# timm's arguments with the meaning of a field of SwinConfig -> how their values are read
PLAIN = {"in_chans": int, "embed_dim": int, "mlp_ratio": float, "qkv_bias": bool, "always_partition": bool}

# timm's arguments that change the computation, and the only supported value of each.
TIMM_FIXED = {"head_dim": None, "embed_layer": None, "ape": False}


def config_from_timm(raw: Mapping[str, Any], state_dict: CanonicalStateDict, where: str) -> tuple[SwinConfig, tuple[str, ...]]:
    """Read timm's config.json: {architecture, model_args, pretrained_cfg, num_classes}.

    timm writes model_args only if create_model was called with some, so the architecture's name determines the rest
    (timm/models/_hub.py, save_config_for_hf). Arguments are read as timm/models/swin_transformer.py reads them. The notes say
    what had to be assumed.
    """
    architecture = str(raw.get("architecture"))
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
    for key, only in TIMM_FIXED.items():
        if arguments.get(key, only) != only:
            raise CheckpointError(f"{where}: model_args has {key} = {arguments[key]!r}, which is not supported.")
    try:
        config, notes = _with_arguments(base, arguments, pretrained, state_dict)
        labels = _labels(raw, pretrained, arguments)
        return dataclasses.replace(config, id2label=labels), notes
    except (TypeError, ValueError, KeyError, IndexError, OverflowError) as error:
        raise CheckpointError(f"{where}: {error}. Expected the arguments of timm's {architecture}.") from error


def _with_arguments(
    base: SwinConfig, arguments: Mapping[str, Any], pretrained: Mapping[str, Any], state_dict: CanonicalStateDict
) -> tuple[SwinConfig, tuple[str, ...]]:
    values: dict[str, Any] = {
        name: tuple(int(v) for v in arguments.get(name, getattr(base, name))) for name in ("depths", "num_heads")
    }
    stages = len(values["depths"])
    size = pretrained.get("input_size")
    if arguments.get("img_size") is not None:
        values["image_size"] = _pair(arguments["img_size"])
    elif size and pretrained.get("fixed_input_size", True):
        values["image_size"] = _pair(list(size)[-2:])
    if "patch_size" in arguments:
        values["patch_size"] = _pair(arguments["patch_size"])
    for name, read in PLAIN.items():
        if arguments.get(name) is not None:
            values["num_channels" if name == "in_chans" else name] = read(arguments[name])
    if "act_layer" in arguments:
        values["hidden_act"] = TIMM_ACTIVATIONS[str(arguments["act_layer"])]
    windows = _windows(arguments.get("window_size"), base.window_size, stages)
    values["window_size"], notes = _windows_in_tables(windows, state_dict) if base.version == 1 else (windows, ())
    if base.version == 2:
        trained = arguments.get("pretrained_window_sizes")  # one number, or one for each stage
        given = (trained,) * stages if isinstance(trained, int) else trained
        values["pretrained_window_sizes"] = tuple(given) if given else _per_stage(base.pretrained_window_sizes, stages)
    return dataclasses.replace(base, **values), notes


def _windows(given: Any, base: tuple[int, ...], stages: int) -> tuple[int, ...]:
    """One window per stage. timm accepts a number, one number per stage, or (rows, columns)."""
    if given is None:
        return _per_stage(base, stages)
    if isinstance(given, int):
        return (given,) * stages
    sides = [w if isinstance(w, int) else _square(w) for w in given]
    return (_square(sides),) * stages if len(sides) == 2 else tuple(sides)


def _windows_in_tables(windows: tuple[int, ...], state_dict: CanonicalStateDict) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """V1's windows according to the bias tables: timm reduces a window to the size of its feature map."""
    found, notes = list(windows), []
    for stage, window in enumerate(windows):
        shape = state_dict.shapes.get(f"encoder.layers.{stage}.blocks.0.attention.self.relative_position_bias_table")
        smaller = [side for side in range(1, window) if shape and shape[0] == (2 * side - 1) ** 2]
        if smaller:
            found[stage] = smaller[0]
            notes.append(f"the window of stage {stage} is {smaller[0]}, the size of its bias table, and not {window}")
    return tuple(found), tuple(notes)


def _labels(raw: Mapping[str, Any], pretrained: Mapping[str, Any], arguments: Mapping[str, Any]) -> dict[int, str]:
    count = next((int(s["num_classes"]) for s in (raw, arguments, pretrained) if s.get("num_classes") is not None), 1000)
    if not 0 <= count <= MOST_LABELS:
        raise ValueError(f"num_classes is {count}")
    names = raw.get("label_names") or pretrained.get("label_names") or raw.get("labels")
    if isinstance(names, Mapping):
        names = [names.get(str(i)) for i in range(count)]
    if isinstance(names, list) and len(names) == count and all(isinstance(name, str) for name in names):
        return dict(enumerate(names))
    return {i: f"LABEL_{i}" for i in range(count)}


def _per_stage(values: tuple[int, ...], stages: int) -> tuple[int, ...]:
    """Repeat `values` for another number of stages, which is defined only if all of them are equal."""
    if len(values) == stages:
        return values
    if len(set(values)) > 1:
        raise ValueError(f"{stages} stages, but windows for {len(values)}")
    return values[:1] * stages


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    first, second = value
    return int(first), int(second)


def _square(value: Any) -> int:
    rows, columns = value
    if rows != columns:
        raise ValueError(f"window {rows}x{columns} is not square, and only square windows are supported")
    return int(rows)
