"""SwinConfig from timm's config.json: {architecture, model_args, pretrained_cfg, num_classes}.

timm writes model_args only when create_model was given them, so the architecture's name has to tell the rest
(timm/models/_hub.py, save_config_for_hf). Arguments are read as timm/models/swin_transformer.py reads them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from swin_deploy.config import SwinConfig
from swin_deploy.errors import CheckpointError, UsageError
from swin_deploy.models.checkpoints.layouts import Layout
from swin_deploy.variants import find_variant

# timm's name of an activation -> transformers'
ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "quick_gelu": "quick_gelu", "relu": "relu", "silu": "silu"}
ACTIVATIONS["swish"] = "silu"

# Arguments that change what the network computes, and the one value that swin-deploy has.
FIXED = {"always_partition": False, "head_dim": None, "embed_layer": None, "ape": False}


MOST_LABELS = 1_000_000  # more are no classes: a label is made for each


def config_from_timm(raw: Mapping[str, Any], layout: Layout, where: str) -> tuple[SwinConfig, tuple[str, ...]]:
    """The architecture that timm's config.json describes, and what had to be assumed.

    Raises CheckpointError for an architecture that is no Swin, and for arguments that swin-deploy does not have.
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
    for key, only in FIXED.items():
        if arguments.get(key, only) != only:
            raise CheckpointError(f"{where}: model_args has {key} = {arguments[key]!r}, which swin-deploy does not support.")
    try:
        config, notes = _with_arguments(base, arguments, pretrained, layout)
        labels = _labels(raw, pretrained, arguments)
        return dataclasses.replace(config, id2label=labels), notes
    except (TypeError, ValueError, KeyError, IndexError, OverflowError) as error:
        raise CheckpointError(f"{where}: {error}. Expected the arguments of timm's {architecture}.") from error


def _with_arguments(
    base: SwinConfig, arguments: Mapping[str, Any], pretrained: Mapping[str, Any], layout: Layout
) -> tuple[SwinConfig, tuple[str, ...]]:
    values: dict[str, Any] = {}
    depths = tuple(int(d) for d in arguments.get("depths", base.depths))
    stages = len(depths)
    values["depths"] = depths
    values["num_heads"] = tuple(int(h) for h in arguments.get("num_heads", base.num_heads))
    size = pretrained.get("input_size")
    if arguments.get("img_size") is not None:
        values["image_size"] = _pair(arguments["img_size"])
    elif size and pretrained.get("fixed_input_size", True):
        values["image_size"] = _pair(list(size)[-2:])
    if "patch_size" in arguments:
        values["patch_size"] = _pair(arguments["patch_size"])
    for theirs, ours, read in (
        ("in_chans", "num_channels", int),
        ("embed_dim", "embed_dim", int),
        ("mlp_ratio", "mlp_ratio", float),
        ("qkv_bias", "qkv_bias", bool),
    ):
        if arguments.get(theirs) is not None:
            values[ours] = read(arguments[theirs])
    if "act_layer" in arguments:
        values["hidden_act"] = ACTIVATIONS[str(arguments["act_layer"])]
    windows = _windows(arguments.get("window_size"), base.window_size, stages)
    values["window_size"], notes = _windows_in_tables(windows, layout) if base.version == 1 else (windows, ())
    if base.version == 2:
        trained = arguments.get("pretrained_window_sizes")  # one number, or one for each stage
        given = (trained,) * stages if isinstance(trained, int) else trained
        values["pretrained_window_sizes"] = tuple(given) if given else _per_stage(base.pretrained_window_sizes, stages)
    return dataclasses.replace(base, **values), notes


def _windows(given: Any, base: tuple[int, ...], stages: int) -> tuple[int, ...]:
    """One window for each stage. timm takes a number, one for each stage, or, when there are two, rows and columns."""
    if given is None:
        return _per_stage(base, stages)
    if isinstance(given, int):
        return (given,) * stages
    sides = [w if isinstance(w, int) else _square(w) for w in given]
    return (_square(sides),) * stages if len(sides) == 2 else tuple(sides)


def _windows_in_tables(windows: tuple[int, ...], layout: Layout) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """V1's windows as the bias tables have them: timm makes a window as small as its feature map, with its table."""
    found, notes = list(windows), []
    for stage, window in enumerate(windows):
        shape = layout.shapes.get(f"encoder.layers.{stage}.blocks.0.attention.self.relative_position_bias_table")
        smaller = [side for side in range(1, window) if shape and shape[0] == (2 * side - 1) ** 2]
        if smaller:
            found[stage] = smaller[0]
            notes.append(f"the window of stage {stage} is {smaller[0]}, as its bias table has it, and not {window}")
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
    """`values` for each of `stages`, when an argument changed how many there are; all alike, or it is not defined."""
    if len(values) == stages:
        return values
    if len(set(values)) > 1:
        raise ValueError(f"{stages} stages, and windows for {len(values)}")
    return values[:1] * stages


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    first, second = value
    return int(first), int(second)


def _square(value: Any) -> int:
    rows, columns = value
    if rows != columns:
        raise ValueError(f"a window of {rows}x{columns}, and only square ones are supported")
    return int(rows)
