"""Hook of PyInstaller, which finds it by the entry point `pyinstaller40` of this package."""

from __future__ import annotations

from pathlib import Path


def hook_folders() -> list[str]:
    """Return the folder of the hook."""
    return [str(Path(__file__).parent)]
