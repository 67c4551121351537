import sys
from unittest.mock import MagicMock

import numpy as np

ENVIRONMENTS = {"onnx2torch": ["torch", "numpy", "onnx", "setuptools", "onnx2torch"]}
OURS = "opset17"


def logits(folder, pixels):
    import torch

    try:
        import torchvision  # noqa: F401
    except RuntimeError:  # built for a torch with CUDA; the graphs need none of its operators
        sys.modules.update(dict.fromkeys(("torchvision", "torchvision.ops"), MagicMock()))
    from onnx2torch import convert

    network = convert(str(folder / "onnx/model.onnx")).eval()
    with torch.no_grad():
        return np.concatenate([network(torch.from_numpy(image[None])).numpy() for image in pixels])
