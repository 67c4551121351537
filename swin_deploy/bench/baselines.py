"""Baselines of `bench`: PyTorch, and the ONNX exports of transformers and timm.

transformers gets the weights of the checkpoint if it has the architecture; otherwise weights are random.
"""

from __future__ import annotations

import io
import itertools
import json
import logging
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swin_deploy.bundle import Bundle, TensorSpec
from swin_deploy.config import SwinConfig, sides
from swin_deploy.dependencies import installed, require
from swin_deploy.options import Array, BenchSpec, Size
from swin_deploy.tasks import PIXELS, TaskSpec

from .race import BenchCase, Request

if TYPE_CHECKING:
    import torch

    from swin_deploy.models.checkpoints import Checkpoint
    from swin_deploy.models.torch_runtime import Placement

COMPILED = "torch.compile"
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Baselines:
    """Plans the rows beside those of the bundle. The files that they need are written to `scratch`."""

    bundle: Bundle
    config: SwinConfig
    size: Size
    spec: BenchSpec
    scratch: Path

    def pytorch(self, batches: Sequence[int], devices: Sequence[str]) -> dict[BenchCase, Request]:
        """Plan PyTorch, the reference, on each device; on a GPU also in fp16 and with torch.compile."""
        weights, seed = self.spec.weights, re.fullmatch(r"random weights, seed (\d+)", self.bundle.manifest.source)
        if weights is not None:
            require("torch", "measure PyTorch")
        elif seed is None or self.bundle.manifest.notes or not installed("torch"):
            why = "torch is not installed" if seed else "pass the checkpoint that was exported as --weights"
            _LOG.info("Not measuring PyTorch: %s", why)
            return {}
        number = int(seed[1]) if seed else 0
        checkpoint, model = bundle_checkpoint(self.bundle, weights, number), "swin-deploy"
        request: dict[str, Any] = {"torch": str(self.bundle.path), "weights": weights, "seed": number}
        if self._transformers_fits():
            model, request = "transformers", {"transformers": str(self.scratch / "same")}
            transformers_folder(checkpoint, self.scratch / "same")
        found: dict[BenchCase, Request] = {}
        for device in devices:
            ways = [("pytorch", "fp32")]
            if device != "cpu":
                if not require("torch", "measure PyTorch").cuda.is_available():
                    _LOG.info("Not measuring PyTorch on %s: torch is installed without CUDA", device)
                    continue
                ways += [("pytorch", "fp16"), (COMPILED, "fp16")]
            for (backend, precision), batch in itertools.product(ways, batches):
                placement = (device, precision, backend == COMPILED)
                placed = {"size": self.size, "placement": placement, "threads": self.spec.threads}
                found[BenchCase(model, backend, precision, batch, device=device)] = {**request, **placed}
        return found

    def exports(self, ours: Iterable[BenchCase]) -> dict[BenchCase, Request]:
        """Plan the exports of transformers and timm for this architecture, in the back ends of `ours`."""
        found: dict[BenchCase, Request] = {}
        for model in ("transformers", "timm"):
            if not installed(model) or not installed("torch"):
                _LOG.info("Not measuring %s: it is not installed (pip install %s)", model, model)
                continue
            if self.bundle.manifest.task.name != "image-classification":
                _LOG.info("Not measuring %s: it is a baseline for image classifiers only", model)
                continue
            try:
                network, same = (
                    self._transformers() if model == "transformers" else (timm_network(self.config, self.size), False)
                )
                for one in ours:
                    if one.backend in ("onnxruntime", "openvino"):
                        bf16 = (one.backend, one.precision) == ("openvino", "bf16")
                        theirs = BenchCase(model, one.backend, "bf16" if bf16 else "fp32", one.batch, same, one.device)
                        request = {"onnx": str(self._exported(model, network, one.batch)), "bf16": bf16}
                        request |= {"backend": one.backend, "device": one.device, "threads": self.spec.threads}
                        found[theirs] = request
            except Exception as error:  # noqa: BLE001 - a failure in a baseline only ends its rows
                _LOG.info("Not measuring %s: its export failed (%s)", model, " ".join(str(error).split())[:300])
        return found

    def _transformers_fits(self) -> bool:
        task = self.bundle.manifest.task
        plain = task.name == "image-classification" and not task.output_hidden_states and self.config.num_labels > 0
        return plain and self.config.framework == "hf" and self.config.fits_transformers and installed("transformers")

    def _transformers(self) -> tuple[torch.nn.Module, bool]:
        from swin_deploy.models.checkpoints import random_checkpoint

        same = self.scratch / "same"
        if same.exists():
            return transformers_network(same), True
        transformers_folder(random_checkpoint(self.config, TaskSpec()), self.scratch / "random")
        return transformers_network(self.scratch / "random"), False

    def _exported(self, model: str, network: torch.nn.Module, batch: int) -> Path:
        file = self.scratch / f"{model}-{batch}.onnx"
        if not file.exists():
            _LOG.info("Exporting the network of %s for batch size %d", model, batch)
            file.write_bytes(torchscript_export(network, (batch, self.config.num_channels, *self.size)))
        return file


