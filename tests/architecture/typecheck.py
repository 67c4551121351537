"""mypy over the whole package, with proof that it was the whole package. Run: python tests/architecture/typecheck.py [--quick]

--quick takes half as long: it does not read the types of torch, and leaves out three kinds of errors that follow from that.

exporters/, runtimes/ and calib/ are part of swin_deploy only once installed, so `mypy -p swin_deploy` on the bare
checkout passes without having read them. Here mypy reads a tree of links that is laid out as the installed package is,
and the number of files it says it checked must be the number of files there are.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LINKED = ("exporters", "runtimes", "calib")
WITHOUT_TORCH = """
[[tool.mypy.overrides]]
module = "torch.*"
follow_imports = "skip"
"""


def link_tree(target: Path) -> Path:
    """`target`/swin_deploy, laid out as the installed package is, made of links into the checkout."""
    package = target / "swin_deploy"
    package.mkdir()
    for entry in (*(ROOT / "swin_deploy").iterdir(), *(ROOT / name for name in LINKED)):
        (package / entry.name).symlink_to(entry)
    return package


def main(quick: bool) -> int:
    expected = sum(len(list((ROOT / folder).rglob("*.py"))) for folder in ("swin_deploy", *LINKED))
    with tempfile.TemporaryDirectory() as folder:
        link_tree(Path(folder))
        settings = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
        (Path(folder) / "pyproject.toml").write_text(settings + WITHOUT_TORCH * quick)
        cache = ROOT / ".mypy_cache" / ("quick" if quick else "whole")
        command = [sys.executable, "-m", "mypy", "-p", "swin_deploy", "--cache-dir", str(cache)]
        command += [f"--disable-error-code={code}" for code in ("misc", "no-any-return", "unused-ignore") if quick]
        environment = {name: value for name, value in os.environ.items() if name != "MYPYPATH"}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    # Where the file stands in the checkout, so that the line can be clicked.
    print(re.sub(rf"^swin_deploy/({'|'.join(LINKED)})/", r"\1/", done.stdout, flags=re.MULTILINE), end="")
    print(done.stderr, end="", file=sys.stderr)
    if done.returncode:
        return done.returncode
    match = re.search(r"no issues found in (\d+) source files?", done.stdout)
    checked = int(match[1]) if match else 0
    if checked != expected:
        print(f"mypy checked {checked} files of {expected}: the others are not type-checked.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main("--quick" in sys.argv))
