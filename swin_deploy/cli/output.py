"""What the verbs share: tables and JSON on stdout, timed lines on stderr."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import click

from swin_deploy.errors import UsageError

json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")


def print_json(value: Any) -> None:
    """`value` on stdout, as JSON that a program can read."""
    click.echo(_encodable(json.dumps(value, indent=2, ensure_ascii=False)))


def _encodable(text: str) -> str:
    """`text` with halves of characters, which a label may hold and UTF-8 has no bytes for, as JSON would escape them."""
    return re.sub("[\ud800-\udfff]", lambda match: f"\\u{ord(match[0]):04x}", text)


def only_flag(given: Mapping[str, bool]) -> str | None:
    """The one that is set of options that exclude each other, or None. Raises UsageError where more are."""
    names = [name for name, value in given.items() if value]
    if len(names) > 1:
        raise UsageError(f"--{names[0]} and --{names[1]} exclude each other: give one of them.")
    return names[0] if names else None


def print_table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table on stdout, columns aligned: text to the left, numbers to the right."""
    cells = [list(head), *([str(value) for value in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    right = [bool(rows) and all(isinstance(row[column], int | float) for row in rows) for column in range(len(head))]
    for row in cells:
        padded = [
            text.rjust(width) if to_right else text.ljust(width)
            for text, width, to_right in zip(row, widths, right, strict=True)
        ]
        click.echo(_encodable("  ".join(padded).rstrip()))


class Teller:
    """Prints lines on stderr with the seconds since it was made in front; called with a line.

    `follow` tells of the progress inside of a step: on a terminal in a line that is written over, and elsewhere in a line
    every ten seconds.
    """

    def __init__(self) -> None:
        self.start = self.told = time.monotonic()
        self.live = False

    def __call__(self, line: str) -> None:
        self.echo(f"[{time.monotonic() - self.start:6.1f} s] {line}")

    def echo(self, line: str) -> None:
        """Prints a line as it is."""
        self.clear()
        self.told = time.monotonic()
        click.echo(line, err=True)

    def follow(self, phase: str, step: int, steps: int) -> None:
        """Tells that `step` of `steps` of a phase is done."""
        terminal = sys.stderr is not None and sys.stderr.isatty()
        now = time.monotonic()
        if now - self.told < (0.1 if terminal else 10):
            return
        line = f"{phase}: {step} of {steps}"
        if not terminal:
            self(line)
            return
        self.clear()
        self.told, self.live = now, True
        columns = shutil.get_terminal_size().columns
        click.echo(f"[{now - self.start:6.1f} s] {line}"[: columns - 1], err=True, nl=False)

    def clear(self) -> None:
        """Takes the line that is written over off the terminal."""
        if self.live:
            self.live = False
            click.echo("\r\x1b[K", err=True, nl=False)


def teller() -> Teller:
    """What a verb talks through while it works."""
    return Teller()


@contextlib.contextmanager
def log_told(say: Teller) -> Iterator[None]:
    """Tells what the package logs meanwhile."""

    class Telling(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            say(record.getMessage())

    log, handler = logging.getLogger("swin_deploy"), Telling(logging.INFO)
    before = log.level
    log.setLevel(logging.INFO)
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(before)


def compiler_log(say: Teller, verbose: bool) -> Callable[[str, str], None]:
    """A function that prints what TensorRT says: its warnings and errors, or all of it."""

    def log(severity: str, message: str) -> None:
        if severity not in ("verbose", "info") or verbose:
            say.echo(f"TensorRT {severity}: {message}")

    return log


@contextlib.contextmanager
def stdout_kept_clean() -> Iterator[None]:
    """Sends to stderr what native libraries print to file descriptor 1, so that stdout carries the result alone."""
    if sys.stdout is None:  # started with it closed
        yield
        return
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        os.dup2(2, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
