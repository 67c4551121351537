"""Recognises a Swin checkpoint by its files, and reads its config or infers it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from swin_deploy.config import SwinConfig, with_complete_labels
from swin_deploy.errors import CheckpointError
from swin_deploy.models.parameters import LazyTensors, Shape, parameters
from swin_deploy.qat_ranges import QatRanges
from swin_deploy.tasks import TaskSpec, stage_names

from .infer_config import infer_config
from .parent_models import MAPS, SWINS, TOKENS, ParentModel, parent_from_config, refuse_other_model
from .qat_state import qat_ranges_from_state
from .state_dict_names import CanonicalStateDict, Writer, canonical_state_dict
from .timm_config import config_from_timm
from .weight_files import open_weights, read_json

WRITERS = {"hf": "transformers", "tf": "transformers' TensorFlow classes", "microsoft": "Microsoft's repository"}
FIX = "Check that config.json belongs to these weights."


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
    other_head: str = ""  # tensors of a head that is not only linear layers in a row
    head_between: bool = False  # whether the file lacks what is between the linear layers of the head
    extras: Mapping[str, Any] = field(default_factory=dict)  # timm's pretrained_cfg, and what was saved beside the weights
    parent: ParentModel | None = None  # the model around the Swin
    files: tuple[Path, ...] = ()  # that hold the tensors

    @property
    def framework(self) -> str:
        """The framework whose window, shift and padding rules the network follows."""
        return {"tf": "hf", "openmmlab": "microsoft"}.get(self.writer, self.writer)

    @property
    def task(self) -> str:
        """The task for which the checkpoint was made."""
        if self.parent is not None:
            return self.parent.task
        classes = any(name.startswith("classifier.") for name in self.shapes) or self.other_head
        if not classes and any(name.startswith("hidden_states_norms.") for name in self.shapes):
            return MAPS
        return "image-classification" if classes or self.config.final_norm else TOKENS


def recognise_checkpoint(
    path: Path, image_size: tuple[int, int] | None = None, weights_key: str | None = None
) -> RecognisedCheckpoint:
    """Open a checkpoint and recognise what wrote it.

    `path` is a folder or a weight file. A config.json beside the weights is used if it belongs to them. `image_size` (height,
    width) is used if neither config.json nor the tensors contain it. `weights_key` chooses one of several Swins in a file.
    """
    folder = path if path.is_dir() else path.parent
    raw = read_json(folder / "config.json") if path.exists() and (folder / "config.json").is_file() else None
    stated = raw or {}
    foreign = raw is not None and not stated.keys() & {"architecture", "model_type"}  # of a trainer, as PyTorchModelHubMixin's
    kind = str(stated.get("model_type"))
    own = stated if "architecture" in stated else {**stated, **SWINS[kind]} if kind in SWINS else None
    parent = None if own is not None else parent_from_config(stated)
    raw = own if parent is None else parent.timm or parent.config
    timm = "architecture" in (raw or {})
    file = open_weights(path)
    try:
        state_dict = canonical_state_dict(file, weights_key, parent)
    except CheckpointError:
        if stated and raw is None and not foreign and path.is_dir():
            refuse_other_model(stated)  # the clearest error
        raise
    if stated and raw is None and not foreign:
        if state_dict.writer in ("hf", "tf") and state_dict.parent is None:
            refuse_other_model(stated)
        foreign = path.is_dir()
    if raw is not None and state_dict.writer not in (("timm", "microsoft") if timm else ("hf", "tf")):
        if path.is_dir():
            raise CheckpointError(
                f"{path}: config.json was written by {'timm' if timm else 'transformers'}, and the weights have the names of "
                f"{WRITERS.get(state_dict.writer, state_dict.writer)}. Expected both from one framework. To ignore "
                f"config.json, pass the path of the weight file."
            )
        raw = None  # it belongs to another file in the same folder
    if raw is None and (found := _config_from_arguments(file.extras, state_dict)):
        state_dict = dataclasses.replace(state_dict, writer="timm")
        config, notes = found
    elif raw is None:
        config, notes = infer_config(state_dict, image_size, file.extras, str(path))
        if state_dict.writer in ("hf", "tf"):
            assumed = "the default activation and epsilon of transformers are assumed"
            notes += (assumed if foreign else f"there is no config.json, so {assumed}",)
    elif timm:
        state_dict = dataclasses.replace(state_dict, writer="timm")  # up to 0.6 it has the names of Microsoft's code
        config, notes = config_from_timm(raw, state_dict, str(folder / "config.json"))
        if parent is not None or state_dict.features_only:
            config = _feature_network(config, parent, state_dict)
    else:
        heads = [shape for name, shape in sorted(state_dict.shapes.items()) if re.fullmatch(r"classifier\..*weight", name)]
        raw, notes = with_complete_labels(raw, (*heads[-1], 0)[0] if heads else None)
        config = SwinConfig.from_dict(raw)
    tensors, shapes = state_dict.tensors, state_dict.shapes
    layers = sum(bool(re.fullmatch(r"classifier\.\d+\.weight", name)) for name in shapes)
    config = dataclasses.replace(config, head_widths=tuple(shapes[f"classifier.{i}.weight"][0] for i in range(layers - 1)))
    unnamed = [key for key, value in file.extras.items() if isinstance(value, Mapping) and "shadow_params" in value]
    notes = (
        *(("config.json states no Swin of transformers or timm, and is not used",) if foreign else ()),
        *state_dict.notes,
        *(
            f"the averaged weights under {key} have no names and are left out: copy them into the model first"
            for key in unnamed
        ),
        *notes,
    )
    if config.blocks > len(tensors):
        raise CheckpointError(f"{path} has {len(tensors)} tensors for {config.blocks} blocks in its config. {FIX}")
    notes += _position_note(config, shapes)
    ranges = None
    if state_dict.quantizers:
        ranges, qat_notes = qat_ranges_from_state(state_dict, file.extras, str(path))
        notes += qat_notes
    return RecognisedCheckpoint(
        path=path,
        writer=state_dict.writer,
        config=config,
        tensors=LazyTensors(tensors, lambda name: tensors[name].read(str(path))),
        shapes=shapes,
        patch_norm="embeddings.norm.weight" in shapes,
        raw_config=raw,
        preprocessor=_preprocessor(folder),
        notes=notes,
        ranges=ranges,
        other_head=state_dict.other_head,
        head_between=state_dict.head_between,
        extras={
            **file.extras,
            **({"pretrained_cfg": raw.get("pretrained_cfg") or raw} if raw is not None and timm and parent is None else {}),
        },
        parent=state_dict.parent,
        files=file.files,
    )


def _preprocessor(folder: Path) -> Mapping[str, Any] | None:
    """The config of the image processor, in a file of its own or in that of a processor for images and text."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (folder / name).is_file():
            found = read_json(folder / name)
            inner = found.get("image_processor")
            if name == "preprocessor_config.json" or isinstance(inner, Mapping):
                return inner if isinstance(inner, Mapping) else found
    return None


