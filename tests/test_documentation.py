"""The commands and Python blocks of the README and the guides run; links, options and file names in the documentation exist."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import click
import pytest
from cli.exported import cli_here, exported_into

from swin_deploy.cli import VERBS, cli

ROOT = Path(__file__).resolve().parents[1]
GUIDES = [ROOT / "README.md", *sorted((ROOT / "docs/guides").glob("*.md"))]
OWN = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
LINKED = [*OWN, ROOT / "CHANGELOG.md", ROOT / "benchmarks/README.md", *sorted((ROOT / "examples").glob("*/README.md"))]
NOT_RUN = re.compile(r"<!-- not run: (.+) -->")
# Options of other programs.
FOREIGN = {
    *("--data-binary", "--opt_in", "--opt_out", "--config-settings", "--onefile", "--system-site-packages", "--runtime", "--rm")
}


@dataclass
class Block:
    """A fenced block: its language, its lines, and why it is not run (None: it is)."""

    page: Path
    line: int
    language: str
    not_run: str | None
    lines: list[str] = field(default_factory=list)

    def commands(self) -> list[tuple[str, list[str]]]:
        """Each command of a console block, and the output that is shown for it."""
        found: list[tuple[str, list[str]]] = []
        for line in self.lines if self.language == "console" else ():
            if line.startswith("$ "):
                found.append((line[2:], []))
            elif line.strip() not in ("", "..."):
                found[-1][1].append(line)
        return found


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    found: list[Block] = []
    current: Block | None = None
    reason = None
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        if line.startswith("```"):
            if current is None:
                current = Block(page, number, line[3:].strip(), reason)
                found.append(current)
            else:
                current, reason = None, None
        elif current is not None:
            current.lines.append(line)
        elif line.strip():
            match = NOT_RUN.fullmatch(line.strip())
            reason = match[1] if match else None
    return found


def runnable(page: Path) -> list[Block]:
    return [block for block in blocks(page) if block.language in ("console", "python")]


def normalized(line: str) -> str:
    """A line without what differs between machines and releases: fractions, exponents, versions, column widths."""
    line = re.sub(r"\d+(\.\d+)*e[-+]?\d+|\d+(\.\d+)+", "#", line)
    return re.sub(r"-{2,}|\s+", " ", line).strip()


def run_command(command: str, folder: Path) -> tuple[int, str]:
    """Exit code and output of a command in `folder`. An export that another page has made is copied."""
    words = shlex.split(command, comments=True)
    if words[:2] == ["swin-deploy", "export"]:
        options = [str(place.resolve()) if (place := folder / word).exists() else word for word in words[2:]]
        return 0, exported_into(folder, *options)["bundle"]
    if words[0] == "swin-deploy":
        done = cli_here(*words[1:], cwd=folder)
    else:
        done = subprocess.run(["bash", "-c", command], cwd=folder, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.stem)
def test_blocks_run_and_print_what_is_shown(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One page is one session: its blocks run in order in one folder."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX compiles the engines of the documentation")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    for block in runnable(page):
        if block.not_run is not None:
            continue
        place = f"{page.name}:{block.line}"
        if block.language == "python":
            code = "\n".join(block.lines)
            done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
            assert done.returncode == 0, f"{place}\n{done.stderr}"
            continue
        for command, shown in block.commands():
            code_of_exit, output = run_command(command, tmp_path)
            assert code_of_exit == 0, f"{place}: {command}\n{output}"
            printed = {normalized(line) for line in output.splitlines()}
            assert [line for line in shown if normalized(line) not in printed] == [], f"{place}: {command}\n{output}"


SKIPPED = [block for page in GUIDES for block in runnable(page) if block.not_run is not None]


@pytest.mark.parametrize("block", SKIPPED, ids=lambda block: f"{block.page.stem}-{block.line}")
def test_block_that_is_not_run(block: Block) -> None:
    """Lists why at the end of the tests. The commands must at least exist."""
    for command, _ in block.commands():
        words = shlex.split(command, comments=True)
        assert words[0] != "swin-deploy" or words[1] in VERBS, command
        assert words[0] in ("swin-deploy", "sudo") or shutil.which(words[0]) is not None, command
    pytest.skip(f"a block of the documentation: {block.not_run}")


def options_of(verb: str) -> set[str]:
    command = cli.get_command(click.Context(cli), verb)
    assert command is not None
    options = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    return options | {"--help", "--version"}


def code_spans(page: Path) -> Iterator[str]:
    """Every command line and every inline code span of a page."""
    text = page.read_text(encoding="utf-8")
    for block in blocks(page):
        yield from (command for command, _ in block.commands())
    outside = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    yield from (" ".join(span.split()) for span in re.findall(r"`([^`]+)`", outside))


@pytest.mark.parametrize("page", OWN, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_option_exists(page: Path) -> None:
    """An option that follows a verb or a script is one of it; any other is one of some verb."""
    every = set().union(*map(options_of, VERBS))
    wrong = []
    for span in code_spans(page):
        for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", span):
            script = re.search(r"python (\S+\.py)", span)
            verb = re.match(r'"?(?:swin-deploy )?([a-z-]+)', span)
            if script:
                known = flag in (ROOT / script[1]).read_text(encoding="utf-8")
            elif verb and verb[1] in VERBS:
                known = flag in options_of(verb[1])
            else:
                known = flag in every or flag in FOREIGN or span.startswith(("pytest ", "pip ", "polygraphy "))
            if not known:
                wrong.append(f"{flag} in `{span}`")
    assert wrong == []


@pytest.mark.parametrize("page", OWN, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_file_that_is_named_exists(page: Path) -> None:
    tops = "swin_deploy|exporters|runtimes|calib|tests|benchmarks|examples|docs"
    named = {path for span in code_spans(page) for path in re.findall(rf"(?<![\w/.])((?:{tops})/[\w./-]*[\w/])", span)}
    assert [path for path in sorted(named) if "NAME" not in path and not (ROOT / path).exists()] == []


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and MkDocs make them."""
    outside = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", outside, flags=re.MULTILINE)
    return {re.sub(r"[^\w\s-]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", LINKED, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_internal_link_resolves(page: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert broken == []


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 160
