"""Runs each case in a forked process, watches its time, memory and changes to the disk, and classifies how it ended."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import random
import re
import resource
import select
import shutil
import signal
import statistics
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LATE = 10.0  # s of processor time, or three times that without any work
MEMORY = 2 << 30  # bytes above what half of the cases of the same verb need
WRONG, BROKEN = 70, 71  # exit codes of a case: a tensor differs, or the harness itself failed
FAULTS = ("traceback", "late", "memory", "death", "outside", "wrong tensor", "sentence", "harness")
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
ALLOWED = ("bundle", "inputs", "tmp", "cache")  # what a case may change in its folder
PAGE = os.sysconf("SC_PAGE_SIZE")
TICKS = os.sysconf("SC_CLK_TCK")


class WrongTensorError(Exception):
    """A checkpoint was accepted, and a tensor differs from what its own library reads."""


@dataclass(frozen=True)
class Planned:
    """What a case runs: the name of the verb, what was changed in its input, and the call."""

    verb: str
    change: str
    call: Callable[[], object]


# Writes the input of one case into the folder that it is given, whose subfolders are ALLOWED.
Plan = Callable[[random.Random, Path], Planned]


@dataclass(frozen=True)
class Ended:
    """How a case ended; `fault` is empty, or one of FAULTS."""

    number: int
    verb: str
    change: str
    fault: str
    code: int
    seconds: float
    peak: int
    text: str

    def __str__(self) -> str:
        lines = self.text.strip().splitlines()
        return f"{self.number:6d} {self.fault}: {self.verb}: {self.change[:300]}: {lines[-1][:300] if lines else ''}"


@dataclass
class _Running:
    number: int
    pid: int
    handle: int
    folder: Path
    begun: float
    killed: str = ""
    peak: int = 0
    read: list[Any] = field(default_factory=list)


def generator(kind: str, seed: int, number: int) -> random.Random:
    """Return the random numbers of one case, which depend on nothing else."""
    return random.Random(f"{kind}/{seed}/{number}")


def run_cases(kind: str, plan: Plan, seed: int, numbers: Sequence[int], workers: int, keep: Path | None = None) -> list[Ended]:
    """Run the cases `numbers` of a kind, `workers` at a time. Folders of cases with a fault are moved to `keep`."""
    ended: list[Ended] = []
    waiting = list(reversed(numbers))
    running: list[_Running] = []
    with tempfile.TemporaryDirectory(prefix="swin-fuzz-") as place:
        free = [_made(Path(place, str(slot))) for slot in range(workers)]
        poll = select.poll()
        while waiting or running:
            while waiting and free:
                case = _started(kind, plan, seed, waiting.pop(), free.pop())
                poll.register(case.handle, select.POLLIN)
                running.append(case)
            poll.poll(20)
            for case in tuple(running):
                pid, status, usage = os.wait4(case.pid, os.WNOHANG)
                if not pid:
                    _watch(case)
                    continue
                running.remove(case)
                poll.unregister(case.handle)
                os.close(case.handle)
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(case.pid, signal.SIGKILL)  # what the case started
                ended.append(_classified(case, status, usage))
                if ended[-1].fault:
                    print(ended[-1], flush=True)
                if ended[-1].fault and keep is not None:
                    target = keep / f"{kind}-{seed}-{case.number}"
                    shutil.rmtree(target, ignore_errors=True)
                    shutil.copytree(case.folder, target, symlinks=True, ignore_dangling_symlinks=True, ignore=_special)
                shutil.rmtree(case.folder)
                free.append(_made(case.folder))
    return _with_memory(sorted(ended, key=lambda one: one.number))


def table(kind: str, ended: Sequence[Ended], seconds: float) -> dict[str, Any]:
    """Return one row of the results."""
    faults = Counter(one.fault for one in ended if one.fault)
    return {
        "kind": kind,
        "cases": len(ended),
        "answered": sum(not one.fault and one.code in (0, 1, 3) for one in ended),
        "refused": sum(not one.fault and one.code == 2 for one in ended),
        "slowest s": round(max((one.seconds for one in ended), default=0), 1),
        "seconds": round(seconds),
        "faults": ", ".join(f"{count} {fault}" for fault, count in faults.items()) or "0",
    }


def _special(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if not (Path(folder, name).is_dir() or Path(folder, name).is_file())]


def _made(folder: Path) -> Path:
    """Make the folder of a case: what it may change, and files beside it that must stay as they are."""
    for name in (*ALLOWED, "victim", "here"):
        (folder / name).mkdir(parents=True)
    for name in ("v.onnx", "v.onnx_data", "v.sensitivity.svg", "v.engine", "v.layers.json", "v.npz", "config.json"):
        (folder / "victim" / name).write_text(f"the content of {name}")
    (folder / "v.onnx").write_text("beside the bundle")
    return folder


def _state(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the size, time and inode of everything in a folder that a case may not change."""
    found: dict[str, tuple[int, ...]] = {}
    for path in (folder, *folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if len(parts) < 2 or parts[0] not in ALLOWED:
            facts = path.lstat()
            whole = path == folder or parts[0] in ALLOWED  # the time of these folders changes with their content
            found["/".join(parts)] = (facts.st_mode,) if whole else (facts.st_size, facts.st_mtime_ns, facts.st_ino)
    return found


def _started(kind: str, plan: Plan, seed: int, number: int, folder: Path) -> _Running:
    sys.stdout.flush()
    sys.stderr.flush()
    before = _state(folder)
    pid = os.fork()
    if not pid:
        _case(plan, generator(kind, seed, number), folder)
    return _Running(number, pid, os.pidfd_open(pid), folder, time.monotonic(), read=[before])


def _case(plan: Plan, rng: random.Random, folder: Path) -> None:
    """Run one case in this process, which ends with it."""
    code = BROKEN
    try:
        os.setsid()
        for name, variable in (("tmp", "TMPDIR"), ("cache", "XDG_CACHE_HOME"), ("cache", "HOME")):
            os.environ[variable] = str(folder / name)
        tempfile.tempdir = None
        os.chdir(folder / "here")
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (4 << 30, 4 << 30))
        out = os.open(folder / "tmp/.out", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        err = os.open(folder / "tmp/.err", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        for number, target in ((os.open(os.devnull, os.O_RDONLY), 0), (out, 1), (err, 2)):
            os.dup2(number, target)
        sys.stdout, sys.stderr = (os.fdopen(os.dup(number), "w", errors="surrogateescape") for number in (1, 2))
        faulthandler.enable(sys.stderr)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        planned = plan(rng, folder)
        (folder / "tmp/.case").write_text(f"{planned.verb}\n{planned.change!a}")
        code = outcome(planned.call)
    except BaseException:  # noqa: BLE001 - whatever it is, it is printed
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(code)


def outcome(call: Callable[[], object]) -> int:
    """Run a verb and return its exit code. A Python function ends as the command line would."""
    from swin_deploy.errors import SwinDeployError

    try:
        call()
    except SwinDeployError as error:
        print(f"swin-deploy: {error}", file=sys.stderr)
        return error.exit_code
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 1 if error.code else 0
    except WrongTensorError as error:
        print(f"wrong tensor: {error}", file=sys.stderr)
        return WRONG
    except BaseException:  # noqa: BLE001 - this is what the cases look for
        traceback.print_exc()
        return 1
    return 0


def _watch(case: _Running) -> None:
    """End a case that takes too long or too much memory."""
    try:
        pages = int(Path(f"/proc/{case.pid}/statm").read_text().split()[1])
        fields = Path(f"/proc/{case.pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, IndexError):
        return
    case.peak = max(case.peak, pages * PAGE)
    own = int(Path("/proc/self/statm").read_text().split()[1]) * PAGE
    used = sum(map(int, fields[11:15])) / TICKS
    idle = time.monotonic() - case.begun - _scheduled(case.pid)
    if case.peak > own + 2 * MEMORY:
        case.killed = "memory"
    elif used > LATE or idle > 3 * LATE:
        case.killed = "late"
    if case.killed:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(case.pid, signal.SIGKILL)


def _scheduled(pid: int) -> float:
    """Return the seconds that a process ran, or waited for a processor that was busy."""
    with contextlib.suppress(OSError, ValueError):
        return sum(map(int, Path(f"/proc/{pid}/schedstat").read_text().split()[:2])) / 1e9
    return 0.0


def _text(file: Path) -> str:
    with contextlib.suppress(OSError), file.open("rb") as stream:
        return stream.read(1 << 20).decode("utf-8", "replace")
    return ""


def _classified(case: _Running, status: int, usage: resource.struct_rusage) -> Ended:
    out, err = (_text(case.folder / "tmp" / name) for name in (".out", ".err"))
    verb, _, change = _text(case.folder / "tmp/.case").partition("\n")
    code = os.waitstatus_to_exitcode(status)
    fault = case.killed
    if not fault and code < 0:
        fault = "death"
        err += f"\n{signal.Signals(-code).name}"
    if not fault:
        fault = {WRONG: "wrong tensor", BROKEN: "harness"}.get(code, "")
    if not fault and "Traceback (most recent call last)" in err:
        fault = "traceback"
    after = _state(case.folder)
    if changed := [name for name in {*case.read[0], *after} if case.read[0].get(name) != after.get(name)]:
        fault = "outside"
        err += f"\nchanged: {sorted(changed)[:5]}"
    if not fault:
        fault, said = _said(code, out, err)
        err += said
    peak = max(case.peak, usage.ru_maxrss << 10)
    return Ended(case.number, verb, change, fault, code, usage.ru_utime + usage.ru_stime, peak, err)


def _said(code: int, out: str, err: str) -> tuple[str, str]:
    """Check what a case printed: one sentence if it was refused, and never a control character of the input."""
    ours = [line for line in err.split("\n") if line.startswith(("swin-deploy: ", "[", "Warning: "))]
    sentences = [line for line in ours if line.startswith("swin-deploy: ")]
    if code == 2 and len(sentences) != 1:
        return "sentence", f"\n{len(sentences)} sentences"
    if code not in (0, 1, 2, 3):
        return "sentence", f"\nexit code {code}"
    if code == 2 and not err.rstrip("\n").endswith(sentences[0]):
        return "sentence", "\nmore than one line after the sentence"
    for line in (*ours, *out.split("\n")):
        if CONTROL.search(line):
            return "sentence", f"\ncontrol character in {line[:400]!a}"
    if any(len(line) > 2000 for line in sentences):
        return "sentence", f"\na sentence of {len(sentences[0])} characters"
    if "allow_pickle" in err:
        return "sentence", "\nadvice to load pickles"
    return "", ""


def _with_memory(ended: list[Ended]) -> list[Ended]:
    peaks: dict[str, list[int]] = {}
    for one in ended:
        peaks.setdefault(one.verb, []).append(one.peak)
    normal = {verb: statistics.median(found) for verb, found in peaks.items()}
    return [
        Ended(**{**vars(one), "fault": "memory", "text": f"{one.text}\n{one.peak >> 20} MB"})
        if not one.fault and one.peak > normal[one.verb] + MEMORY
        else one
        for one in ended
    ]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep what libraries print while they are imported away from the results."""
    with open(os.devnull, "w") as nothing, contextlib.redirect_stderr(nothing):  # noqa: PTH123
        yield
