"""The state of a result that is not finished: a hidden folder beside it, from which the same command resumes.

It has `state.json`, and parts whose names state their rows and where the source goes on. Each part is moved into place as a
whole, so a killed command loses at most what it did since the last one.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from swin_deploy.errors import InputError, UsageError
from swin_deploy.files import json_file, locked, scratch, sweep, synced

_LOG = logging.getLogger(__name__)
STATE = "state.json"


@dataclass(frozen=True)
class Part:
    """Some rows, up to row `end` of all, and the failures up to there; the source goes on in `shard` after `skip` images."""

    end: int
    failed: int
    shard: int
    skip: int
    path: Path | None = None


class Unfinished:
    """The parts in the folder of a result, which this process has locked."""

    def __init__(self, output: Path, folder: Path, ending: str) -> None:
        self.output, self.folder, self._ending = output, folder, ending
        self.parts: list[Part] = []
        for file in sorted(folder.glob(f"*{ending}")):
            with suppress(ValueError):
                begin, end, failed, shard, skip = map(int, file.name.removesuffix(ending).split("-"))
                if begin == self.last.end:
                    self.parts.append(Part(end, failed, shard, skip, file))
        self.state: dict[str, Any] = {}
        with suppress(InputError, AttributeError):
            self.state = dict(json_file(folder / STATE).items())

    @property
    def last(self) -> Part:
        """The last part; before the first row without one."""
        return self.parts[-1] if self.parts else Part(0, 0, 0, 0)

    def begin(self, facts: Mapping[str, Any], force: bool, anew: bool = False) -> None:
        """Go on with what a killed command left. Raises UsageError if that did something else, unless `force` is set."""
        before = self.state.get("facts")
        differ = [name for name, value in facts.items() if before is not None and before.get(name) != value]
        if differ and not (force or anew):
            raise UsageError(
                f"{self.output} was started with another {differ[0]}. Run the same command again, or start over with --force."
            )
        if differ or anew or before is None:
            for file in self.folder.iterdir():
                file.unlink()
            self.parts, self.state = [], {"facts": dict(facts)}
            self.save()

    def save(self, **facts: Any) -> None:
        """Write the state, with further facts."""
        self.state |= facts
        _replaced(self.folder / STATE, lambda path: path.write_text(json.dumps(self.state), encoding="utf-8"))

    def add(self, part: Part, write: Callable[[Path], Any]) -> None:
        """Add a part; `write(path)` writes its rows."""
        numbers = (self.last.end, part.end, part.failed, part.shard, part.skip)
        path = self.folder / ("-".join(f"{number:012d}" for number in numbers) + self._ending)
        _replaced(path, write)
        self.parts.append(replace(part, path=path))

    def finish(self, join: Callable[[list[Path], Path], None]) -> None:
        """Write the output with `join(parts, path)`, and move it into place."""
        with scratch(self.output) as path:
            join([part.path for part in self.parts if part.path], path)
            synced(path)
            self.save(joined=_identity(path), images=self.last.end, failed=self.last.failed)
            path.replace(self.output)
            synced(self.output.parent)

    def finished(self) -> bool:
        """Return whether a command was killed after it had moved the output into place."""
        try:
            if self.state.get("joined") != _identity(self.output):
                return False
        except OSError:
            return False
        self.parts = [Part(self.state["images"], self.state["failed"], 0, 0)]  # some of their files may be gone
        return True

    def remove(self) -> None:
        """Remove the folder, and the state last: as long as it is there, `finished` knows the output."""
        for file in sorted(self.folder.iterdir(), key=lambda file: file.name == STATE):
            file.unlink()
        self.folder.rmdir()


@contextmanager
def unfinished(output: Path, ending: str) -> Iterator[Unfinished]:
    """Lock the folder of an output. Raises UsageError if another process has locked it."""

    def refuse() -> None:
        raise UsageError(f"Another command is writing {output}. Wait until it ends, or choose another output.")

    if output.is_dir() or not output.absolute().parent.is_dir():
        raise UsageError(f"The output {output} is not a file in an existing folder. Pass the path of one.")
    sweep(output)
    folder = output.with_name(f".{output.name}.unfinished")
    folder.mkdir(exist_ok=True)
    with locked(folder, refuse):
        try:
            yield Unfinished(output, folder, ending)
        finally:
            if folder.exists() and not any(folder.glob(f"*{ending}")):
                shutil.rmtree(folder, ignore_errors=True)


def _replaced(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file beside `path`, wait until it is on the disk, and move it there."""
    new = path.with_name(f"{path.name}.new")
    write(new)
    synced(new)
    new.replace(path)
    synced(path.parent)


def _identity(path: Path) -> list[int]:
    facts = path.stat()
    return [facts.st_ino, facts.st_size, facts.st_mtime_ns]
