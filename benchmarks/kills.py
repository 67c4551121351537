"""Kill export, build-engine, quantize and verify before each of their changes to the disk, and look at what is left.

Run: python benchmarks/kills.py [--random 200] [--folder FOLDER] [--jobs 2] [--only NAME]

An audit hook counts the changes: files opened for writing, and files and folders renamed, linked, made or removed. For each
change, a process is started that gets SIGKILL just before it. Then the bundle must be whole: the one before the command, the
one after it, or the one before with some of the new files. After the next command on the bundle, nothing may be left over.
Random kills come after a random time instead. In one case for each command, a sweep runs at every change instead of a kill.

Each case is a fork of a process that has imported all libraries and traced the network, so that a case takes about a second.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import logging
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

import swin_deploy
import swin_deploy.bundle
from swin_deploy.bundle import Bundle, sweep_folder
from swin_deploy.config import SwinConfig
from swin_deploy.errors import SwinDeployError
from swin_deploy.exporters import bundle_from_checkpoint
from swin_deploy.machine import processor_name
from swin_deploy.models.checkpoints import random_checkpoint
from swin_deploy.tasks import TaskSpec

CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate"}
CLONE_NEWPID, CLONE_NEWUSER = 0x20000000, 0x10000000
Place = Path  # a folder with `b`, the bundle, and `tmp`, the folder for temporary files


@dataclass(frozen=True)
class Case:
    """A command, what its bundle was made by, and where it runs."""

    name: str
    run: Callable[[Place], object]
    start: str  # name of a prepared bundle; empty for none
    exchange: bool = True
    namespace: bool = False


def export(place: Place) -> object:
    """Export over the bundle, if there is one."""
    return swin_deploy.export(weights=place.parent / "checkpoint", output=place / "b", force=True)


def build_engine(place: Place) -> object:
    """Compile an fp16 engine, whose graph is written first."""
    return swin_deploy.build_engine(place / "b", precision="fp16", gpus=("sm_86",))


def quantize(place: Place) -> object:
    """Quantize for ONNX Runtime, which keeps its progress on the disk."""
    return swin_deploy.quantize(place / "b", place.parent / "images", target="onnxruntime", batch=2)


def verify(place: Place) -> object:
    """Compare the graphs with PyTorch, and store the result."""
    return swin_deploy.verify(place / "b")


CASES = (
    Case("export", export, ""),
    Case("export --force", export, "old"),
    Case("export --force", export, "old", exchange=False),
    Case("export --force", export, "old", exchange=False, namespace=True),
    Case("build-engine", build_engine, "old"),
    Case("build-engine", build_engine, "old", namespace=True),
    Case("quantize", quantize, "old"),
    Case("quantize", quantize, "old", namespace=True),
    Case("verify", verify, "unverified"),
)


def without_exchange() -> None:
    """Behave like a file system that has no atomic exchange: NFS, FUSE, macOS."""
    swin_deploy.bundle.exchanged = lambda one, other: False  # type: ignore[attr-defined]


def changes(place: Place, each: Callable[[int, str], None]) -> None:
    """Call `each` with number and name before each change of the disk below `place`, from now on in this process."""
    count = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event == "open":
            path, _, flags = arguments
            if not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) or not isinstance(path, str | bytes | os.PathLike):
                return
        elif event not in CHANGES:
            return
        name = os.fsdecode(arguments[0])
        if name.startswith(str(place)) or not Path(name).is_absolute():  # relative to an open folder that is removed
            count += 1
            each(count, f"{event} {name.removeprefix(str(place))}")

    sys.addaudithook(hook)


@contextlib.contextmanager
def child(case: Case, place: Place, prepare: Callable[[], None] = lambda: None) -> Iterator[int]:
    """Yield the process id of a fork that runs the case, and wait for its end."""
    process = os.fork()
    if process == 0:
        code = 1
        try:
            os.environ["TMPDIR"] = tempfile.tempdir = str(place / "tmp")  # Python itself writes a file to find it
            if not case.exchange:
                without_exchange()
            with contextlib.redirect_stdout(sys.stderr):
                prepare()
                case.run(place)
            code = 0
        except SwinDeployError as error:
            print(f"{case.name}: {error}", file=sys.stderr)
        finally:
            os._exit(code)
    yield process
    assert os.WIFSIGNALED(status := os.waitpid(process, 0)[1]) or os.WEXITSTATUS(status) == 0, case


@contextlib.contextmanager
def in_namespace() -> Iterator[None]:
    """Run the children of this process in a process-id namespace of their own."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWPID | (CLONE_NEWUSER if os.geteuid() else 0)):
        raise OSError(ctypes.get_errno(), "process-id namespaces are not permitted")
    first = os.fork()  # number 1 there; the namespace ends with it
    if first == 0:
        while True:
            signal.pause()
    try:
        yield
    finally:
        os.kill(first, signal.SIGKILL)
        os.waitpid(first, 0)


