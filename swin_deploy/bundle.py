"""Bundle: the folder that every verb reads from and writes into.

    swinv2-tiny/
      config.json, preprocessor_config.json   in the format of transformers
      onnx/model.onnx, onnx/model_fp16.onnx   pixel_values -> logits
      engines/<precision>-<options>-<gpu>-<backend>-<version>.engine, and its layers in a .layers.json
      reference.npz                           inputs, and PyTorch's outputs for them
      manifest.json                           kind, sha256, origin and verification state of each file

manifest.json is written last and atomically, and contains its own digest. A folder is a bundle only if its manifest is
complete and unchanged. Every file is checked against its sha256 before it is used.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import errno
import functools
import hashlib
import json
import logging
import os
import shlex
import shutil
import stat
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any, TypeVar

from .errors import BundleError, SwinDeployError, shown, system_limit
from .files import (
    JSON_BYTES,
    MANIFEST,
    exchanged,
    json_from,
    locked,
    make_folder,
    move_scratch,
    parents_of,
    put_aside,
    put_back,
    read_regular,
    replaced_by,
    scratch,
    scratch_folder,
    set_aside,
    sweep,
    sweep_folder,
    sweep_temporary,
    synced,
)
from .manifest import EngineEntry, FileEntry, GraphEntry, Manifest, manifest_from_json
from .manifest import TensorSpec as TensorSpec
from .option_parsers import path as path_option
from .options import PRECISIONS, Size

if TYPE_CHECKING:
    import onnx

    from .config import SwinConfig
    from .preprocess import Preprocessor
    from .tasks import TaskSpec

_LOG = logging.getLogger(__name__)
CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
SCHEMA = 1
MANIFEST_BYTES = 1 << 24

Entry = dict[str, Any]
T = TypeVar("T")
Content = bytes | Callable[[Path], object]  # of a file, or a function that writes it to a path
AGAIN = "Export the bundle again."
NEW = "Choose another folder with -o, or check its free space and permissions."
EXISTING = "Check free space and permissions, or copy the bundle to a writable folder and use the copy."

# (device, inode, size, modification time) of a file -> its sha256, so that each file is read once per process.
_DIGESTS: dict[tuple[int, ...], str] = {}
RECORD_BYTES = 1 << 20  # of a record of known files; the oldest are dropped
_RECORDED: set[tuple[str, str]] = set()
_CLOCK_STEP = 50_000_000  # ns; two changes within one tick of a file system's clock get the same time


@dataclass(frozen=True)
class Bundle:
    """An existing bundle.

    Attributes:
        path: Its folder.
        manifest: The content of its manifest.json, checked against its digest. `to_dict()` returns it as JSON values.
        trust: Whether the caller trusts the author of its engines.
    """

    path: Path
    manifest: Manifest
    trust: bool = False

    @classmethod
    def open(cls, path: str | os.PathLike[str], trust: bool = False) -> Bundle:
        """Open the bundle in a folder.

        Raises:
            BundleError: The folder is not a bundle, or its manifest is damaged.
        """
        folder = path_option("path", path)
        file = folder / MANIFEST
        try:
            if not file.exists():
                put_back(folder)
            is_folder, is_complete = folder.is_dir(), file.exists()
        except OSError as error:  # no permission, or a name that is too long
            if (limit := system_limit(error)) is not None:
                raise BundleError(f"{folder} cannot be read. {limit}") from error
            advice = "Change its permissions." if isinstance(error, PermissionError) else "Expected the folder of a bundle."
            raise BundleError(f"{folder} cannot be read: {error.strerror}. {advice}") from error
        if not is_folder:
            why = "it is not a folder" if folder.exists() else "the folder does not exist"
            why = "it is a broken link" if folder.is_symlink() and not folder.exists() else why
            raise BundleError(f"There is no bundle at {folder}: {why}. Create one: swin-deploy export")
        if not is_complete:
            raise BundleError(
                f"{folder} is not a bundle: it has no {MANIFEST}, which export writes last. Create one: swin-deploy export"
            )
        return cls.with_manifest(folder, _read_manifest(file), trust)

    @classmethod
    def with_manifest(cls, folder: Path, manifest: Mapping[str, Any], trust: bool = False) -> Bundle:
        """Return the bundle in a folder whose manifest has these JSON values. Raises BundleError if one is invalid."""
        return cls(folder, manifest_from_json(manifest, folder / MANIFEST), trust)

    @property
    def name(self) -> str:
        """Name of the model, such as swinv2-tiny."""
        return self.manifest.name

    @property
    def files(self) -> Mapping[str, FileEntry]:
        """Manifest entries of all files except the manifest, by path inside the bundle."""
        return self.manifest.files

    @functools.cached_property
    def graphs(self) -> Mapping[str, GraphEntry]:
        """Manifest entries of the ONNX graphs, by path inside the bundle; the first image size comes first."""
        first = {graph_file(precision) for precision in PRECISIONS}  # a graph that was rewritten is last in the manifest
        found = {file: entry for file, entry in self.files.items() if isinstance(entry, GraphEntry)}
        return dict(sorted(found.items(), key=lambda item: item[0] not in first))

    @property
    def engines(self) -> Mapping[str, EngineEntry]:
        """Manifest entries of the engines, by path inside the bundle."""
        return {file: entry for file, entry in self.files.items() if isinstance(entry, EngineEntry)}

    @property
    def digest(self) -> str:
        """The sha256 of the names and digests of all files, which changes with any of them."""
        listed = json.dumps(sorted((file, entry.sha256) for file, entry in self.files.items()))
        return hashlib.sha256(listed.encode()).hexdigest()

    def graphs_of(self, precision: str) -> Mapping[str, GraphEntry]:
        """Return the entries of the graphs of one precision. Raises BundleError if the bundle has no fp32 graph at all."""
        found = {file: entry for file, entry in self.graphs.items() if entry.precision == precision}
        if not found and precision == "fp32":
            raise BundleError(f"{self.path} has no fp32 graph. Export the bundle again.")
        return found

    def graph_file_of(self, file: str) -> str:
        """Return the graph that an engine was compiled from, or the graph itself."""
        entry = self.files[file]
        return entry.graph if isinstance(entry, EngineEntry) else file

    def graph_of(self, file: str) -> GraphEntry:
        """Return the manifest entry of the graph that an engine was compiled from, or of the graph itself."""
        return self.graphs[self.graph_file_of(file)]

    @property
    def image_size(self) -> Size:
        """The first image size."""
        return next(iter(self.graphs_of("fp32").values())).image_size

    @property
    def static_batch(self) -> int | None:
        """The number of images that its graphs take, if it was exported with --static-batch."""
        batch = next(iter(self.graphs_of("fp32").values())).inputs[0].shape[0]
        return batch if isinstance(batch, int) else None

    @functools.cached_property
    def config(self) -> SwinConfig:
        """The architecture. Raises BundleError if config.json is damaged or invalid."""
        from .config import SwinConfig

        return self._parsed(CONFIG, SwinConfig.from_dict)

    @functools.cached_property
    def preprocessor(self) -> Preprocessor:
        """The preprocessing for the first image size, with the steps in the graph, which its file leaves out.

        Raises BundleError if the file is damaged or invalid.
        """
        from .preprocess import Preprocessor

        graph = next(iter(self.graphs.values()), None)
        if graph is None or graph.preprocessing is None:
            return self._parsed(PREPROCESSOR, Preprocessor.from_dict)
        steps = graph.preprocessing.steps
        return self._parsed(PREPROCESSOR, lambda raw: Preprocessor.from_dict(raw).with_steps(steps))

    @functools.cached_property
    def task(self) -> TaskSpec:
        """The task head of the network."""
        from .tasks import TaskSpec

        task = self.manifest.task
        try:
            return TaskSpec(**{name: getattr(task, name) for name in TaskSpec.__dataclass_fields__})
        except SwinDeployError as error:
            raise BundleError(f"{self.path / MANIFEST}: {error}") from error

    def _parsed(self, file: str, parse: Callable[[dict[str, Any]], T]) -> T:
        try:
            return parse(self.read_json(file))
        except BundleError:
            raise
        except (SwinDeployError, TypeError, ValueError) as error:
            raise BundleError(f"{self.path / file}: {str(error).removeprefix(f'{file}: ')}") from error

    def place(self, file: str) -> Path:
        """Return the path of a file of the bundle, to read, write or delete it: see `inside`."""
        return inside(self.path, file)

    def verified_path(self, file: str, remedy: str = "") -> Path:
        """Return the path of a file after checking its sha256, and that of the weights that it refers to.

        Args:
            file: Path inside the bundle.
            remedy: What to do about a damaged file. Default: export again, or compile the engine again.

        Raises:
            BundleError: The bundle has no such file, or the file cannot be read or has changed.
        """
        try:
            return self._checked(file, remedy)
        except BundleError:
            with contextlib.suppress(OSError), locked(self.path):  # another command may just be writing the file
                pass
            now = Bundle.open(self.path)
            if now.manifest == self.manifest:
                raise
        if now.manifest.created != self.manifest.created:
            raise BundleError(f"{self.path} was exported again while it was read. Run the command again.")
        return now._checked(file, remedy)

    def _checked(self, file: str, remedy: str) -> Path:
        entry = self.files.get(file)
        if entry is None:
            raise BundleError(f"The bundle {self.path} has no {file}. It contains: {', '.join(sorted(self.files))}.")
        path = self.place(file)
        is_engine = file.endswith((".engine", ".layers.json"))
        rebuild = f"Compile it again with its options: swin-deploy build-engine {shlex.quote(str(self.path))} --force"
        remedy = remedy or (rebuild if is_engine else "Export the bundle again.")
        try:
            actual = sha256_of(path)
        except OSError as error:
            if (limit := system_limit(error)) is not None:
                raise BundleError(f"{path} cannot be read. {limit}") from error
            remedy = "Change its permissions." if isinstance(error, PermissionError) else remedy
            raise BundleError(f"{path} cannot be read: {error.strerror}. {remedy}") from error
        if actual != entry.sha256:
            raise BundleError(
                f"{path} is not the file that was {'compiled' if is_engine else 'exported'}: its sha256 is {actual[:12]}..., "
                f"but the manifest has {entry.sha256[:12]}.... {remedy}"
            )
        if isinstance(entry, GraphEntry):
            if entry.weights is not None:
                self.verified_path(entry.weights)
            self._check_graph(file)
        return path

    def foreign(self, file: str) -> bool:
        """Whether this user, on this machine, did not write a graph with its weights, or an engine, as far as is known."""
        return not all(recorded("made", key) for key in self._keys(file))

    def untrusted(self, file: str, again: str) -> str | None:
        """Explain why an engine is not run, and that the command `again` compiles it here; None if it may be run."""
        if self.trust or not self.foreign(file):
            return None
        return (
            f"There is no record that you compiled {file} on this machine, and an engine is code. If you trust its author, "
            f'pass --trust (in Python: trust=True). Otherwise compile it again with "{again}".'
        )

    def _keys(self, file: str) -> list[str]:
        """Return what identifies a file and its weights in the record of known files."""
        entry = self.files[file]
        weights = entry.weights if isinstance(entry, GraphEntry) else None
        return [_key(entry.sha256, weights), *([_key(self.files[weights].sha256, None)] if weights else [])]

    def _check_graph(self, file: str) -> None:
        """Check the structure of a graph that was neither written nor checked on this machine."""
        if self._known(file):
            return
        from .graph_check import ExternalData, check_structure

        entry = self.graphs[file]
        weights = ExternalData(PurePosixPath(entry.weights).name, self.place(entry.weights)) if entry.weights else None
        check_structure(self.place(file), entry.inputs, entry.outputs, weights)
        for key in self._keys(file):
            record("checked", key)

    def _known(self, file: str) -> bool:
        return all(recorded("made", key) or recorded("checked", key) for key in self._keys(file))

    def read_json(self, file: str) -> dict[str, Any]:
        """Return the JSON object in `file` after checking its sha256."""
        path = self.verified_path(file)
        value = json_from(read_regular(path, JSON_BYTES, BundleError, AGAIN), str(path), BundleError, AGAIN)
        if not isinstance(value, dict):
            raise BundleError(f"{path} does not hold a JSON object. {AGAIN}")
        return value

    def refuse_read_only(self) -> None:
        """Raise BundleError if the bundle is read-only. Call it before work whose result would be lost."""
        if not os.access(self.path, os.W_OK):
            raise BundleError(f"{self.path} cannot be written: it is read-only. {EXISTING}")

    def sweep(self) -> None:
        """Remove what killed commands left in the bundle, beside it, and among temporary files."""
        sweep(Path(os.path.realpath(self.path)))
        for folder, _, _ in os.walk(self.path):  # follows no links
            sweep_folder(Path(folder), kept=self._lists)
        sweep_temporary()

    def _lists(self, path: Path) -> bool:
        """Return whether the manifest, as it is now, names a file."""
        return path.relative_to(self.path).as_posix() in Bundle.open(self.path).files

    @contextlib.contextmanager
    def compiling(self, waiting: Callable[[], None]) -> Iterator[Bundle]:
        """Yield the current bundle, held against other compiling processes; `waiting` is called once if one holds it."""
        _refuse_encoding(self.path)
        with contextlib.ExitStack() as stack:
            with disk_errors(self.path / "onnx"):
                stack.enter_context(locked(self.path / "onnx", waiting))
            self.sweep()
            yield Bundle.open(self.path, self.trust)

    def with_file(self, file: str, entry: Entry, content: Content) -> Bundle:
        """Write a file atomically and return the new bundle. Graphs of weights that change leave the manifest."""
        target = self.place(file)
        with disk_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            self.sweep()
            with scratch(target) as path:
                _write(path, content)
                synced(path)
                described = _described(entry, path)
                with locked(self.path):
                    manifest = self._current()  # another process may have added a file
                    if (before := manifest["files"].pop(file, None)) is not None:
                        if before["sha256"] != described["sha256"]:
                            files = manifest["files"].items()
                            manifest["files"] = {name: other for name, other in files if other.get("weights") != file}
                        _write_manifest(self.path, manifest)  # if killed next, no entry describes a wrong file
                    move_scratch(path, target)
                    synced(target.parent)
                    manifest["files"][file] = described
                    _write_manifest(self.path, manifest)
        return Bundle.with_manifest(self.path, manifest, self.trust)

    def with_entry(self, file: str, changes: Mapping[str, Any]) -> Bundle:
        """Change the manifest entry of `file`, unless the file was replaced meanwhile, and return the new bundle."""
        with disk_errors(self.path / MANIFEST), locked(self.path):
            manifest = self._current()
            now = manifest["files"].get(file)
            if now is not None and now["sha256"] == self.files[file].sha256:
                now |= changes
                _write_manifest(self.path, manifest)
        return Bundle.with_manifest(self.path, manifest, self.trust)

    def with_tuning(self, tuning: Entry) -> Bundle:
        """Add a measurement of `tune` to the manifest, in place of those of the same machine that it covers."""

        new, kinds = tuning["candidates"], ("backend", "precision", "device", "libraries")
        with disk_errors(self.path / MANIFEST), locked(self.path):
            manifest = self._current()
            kept = [
                entry.to_dict()
                for entry in manifest_from_json(manifest, self.path / MANIFEST).tuning
                if entry.machine != tuning["machine"]
                or not all(any(old.has({kind: one[kind] for kind in kinds}) for one in new) for old in entry.candidates)
            ]
            manifest["tuning"] = [*kept, tuning]
            _write_manifest(self.path, manifest)
        return Bundle.with_manifest(self.path, manifest, self.trust)

    def without(self, file: str) -> Bundle:
        """Remove a file and return the new bundle."""
        target = self.place(file)
        with disk_errors(self.path / MANIFEST), locked(self.path):
            manifest = self._current()
            manifest["files"].pop(file, None)
            _write_manifest(self.path, manifest)
            target.unlink(missing_ok=True)
        return Bundle.with_manifest(self.path, manifest, self.trust)

    def _current(self) -> dict[str, Any]:
        """Read the manifest again, to change it."""
        manifest = _read_manifest(self.path / MANIFEST)
        if manifest.get("created") != self.manifest.created:
            raise BundleError(f"{self.path} was exported again meanwhile, so nothing was added to it. Run the command again.")
        return manifest


class Draft:
    """A bundle under construction. `create_bundle` turns it into a bundle when its block ends."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files: dict[str, Entry] = {}

    def add(self, file: str, entry: Entry, content: Content) -> None:
        """Write a file and record its manifest entry."""
        target = inside(self.path, file)
        with disk_errors(target, NEW):
            target.parent.mkdir(parents=True, exist_ok=True)
            _write(target, content)
            self.files[file] = _described(entry, target)

    def add_json(self, file: str, value: Mapping[str, Any]) -> None:
        """Write a JSON file."""
        text = json.dumps(value, indent=2) + "\n"  # ASCII: labels may contain lone surrogates, which UTF-8 cannot encode
        self.add(file, {}, lambda path: _write_text(path, text))


