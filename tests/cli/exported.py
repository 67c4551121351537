"""What the tests of bundles share: the command line, in a process of its own or in this one, and what is exported only once."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from once import once

from swin_deploy.bundle import Bundle
from swin_deploy.cli import main
from swin_deploy.config import SwinConfig
from swin_deploy.exporters.typed_graphs import with_typed_graphs
from swin_deploy.runtimes.backends import runtime_from_onnx

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
WEIGHTS = {1: EXAMPLES / "digits/swin-digits", 2: EXAMPLES / "digits/swinv2-digits"}
THREE = EXAMPLES / "digits/images/3.png"
FLOWER = EXAMPLES / "photos/flower.jpg"
SCRIPT = str(Path(sysconfig.get_path("scripts")) / "swin-deploy")

# No test may reach the hub: a closed port on this very machine stands for it.
OFFLINE = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}

HANG = 600  # s; ends a test that would hang for ever, and is never reached on a machine under load

Done = subprocess.CompletedProcess[str]


def cli(*args: object, cwd: Path, prefix: Iterable[str] = (), **env: str) -> Done:
    """`swin-deploy *args` as a user runs it, in `cwd`; `prefix` is a command that runs it."""
    return subprocess.run(
        [*prefix, SCRIPT, *map(str, args)], cwd=cwd, capture_output=True, text=True, env={**os.environ, **OFFLINE, **env}
    )


def cli_here(*args: object, cwd: Path, **env: str) -> Done:
    """As `cli`, in this process, which has paid for the import of torch. What libraries write to the descriptors counts too."""
    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    streams, kept, patch = (sys.stdout, sys.stderr), (os.dup(1), os.dup(2)), pytest.MonkeyPatch()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        for stream, file, descriptor in zip(streams, (out, err), (1, 2), strict=True):
            stream.flush()
            os.dup2(file.fileno(), descriptor)
        sys.stdout, sys.stderr = (os.fdopen(os.dup(descriptor), "w") for descriptor in (1, 2))
        patch.setattr(sys, "argv", command := ["swin-deploy", *map(str, args)])
        for name, value in {**OFFLINE, **env}.items():
            patch.setenv(name, value)
        patch.chdir(cwd)
        try:
            main()
            code: object = 0
        except SystemExit as error:
            code = error.code
        finally:
            for stream in (sys.stdout, sys.stderr):
                stream.close()
            sys.stdout, sys.stderr = streams
            for descriptor, saved in zip((1, 2), kept, strict=True):
                os.dup2(saved, descriptor)
                os.close(saved)
            patch.undo()
            for signum, handler in handlers.items():
                signal.signal(signum, handler)
        for file in (out, err):
            file.seek(0)
        assert code is None or isinstance(code, int)
        return subprocess.CompletedProcess(command, code or 0, out.read(), err.read())


def cli_without(modules: Iterable[str], *args: object, cwd: Path, **env: str) -> Done:
    """`swin-deploy *args` where none of `modules` can be imported."""
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({tuple(modules)!r})); sys.argv = {['swin-deploy', *map(str, args)]!r}\n"
        "from swin_deploy.cli import main; main()"
    )
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, env={**os.environ, **OFFLINE, **env}
    )


def result(done: Done) -> Any:
    """What a verb printed with --json; stdout must hold nothing else, and stderr no traceback."""
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return json.loads(done.stdout)


def refused(done: Done, *parts: str, code: int = 2) -> str:
    """The one sentence on stderr after the timed lines; it holds all `parts`, and nothing is on stdout."""
    said = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("[")]
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    assert len(said) == 1, done.stderr
    assert said[0].startswith("swin-deploy: "), done.stderr
    for part in parts:
        assert part in said[0]
    return said[0]


def _heed_interrupts() -> None:
    """A shell's background job ignores SIGINT, and so does all that it starts; the command under test must not."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def started(*command: str, cwd: Path) -> subprocess.Popen[str]:
    """A command that runs in the background, with pipes."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=cwd, text=True, preexec_fn=_heed_interrupts, **pipes)


def stopped(
    process: subprocess.Popen[str], line: str, signum: int, ready: Callable[[], bool] | None = None
) -> tuple[int, list[str]]:
    """Exit code and sentences of a command that gets `signum` once it has logged `line` and `ready()` holds."""
    assert process.stderr is not None
    assert any(line in text for text in iter(process.stderr.readline, ""))
    while ready is not None and not ready():
        assert process.poll() is None
    process.send_signal(signum)
    return _end(process)


def _end(process: subprocess.Popen[str]) -> tuple[int, list[str]]:
    out, err = process.communicate(timeout=HANG)
    assert out == ""
    return process.returncode, [text for text in err.splitlines() if text.strip() and not text.startswith("[")]


STOPPING = """
import logging, os, sys

