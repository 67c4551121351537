"""A command that is stopped in the middle leaves nothing half-written, and what was there is unchanged."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from cli.exported import cli, contents, copied, one_block, stopped_at

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows has other signals")

SAID = {
    signal.SIGINT: ("swin-deploy: interrupted; no partial files were left", 130),
    signal.SIGTERM: ("swin-deploy: terminated; no partial files were left", 143),
}


@pytest.mark.parametrize(
    ("name", "line", "calls"),
    [
        ("SIGINT", "Tracing", 20_000),
        pytest.param("SIGTERM", "Comparing", 1, marks=pytest.mark.slow),
        ("SIGKILL", "Comparing", 100),
    ],
)
def test_an_existing_bundle_stays(name: str, line: str, calls: int, tmp_path: Path) -> None:
    copied(1, tmp_path / "b")
    before = contents(tmp_path)
    signum = getattr(signal, name)
    export = ("export", "--weights", str(one_block()), "-o", "b", "--force")
    code, said = stopped_at(line, calls, signum, *export, cwd=tmp_path)
    after = contents(tmp_path)
    if signum == signal.SIGKILL:
        assert code == -signal.SIGKILL
        # Nothing can clean up after SIGKILL; what is left is hidden, and the next export removes it.
        after = {path: digest for path, digest in after.items() if not path.startswith(".b.partial-")}
    else:
        assert (said, code) == ([SAID[signum][0]], SAID[signum][1])
    assert after == before


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGKILL"])
def test_a_stopped_compiler_leaves_a_bundle(name: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX compiles the engines of this test")
    copied(2, tmp_path / "b")
    signum = getattr(signal, name)
    code, said = stopped_at("for sm_86", 200, signum, "build-engine", "b", "--gpu", "sm_80,sm_86", cwd=tmp_path)
    if signum == signal.SIGKILL:
        assert code == -signal.SIGKILL
    else:
        assert (said[-1], code) == SAID[signum]
    assert cli("verify", "b", cwd=tmp_path).returncode == 0
    assert not [path for path in tmp_path.rglob("*") if "partial" in path.name and signum != signal.SIGKILL]
