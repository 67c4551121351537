"""Graphs with embedded preprocessing, from export to predictions, compared with transformers and with other graphs."""

from __future__ import annotations

import functools
import hashlib
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli.exported import (
    EXAMPLES,
    FLOWER,
    THREE,
    WEIGHTS,
    cli_here,
    contents,
    digits,
    exported_bundle,
    one_block,
    refused,
    result,
)
from PIL import Image

import swin_deploy
from swin_deploy.bundle import Bundle
from swin_deploy.dependencies import onnxruntime_session
from swin_deploy.errors import InputError, UsageError
from swin_deploy.exporters.typed_graphs import with_typed_graphs
from swin_deploy.parity import compare
from swin_deploy.runtimes.backends import runtime_from_onnx
from swin_deploy.tasks import TaskSpec

pytest.importorskip("onnxruntime", reason="graphs are run with ONNX Runtime")

DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
CHINA = EXAMPLES / "photos/china.jpg"
FRAME = (427, 640)  # of both photographs
AS_TRANSFORMERS = ("cmyk", "palette", "alpha", "exif", "one pixel", "very wide")


def embedded(*options: str) -> Path:
    """Export the trained digits network, V1, with `options`. Copy the bundle before changing it."""
    return exported_bundle("--weights", str(WEIGHTS[1]), *options)


