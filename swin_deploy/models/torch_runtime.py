"""Runs a checkpoint in PyTorch through the interface of the exported graphs, to compare both."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from swin_deploy.bundle import Bundle, TensorSpec
from swin_deploy.config import SwinConfig
from swin_deploy.errors import UsageError
from swin_deploy.frame_input import Frames
from swin_deploy.models.checkpoints import Checkpoint
from swin_deploy.models.swin import SwinNetwork
from swin_deploy.options import Size
from swin_deploy.tasks import TaskSpec


@dataclass(frozen=True)
class Placement:
    """Device ("cpu", "cuda:0"), precision ("fp32", or "fp16" for all weights) and compilation of a network in PyTorch."""

    device: str = "cpu"
    precision: str = "fp32"
    compiled: bool = False

    def placed(self, network: nn.Module) -> Callable[..., Any]:
        """Move the network there, in evaluation mode."""
        placed = network.to(self.device, torch.float16 if self.precision == "fp16" else torch.float32).eval()
        return torch.compile(placed) if self.compiled else placed

    def tensor(self, array: NDArray[Any]) -> Tensor:
        """Convert an input of the network."""
        tensor = torch.from_numpy(array).to(self.device)
        return tensor.half() if self.precision == "fp16" and tensor.is_floating_point() else tensor

    def array(self, tensor: Tensor) -> NDArray[Any]:
        """Wait for an output, and return it in float32."""
        return tensor.float().contiguous().cpu().numpy()


class TorchNetwork:
    """A checkpoint in PyTorch for one image size. It implements `parity.Runnable`.

    With `frames` it accepts frames and preprocesses them with the image processor.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        task: TaskSpec,
        size: Size,
        frames: Frames | None = None,
        placement: Placement | None = None,
    ) -> None:
        self.title = f"PyTorch {torch.__version__}"
        self._placement = placement or Placement()
        self._network = self._placement.placed(SwinNetwork(checkpoint.config, size, checkpoint.tensors, task))
        self._frames = frames
        self.inputs = task.inputs(checkpoint.config, size, None if frames is None else frames.spec(size))
        names = task.output_names(checkpoint.config)
        self.outputs = tuple(TensorSpec(name, "float32", ("batch",)) for name in names)

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        arrays = [feeds[spec.name] for spec in self.inputs]
        if self._frames is not None:
            arrays[0] = self._frames.inside(list(self._frames.pixels(arrays[0])))
        with torch.inference_mode():
            outputs = self._network(*map(self._placement.tensor, arrays))
            return {spec.name: self._placement.array(output) for spec, output in zip(self.outputs, outputs, strict=True)}


def refuse_other_network(weights: object, config: SwinConfig, bundle: Bundle) -> None:
    """Raise UsageError if `config`, of the checkpoint `weights`, is not the architecture of `bundle`."""
    ours = bundle.config
    shape = ("version", "embed_dim", "depths", "num_heads", "window_size", "patch_size", "mlp_ratio", "qkv_bias", "num_labels")
    for name in (*shape, "global_pool", "always_partition"):
        if getattr(ours, name) != getattr(config, name):
            raise UsageError(
                f"{weights} is not the network in {bundle.path} ({name} {getattr(config, name)}, not {getattr(ours, name)}). "
                f"Pass the checkpoint that was exported."
            )
