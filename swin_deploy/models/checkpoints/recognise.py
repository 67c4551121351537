"""Recognises a Swin checkpoint by its files, and reads the config of transformers or timm, or infers it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from swin_deploy.config import SwinConfig
from swin_deploy.errors import CheckpointError, UsageError
from swin_deploy.models.parameters import LazyTensors, Shape
from swin_deploy.qat_ranges import QatRanges
from swin_deploy.variants import find_variant

from .infer_config import infer_config
from .qat_state import qat_ranges_from_state
from .state_dict_names import CanonicalStateDict, Writer, canonical_state_dict
from .weight_files import open_weights, read_json

WRITERS = {"hf": "transformers", "tf": "transformers' TensorFlow classes", "microsoft": "Microsoft's repository"}
MOST_STAGES = 16  # each doubles the channels
MOST_LABELS = 1_000_000  # a name is created for each
FIX = "Check that config.json belongs to these weights."

# timm's name of an activation -> that of transformers
TIMM_ACTIVATIONS = {name: name for name in ("gelu", "quick_gelu", "relu", "silu")} | {
    "gelu_tanh": "gelu_pytorch_tanh",
    "swish": "silu",
}

# timm's arguments that change the computation, and the only supported value of each.
TIMM_FIXED = {"always_partition": False, "head_dim": None, "embed_layer": None, "ape": False}


@dataclass(frozen=True)
class RecognisedCheckpoint:
    """A checkpoint as found. `tensors` are in float32 and read one by one."""

    path: Path
    writer: Writer
    config: SwinConfig
    tensors: Mapping[str, Tensor]
    shapes: Mapping[str, Shape]
    patch_norm: bool  # whether the patch embedding ends with a LayerNorm (PATCH_NORM in Microsoft's code)
    raw_config: Mapping[str, Any] | None = None  # config.json as found
    preprocessor: Mapping[str, Any] | None = None  # preprocessor_config.json as found
    notes: tuple[str, ...] = ()  # assumptions about what the checkpoint does not contain
    ranges: QatRanges | None = None  # QAT ranges

    @property
    def framework(self) -> str:
        """The framework whose window, shift and padding rules the network follows."""
        return "hf" if self.writer == "tf" else self.writer


def recognise_checkpoint(path: Path, image_size: tuple[int, int] | None = None) -> RecognisedCheckpoint:
    """Open a checkpoint and recognise what wrote it.

    `path` is a folder or a weight file. A config.json beside the weights is used if it belongs to them. `image_size` (height,
    width) is used if neither config.json nor the tensors contain it.
    """
    folder = path if path.is_dir() else path.parent
    raw = read_json(folder / "config.json") if path.exists() and (folder / "config.json").is_file() else None
    timm = raw is not None and "architecture" in raw
    if raw is not None and not timm and path.is_dir():
        _config(raw, folder)  # the model_type of another network gives the clearest error
    file = open_weights(path)
    state_dict = canonical_state_dict(file)
    if raw is not None and state_dict.writer not in (("timm", "microsoft") if timm else ("hf", "tf")):
        if path.is_dir():
            raise CheckpointError(
                f"{path}: config.json was written by {'timm' if timm else 'transformers'}, and the weights have the names of "
                f"{WRITERS.get(state_dict.writer, state_dict.writer)}. Expected both from one framework. To ignore "
                f"config.json, pass the path of the weight file."
            )
        raw = None  # it belongs to another file in the same folder
    if raw is None:
        config, notes = infer_config(state_dict, image_size, file.extras, str(path))
        if state_dict.writer in ("hf", "tf"):
            notes += ("there is no config.json, so the default activation and epsilon of transformers are assumed",)
    elif timm:
        state_dict = dataclasses.replace(state_dict, writer="timm")  # up to 0.6 it has the names of Microsoft's code
        config, notes = config_from_timm(raw, state_dict, str(folder / "config.json"))
    else:
        config, notes = _config(raw, folder), ()
    tensors, shapes = state_dict.tensors, state_dict.shapes
    if config.blocks > len(tensors):
        raise CheckpointError(f"{path} has {len(tensors)} tensors for {config.blocks} blocks in its config. {FIX}")
    notes += _position_note(config, shapes)
    ranges = None
    if state_dict.quantizers:
        ranges, qat_notes = qat_ranges_from_state(state_dict, file.extras, str(path))
        notes += qat_notes
    preprocessor = folder / "preprocessor_config.json"
    return RecognisedCheckpoint(
        path=path,
        writer=state_dict.writer,
        config=config,
        tensors=LazyTensors(tensors, lambda name: tensors[name].read(str(path))),
        shapes=shapes,
        patch_norm="embeddings.norm.weight" in shapes,
        raw_config=raw,
        preprocessor=read_json(preprocessor) if raw is not None and preprocessor.is_file() else None,
        notes=notes,
        ranges=ranges,
    )


def _config(raw: Mapping[str, Any], folder: Path) -> SwinConfig:
    """Read the config.json of transformers, after checking that it does not ask for millions of stages or labels."""
    labels, depths = raw.get("num_labels", 0), raw.get("depths", ())
    if (isinstance(labels, int) and labels > MOST_LABELS) or (isinstance(depths, list) and len(depths) > MOST_STAGES):
        raise CheckpointError(f"{folder / 'config.json'} has {labels} labels and {len(depths)} stages, which no Swin has.")
    return SwinConfig.from_dict(raw)


def _position_note(config: SwinConfig, shapes: Mapping[str, Shape]) -> tuple[str, ...]:
    """A note on position tables with one row more than patches: V2 in transformers, and V1 in transformers 4."""
    shape = shapes.get("embeddings.position_embeddings", ())
    rows, columns = config.grid()
    if len(shape) != 3 or shape[1] != rows * columns + 1:
        return ()
    return (
        f"The position embeddings have {shape[1]} rows for {rows * columns} patches, a known bug of transformers; the first "
        f"row is ignored",
    )


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
    for name, read in (("in_chans", int), ("embed_dim", int), ("mlp_ratio", float), ("qkv_bias", bool)):
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
