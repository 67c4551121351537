"""A checkpoint -> a bundle."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from swin_deploy.arguments import checked
from swin_deploy.specs import Say, silent

if TYPE_CHECKING:
    from swin_deploy.bundle import Bundle
    from swin_deploy.tasks import TaskSpec


def _one_or_more(sizes: int | Sequence[int] | None) -> tuple[int, ...] | None:
    return None if sizes is None else (sizes,) if isinstance(sizes, int) else tuple(sizes)


@checked
def export(
    variant: str | None = None,
    *,
    weights: str | os.PathLike[str] | None = None,
    random_weights: bool = False,
    seed: int = 0,
    output: str | os.PathLike[str] | None = None,
    task: str | TaskSpec = "image-classification",
    image_sizes: Sequence[tuple[int, int]] = (),
    semantics: str | None = None,
    window_size: int | Sequence[int] | None = None,
    pretrained_window_sizes: int | Sequence[int] | None = None,
    target: str = "tensorrt",
    embed_preprocess: bool = False,
    embed_resize: tuple[int, int] | None = None,
    force: bool = False,
    say: Say = silent,
) -> Bundle:
    """The bundle that a checkpoint was exported to, compared with PyTorch before it is kept.

    `variant` is a name of `swin-deploy variants`; `weights` a checkpoint's folder or file (of transformers, timm, Microsoft,
    torchvision or TensorFlow, recognised by what it holds) or a hub id, and otherwise the variant's own hub id;
    `random_weights` takes reproducible random ones instead. `task` is one of tasks.TASKS, or a TaskSpec with its options;
    `image_sizes` are (height, width) in pixels, one graph each, by default the checkpoint's own; `semantics` (one of
    config.SEMANTICS) replaces the rules of the system that wrote the checkpoint; `window_size` (tokens, one number or one
    for each stage) builds the network with other windows, and for the first image size given, for which the checkpoint's
    position tables are resized as its own system does it; `pretrained_window_sizes` are Swin V2's; `target` is what
    the graph's form is fastest with (one of specs.TARGETS; it answers the same everywhere). With `embed_preprocess` the
    graphs take `pixel_values` uint8 [batch, height, width, 3] in RGB and rescale and normalise themselves; `embed_resize`,
    the (height, width) of a camera's frames, is such a graph that also resizes and crops them. The bundle is written to
    `output`, by default a folder of the variant's (or checkpoint's) name in the current directory; `force` replaces a
    bundle that is there. `say` gets a line for each step. Raises errors.SwinDeployError with nothing written.
    """
    from swin_deploy.bundle import room_for
    from swin_deploy.errors import UsageError
    from swin_deploy.exporters.bundle_from_checkpoint import bundle_from_checkpoint
    from swin_deploy.exporters.checkpoint_from_request import bundle_name, checkpoint_from_request
    from swin_deploy.runtimes.backends import runtime_to_check
    from swin_deploy.tasks import TaskSpec

    for size in (*image_sizes, *([] if embed_resize is None else [embed_resize])):
        if min(size) < 1:
            raise UsageError(f"An image size is {size}, and its height and width must be at least 1.")
    spec = TaskSpec(task) if isinstance(task, str) else task
    path = Path(bundle_name(variant, weights) if output is None else output)
    if os.path.lexists(path):
        room_for(path, force)  # before the work, and again after it
    checkpoint = checkpoint_from_request(
        variant,
        weights,
        random_weights,
        seed,
        spec,
        image_sizes[0] if image_sizes else None,
        semantics,
        _one_or_more(window_size),
        _one_or_more(pretrained_window_sizes),
        say,
    )
    return bundle_from_checkpoint(
        checkpoint,
        path,
        variant=variant,
        task=spec,
        image_sizes=image_sizes,
        target=target,
        embed_preprocess=embed_preprocess or embed_resize is not None,
        frame_size=embed_resize,
        replace=force,
        open_graph=runtime_to_check,
        say=say,
    )
