"""Files that are made once for all tests of a run, whichever of its processes asks for them first."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

FOLDER = "SWIN_DEPLOY_TESTS_FOLDER"  # conftest.py sets it


def once(name: str, make: Callable[[Path], object]) -> Path:
    """The file or folder `name`, which `make` wrote to the path that it was given. Copy it before changing it."""
    folder = Path(os.environ[FOLDER])
    done = folder / "done" / name
    with (folder / f"{name}.lock").open("w") as lock:
        if os.name != "nt":  # without locks, a second process fails to replace what the first one made
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            made = folder / "making" / name
            made.parent.mkdir(exist_ok=True)
            shutil.rmtree(made, ignore_errors=True)  # left by a test that failed
            done.parent.mkdir(exist_ok=True)
            make(made)
            made.rename(done)
    return done
