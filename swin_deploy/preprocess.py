"""Image preprocessing, bit-identical to the checkpoint's Hugging Face image processor. Needs only numpy and Pillow.

The reference is `ViTImageProcessor` with its Pillow back end (`ViTImageProcessorPil` in transformers 5), which Swin and
Swin V2 checkpoints name in preprocessor_config.json. Where transformers fails or its result is undefined:

- A file is rotated by its EXIF tag and its alpha channel is dropped, as in `transformers.image_utils.load_image`. A PIL image
  or an array is not rotated, and alpha is blended with white, as by `do_convert_rgb`. Without `do_convert_rgb`, transformers
  fails on anything but RGB; this module converts the image to RGB.
- 16-bit greyscale keeps its high byte, like 16-bit colour in Pillow; `convert("RGB")` would clip it to white.
- 32-bit floating-point images are refused, because their range is unknown.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from swin_deploy.errors import InputError, sentence

if TYPE_CHECKING:
    from PIL import Image as PILImage

    ImageLike: TypeAlias = str | os.PathLike[str] | PILImage.Image | NDArray[np.uint8]

FLAGS = ("do_resize", "do_rescale", "do_normalize", "do_center_crop", "do_convert_rgb")
KEYS = (*FLAGS, "size", "crop_size", "resample", "rescale_factor", "image_mean", "image_std")
SIDES = ("height", "width")


@dataclass(frozen=True)
class Preprocessor:
    """Turns images into the network's input. Immutable, and safe to share between threads.

    The fields have the names, meanings and defaults of transformers' `ViTImageProcessor`. Sizes are (height, width) in
    pixels. `shortest_edge` replaces `size` if it is set: the shorter side is resized to it and the aspect ratio is kept.
    `resample` is a Pillow filter number: 2 for bilinear, 3 for bicubic. An invalid value raises InputError.
    """

    do_resize: bool = True
    size: tuple[int, int] = (224, 224)
    shortest_edge: int | None = None
    resample: int = 2
    do_center_crop: bool | None = None
    crop_size: tuple[int, int] | None = None
    do_rescale: bool = True
    rescale_factor: float = 1 / 255
    do_normalize: bool = True
    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    image_std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    do_convert_rgb: bool | None = None

    def __post_init__(self) -> None:
        sizes = 'a positive whole number, [height, width] or {"height": ..., "width": ...}'
        numbers = "three finite numbers, for red, green and blue"
        for flag in FLAGS[:3]:
            self._check(flag, lambda one: isinstance(one, bool), "true or false")
        for flag in FLAGS[3:]:
            self._check(flag, lambda one: isinstance(one, bool | None), "true or false")
        self._check("resample", lambda one: one in range(6), "a Pillow filter number from 0 to 5 (3 is bicubic)")
        self._check("rescale_factor", _is_number, "a finite number")
        self._check("shortest_edge", lambda one: one is None or _is_side(one), "a positive whole number")
        self._check("size", _is_side, sizes + ' or {"shortest_edge": ...}', 2)
        self._check("image_mean", _is_number, numbers, 3)
        self._check("image_std", lambda one: _is_number(one) and np.float32(one) > 0, numbers + ", above 0", 3)
        if self.do_center_crop or self.crop_size is not None:
            self._check("crop_size", _is_side, sizes, 2)

    def _check(self, name: str, fits: Callable[[Any], bool], expected: str, parts: int = 0) -> None:
        """Raise InputError for an invalid field. A field of several parts becomes a tuple; one value stands for all parts."""
        value = getattr(self, name)
        several = [value] * parts if fits(value) else value
        if parts and isinstance(several, (list, tuple)) and len(several) == parts and all(map(fits, several)):
            object.__setattr__(self, name, tuple(several))
        elif parts or not fits(value):
            raise _invalid(name, value, expected)

    @classmethod
    def imagenet(cls, size: int | tuple[int, int]) -> Preprocessor:
        """Return the preprocessing of microsoft/swin-* and microsoft/swinv2-*: bicubic resize, ImageNet normalization."""
        config = {"size": size, "resample": 3, "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
        return cls.from_dict(config)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Preprocessor:
        """Read the contents of preprocessor_config.json, of an image processor or an older feature extractor.

        Missing keys have the defaults of transformers. null is false for a flag, and the default otherwise. Raises InputError
        for a value that is invalid or not supported (padding, longest_edge).
        """
        if not isinstance(config, Mapping):
            raise _invalid("config", config, "a JSON object")
        given = {key: value for key, value in config.items() if value is not None}
        if given.get("do_pad"):
            raise _invalid("do_pad", given["do_pad"], "false: padded batches are not supported")
        values: dict[str, Any] = {flag: False for flag in FLAGS if flag in config}
        values.update({name: given[name] for name in KEYS if name in given})
        for name in ("size", "crop_size"):
            if isinstance(size := given.get(name), Mapping) and set(size) == set(SIDES):
                values[name] = [size[side] for side in SIDES]
        if _is_side(size := given.get("size")) and given.get("default_to_square") is False:
            size = {"shortest_edge": size}
        if isinstance(size, Mapping) and set(size) == {"shortest_edge"} and size["shortest_edge"] is not None:
            del values["size"]
            values["shortest_edge"] = size["shortest_edge"]
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Return the contents of preprocessor_config.json as transformers writes it."""
        config: dict[str, Any] = {"image_processor_type": "ViTImageProcessor"}
        for name in KEYS:
            value = getattr(self, name)
            if name in ("size", "crop_size") and value is not None:
                value = dict(zip(SIDES, value, strict=True))
            if value is not None:
                config[name] = list(value) if isinstance(value, tuple) else value
        return config if self.shortest_edge is None else {**config, "size": {"shortest_edge": self.shortest_edge}}

    def __call__(self, images: ImageLike | list[ImageLike] | tuple[ImageLike, ...]) -> NDArray[np.float32]:
        """Prepare images for the network, read one at a time: float32 [batch, 3, height, width], contiguous.

        `images` is one image or a list: paths, PIL images, or uint8 arrays [height, width, 3] in RGB order, [height, width, 4]
        with alpha, [height, width, 1] or [height, width]. Raises InputError for an image that cannot be read, and for results
        of different sizes.
        """
        output = np.empty(0, dtype=np.float32)
        for index, count, pixels in self._each(images):
            if index == 0:
                output = np.empty((count, 3, *pixels.shape[:2]), dtype=np.float32)
            for channel in range(3):  # a uint8 index is always in range; "clip" saves the check and a buffer
                np.take(self._table[channel], pixels[..., channel], out=output[index, channel], mode="clip")
        return output

    def frames(self, images: ImageLike | list[ImageLike] | tuple[ImageLike, ...]) -> NDArray[np.uint8]:
        """Read, resize and crop images (see __call__), without the rest: uint8 [batch, height, width, 3], contiguous."""
        output = np.empty(0, dtype=np.uint8)
        for index, count, pixels in self._each(images):
            if index == 0:
                output = np.empty((count, *pixels.shape), dtype=np.uint8)
            output[index] = pixels
        return output

    def with_size(self, size: tuple[int, int]) -> Preprocessor:
        """Return the same preprocessing for another input size (height, width) of the network."""
        if self.do_center_crop:
            return replace(self, crop_size=size)
        return replace(self, size=size, shortest_edge=None)

    def for_frames(self) -> Preprocessor:
        """Return the rest of the preprocessing for frames, which are already resized and cropped."""
        return replace(self, do_resize=False, do_center_crop=False)

    def resized_to(self, height: int, width: int) -> tuple[int, int]:
        """Return the (height, width) to which an image is resized before it is cropped."""
        if not self.do_resize:
            return height, width
        if (short := self.shortest_edge) is None:
            return self.size
        long = int(short * max(width, height) / min(width, height))
        return (long, short) if width <= height else (short, long)

    def _each(self, images: Any) -> Iterator[tuple[int, int, NDArray[np.uint8]]]:
        """Yield the number, the total and the pixels, uint8 [height, width, 3], of each image."""
        batch: list[Any] = list(images) if isinstance(images, (list, tuple)) else [images]
        if not batch:
            raise InputError("The list of images is empty. Expected at least one image.")
        shape: tuple[int, ...] = ()
        for index, image in enumerate(batch):
            label = _label(image, index, len(batch))
            pixels = self._pixels(image, label)
            shape = shape or pixels.shape
            if pixels.shape != shape:
                raise InputError(
                    f"{label} has {pixels.shape[0]}x{pixels.shape[1]} pixels after preprocessing, and the first image has "
                    f"{shape[0]}x{shape[1]}. A batch has one size: process the images one by one."
                )
            yield index, len(batch), pixels

    @cached_property
    def _table(self) -> NDArray[np.float32]:
        """The output for each channel and 8-bit value [3, 256].

        transformers rescales in float64, rounds to float32 and normalizes in float32, pixel by pixel. The same steps on the
        256 possible values give the same bits in a fraction of the time.
        """
        scale = self.rescale_factor if self.do_rescale else 1
        table = np.tile((np.arange(256, dtype=np.float64) * scale).astype(np.float32), (3, 1))
        if self.do_normalize:
            mean = np.array(self.image_mean, dtype=np.float32)[:, None]
            table = (table - mean) / np.array(self.image_std, dtype=np.float32)[:, None]
        return table

    def _pixels(self, image: Any, label: str) -> NDArray[np.uint8]:
        """Read, resize and crop one image: uint8 [height, width, 3]."""
        picture = _as_rgb(image, label, blend_rgb=bool(self.do_convert_rgb))
        if self.do_resize:
            picture = self._resized(picture, label)
        if self.do_center_crop and self.crop_size is not None:  # pixels outside the image are black
            height, width = self.crop_size
            left, top = (picture.width - width) // 2, (picture.height - height) // 2
            picture = picture.crop((left, top, left + width, top + height))
        return np.asarray(picture)

    def _resized(self, picture: PILImage.Image, label: str) -> PILImage.Image:
        from PIL import Image

        height, width = self.resized_to(picture.height, picture.width)
        limit = Image.MAX_IMAGE_PIXELS
        if limit is not None and height * width > 2 * limit:  # Pillow refuses a file of this size
            raise InputError(
                f"{label} would be resized from {picture.height}x{picture.width} to {height}x{width} pixels, and the limit is "
                f"{2 * limit} pixels. Crop the image, or set a smaller size."
            )
        return picture.resize((width, height), Image.Resampling(self.resample))


