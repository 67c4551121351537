"""Image preprocessing, bit-identical to the checkpoint's own. Needs only numpy and Pillow.

The references are the image processors of transformers with their Pillow back end (`ViTImageProcessorPil` in transformers 5),
and the evaluation transforms of timm, torchvision and Microsoft's code. Where they fail or their result is undefined:

- A file is rotated by its EXIF tag and its alpha channel is dropped, as in `transformers.image_utils.load_image`. A PIL image
  or an array is not rotated, and alpha is blended with white, as by `do_convert_rgb`. Without `do_convert_rgb`, transformers
  fails on anything but RGB; this module converts the image to RGB.
- Greyscale images of 16 and 32 bits hold 0..255, or 16 bits of which the high byte is kept, like 16-bit colour in Pillow;
  `convert("RGB")` would clip it to white. The largest value decides. Images whose range is unclear are refused.
- A network for one channel gets the brightness of an image (mode L). For two channels or more than three, an image has exactly
  that many bands, and none of them is blended. Pillow weights the bands of LA and RGBA with the last one when it resizes.
"""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from io import BytesIO
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from swin_deploy.errors import InputError, sentence, shown, system_limit
from swin_deploy.files import read_arrays

if TYPE_CHECKING:
    from PIL import Image as PILImage

    ImageLike: TypeAlias = str | os.PathLike[str] | PILImage.Image | NDArray[np.uint8]

