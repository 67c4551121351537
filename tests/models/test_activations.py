"""Every activation of transformers is reproduced, or refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import swin_deploy
from swin_deploy.config import ACTIVATIONS, SwinConfig
from swin_deploy.errors import CheckpointError
from swin_deploy.exporters.bundle_from_checkpoint import bundle_from_checkpoint
from swin_deploy.models import activations
from swin_deploy.models.checkpoints import random_checkpoint
from swin_deploy.models.swin import SwinNetwork
from swin_deploy.options import ExportSpec
from swin_deploy.runtimes.backends import runtime_from_onnx
from swin_deploy.tasks import TaskSpec

ACT2FN = pytest.importorskip("transformers.activations", reason="transformers is what the activations are compared with").ACT2FN


WITH_PARAMETERS = {"prelu", "xielu"}  # no Swin checkpoint is published with them


def config(name: str) -> SwinConfig:
    return SwinConfig(
        version=1, image_size=(16, 16), embed_dim=8, depths=(1,), num_heads=(1,), window_size=(4,), hidden_act=name
    )


def test_every_name_of_transformers_is_known() -> None:
    assert set(ACTIVATIONS) == set(activations.ACTIVATIONS) == set(ACT2FN) - WITH_PARAMETERS


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_values(name: str) -> None:
    x = torch.linspace(-15, 15, 4001)
    torch.testing.assert_close(activations.ACTIVATIONS[name](x), ACT2FN[name](x), rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("name", sorted(WITH_PARAMETERS))
def test_refused_by_name(name: str) -> None:
    with pytest.raises(CheckpointError, match=f'hidden_act is "{name}", expected one of gelu, '):
        config(name)


@pytest.mark.parametrize(
    "name",
    [
        *("gelu_10", "laplace", "sqrtsoftplus"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("hardswish", "leaky_relu", "mish", "relu2")),
    ],
)
def test_exported(name: str, tmp_path: Path) -> None:
    """The exporter writes these with different operators; the export compares the graph with PyTorch."""
    bundle_from_checkpoint(random_checkpoint(config(name), TaskSpec()), tmp_path / "b", ExportSpec(), runtime_from_onnx)
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = SwinNetwork(config(name), (16, 16), random_checkpoint(config(name), TaskSpec()).tensors)(pixels)[0]
    with swin_deploy.load(tmp_path / "b", backend="onnxruntime", precision="fp32") as model:
        found = torch.from_numpy(model.run({"pixel_values": pixels.numpy()})["logits"])
    assert (found - expected).norm() <= 1e-5 * expected.norm()
