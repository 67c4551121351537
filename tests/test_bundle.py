"""A bundle is complete and as it was written, or it is not a bundle; whoever is killed, and whatever the disk does."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli.exported import contents, exported_bundle, one_block, small_disk
from PIL import Image

import swin_deploy
from swin_deploy.bundle import Bundle, Draft, create_bundle, newest_bundle
from swin_deploy.errors import BundleError, SwinDeployError, system_limit
from swin_deploy.files import read_arrays
from swin_deploy.preprocess import read_image

FACTS = {"name": "small", "tolerance": 1e-05, "label": "Grüße", "task": {"name": "image-classification"}}
INPUT = {"name": "pixel_values", "dtype": "float32", "shape": ["batch", 3, 8, 8]}
GRAPH = {"precision": "fp32", "image_size": [8, 8], "inputs": [INPUT], "outputs": [], "reference": "config.json"}


def onnx(text: str) -> bytes:
    """An ONNX model that has nothing but a producer."""
    return b"\x12" + bytes([min(len(text), 127)]) + text.encode()


@pytest.fixture(autouse=True)
def synced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was written to the disk, which no test waits for."""
    order: list[str] = []
    monkeypatch.setattr("os.fsync", lambda handle: order.append(Path(f"/proc/self/fd/{handle}").resolve().name))
    return order


def fill(draft: Draft, text: str = "graph") -> None:
    draft.add("onnx/model.onnx", GRAPH, onnx(text))
    draft.add_json("config.json", {"labels": ["Katze", "\N{CAT}", "\ud800"]})


def make(path: Path, text: str = "graph", replace: bool = False) -> Bundle:
    with create_bundle(path, replace=replace, facts=FACTS) as draft:
        fill(draft, text)
    return Bundle.open(path)


def text_of(bundle: Bundle) -> str:
    return bundle.verified_path("onnx/model.onnx").read_text()[2:]


def test_what_is_written_is_read(tmp_path: Path) -> None:
    bundle = make(tmp_path / "a b" / "ünï")
    assert bundle.name == "small"
    assert bundle.manifest["label"] == "Grüße"
    assert text_of(bundle) == "graph"
    assert bundle.files["onnx/model.onnx"]["bytes"] == 7
    assert bundle.read_json("config.json")["labels"][1] == "\N{CAT}"
    assert set(contents(tmp_path / "a b")) == {"ünï", "ünï/config.json", "ünï/manifest.json", "ünï/onnx", "ünï/onnx/model.onnx"}


@pytest.mark.skipif(sys.platform != "linux", reason="names of open files are read from /proc")
def test_the_files_are_on_the_disk_before_the_manifest_that_names_them(tmp_path: Path, synced: list[str]) -> None:
    bundle = make(tmp_path / "b")
    assert synced.index("manifest.json") > max(synced.index(name) for name in ("model.onnx", "config.json", "onnx"))
    assert synced[-1] == tmp_path.name
    synced.clear()
    bundle.with_file("onnx/new.npz", {}, b"graph")
    file, folder, manifest, root = (re.sub("partial-.*", "", name) for name in synced)
    assert (file, folder, manifest, root) == (".new.npz.", "onnx", ".manifest.json.", "b")


def test_every_byte_of_the_manifest_counts(tmp_path: Path) -> None:
    """Blanks and line ends too: it is the one file whose sha256 stands nowhere else."""
    manifest = make(tmp_path / "b").path / "manifest.json"
    whole = manifest.read_bytes()
    for position, byte in enumerate(whole):
        for other in {0x20, 0x0A, 0x0D} - {byte} if byte in b" \n" else {byte ^ 1}:
            manifest.write_bytes(whole[:position] + bytes([other]) + whole[position + 1 :])
            with pytest.raises(BundleError, match="damaged"):
                Bundle.open(tmp_path / "b")
    for wrong in (b"", whole[:-1], whole + b"\n", b"[]", b"null", b"\xff", b"[" * 100_000):
        manifest.write_bytes(wrong)
        with pytest.raises(BundleError, match="damaged"):
            Bundle.open(tmp_path / "b")
    manifest.write_bytes(whole)
    assert Bundle.open(tmp_path / "b").name == "small"