FLAGS = ("do_resize", "do_rescale", "do_normalize", "do_center_crop", "do_convert_rgb")
EMBEDDABLE = dict(zip(("resize", "crop", "rescale", "normalize"), ("do_resize", "do_center_crop", *FLAGS[1:3]), strict=True))
TIMM_KEYS = ("keep_ratio", "round_crop", "crop_fill", "crop_pct")  # transformers ignores them
DETECTOR_KEYS = ("longest_edge", "size_divisor", "do_pad", "pad_size", "do_thumbnail")
KEYS = (*FLAGS, "size", "crop_size", "resample", "rescale_factor", "image_mean", "image_std", *TIMM_KEYS, *DETECTOR_KEYS)
SIDES = ("height", "width")
FILTERS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # by their numbers in Pillow
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# Image processors of transformers that resize, crop and normalize -> where their defaults differ from those of ViT.
_CLIP = {
    **{"size": {"shortest_edge": 224}, "crop_size": 224, "do_center_crop": True, "resample": 3, "do_convert_rgb": True},
    **{"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]},
    "default_to_square": False,
}
_IMAGENET = {"image_mean": list(IMAGENET_MEAN), "image_std": list(IMAGENET_STD)}
_DETECTOR = {"size": {"shortest_edge": 800, "longest_edge": 1333}, "do_pad": True, **_IMAGENET}
# Processors of detectors and segmenters: they limit the longer side too, and pad batches with zeros, right and bottom.
DETECTORS: Mapping[str, Mapping[str, Any]] = {
    **dict.fromkeys(("Detr", "DeformableDetr", "ConditionalDetr", "GroundingDino", "OneFormer"), _DETECTOR),
    **{name: {**_DETECTOR, "size_divisor": 32} for name in ("Mask2Former", "MaskFormer")},
}
PROCESSORS: Mapping[str, Mapping[str, Any]] = {
    "ViT": {},
    "Bit": _CLIP,
    "CLIP": _CLIP,
    "ConvNext": {"size": {"shortest_edge": 384}, "resample": 3, "default_to_square": False, "crop_pct": 224 / 256},
    "DeiT": {"size": [256, 256], "crop_size": 224, "do_center_crop": True, "resample": 3},
    "Beit": {"crop_size": 224, "do_center_crop": False, "resample": 3},
    "Siglip": {"resample": 3, "do_convert_rgb": True, "default_to_square": False},
    "Segformer": {"size": [512, 512], **_IMAGENET},
    "DPT": {"size": [384, 384], "resample": 3},
    "RTDetr": {"size": [640, 640], "do_normalize": False, **_IMAGENET},
    "Donut": {"size": {"height": 2560, "width": 1920}, "do_thumbnail": True, "do_pad": True},
    **DETECTORS,
}
UNSUPPORTED = {
    "do_pad": "padded batches are",
    "do_flip_channel_order": "BGR images are",
    "do_thumbnail": "thumbnails are",
    "do_align_long_axis": "rotation is",
    "do_crop_margin": "cropped margins are",
    "keep_aspect_ratio": "sizes that depend on both sides of an image are",
}
TIFF_SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
TIFF_CODECS = (1, 5, 8, 32773, 32946, 34925, 50000)  # none, LZW, deflate, PackBits, deflate, LZMA, Zstandard
ARRAY_BYTES = 1 << 30  # of an image in a NumPy file
MOST_VALUES = 1 << 27  # height x width x channels of a prepared image
MOST_CHANNELS = 10_000
RATIOS = (0.01, 100.0)  # of crop_pct
# Formats that Pillow opens only with a third-party plug-in, or that are not pictures.
UNREADABLE = {"BUFR", "FITS", "GRIB", "HDF5", "MPEG", "WMF"}
DARKEST_16_BIT = 4096  # a smaller maximum may also be that of 10 or 12 bits


@dataclass(frozen=True)
class Preprocessor:
    """Turns images into the network's input. Immutable, and safe to share between threads.

    The first fields have the names, meanings and defaults of transformers' `ViTImageProcessor`. Sizes are (height, width) in
    pixels. `shortest_edge` replaces `size` if it is set: the shorter side is resized to it and the aspect ratio is kept.
    `resample` is a Pillow filter number or name: 2 or "bilinear", 3 or "bicubic". `image_mean` and `image_std` have one number
    for each channel. The other fields are those of timm's transforms: with `keep_ratio`, an image keeps its aspect ratio and
    covers `size` ("cover") or fits into it ("contain"); `round_crop` rounds the position of the crop as torchvision does;
    `crop_fill` is the colour outside the image; `crop_pct` scales the resize with the crop. The last fields are those of
    detectors and Donut: `longest_edge` limits the longer side, `size_divisor` rounds both sides up, `do_pad` adds zeros at the
    right and bottom of the normalized image up to `pad_size`, and `do_thumbnail` shrinks an image that exceeds the crop. An
    invalid value raises InputError.
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
    image_mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    image_std: tuple[float, ...] = (0.5, 0.5, 0.5)
    do_convert_rgb: bool | None = None
    keep_ratio: str | None = None
    round_crop: bool | None = None
    crop_fill: tuple[int, ...] | None = None
    crop_pct: float | None = None
    longest_edge: int | None = None
    size_divisor: int | None = None
    do_pad: bool | None = None
    pad_size: tuple[int, int] | None = None
    do_thumbnail: bool | None = None

    def __post_init__(self) -> None:
        sizes = 'a positive whole number, [height, width] or {"height": ..., "width": ...}'
        name: object = self.resample
        if isinstance(name, str) and (found := name.rpartition(".")[2].lower()) in FILTERS:
            object.__setattr__(self, "resample", FILTERS.index(found))
        given = [value for value in (self.image_mean, self.image_std) if isinstance(value, (list, tuple)) and value]
        count = len(given[0]) if given else 3
        numbers = "three finite numbers, for red, green and blue" if count == 3 else f"{count} finite numbers, one per channel"
        for flag in FLAGS[:3]:
            self._check(flag, lambda one: isinstance(one, bool), "true or false")
        for flag in (*FLAGS[3:], "round_crop", "do_thumbnail", "do_pad"):
            self._check(flag, lambda one: isinstance(one, bool | None), "true or false")
        expected = "a Pillow filter number from 0 to 5 (3 is bicubic), or the name of a filter"
        self._check("resample", lambda one: type(one) is int and one in range(6), expected)
        self._check("rescale_factor", _is_number, "a finite number")
        for name in ("shortest_edge", "longest_edge", "size_divisor"):
            self._check(name, lambda one: one is None or _is_side(one), "a positive whole number")
        self._check("size", _is_side, sizes + ' or {"shortest_edge": ...}', 2)
        if count > MOST_CHANNELS:
            raise _invalid("image_mean", f"{count} values", f"at most {MOST_CHANNELS}")
        self._check("image_mean", _is_number, numbers, count)
        self._check("image_std", lambda one: _is_number(one) and one > 1e-9, numbers + ", above 0", count)
        self._check("keep_ratio", lambda one: one in (None, "cover", "contain"), '"cover" or "contain"')
        self._check("crop_pct", lambda one: one is None or _is_ratio(one), "a number from {} to {}".format(*RATIOS))
        if self.crop_fill is not None:
            fits = lambda one: type(one) is int and one in range(256)  # noqa: E731
            self._check("crop_fill", fits, "a number from 0 to 255 for each channel", count)
        if self.do_center_crop or self.crop_size is not None:
            self._check("crop_size", _is_side, sizes, 2)
        if self.pad_size is not None:
            self._check("pad_size", _is_side, sizes, 2)
        for name, pair in (
            ("size", self.size),
            ("pad_size", self.pad_size),
            ("crop_size", self.crop_size),
            ("shortest_edge", (self.shortest_edge or 1,) * 2),
        ):
            if pair is not None and pair[0] * pair[1] * count > MOST_VALUES:
                raise _invalid(name, pair, f"at most {MOST_VALUES // count} pixels for {channels_text(count)}")

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
        config = {"size": size, "resample": 3, "image_mean": IMAGENET_MEAN, "image_std": IMAGENET_STD}
        return cls.from_dict(config)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], channels: int = 3) -> Preprocessor:
        """Read the contents of preprocessor_config.json, of an image processor or an older feature extractor.

        Missing keys have the defaults of the class in transformers. null is false for a flag, and the default otherwise. A
        single mean stands for all `channels`. Raises InputError for a processor or a value that is invalid or not supported
        (padding, longest_edge).
        """
        if not isinstance(config, Mapping):
            raise _invalid("config", config, "a JSON object")
        if isinstance(timm := config.get("pretrained_cfg"), Mapping):  # TimmWrapperImageProcessor
            return cls.from_timm(timm, channels=channels)
        kind = _processor_kind(config)
        given = {key: value for key, value in config.items() if value is not None}
        dense = kind in DETECTORS or kind in ("Donut", "DPT")
        able = ("do_pad", "do_thumbnail") if dense or given.keys() & {"pad_size", "round_crop"} else ()
        for name in UNSUPPORTED:
            if given.get(name) and name not in able:
                raise _invalid(name, given[name], f"false: {UNSUPPORTED[name]} not supported")
        values: dict[str, Any] = {flag: False for flag in FLAGS if flag in config}
        values = {**PROCESSORS[kind], **values, **{name: given[name] for name in KEYS if name in given}}
        given = {**PROCESSORS[kind], **given}
        values.pop("default_to_square", None)
        if "image_mean" in values and "image_std" in values:
            values |= {name: [values[name]] * channels for name in ("image_mean", "image_std") if _is_number(values[name])}
        if dense:
            given = _as_dense(kind, given, config)
            values = {name: value for name, value in values.items() if name in FLAGS} | {
                n: given[n] for n in KEYS if n in given
            }
        for name in ("size", "crop_size", "pad_size"):
            if isinstance(size := given.get(name), Mapping) and set(size) == set(SIDES):
                values[name] = [size[side] for side in SIDES]
        size = given.get("size")
        if _is_side(size) and given.get("default_to_square") is False and not given.get("use_square_size"):
            size = {"shortest_edge": size}
        if isinstance(size, Mapping) and set(size) == {"shortest_edge"} and size["shortest_edge"] is not None:
            del values["size"]
            values["shortest_edge"] = size["shortest_edge"]
        if kind == "ConvNext":
            values = _as_convnext(values)
        return cls(**values)

    @classmethod
    def from_timm(cls, config: Mapping[str, Any], size: tuple[int, int] | None = None, channels: int = 3) -> Preprocessor:
        """Return the evaluation transform of timm for `config`, the pretrained_cfg of a checkpoint.

        Missing keys have the defaults of timm's `resolve_data_config`. `size` replaces input_size. Raises InputError.
        """
        stated = config.get("input_size")
        if size is None:
            if not isinstance(stated, (list, tuple)) or len(stated) != 3 or not all(map(_is_side, stated)):
                stated = (channels, 224, 224)
            size = (stated[1], stated[2])
        mean, std = (config.get(name) or default for name, default in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)))
        mode, part = config.get("crop_mode") or "center", config.get("crop_pct") or 0.875
        if mode not in ("center", "squash", "border"):
            raise _invalid("crop_mode", mode, "center, squash or border")
        mean, std = _repeated(mean, channels), _repeated(std, channels)
        made = cls(
            size=size,
            resample=config.get("interpolation") or 3,
            image_mean=mean,
            image_std=std,
            do_center_crop=True,
            crop_size=size,
            keep_ratio={"center": "cover", "border": "contain"}.get(mode),
            round_crop=True,
            crop_fill=(0,) * len(mean) if mode == "border" else None,
            crop_pct=part,
        )
        return made.with_statistics(made.image_mean, made.image_std)._scaled(size)

    @property
    def channels(self) -> int:
        """Number of channels of the prepared images."""
        return len(self.image_mean)

    @property
    def varies(self) -> bool:
        """Whether the size of the prepared image depends on the aspect ratio of the image."""
        return self.do_resize and self.shortest_edge is not None and not self.do_center_crop and self.pad_size is None

    def to_dict(self) -> dict[str, Any]:
        """Return the contents of preprocessor_config.json as transformers writes it."""
        config: dict[str, Any] = {"image_processor_type": "ViTImageProcessor"}
        for name in KEYS:
            value = getattr(self, name)
            if name in ("size", "crop_size", "pad_size") and value is not None:
                value = dict(zip(SIDES, value, strict=True))
            if value is not None:
                config[name] = list(value) if isinstance(value, tuple) else value
        return config if self.shortest_edge is None else {**config, "size": {"shortest_edge": self.shortest_edge}}

    def with_statistics(self, mean: tuple[float, ...], std: tuple[float, ...]) -> Preprocessor:
        """Return the same preprocessing with another normalization. In timm, the colour outside the image is the mean."""
        fill = self.crop_fill and tuple(min(max(round(255 * value), 0), 255) for value in mean)
        return replace(self, do_normalize=True, image_mean=mean, image_std=std, crop_fill=fill)

    def summary(self) -> str:
        """Return the steps in one line."""
        steps, sides = [], "x".join(map(str, self.size))
        if self.do_resize:
            how = {None: f"to {sides}", "cover": f"to cover {sides}", "contain": f"to fit into {sides}"}[self.keep_ratio]
            short = self.shortest_edge
            most = f", the longer one to at most {self.longest_edge}" if self.longest_edge else ""
            most += f", up to multiples of {self.size_divisor}" if self.size_divisor else ""
            steps.append(f"resize {how if short is None else f'the shorter side to {short}'}{most} ({FILTERS[self.resample]})")
        if self.do_thumbnail:
            steps.append(f"shrink into {'x'.join(map(str, self.crop_size or ()))}, with black borders")
        elif self.do_center_crop:
            steps.append(f"crop the center {'x'.join(map(str, self.crop_size or ()))}")
        if self.do_rescale and not math.isclose(self.rescale_factor, 1 / 255):
            steps.append(f"multiply by {self.rescale_factor:g}")
        if self.do_normalize:
            steps += [
                f"{name} {' '.join(f'{value:g}' for value in values)}"
                for name, values in (("mean", self.image_mean), ("std", self.image_std))
            ]
        if self.pad_size is not None:
            steps.append(f"pad with zeros to {'x'.join(map(str, self.pad_size))}")
        return ", ".join(steps) or "none"

    def __call__(self, images: ImageLike | list[ImageLike] | tuple[ImageLike, ...]) -> NDArray[np.float32]:
        """Prepare images for the network, read one at a time: float32 [batch, channels, height, width], contiguous.

        `images` is one image or a list: paths, PIL images, bytes or file objects of image files, or uint8 arrays or tensors
        [height, width, 3] in RGB order, [height, width, 4] with alpha, [height, width, 1] or [height, width]. For two channels
        or more than three, they have exactly that many. Raises InputError for an image that cannot be read, and for results of
        different sizes.
        """
        output = np.empty(0, dtype=np.float32)
        for index, count, pixels in self._each(images):
            if index == 0:
                create = np.empty if self.pad_size is None else np.zeros
                output = create((count, self.channels, *(self.pad_size or pixels.shape[:2])), dtype=np.float32)
            for channel in range(self.channels):  # a uint8 index is always in range; "clip" saves the check and a buffer
                if self.pad_size is None:
                    np.take(self._table[channel], pixels[..., channel], out=output[index, channel], mode="clip")
                else:
                    place = output[index, channel, : pixels.shape[0], : pixels.shape[1]]
                    place[:] = self._table[channel][pixels[..., channel]]
        return output

    def frames(self, images: ImageLike | list[ImageLike] | tuple[ImageLike, ...]) -> NDArray[np.uint8]:
        """Read, resize and crop images (see __call__), without the rest: uint8 [batch, height, width, channels]."""
        output = np.empty(0, dtype=np.uint8)
        for index, count, pixels in self._each(images):
            if index == 0:
                output = np.empty((count, *pixels.shape), dtype=np.uint8)
            output[index] = pixels
        return output

    def with_size(self, size: tuple[int, int]) -> Preprocessor:
        """Return the same preprocessing for another input size (height, width) of the network.

        The resize is scaled along with the crop. Without a crop, an image that keeps its aspect ratio gets the shorter side of
        `size`.
        """
        if self.do_thumbnail:
            return replace(self, shortest_edge=min(size), crop_size=size)
        if self.shortest_edge is not None and self.longest_edge is not None:
            return self._padded_to(size)
        if not self.do_center_crop or self.crop_size is None:
            edge = self.shortest_edge
            return replace(self, size=size, shortest_edge=None) if edge is None else replace(self, shortest_edge=min(size))
        if not self.do_resize or size == self.crop_size:
            return replace(self, crop_size=size)
        return self._scaled(size)

    def _padded_to(self, size: tuple[int, int]) -> Preprocessor:
        """Return the same preprocessing for images that are padded to `size`. Both edges shrink if they exceed it."""
        padded, step = replace(self, pad_size=size if self.do_pad else None), self.size_divisor or 1
        short, long = (min(size) // step * step, max(size) // step * step)
        if (self.shortest_edge or 1) > short or (self.longest_edge or 1) > long:
            return replace(padded, shortest_edge=max(short, 1), longest_edge=max(long, 1))
        return padded

    def _scaled(self, size: tuple[int, int]) -> Preprocessor:
        """Return the same preprocessing with a crop of `size`, and the resize that belongs to it."""
        assert self.crop_size is not None
        short = self.shortest_edge
        if (part := self.crop_pct) is not None:
            scaled = tuple(math.floor(side / part) for side in size)
        elif short is not None:
            scaled = tuple(side * short // min(self.crop_size) for side in size)
            if self.crop_size[0] != self.crop_size[1]:  # transformers has no other way to state it
                return replace(self, shortest_edge=max(min(scaled), 1), crop_size=size)
        else:
            scaled = tuple(side * old // crop for side, old, crop in zip(size, self.size, self.crop_size, strict=True))
        resized = (max(scaled[0], 1), max(scaled[1], 1))
        keeps, edge = "cover" if short is not None else self.keep_ratio, None
        if keeps == "cover" and resized[0] == resized[1]:
            keeps, edge = None, resized[0]
        return replace(self, size=resized, shortest_edge=edge, keep_ratio=keeps, crop_size=size)

    def with_crop(self, size: tuple[int, int], crop_pct: float) -> Preprocessor:
        """Return the same preprocessing with a crop: resize to `size` / `crop_pct`, then crop the center `size`."""
        keeps = "contain" if self.keep_ratio == "contain" else "cover"
        return replace(
            self, do_resize=True, shortest_edge=None, keep_ratio=keeps, do_center_crop=True, crop_size=size, crop_pct=crop_pct
        )._scaled(size)

    def for_frames(self) -> Preprocessor:
        """Return the rest of the preprocessing for frames, which are already resized and cropped."""
        return replace(self, do_resize=False, do_center_crop=False)

    def with_steps(self, steps: Mapping[str, Any]) -> Preprocessor:
        """Return the same preprocessing with the `steps` of a graph (see EmbeddedSteps), which rescales if anything does."""
        changes: dict[str, Any] = {flag: True for step, flag in EMBEDDABLE.items() if step in steps}
        factor = steps.get("rescale", self.rescale_factor)
        return replace(self, **{**changes, "do_rescale": "rescale" in steps, "rescale_factor": factor})

    def resized_to(self, height: int, width: int) -> tuple[int, int]:
        """Return the (height, width) to which an image is resized before it is cropped."""
        if not self.do_resize:
            return height, width
        if self.keep_ratio is not None:
            ratios = (height / self.size[0], width / self.size[1])
            ratio = max(ratios) if self.keep_ratio == "contain" else min(ratios)
            return round(height / ratio), round(width / ratio)
        if (short := self.shortest_edge) is None:
            return self.size
        exact = float(short)
        if self.longest_edge is not None and max(height, width) / min(height, width) * short > self.longest_edge:
            exact = self.longest_edge * float(min(height, width)) / float(max(height, width))  # as transformers rounds
            short = round(exact)
        long = int(exact * max(width, height) / min(width, height))
        if short == min(height, width) and self.longest_edge is not None:
            long = max(height, width)
        step = self.size_divisor or 1
        short, long = -(-short // step) * step, -(-long // step) * step
        return (long, short) if width <= height else (short, long)

    def crop_offset(self, length: int, crop: int) -> int:
        """Return where a crop begins along one axis; below 0 outside the image."""
        if self.round_crop:  # torchvision rounds to even, and pads before it crops
            return round((length - crop) / 2) if crop <= length else -((crop - length) // 2)
        return (length - crop) // 2

    def _each(self, images: Any) -> Iterator[tuple[int, int, NDArray[np.uint8]]]:
        """Yield the number, the total and the pixels, uint8 [height, width, channels], of each image."""
        batch: list[Any] = list(images) if isinstance(images, (list, tuple)) else [images]
        if not batch:
            raise InputError("The list of images is empty. Expected at least one image.")
        shape: tuple[int, ...] = ()
        for index, image in enumerate(batch):
            label = _label(image, index, len(batch))
            pixels = self._pixels(_plain_image(image, label), label)
            shape = shape or pixels.shape
            if self.pad_size is not None and any(a > b for a, b in zip(pixels.shape, self.pad_size, strict=False)):
                raise InputError(
                    f"{label} has {pixels.shape[0]}x{pixels.shape[1]} pixels after it is resized, and is padded to "
                    f"{self.pad_size[0]}x{self.pad_size[1]}. Export for images of that shape: --image-size HEIGHTxWIDTH."
                )
            if pixels.shape != shape and self.pad_size is None:
                raise InputError(
                    f"{label} has {pixels.shape[0]}x{pixels.shape[1]} pixels after preprocessing, and the first image has "
                    f"{shape[0]}x{shape[1]}. A batch has one size: process the images one by one."
                )
            yield index, len(batch), pixels

    @cached_property
    def _table(self) -> NDArray[np.float32]:
        """The output for each channel and 8-bit value [channels, 256].

        transformers rescales in float64, rounds to float32 and normalizes in float32, pixel by pixel. The same steps on the
        256 possible values give the same bits in a fraction of the time.
        """
        scale = self.rescale_factor if self.do_rescale else 1
        table = np.tile((np.arange(256, dtype=np.float64) * scale).astype(np.float32), (self.channels, 1))
        if self.do_normalize:
            mean = np.array(self.image_mean, dtype=np.float32)[:, None]
            table = (table - mean) / np.array(self.image_std, dtype=np.float32)[:, None]
        return table

    def _pixels(self, image: Any, label: str) -> NDArray[np.uint8]:
        """Read, resize and crop one image: uint8 [height, width, channels]."""
        from PIL import Image

        if self.channels in (1, 3):
            picture = _as_rgb(image, label, blend_rgb=bool(self.do_convert_rgb))
            return np.atleast_3d(np.asarray(self._fitted(picture if self.channels == 3 else picture.convert("L"), label)))
        bands = _as_bands(image, label, self.channels)
        if self.channels <= 4:
            return np.asarray(self._fitted(Image.fromarray(bands), label))
        parts = [Image.fromarray(np.ascontiguousarray(bands[..., channel])) for channel in range(self.channels)]
        return np.stack([np.asarray(self._fitted(part, label, channel)) for channel, part in enumerate(parts)], axis=2)

    def _fitted(self, picture: PILImage.Image, label: str, first: int = 0) -> PILImage.Image:
        """Resize and crop an image, or the band `first` of one."""
        from PIL import Image

        if self.do_resize:
            picture = self._resized(picture, label)
        if self.do_thumbnail and self.crop_size is not None:
            picture = self._thumbnail(picture)
        if not self.do_center_crop or self.crop_size is None:
            return picture
        height, width = self.crop_size
        left, top = self.crop_offset(picture.width, width), self.crop_offset(picture.height, height)
        if self.crop_fill is not None and (width > picture.width or height > picture.height):
            fill = self.crop_fill[first : first + len(picture.getbands())]
            canvas = Image.new(picture.mode, (width, height), fill if len(fill) > 1 else fill[0])
            canvas.paste(picture, (-left, -top))
            return canvas
        return picture.crop((left, top, left + width, top + height))  # pixels outside the image are black

    def _thumbnail(self, picture: PILImage.Image) -> PILImage.Image:
        from PIL import Image

        height, width = (min(pair) for pair in zip((picture.height, picture.width), self.crop_size or (), strict=True))
        if (width, height) == picture.size:
            return picture
        if picture.height > picture.width:
            width = int(picture.width * height / picture.height)
        elif picture.width > picture.height:
            height = int(picture.height * width / picture.width)
        return picture.resize((max(width, 1), max(height, 1)), Image.Resampling(self.resample))

    def _resized(self, picture: PILImage.Image, label: str) -> PILImage.Image:
        from PIL import Image

        height, width = self.resized_to(picture.height, picture.width)
        if not height or not width:
            raise InputError(
                f"{label} has {picture.height}x{picture.width} pixels; resizing would make it {height}x{width}. Crop the image."
            )
        limit = Image.MAX_IMAGE_PIXELS
        if limit is not None and height * width > 2 * limit:  # Pillow refuses a file of this size
            raise InputError(
                f"{label} would be resized from {picture.height}x{picture.width} to {height}x{width} pixels, and the limit is "
                f"{2 * limit} pixels. Crop the image, or set a smaller size."
            )
        return picture.resize((width, height), Image.Resampling(self.resample))


def read_image(path: str | os.PathLike[str] | BytesIO) -> PILImage.Image:
    """Read an image file, or the first frame of an animation, as 8-bit RGB (see the module). Raises InputError."""
    label = _label(path, 0, 1)
    if not isinstance(path, BytesIO) and str(path).lower().endswith((".npy", ".npz")) and os.path.isfile(path):  # noqa: PTH113
        return _as_rgb(_numpy_image(path, label), label, blend_rgb=False)
    with _opened(path, label) as opened:
        return _eight_bit(_turned(opened), label).convert("RGB")


@contextmanager
def _opened(path: str | os.PathLike[str] | BytesIO, label: str) -> Iterator[PILImage.Image]:
    """Open an image file. Errors while it is decoded become InputError."""
    from PIL import Image

    # os.path accepts names that are too long. Reading from a pipe would never end.
    if isinstance(path, BytesIO):
        pass
    elif not os.path.exists(path):  # noqa: PTH110
        refuse_address(path, label)
    elif not (os.path.isfile(path) or os.path.isdir(path)):  # noqa: PTH112, PTH113
        raise InputError(f"{label} is not a regular file. Expected an image file such as JPEG or PNG.")
    with _decoding(label), Image.open(path) as opened:
        yield opened


def _turned(image: PILImage.Image) -> PILImage.Image:
    """Return the image of a file, rotated by its EXIF tag."""
    from PIL import ImageOps

    return ImageOps.exif_transpose(image)


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
        if (limit := system_limit(error)) is not None:
            raise InputError(f"{label} cannot be read. {limit}") from error
        reason = sentence(shown(str(error))) or type(error).__name__
        damaged = f"is damaged or has an unknown format ({reason}). Save it again as JPEG or PNG."
        raise InputError(f"{label} {known.get(type(error), damaged)}") from error


def _as_rgb(image: Any, label: str, *, blend_rgb: bool) -> PILImage.Image:
    """Return a path, PIL image or array as an RGB image with 8 bits per channel."""
    from PIL import Image

    if isinstance(image, (str, os.PathLike, BytesIO)):
        picture = read_image(image)
        return _pil_to_rgb(picture, label, blend_rgb=True) if blend_rgb else picture  # a transparent colour outlives it
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
    """Return `image` with 8 bits per channel. Greyscale with 16 or 32 bits (modes I;16, I and F) is converted."""
    from PIL import Image

    if 0 in image.size:
        raise InputError(f"{label} has no pixels (height {image.height}, width {image.width}). Pass another image.")
    return Image.fromarray(_bytes_of(np.asarray(image), label)) if image.mode[0] in "IF" else image


def _bytes_of(wide: NDArray[Any], label: str) -> NDArray[np.uint8]:
    """Return values of 16 or 32 bits as bytes: as they are up to 255, and the high byte of 16 bits."""
    if wide.dtype == np.uint8:
        return wide
    low, high, advice = wide.min(), wide.max(), "Scale it to 0..255 and save it with 8 bits."
    if wide.dtype.kind == "f" and not (high > 1 and np.array_equal(wide, np.floor(wide))):
        raise InputError(f"{label} contains 32-bit floats from {low:g} to {high:g}, whose range is unknown. {advice}")
    if low < 0 or high > 65535:
        raise InputError(f"{label} contains values from {low:g} to {high:g}. Expected 0..65535. {advice}")
    if high <= 255 and high != 1:
        return wide.astype(np.uint8)
    if high < DARKEST_16_BIT:
        raise InputError(
            f"{label} contains values from {low:g} to {high:g}. Expected those of 8 or of 16 bits; this range is unclear. "
            f"{advice}"
        )
    return (wide.astype(np.uint16) >> 8).astype(np.uint8)


def _as_bands(image: Any, label: str, channels: int) -> NDArray[np.uint8]:
    """Return an image with exactly `channels` bands as uint8 [height, width, channels]."""
    from PIL import Image

    if isinstance(image, (str, os.PathLike)) and os.fspath(image).lower().endswith((".npy", ".npz")):
        image = _numpy_image(image, label)
    if isinstance(image, (str, os.PathLike, BytesIO)):
        return _file_bands(image, label, channels)
    if isinstance(image, Image.Image):
        return _picture_bands(image, label, channels)
    if not isinstance(image, np.ndarray):
        raise InputError(f"{label} has type {type(image).__name__}. Expected a path, a PIL image or a uint8 array.")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != channels or 0 in image.shape:
        hint = " Move the channels last: array.transpose(1, 2, 0)." if image.ndim == 3 and image.shape[0] == channels else ""
        raise InputError(
            f"{label} is an array of type {image.dtype} and shape {image.shape}. Expected uint8 [height, width, {channels}], "
            f"because this network expects {channels} channels.{hint}"
        )
    return image


def _numpy_image(path: str | os.PathLike[str], label: str) -> NDArray[Any]:
    """Read one image from a .npy file, or from a .npz file with one array."""
    found = list(read_arrays(path, ARRAY_BYTES, name=label).values())
    if len(found) != 1:
        raise InputError(f"{label} contains {len(found)} arrays. Expected one image.")
    return found[0]


def _file_bands(path: str | os.PathLike[str] | BytesIO, label: str, channels: int) -> NDArray[np.uint8]:
    try:
        with _opened(path, label) as opened:
            return _picture_bands(opened, label, channels, _turned)
    except InputError:
        if not _is_tiff(path):
            raise
    return _bytes_of(_tiff_bands(path, label, channels), label)


def _is_tiff(path: str | os.PathLike[str] | BytesIO) -> bool:
    if isinstance(path, BytesIO):
        return path.getvalue().startswith(TIFF_SIGNATURES)
    if not os.path.isfile(path) or not os.access(path, os.R_OK):  # noqa: PTH113 - as above
        return False
    with open(path, "rb") as file:  # noqa: PTH123
        return file.read(4) in TIFF_SIGNATURES


def _picture_bands(
    image: PILImage.Image, label: str, channels: int, turn: Callable[[PILImage.Image], PILImage.Image] = lambda image: image
) -> NDArray[np.uint8]:
    """Return the bands of an image, or the frames of a file with one band each."""
    from PIL import ImageSequence

    with _decoding(label):
        if len(image.getbands()) == 1 and _has_frames(image, channels):
            _refuse_bomb(channels * image.width * image.height)
            size, frames = image.size, []
            for frame in ImageSequence.Iterator(image):
                if frame.size != size:
                    raise InputError(f"{label} has frames of different sizes. Expected {channels} of the same size.")
                frames.append(np.asarray(_eight_bit(turn(frame), label)))
            return np.dstack(frames)
        bands = np.atleast_3d(np.asarray(_eight_bit(turn(image), label)))
    if bands.shape[2] != channels:
        raise _wrong_bands(label, f"has mode {image.mode} with {channels_text(bands.shape[2])}", channels)
    return bands


def _has_frames(image: PILImage.Image, count: int) -> bool:
    """Return whether a file has exactly `count` frames. n_frames would read the others, too."""
    try:
        image.seek(count - 1)
    except EOFError:
        return False
    try:
        image.seek(count)
    except EOFError:
        return True
    finally:
        image.seek(0)
    return False


def _refuse_bomb(size: int) -> None:
    """Raise Pillow's error for decoded samples of more bytes than its limit of pixels with four channels has."""
    from PIL import Image

    if Image.MAX_IMAGE_PIXELS is not None and size > 8 * Image.MAX_IMAGE_PIXELS:
        raise Image.DecompressionBombError


def _wrong_bands(label: str, found: str, channels: int) -> InputError:
    return InputError(
        f"{label} {found}, and this network expects {channels}. Pass an array [height, width, {channels}], or a file with "
        f"{channels} bands."
    )


def channels_text(channels: int) -> str:
    """Return the number with its noun."""
    return f"{channels} channel{'s' * (channels > 1)}"


def _tiff_bands(file: str | os.PathLike[str] | BytesIO, label: str, channels: int) -> NDArray[Any]:
    """Return the samples [height, width, channels] of a TIFF file that Pillow has no mode for."""

    from swin_deploy.dependencies import require

    tifffile, _ = (require(name, "read a TIFF file with several bands") for name in ("tifffile", "imagecodecs"))
    if isinstance(file, BytesIO):
        file.seek(0)
    if not (log := logging.getLogger("tifffile")).handlers:
        log.addHandler(logging.NullHandler())  # otherwise its warnings about a damaged file are printed
    with _decoding(label), tifffile.TiffFile(file) as opened:
        page = opened.pages.first
        if page.samplesperpixel != channels:
            raise _wrong_bands(label, f"is a TIFF file with {channels_text(page.samplesperpixel)}", channels)
        if page.imagedepth != 1 or page.dtype is None or page.dtype.kind not in "uif" or page.compression not in TIFF_CODECS:
            raise InputError(f"{label} has samples or a compression that are not supported. Save it without compression.")
        largest = max(page.nbytes, math.prod(page.chunks) * page.dtype.itemsize)
        _refuse_bomb(largest)
        parts = math.prod(page.chunked)
        if not len(page.dataoffsets) == len(page.databytecounts) == parts or sum(page.databytecounts) > opened.filehandle.size:
            raise InputError(f"{label} is damaged: its table of contents does not match its size. Save it again.")
        samples = page.asarray(squeeze=False, maxworkers=1)  # [separate samples, 1, height, width, adjacent samples]
        height, width = samples.shape[2:4]
        return np.asarray(samples[:, 0].transpose(1, 2, 0, 3).reshape(height, width, channels))


def _array_to_rgb(array: NDArray[Any], label: str) -> NDArray[np.uint8]:
    """Return `array` as uint8 [height, width, 3]; alpha is blended with white in float64, as in transformers."""
    channels = array.shape[2] if array.ndim == 3 else 1
    if array.ndim == 4:
        raise InputError(
            f"{label} is an array of {len(array)} images with shape {array.shape}. Pass a list of images [height, width, 3]: "
            "list(array)."
        )
    if array.ndim == 3 and array.shape[0] in (1, 3, 4) and channels not in (1, 3, 4):
        raise InputError(
            f"{label} has its channels first: shape {array.shape}. Expected [height, width, {array.shape[0]}]: pass "
            "array.transpose(1, 2, 0), or tensor.permute(1, 2, 0)."
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


def refuse_address(path: str | os.PathLike[str], label: str) -> None:
    """Raise InputError if `path` is a web address or a pattern of file names."""
    text = os.fspath(path)
    if text.lower().startswith(("http:/", "https:/")):  # a Path has one slash
        raise InputError(f"{label} is a web address. Download the file, and pass its path.")
    if any(sign in text for sign in "*?["):
        raise InputError(f"{label} is a pattern and not a file. Pass the files: sorted(glob.glob({text!r})).")


def image_suffixes() -> set[str]:
    """Return the suffixes of the image files that Pillow reads."""
    from PIL import Image

    suffixes = Image.registered_extensions()  # loads every plug-in
    return {suffix for suffix, kind in suffixes.items() if kind in Image.OPEN and kind not in UNREADABLE}


def file_in_memory(image: Any) -> BytesIO | None:
    """Return the contents of bytes or of a file object; None for anything else."""
    if hasattr(image, "read"):
        if hasattr(image, "seekable") and image.seekable():
            image.seek(0)
        image = image.read()
        if isinstance(image, str):
            raise InputError('A file is opened as text. Open it with "rb", or pass its path.')
    return BytesIO(image) if isinstance(image, (bytes, bytearray, memoryview)) else None


def _plain_image(image: Any, label: str) -> Any:
    """Return a file in memory for bytes and file objects, and an array for a tensor; name the conversion of other arrays."""
    from PIL import Image

    if isinstance(image, (str, os.PathLike, Image.Image)):
        return image
    if (file := file_in_memory(image)) is not None:
        return file
    if not isinstance(image, np.ndarray):
        if not hasattr(image, "__dlpack__") or not hasattr(image, "shape"):
            return image
        try:
            image = np.asarray(image)
        except (TypeError, RuntimeError) as error:
            raise InputError(
                f"{label} is a tensor on a device, or with gradients. Pass tensor.detach().cpu().numpy()."
            ) from error
    if image.dtype.kind == "f" and image.size:
        low, high = image.min(), image.max()
        scale = "(array * 255).round()" if high <= 1 else "array.round()"
        raise InputError(
            f"{label} is an array of type {image.dtype} and shape {image.shape}, with values from {low:g} to {high:g}. "
            f'Expected uint8 from 0 to 255: pass {scale}.clip(0, 255).astype("uint8").'
        )
    return image


def _label(image: Any, index: int, count: int) -> str:
    if isinstance(image, (str, os.PathLike)):
        return f"Image file {os.fspath(image)!r}"
    return "The image" if count == 1 else f"Image {index} of the list"


def _invalid(name: str, value: object, expected: str) -> InputError:
    return InputError(f"Invalid {name}: {shown(repr(value))}. Expected {expected}. Correct preprocessor_config.json.")


def _processor_kind(config: Mapping[str, Any]) -> str:
    """Return the key of PROCESSORS for the image processor that `config` names."""
    name = str(config.get("image_processor_type") or config.get("feature_extractor_type") or "ViTImageProcessor")
    for kind in PROCESSORS:
        if re.fullmatch(f"{kind}(ImageProcessor(Fast|Pil)?|FeatureExtractor)", name, re.IGNORECASE):
            return kind
    raise InputError(
        f"preprocessor_config.json names {shown(name)}, whose steps are not supported. Supported are "
        f"{', '.join(PROCESSORS)} image processors, which resize, crop and normalize. If the model was trained with "
        f"these steps, describe them with --preprocessor FILE."
    )


def _as_dense(kind: str, given: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of an image processor of detectors, Donut or DPT, with those of earlier versions replaced."""
    given = dict(given)
    size, step = given.get("size"), given.pop("ensure_multiple_of", None) or config.get("size_divisibility")
    if kind == "DPT":
        step = step if _is_side(step) else 1
        sides = [size[side] for side in SIDES] if isinstance(size, Mapping) and set(size) == set(SIDES) else size
        return {**given, "size": [round(one / step) * step for one in sides] if isinstance(sides, list) else sides}
    if kind == "Donut":
        given.pop("do_pad", None)
        size = dict(zip(SIDES, reversed(size), strict=False)) if isinstance(size, list | tuple) else size
        if not isinstance(size, Mapping) or not all(_is_side(size.get(side)) for side in SIDES):
            raise _invalid("size", size, '{"height": ..., "width": ...}')
        if config.get("do_pad") is False or config.get("do_thumbnail") is False:
            raise _invalid("do_pad and do_thumbnail", False, "true: other images have no fixed size")
        given |= {"size": {"shortest_edge": min(size.values())}, "crop_size": dict(size), "do_center_crop": True}
        return {**given, "round_crop": True, "crop_fill": [0] * len(given.get("image_mean") or (0, 0, 0)), "do_thumbnail": True}
    if step is not None:
        given["size_divisor"] = step
    if not given.get("size_divisor"):
        given.pop("size_divisor", None)
    if _is_side(size):
        size = {"shortest_edge": size, "longest_edge": config.get("max_size") or 1333}
    if isinstance(size, Mapping) and set(size) == {"shortest_edge", "longest_edge"}:
        given |= {"size": {"shortest_edge": size["shortest_edge"]}, "longest_edge": size["longest_edge"]}
    return given


def _as_convnext(values: dict[str, Any]) -> dict[str, Any]:
    """Return `values` with the rule of ConvNextImageProcessor: below 384 pixels a crop, otherwise a square without one."""
    edge: Any = values.get("shortest_edge")
    part: Any = values.pop("crop_pct")
    if not values.get("do_resize", True):
        return values
    cropped = values.get("do_center_crop") and (not _is_side(edge) or edge < 384)
    if cropped or not _is_side(edge) or not _is_ratio(part):
        expected = '{{"shortest_edge": ...}}, crop_pct from {} to {}, and no do_center_crop'.format(*RATIOS)
        raise _invalid("size", values.get("size", edge), expected)
    del values["shortest_edge"]
    if edge >= 384:
        return {**values, "size": edge}
    return {**values, "shortest_edge": int(edge / part), "do_center_crop": True, "crop_size": edge, "crop_pct": part}


def _repeated(values: Any, channels: int) -> Any:
    """Return one value, or the single one in a list, for each channel."""
    if isinstance(values, (list, tuple)):
        return list(values) * channels if len(values) == 1 else values
    return [values] * channels


def _is_side(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= MOST_VALUES


def _is_ratio(value: object) -> bool:
    return _is_number(value) and RATIOS[0] <= value <= RATIOS[1]  # type: ignore[operator]


def _is_number(value: object) -> bool:
    # NaN fails the comparison; of smaller numbers, all results are finite in float32
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e9