@contextlib.contextmanager
def create_bundle(path: Path, *, replace: bool, facts: Mapping[str, Any]) -> Iterator[Draft]:
    """Yield a draft that atomically becomes the bundle at `path` when the block ends without error. `facts` extend the
    manifest.
    """
    path = replaceable_path(path, replace)
    with contextlib.ExitStack() as stack:
        with disk_errors(path, NEW):
            stack.enter_context(parents_of(path))
            sweep(path)
            staging = stack.enter_context(scratch(path))
            make_folder(staging)
        draft = Draft(staging)
        yield draft
        manifest = {
            "schema": SCHEMA,
            "created": dt.datetime.now(dt.timezone.utc).isoformat(timespec="microseconds"),
            **facts,
            "files": draft.files,
        }
        with disk_errors(path, NEW):
            for written in (*(staging / file for file in draft.files), *{(staging / file).parent for file in draft.files}):
                synced(written)
            _write_text(staging / MANIFEST, _manifest_text(manifest))
            synced(staging)
            replaceable_path(path, replace)
            _move_into_place(staging, path)
            synced(path.parent)


def newest_bundle(folder: Path) -> Bundle:
    """Return the bundle `folder`, or else the newest bundle directly inside it."""
    if (folder / MANIFEST).exists():
        return Bundle.open(folder)
    for name in put_aside(folder):
        put_back(folder / name)
    # Other programs write a manifest.json, too; only a bundle has this graph.
    candidates = [graph.parents[1] for graph in folder.glob("*/onnx/model.onnx")]
    found, damaged = [], list[BundleError]()
    for path in candidates:
        if (path / MANIFEST).exists() and not path.name.startswith("."):
            try:
                found.append(Bundle.open(path))
            except BundleError as error:
                damaged.append(error)
    if not found and damaged:
        raise damaged[0]
    for reason in damaged:
        _LOG.warning("Warning: Ignoring one bundle. %s", reason)
    if not found:
        raise BundleError(
            f"There is no bundle in {folder.resolve()}. Pass the path of one, or create one: "
            f"swin-deploy export --variant swinv2-tiny"
        )
    return max(found, key=lambda bundle: bundle.manifest.created)


