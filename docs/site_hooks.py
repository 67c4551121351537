"""MkDocs hook: README, CONTRIBUTING and CHANGELOG are pages, and mkdocstrings finds the package as it is installed."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "CONTRIBUTING.md", "CHANGELOG.md": "CHANGELOG.md"}
TREE = tempfile.TemporaryDirectory(prefix="swin-deploy-docs-")


@event_priority(100)  # before mkdocstrings reads its configuration
def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Point mkdocstrings at a tree of links in which exporters, runtimes and calib are packages below swin_deploy."""
    package = Path(TREE.name) / "swin_deploy"
    package.mkdir()
    for entry in (*(ROOT / "swin_deploy").iterdir(), ROOT / "exporters", ROOT / "runtimes", ROOT / "calib"):
        (package / entry.name).symlink_to(entry)
    plugin: Any = config.plugins["mkdocstrings"]
    plugin.config["handlers"]["python"]["paths"] = [TREE.name]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the documents at the top of the repository, with their links made relative to docs/."""
    for name, page in PAGES.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=text.replace("](docs/", "](")))
    return files
