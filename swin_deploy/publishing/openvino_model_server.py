"""Model repository of OpenVINO Model Server."""

from __future__ import annotations

import json
from pathlib import Path

from swin_deploy.bundle import Bundle
from swin_deploy.dependencies import require
from swin_deploy.errors import UsageError
from swin_deploy.options import PublishSpec

from .base import publication, write_text

MOUNTED = "/models"  # where the documentation of the server mounts a repository


def write_openvino_model_server(bundle: Bundle, spec: PublishSpec, folder: Path) -> None:
    """Write `config.json`, the model in `NAME/1/`, and `NAME/labels.txt`."""
    from swin_deploy.runtimes.backends import misread

    chosen = publication(bundle, spec)
    if (why := misread(bundle, chosen.file, "openvino")) is not None:
        raise UsageError(why)
    place = folder / chosen.name
    version = place / "1"
    chosen.write_model(version / "model.onnx")
    if spec.ir:
        openvino = require("openvino", "write OpenVINO IR")
        copied = list(version.iterdir())
        model = openvino.Core().read_model(version / "model.onnx")
        # OpenVINO keeps the metadata of ONNX under `framework`; Model API and DL Streamer read `model_info` of IR.
        for key in model.get_rt_info(["framework"]).astype(dict) if model.has_rt_info(["framework"]) else ():
            if key.startswith("model_info "):
                model.set_rt_info(model.get_rt_info(["framework", key]).astype(str), key.split(" "))
        openvino.save_model(model, version / "model.xml", compress_to_fp16=False)
        for file in copied:
            file.unlink()
    chosen.write_labels(place)
    config = {"model_config_list": [{"config": {"name": chosen.name, "base_path": f"{MOUNTED}/{chosen.name}"}}]}
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
