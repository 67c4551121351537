"""Repository folder for the Hugging Face hub: the bundle without its engines, and .gitattributes."""

from __future__ import annotations

import shutil
from pathlib import Path

from swin_deploy.bundle import Bundle, create_bundle
from swin_deploy.manifest import FileEntry
from swin_deploy.options import PublishSpec

from .base import write_text

LARGE = ("*.onnx", "*.onnx_data", "*.npz", "*.bin", "*.xml")  # files that the hub keeps outside git


def write_hugging_face(bundle: Bundle, spec: PublishSpec, folder: Path) -> None:
    """Write the files of the bundle, except its engines, which are code for one kind of GPU."""
    kept = {file: entry for file, entry in bundle.files.items() if not file.startswith("engines/")}
    facts = {
        key: value for key, value in bundle.manifest.to_dict().items() if key not in ("files", "tuning", "schema", "created")
    }
    with create_bundle(folder, replace=False, facts=facts) as draft:
        for file, entry in kept.items():
            source = bundle.verified_path(file)
            draft.add(file, _facts(entry), lambda path, source=source: shutil.copyfile(source, path))  # type: ignore[misc]
    write_text(folder / ".gitattributes", "".join(f"{name} filter=lfs diff=lfs merge=lfs -text\n" for name in LARGE))


def _facts(entry: FileEntry) -> dict[str, object]:
    return {key: value for key, value in entry.to_dict().items() if key not in ("bytes", "sha256")}