def apart(work: Callable[[], Any]) -> Any:
    """Return what `work` returns in a fork of this process."""
    read, write = os.pipe()
    process = os.fork()
    if process == 0:
        code = 1
        try:
            os.write(write, json.dumps(work()).encode())
            code = 0
        finally:
            os._exit(code)
    os.close(write)
    with os.fdopen(read, "rb") as answer:
        text = answer.read()
    assert os.waitpid(process, 0)[1] == 0
    return json.loads(text)


def run_case(case: Case, place: Place, prepare: Callable[[], None] = lambda: None, after: float | None = None) -> None:
    """Run a case in a child, in a namespace of its own if it asks for one; kill it after so many seconds."""

    def work() -> bool:
        with in_namespace() if case.namespace else contextlib.nullcontext(), child(case, place, prepare) as process:
            if after is not None:
                time.sleep(after)
                os.kill(process, signal.SIGKILL)
        return True

    apart(work)


def fresh(case: Case, root: Path, name: str) -> Place:
    """Make a place with the bundle from which the case starts."""
    place = root / name
    shutil.rmtree(place, ignore_errors=True)
    (place / "tmp").mkdir(parents=True)
    if case.start:
        shutil.copytree(root / case.start / "b", place / "b")
    return place


def before(case: Case, root: Path) -> dict[str, Any] | None:
    """Return the manifest of the bundle from which the case starts."""
    return dict(Bundle.open(root / case.start / "b").manifest) if case.start else None


def state(case: Case, place: Place, old: dict[str, Any] | None) -> str:
    """Return which bundle is there after a kill. Raises BundleError if it is not whole."""
    if old is None and not (place / "b").exists():
        return "old"
    bundle = Bundle.open(place / "b")
    for file in bundle.files:
        bundle.verified_path(file)
    if bundle.manifest == old:
        return "old"
    if case.run is export:
        return "new"
    assert old is not None
    graphs = [file for file in old["files"] if bundle.files.get(file, {}).get("sha256") == old["files"][file]["sha256"]]
    assert graphs == list(old["files"]), f"{case.name} lost a file"
    return "new"


def left_over(place: Place) -> list[str]:
    """Return what no manifest names, except for the state from which an interrupted command resumes."""
    known = {str(place / "b" / file) for file in (*Bundle.open(place / "b").files, "manifest.json")}
    known |= {str(path) for path in place.glob("b/.calibration/**/*.npz")}
    found = [path for path in place.rglob("*") if not path.is_dir() or ".partial-" in path.name or ".replaced-" in path.name]
    return [str(path.relative_to(place)) for path in found if str(path) not in known]


def next_command(case: Case, place: Place) -> None:
    """Verify the bundle, or export it if there is none."""
    run_case(replace(case, run=verify if (place / "b").exists() or case.start else export, namespace=False), place)


def counted(case: Case, root: Path) -> list[str]:
    """Run a case to its end while another process sweeps at each change, and return the changes."""
    place, found = fresh(case, root, "counted"), root / "changes.txt"
    asked, answered = os.pipe(), os.pipe()

    def ask(number: int, name: str) -> None:
        os.write(asked[1], f"{name}\n".encode())
        os.read(answered[0], 1)

    sweeper = os.fork()
    if sweeper == 0:
        os.close(asked[1])
        lines = []
        with os.fdopen(asked[0], "rb", buffering=0) as questions:
            while line := questions.read(4096):
                lines.append(line.decode())
                if (place / "b/manifest.json").exists():
                    Bundle.open(place / "b").sweep()
                swin_deploy.bundle.sweep(place / "b")
                sweep_folder(place / "tmp")
                os.write(answered[1], b"x")
        found.write_text("".join(lines))
        os._exit(0)
    os.close(asked[0])
    run_case(case, place, lambda: changes(place, ask))
    os.close(asked[1])
    os.waitpid(sweeper, 0)
    for end in answered:
        os.close(end)
    assert state(case, place, before(case, root)) == "new"
    assert not left_over(place), left_over(place)
    return found.read_text().splitlines()


def killed(case: Case, root: Path, name: str, step: int, after: float | None) -> tuple[str, list[str]]:
    """Kill a case before change number `step`, or after some seconds; return the state, and what is left after the next."""
    place = fresh(case, root, name)
    old = before(case, root)

    def kill(number: int, name: str) -> None:
        if number == step:
            os.kill(os.getpid(), signal.SIGKILL)

    run_case(case, place, (lambda: changes(place, kill)) if step else (lambda: None), after)
    found = state(case, place, old)
    next_command(case, place)
    state(case, place, old)
    left = left_over(place)
    shutil.rmtree(place)
    return found, left


