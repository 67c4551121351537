"""mypy accepts the whole package."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_the_package_is_typed() -> None:
    done = subprocess.run([sys.executable, str(Path(__file__).with_name("typecheck.py"))], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
