"""A static page that classifies images in the browser, with onnxruntime-web. It needs a web server, but no code on it."""

from __future__ import annotations

import html
import json
import re
import shutil
from pathlib import Path, PurePosixPath
from typing import Any

from swin_deploy.bundle import Bundle
from swin_deploy.errors import UsageError
from swin_deploy.files import read_regular
from swin_deploy.options import PublishSpec
from swin_deploy.preprocess import FILTERS

from .base import Publication, publication, write_text

PACKAGE = "onnxruntime-web"
SCRIPT = "ort.webgpu.min.mjs"  # WebGPU and WebAssembly
SCRIPT_BYTES = 1 << 24
FOUND = f"Install it with `npm install {PACKAGE}`, or pass its folder with --onnxruntime-web."


def write_web_page(bundle: Bundle, spec: PublishSpec, folder: Path) -> None:
    """Write `index.html`, the model, and the files of onnxruntime-web."""
    chosen = publication(bundle, spec)
    settings = _settings(chosen)
    scripts = _package(spec) / "dist"
    text = read_regular(scripts / SCRIPT, SCRIPT_BYTES, UsageError, FOUND).decode("utf-8", "replace")
    needed = {name for name in re.findall(r"ort-wasm[\w.-]*\.(?:mjs|wasm)", text) if (scripts / name).is_file()}
    if not any(name.endswith(".wasm") for name in needed):
        needed |= {name.removesuffix(".mjs") + ".wasm" for name in needed}
    for name in sorted({SCRIPT, *needed}):
        shutil.copyfile(scripts / name, folder / name)
    chosen.write_model(folder / "model.onnx")
    values = json.dumps(settings).replace("<", "\\u003c")
    head, page = ((Path(__file__).parent / file).read_text(encoding="utf-8") for file in ("../page_head.html", "web_page.html"))
    head = head.replace("{{name}}", html.escape(chosen.name))
    write_text(folder / "index.html", page.replace("{{head}}\n", head).replace("{{settings}}", values))


def _package(spec: PublishSpec) -> Path:
    """Return the folder of the npm package, which is found as Node.js finds it."""
    if spec.onnxruntime_web is not None:
        folders = [Path(spec.onnxruntime_web)]
    else:
        folders = [place / "node_modules" / PACKAGE for place in (Path.cwd(), *Path.cwd().parents)]
    for folder in folders:
        if (folder / "dist" / SCRIPT).is_file():
            return folder
    raise UsageError(f"The page needs the npm package {PACKAGE}, and there is no dist/{SCRIPT} in {folders[0]}. {FOUND}")


def _settings(chosen: Publication) -> dict[str, Any]:
    """Return what the script of the page must know. Raises UsageError for preprocessing that it does not have."""
    steps, graph, output = chosen.bundle.preprocessor, chosen.graph, chosen.class_output()
    if output is None:
        raise UsageError("The page shows the classes of an image. Export for image classification.")
    chosen.refuse_batch("The page")
    unsupported = {
        "images of other channels than RGB or gray": steps.channels not in (1, 3),
        "channels in the order bgr": chosen.bgr,
        "padding": steps.do_pad or steps.do_thumbnail or steps.crop_fill is not None,
        "sizes that depend on the image": steps.varies or steps.longest_edge is not None,
        "frames of one size (--embed-resize)": graph.preprocessing is not None and graph.preprocessing.frame_size is not None,
    }
    if lacking := [what for what, found in unsupported.items() if found]:
        raise UsageError(f"The page cannot prepare {lacking[0]}. Export with other preprocessing, or use `swin-deploy serve`.")
    size = graph.image_size
    resized = steps if steps.do_center_crop or steps.shortest_edge is not None else steps.with_size(size)
    normalizes = graph.preprocessing is None
    channels = steps.channels
    weights = graph.weights and PurePosixPath(graph.weights).name
    return {
        "labels": chosen.labels,
        "activation": "none" if output.name != "logits" else chosen.bundle.config.score_activation,
        "output": output.name,
        "input": chosen.pixels.name,
        "type": chosen.pixels.dtype,
        "planes": chosen.pixels.shape[1] == channels,
        "channels": channels,
        "size": size,
        "resize": {
            "size": resized.size,
            "shortest": resized.shortest_edge,
            "ratio": resized.keep_ratio,
            "filter": FILTERS[resized.resample],
        }
        if resized.do_resize
        else None,
        "crop": resized.crop_size if resized.do_center_crop else None,
        "roundCrop": bool(resized.round_crop),
        "rescale": steps.rescale_factor if normalizes and steps.do_rescale else 1,
        "mean": steps.image_mean if normalizes and steps.do_normalize else [0] * channels,
        "std": steps.image_std if normalizes and steps.do_normalize else [1] * channels,
        "weights": weights or None,
    }