def inside(folder: Path, file: str) -> Path:
    """Return the path of `file` in a folder of ours, to read, write or delete it.

    The file itself may be a link, as in a cache of Hugging Face: writing and deleting replace the link. Raises BundleError for
    a path that leaves the folder, by its parts or through a link to another folder.
    """
    target, parts = folder / file, PurePosixPath(file).parts
    if not parts or file.startswith("/") or ".." in parts or set(file) & {"\\", "\0"}:
        raise BundleError(f"{shown(file)} is not a path inside {folder}. Expected a relative path such as onnx/model.onnx.")
    last = target if target.is_dir() else target.parent
    if not Path(os.path.realpath(last)).is_relative_to(os.path.realpath(folder)):
        raise BundleError(f"{last} leads out of {folder}. Copy the folder into the bundle instead of linking it.")
    return target


def _write(path: Path, content: Content) -> None:
    if callable(content):
        content(path)
    else:
        path.write_bytes(content)


def write_whole(target: Path, write: Callable[[Path], object]) -> None:
    """Write a file that no manifest lists with `write(path)`, atomically."""
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        sweep(target)
        with scratch(target) as path:
            write(path)
            path.replace(target)


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file in hexadecimal. An unchanged file is read only once per process."""
    if not stat.S_ISREG(path.stat().st_mode):  # opening a FIFO blocks
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    with path.open("rb") as file:
        facts = os.fstat(file.fileno())
        key = (facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns)
        if known := _DIGESTS.get(key):
            return known
        digest = hashlib.sha256()
        while piece := file.read(1 << 20):
            digest.update(piece)
    # A file changed a moment ago could change again without getting another time.
    if time.time_ns() - max(facts.st_mtime_ns, facts.st_ctime_ns) > _CLOCK_STEP:
        _DIGESTS[key] = digest.hexdigest()
    return digest.hexdigest()


@contextlib.contextmanager
def disk_errors(path: Path, advice: str = EXISTING) -> Iterator[None]:
    """Turn an OSError (no permission, disk full, ...) inside the block into a BundleError about `path` with `advice`."""
    try:
        yield
    except OSError as error:
        if (limit := system_limit(error)) is not None:
            raise BundleError(f"{path} cannot be written. {limit}") from error
        reason = error.strerror or str(error)
        raise BundleError(f"{path} cannot be written: {reason}. {advice}") from error


def replaceable_path(path: Path, replace: bool) -> Path:
    """Return the real path of a new bundle at `path`. Raises BundleError if it has content; `replace` allows a bundle."""
    try:
        put_back(path)
        occupied = path.exists() and (not path.is_dir() or any(path.iterdir()))
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror}. Choose another folder with -o.") from error
    if occupied and not (path / MANIFEST).is_file():
        raise BundleError(f"{path} exists and is not a bundle, so it is not replaced. Choose another folder with -o.")
    if occupied and not replace:
        raise BundleError(
            f"{path} is an existing bundle, and replacing it would delete its engines. Pass --force to replace it, or choose "
            f"another folder with -o."
        )
    with disk_errors(path, NEW):
        real = Path(os.path.realpath(path))
    _refuse_encoding(real)
    if _standing_in(real):
        raise BundleError(f"{path} contains the current directory and cannot be replaced. Name a folder in it with -o.")
    if real.is_symlink():
        raise BundleError(f"{path} is a link that leads to itself. Choose another folder with -o.")
    return real


def _refuse_encoding(path: Path) -> None:
    """Raise BundleError for a path that libraries cannot open."""
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise BundleError(f"{path} is not valid UTF-8, and onnx cannot open files in it. Rename the folder.") from error


def _standing_in(folder: Path) -> bool:
    try:
        return Path.cwd().is_relative_to(folder)
    except OSError:  # the current directory was removed
        return False


def _move_into_place(staging: Path, path: Path) -> None:
    if not (path.exists() and any(path.iterdir())):
        staging.replace(path)
        return
    with locked(path):
        if not exchanged(staging, path):
            # If this fails or is killed before the new bundle is in place, the old one is put back.
            set_aside(path, replaced_by(staging))
            staging.replace(path)


def _read_manifest(file: Path) -> dict[str, Any]:
    damaged = "The manifest is damaged, so the files of this bundle cannot be checked. Export the bundle again."
    content = read_regular(file, MANIFEST_BYTES, BundleError, "Check its permissions, or export the bundle again.")
    manifest: dict[str, Any] = json_from(content, str(file), BundleError, damaged)
    intact = False
    if isinstance(manifest, dict) and manifest.pop("sha256", None) is not None:
        intact = content == _manifest_text(manifest).encode()  # byte by byte, including spaces and line ends
    if not intact:
        raise BundleError(f"{file}: {damaged}")
    if type(schema := manifest.get("schema")) is not int or schema != SCHEMA:
        raise BundleError(
            f"{file} has schema {shown(schema)}, but this release of swin-deploy reads schema {SCHEMA}. "
            f"Use the release that wrote it, or export the bundle again."
        )
    return manifest


def _write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    with scratch(folder / MANIFEST) as path:
        _write_text(path, _manifest_text(manifest))
        path.replace(folder / MANIFEST)
    synced(folder)


def _manifest_text(manifest: Mapping[str, Any]) -> str:
    canonical = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256(canonical.encode()).hexdigest()
    return json.dumps({**manifest, "sha256": digest}, indent=2) + "\n"


def _described(entry: Entry, path: Path) -> Entry:
    """Return the manifest entry of a file that was just written, and record the file as made on this machine."""
    entry = {**entry, "bytes": path.stat().st_size, "sha256": sha256_of(path)}
    record("made", _key(entry["sha256"], entry.get("weights")))
    return entry


def _key(sha256: str, weights: str | None) -> str:
    return f"{sha256} {weights or '-'}\n"


def cache_folder(kind: str) -> Path | None:
    """The folder of the user's cache for one kind of file; None where there is no home for it. It need not exist yet."""
    if given := os.environ.get("XDG_CACHE_HOME"):
        folder = Path(given)
    elif sys.platform == "win32":
        folder = Path(os.environ.get("LOCALAPPDATA", ""))
    else:
        try:
            folder = Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")
        except RuntimeError:
            return None
    return folder / "swin-deploy" / kind if folder.is_absolute() else None


