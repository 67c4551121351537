"""Frames: the input of graphs that include a part of the preprocessing."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from swin_deploy.bundle import TensorSpec, size_text
from swin_deploy.errors import InputError, UsageError
from swin_deploy.manifest import EmbeddedSteps
from swin_deploy.options import LAYOUTS, ORDERS, Size
from swin_deploy.preprocess import Preprocessor
from swin_deploy.tasks import PIXELS

if TYPE_CHECKING:
    from swin_deploy.preprocess import ImageLike


@dataclass(frozen=True)
class Frames:
    """Turns images into frames for a graph with embedded preprocessing.

    Frames are uint8 [batch, height, width, channels], or with the layout "nchw" float32 [batch, channels, height, width], with
    pixels from 0 to 255. The `order` of three channels is "rgb" or "bgr".

    The graph resizes and crops frames of `frame_size` (height, width). With None, it only rescales and normalizes, and images
    are resized and cropped here. `preprocessor` is the complete preprocessing.
    """

    preprocessor: Preprocessor
    frame_size: Size | None = None
    layout: str = LAYOUTS[0]
    order: str = ORDERS[0]

    @property
    def inside(self) -> Preprocessor:
        """The part of the preprocessing in the graph."""
        return self.preprocessor.for_frames() if self.frame_size is None else self.preprocessor

    def __call__(self, images: ImageLike | list[ImageLike] | tuple[ImageLike, ...]) -> NDArray[Any]:
        """Return the frames of `images` (see Preprocessor). Raises InputError for a size other than `frame_size`."""
        if self.frame_size is None:
            return self.arranged(self.preprocessor.frames(images))
        made = self.preprocessor.for_frames().frames(images)
        if made.shape[1:3] != self.frame_size:
            height, width = made.shape[1:3]
            raise InputError(
                f"The image has {height}x{width} pixels, but this graph accepts frames of {size_text(self.frame_size)} only. "
                f"Pass frames of that size, or export without --embed-resize."
            )
        return self.arranged(made)

    def as_bytes(self) -> Frames:
        """Return the same with frames of uint8."""
        return replace(self, layout=LAYOUTS[0])

    def arranged(self, pixels: NDArray[np.uint8]) -> NDArray[Any]:
        """Return RGB pixels, uint8 [batch, height, width, channels], in the layout, order and type of the frames."""
        pixels = pixels[..., ::-1] if self.order == "bgr" else pixels
        planar = self.layout == "nchw"
        return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2), np.float32) if planar else np.ascontiguousarray(pixels)

    def pixels(self, frames: NDArray[Any]) -> NDArray[np.uint8]:
        """Return the RGB pixels, uint8 [batch, height, width, channels], of frames."""
        pixels = frames.transpose(0, 2, 3, 1).astype(np.uint8) if self.layout == "nchw" else frames
        return np.ascontiguousarray(pixels[..., ::-1] if self.order == "bgr" else pixels)

    def spec(self, image_size: Size) -> TensorSpec:
        """Return the name, type and shape of the frames for a graph of this image size."""
        sides, channels = self.frame_size or image_size, self.preprocessor.channels
        if self.layout == "nchw":
            return TensorSpec(PIXELS, "float32", ("batch", channels, *sides))
        return TensorSpec(PIXELS, "uint8", ("batch", *sides, channels))

    def to_dict(self) -> dict[str, Any]:
        """Return the complete preprocessing, and the part of it in the graph, as JSON values."""
        return {**self.preprocessor.to_dict(), "embedded": self.entry()}

    def entry(self) -> dict[str, Any]:
        """Return the entry for the manifest: the frame size, null if the graph does not resize, and the steps in the graph."""
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
        size = None if self.frame_size is None else list(self.frame_size)
        return {"frame_size": size, "steps": steps, "layout": self.layout, "order": self.order}


Preparation: TypeAlias = Preprocessor | Frames


def preparation_for(preprocessor: Preprocessor, embedded: EmbeddedSteps | None) -> Preparation:
    """Return the preprocessing before a graph that includes the steps `embedded`; `preprocessor` is the complete one."""
    return preprocessor if embedded is None else Frames(preprocessor, embedded.frame_size, embedded.layout, embedded.order)


def refuse_misfit(frames: Frames, image_size: Size, channels: int) -> None:
    """Raise UsageError if `frames` cannot be turned into the input of a network for images of `image_size`."""
    if frames.preprocessor.do_pad or (frames.preprocessor.do_thumbnail and frames.frame_size is not None):
        raise UsageError(
            "The image processor pads images, which the graph cannot do. Leave out --embed-preprocess and --embed-resize, or "
            "state other steps with --preprocessor FILE."
        )
    if frames.order == "bgr" and channels != 3:
        raise UsageError(f"--input-order bgr is for images with 3 channels, and this network expects {channels}. Leave it out.")
    if frames.frame_size is None:
        return
    inside = frames.inside
    if channels in (2, 4) and inside.do_resize:
        raise UsageError(
            f"Images with {channels} channels cannot be resized in the graph: Pillow weights the channels with the last one. "
            f"Export with --embed-preprocess instead of --embed-resize."
        )
    resized = inside.resized_to(*frames.frame_size)
    if inside.crop_fill is not None and any(a < b for a, b in zip(resized, image_size, strict=True)):
        raise UsageError(
            "The image processor adds borders with the mean color, which the graph cannot do. Export with --embed-preprocess "
            "instead of --embed-resize."
        )
    made = inside.crop_size if inside.do_center_crop else resized
    if made != image_size:
        raise UsageError(
            f"The image processor turns frames of {size_text(frames.frame_size)} into "
            f"{size_text(made or frames.frame_size)}, but the graph is for {size_text(image_size)}. Export it for that size "
            f"with --image-size, or leave out --embed-resize."
        )