@functools.cache
def outside(folder: Path) -> dict[str, Path]:
    """Write photographs of awkward sizes and modes into `folder`."""
    china, flower = Image.open(CHINA), Image.open(FLOWER)
    china.convert("CMYK").save(folder / "cmyk.jpg", quality=95)
    flower.quantize(64).save(folder / "palette.png", transparency=3)
    alpha = flower.copy()
    alpha.putalpha(china.convert("L"))
    alpha.save(folder / "alpha.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    china.save(folder / "exif.jpg", exif=exif)
    Image.fromarray(np.asarray(flower.convert("L")).astype(np.uint16) * 257).save(folder / "sixteen.png")
    china.crop((5, 5, 6, 6)).save(folder / "one.png")
    Image.fromarray(np.tile(np.asarray(china), (1, 32, 1))[:64, :20000]).save(folder / "wide.png")
    files = {"sixteen bits": "sixteen.png", "one pixel": "one.png", "very wide": "wide.png"}
    return {
        name: folder / files.get(name, f"{name}{'.jpg' if name in ('cmyk', 'exif') else '.png'}")
        for name in (*AS_TRANSFORMERS, "sixteen bits")
    }


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return outside(tmp_path_factory.mktemp("photos"))


def distance(found: Any, expected: Any) -> float:
    """Return the largest difference relative to the largest logit."""
    return float(np.abs(np.asarray(found) - expected).max() / np.abs(expected).max())


def test_logits_equal_transformers_for_all_kinds_of_images(photos: dict[str, Path]) -> None:
    """Logits are within 1e-5 of those of transformers, and of a graph without embedded preprocessing."""
    transformers = pytest.importorskip("transformers")
    import torch
    from transformers.image_utils import load_image

    processor = transformers.ViTImageProcessorPil.from_pretrained(WEIGHTS[1])
    network = transformers.SwinForImageClassification.from_pretrained(WEIGHTS[1]).eval()
    with (
        swin_deploy.load(embedded("--embed-preprocess"), backend="onnxruntime", precision="fp32") as model,
        swin_deploy.load(digits(1), backend="onnxruntime", precision="fp32") as plain,
    ):
        assert [str(spec) for spec in model.inputs] == ["pixel_values: uint8 [batch, 32, 32, 3]"]
        for name, path in photos.items():
            frames = model.preparation(path)
            assert frames.dtype == np.uint8
            found = model.run({"pixel_values": frames})["logits"]
            assert distance(found, plain.run({"pixel_values": plain.preprocessor(path)})["logits"]) < 1e-5
            if name in AS_TRANSFORMERS:
                with torch.no_grad():
                    expected = network(**processor(load_image(str(path)), return_tensors="pt")).logits.numpy()
                assert distance(found, expected) < 1e-5, name
            both = [[(p.index, round(p.score, 4)) for p in one.classify(path)[0]] for one in (model, plain)]
            assert both[0] == both[1]


def test_raw_frames_and_the_answer_are_those_of_transformers(photos: dict[str, Path], tmp_path: Path) -> None:
    """Its image processor, as the bundle states it, leaves the normalization to the graph."""
    transformers = pytest.importorskip("transformers")
    import torch
    from transformers.image_utils import load_image

    raw = ("--embed-preprocess", "--input-layout", "nchw", "--input-order", "bgr", "--embed-postprocess", "top-k=3")
    path = shutil.copytree(embedded(*raw), tmp_path / "raw")
    processors = [transformers.ViTImageProcessorPil.from_pretrained(folder) for folder in (WEIGHTS[1], path)]
    network = transformers.SwinForImageClassification.from_pretrained(WEIGHTS[1]).eval()
    pixels, frames = (
        torch.cat([processor(load_image(str(photos[name])), return_tensors="pt")["pixel_values"] for name in AS_TRANSFORMERS])
        for processor in processors
    )
    assert frames.max() > 200
    with torch.no_grad():
        expected = network(pixels).logits
    scores, indices = (part.numpy() for part in expected.softmax(-1).topk(3))
    feeds = {"pixel_values": frames.flip(1).numpy()}
    with_typed_graphs(Bundle.open(path), "fp16", runtime_from_onnx)
    assert {entry["postprocessing"]["top_k"] for entry in Bundle.open(path).graphs.values()} == {3}
    fp32, fp16 = (onnxruntime_session(path / file).get_modelmeta().custom_metadata_map for file in Bundle.open(path).graphs)
    assert fp16 == {**fp32, "precision": "fp16"}
    facts = ("input_layout", "input_order", "source", "verdict", "model_info labels")
    assert [fp32[key] for key in facts] == ["NCHW", "BGR", "swin-digits", "verified: agrees with PyTorch", " ".join(DIGITS)]
    assert fp32["weights_sha256"] == hashlib.sha256((WEIGHTS[1] / "model.safetensors").read_bytes()).hexdigest()
    assert (path / "labels.txt").read_text().split() == DIGITS
    for backend, precision, tolerance in (
        ("onnxruntime", "fp32", 1e-5),
        ("openvino", "fp32", 1e-5),
        ("onnxruntime", "fp16", 5e-3),
    ):
        with swin_deploy.load(path, backend=backend, precision=precision) as model:
            assert [str(spec) for spec in model.inputs] == ["pixel_values: float32 [batch, 3, 32, 32]"]
            found = model.run(feeds)
            assert compare(found["logits"], expected.numpy()).relative_l2 <= tolerance
            np.testing.assert_allclose(found["scores"], scores, atol=tolerance)
            assert precision == "fp16" or np.array_equal(found["indices"], indices)
            best = [
                [one.index for one in predictions]
                for predictions in model.classify([*map(photos.get, AS_TRANSFORMERS)], top_k=3)
            ]
            assert best == found["indices"].tolist()
    [score] = swin_deploy.evaluate(path, [THREE, FLOWER], precisions=["fp32"], weights=WEIGHTS[1]).scores[1:]
    assert score.relative_l2 < 1e-5


def test_frames_of_a_camera_are_resized_in_the_graph(tmp_path: Path) -> None:
    path = embedded("--embed-resize", "427x640")
    entry = Bundle.open(path).graphs["onnx/model.onnx"]
    assert entry["preprocessing"]["frame_size"] == list(FRAME)
    assert entry["preprocessing"]["steps"]["resize"] == {"size": [32, 32], "resample": 3}
    assert entry["agreement"]["verified"]
    with (
        swin_deploy.load(path, backend="onnxruntime", precision="fp32") as model,
        swin_deploy.load(digits(1), backend="onnxruntime", precision="fp32") as plain,
    ):
        assert [str(spec) for spec in model.inputs] == ["pixel_values: uint8 [batch, 427, 640, 3]"]
        frames = np.stack([np.asarray(Image.open(photo)) for photo in (CHINA, FLOWER)])
        expected = plain.run({"pixel_values": plain.preprocessor(list(frames))})["logits"]
        assert distance(model.run({"pixel_values": frames})["logits"], expected) < 1e-5
        assert [one[0].index for one in model.classify([CHINA, FLOWER])] == list(expected.argmax(axis=1))
        with pytest.raises(InputError, match=r"accepts frames of 427x640 only"):
            model.classify(THREE)
        with pytest.raises(InputError, match=r"float32\. Expected .*uint8 .*model\.preparation\(images\)"):
            model.run({"pixel_values": frames.astype(np.float32)})


@pytest.mark.parametrize("options", [("--embed-preprocess",), ("--embed-resize", "427x640")], ids=lambda o: o[0])
def test_every_precision_and_engines(options: tuple[str, ...], tmp_path: Path) -> None:
    """fp16 and INT8 graphs with uint8 input are verified, an engine is built, and the resize stays in fp32."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX compiles the engine")
    shutil.copytree(embedded(*options), tmp_path / "b")
    [engine] = result(cli_here("build-engine", "b", "--fp16", "--gpu", "sm_89", "--json", cwd=tmp_path))
    assert engine["profiles"][0]["fused_attention"] == 4
    photos = tmp_path / "images"
    shutil.copytree(EXAMPLES / "photos", photos)
    result(cli_here("quantize", "b", "--int8", "--data", photos, "--json", cwd=tmp_path))
    bundle = Bundle.open(tmp_path / "b")
    for precision in ("fp16", "int8"):
        entry = bundle.graphs[f"onnx/model_{precision}.onnx"]
        assert entry["inputs"] == bundle.graphs["onnx/model.onnx"]["inputs"]
        assert entry["preprocessing"] == bundle.graphs["onnx/model.onnx"]["preprocessing"]
    fallbacks = bundle.graphs["onnx/model_fp16.onnx"]["fallbacks"]
    assert [one["at"] for one in fallbacks] == (["embeddings.resize"] if "--embed-resize" in options else [])
    assert all(verdict.verified for verdict in swin_deploy.verify(bundle.path))


def test_evaluate_compares_with_pytorch_on_frames() -> None:
    for options in (("--embed-preprocess",), ("--embed-resize", "427x640")):
        found = swin_deploy.evaluate(embedded(*options), [CHINA, FLOWER], weights=WEIGHTS[1])
        assert found.against == "PyTorch fp32"
        distance = found.score("fp32").relative_l2
        assert distance is not None
        assert distance < 1e-5


def test_an_iterator_of_images_is_kept_as_frames() -> None:
    [score] = swin_deploy.evaluate(embedded("--embed-preprocess"), iter([CHINA, FLOWER])).scores
    assert score.samples == 2
    with pytest.raises(InputError, match="includes the preprocessing"):
        swin_deploy.evaluate(embedded("--embed-preprocess"), [np.zeros((3, 32, 32), np.float32)])


def test_refusals(tmp_path: Path) -> None:
    before = contents(tmp_path)
    export = ("export", "--weights", one_block(), "-o", "b")
    two = ("--image-size", "32", "--image-size", "48", "--embed-resize", "100x200")
    refused(cli_here(*export, *two, cwd=tmp_path), "one graph", "2 image sizes", "one bundle for each")
    refused(cli_here(*export, "--embed-resize", "40000x20", cwd=tmp_path), "40000x20", "at most 32768")
    refused(cli_here(*export, "--embed-resize", "wide", cwd=tmp_path), "Invalid image size", "wide")
    twice = ("--embed-resize", "100x200", "--embed-resize", "200x100")
    refused(cli_here(*export, *twice, cwd=tmp_path), "--embed-resize was given 2 times")
    assert contents(tmp_path) == before
    with pytest.raises(UsageError, match="with 4 channels cannot be resized in the graph"):
        swin_deploy.export(weights=one_block(channels=4), output=tmp_path / "four", embed_resize=100)


@pytest.mark.parametrize(
    "task", [pytest.param("feature-extraction", marks=pytest.mark.slow), "backbone", "masked-image-modeling"]
)
def test_every_task_and_size_on_both_back_ends(task: str, tmp_path: Path) -> None:
    """Graphs are verified for each task, also for sizes that are not a multiple of the patch size."""
    pytest.importorskip("openvino", reason="OpenVINO runs the graphs, too")
    spec = TaskSpec(task)
    target = "onnxruntime" if task == "backbone" else "openvino"
    sizes = [(32, 32), (30, 42)]
    made = swin_deploy.export(
        weights=one_block(task), output=tmp_path / "b", task=spec, image_sizes=sizes, target=target, embed_preprocess=True
    )
    assert [entry["agreement"]["verified"] for entry in made.graphs.values()] == [True, True]
    assert all(verdict.verified for verdict in swin_deploy.verify(tmp_path / "b", backend="openvino"))
    frames = np.stack([np.asarray(Image.open(photo).resize((42, 30))) for photo in (CHINA, FLOWER)])
    with swin_deploy.load(tmp_path / "b", backend="onnxruntime", precision="fp32") as model:
        feeds = {"pixel_values": frames}
        if spec.masked:
            feeds["bool_masked_pos"] = np.zeros((2, 8 * 11), dtype=bool)
        assert all(len(output) == 2 for output in model.run(feeds).values())
        with pytest.raises(InputError, match=r"images of 31x42 pixels\. This bundle has graphs for 32x32, 30x42"):
            model.run({**feeds, "pixel_values": np.zeros((1, 31, 42, 3), np.uint8)})
        if task != "masked-image-modeling":
            assert all(len(output) == 2 for output in model.features([CHINA, FLOWER]).values())


def test_bf16_and_openvino_from_whole_frames(tmp_path: Path) -> None:
    swin_deploy.export(weights=one_block(), output=tmp_path / "b", embed_resize=(123, 77))
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX compiles the engine")
    [built] = swin_deploy.build_engine(tmp_path / "b", precision="bf16", gpus=["sm_89"], batches=[(1, 2, 4)])
    assert built.entry["precision"] == "bf16"
    assert all(verdict.verified for verdict in swin_deploy.verify(tmp_path / "b"))
    pytest.importorskip("openvino", reason="OpenVINO runs the graph, too")
    frames = np.stack([np.asarray(Image.open(photo).resize((77, 123))) for photo in (CHINA, FLOWER)])
    answers = []
    for backend in ("onnxruntime", "openvino"):
        with swin_deploy.load(tmp_path / "b", backend=backend, precision="fp32") as model:
            answers.append(model.run({"pixel_values": frames})["logits"])
    assert distance(*answers) < 1e-5