def _feature_network(config: SwinConfig, parent: ParentModel | None, state_dict: CanonicalStateDict) -> SwinConfig:
    """The config of timm's network for feature maps, which has no stages behind the last of them."""
    stages = len({name.split(".")[2] for name in state_dict.shapes if name.startswith("encoder.layers.")})
    fields = ("depths", "num_heads", "window_size", *(("pretrained_window_sizes",) if config.version == 2 else ()))
    cut = {name: getattr(config, name)[:stages] for name in fields} if 0 < stages < len(config.depths) else {}
    if cut and isinstance(config.mlp_ratio, tuple):
        cut["mlp_ratio"] = config.mlp_ratio[:stages]
    config = dataclasses.replace(config, **cut)
    return dataclasses.replace(config, out_features=(parent and parent.out_features) or stage_names(config)[1:])


def _config_from_arguments(
    extras: Mapping[str, Any], state_dict: CanonicalStateDict
) -> tuple[SwinConfig, tuple[str, ...]] | None:
    """The config that timm's trainer states beside the weights, if they have its shapes. Only it has the windows of V2."""
    given = extras.get("args")
    arguments = given if isinstance(given, Mapping) else {}
    architecture = extras.get("arch") or arguments.get("model")
    if state_dict.writer not in ("timm", "microsoft") or not isinstance(architecture, str):
        return None
    classes = [
        (*shape, 0)[0] for name, shape in sorted(state_dict.shapes.items()) if re.fullmatch(r"classifier\..*weight", name)
    ]
    raw = {
        "architecture": architecture,
        "num_classes": classes[-1] if classes else 0,
        "model_args": arguments.get("model_kwargs"),
    }
    try:
        config, notes = config_from_timm(raw, state_dict, architecture)
        built = dataclasses.replace(config, framework="timm", patch_norm="embeddings.norm.weight" in state_dict.shapes)
        if any(state_dict.shapes.get(name) != shape for name, shape in parameters(built, TaskSpec("backbone")).items()):
            return None
    except CheckpointError:
        return None
    return config, (*notes, f"the architecture is timm's {architecture}, which the file states")


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