def recorded(kind: str, key: str) -> bool:
    """Return whether a file is in one of the two records of this user: "made" on this machine, or "checked"."""
    if (kind, key) in _RECORDED:
        return True
    with contextlib.suppress(OSError), _record(cache_folder("known"), kind, os.O_RDONLY) as file:
        return f"\n{key}".encode() in b"\n" + file.read()
    return False


def record(kind: str, key: str) -> None:
    """Add a file to a record, if the user's cache folder can be written."""
    if recorded(kind, key):
        return
    _RECORDED.add((kind, key))  # for this process, if there is no cache folder
    if (folder := cache_folder("known")) is None:
        return
    with contextlib.suppress(OSError):
        for place in (folder.parent, folder):
            place.mkdir(0o700, parents=True, exist_ok=True)
        with _record(folder, kind, os.O_RDWR | os.O_CREAT | os.O_APPEND) as file:
            if (size := os.fstat(file.fileno()).st_size) > RECORD_BYTES:  # drop the older half
                file.seek(size // 2)
                kept = file.read().partition(b"\n")[2]
                file.truncate(0)
                file.write(kept)
            file.write(key.encode())


def _record(folder: Path | None, kind: str, flags: int) -> IO[bytes]:
    """Open a record of known files. Raises OSError if anybody but this user could have written it."""
    if folder is None:
        raise FileNotFoundError
    handle = os.open(folder / kind, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0), 0o600)
    facts = os.fstat(handle)
    if not stat.S_ISREG(facts.st_mode) or (os.name != "nt" and (facts.st_uid != os.geteuid() or facts.st_mode & 0o022)):
        os.close(handle)
        raise PermissionError
    return open(handle, "r+b" if flags & os.O_RDWR else "rb", buffering=0)  # noqa: PTH123 - a file descriptor