def bundle_checkpoint(bundle: Bundle, weights: str | None, seed: int) -> Checkpoint:
    """Return the checkpoint that was exported: the one at `weights`, or else random weights."""
    from swin_deploy.exporters.checkpoint_from_request import checkpoint_from_request, spec_of_export
    from swin_deploy.models.checkpoints import random_checkpoint
    from swin_deploy.models.torch_runtime import refuse_other_network

    if weights is None:
        return random_checkpoint(bundle.config, bundle.task, seed)
    checkpoint = checkpoint_from_request(spec_of_export(bundle, weights, bundle.image_size))
    refuse_other_network(weights, checkpoint.config, bundle)
    return checkpoint


def open_pytorch(request: dict[str, Any]) -> Any:
    """Load the network that a request of `Baselines.pytorch` names."""
    from swin_deploy.models.torch_runtime import Placement, TorchNetwork

    (height, width), placement = request["size"], Placement(*request["placement"])
    if "transformers" in request:
        return TransformersNetwork(Path(request["transformers"]), (height, width), placement)
    bundle = Bundle.open(request["torch"])
    checkpoint = bundle_checkpoint(bundle, request["weights"], request["seed"])
    return TorchNetwork(checkpoint, bundle.task, (height, width), placement=placement)


def transformers_folder(checkpoint: Checkpoint, folder: Path) -> None:
    """Write an image classifier to `folder` such that transformers loads it from there."""
    save_file = require("safetensors.torch", "write a checkpoint").save_file
    prefix = "swin." if checkpoint.config.version == 1 else "swinv2."
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {(n if n.startswith("classifier.") else prefix + n): t.contiguous() for n, t in checkpoint.tensors.items()}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(checkpoint.config.to_dict()), encoding="utf-8")


def transformers_network(folder: Path) -> torch.nn.Module:
    """Load the image classifier in `folder` with transformers: pixels [batch, 3, height, width] -> logits."""
    transformers = import_module("transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model_type = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
    name = {"swin": "SwinForImageClassification", "swinv2": "Swinv2ForImageClassification"}[model_type]
    return logits_network(getattr(transformers, name).from_pretrained(folder, dtype="float32"))


def logits_network(model: Any) -> torch.nn.Module:
    """Wrap a classifier of transformers in a network that returns its logits as a tensor."""
    import torch

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, pixel_values: torch.Tensor) -> Any:
            return self.model(pixel_values).logits

    return Logits().eval()


class TransformersNetwork:
    """The network of transformers with the interface of a runtime; see parity.Runnable."""

    def __init__(self, folder: Path, size: Size, placement: Placement) -> None:
        self._placement, self._network = placement, placement.placed(transformers_network(folder))
        channels = int(json.loads((folder / "config.json").read_text(encoding="utf-8"))["num_channels"])
        self.title = f"PyTorch {version('torch')}, transformers {version('transformers')}"
        self.inputs = (TensorSpec(PIXELS, "float32", ("batch", channels, *size)),)

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        with require("torch", "measure PyTorch").inference_mode():
            return {"logits": self._placement.array(self._network(self._placement.tensor(feeds[PIXELS])))}


def timm_network(config: SwinConfig, size: Size) -> torch.nn.Module:
    """Build the architecture in timm with random weights: pixels [batch, 3, height, width] -> logits."""
    models = import_module("timm.models")
    options = {name: getattr(config, name) for name in ("patch_size", "embed_dim", "depths", "num_heads", "mlp_ratio")}
    options |= {name: getattr(config, name) for name in ("global_pool", "always_partition")}
    options |= {"img_size": size, "in_chans": config.num_channels, "num_classes": config.num_labels}
    options["window_size"] = config.window_size[0] if len(set(config.window_size)) == 1 else [*map(sides, config.window_size)]
    kind = models.swin_transformer.SwinTransformer if config.version == 1 else models.swin_transformer_v2.SwinTransformerV2
    if config.version == 2:
        options["pretrained_window_sizes"] = config.pretrained_window_sizes
    network: torch.nn.Module = kind(**options)
    return network.eval()


def torchscript_export(
    network: torch.nn.Module, shape: tuple[int, int, int, int], half: bool = False, free_batch: bool = False
) -> bytes:
    """Export `network` for pixels of `shape` with the TorchScript exporter of torch, as optimum does."""
    torch, written = require("torch", "export a baseline"), io.BytesIO()
    network, pixels = network.eval(), torch.zeros(shape)
    if half:
        network, pixels = network.half(), pixels.half()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names: dict[str, Any] = {"input_names": ["pixel_values"], "output_names": ["logits"]}
        if free_batch:
            names["dynamic_axes"] = {"pixel_values": {0: "batch"}, "logits": {0: "batch"}}
        torch.onnx.export(network, (pixels,), written, **names, opset_version=17, dynamo=False)
    return written.getvalue()
