"""The image processors of detectors, segmenters and document models give the pixels of transformers."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import transformers.models as models
from PIL import Image

from swin_deploy.errors import InputError
from swin_deploy.preprocess import Preprocessor

EDGES = {"size": {"shortest_edge": 40, "longest_edge": 66}}
SHAPES = ((30, 50), (40, 40), (37, 91), (91, 37), (64, 80), (40, 66), (13, 200))


def images(shapes: Any = SHAPES) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (*shape, 3), dtype=np.uint8)) for shape in shapes]


def padded_to(size: tuple[int, int], raw: dict[str, Any]) -> dict[str, Any]:
    return {**raw, "pad_size": {"height": size[0], "width": size[1]}}


@pytest.mark.parametrize(
    ("module", "given"),
    [
        ("mask2former", EDGES),
        ("mask2former", {**EDGES, "size_divisor": 8}),
        ("maskformer", {**EDGES, "size_divisor": 0}),
        ("oneformer", EDGES),
        ("detr", EDGES),
        ("grounding_dino", {**EDGES, "image_mean": [0.1, 0.2, 0.3]}),
        ("deformable_detr", {}),
        ("conditional_detr", {"size": {"height": 24, "width": 40}}),
        ("segformer", {"size": {"height": 24, "width": 40}}),
        ("rt_detr", {"size": {"height": 24, "width": 40}}),
        ("dpt", {"size": {"height": 25, "width": 40}, "ensure_multiple_of": 8}),
        ("dpt", {"size": {"height": 24, "width": 40}}),
        ("donut", {"size": {"height": 60, "width": 40}}),
        ("donut", {"size": {"height": 40, "width": 64}}),
    ],
)
def test_processors_of_transformers(module: str, given: dict[str, Any]) -> None:
    package = getattr(models, module)
    (kind,) = (name for name in dir(package) if name.endswith("ImageProcessorPil"))
    theirs = getattr(package, kind)(**given)
    raw = json.loads(theirs.to_json_string())
    ours = Preprocessor.from_dict(raw)
    if "size" not in given:  # 800 and 1333, also as earlier versions write it
        earlier = {**raw, "size": 800, "max_size": 1333}
        assert Preprocessor.from_dict(earlier) == ours
        assert (ours.shortest_edge, ours.longest_edge, ours.do_pad) == (800, 1333, True)
        return
    size = (96, 96) if ours.varies else None
    if size is not None:
        ours = ours.with_size(size)
        assert Preprocessor.from_dict(padded_to(size, raw)) == ours == Preprocessor.from_dict(ours.to_dict())
    for image in images():
        expected = theirs(images=image, return_tensors="np")["pixel_values"][0]
        if size is not None:  # transformers pads the smaller images of a batch, with zeros
            expected = np.pad(expected, [(0, 0), *((0, side - at) for side, at in zip(size, expected.shape[1:], strict=True))])
        np.testing.assert_array_equal(ours(image)[0], expected)


def test_sizes_that_do_not_fit() -> None:
    made = Preprocessor.from_dict({"image_processor_type": "DetrImageProcessor", **EDGES})
    assert (
        made.with_size((40, 66)).summary().startswith("resize the shorter side to 40, the longer one to at most 66 (bilinear)")
    )
    smaller = made.with_size((20, 30))
    assert (smaller.shortest_edge, smaller.longest_edge, smaller.pad_size) == (20, 30, (20, 30))
    assert made.with_size((40, 66))(images(((20, 33), (30, 30)))).shape == (2, 3, 40, 66)  # of one batch, in one size
    with pytest.raises(InputError, match=r"has 66x40 pixels after it is resized, and is padded to 40x66"):
        made.with_size((40, 66))(images(((66, 40),)))