line, calls, signum, arguments = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]

def count(frame, event, argument):
    global calls
    calls -= 1
    if calls == 0:
        sys.setprofile(None)
        os.kill(os.getpid(), signum)

class Watch(logging.Handler):
    def emit(self, record):
        if line in record.getMessage():
            sys.setprofile(count)

logging.getLogger("swin_deploy").addHandler(Watch())
sys.argv = ["swin-deploy", *arguments]
from swin_deploy.cli import main
main()
"""


def stopped_at(line: str, calls: int, signum: int, *arguments: str, cwd: Path) -> tuple[int, list[str]]:
    """Exit code and sentences of `swin-deploy` that sends itself `signum`, so many calls of functions after it logs `line`."""
    return _end(started(sys.executable, "-c", STOPPING, line, str(calls), str(int(signum)), *arguments, cwd=cwd))


@functools.cache
def exported(*options: str) -> Path:
    """A folder in which `export --json` was run with these options: the bundle, and what was printed in printed.json."""

    def make(path: Path) -> None:
        path.mkdir()
        done = cli_here("export", *options, "--json", cwd=path)
        result(done)
        assert len(list(path.iterdir())) == 1
        (path / "printed.json").write_text(done.stdout)

    return once("exported-" + hashlib.sha256(" ".join(options).encode()).hexdigest()[:16], make)


def exported_into(folder: Path, *options: str) -> Any:
    """What `export --json` printed, and its bundle in `folder`, as if it had been run there."""
    made = exported(*options)
    printed = json.loads((made / "printed.json").read_text())
    shutil.copytree(made / printed["bundle"], folder / printed["bundle"])
    return printed


def exported_bundle(*options: str) -> Path:
    """The bundle that `exported` made. Copy it before changing it."""
    [path] = [path for path in exported(*options).iterdir() if path.is_dir()]
    return path


@functools.cache
def digits_split() -> Any:
    """The training and the held-out images of examples/digits/digits.py, and their digits."""
    names: dict[str, Any] = {}
    exec((EXAMPLES / "digits/digits.py").read_text(), names)
    return names["split"]()


@contextlib.contextmanager
def small_disk(place: Path, size: str) -> Iterator[Path]:
    """A file system of that size, mounted at `place`."""
    place.mkdir()
    mount = shutil.which("mount")
    if not mount or subprocess.run([mount, "-t", "tmpfs", "-o", f"size={size}", "none", place], capture_output=True).returncode:
        pytest.skip("mounting a small file system is not permitted here")
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


@functools.cache
def digits(version: int) -> Path:
    """The trained digits checkpoint of that Swin version as a bundle, with its fp16 graph. Copy it before changing it."""

    name = WEIGHTS[version].name

    def make(path: Path) -> None:
        shutil.copytree(exported("--weights", str(WEIGHTS[version])) / name, path)
        with_typed_graphs(Bundle.open(path), "fp16", runtime_from_onnx)

    return once(name, make)


@functools.cache
def one_block(task: str = "image-classification", channels: int = 3) -> Path:
    """A checkpoint of one block with random weights, for what does not depend on the network; it is traced in no time."""

    def make(path: Path) -> None:
        from safetensors.torch import save_file

        from swin_deploy.models.checkpoints import random_checkpoint
        from swin_deploy.tasks import TaskSpec

        fields = {"image_size": (32, 32), "embed_dim": 64, "depths": (1,), "num_heads": (2,), "window_size": (4,)}
        config = SwinConfig(version=1, num_channels=channels, **fields)  # type: ignore[arg-type]
        checkpoint = random_checkpoint(config, TaskSpec(task))
        path.mkdir()
        save_file(dict(checkpoint.tensors), path / "model.safetensors")
        (path / "config.json").write_text(json.dumps(checkpoint.config.to_dict()))

    return once(f"one-block-{task}-{channels}", make)


def copied(version: int, target: Path) -> Path:
    """A copy of `digits(version)` at `target`."""
    shutil.copytree(digits(version), target)
    return target


def contents(folder: Path) -> dict[str, str]:
    """Path -> sha256 of everything in a folder, hidden things included; a folder's is empty."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in sorted(folder.rglob("*"))
    }


def files(path: Path) -> list[str]:
    """Every file of a bundle, the manifest included."""
    return [*Bundle.open(path).files, "manifest.json"]
