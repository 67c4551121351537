"""Weights resized to other windows, compared with the framework that wrote the checkpoint."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_cases import DATA
from click.testing import CliRunner
from safetensors.torch import save_file
from test_outputs import distance

import swin_deploy
from swin_deploy.bundle import Bundle
from swin_deploy.cli import cli
from swin_deploy.errors import SwinDeployError, UsageError
from swin_deploy.exporters.checkpoint_from_request import checkpoint_from_request
from swin_deploy.models.checkpoints import Checkpoint, checkpoint_from_path, random_checkpoint, resize_windows
from swin_deploy.models.swin import SwinNetwork
from swin_deploy.options import ExportSpec
from swin_deploy.tasks import PIXELS, TaskSpec
from swin_deploy.variants import find_variant

RESIZED = Path(__file__).parent / "resized"
MICROSOFT = RESIZED / "microsoft_window4.pth"
TIMM_V1 = DATA / "timm__SwinTransformer__bin_only"
TIMM_V2 = DATA / "timm__SwinTransformerV2__rect_h_eq_window"
HF_V1 = DATA / "hf523__SwinForImageClassification__sharded"
HF_V2 = DATA / "hf523__Swinv2ForImageClassification__pad_50x66"

CASES = [
    pytest.param(MICROSOFT, "microsoft/6", (6,), None, "by bicubic interpolation, as in Microsoft's code", id="microsoft"),
    *(
        pytest.param(TIMM_V1, f"timm_v1/{window}", (window,), None, "as in timm", id=f"timm V1 window {window}")
        for window in (3, 6, 8)
    ),
    pytest.param(TIMM_V2, "timm_v2/4", (4,), None, "divided by the new windows", id="timm V2 window 4"),
    pytest.param(TIMM_V2, "timm_v2/6", (6,), None, "--pretrained-window-sizes 8,4x8 keeps", id="timm V2 window 6"),
    pytest.param(TIMM_V2, "timm_v2/6_8", (6,), (8,), r"divided by the pretrained \[8, 8\]", id="timm V2 window 6 pretrained 8"),
]


def recorded(key: str) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The inputs and logits of the source framework."""
    with np.load(RESIZED / "reference.npz") as file:
        return file[f"{key}/pixel_values"], file[f"{key}/logits"]


