"""Output of the verbs: tables and JSON on stdout, log messages and progress on stderr."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import click

from swin_deploy.errors import UNPRINTABLE, UsageError, printable, shown

TENSORRT = "swin_deploy.tensorrt"  # the logger of the compiler's own messages
SECONDS_BETWEEN_LINES = 10  # of progress, where stderr is no terminal

json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
verbose_option = click.option("-v", "--verbose", is_flag=True, help="Show all messages of TensorRT, not only warnings.")


def print_json(value: Any) -> None:
    """Print `value` as JSON on stdout."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    click.echo(UNPRINTABLE.sub(lambda match: f"\\u{ord(match[0]):04x}", text))  # the same values for a parser of JSON


def only_flag(given: Mapping[str, bool]) -> str | None:
    """Return the one flag that is set, or None. Raises UsageError if several are set."""
    names = [name for name, value in given.items() if value]
    if len(names) > 1:
        raise UsageError(f"--{names[0]} and --{names[1]} exclude each other. Pass one of them.")
    return names[0] if names else None


def print_table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table on stdout: text aligned to the left, numbers to the right. Long text is cut (see `shown`)."""
    cells = [list(head), *([shown(str(value)) for value in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    right = [bool(rows) and all(isinstance(row[column], int | float) for row in rows) for column in range(len(head))]
    for row in cells:
        padded = [
            text.rjust(width) if to_right else text.ljust(width)
            for text, width, to_right in zip(row, widths, right, strict=True)
        ]
        click.echo("  ".join(padded).rstrip())


def exit_with_failures(failed: Mapping[str, str], as_json: bool) -> None:
    """If images were left out, exit with 1, after a table of the reasons unless the result was printed as JSON."""
    if failed and not as_json:
        click.echo()
        print_table(("left out", "reason"), list(failed.items()))
    if failed:
        click.get_current_context().exit(1)


class Console(logging.Handler):
    """Shows on stderr what a verb does: log messages with the seconds since the start, and progress.

    Call it with a phase, the steps done and the steps in all. On a terminal that draws a progress bar; elsewhere it prints a
    line every ten seconds.
    """

    def __init__(self) -> None:
        super().__init__()
        self.start = self.last = time.monotonic()
        self.bar: Any = None
        self.phase = ("", 0.0, 0)  # name, and when it began at which step

    def emit(self, record: logging.LogRecord) -> None:
        if record.name == TENSORRT:
            self.print(f"TensorRT {record.levelname.lower()}: {record.getMessage()}")
        else:
            self.say(record.getMessage())

    def say(self, line: str) -> None:
        """Print a line with the seconds since the start."""
        self.print(f"[{time.monotonic() - self.start:6.1f} s] {line}")

    def print(self, line: str) -> None:
        """Print a line as it is, and end the progress bar."""
        self.clear()
        self.last = time.monotonic()
        click.echo(printable(line), err=True)

    def __call__(self, phase: str, done: int, total: int) -> None:
        if sys.stderr is None:
            return
        if not sys.stderr.isatty():
            now = time.monotonic()
            if self.phase[0] != phase:
                self.phase = (phase, now, done)
            if now - self.last >= SECONDS_BETWEEN_LINES:
                rate = (done - self.phase[2]) / max(now - self.phase[1], 1e-9)
                left = f" ({rate:.3g}/s, {(total - done) / rate:.0f} s left)" if rate else ""
                self.say(f"{phase}: {done} of {total}{left}")
            return
        if self.bar is not None and self.bar.desc == phase and done >= self.bar.n:
            self.bar.total = total  # it may be an estimate
        else:
            from tqdm import tqdm

            self.clear()
            self.bar = tqdm(desc=phase, total=total, initial=done, file=sys.stderr, leave=False, dynamic_ncols=True)
        self.bar.update(done - self.bar.n)

    def clear(self) -> None:
        """Remove the progress bar from the terminal."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None


@contextlib.contextmanager
def console(verbose: bool = False) -> Iterator[Console]:
    """Show the log messages of the package while a verb runs. `verbose` includes all messages of TensorRT."""
    handler, package, tensorrt = Console(), logging.getLogger("swin_deploy"), logging.getLogger(TENSORRT)
    before = package.level, tensorrt.level
    package.setLevel(logging.INFO)
    tensorrt.setLevel(logging.DEBUG if verbose else logging.WARNING)
    package.addHandler(handler)
    try:
        yield handler
    finally:
        handler.clear()
        package.removeHandler(handler)
        package.setLevel(before[0])
        tensorrt.setLevel(before[1])


@contextlib.contextmanager
def stdout_kept_clean() -> Iterator[None]:
    """Redirect what native libraries print on file descriptor 1 to stderr, so that stdout holds only the result."""
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
