"""Metadata, labels and model card: what other programs read about a bundle."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from huggingface_hub import ModelCard
from onnx import TensorProto, helper

from swin_deploy.config import SwinConfig
from swin_deploy.exporters.bundle_from_checkpoint import graph_metadata, mean_and_scale, texts_beside
from swin_deploy.exporters.external_data import add_metadata, graph_facts
from swin_deploy.frame_input import Frames
from swin_deploy.models.checkpoints import Checkpoint
from swin_deploy.preprocess import Preprocessor
from swin_deploy.tasks import TaskSpec

LABELS = {0: "tench, Tinca tinca", 1: "a\nb", 2: "lone \ud800"}
IMAGENET = Preprocessor.imagenet(32)
CROPPED = IMAGENET.with_crop((32, 32), 0.9)


def checkpoint(source: str = "org/swin", task: str = "image-classification", **changes: Any) -> Checkpoint:
    config = SwinConfig(1, image_size=(32, 32), embed_dim=16, depths=(1,), num_heads=(2,), window_size=(4,), id2label=LABELS)
    return Checkpoint(dataclasses.replace(config, **changes), {}, source, task=TaskSpec(task))


@pytest.mark.parametrize(
    ("preparation", "changes", "wanted"),
    [
        (
            IMAGENET,
            {},
            {"mean_values": "123.675 116.28 103.53", "scale_values": "58.395 57.12 57.375", "output_raw_scores": "True"},
        ),
        (IMAGENET, {}, {"labels": "tench_Tinca_tinca a_b lone_?", "reverse_input_channels": "True", "resize_type": "standard"}),
        (CROPPED, {"problem_type": "multi_label_classification"}, {"resize_type": "crop", "multilabel": "True"}),
        (dataclasses.replace(CROPPED, keep_ratio="contain"), {}, {"resize_type": "fit_to_window_letterbox"}),
        (
            Frames(CROPPED, (40, 60), "nchw", "bgr"),
            {},
            {"resize_type": "standard", "reverse_input_channels": "False", "mean_values": None},
        ),
        (IMAGENET, {"problem_type": "regression"}, {"model_type": None}),
        (IMAGENET, {"task": "backbone"}, {"model_type": None, "labels": None}),
    ],
)
def test_model_info(preparation: Preprocessor | Frames, changes: dict[str, Any], wanted: dict[str, str | None]) -> None:
    found = graph_metadata(checkpoint(**changes), preparation, "ab" * 32)
    assert {key: found.get(f"model_info {key}") for key in wanted} == wanted


@pytest.mark.parametrize("changes", [{}, {"do_rescale": False}, {"do_normalize": False}, {"rescale_factor": 1 / 127.5}])
def test_mean_and_scale_are_those_of_the_image_processor(changes: dict[str, Any]) -> None:
    preprocessor = dataclasses.replace(IMAGENET, **changes)
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    mean, scale = (np.array(values, np.float64) for values in mean_and_scale(preprocessor))
    np.testing.assert_allclose(((pixels - mean) / scale).transpose(2, 0, 1), preprocessor(pixels)[0], rtol=1e-5, atol=1e-5)


def test_appended_metadata_is_that_of_the_graph(tmp_path: Path) -> None:
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])], "g", [value], [helper.make_tensor_value_info("y", 1, [1])]
    )
    path, folder = tmp_path / "model.onnx", tmp_path / "private"
    onnx.save(helper.make_model(graph), path)
    folder.mkdir()
    metadata = graph_metadata(checkpoint(str(folder)), Frames(IMAGENET), "")
    metadata |= graph_facts({"precision": "fp32", "agreement": "not verified"}, "tensorrt")
    add_metadata(path, metadata)
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert {one.key: one.value for one in model.metadata_props} == metadata
    assert json.loads(metadata["labels"]) == ["tench, Tinca tinca", "a b", "lone ?"]
    facts = ("source", "input_layout", "input_range", "verdict")
    assert [metadata[key] for key in facts] == ["private", "NHWC", "0 to 255", "not verified"]
    assert str(tmp_path) not in str(model.metadata_props)


@pytest.mark.parametrize(
    ("source", "task", "tag", "base"),
    [
        ("org/swin", "image-classification", "image-classification", "org/swin"),
        ("/data/models/swin", "backbone", "image-feature-extraction", None),
        ("random weights, seed 0", "image-classification", "image-classification", None),
    ],
)
def test_the_card_has_valid_front_matter(source: str, task: str, tag: str, base: str | None) -> None:
    value = {"name": "pixel_values", "dtype": "float32", "shape": ["batch", 3, 32, 32]}
    texts = texts_beside('a "b"', checkpoint(source, task), IMAGENET, {"inputs": [value], "outputs": [value]})
    card = ModelCard(texts["README.md"])
    relation = None if base is None else "quantized"
    data = card.data.to_dict()
    assert (data["pipeline_tag"], data.get("base_model"), data.get("base_model_relation")) == (tag, base, relation)
    assert (data["library_name"], data["tags"][:2]) == ("onnx", ["onnx", "swin"])
    assert "/data" not in card.content
    assert texts.get("labels.txt") == ("tench, Tinca tinca\na b\nlone ?\n" if tag == "image-classification" else None)
