"""Bundle: the folder that the whole pipeline reads from and writes into.

    swinv2-tiny/
      config.json, preprocessor_config.json   as transformers writes them
      onnx/model.onnx, onnx/model_fp16.onnx   pixel_values -> logits
      engines/<precision>-<options>-<gpu>-<backend>-<version>.engine, and its layers in a .layers.json
      reference.npz                           inputs, and what PyTorch answered to them
      manifest.json                           what each file is, its sha256, where it came from, how far it is verified

manifest.json is written last and atomically, and carries a digest of itself: a folder without it, or with another byte in
it, is not a bundle. Every file is checked against its sha256 before anything is read from it.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import hashlib
import json
import os
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swin_deploy.arguments import checked
from swin_deploy.errors import BundleError
from swin_deploy.files import exchanged, locked, scratch_beside, sweep
from swin_deploy.specs import PRECISIONS, graph_file

MANIFEST = "manifest.json"
CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
SCHEMA = 1

Entry = dict[str, Any]
NEW = "Choose another place with -o, or make room and permissions there."
THERE = "Make room and permissions there, or copy the bundle to a place that can be written and use that one."


@dataclass(frozen=True)
class Bundle:
    """An existing bundle. `manifest` is its manifest.json, already checked against its own digest."""

    path: Path
    manifest: Mapping[str, Any]

    @classmethod
    @checked
    def open(cls, path: str | os.PathLike[str]) -> Bundle:
        """The bundle in the folder `path`. Raises BundleError when there is none, or its manifest is damaged."""
        folder = Path(path)
        file = folder / MANIFEST
        try:
            there, finished = folder.is_dir(), file.exists()
        except OSError as error:  # no permission, a name that is too long
            why = "Change its permissions." if isinstance(error, PermissionError) else "Expected the folder of a bundle."
            raise BundleError(f"{folder} cannot be read: {error.strerror}. {why}") from error
        if not there:
            link = "it is a link that leads nowhere" if folder.is_symlink() else "the folder does not exist"
            why = "it is not a folder" if folder.exists() else link
            raise BundleError(f'There is no bundle at {folder}: {why}. Make one with "swin-deploy export".')
        if not finished:
            raise BundleError(
                f"{folder} is not a bundle: it has no {MANIFEST}, which an export writes last. "
                f'Make one with "swin-deploy export".'
            )
        return cls(folder, _read_manifest(file))

    @property
    def name(self) -> str:
        return str(self.manifest["name"])

    @property
    def files(self) -> Mapping[str, Entry]:
        """Every file of the bundle but the manifest: path inside it -> entry."""
        files: Mapping[str, Entry] = self.manifest["files"]
        return files

    @property
    def graphs(self) -> Mapping[str, Entry]:
        """The ONNX graphs: path inside the bundle -> entry, the first image size before the others."""
        first = {graph_file(precision) for precision in PRECISIONS}  # one that was made again stands last in the manifest
        files = sorted((file for file in self.files if file.endswith(".onnx")), key=lambda file: file not in first)
        return {file: self.files[file] for file in files}

    def verified_path(self, file: str, remedy: str = "") -> Path:
        """The path of `file`, after its sha256 was found to be the manifest's, and that of the weights it refers to.

        Raises BundleError when one is not, with `remedy` (what to do, such as "export the bundle again") or the usual one.
        """
        entry = self.files.get(file)
        if entry is None:
            raise BundleError(f"The bundle {self.path} has no {file}. It holds: {', '.join(sorted(self.files))}.")
        path = self.path / file
        engine = file.endswith((".engine", ".layers.json"))
        again = f'compile it again with "swin-deploy build-engine {shlex.quote(str(self.path))} --force" and the options it had'
        remedy = remedy or (again if engine else "export the bundle again")
        try:
            actual = sha256_of(path)
        except OSError as error:
            remedy = "change its permissions" if isinstance(error, PermissionError) else remedy
            raise BundleError(f"{path} cannot be read ({error.strerror}); {remedy}.") from error
        if actual != entry["sha256"]:
            raise BundleError(
                f"{path} is not the file that was {'compiled' if engine else 'exported'}: its sha256 is {actual[:12]}..., "
                f"the manifest says {entry['sha256'][:12]}.... It was changed or damaged; {remedy}."
            )
        if entry.get("weights"):
            self.verified_path(entry["weights"])
        return path

    def read_json(self, file: str) -> dict[str, Any]:
        """The JSON object in `file`, checked against its sha256 first."""
        value: dict[str, Any] = json.loads(self.verified_path(file).read_text(encoding="utf-8"))
        return value

    def refuse_read_only(self) -> None:
        """Raises BundleError where nothing can be written into the bundle: before the work whose result would be lost."""
        if not os.access(self.path, os.W_OK):
            raise BundleError(f"{self.path} cannot be written: it is read-only here. {THERE}")

    @contextlib.contextmanager
    def compiling(self, waiting: Callable[[], None]) -> Iterator[Bundle]:
        """The bundle as it is once no other process compiles into it; others wait until the block ends.

        `waiting` is called before this one has to wait. Nobody who only reads, or adds one file, is held up.
        """
        with contextlib.ExitStack() as stack:
            with disk_errors(self.path / "onnx"):
                stack.enter_context(locked(self.path / "onnx", waiting))
            yield Bundle.open(self.path)

    def with_file(self, file: str, entry: Entry, write: Callable[[Path], None]) -> Bundle:
        """The bundle after `write(path)` made `file` in it, atomically.

        Other files and their entries stay as they are, but graphs that read other weights in `file` are no longer listed.
        """
        target = self.path / file
        with disk_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            sweep(target)
            sweep(self.path / MANIFEST)
            scratch = scratch_beside(target)
            try:
                write(scratch)
                described = {**entry, **_facts(scratch)}
                with locked(self.path):
                    manifest = _read_manifest(self.path / MANIFEST)  # somebody else may have added a file meanwhile
                    if (before := manifest["files"].pop(file, None)) is not None:
                        if before["sha256"] != described["sha256"]:
                            files = manifest["files"].items()
                            manifest["files"] = {name: other for name, other in files if other.get("weights") != file}
                        _write_manifest(self.path, manifest)  # killed before the end, no entry is of another file
                    scratch.replace(target)
                    manifest["files"][file] = described
                    _write_manifest(self.path, manifest)
            finally:
                scratch.unlink(missing_ok=True)
        return Bundle(self.path, manifest)

    def with_entry(self, file: str, changes: Mapping[str, Any]) -> Bundle:
        """The bundle after `changes` were made to the manifest's entry of `file`; not where that is another file by now."""
        with disk_errors(self.path / MANIFEST), locked(self.path):
            manifest = _read_manifest(self.path / MANIFEST)
            now = manifest["files"].get(file)
            if now is not None and now["sha256"] == self.files[file]["sha256"]:
                now |= changes
                _write_manifest(self.path, manifest)
        return Bundle(self.path, manifest)

    def without(self, file: str) -> Bundle:
        """The bundle after `file` was removed from it."""
        with disk_errors(self.path / MANIFEST), locked(self.path):
            manifest = _read_manifest(self.path / MANIFEST)
            manifest["files"].pop(file, None)
            _write_manifest(self.path, manifest)
            (self.path / file).unlink(missing_ok=True)
        return Bundle(self.path, manifest)


