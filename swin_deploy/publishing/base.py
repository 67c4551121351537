"""What is published: a graph or an engine of a bundle, with its labels, and what the modules of the targets share."""

from __future__ import annotations

import math
import re
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

from swin_deploy.bundle import Bundle, size_text
from swin_deploy.dependencies import require
from swin_deploy.errors import UsageError, unknown
from swin_deploy.manifest import EngineEntry, GraphEntry, TensorSpec
from swin_deploy.options import PublishSpec, Size


@dataclass(frozen=True)
class Publication:
    """A file of a bundle, a graph or an engine, and the options to publish it with."""

    bundle: Bundle
    file: str
    spec: PublishSpec

    @property
    def name(self) -> str:
        """Name of the model in file names and URLs."""
        name = re.sub(r"[^A-Za-z0-9_-]+", "-", self.bundle.name or self.bundle.path.resolve().name).strip("-")
        return name or "model"

    @property
    def graph(self) -> GraphEntry:
        """The graph, or the one that the engine was compiled from."""
        return self.bundle.graph_of(self.file)

    @property
    def graph_file(self) -> str:
        """The file of this graph."""
        return self.bundle.graph_file_of(self.file)

    @property
    def bgr(self) -> bool:
        """Whether the graph expects the channels in the order blue, green, red."""
        return self.graph.preprocessing is not None and self.graph.preprocessing.order == "bgr"

    @property
    def engine(self) -> EngineEntry | None:
        """The engine; None for a graph."""
        return self.bundle.engines.get(self.file)

    @property
    def pixels(self) -> TensorSpec:
        """The input for images."""
        return self.graph.inputs[0]

    @property
    def batch(self) -> int | None:
        """The batch of --static-batch, or the one that was asked for."""
        static = self.bundle.static_batch
        if static is not None and self.spec.batch not in (None, static):
            raise UsageError(f"{self.graph_file} accepts exactly {static} images. Leave out --batch.")
        return static or self.spec.batch

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """The label of each class in one line; empty for a network without classes."""
        config = self.bundle.config
        if self.bundle.task.name != "image-classification" or not config.has_classes:
            return ()
        return tuple(config.label_lines)

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """The outputs that are published. Raises UsageError if none are left without logits."""
        if not self.spec.no_logits:
            return self.graph.outputs
        if self.engine is not None:
            raise UsageError("An engine keeps its outputs. Leave out --no-logits, or --engine.")
        if len(kept := tuple(one for one in self.graph.outputs if one.name != "logits")) in (0, len(self.graph.outputs)):
            raise UsageError(f"{self.graph_file} has no outputs beside logits. Export with --embed-postprocess.")
        return kept

    def class_output(self) -> TensorSpec | None:
        """Return the output with a number for each class: probabilities if there are any, else logits."""
        found = {one.name: one for one in self.outputs if self.labels}
        return found.get("probabilities", found.get("logits"))

    def refuse_channels(self, program: str) -> None:
        """Raise UsageError for images that are neither gray nor RGB, which `program` does not have."""
        if (channels := self.bundle.preprocessor.channels) not in (1, 3):
            raise UsageError(f"{program} passes images with 1 or 3 channels, and this network expects {channels}.")

    def refuse_batch(self, program: str) -> None:
        """Raise UsageError for a graph of several images, of which `program` passes one."""
        if self.bundle.static_batch not in (None, 1):
            raise UsageError(
                f"{program} passes one image, and {self.graph_file} accepts {self.bundle.static_batch}. Export without "
                f"--static-batch, or with --static-batch 1."
            )

    def refuse_frames(self, program: str) -> None:
        """Raise UsageError for a graph that accepts uint8 frames, which `program` does not pass."""
        if self.pixels.dtype == "uint8":
            raise UsageError(
                f"{program} passes float planes, and {self.graph_file} accepts uint8 frames. Export with --embed-preprocess "
                f"--input-layout nchw."
            )

    def normalization(self) -> tuple[list[float], list[float]]:
        """Return (scale, offset) of each channel: what the graph expects is pixel * scale + offset, for pixels 0 to 255."""
        steps = self.bundle.preprocessor
        channels = steps.channels
        if self.graph.preprocessing is not None:
            return [1.0] * channels, [0.0] * channels
        rescale = steps.rescale_factor if steps.do_rescale else 1.0
        means, stds = (steps.image_mean, steps.image_std) if steps.do_normalize else ((0.0,) * channels, (1.0,) * channels)
        return [rescale / std for std in stds], [-mean / std for mean, std in zip(means, stds, strict=True)]

    def write_labels(self, folder: Path, text: str | None = None) -> None:
        """Write labels.txt with a label in each line, or another text."""
        if self.labels:
            write_text(folder / "labels.txt", text or "".join(f"{label}\n" for label in self.labels))

    def write_model(self, target: Path) -> None:
        """Copy the file to `target`, and the weights of a graph beside it, under the name that the graph has for them."""
        target.parent.mkdir(parents=True, exist_ok=True)
        source = self.bundle.verified_path(self.file)
        if self.outputs == self.graph.outputs:
            shutil.copyfile(source, target)
        else:
            onnx = require("onnx", "remove an output")
            model = onnx.load(source, load_external_data=False)
            model.graph.output.remove(next(one for one in model.graph.output if one.name == "logits"))
            onnx.save(model, target)
        if self.engine is None and self.graph.weights is not None:
            weights = self.graph.weights
            shutil.copyfile(self.bundle.verified_path(weights), target.with_name(PurePosixPath(weights).name))


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, with plain line ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text.encode("utf-8", "replace").decode(), encoding="utf-8", newline="\n")