def read_image(path: str | os.PathLike[str]) -> PILImage.Image:
    """Read an image file, or the first frame of an animation, as 8-bit RGB (see the module). Raises InputError."""
    from PIL import Image, ImageOps

    label = _label(path, 0, 1)
    # os.path accepts names that are too long. Reading from a pipe would never end.
    if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):  # noqa: PTH110, PTH112, PTH113
        raise InputError(f"{label} is not a regular file. Expected an image file such as JPEG or PNG.")
    with _decoding(label), Image.open(path) as opened:
        return _eight_bit(ImageOps.exif_transpose(opened), label).convert("RGB")


@contextmanager
def _decoding(label: str) -> Iterator[None]:
    """Turn any error while an image is opened and decoded into an InputError."""
    from PIL import Image, UnidentifiedImageError

    known: dict[type[Exception], str] = {
        FileNotFoundError: "does not exist. Pass the path of an existing image.",
        IsADirectoryError: "is a folder. Pass the image files in it.",
        PermissionError: "cannot be read. Change its permissions.",
        UnidentifiedImageError: "is not a valid image. Expected a format that Pillow reads, such as JPEG or PNG.",
        Image.DecompressionBombError: "has more pixels than PIL.Image.MAX_IMAGE_PIXELS allows. Make it smaller.",
    }
    try:
        yield
    except (InputError, MemoryError):
        raise
    except Exception as error:  # on damaged data Pillow raises SyntaxError, struct.error, IndexError and others
        reason = sentence(str(error)) or type(error).__name__
        damaged = f"is damaged or has an unknown format ({reason}). Save it again as JPEG or PNG."
        raise InputError(f"{label} {known.get(type(error), damaged)}") from error