def test_each_file_is_read_once_for_all_graphs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The graphs of two sizes share their weights, and both they and their reference outputs are checked before use."""
    made = exported_bundle("--weights", str(one_block()), "--image-size", "32x32", "--image-size", "16x24")
    shutil.copytree(made, tmp_path / "b")
    monkeypatch.setattr("swin_deploy.bundle._CLOCK_STEP", 0)  # the digest of a file changed a moment ago is not kept
    files, read = Bundle.open(tmp_path / "b").files, []

    class Counting:
        def __init__(self, data: bytes = b"") -> None:
            self.digest = hashlib.sha256(data)
            self.hexdigest = self.digest.hexdigest

        def update(self, data: bytes) -> None:
            read.append(len(data))
            self.digest.update(data)

    monkeypatch.setattr("swin_deploy.bundle.hashlib", types.SimpleNamespace(sha256=Counting))
    assert len(swin_deploy.verify(tmp_path / "b", backend="onnxruntime")) == 2
    assert sorted(read) == sorted(entry["bytes"] for entry in files.values())


def test_every_byte_of_a_file_counts(tmp_path: Path) -> None:
    bundle = make(tmp_path / "b")
    file = bundle.path / "onnx/model.onnx"
    for position in range(7):
        changed = bytearray(onnx("graph"))
        changed[position] ^= 0x80
        file.write_bytes(changed)
        with pytest.raises(BundleError, match=r"model\.onnx is not the file that was exported"):
            bundle.verified_path("onnx/model.onnx")
    file.unlink()
    with pytest.raises(BundleError, match="cannot be read"):
        bundle.verified_path("onnx/model.onnx")
    with pytest.raises(BundleError, match=r"has no weights\.bin"):
        bundle.verified_path("weights.bin")


def test_a_changed_engine_names_the_way_out(tmp_path: Path) -> None:
    bundle = make(tmp_path / "b").with_file("engines/x.layers.json", {}, lambda path: path.write_bytes(b"plan") and None)
    (bundle.path / "engines/x.layers.json").write_bytes(b"plam")
    with pytest.raises(BundleError, match=rf"build-engine {tmp_path}/b --force"):
        bundle.verified_path("engines/x.layers.json")


def test_no_graph_is_listed_with_weights_that_are_not_its_own(tmp_path: Path) -> None:
    bundle = make(tmp_path / "b").with_file("onnx/w.bin", {}, b"old")
    bundle = bundle.with_file("onnx/model_int8.onnx", {**GRAPH, "precision": "int8", "weights": "onnx/w.bin"}, onnx("graph"))
    assert "onnx/model_int8.onnx" in bundle.with_file("onnx/w.bin", {}, b"old").files
    assert "onnx/model_int8.onnx" not in bundle.with_file("onnx/w.bin", {}, b"new").files
    assert Bundle.open(bundle.path).files.keys() >= {"onnx/w.bin", "onnx/model.onnx"}


def test_a_newer_schema_is_told_from_damage(tmp_path: Path) -> None:
    path = tmp_path / "b"
    with create_bundle(path, replace=False, facts={**FACTS, "schema": 2}) as draft:
        fill(draft)
    with pytest.raises(BundleError, match="schema 2"):
        Bundle.open(path)


@pytest.mark.parametrize("name", ["absent", "file", "file/below", "empty", "x" * 300])
def test_no_bundle_there(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BundleError, match=r"no bundle|not a bundle|cannot be read"):
        Bundle.open(tmp_path / name)


def test_an_existing_bundle_is_replaced_only_when_asked(tmp_path: Path) -> None:
    make(tmp_path / "b", "old")
    before = contents(tmp_path)
    with pytest.raises(BundleError, match="--force"):
        make(tmp_path / "b", "new")
    assert contents(tmp_path) == before
    assert text_of(make(tmp_path / "b", "new", replace=True)) == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_an_empty_folder_is_taken_and_any_other_is_left(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert text_of(make(tmp_path / "empty")) == "graph"
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    before = contents(tmp_path)
    for name in ("full", "file"):
        with pytest.raises(BundleError, match="not a bundle"):
            make(tmp_path / name, replace=True)
    with pytest.raises(BundleError, match="cannot be written"):
        make(tmp_path / "file/below", replace=True)
    assert contents(tmp_path) == before


def test_a_link_stays_and_its_target_is_replaced(tmp_path: Path) -> None:
    make(tmp_path / "real", "old")
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "dangling").symlink_to("later")
    assert text_of(make(tmp_path / "link", "new", replace=True)) == "new"
    assert text_of(make(tmp_path / "dangling")) == "graph"
    assert text_of(Bundle.open(tmp_path / "real")) == "new"
    assert (tmp_path / "link").is_symlink()
    assert text_of(Bundle.open(tmp_path / "later")) == "graph"


@pytest.mark.parametrize("place", [".", "..", "../b"])
def test_the_folder_one_stands_in_is_not_pulled_away(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "b")
    before = contents(tmp_path)
    monkeypatch.chdir(tmp_path / "b/onnx" if place == ".." else tmp_path / "b")
    with pytest.raises(BundleError, match="contains the current directory"):
        make(Path(place), replace=True)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_error_leaves_what_was_there(error: type[BaseException], tmp_path: Path) -> None:
    make(tmp_path / "b", "old")
    before = contents(tmp_path)

    def interrupted(path: Path) -> None:
        with create_bundle(path, replace=True, facts=FACTS) as draft:
            fill(draft, "new")
            raise error

    for name in ("b", "c"):
        with pytest.raises(error):
            interrupted(tmp_path / name)
    assert contents(tmp_path) == before


def test_a_folder_that_appears_meanwhile_is_left(tmp_path: Path) -> None:
    def raced() -> None:
        with create_bundle(tmp_path / "b", replace=False, facts=FACTS) as draft:
            fill(draft, "late")
            make(tmp_path / "b", "early")

    with pytest.raises(BundleError, match="--force"):
        raced()
    assert text_of(Bundle.open(tmp_path / "b")) == "early"


def without_exchange(monkeypatch: pytest.MonkeyPatch, cannot_rename: bool = False) -> None:
    """As on NFS, FUSE and macOS; and as in overlayfs, where a folder of a lower layer cannot be renamed, either."""
    monkeypatch.setattr("swin_deploy.bundle.exchanged", lambda one, other: False)
    replace = Path.replace

    def refuse(self: Path, target: Path) -> Path:
        if ".replaced-" in Path(target).name:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        return replace(self, target)

    if cannot_rename:
        monkeypatch.setattr(Path, "replace", refuse)


def killed_at(step: int, action: Callable[[], object]) -> bool:
    """Whether `action`, in a process that is killed before its change number `step` of the disk, was killed."""
    process = os.fork()
    if process == 0:
        steps = 0

        def count(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal steps
            writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            if writes or event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir"):
                steps += 1
                if steps == step:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        code = 1
        try:
            action()
            code = 0
        finally:
            os._exit(code)
    status = os.waitpid(process, 0)[1]
    assert status in (0, signal.SIGKILL)
    return status != 0


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
@pytest.mark.parametrize("what", ["exchange", "two renames", "copy", "file"])
def test_whoever_is_killed_leaves_the_old_or_the_new_and_the_next_sweeps(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if what != "exchange":
        without_exchange(monkeypatch, what == "copy")
    path, step = tmp_path / "b", 0

    def change(text: str = "new") -> None:
        if what == "file":
            Bundle.open(path).with_file("onnx/model.onnx", GRAPH, onnx(text))
        else:
            make(path, text, replace=True)

    make(path, "old")
    names, found = contents(tmp_path).keys(), set()
    while killed_at(step := step + 1, change):
        bundle = Bundle.open(path)
        found.add(text_of(bundle) if "onnx/model.onnx" in bundle.files else "none")
        change("old")
        assert contents(tmp_path).keys() == names
    assert found - {"none"} == {"old", "new"}
    assert ("none" in found) == (what == "file")


def test_the_entry_goes_before_its_file_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between the two, the bundle lacks the file; it never holds one under another one's sha256."""
    bundle = make(tmp_path / "b", "old")
    replace = Path.replace

    def killed(self: Path, target: Path) -> Path:
        moved = replace(self, target)
        if Path(target).name == "model.onnx":
            raise KeyboardInterrupt
        return moved

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        bundle.with_file("onnx/model.onnx", GRAPH, onnx("new"))
    found = Bundle.open(bundle.path)
    assert "onnx/model.onnx" not in found.files
    assert list(found.files) == ["config.json"]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", "64k") as place:
        yield place