def publication(bundle: Bundle, spec: PublishSpec, *, engine: bool | None = False) -> Publication:
    """Select what is published.

    Args:
        bundle: The bundle.
        spec: The options.
        engine: Whether the target runs engines: True, False, or None for both.

    Raises:
        UsageError: The bundle does not have it.
    """
    if spec.engine is None and not engine:
        return Publication(bundle, _graph(bundle, spec), spec)
    build = f"Compile one: swin-deploy build-engine {bundle.path}"
    found = {file: one for file, one in bundle.engines.items() if spec.precision in (None, one.precision)}
    if spec.image_size is not None:
        found = {file: one for file, one in found.items() if one.image_size == spec.image_size}
    if not found:
        raise UsageError(f"The bundle {bundle.path} has no such engine. {build}")
    if spec.engine is not None and spec.engine not in found:
        raise unknown("engine", spec.engine, found)
    if spec.engine is None and len(found) > 1:
        raise UsageError(f"The bundle {bundle.path} has several engines. Choose one with --engine: {', '.join(found)}.")
    file = spec.engine or next(iter(found))
    entry = found[file]
    if entry.options.strip_weights and not entry.options.refitted:
        raise UsageError(f"{file} has no weights. Add them first: swin-deploy refit {bundle.path}")
    graph = bundle.files.get(entry.graph)
    if graph is None or graph.sha256 != entry.parent:
        raise UsageError(f"{file} was compiled from another graph than the bundle has now. {build} --force")
    return Publication(bundle, file, spec)


def _graph(bundle: Bundle, spec: PublishSpec) -> str:
    graphs = bundle.graphs_of(spec.precision or "fp32")
    if not graphs:
        made = dict.fromkeys(entry.precision for entry in bundle.graphs.values())
        raise UsageError(f"The bundle {bundle.path} has no {spec.precision} graph. Choose one of: {', '.join(made)}.")
    sizes: dict[Size, str] = {entry.image_size: file for file, entry in reversed(list(graphs.items()))}
    size = spec.image_size or next(iter(graphs.values())).image_size
    if size not in sizes:
        raise UsageError(
            f"The bundle {bundle.path} has no graph for images of {size_text(size)}. It has: "
            f"{', '.join(map(size_text, reversed(sizes)))}."
        )
    return sizes[size]


def number_text(value: float) -> str:
    """Return a number with as many digits as it needs to be read back."""
    return repr(round(value)) if value == round(value) and math.isfinite(value) and abs(value) < 1e15 else repr(float(value))
