"""What is kept in the user's cache folder: files that may go at any time, and are made again."""

from __future__ import annotations

import os
import secrets
import sys
from pathlib import Path


def cache_folder(kind: str) -> Path | None:
    """The folder for one kind of file; None where there is no home for it. It need not exist yet."""
    if given := os.environ.get("XDG_CACHE_HOME"):
        folder = Path(given)
    elif sys.platform == "win32":
        folder = Path(os.environ.get("LOCALAPPDATA", ""))
    else:
        try:
            folder = Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")
        except RuntimeError:
            return None
    return folder / "swin-deploy" / kind if folder.is_absolute() else None


def keep(file: Path | None, content: bytes) -> None:
    """Writes the file all at once; where nothing may be written, it is not kept."""
    if file is None:
        return
    scratch = file.with_name(f".{file.name}.partial-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            scratch.write_bytes(content)
            scratch.replace(file)
        finally:
            scratch.unlink(missing_ok=True)
    except OSError:
        pass
