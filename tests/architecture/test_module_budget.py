"""Each verb enters few modules, so that its code can be read from start to end."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_verbs_enter_few_modules() -> None:
    """A fresh process is traced: results that other tests left in caches would hide modules."""
    script = Path(__file__).with_name("module_budget.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
