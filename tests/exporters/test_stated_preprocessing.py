"""The preprocessing of a bundle is the one that the options, the checkpoint or its framework state."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli.exported import FLOWER, cli_here
from PIL import Image
from safetensors.torch import save_file

import swin_deploy
from swin_deploy.bundle import _write_manifest
from swin_deploy.config import SwinConfig
from swin_deploy.errors import CheckpointError, InputError, UsageError
from swin_deploy.exporters.checkpoint_from_request import preprocessing_of
from swin_deploy.models.checkpoints import Checkpoint, checkpoint_from_path, random_checkpoint
from swin_deploy.models.swin import SwinNetwork
from swin_deploy.options import ExportSpec
from swin_deploy.tasks import TaskSpec


class Namespace:
    """What argparse.Namespace is read as: attributes that are never used as code."""

    def __init__(self, **state: Any) -> None:
        self.state = state


TESTS = Path(__file__).resolve().parents[1]
REPORTED, DATA = TESTS / "reported", TESTS / "checkpoints/data"
HF_FILE = {"image_processor_type": "ViTImageProcessor", "size": {"shortest_edge": 36}, "do_center_crop": True, "crop_size": 32}
ARGUMENTS = Namespace(mean=[0.5], crop_pct=None, interpolation="")
CONFIG = SwinConfig(version=1, image_size=(64, 64), embed_dim=16, depths=(2, 2), num_heads=(2, 4), window_size=(4, 4))


def stated(writer: str = "hf", config: SwinConfig = CONFIG, spec: dict[str, Any] | None = None, **fields: Any) -> Any:
    return preprocessing_of(
        Checkpoint(config, {}, "checkpoint", writer=writer, **fields), ExportSpec(weights="x", **(spec or {}))
    )


TESTED = {"input_size": [3, 9, 9], "test_input_size": [3, 64, 64], "test_crop_pct": 1}
TIMM = {
    "input_size": [3, 64, 64],
    "crop_pct": 0.9,
    "mean": [0.5, 0.4, 0.3],
    "std": [0.2, 0.2, 0.1],
    "interpolation": "bilinear",
}
NOUGAT = {"image_processor_type": "NougatImageProcessor", "do_crop_margin": True, "resample": 2, "image_mean": [0.1, 0.2, 0.3]}
MICROSOFT = {"DATA": {"IMG_SIZE": 64, "INTERPOLATION": "bilinear"}, "TEST": {"CROP": False}}


@pytest.mark.parametrize(
    ("writer", "fields", "source", "steps", "assumed"),
    [
        ("hf", {"preprocessor": HF_FILE}, "preprocessor_config.json", "side to 36 (bilinear), crop the center 32x32", False),
        ("microsoft", {"preprocessor": {"size": 32}}, "preprocessor_config.json", "resize to 32x32 (bilinear)", False),
        ("timm", {"extras": {"pretrained_cfg": TIMM}}, "pretrained_cfg", "side to 71 (bilinear), crop the", False),
        ("timm", {"extras": {"pretrained_cfg": {**TIMM, "crop_mode": "squash"}}}, "pretrained_cfg", "to 71x71 (bilin", False),
        ("timm", {"extras": {"pretrained_cfg": {**TIMM, "crop_mode": "border"}}}, "pretrained_cfg", "to fit into 71x71", False),
        (
            "timm",
            {"extras": {"pretrained_cfg": {**TIMM, **TESTED}}},
            "pretrained_cfg",
            "side to 64 (bilinear), crop the center 64x64",
            False,
        ),
        ("timm", {}, "timm's default", "shorter side to 71 (bicubic), crop the center 64x64", True),
        ("timm", {"extras": {"args": ARGUMENTS}}, "training script", ", mean 0.5 0.5 0.5", False),
        ("torchvision", {}, "torchvision's default", "shorter side to 73 (bicubic), crop the center 64x64", True),
        ("microsoft", {}, "default of Microsoft's code", "shorter side to 73 (bicubic), crop the center 64x64", True),
        ("microsoft", {"extras": {"config": MICROSOFT}}, "TEST.CROP", "resize to 64x64 (bilinear)", False),
        ("microsoft", {"extras": {"config": {"TEST": {"CROP": True}}}}, "TEST.CROP", "side to 73 (bicubic)", False),
        ("hf", {}, "published Swin checkpoints", "resize to 64x64 (bicubic)", True),
        ("microsoft", {"parent": "a detector"}, "models with a Swin inside", "resize to 64x64 (bicubic), mean 0.485", True),
        ("hf", {"parent": "a", "preprocessor": NOUGAT}, "preprocessor_config.json, in part", "(bilinear), mean 0.1", True),
        ("", {}, "random weights", "resize to 64x64 (bicubic)", False),
    ],
)  # fmt: skip
def test_sources(writer: str, fields: dict[str, Any], source: str, steps: str, assumed: bool) -> None:
    found = stated(writer, **fields)
    assert source in found.source
    assert steps in found.preprocessor.summary()
    assert bool(found.assumed) == assumed
    warning = found.warning(found.preprocessor.with_size((96, 96)))
    assert ("96x96" in warning and "State it with --preprocessor FILE" in warning) == assumed


def test_published_sizes_of_microsoft_are_not_assumed() -> None:
    tiny = dataclasses.replace(SwinConfig(version=1), id2label={index: str(index) for index in range(1000)})
    found = stated("microsoft", tiny)
    assert (found.preprocessor.shortest_edge, found.assumed) == (256, "")
    large = dataclasses.replace(tiny, image_size=(384, 384))
    assert stated("microsoft", large).preprocessor.summary().startswith("resize to 384x384")


def test_options_state_it_by_hand(tmp_path: Path) -> None:
    file = tmp_path / "any.json"
    file.write_text(json.dumps(HF_FILE))
    found = stated("timm", spec={"preprocessor": file}, extras={"pretrained_cfg": TIMM})
    assert (found.preprocessor.shortest_edge, found.source) == (36, f"--preprocessor {file}")
    file.write_text(json.dumps({"architecture": "swin", "pretrained_cfg": TIMM}))
    assert stated(spec={"preprocessor": file}).preprocessor.shortest_edge == 71
    found = stated(spec={"mean": "0.1", "std": [0.2, 0.3, 0.4], "crop_pct": 0.5})
    assert found.preprocessor.summary() == (
        "resize the shorter side to 128 (bicubic), crop the center 64x64, mean 0.1 0.1 0.1, std 0.2 0.3 0.4"
    )
    assert (found.source, found.assumed) == ("--mean, --std, --crop-pct; the rest: the published Swin checkpoints", "")
    assert stated(spec={"mean": 0.1}).assumed
    border = stated("timm", spec={"mean": 0.2}, extras={"pretrained_cfg": {**TIMM, "crop_mode": "border"}}).preprocessor
    assert border.crop_fill == (51, 51, 51)


@pytest.mark.parametrize(
    ("spec", "file", "message"),
    [
        ({"mean": [0.1, 0.2]}, None, "--mean has 2 values, and this network expects images with 3 channels"),
        ({"std": 0}, None, "--mean and --std: Invalid image_std"),
        ({}, "{", r"any\.json cannot be read as JSON"),
        ({}, '{"size": 0}', r"any\.json: Invalid size: 0"),
        ({}, '{"image_processor_type": "GLPNImageProcessor"}', "names GLPNImageProcessor, whose steps are not supported"),
        ({}, '{"mean": [0.5], "crop_mode": "corner"}', "Invalid crop_mode: 'corner'. Expected center, squash or border"),
        ({}, '{"mean": [0.5], "test_input_size": 3, "test_crop_pct": 1}', "Invalid input_size"),
    ],
)
def test_invalid_statements_are_refused(spec: dict[str, Any], file: str | None, message: str, tmp_path: Path) -> None:
    if file is not None:
        (tmp_path / "any.json").write_text(file)
        spec = {"preprocessor": tmp_path / "any.json"}
    with pytest.raises(UsageError, match=message):
        stated(spec=spec)


@pytest.mark.parametrize("kind", ["ViTHybridImageProcessor", "LevitImageProcessor", "GLPNFeatureExtractor"])
def test_other_processors_are_refused_by_name(kind: str) -> None:
    with pytest.raises(CheckpointError, match=f"names {kind}, whose steps are not supported"):
        stated(preprocessor={"image_processor_type": kind})
    with pytest.raises(CheckpointError, match=r"Invalid do_flip_channel_order: True.* BGR images are not supported"):
        stated(preprocessor={"do_flip_channel_order": True})


@pytest.mark.parametrize(
    ("channels", "fields", "mean", "assumed"),
    [
        (1, {"preprocessor": {"image_mean": 0.3, "image_std": 0.2}}, (0.3,), False),
        (1, {"preprocessor": {"size": 32}}, (0.5,), False),
        (5, {"preprocessor": {"do_normalize": False}}, (0.5,) * 5, False),
        (1, {}, (0.449,), True),
        (4, {}, (0.5,) * 4, True),
        (4, {"extras": {"pretrained_cfg": TIMM}}, (0.5,) * 4, True),
        (2, {"extras": {"pretrained_cfg": {**TIMM, "mean": [0.1, 0.2], "std": [0.3, 0.3]}}}, (0.1, 0.2), False),
    ],
)  # fmt: skip
def test_channels(channels: int, fields: dict[str, Any], mean: tuple[float, ...], assumed: bool) -> None:
    found = stated("timm" if "extras" in fields else "hf", dataclasses.replace(CONFIG, num_channels=channels), **fields)
    assert found.preprocessor.image_mean == pytest.approx(mean)
    assert bool(found.assumed) == assumed
    given = stated("hf", dataclasses.replace(CONFIG, num_channels=channels), {"mean": [0.7] * channels, "std": 0.1}, **fields)
    assert given.preprocessor.image_mean == (0.7,) * channels


def test_a_mean_for_other_channels_is_refused() -> None:
    config = dataclasses.replace(CONFIG, num_channels=4)
    with pytest.raises(CheckpointError, match="are for 3 channels, and this network expects images with 4 channels"):
        stated(config=config, preprocessor={"image_mean": [0.1, 0.2, 0.3]})


@pytest.mark.parametrize("name", ["timm_crop_pct", "timm_global_pool_max"])
def test_timm_as_reported(name: str) -> None:
    """Pixels and logits equal those that timm computed for the photograph."""
    folder = REPORTED / name
    checkpoint, task = checkpoint_from_path(folder, TaskSpec()), TaskSpec()
    pixels = preprocessing_of(checkpoint, ExportSpec(weights=folder)).preprocessor(FLOWER)
    expected = np.load(folder / "expected.npz")
    assert np.array_equal(pixels[0], expected["pixels"])
    with torch.no_grad():
        size = checkpoint.config.image_size
        logits = SwinNetwork(checkpoint.config, size, checkpoint.tensors, task, "tensorrt").eval()(torch.from_numpy(pixels))
    np.testing.assert_allclose(np.asarray(logits).reshape(-1), expected["logits"], atol=1e-5)


def test_hf_gray_as_reported() -> None:
    """A network for one channel: pixels and logits equal those of transformers for the photograph in grey."""
    transformers = pytest.importorskip("transformers")
    folder = REPORTED / "hf_gray"
    checkpoint, grey = checkpoint_from_path(folder, TaskSpec()), Image.open(FLOWER).convert("L")
    preprocessor = preprocessing_of(checkpoint, ExportSpec(weights=folder)).preprocessor
    pixels = preprocessor(FLOWER)
    expected = transformers.ViTImageProcessorPil.from_pretrained(folder)(grey, return_tensors="pt")
    assert np.array_equal(pixels, expected["pixel_values"].numpy())
    for image in (grey, np.asarray(grey), np.asarray(grey)[..., None], Image.open(FLOWER)):
        assert np.array_equal(preprocessor(image), pixels)
    network = SwinNetwork(checkpoint.config, (32, 32), checkpoint.tensors, TaskSpec(), "tensorrt").eval()
    with torch.no_grad():
        theirs = transformers.SwinForImageClassification.from_pretrained(folder).eval()(**expected).logits
        assert torch.allclose(network.named(torch.from_numpy(pixels))["logits"], theirs, atol=1e-5)


@pytest.mark.parametrize(
    ("path", "size", "theirs"),
    [
        ("crop_and_larger_image_size", 32, {}),
        ("crop_and_larger_image_size", 64, {"size": {"shortest_edge": 72}, "crop_size": {"height": 64, "width": 64}}),
        ("preprocessor_beside_pth/model.pth", 32, {}),
        ("shortest_edge_without_crop", None, {}),  # of the photograph, 427 x 640
    ],
)
def test_processors_as_reported(path: str, size: int | None, theirs: dict[str, Any]) -> None:
    """Pixels equal those of transformers; for a larger image, with the resize and the crop enlarged alike."""
    transformers = pytest.importorskip("transformers")
    file = REPORTED / path
    spec = ExportSpec(weights=file, image_sizes=[size] if size else ())
    checkpoint = checkpoint_from_path(file, TaskSpec(), image_size=(size, size) if size else None)
    found = preprocessing_of(checkpoint, spec)
    assert (found.source, found.assumed) == ("preprocessor_config.json", "")
    prepared = found.preprocessor.with_size((size, size)) if size else found.preprocessor
    processor = transformers.ViTImageProcessorPil.from_pretrained(file if file.is_dir() else file.parent, **theirs)
    expected = processor(Image.open(FLOWER), return_tensors="np")["pixel_values"]
    assert np.array_equal(prepared(FLOWER), expected)


def test_a_file_beside_a_weight_file_is_used(tmp_path: Path) -> None:
    source = next((DATA / "ms__SwinTransformer__train_ckpt").glob("*.pth"))
    (tmp_path / "model.pth").symlink_to(source)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(HF_FILE))
    checkpoint = checkpoint_from_path(tmp_path / "model.pth", TaskSpec())
    assert preprocessing_of(checkpoint, ExportSpec(weights="x")).source == "preprocessor_config.json"
    assert checkpoint.extras["config"]["DATA"]["IMG_SIZE"] == 32


def test_a_larger_image_size_scales_the_resize_with_the_crop() -> None:
    small = stated(preprocessor=HF_FILE).preprocessor
    for side, edge in ((32, 36), (48, 54), (64, 72)):
        assert small.with_size((side, side)).to_dict()["size"] == {"shortest_edge": edge}
    assert small.with_size((48, 64)).summary().startswith("resize to cover 54x72 (bilinear), crop the center 48x64")
    photo = np.full((64, 64, 3), 255, dtype=np.uint8)
    assert small.with_size((96, 96))(photo).min() == 1  # no black border
    timm = stated("timm", extras={"pretrained_cfg": {**TIMM, "input_size": [3, 224, 224]}}).preprocessor
    assert timm.with_size((448, 448)).shortest_edge == 497  # not twice 248
    assert timm.with_size((448, 448)).with_size((64, 64)) == timm


def test_the_manifest_and_the_messages_name_the_source(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = dataclasses.replace(
        CONFIG, image_size=(32, 32), patch_size=(4, 4), depths=(1,), num_heads=(2,), window_size=(4,), id2label={0: "a", 1: "b"}
    )
    save_file(dict(random_checkpoint(config, TaskSpec()).tensors), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": {"shortest_edge": 32}}))
    with caplog.at_level(logging.INFO, "swin_deploy"):
        bundle = swin_deploy.export(weights=tmp_path, image_sizes=["32", "32x48"], mean=0.4, output=tmp_path / "b")
    assert bundle.manifest["preprocessing"] == {
        "source": "--mean; the rest: preprocessor_config.json",
        "steps": "resize the shorter side to 32 (bilinear), mean 0.4 0.4 0.4, std 0.5 0.5 0.5",
        "assumed": "",
    }
    assert "Preprocessing: resize the shorter side to 32" in caplog.text
    assert "only images with the aspect ratio of 32x32 or 32x48" in caplog.text
    with swin_deploy.load(bundle.path, backend="onnxruntime", precision="fp32") as model:
        image = Image.open(FLOWER)
        assert len(model.classify([image.resize((40, 40)), image.resize((60, 40)), image.resize((41, 41))])) == 3
        with pytest.raises(InputError, match="--crop-pct 1 to crop the center"):
            model.classify(image.resize((80, 40)))
    _write_manifest(bundle.path, {**bundle.manifest.to_dict(), "preprocessing": {"assumed": "Nobody knows."}})
    Image.open(FLOWER).resize((40, 40)).save(tmp_path / "square.png")
    done = cli_here("predict", bundle.path, tmp_path / "square.png", "--backend", "onnxruntime", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Warning: Nobody knows." in done.stderr