def _as_rgb(image: Any, label: str, *, blend_rgb: bool) -> PILImage.Image:
    """Return a path, PIL image or array as an RGB image with 8 bits per channel."""
    from PIL import Image

    if isinstance(image, (str, os.PathLike)):
        return read_image(image)
    if isinstance(image, np.ndarray):
        return Image.fromarray(_array_to_rgb(image, label))
    if isinstance(image, Image.Image):
        return _pil_to_rgb(image, label, blend_rgb=blend_rgb)
    raise InputError(f"{label} has type {type(image).__name__}. Expected a path, a PIL image or a uint8 array.")


def _pil_to_rgb(image: PILImage.Image, label: str, *, blend_rgb: bool) -> PILImage.Image:
    """Blend transparency with white, with the same steps as `convert_to_rgb` in transformers.

    Only with `blend_rgb` (do_convert_rgb), this includes the transparent colour of an RGB image.
    """
    from PIL import Image

    with _decoding(label):
        image = _eight_bit(image, label)
        transparent = "A" in image.getbands() or image.info.get("transparency") is not None
        if transparent and (blend_rgb or image.mode != "RGB"):
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
        return image.convert("RGB")


def _eight_bit(image: PILImage.Image, label: str) -> PILImage.Image:
    """Return `image` with 8 bits per channel: of 16-bit greyscale (modes I;16 and I) the high byte."""
    from PIL import Image

    advice = "Scale it to 0..255 and save it with 8 bits."
    if 0 in image.size:
        raise InputError(f"{label} has no pixels (height {image.height}, width {image.width}). Pass another image.")
    if image.mode == "F":
        raise InputError(f"{label} contains 32-bit floats, whose range is unknown. {advice}")
    if not image.mode.startswith("I"):
        return image
    wide = np.asarray(image)
    if wide.min() < 0 or wide.max() > 65535:
        raise InputError(f"{label} contains values from {wide.min()} to {wide.max()}. Expected 0..65535. {advice}")
    return Image.fromarray((wide >> 8).astype(np.uint8))


