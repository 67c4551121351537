"""Repository folder for the Hugging Face hub: the bundle without its engines, and .gitattributes."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

from swin_deploy.bundle import CONFIG, Bundle, create_bundle
from swin_deploy.manifest import FileEntry
from swin_deploy.options import PublishSpec

from .base import write_text

LARGE = ("*.onnx", "*.onnx_data", "*.npz", "*.bin", "*.xml")  # files that the hub keeps outside git


def write_hugging_face(bundle: Bundle, spec: PublishSpec, folder: Path) -> None:
    """Write the files of the bundle, except its engines, which are code for one kind of GPU.

    transformers.js looks for INT8 in model_quantized.onnx, which is a hard link: the weights are stored once, as on the hub.
    """
    from swin_deploy.exporters.bundle_from_checkpoint import TRANSFORMERS_JS, files_for_transformers_js, for_transformers_js

    again = {name: file for name, file in files_for_transformers_js(bundle).items() if name not in bundle.files}
    kept = {file: entry for file, entry in bundle.files.items() if not file.startswith("engines/")}
    facts = {
        key: value for key, value in bundle.manifest.to_dict().items() if key not in ("files", "tuning", "schema", "created")
    }
    made = folder / "bundle"  # inside the folder, where nothing stays beside it if the process is killed
    with create_bundle(made, replace=False, facts=facts) as draft:
        for file, entry in kept.items():
            source = bundle.verified_path(file)
            if file == CONFIG and again:
                external = any(entry.weights for entry in bundle.graphs.values())
                draft.add_json(CONFIG, {**bundle.read_json(CONFIG), TRANSFORMERS_JS: for_transformers_js(True, external)})
                continue
            draft.add(file, _facts(entry), lambda path, source=source: shutil.copyfile(source, path))  # type: ignore[misc]
    for part in list(made.iterdir()):
        part.rename(folder / part.name)
    made.rmdir()
    for name, file in again.items():
        with contextlib.suppress(OSError):
            os.link(folder / file, folder / name)
        if not (folder / name).exists():
            shutil.copyfile(folder / file, folder / name)
    write_text(folder / ".gitattributes", "".join(f"{name} filter=lfs diff=lfs merge=lfs -text\n" for name in LARGE))


def _facts(entry: FileEntry) -> dict[str, object]:
    return {key: value for key, value in entry.to_dict().items() if key not in ("bytes", "sha256")}