def _write_text(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def specs_from_onnx(values: Iterable[onnx.ValueInfoProto]) -> tuple[TensorSpec, ...]:
    """Names, types and shapes of a graph's inputs or outputs, as it declares them; "?" for an axis of which it says nothing."""
    import onnx

    specs = []
    for value in values:
        tensor = value.type.tensor_type
        shape = tuple(d.dim_value if d.HasField("dim_value") else (d.dim_param or "?") for d in tensor.shape.dim)
        specs.append(TensorSpec(value.name, onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name, shape))
    return tuple(specs)


def load_graph(path: Path) -> onnx.ModelProto:
    """Load an ONNX file with its external weights, which may be links: onnx itself refuses these."""
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    constants = (attribute.t for node in model.graph.node for attribute in node.attribute if attribute.HasField("t"))
    load_weights((*model.graph.initializer, *constants), path.parent)
    return model


def load_weights(tensors: Iterable[onnx.TensorProto], folder: Path) -> None:
    """Load the values of those `tensors` that are in files of `folder`. Raises ValueError for one outside or too short."""
    for tensor in tensors:
        if tensor.data_location != tensor.EXTERNAL:
            continue
        place = {entry.key: entry.value for entry in tensor.external_data}
        location, length = Path(place.get("location", "")), int(place.get("length", -1))
        if location.is_absolute() or ".." in location.parts:
            raise ValueError(f"{tensor.name} is in {location}, outside of {folder}")
        file = folder / location
        if not file.is_file():
            raise ValueError(f"{tensor.name} is in {file}, which is not a file")
        start, size = int(place.get("offset", 0)), file.stat().st_size
        if start < 0 or start + length > size:
            raise ValueError(f"{tensor.name} goes beyond the end of {file}")
        with file.open("rb") as content:
            content.seek(start)
            tensor.raw_data = content.read(size - start if length < 0 else length)
        tensor.data_location = tensor.DEFAULT
        del tensor.external_data[:]


@contextlib.contextmanager
def without_links(graph: Path) -> Iterator[Path]:
    """Yield the ONNX file `graph`, or a copy beside its weights if these are a symbolic link, as in Hugging Face's cache.

    ONNX Runtime and OpenVINO refuse a link that leaves the folder. Where possible, the weights are linked, not copied.
    """
    links = [file for file in graph.parent.glob("*data") if file.is_symlink() and file.is_file()]
    content = graph.read_bytes() if links else b""
    links = [file for file in links if os.fsencode(file.name) in content]
    if not links:
        yield graph
        return
    with scratch_folder("weights") as folder:
        (folder / graph.name).write_bytes(content)
        for file in links:
            try:
                os.link(file.resolve(), folder / file.name)
            except OSError:  # another file system, or a file of another user
                shutil.copyfile(file, folder / file.name)
        yield folder / graph.name


def size_text(size: Size) -> str:
    """ "256x320" for (256, 320)."""
    return f"{size[0]}x{size[1]}"


def graph_file(precision: str, size: Size | None = None) -> str:
    """Where a bundle keeps the ONNX graph of `precision`; `size` is for its further sizes, None for its first."""
    return "onnx/model" + (f"_{size_text(size)}" if size else "") + ("" if precision == "fp32" else f"_{precision}") + ".onnx"


def weights_file(precision: str) -> str:
    """Where the weights are that the graphs of `precision` share, when they are not inside the graph."""
    return graph_file(precision) + "_data"


def reference_file(size: Size | None = None) -> str:
    """Where PyTorch's answers for a size are; None for the first."""
    return "reference.npz" if size is None else f"reference_{size_text(size)}.npz"
