"""From images to the network's input array, bit for bit as the checkpoint's Hugging Face image processor does it.

The reference is `ViTImageProcessor` with its Pillow back end (`ViTImageProcessorPil` in transformers 5), which is what
Swin and Swin V2 checkpoints name in preprocessor_config.json. Only numpy and Pillow are needed.

What transformers leaves undefined, or does silently wrong, is settled here as follows:

- A file is turned upright by its EXIF tag and its transparency is dropped, as `transformers.image_utils.load_image`
  does. A PIL image or an array is not turned, and its transparency is laid on white, as `do_convert_rgb` does. A config
  without `do_convert_rgb` makes transformers fail on anything but RGB; here such an image is converted all the same.
- 16-bit greyscale keeps its high byte, as Pillow does with 16-bit colour; `convert("RGB")` would clip it to white.
- 32-bit floating-point images are refused: their range is unknown.
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

from swin_deploy.errors import InputError

if TYPE_CHECKING:
    from PIL import Image as PILImage

    ImageLike: TypeAlias = str | os.PathLike[str] | PILImage.Image | NDArray[np.uint8]

FLAGS = ("do_resize", "do_rescale", "do_normalize", "do_center_crop", "do_convert_rgb")
KEYS = (*FLAGS, "size", "crop_size", "resample", "rescale_factor", "image_mean", "image_std")
SIDES = ("height", "width")


@dataclass(frozen=True)
class Preprocessor:
    """A callable that makes the network's input from images; immutable, comparable, and safe to share between threads.

    The fields have the names, meanings and defaults of transformers' `ViTImageProcessor`. Sizes are (height, width) in
    pixels. `shortest_edge`, when set, is used instead of `size`: the shorter side becomes that long and the proportions
    stay. `resample` is a Pillow filter number: 2 bilinear, 3 bicubic. InputError is raised for a value outside these.
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
        for flag in FLAGS:
            value = getattr(self, flag)
            _check(isinstance(value, bool) or (value is None and flag in FLAGS[3:]), flag, value, "true or false")
        filters = "a Pillow filter number from 0 to 5 (3 is bicubic)"
        _check(self.resample in range(6), "resample", self.resample, filters)
        _check(_is_number(self.rescale_factor), "rescale_factor", self.rescale_factor, "a finite number")
        if self.shortest_edge is not None:
            _check(_is_side(self.shortest_edge), "shortest_edge", self.shortest_edge, "a positive whole number")
        sizes = 'a positive whole number, [height, width] or {"height": ..., "width": ...}'
        numbers = "three finite numbers, for red, green and blue"
        several: list[tuple[str, int, Callable[[Any], bool], str]] = [
            ("size", 2, _is_side, sizes + ' or {"shortest_edge": ...}'),
            ("image_mean", 3, _is_number, numbers),
            ("image_std", 3, lambda part: _is_number(part) and np.float32(part) > 0, numbers + ", above 0"),
        ]
        if self.do_center_crop or self.crop_size is not None:
            several.append(("crop_size", 2, _is_side, sizes))
        for name, count, fits, expected in several:  # JSON has lists, and single numbers that stand for all
            value = getattr(self, name)
            parts = (value,) * count if fits(value) else value
            whole = isinstance(parts, (list, tuple)) and len(parts) == count
            _check(whole and all(map(fits, parts)), name, value, expected)
            object.__setattr__(self, name, tuple(parts))

    @classmethod
    def imagenet(cls, size: int | tuple[int, int]) -> Preprocessor:
        """The preprocessing of the published Swin and Swin V2 checkpoints, for `size` pixels.

        `size` is a square's side or (height, width). Images are squashed to it (bicubic, no crop) and normalised with
        ImageNet's statistics. Source: preprocessor_config.json of microsoft/swin-* and microsoft/swinv2-*.
        """
        config = {"size": size, "resample": 3, "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
        return cls.from_dict(config)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Preprocessor:
        """The preprocessor that the contents of a preprocessor_config.json describe.

        Both forms are read, the image processor's and the older feature extractor's (`"size": 224`). What is missing
        takes transformers' class default; null is false for a flag and the default elsewhere; other keys are ignored.
        Raises InputError for a value that cannot be meant, and for what is not supported (padding, longest_edge).
        """
        _check(isinstance(config, Mapping), "The image processor's config", config, "a JSON object")
        given = {key: value for key, value in config.items() if value is not None}
        _check(not given.get("do_pad"), "do_pad", given.get("do_pad"), "false, for padded batches are not supported")
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
        """The contents of preprocessor_config.json, as transformers writes it and reads it back; ready for JSON."""
        config: dict[str, Any] = {"image_processor_type": "ViTImageProcessor"}
        for name in KEYS:
            value = getattr(self, name)
            if name in ("size", "crop_size") and value is not None:
                value = dict(zip(SIDES, value, strict=True))
            if value is not None:
                config[name] = list(value) if isinstance(value, tuple) else value
        return config if self.shortest_edge is None else {**config, "size": {"shortest_edge": self.shortest_edge}}

    def __call__(self, images: ImageLike | list[ImageLike] | tuple[ImageLike, ...]) -> NDArray[np.float32]:
        """The network's input: float32 [B, 3, H, W], contiguous, in the order given.

        `images` is one image or a list of them, each a path, a PIL image, or a uint8 array that is HWC in RGB order
        (3 channels, 4 with alpha, 1) or HW. Images are read one at a time. Raises InputError for one that cannot be
        read, and for images that come out in different sizes.
        """
        output = np.empty(0, dtype=np.float32)
        for index, count, pixels in self._each(images):
            if index == 0:
                output = np.empty((count, 3, *pixels.shape[:2]), dtype=np.float32)
            for channel in range(3):  # a uint8 index is always in range; "clip" spares numpy the check and a buffer
                np.take(self._table[channel], pixels[..., channel], out=output[index, channel], mode="clip")
        return output

    def frames(self, images: ImageLike | list[ImageLike] | tuple[ImageLike, ...]) -> NDArray[np.uint8]:
        """The images read, resized and cropped, but neither rescaled nor normalised: uint8 [B, H, W, 3], contiguous.

        `images` and errors are those of a call.
        """
        output = np.empty(0, dtype=np.uint8)
        for index, count, pixels in self._each(images):
            if index == 0:
                output = np.empty((count, *pixels.shape), dtype=np.uint8)
            output[index] = pixels
        return output

    def with_size(self, size: tuple[int, int]) -> Preprocessor:
        """The same preprocessing for another `size` (height, width) of the network: what it crops to, or squashes to."""
        if self.do_center_crop:
            return replace(self, crop_size=size)
        return replace(self, size=size, shortest_edge=None)

    def of_frames(self) -> Preprocessor:
        """The part of it that is left to do on frames: neither resize nor crop."""
        return replace(self, do_resize=False, do_center_crop=False)

    def resized_to(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) that an image of `height` and `width` is resized to, before it is cropped."""
        if not self.do_resize:
            return height, width
        if (short := self.shortest_edge) is None:
            return self.size
        long = int(short * max(width, height) / min(width, height))
        return (long, short) if width <= height else (short, long)

    def _each(self, images: Any) -> Iterator[tuple[int, int, NDArray[np.uint8]]]:
        """(number, how many there are, pixels uint8 HWC) of each image, all of one size."""
        batch: list[Any] = list(images) if isinstance(images, (list, tuple)) else [images]
        if not batch:
            raise InputError("The list of images is empty, and at least one image is needed; give one.")
        shape: tuple[int, ...] = ()
        for index, image in enumerate(batch):
            label = _label(image, index, len(batch))
            pixels = self._pixels(image, label)
            shape = shape or pixels.shape
            if pixels.shape != shape:
                sizes = f"{pixels.shape[:2]} pixels (height, width), and those before it {shape[:2]}"
                raise InputError(f"{label} comes out {sizes}; a batch holds one size, so process them one by one.")
            yield index, len(batch), pixels

    @cached_property
    def _table(self) -> NDArray[np.float32]:
        """The output for each channel and 8-bit value [3, 256].

        transformers rescales in float64, rounds to float32, then normalises in float32, each pixel by itself. So the
        same steps on the 256 possible values give the same bits, at a fraction of the time.
        """
        scale = self.rescale_factor if self.do_rescale else 1
        table = np.tile((np.arange(256, dtype=np.float64) * scale).astype(np.float32), (3, 1))
        if self.do_normalize:
            mean = np.array(self.image_mean, dtype=np.float32)[:, None]
            table = (table - mean) / np.array(self.image_std, dtype=np.float32)[:, None]
        return table

    def _pixels(self, image: Any, label: str) -> NDArray[np.uint8]:
        """One image, read, resized and cropped: uint8 HWC."""
        from PIL import Image

        if isinstance(image, (str, os.PathLike)):
            picture = read_image(image)
        elif isinstance(image, np.ndarray):
            picture = Image.fromarray(_array_to_rgb(image, label))
        elif isinstance(image, Image.Image):
            picture = _pil_to_rgb(image, label, always=bool(self.do_convert_rgb))
        else:
            raise InputError(f"{label} is a {type(image).__name__}; give a path, a PIL image or a uint8 array.")
        if self.do_resize:
            width, height = picture.size
            target_height, target_width = self.resized_to(height, width)
            limit = Image.MAX_IMAGE_PIXELS
            if limit is not None and target_height * target_width > 2 * limit:  # where Pillow itself refuses a file
                made = f"{label} ({width} wide, {height} high) becomes {target_width} wide and {target_height} high"
                raise InputError(f"{made}, and at most {2 * limit} pixels are allowed; crop it, or set a smaller size.")
            picture = picture.resize((target_width, target_height), Image.Resampling(self.resample))
        if self.do_center_crop and self.crop_size is not None:
            height, width = self.crop_size
            left, top = (picture.width - width) // 2, (picture.height - height) // 2
            picture = picture.crop((left, top, left + width, top + height))  # what lies outside comes out black
        return np.asarray(picture)


def read_image(path: str | os.PathLike[str]) -> PILImage.Image:
    """The image in a file as 8-bit RGB, turned upright by its EXIF tag, its transparency dropped.

    The same as `transformers.image_utils.load_image`, except for 16-bit greyscale (scaled, see the module) and 32-bit
    float (refused). Of several frames, the first. Raises InputError, naming the file, where there is no image to read.
    """
    from PIL import Image, ImageOps

    label = _label(path, 0, 1)
    # Of os.path, which bears names that are too long. A pipe would never end.
    if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):  # noqa: PTH110, PTH112, PTH113
        raise InputError(f"{label} is no file. Expected an image file, such as a JPEG or PNG.")
    with _decoding(label), Image.open(path) as opened:
        return _eight_bit(ImageOps.exif_transpose(opened), label).convert("RGB")


@contextmanager
def _decoding(label: str) -> Iterator[None]:
    """Turns whatever is raised while an image is opened and decoded into an InputError that says what to do."""
    from PIL import Image, UnidentifiedImageError

    known: dict[type[Exception], str] = {
        FileNotFoundError: "does not exist; give the path of an existing image.",
        IsADirectoryError: "is a folder, and an image is expected; give the files in it.",
        PermissionError: "may not be read by this user; change its permissions.",
        UnidentifiedImageError: "is not an image that Pillow can read; convert it to JPEG or PNG.",
        Image.DecompressionBombError: "has more pixels than PIL.Image.MAX_IMAGE_PIXELS allows; make it smaller.",
    }
    try:
        yield
    except (InputError, MemoryError):
        raise
    except Exception as error:  # Pillow's readers raise anything on damaged data: SyntaxError, struct.error, IndexError
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        damaged = f"is damaged or of an unknown kind ({reason}); save it again as JPEG or PNG."
        raise InputError(f"{label} {known.get(type(error), damaged)}") from error


def _pil_to_rgb(image: PILImage.Image, label: str, *, always: bool) -> PILImage.Image:
    """`image` as RGB with transparency laid on white, step for step as transformers' `convert_to_rgb` does it.

    Unless `always` (do_convert_rgb), RGB stays as it is, even with a colour declared to be transparent.
    """
    from PIL import Image

    with _decoding(label):
        image = _eight_bit(image, label)
        transparent = "A" in image.getbands() or image.info.get("transparency") is not None
        if transparent and (always or image.mode != "RGB"):
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
        return image.convert("RGB")


def _eight_bit(image: PILImage.Image, label: str) -> PILImage.Image:
    """`image` with 8 bits per channel and at least one pixel; of 16-bit greyscale (modes I;16 and I) the high byte."""
    from PIL import Image

    advice = "scale it to 0..255 and save it as 8-bit."
    if 0 in image.size:
        raise InputError(f"{label} has no pixels ({image.width} wide, {image.height} high); give another image.")
    if image.mode == "F":
        raise InputError(f"{label} holds 32-bit floats, whose range is unknown; {advice}")
    if not image.mode.startswith("I"):
        return image
    wide = np.asarray(image)
    if wide.min() < 0 or wide.max() > 65535:
        raise InputError(f"{label} holds values from {wide.min()} to {wide.max()}, and must hold 0..65535; {advice}")
    return Image.fromarray((wide >> 8).astype(np.uint8))


def _array_to_rgb(array: NDArray[Any], label: str) -> NDArray[np.uint8]:
    """`array` as uint8 HWC in RGB; alpha is laid on white with the float64 arithmetic of transformers."""
    channels = array.shape[2] if array.ndim == 3 else 1
    if array.ndim == 4:
        raise InputError(
            f"{label} is an array of {len(array)} images, of shape {array.shape}, and one image is (height, width, 3). Give "
            "them as a list: list(array)."
        )
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or channels not in (1, 3, 4) or 0 in array.shape:
        what = f"{label} is an array of {array.dtype} and shape {array.shape}, and must be uint8 (values 0..255)"
        raise InputError(f"{what} and (height, width, 3) in RGB order, (height, width, 4) or (height, width); convert it.")
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


def _check(meant: bool, name: str, value: object, expected: str) -> None:
    """Raises InputError unless `meant`, which says whether `value` is one that `name` can have."""
    if not meant:
        raise InputError(f"{name} is {value!r}, and must be {expected}; correct preprocessor_config.json.")


def _is_side(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_number(value: object) -> bool:
    # NaN fails the comparison, and what passes fits float32
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e38
