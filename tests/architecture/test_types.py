"""mypy accepts the whole package; `make lint` also checks it against the types of torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_the_package_is_typed() -> None:
    script = str(Path(__file__).with_name("typecheck.py"))
    done = subprocess.run([sys.executable, script, "--quick"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
