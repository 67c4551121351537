"""Frames inside the network against Pillow and the preprocessor outside: the same pixels, and the same patch embedding."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from swin_deploy.config import SwinConfig
from swin_deploy.errors import InputError, UsageError
from swin_deploy.frame_input import Frames, preparation_for, refuse_misfit
from swin_deploy.manifest import EmbeddedSteps
from swin_deploy.models.checkpoints import random_checkpoint
from swin_deploy.models.frame_embedding import FrameEmbedding, split_exactly
from swin_deploy.models.swin import PatchEmbedding
from swin_deploy.preprocess import Preprocessor
from swin_deploy.tasks import TaskSpec

IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
BICUBIC = {"size": {"height": 48, "width": 40}, "resample": 3, **IMAGENET}


def embedding(
    preprocessor: Preprocessor, image: tuple[int, int], frame: tuple[int, int] | None, cast_first: bool, *arranged: str
) -> Any:
    """(the network's patch embedding, the same for frames), with random weights."""
    config = SwinConfig(
        version=1,
        image_size=image,
        embed_dim=16,
        depths=(1,),
        num_heads=(2,),
        window_size=(4,),
        num_channels=preprocessor.channels,
    )
    tensors = random_checkpoint(config, TaskSpec()).tensors
    frames = Frames(preprocessor, frame, *arranged)
    return PatchEmbedding(config, image, tensors, False), FrameEmbedding(config, image, tensors, False, frames, cast_first)


def noise(height: int, width: int, extreme: bool = False) -> np.ndarray[Any, Any]:
    rng = np.random.default_rng(height * 10007 + width)
    if extreme:  # the filter overshoots, and Pillow cuts
        return (rng.integers(0, 2, (2, height, width, 3)) * 255).astype(np.uint8)
    return rng.integers(0, 256, (2, height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("cast_first", [True, False])
@pytest.mark.parametrize(
    ("frame", "size", "resample"),
    [
        ((135, 240), (56, 56), 3),
        ((240, 135), (56, 56), 2),
        ((480, 30), (56, 56), 3),  # Pillow may take the rows first here
        ((30, 480), (56, 56), 3),
        ((1, 1), (32, 36), 3),
        ((3, 5), (48, 40), 2),
        ((2, 20000), (32, 32), 3),
        ((97, 101), (32, 36), 1),
        ((97, 101), (32, 36), 4),
        ((97, 101), (32, 36), 5),
        ((97, 101), (132, 36), 0),
        ((64, 56), (64, 32), 3),
        ((64, 56), (64, 56), 3),
    ],
)
def test_pixels_are_those_of_pillow(frame: tuple[int, int], size: tuple[int, int], resample: int, cast_first: bool) -> None:
    """Bit for bit: float32 represents all sums of integers exactly."""
    preprocessor = Preprocessor(size=size, resample=resample)
    _, module = embedding(preprocessor, size, frame, cast_first)
    for extreme in (False, True):
        images = noise(*frame, extreme)
        made = module.resize(torch.from_numpy(images)).numpy()
        pillow = [Image.fromarray(image).resize(size[::-1], Image.Resampling(resample)) for image in images]
        assert np.array_equal(made, np.stack([np.asarray(image) for image in pillow]))


CONFIGS: dict[str, dict[str, Any]] = {
    "bicubic": BICUBIC,
    "shortest edge and crop": {
        "resample": 3, "size": {"shortest_edge": 60}, "do_center_crop": True, "crop_size": [48, 40], **IMAGENET,
    },
    "crop that pads with black": {"size": 20, "do_center_crop": True, "crop_size": [48, 40], **IMAGENET},
    "crop alone": {"do_resize": False, "do_center_crop": True, "crop_size": [48, 40]},
    "no rescale": {**BICUBIC, "do_rescale": False, "image_mean": [120.0, 110.0, 100.0], "image_std": [57.0, 58.0, 59.0]},
    "no normalize": {**BICUBIC, "do_normalize": False},
    "other scale": {**BICUBIC, "rescale_factor": 1 / 127.5, "image_mean": 1, "image_std": 1.0},
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("image", [(48, 40), (45, 38)])  # the second is no whole patches, and zeros come after normalisation
def test_tokens_are_those_of_transformers_processor(name: str, image: tuple[int, int]) -> None:
    transformers = pytest.importorskip("transformers")
    preprocessor = Preprocessor.from_dict(CONFIGS[name])
    if image != (48, 40):
        preprocessor = preprocessor.with_size(image)
    processor = transformers.ViTImageProcessorPil.from_dict(preprocessor.to_dict())
    frames = noise(70, 52)
    prepared = processor(list(frames), return_tensors="np")["pixel_values"].astype(np.float32)
    cases = [(None,), ((70, 52),), (None, "nchw", "bgr"), ((70, 52), "nchw", "rgb"), ((70, 52), "nhwc", "bgr")]
    for frame, *arranged in cases:
        outside, inside = embedding(preprocessor, image, frame, True, *arranged)
        made = Frames(preprocessor, frame, *arranged)
        given, spec = made(list(frames)), made.spec(image)
        assert (given.dtype, given.shape[1:]) == (spec.dtype, spec.shape[1:])
        assert np.array_equal(made.pixels(given), Frames(preprocessor, frame)(list(frames)))
        expected = outside.project(torch.from_numpy(prepared))
        found = inside.project(torch.from_numpy(given))
        scale = float(expected.abs().max())
        assert float((found - expected).abs().max()) < 1e-6 * scale * 10


TIMM = {"input_size": [3, 48, 40], "crop_pct": 0.9, "interpolation": "bicubic"}


@pytest.mark.parametrize("timm", [TIMM, {**TIMM, "crop_mode": "squash"}, {**TIMM, "input_size": [3, 45, 45]}])
@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_tokens_of_any_number_of_channels(timm: dict[str, Any], channels: int) -> None:
    timm = {**timm, "mean": [0.1 * (channel + 1) for channel in range(channels)], "std": [0.3]}
    preprocessor = Preprocessor.from_timm(timm, channels=channels)
    size = (timm["input_size"][1], timm["input_size"][2])
    pixels = np.random.default_rng(0).integers(0, 256, (70, 53, channels), dtype=np.uint8)
    for frame in (None, (70, 53)) if channels != 2 else (None,):
        outside, inside = embedding(preprocessor, size, frame, cast_first=False)
        expected = outside.project(torch.from_numpy(preprocessor(pixels)))
        found = inside.project(torch.from_numpy(Frames(preprocessor, frame)(pixels)))
        assert float((found - expected).abs().max()) < 1e-5 * float(expected.abs().max())


def test_halves_are_the_whole() -> None:
    weights = np.random.default_rng(0).integers(-(1 << 19), 1 << 22, (5, 9))
    high, low, shift = split_exactly(weights)
    assert np.array_equal(high.astype(np.int64) * (1 << shift) + low.astype(np.int64), weights)
    assert float(np.abs(low).max()) <= 2048
    assert float(np.abs(high).max()) <= 2048


def test_what_does_not_fit_is_refused() -> None:
    preprocessor = Preprocessor.from_dict(BICUBIC)
    refuse_misfit(Frames(preprocessor, (1080, 1920)), (48, 40), 3)
    refuse_misfit(Frames(preprocessor), (48, 40), 4)
    with pytest.raises(UsageError, match="--input-order bgr is for images with 3 channels"):
        refuse_misfit(Frames(preprocessor, order="bgr"), (48, 40), 1)
    with pytest.raises(UsageError, match="with 4 channels cannot be resized in the graph"):
        refuse_misfit(Frames(preprocessor, (1080, 1920)), (48, 40), 4)
    border = Preprocessor.from_timm({"input_size": [3, 48, 40], "crop_mode": "border", "crop_pct": 1.0})
    with pytest.raises(UsageError, match="adds borders with the mean color"):
        refuse_misfit(Frames(border, (1080, 1920)), (48, 40), 3)
    edge = dataclasses.replace(preprocessor, shortest_edge=48)
    with pytest.raises(UsageError, match=r"turns frames of 100x200 into 48x96, but the graph is for 48x40"):
        refuse_misfit(Frames(edge, (100, 200)), (48, 40), 3)
    with pytest.raises(InputError, match=r"has 70x52 pixels, but this graph accepts frames of 100x200 only"):
        Frames(preprocessor, (100, 200))(list(noise(70, 52)))


def test_a_manifest_gives_back_what_was_embedded() -> None:
    preprocessor = Preprocessor.from_dict(BICUBIC)
    for one in (Frames(preprocessor), Frames(preprocessor, (1080, 1920)), Frames(preprocessor, None, "nchw", "bgr")):
        assert preparation_for(preprocessor, EmbeddedSteps.read(one.entry())) == one
    assert preparation_for(preprocessor, None) is preprocessor
    steps = Frames(preprocessor, (1080, 1920)).entry()["steps"]
    assert list(steps) == ["resize", "rescale", "normalize"]
    assert list(Frames(preprocessor).entry()["steps"]) == ["rescale", "normalize"]
