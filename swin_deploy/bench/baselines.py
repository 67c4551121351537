"""The same networks as others have them, and their own export to ONNX, to be compared with.

transformers gets the very weights of a checkpoint; timm has random ones.
"""

from __future__ import annotations

import importlib
import io
import json
import warnings
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray

from swin_deploy.config import SwinConfig
from swin_deploy.dependencies import require
from swin_deploy.models.checkpoints import Checkpoint
from swin_deploy.models.torch_runtime import Placement
from swin_deploy.specs import Size, TensorSpec
from swin_deploy.tasks import PIXELS


class Logits(torch.nn.Module):
    """A model of transformers, for an exporter that takes tensors and no output objects."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> Any:
        return self.model(pixel_values).logits


def transformers_folder(checkpoint: Checkpoint, folder: Path) -> None:
    """Writes `folder` as transformers does, so that its classes read the checkpoint of an image classifier from there."""
    save_file = require("safetensors.torch", "write a checkpoint").save_file
    prefix = "swin." if checkpoint.config.version == 1 else "swinv2."
    folder.mkdir(parents=True, exist_ok=True)
    named = {(name if name.startswith("classifier.") else prefix + name): t for name, t in checkpoint.tensors.items()}
    save_file({name: tensor.contiguous() for name, tensor in named.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(checkpoint.config.to_dict()), encoding="utf-8")


def transformers_network(folder: Path) -> torch.nn.Module:
    """What transformers makes of the image classifier in `folder`, ready to run: pixels [batch, 3, height, width] -> logits."""
    transformers = importlib.import_module("transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model_type = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
    name = {"swin": "SwinForImageClassification", "swinv2": "Swinv2ForImageClassification"}[model_type]
    kind = getattr(transformers, name)
    return Logits(kind.from_pretrained(folder, dtype=torch.float32)).eval()


class TransformersNetwork:
    """The same behind the interface that graphs are run through; see reference.Runnable."""

    def __init__(self, folder: Path, size: Size, placement: Placement) -> None:
        self._placement, self._network = placement, placement.placed(transformers_network(folder))
        channels = int(json.loads((folder / "config.json").read_text(encoding="utf-8"))["num_channels"])
        self.title = f"PyTorch {torch.__version__}, transformers {version('transformers')}"
        self.inputs = (TensorSpec(PIXELS, "float32", ("batch", channels, *size)),)

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        with torch.inference_mode():
            return {"logits": self._placement.array(self._network(self._placement.tensor(feeds[PIXELS])))}


def timm_network(config: SwinConfig, size: Size) -> torch.nn.Module:
    """timm's network of that architecture, with random weights: pixels [batch, 3, height, width] -> logits."""
    models = importlib.import_module("timm.models")
    options: dict[str, Any] = {
        "img_size": size,
        "patch_size": config.patch_size,
        "in_chans": config.num_channels,
        "num_classes": config.num_labels,
        "embed_dim": config.embed_dim,
        "depths": config.depths,
        "num_heads": config.num_heads,
        "window_size": config.window_size[0],
        "mlp_ratio": config.mlp_ratio,
    }
    if config.version == 1:
        network: torch.nn.Module = models.swin_transformer.SwinTransformer(**options)
    else:
        network = models.swin_transformer_v2.SwinTransformerV2(
            **options, pretrained_window_sizes=config.pretrained_window_sizes
        )
    return network.eval()


def exported_by_its_user(network: torch.nn.Module, shape: tuple[int, int, int, int], half: bool = False) -> bytes:
    """The ONNX graph of `network` for pixels of that shape by torch's TorchScript exporter, as optimum has long done."""
    written: Any = io.BytesIO()
    network = network.eval().half() if half else network.eval()
    pixels = torch.zeros(shape, dtype=torch.float16 if half else torch.float32)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network, (pixels,), written, input_names=["pixel_values"], output_names=["logits"], opset_version=17,
            dynamo=False,
        )  # fmt: skip
    graph: bytes = written.getvalue()
    return graph
