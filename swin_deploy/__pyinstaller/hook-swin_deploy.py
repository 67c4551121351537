"""What an application with `import swin_deploy` needs besides the modules that PyInstaller sees: the parts that are imported by
name, the installed back ends, and the data files. The libraries that only export and quantize need stay out.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

PARTS = ("swin_deploy.api", "swin_deploy.runtimes")
BACK_ENDS = ("onnxruntime", "openvino", "tensorrt", "tensorrt_lean", "tensorrt_rtx", "cuda.bindings", "cuda.core")

# Not imported because of swin_deploy. An application that imports them itself still has them.
excludedimports = [
    "torch",
    "onnx",
    "onnxscript",
    "onnx_graphsurgeon",
    "transformers",
    "timm",
    "matplotlib",
    "ray",
    "pyarrow",
    "h5py",
]


def hook(hook_api: Any) -> None:
    """Add the parts of the package, and the back ends that are installed, with their libraries and versions."""
    from PyInstaller.utils.hooks import collect_data_files, collect_dynamic_libs, collect_submodules, copy_metadata

    hook_api.add_imports(*(name for part in PARTS for name in collect_submodules(part)))
    hook_api.add_datas(collect_data_files("swin_deploy") + copy_metadata("swin-deploy"))
    for name in BACK_ENDS:
        if find_spec(name.partition(".")[0]) is not None and find_spec(name) is not None:
            hook_api.add_imports(name)
            hook_api.add_binaries(collect_dynamic_libs(name))