def prepare(root: Path) -> None:
    """Write a checkpoint, images, and the bundles that the cases start from; trace the network once, for all exports."""
    fields: dict[str, Any] = {"image_size": (32, 32), "embed_dim": 32, "depths": (1,), "num_heads": (2,), "window_size": (4,)}
    config = SwinConfig(version=1, **fields)
    (root / "checkpoint").mkdir()
    (root / "images").mkdir()
    save_file(dict(random_checkpoint(config, TaskSpec()).tensors), root / "checkpoint/model.safetensors")
    (root / "checkpoint/config.json").write_text(json.dumps(config.to_dict()))
    for number in range(2):
        pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), np.uint8)
        Image.fromarray(pixels).save(root / f"images/{number}.png")
    os.environ["XDG_CACHE_HOME"] = str(root / "cache")  # it records that the bundles were made on this machine
    trace, traced = bundle_from_checkpoint.onnx_from_torch, list[Any]()

    def once(*arguments: Any) -> Any:
        if not traced:
            traced.append(trace(*arguments))
        copy = type(traced[0].model)()
        copy.CopyFrom(traced[0].model)
        return replace(traced[0], model=copy)

    bundle_from_checkpoint.onnx_from_torch = once
    open_graph = bundle_from_checkpoint.check_graph
    bundle_from_checkpoint.check_graph = _not_installed  # no threads of ONNX Runtime in the process that is forked
    (root / "unverified").mkdir()
    export(root / "unverified")
    bundle_from_checkpoint.check_graph = open_graph
    (root / "old").mkdir()
    shutil.copytree(root / "unverified/b", root / "old/b")
    with child(Case("verify", verify, ""), root / "old"):
        (root / "old/tmp").mkdir()


def _not_installed(*arguments: Any) -> Any:
    from swin_deploy.errors import MissingDependencyError

    raise MissingDependencyError("ONNX Runtime is needed")


def main() -> None:
    """Run all cases and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--random", type=int, default=200)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", default="")
    given = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("swin_deploy").addHandler(logging.NullHandler())
    import onnxruntime  # noqa: F401 - so that the forks need not
    import tensorrt_rtx  # noqa: F401

    begin = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=given.folder, prefix="swin-kills-") as folder:
        root = Path(folder).resolve()
        prepare(root)
        cases = [case for case in CASES if given.only in case.name]
        tasks: list[tuple[Case, int, float | None]] = []
        rows: dict[Case, int] = {}
        rng = random.Random(0)
        for case in cases:
            start = time.perf_counter()
            rows[case] = len(counted(case, root))
            seconds = time.perf_counter() - start
            print(f"{case.name}: {rows[case]} changes, {seconds:.1f} s", file=sys.stderr)
            tasks += [(case, step, None) for step in range(1, rows[case] + 1)]
            tasks += [(case, 0, rng.uniform(0, seconds)) for _ in range(-(-given.random // len(cases)))]
        results = run_all(tasks, root, given.jobs)
    print(f"{processor_name()}, {len(tasks)} kills in {time.perf_counter() - begin:.0f} s\n")
    print("| command | exchange | namespaces | changes | kills | old | new | not whole | left over |")
    print("|---|---|---|---|---|---|---|---|---|")
    for case, count in rows.items():
        ours = [result for (one, *_), result in zip(tasks, results, strict=True) if one == case]
        states = Counter(found for found, _ in ours)
        wrong = [found for found in states if found not in ("old", "new")]
        print(
            f"| `{case.name}` | {'yes' if case.exchange else 'no'} | {2 if case.namespace else 1} | {count} | {len(ours)} "
            f"| {states['old']} | {states['new']} "
            f"| {sum(states[one] for one in wrong)} | {sum(bool(left) for _, left in ours)} |"
        )
        for found, left in ours:
            if found in wrong or left:
                print(found, left, file=sys.stderr)


def run_all(tasks: list[tuple[Case, int, float | None]], root: Path, jobs: int) -> list[tuple[str, list[str]]]:
    """Run the tasks in `jobs` processes and return their results in order."""
    for job in range(jobs):
        if os.fork() == 0:
            with (root / f"results-{job}.json").open("w") as file:
                for number in range(job, len(tasks), jobs):
                    case, step, after = tasks[number]
                    try:
                        found, left = killed(case, root, f"place-{job}", step, after)
                    except Exception as error:  # noqa: BLE001 - it is in the table
                        found, left = f"{case.name}, change {step}: {type(error).__name__}: {error}", []
                    print(json.dumps([number, found, left]), file=file, flush=True)
            os._exit(0)
    for _ in range(jobs):
        os.wait()
    lines = [json.loads(line) for job in range(jobs) for line in (root / f"results-{job}.json").read_text().splitlines()]
    return [(found, left) for _, found, left in sorted(lines)]


if __name__ == "__main__":
    main()
