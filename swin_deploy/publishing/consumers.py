"""The table of targets, and how a folder is published: into a temporary one beside it, which is moved in place at the end."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from pathlib import Path

from swin_deploy.bundle import NEW, Bundle, disk_errors
from swin_deploy.errors import UsageError
from swin_deploy.files import make_folder, parents_of, scratch, sweep, synced
from swin_deploy.options import PublishSpec

# target -> module and its function, which writes the files into an empty folder
CONSUMERS = {
    "triton": ("triton", "write_triton"),
    "openvino-model-server": ("openvino_model_server", "write_openvino_model_server"),
    "deepstream": ("deepstream", "write_deepstream"),
    "gstreamer": ("gstreamer", "write_gstreamer"),
    "huggingface": ("hugging_face", "write_hugging_face"),
    "epcontext": ("ep_context", "write_ep_context"),
    "web": ("web_page", "write_web_page"),
}


def publish_bundle(bundle: Bundle, spec: PublishSpec) -> tuple[Path, ...]:
    """Write the files of a target into a new folder and return their paths."""
    module, name = CONSUMERS[spec.target]
    write: Callable[[Bundle, PublishSpec, Path], None] = getattr(importlib.import_module(f".{module}", __package__), name)
    target = Path(spec.output)
    with disk_errors(target, NEW):
        _refuse_content(target)
        path = Path(os.path.realpath(target))
        if bundle.path.resolve() in path.parents:
            raise UsageError(f"{path} is inside the bundle. Choose another folder with -o.")
        with parents_of(path):
            sweep(path)
            with scratch(path) as staging:
                make_folder(staging)
                write(bundle, spec, staging)
                written = sorted(staging.rglob("*"))
                for one in (*written, staging):
                    synced(one)
                _refuse_content(target)
                staging.replace(path)
                synced(path.parent)
    return tuple(target / one.relative_to(staging) for one in written if not (path / one.relative_to(staging)).is_dir())


def _refuse_content(path: Path) -> None:
    if os.path.lexists(path) and not (path.is_dir() and not any(path.iterdir())):
        raise UsageError(f"{path} exists and is not an empty folder. Choose another folder with -o, or remove it.")