def test_a_full_or_read_only_disk_is_one_sentence_and_leaves_nothing(disk: Path) -> None:
    bundle = make(disk / "b", "old")
    before = contents(disk)
    for sentence, text in (("No space left", "x" * 100_000), ("Read-only file system", "new")):
        for action in (
            lambda text=text: make(disk / "c", text),
            lambda text=text: make(disk / "b", text, replace=True),
            lambda text=text: bundle.with_file("engines/x.layers.json", {}, lambda path: path.write_text(text) and None),
        ):
            with pytest.raises(BundleError, match=f"cannot be written: {sentence}"):
                action()
        assert {name: digest for name, digest in contents(disk).items() if name != "b/engines"} == before
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)


def test_a_file_that_may_not_grow_is_one_sentence(tmp_path: Path) -> None:
    code = """
import resource, sys
from pathlib import Path
from swin_deploy.bundle import create_bundle
from swin_deploy.errors import BundleError, SwinDeployError, system_limit
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    with create_bundle(Path(sys.argv[1]), replace=False, facts={}) as draft:
        draft.add("onnx/model.onnx", {}, lambda path: path.write_bytes(bytes(2000)) and None)
except BundleError as error:
    print(error)
"""
    pytest.importorskip("resource", reason="this system has no limits of a process")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "b")], capture_output=True, text=True)
    assert "cannot be written: File too large" in done.stdout
    assert list(tmp_path.iterdir()) == []


