"""An export that is stopped in the middle: nothing half-written, and what was there is as it was."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from cli.exported import SCRIPT, WEIGHTS, cli, contents, copied, stopped

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows has other signals")

EXPORT = (SCRIPT, "export", "--weights", str(WEIGHTS[2]), "-o", "b", "--force")
SAID = {
    signal.SIGINT: ("swin-deploy: interrupted; no partial files were left", 130),
    signal.SIGTERM: ("swin-deploy: terminated; no partial files were left", 143),
}


@pytest.mark.parametrize(
    ("name", "line", "seconds"),
    [
        ("SIGTERM", "Loading", 0.0),
        ("SIGTERM", "Tracing", 1.0),
        ("SIGTERM", "Comparing", 0.0),
        ("SIGINT", "Tracing", 0.3),
        ("SIGINT", "Tracing", 1.7),
        ("SIGKILL", "Tracing", 0.5),
        ("SIGKILL", "Comparing", 0.0),
    ],
)
def test_an_existing_bundle_stays(name: str, line: str, seconds: float, tmp_path: Path) -> None:
    copied(1, tmp_path / "b")
    before = contents(tmp_path)
    signum = getattr(signal, name)
    code, said = stopped(EXPORT, tmp_path, line, seconds, signum)
    after = contents(tmp_path)
    if code == 0 and line == "Comparing":  # its last step, which a busy machine may see the end of before the signal
        assert cli("verify", "b", cwd=tmp_path).returncode == 0
        return
    if signum == signal.SIGKILL:
        assert code == -signal.SIGKILL
        # Nobody can clean up after SIGKILL; what is left is hidden, and the next export sweeps it.
        after = {path: digest for path, digest in after.items() if not path.startswith(".b.partial-")}
    else:
        assert (said, code) == ([SAID[signum][0]], SAID[signum][1])
    assert after == before


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGKILL"])
def test_a_stopped_compiler_leaves_a_bundle(name: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX compiles the engines of this test")
    copied(2, tmp_path / "b")
    signum = getattr(signal, name)
    command = (SCRIPT, "build-engine", "b", "--gpu", "sm_75,sm_80,sm_86,sm_89,sm_120")
    code, said = stopped(command, tmp_path, "sm_80", 0.1, signum)
    if signum != signal.SIGKILL:
        assert (said[-1], code) == SAID[signum]
    assert cli("verify", "b", cwd=tmp_path).returncode == 0
    assert not [path for path in tmp_path.rglob("*") if "partial" in path.name and signum != signal.SIGKILL]
