"""The torch network behind the interface that graphs are run through, so that both answer the same questions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from numpy.typing import NDArray

from swin_deploy.bundle import CONFIG, Bundle
from swin_deploy.config import SwinConfig
from swin_deploy.errors import UsageError
from swin_deploy.frames import Frames
from swin_deploy.models.checkpoints import Checkpoint
from swin_deploy.models.swin import SwinNetwork
from swin_deploy.specs import Size, TensorSpec
from swin_deploy.tasks import TaskSpec


class TorchNetwork:
    """A checkpoint in fp32 PyTorch, for one image size; see reference.Runnable.

    With `frames` it takes uint8 frames, and has them prepared by the image processor.
    """

    def __init__(self, checkpoint: Checkpoint, task: TaskSpec, size: Size, frames: Frames | None = None) -> None:
        self.title = f"PyTorch {torch.__version__}"
        self._network = SwinNetwork(checkpoint.config, size, checkpoint.tensors, task).eval()
        self._frames = frames
        self.inputs = task.inputs(checkpoint.config, size, None if frames is None else frames.frame_size or size)
        names = task.output_names(checkpoint.config)
        self.outputs = tuple(TensorSpec(name, "float32", ("batch",)) for name in names)

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        arrays = [feeds[spec.name] for spec in self.inputs]
        if self._frames is not None:
            arrays[0] = self._frames.inside(list(arrays[0]))
        with torch.inference_mode():
            outputs = self._network.named(*map(torch.from_numpy, arrays))
        return {name: output.contiguous().numpy() for name, output in outputs.items()}


def refuse_other_network(weights: object, config: SwinConfig, bundle: Bundle) -> None:
    """Raises UsageError where `config`, of the checkpoint `weights`, is not the architecture of `bundle`."""
    ours = SwinConfig.from_dict(bundle.read_json(CONFIG))
    names = ("version", "embed_dim", "depths", "num_heads", "window_size", "patch_size", "mlp_ratio", "qkv_bias", "num_labels")
    for name in names:
        if getattr(ours, name) != getattr(config, name):
            raise UsageError(
                f"{weights} is another network than that of {bundle.path} ({name} {getattr(config, name)}, not "
                f"{getattr(ours, name)}). Name the checkpoint that was exported."
            )