ADD = """
import sys
from swin_deploy.bundle import Bundle
path, number = sys.argv[1:]
Bundle.open(path).with_file(f"engines/{number}.layers.json", {}, lambda target: target.write_text(number) and None)
"""


def add(path: Path, number: int) -> None:
    Bundle.open(path).with_file(f"engines/{number}.layers.json", {}, lambda target: target.write_text(str(number)) and None)


def test_threads_and_processes_lose_no_entry(tmp_path: Path) -> None:
    path = make(tmp_path / "b").path
    processes = [subprocess.Popen([sys.executable, "-c", ADD, str(path), str(number)]) for number in range(4)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: add(path, number), range(4, 40)))
    assert [process.wait() for process in processes] == [0] * 4
    bundle = Bundle.open(path)
    for number in range(40):
        assert bundle.verified_path(f"engines/{number}.layers.json").read_text() == str(number)
    assert not list(path.rglob(".*"))


def test_the_first_size_stays_first_when_its_graph_is_made_again(tmp_path: Path) -> None:
    with create_bundle(tmp_path / "b", replace=False, facts=FACTS) as draft:
        for file in ("onnx/model.onnx", "onnx/model_32x64.onnx", "config.json"):
            draft.add(file, GRAPH, onnx("x"))
    bundle = Bundle.open(tmp_path / "b")
    for file in ("onnx/model_32x64_fp16.onnx", "onnx/model_fp16.onnx", "onnx/model.onnx"):
        bundle = bundle.with_file(file, GRAPH, onnx("y"))
    assert [file for file in bundle.graphs if "fp16" not in file] == ["onnx/model.onnx", "onnx/model_32x64.onnx"]
    assert [file for file in bundle.graphs if "fp16" in file] == ["onnx/model_fp16.onnx", "onnx/model_32x64_fp16.onnx"]


def test_an_entry_is_of_the_file_that_was_seen(tmp_path: Path) -> None:
    """What is said of a graph is not entered for one that somebody has put in its place meanwhile."""
    seen = make(tmp_path / "b").with_entry("onnx/model.onnx", {"agreement": {"verified": True}})
    assert Bundle.open(seen.path).files["onnx/model.onnx"]["agreement"] == {"verified": True}
    assert text_of(seen) == "graph"
    seen.with_file("onnx/model.onnx", GRAPH, onnx("another"))
    assert "agreement" not in seen.with_entry("onnx/model.onnx", {"agreement": {"verified": True}}).files["onnx/model.onnx"]
    assert "agreement" not in Bundle.open(seen.path).files["onnx/model.onnx"]
    seen.without("onnx/model.onnx")
    assert "onnx/model.onnx" not in seen.with_entry("onnx/model.onnx", {"agreement": {"verified": True}}).files


def test_the_newest_bundle(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(BundleError, match=f"no bundle in {tmp_path}"):
        newest_bundle(tmp_path)
    make(tmp_path / "z")
    newest = make(tmp_path / "a")
    shutil.copytree(newest.path, tmp_path / ".hidden")
    (tmp_path / "web-app").mkdir()
    (tmp_path / "web-app/manifest.json").write_text(json.dumps({"name": "another program's"}))
    assert newest_bundle(tmp_path).path == newest.path
    assert newest_bundle(newest.path).path == newest.path
    newest.path.rename(tmp_path / ".a.replaced-0123abcd")  # by a command that was killed then
    assert newest_bundle(tmp_path).path == newest.path
    (tmp_path / "z/manifest.json").write_text("{")
    assert newest_bundle(tmp_path).path == newest.path
    assert f"Ignoring one bundle. {tmp_path / 'z/manifest.json'} cannot be read" in caplog.text
    (newest.path / "manifest.json").write_text("{")
    with pytest.raises(BundleError, match="damaged"):
        newest_bundle(tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="names that are not UTF-8")
def test_a_name_that_onnx_cannot_open_is_refused_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"not valid UTF-8.*Rename"):
        make(tmp_path / "b\udcff")
    make(tmp_path / "b").path.rename(tmp_path / "b\udcff")
    bundle = Bundle.open(tmp_path / "b\udcff")
    assert text_of(bundle) == "graph"
    with pytest.raises(BundleError, match=r"not valid UTF-8.*Rename"), bundle.compiling(lambda: None):
        pass


