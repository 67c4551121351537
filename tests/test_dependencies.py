"""What is set before a library is imported."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from swin_deploy.dependencies import require
from swin_deploy.errors import SwinDeployError

IMPORTED = 'from swin_deploy.dependencies import require; require("onnxruntime", "run")'
QUIET = ("ORT_DISABLE_TELEMETRY", "CI", "GITHUB_ACTIONS")  # it is silent in what it takes for a test, too


@pytest.mark.parametrize(("chosen", "reports"), [(None, False), ("0", True)])
def test_onnxruntime_does_not_report_unless_somebody_wants_it(chosen: str | None, reports: bool, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    env = {name: value for name, value in os.environ.items() if name not in QUIET and not name.startswith("PYTEST")}
    env |= {"XDG_CACHE_HOME": str(tmp_path)} | ({"ORT_DISABLE_TELEMETRY": chosen} if chosen else {})
    code = IMPORTED + '; import os; print(os.environ["ORT_DISABLE_TELEMETRY"])'
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ("0" if reports else "1")
    if not reports:
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("decided", [False, True])
def test_openvino_does_not_report_unless_somebody_has_decided(decided: bool, tmp_path: Path) -> None:
    """Without a decision the library that reports is not even imported, and stays usable; with one it obeys that itself."""
    pytest.importorskip("openvino", reason="openvino is not installed")
    pytest.importorskip("openvino_telemetry", reason="openvino-telemetry is not installed")
    folder = tmp_path / ("Intel Corporation" if os.name == "nt" else "intel")
    if decided:
        folder.mkdir()
        (folder / "openvino_telemetry").write_text("0")  # as `opt_in_out --opt_out` writes it
    env = {name: value for name, value in os.environ.items() if name not in QUIET and not name.startswith("PYTEST")}
    code = (
        'import sys; from swin_deploy.dependencies import require; ov = require("openvino", "run")\n'
        'print("openvino_telemetry" in sys.modules, len(ov.Core().available_devices) > 0)\n'
        "import openvino_telemetry"
    )
    env |= {"HOME": str(tmp_path), "LOCALAPPDATA": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(decided), "True"]
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["openvino_telemetry"] * decided


def test_an_interrupt_of_a_native_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """pybind11 converts it to an ImportError. The library cannot be imported again, and reinstalling it would not help."""
    errors = [ImportError("initialization failed"), ImportError('type "Extension" is already registered')]
    errors[0].__cause__ = KeyboardInterrupt()

    def fail(module: str) -> None:
        raise errors.pop(0)

    monkeypatch.setattr("swin_deploy.dependencies._INTERRUPTED", set())
    monkeypatch.setattr(importlib, "import_module", fail)
    with pytest.raises(KeyboardInterrupt):
        require("onnxruntime", "run")
    with pytest.raises(SwinDeployError, match=r"The import of ONNX Runtime was interrupted.*Start this process again\."):
        require("onnxruntime", "run")