def _array_to_rgb(array: NDArray[Any], label: str) -> NDArray[np.uint8]:
    """Return `array` as uint8 [height, width, 3]; alpha is blended with white in float64, as in transformers."""
    channels = array.shape[2] if array.ndim == 3 else 1
    if array.ndim == 4:
        raise InputError(
            f"{label} is an array of {len(array)} images with shape {array.shape}. Pass a list of images [height, width, 3]: "
            "list(array)."
        )
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or channels not in (1, 3, 4) or 0 in array.shape:
        raise InputError(
            f"{label} is an array of type {array.dtype} and shape {array.shape}. Expected uint8 [height, width, 3] in RGB "
            f"order, [height, width, 4] or [height, width]."
        )
    if channels == 1:
        return np.repeat(np.atleast_3d(array), 3, axis=2)
    if channels == 4:
        alpha = array[..., 3:4] / 255
        return np.asarray(np.round(alpha * array[..., :3] + (1 - alpha) * 255).astype(np.uint8))
    return array


def _label(image: Any, index: int, count: int) -> str:
    if isinstance(image, (str, os.PathLike)):
        return f"Image file {os.fspath(image)!r}"
    return "The image" if count == 1 else f"Image {index} of the list"


def _invalid(name: str, value: object, expected: str) -> InputError:
    return InputError(f"Invalid {name}: {value!r}. Expected {expected}. Correct preprocessor_config.json.")


def _is_side(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_number(value: object) -> bool:
    # NaN fails the comparison, and smaller numbers fit float32
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e38
