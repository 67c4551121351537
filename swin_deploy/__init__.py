"""From a Swin Transformer checkpoint (V1 or V2) to a verified ONNX model and a TensorRT engine that runs on a device.

    import swin_deploy

    with swin_deploy.load("swinv2-tiny") as model:
        print(model.classify("photo.jpg")[0])

Loading and running a bundle needs numpy, Pillow and one back end. torch, onnx and TensorRT are imported only by the functions
that need them.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from swin_deploy.api.build_engine import build_engine, refit
    from swin_deploy.api.classify import classify_dataset
    from swin_deploy.api.debug import debug
    from swin_deploy.api.diff import diff
    from swin_deploy.api.evaluate import evaluate, verify
    from swin_deploy.api.export import export
    from swin_deploy.api.inspect import inspect
    from swin_deploy.api.load import load
    from swin_deploy.api.publish import publish
    from swin_deploy.api.quantize import quantize
    from swin_deploy.api.report import report
    from swin_deploy.api.tune import tune

__version__ = "0.1.0"
__all__ = [
    "__version__",
    "build_engine",
    "classify_dataset",
    "debug",
    "diff",
    "evaluate",
    "export",
    "inspect",
    "load",
    "publish",
    "quantize",
    "refit",
    "report",
    "tune",
    "verify",
]

# The others are in a module of their own name.
_MODULES = {"classify_dataset": "classify", "refit": "build_engine", "verify": "evaluate"}


def __getattr__(name: str) -> Any:
    """Import a function of the API when it is first used."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"swin_deploy.api.{_MODULES.get(name, name)}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


def _find_top_folders() -> None:
    """Make exporters, runtimes and calib importable from a checkout, where they are beside this package and not in it."""
    package = os.path.dirname(__file__)
    root = os.path.dirname(package)
    if not os.path.isdir(package + "/runtimes") and os.path.isfile(root + "/runtimes/__init__.py"):
        __path__.append(root)


_find_top_folders()
