"""Frames: what a graph takes that does the preprocessing itself, and which part of the preprocessing is left outside."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from swin_deploy.errors import InputError, UsageError
from swin_deploy.preprocess import Preprocessor
from swin_deploy.specs import Size, size_text

if TYPE_CHECKING:
    from swin_deploy.preprocess import ImageLike

CHANNELS = 3  # red, green and blue, as every image processor makes them


@dataclass(frozen=True)
class Frames:
    """A callable that makes frames of images: uint8 [batch, height, width, 3] in RGB, which the graph takes as they are.

    `preprocessor` is the whole way from images to the network. Without `frame_size` the graph rescales and normalises, and
    resizing and cropping are done here, by the same code as always; with it the graph does all of that to frames of this
    size (height, width).
    """

    preprocessor: Preprocessor
    frame_size: Size | None = None

    @property
    def inside(self) -> Preprocessor:
        """What the graph does with frames."""
        return self.preprocessor.of_frames() if self.frame_size is None else self.preprocessor

    def __call__(self, images: ImageLike | list[ImageLike] | tuple[ImageLike, ...]) -> NDArray[np.uint8]:
        """The frames of `images` (see Preprocessor). Raises InputError for an image of another size than `frame_size`."""
        if self.frame_size is None:
            return self.preprocessor.frames(images)
        made = self.preprocessor.of_frames().frames(images)
        if made.shape[1:3] != self.frame_size:
            height, width = made.shape[1:3]
            raise InputError(
                f"The image has {height}x{width} pixels, and this graph takes frames of {size_text(self.frame_size)}. Give "
                f"frames of that size, or export without --embed-resize to have any image resized."
            )
        return made

    def to_dict(self) -> dict[str, Any]:
        """How an image becomes the network's input, and what of that is in the graph; ready for JSON."""
        return {**self.preprocessor.to_dict(), "embedded": self.entry()}

    def entry(self) -> dict[str, Any]:
        """What the manifest says of a graph: the size of frames (null: they are resized outside), and what is done to them."""
        inside = self.inside
        steps: dict[str, Any] = {}
        if self.frame_size is not None and inside.do_resize:
            steps["resize"] = {"size": list(inside.resized_to(*self.frame_size)), "resample": inside.resample}
        if inside.do_center_crop:
            steps["crop"] = list(inside.crop_size or ())
        if inside.do_rescale:
            steps["rescale"] = inside.rescale_factor
        if inside.do_normalize:
            steps["normalize"] = {"mean": list(inside.image_mean), "std": list(inside.image_std)}
        return {"frame_size": None if self.frame_size is None else list(self.frame_size), "steps": steps}


Preparation: TypeAlias = Preprocessor | Frames


def preparation_for(preprocessor: Preprocessor, entry: Mapping[str, Any]) -> Preparation:
    """How images become the input of the graph that `entry` of a manifest describes; `preprocessor` makes its image size."""
    embedded = entry.get("preprocessing")
    if embedded is None:
        return preprocessor
    size = embedded["frame_size"]
    return Frames(preprocessor, None if size is None else (int(size[0]), int(size[1])))


def refuse_misfit(frames: Frames, image_size: Size, channels: int) -> None:
    """Raises UsageError where frames cannot become the input of a network for images of `image_size`."""
    if channels != CHANNELS:
        raise UsageError(
            f"This network takes images of {channels} channels, and frames have {CHANNELS} (red, green, blue). Export it "
            f"without embedded preprocessing."
        )
    if frames.frame_size is None:
        return
    inside = frames.inside
    made = inside.crop_size if inside.do_center_crop else inside.resized_to(*frames.frame_size)
    if made != image_size:
        raise UsageError(
            f"The image processor makes {size_text(made or frames.frame_size)} pixels of a frame of "
            f"{size_text(frames.frame_size)}, and the graph is for {size_text(image_size)}. Export it for that size with "
            f"--image-size, or leave --embed-resize out."
        )