def logits(checkpoint: Checkpoint, pixels: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    network = SwinNetwork(checkpoint.config, pixels.shape[2:], checkpoint.tensors).eval()
    with torch.no_grad():
        return np.asarray(network(torch.from_numpy(pixels))[0].numpy())


@pytest.mark.parametrize(("path", "key", "windows", "pretrained", "said"), CASES)
def test_as_its_own_system_does_it(
    path: Path,
    key: str,
    windows: tuple[int, ...],
    pretrained: tuple[int, ...] | None,
    said: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Compare the PyTorch network; an export compares its graph with that."""
    pixels, wanted = recorded(key)
    size = (pixels.shape[2], pixels.shape[3])
    caplog.set_level("INFO", "swin_deploy")
    spec = ExportSpec(weights=path, image_sizes=[size], window_size=windows, pretrained_window_sizes=pretrained)
    checkpoint = checkpoint_from_request(spec)
    assert any(re.search(said, line) for line in caplog.messages)
    assert any(re.search(said, note) for note in checkpoint.notes)
    assert distance(logits(checkpoint, pixels), wanted) < 1e-5


def test_exported_graph_computes_the_same(tmp_path: Path) -> None:
    """Timm's V2 with other windows through the command line: printed, kept in the bundle, and right in ONNX Runtime."""
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pixels, wanted = recorded("timm_v2/6_8")
    ask = ["export", "--weights", str(TIMM_V2), "-o", str(tmp_path / "bundle"), "--image-size", "{2}x{3}".format(*pixels.shape)]
    done = CliRunner().invoke(cli, [*ask, "--window-size", "6,6", "--pretrained-window-sizes", "8"])
    assert done.exit_code == 0, done.output
    assert "to window 6" in done.output
    bundle = Bundle.open(tmp_path / "bundle")
    assert any("divided by the pretrained [8, 8]" in note for note in bundle.manifest["notes"])
    config = bundle.read_json("config.json")
    assert (config["window_size"], config["pretrained_window_sizes"]) == (6, [8, 8])
    with swin_deploy.load(bundle.path, backend="onnxruntime", precision="fp32") as model:
        assert distance(model.run({PIXELS: pixels})["logits"], wanted) < 1e-5


@pytest.mark.parametrize("pretrained", [None, (4, 4, 4)])
def test_v2_as_transformers_computes_it_anew(pretrained: tuple[int, ...] | None) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is the reference")
    changed = {"window_size": 8} | ({"pretrained_window_sizes": list(pretrained)} if pretrained else {})
    reference = transformers.Swinv2ForImageClassification.from_pretrained(HF_V2, **changed).eval()
    checkpoint = resize_windows(checkpoint_from_path(HF_V2, TaskSpec()), window_size=(8,), pretrained_window_sizes=pretrained)
    pixels = np.random.default_rng(3).standard_normal((2, 3, 64, 64), dtype=np.float32)
    with torch.no_grad():
        wanted = reference(torch.from_numpy(pixels)).logits.numpy()
    assert distance(logits(checkpoint, pixels), wanted) < 1e-5
    before = logits(checkpoint_from_path(HF_V2, TaskSpec()), pixels)
    assert distance(before, wanted) > 1e-3, "the window makes no difference, and so this test shows nothing"


def test_what_transformers_reads_of_a_resized_checkpoint_is_what_was_built() -> None:
    transformers = pytest.importorskip("transformers", reason="transformers reads the config")
    checkpoint = resize_windows(checkpoint_from_path(HF_V1, TaskSpec()), window_size=(8,), image_size=(64, 64))
    assert checkpoint.raw_config is not None
    config = transformers.SwinConfig.from_dict(dict(checkpoint.raw_config))
    assert (config.window_size, config.image_size) == (8, 64)
    model = transformers.SwinForImageClassification(config).eval()
    tables = {name: tensor for name, tensor in model.state_dict().items() if name.endswith("relative_position_bias_table")}
    ours = {name: tensor for name, tensor in checkpoint.tensors.items() if name.endswith("relative_position_bias_table")}
    assert [tensor.shape for tensor in tables.values()] == [tensor.shape for tensor in ours.values()]


def test_the_same_windows_change_nothing() -> None:
    checkpoint = checkpoint_from_path(HF_V1, TaskSpec())
    assert resize_windows(checkpoint, window_size=checkpoint.config.window_size) is checkpoint


def test_refusals() -> None:
    checkpoint = checkpoint_from_path(HF_V1, TaskSpec())
    with pytest.raises(UsageError, match="3 window sizes were given for 2 stages"):
        resize_windows(checkpoint, window_size=(4, 4, 4))
    with pytest.raises(UsageError, match="only Swin V2 has pretrained window sizes"):
        resize_windows(checkpoint, window_size=(4,), pretrained_window_sizes=(8,))


def test_a_variant_by_name_resizes_the_weights_that_are_given(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Swin-S3-T is Swin-T with windows of 14 in its third stage."""
    small = random_checkpoint(find_variant("swin-tiny").config(), TaskSpec())
    save_file(dict(small.tensors), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(small.config.to_dict()))
    caplog.set_level("INFO", "swin_deploy")
    checkpoint = checkpoint_from_request(ExportSpec("swin-s3-tiny", weights=tmp_path))
    assert checkpoint.config.window_size == (7, 7, 14, 7)
    assert any("from window 7 to windows 7, 7, 14, 7" in line for line in caplog.messages)
    table = "encoder.layers.{}.blocks.0.attention.self.relative_position_bias_table"
    assert checkpoint.tensors[table.format(2)].shape == (27**2, 12)
    assert torch.equal(checkpoint.tensors[table.format(3)], small.tensors[table.format(3)])


@pytest.mark.parametrize("windows", ["8x8x8", "8,", "0", "4,4"])
def test_windows_that_cannot_be_meant(windows: str, tmp_path: Path) -> None:
    ask = ["export", "--weights", str(HF_V2), "-o", str(tmp_path / "bundle"), "--window-size", windows]
    done = CliRunner().invoke(cli, ask)
    assert isinstance(done.exception, SwinDeployError)
    assert "window" in str(done.exception)
    assert list(tmp_path.iterdir()) == []