class Draft:
    """A bundle in the making: files are added one by one, and nothing is a bundle until `create_bundle` ends well."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files: dict[str, Entry] = {}

    def add(self, file: str, entry: Entry, write: Callable[[Path], None]) -> None:
        """Makes `file` with `write(path)` and keeps its entry."""
        target = self.path / file
        with disk_errors(target, NEW):
            target.parent.mkdir(parents=True, exist_ok=True)
            write(target)
            self.files[file] = {**entry, **_facts(target)}

    def add_json(self, file: str, value: Mapping[str, Any]) -> None:
        text = json.dumps(value, indent=2) + "\n"  # in ASCII: labels may hold what UTF-8 cannot
        self.add(file, {}, lambda path: _write_text(path, text))


@contextlib.contextmanager
def create_bundle(path: Path, *, replace: bool, facts: Mapping[str, Any]) -> Iterator[Draft]:
    """A draft that becomes the bundle at `path` when the block ends without an error, all at once.

    Raises BundleError when something that must not be lost is at `path`, or when it cannot be written. With `replace` a
    bundle that is there already makes room; any other folder that is not empty never does. Interrupted or killed, what
    was at `path` before is still there.
    """
    path = room_for(path, replace)
    with disk_errors(path, NEW):
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path)
        staging = scratch_beside(path)
        staging.mkdir()
    try:
        draft = Draft(staging)
        yield draft
        manifest = {
            "schema": SCHEMA,
            "created": dt.datetime.now(dt.timezone.utc).isoformat(timespec="microseconds"),
            **facts,
            "files": draft.files,
        }
        with disk_errors(path, NEW):
            _write_manifest(staging, manifest)
            room_for(path, replace)
            _move_into_place(staging, path)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def newest_bundle(folder: Path) -> Bundle:
    """The bundle in which or beside which a command was started: `folder` itself, else the newest one directly in it."""
    if (folder / MANIFEST).exists():
        return Bundle.open(folder)
    # Other programs name their files manifest.json, too; the graph tells a bundle.
    candidates = [graph.parents[1] for graph in folder.glob("*/onnx/model.onnx")]
    found = [Bundle.open(path) for path in candidates if (path / MANIFEST).exists() and not path.name.startswith(".")]
    if not found:
        raise BundleError(
            f"There is no bundle in {folder.resolve()}. Name one, or make one first: "
            f'"swin-deploy export --variant swinv2-tiny".'
        )
    return max(found, key=lambda bundle: str(bundle.manifest["created"]))


def write_whole(target: Path, write: Callable[[Path], None]) -> None:
    """Makes `target`, a file that no manifest lists, with `write(path)`, all at once; leftovers of the killed are swept."""
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        sweep(target)
        scratch = scratch_beside(target)
        try:
            write(scratch)
            scratch.replace(target)
        finally:
            scratch.unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    """The sha256 of a file, in hexadecimal, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