def test_a_reader_that_meets_a_writer_reads_the_manifest_again(tmp_path: Path) -> None:
    reader = make(tmp_path / "b", "old")
    reader.with_file("onnx/model.onnx", GRAPH, onnx("new"))
    assert text_of(reader) == "new"
    reader.without("onnx/model.onnx")
    with pytest.raises(BundleError, match="has no onnx/model"):
        text_of(reader)
    make(tmp_path / "b", "another", replace=True)
    with pytest.raises(BundleError, match="exported again while it was read"):
        text_of(reader)
    with pytest.raises(BundleError, match="exported again meanwhile"):
        reader.with_file("onnx/new.onnx", {}, b"new")


def test_a_removed_current_directory_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    make(tmp_path / "b")
    (tmp_path / "gone").rmdir()
    for action in (lambda: newest_bundle(Path()), lambda: Bundle.open("b"), lambda: swin_deploy.build_engine()):
        with pytest.raises((FileNotFoundError, SwinDeployError)) as caught:
            action()
        assert "current directory no longer exists" in (system_limit(caught.value) or str(caught.value))
    make(tmp_path / "b", replace=True)


@pytest.mark.parametrize(
    ("error", "sentences"),
    [
        (MemoryError(), "Memory ran out"),
        (RuntimeError("unable to mmap 551848 bytes from file <x>: Cannot allocate memory (12)"), "Memory ran out"),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried"),
            "Memory ran out",
        ),
        (RuntimeError("can't start new thread"), "Memory ran out"),
        (ImportError("libtorch_cpu.so: failed to map segment from shared object"), "Memory ran out"),
        (OSError(errno.EMFILE, "Too many open files", "a.png"), "a.png: Too many files are open"),
        (TypeError("check_model_path(): Invoked with: 'x\\udcff/model.onnx'"), "A path is not valid UTF-8"),
        (RuntimeError("CUDA out of memory. Cannot allocate memory"), None),
        (FileNotFoundError(2, "No such file", "a.png"), None),
        (ValueError("wrong"), None),
    ],
)
def test_limits_of_the_system_are_named(error: Exception, sentences: str | None) -> None:
    found = system_limit(error)
    assert (found is None) if sentences is None else (found or "").startswith(sentences)
    wrapped = RuntimeError("export failed")
    wrapped.__cause__ = error
    assert sentences != "Memory ran out" or (system_limit(wrapped) or "").startswith(sentences)
    wrapped.__cause__, error.__context__ = error, wrapped  # as when an error is raised again
    assert (system_limit(error) is None) == (sentences is None)


def test_nothing_is_called_damaged_where_no_file_can_be_opened(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource", reason="this system has no limits of a process")
    bundle, image = exported_bundle("--weights", str(one_block())), tmp_path / "a.png"
    Image.new("RGB", (4, 4)).save(image)
    np.savez(tmp_path / "a.npz", a=np.zeros(3))
    actions = (
        lambda: Bundle.open(bundle),
        lambda: opened._checked("onnx/model.onnx", ""),
        lambda: read_image(image),
        lambda: read_arrays(tmp_path / "a.npz", 1000),
    )
    opened, limits = Bundle.open(bundle), resource.getrlimit(resource.RLIMIT_NOFILE)
    for action in actions:
        action()  # imports everything
    opened = Bundle.open(bundle)  # it remembers no sha256
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
        for action in actions:
            with pytest.raises(SwinDeployError, match=r"cannot be read\. .*Too many files are open; the limit is 0"):
                action()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_too_little_address_space_for_torch(tmp_path: Path) -> None:
    code = (
        "import resource, swin_deploy; resource.setrlimit(resource.RLIMIT_AS, (1 << 29,) * 2); swin_deploy.export('swin-tiny')"
    )
    pytest.importorskip("resource", reason="this system has no limits of a process")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert "SwinDeployError: PyTorch needs 520 MiB of address space to start" in done.stderr
