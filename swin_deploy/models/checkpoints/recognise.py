"""open_source: any Swin checkpoint, recognised by what it holds, as one Source with canonical names."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from swin_deploy.config import SwinConfig
from swin_deploy.errors import CheckpointError
from swin_deploy.models.checkpoints.base import LazyTensors
from swin_deploy.models.checkpoints.formats import open_weights, read_json
from swin_deploy.models.checkpoints.infer import infer_config
from swin_deploy.models.checkpoints.layouts import System, layout_of
from swin_deploy.models.checkpoints.qat_ranges_from_state import ranges_of
from swin_deploy.models.checkpoints.timm_config import MOST_LABELS, config_from_timm
from swin_deploy.models.parameters import Shape
from swin_deploy.qat_ranges import Ranges

Task = Literal["image-classification", "feature-extraction", "backbone", "masked-image-modeling"]

# The end of a transformers class -> its task.
TASKS: tuple[tuple[str, Task], ...] = (
    ("ForImageClassification", "image-classification"),
    ("ForMaskedImageModeling", "masked-image-modeling"),
    ("Backbone", "backbone"),
    ("Model", "feature-extraction"),
)
NAMES = {"hf": "transformers", "tf": "transformers' TensorFlow classes", "microsoft": "Microsoft's repository"}

MOST_STAGES = 16  # each doubles the channels

FIX = "Check that config.json belongs to these weights."


@dataclass(frozen=True)
class Source:
    """A checkpoint as found. `tensors` are float32 and read one by one; `shapes` are known without reading them."""

    path: Path
    system: System  # what wrote it
    config: SwinConfig
    task_hint: Task
    tensors: Mapping[str, Tensor]
    shapes: Mapping[str, Shape]
    patch_norm: bool  # whether the patch embedding ends with a LayerNorm (Microsoft's PATCH_NORM)
    raw_config: Mapping[str, Any] | None = None  # config.json as found
    preprocessor: Mapping[str, Any] | None = None  # preprocessor_config.json as found
    notes: tuple[str, ...] = ()  # what the checkpoint does not tell and was assumed
    ranges: Ranges | None = None  # what quantisation-aware training left beside the weights

    @property
    def semantics(self) -> str:
        """Whose rules for windows, shifts and padding the network follows; TensorFlow's classes follow transformers'."""
        return "hf" if self.system == "tf" else self.system


def open_source(path: Path, image_size: tuple[int, int] | None = None) -> Source:
    """The checkpoint at `path`: a folder, or one file. What wrote it is recognised.

    `image_size` (height, width in pixels) counts where neither a config.json nor the tensors tell the size. Raises
    CheckpointError when the files are damaged, are another network, or do not belong together.
    """
    folder = path if path.is_dir() else path.parent
    raw = read_json(folder / "config.json") if path.exists() and (folder / "config.json").is_file() else None
    timm = raw is not None and "architecture" in raw
    if raw is not None and not timm and path.is_dir():
        _config(raw, folder)  # another model family is best refused by what it calls itself
    file = open_weights(path)
    layout = layout_of(file)
    ranges, kept = ranges_of(layout, file.extras, str(path))
    if raw is not None and layout.system not in (("timm", "microsoft") if timm else ("hf", "tf")):
        if path.is_dir():
            raise CheckpointError(
                f"{path}: config.json was written by {'timm' if timm else 'transformers'}, and the weights have the names of "
                f"{NAMES.get(layout.system, layout.system)}. Expected both from one; to leave config.json out, name the "
                f"weight file."
            )
        raw = None  # it belongs to another file of the same folder
    if raw is None:
        config, notes = infer_config(layout, image_size, file.extras, str(path))
        if layout.system in ("hf", "tf"):
            notes += ("there is no config.json, so transformers' default activation and epsilon are assumed",)
    elif timm:
        layout = dataclasses.replace(layout, system="timm")  # up to 0.6 its names are Microsoft's
        config, notes = config_from_timm(raw, layout, str(folder / "config.json"))
    else:
        config, notes = _config(raw, folder), ()
    if config.blocks > len(layout.parts):
        raise CheckpointError(f"{path} has {len(layout.parts)} tensors for {config.blocks} blocks in its config. {FIX}")
    parts, shapes = layout.parts, layout.shapes
    preprocessor = folder / "preprocessor_config.json"
    return Source(
        path=path,
        system=layout.system,
        config=config,
        task_hint=_task(raw, shapes),
        tensors=LazyTensors(parts, lambda name: parts[name].read(str(path))),
        shapes=shapes,
        patch_norm="embeddings.norm.weight" in shapes,
        raw_config=raw,
        preprocessor=read_json(preprocessor) if raw is not None and preprocessor.is_file() else None,
        notes=(*notes, *_position_note(config, shapes), *kept),
        ranges=ranges,
    )


def _config(raw: Mapping[str, Any], folder: Path) -> SwinConfig:
    """transformers' config.json as a SwinConfig, once it is plain that it does not ask for millions of anything."""
    labels, depths = raw.get("num_labels", 0), raw.get("depths", ())
    if (isinstance(labels, int) and labels > MOST_LABELS) or (isinstance(depths, list) and len(depths) > MOST_STAGES):
        raise CheckpointError(f"{folder / 'config.json'} has {labels} labels and {len(depths)} stages, which no Swin has.")
    return SwinConfig.from_dict(raw)


def _task(raw: Mapping[str, Any] | None, shapes: Mapping[str, Shape]) -> Task:
    """What the checkpoint was saved for: by the class in config.json, else by the head that it has."""
    classes = (raw or {}).get("architectures")
    for name in classes if isinstance(classes, list) else ():
        for ending, task in TASKS:
            if str(name).endswith(ending):
                return task
    if "decoder.0.weight" in shapes:
        return "masked-image-modeling"
    if any(name.startswith("hidden_states_norms.") for name in shapes):
        return "backbone"
    return "image-classification" if "classifier.weight" in shapes else "feature-extraction"


def _position_note(config: SwinConfig, shapes: Mapping[str, Shape]) -> tuple[str, ...]:
    """A note for the tables of transformers' V2, and of its V1 up to 4, which have one row more than there are patches."""
    shape = shapes.get("embeddings.position_embeddings", ())
    rows, columns = config.grid()
    if len(shape) != 3 or shape[1] != rows * columns + 1:
        return ()
    return (
        f"The position embeddings have {shape[1]} rows for {rows * columns} patches, a known fault of transformers; "
        f"the first is left out",
    )