@contextlib.contextmanager
def disk_errors(path: Path, advice: str = THERE) -> Iterator[None]:
    """Turns an operating system's refusal (no permission, disk full, ...) into one sentence about `path`, with `advice`."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise BundleError(f"{path} cannot be written: {reason}. {advice}") from error


def room_for(path: Path, replace: bool) -> Path:
    """Where a bundle at `path` really is: a link stays, and what it points to is replaced.

    Raises BundleError when something that must not be lost is there; with `replace` a bundle need not stay.
    """
    try:
        occupied = path.exists() and (not path.is_dir() or any(path.iterdir()))
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror}. Choose another place with -o.") from error
    if occupied and not (path / MANIFEST).is_file():
        raise BundleError(f"{path} is there already and is not a bundle, so it is left as it is. Choose another place with -o.")
    if occupied and not replace:
        raise BundleError(
            f"{path} is a bundle already, and replacing it would lose its engines. Add --force to replace it, or choose "
            f"another place with -o."
        )
    with disk_errors(path, NEW):
        real, here = Path(os.path.realpath(path)), Path.cwd()
    if here.is_relative_to(real):
        raise BundleError(
            f"{path} is the folder that this was started in, or holds it, and would be replaced by another one. "
            f"Name a folder in it with -o."
        )
    if real.is_symlink():
        raise BundleError(f"{path} is a link that leads to itself. Choose another place with -o.")
    return real


def _move_into_place(staging: Path, path: Path) -> None:
    if not (path.exists() and any(path.iterdir())):
        staging.replace(path)
    elif not exchanged(staging, path):
        old = scratch_beside(path)
        path.replace(old)
        try:
            staging.replace(path)
        except BaseException:
            old.replace(path)
            raise
        shutil.rmtree(old, ignore_errors=True)


def _read_manifest(file: Path) -> dict[str, Any]:
    damaged = f"{file} is damaged, so nothing in this bundle can be trusted. Export the bundle again."
    try:
        text = file.read_bytes().decode("utf-8")
        manifest = json.loads(text)
        del manifest["sha256"]
        intact = text == _manifest_text(manifest)  # to the byte: spaces and line ends count as well
    except OSError as error:
        raise BundleError(f"{file} cannot be read: {error.strerror}. Check its permissions.") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BundleError(damaged) from error
    if not intact:
        raise BundleError(damaged)
    if manifest.get("schema") != SCHEMA:
        raise BundleError(
            f"{file} has schema {manifest.get('schema')}, and this release of swin-deploy reads schema {SCHEMA}. "
            f"Use the release that made it, or export the bundle again."
        )
    return dict(manifest)


def _write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    scratch = scratch_beside(folder / MANIFEST)
    try:
        _write_text(scratch, _manifest_text(manifest))
        scratch.replace(folder / MANIFEST)
    finally:
        scratch.unlink(missing_ok=True)


def _manifest_text(manifest: Mapping[str, Any]) -> str:
    canonical = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256(canonical.encode()).hexdigest()
    return json.dumps({**manifest, "sha256": digest}, indent=2) + "\n"


def _facts(path: Path) -> Entry:
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def _write_text(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
