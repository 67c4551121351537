"""Processes that load models: `Process` starts one and asks it; `Child` and `serve` are the two sides of one that measures."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from swin_deploy import errors
from swin_deploy.bundle import TensorSpec
from swin_deploy.dependencies import require
from swin_deploy.errors import BackendError
from swin_deploy.options import Array, Progress, no_progress

if TYPE_CHECKING:
    from typing_extensions import Self


class Process:
    """A Python process that runs the text `start` and answers lines of JSON; use it as a context manager, which ends it."""

    title = "The process"  # in errors

    def __init__(self, start: str) -> None:
        self._stderr: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - close() does
        # In a session of its own, so that Ctrl-C on the terminal only reaches this process, which then ends the others.
        # Not with -m, which would search the current folder for modules first, and that may be a checkout of this package.
        command = [sys.executable, "-c", f"import sys; sys.path[:] = filter(None, sys.path); {start}"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._stderr, text=True, start_new_session=True
        )
        self.pid = self._process.pid

    def close(self) -> None:
        """End the process, whatever it does."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._stderr):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()

    def ask(self, question: Mapping[str, Any], progress: Progress = no_progress) -> dict[str, Any]:
        """Return the answer to a question. Raises the error that the process reports, or BackendError if it has ended."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdout is not None
        with contextlib.suppress(BrokenPipeError):  # the process has ended; reading shows that
            print(json.dumps(question), file=stdin, flush=True)
        while True:
            if not (line := stdout.readline()):
                raise BackendError(f"{self.title} {self._end()}.")
            answer: dict[str, Any] = json.loads(line)
            if "progress" in answer:
                progress(*answer["progress"])
            elif "log" in answer:
                name, level, message = answer["log"]
                logging.getLogger(name).log(level, "%s", message)
            else:
                break
        if "error" in answer:
            kind = vars(errors).get(str(answer.get("kind")))
            if not (isinstance(kind, type) and issubclass(kind, errors.SwinDeployError)):
                kind = BackendError
            raise kind(str(answer["error"]))
        return answer

    def _end(self) -> str:
        code = self._process.wait()
        if code == -9:  # SIGKILL
            return "was killed by the system, most likely because memory ran out"
        if code < 0:
            return f"died with {signal.Signals(-code).name}"
        self._stderr.seek(0)
        lines = self._stderr.read().decode("utf-8", "replace").splitlines()
        last = next((line.strip() for line in reversed(lines) if line.strip()), "no message")
        return f"died (exit code {code}): {last}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class Child(Process):
    """A process that has loaded a model and run it once.

    `cold_start` is in seconds, `peak_memory` in bytes. Raises BackendError with the message of a process that cannot load it.
    """

    title = "The measuring process"

    def __init__(self, request: Mapping[str, Any]) -> None:
        begin = time.perf_counter()
        self.peak_memory = 0
        super().__init__("from swin_deploy.bench.worker import serve; serve()")
        try:
            loaded = self.ask(request)
            self.model, self.inputs = str(loaded["title"]), loaded["inputs"]
        except BaseException:
            self.close()
            raise
        self.cold_start = time.perf_counter() - begin

    def milliseconds(self, seconds: float) -> list[float]:
        """Run the model for `seconds`, at least once after a warm-up, and return the time of each call."""
        return list(self.ask({"seconds": seconds})["ms"])

    def ask(self, question: Mapping[str, Any], progress: Progress = no_progress) -> dict[str, Any]:
        """Return the answer to a question, and keep the peak memory that it states. Raises BackendError for any error."""
        try:
            answer = super().ask(question, progress)
        except errors.SwinDeployError as error:
            raise BackendError(str(error)) from error
        self.peak_memory = int(answer["peak_memory"])
        return answer


@contextlib.contextmanager
def answers() -> Iterator[Callable[..., None]]:
    """Yield a function that answers on stdout with its keywords as JSON. Errors are answered, too.

    What libraries print goes to stderr.
    """
    stdout = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(**values: Any) -> None:
        stdout.write(json.dumps(values) + "\n")  # at once: other threads log
        stdout.flush()

    try:
        yield answer
    except MemoryError:
        answer(error="Memory ran out. Use a smaller batch.")
    except Exception as error:  # noqa: BLE001 - the process that asked reports it
        answer(error=" ".join(str(error).split()) or type(error).__name__, kind=type(error).__name__)


def log_levels() -> dict[str, int]:
    """Return the levels of this package's loggers, for `forward_log` in another process."""
    return {name: logging.getLogger(name).getEffectiveLevel() for name in ("swin_deploy", "swin_deploy.tensorrt")}


def forward_log(answer: Callable[..., None], levels: Mapping[str, int]) -> None:
    """Send log messages of these levels to the process that asked, which logs them."""
    handler = logging.Handler()
    handler.emit = lambda record: answer(log=(record.name, record.levelno, record.getMessage()))  # type: ignore[method-assign]
    logging.getLogger("swin_deploy").addHandler(handler)
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def serve() -> None:
    """Run the measuring process: the first line on stdin is its request, each further one the seconds to run for.

    Every line is answered with one on stdout.
    """
    with answers() as answer:
        request = json.loads(sys.stdin.readline())
        model = open_request(request)
        feeds = _feeds(model.inputs, int(request["batch"]))
        np.savez(request["answer"], **model.run(feeds))
        answer(title=model.title, inputs={spec.name: spec.dtype for spec in model.inputs}, peak_memory=peak_memory())
        while line := sys.stdin.readline():
            answer(ms=_timed(model, feeds, float(json.loads(line)["seconds"])), peak_memory=peak_memory())


def open_request(request: dict[str, Any]) -> Any:
    """Load what a request of `bench` or `doctor` names; the result has `title`, `inputs` and `run`."""
    from swin_deploy.bundle import Bundle

    threads = request.get("threads", 0)
    if threads and request.get("backend", "torch") == "torch":
        require("torch", "measure PyTorch").set_num_threads(threads)
    if "placement" in request:
        from .baselines import open_pytorch

        return open_pytorch(request)
    if "engine" in request:
        from swin_deploy.runtimes.gpu.engine_fit import open_engine

        return open_engine(Bundle.open(request["bundle"]), request["engine"], request["device"])
    from swin_deploy.runtimes.backends import BACKENDS, runtime_from_onnx

    backend = request["backend"]
    device = request.get("device", BACKENDS[backend].devices[0])
    fixed = {"batches": (int(request["batch"]),)} if backend == "openvino" and "batch" in request else {}
    if "onnx" in request:
        return runtime_from_onnx(Path(request["onnx"]), backend, threads, request["bf16"], device, **fixed)
    from swin_deploy.api.load import load

    options = {"precision": request["precision"], "trust": request.get("trust", False), **fixed}
    model = load(request["bundle"], backend=backend, device=device, threads=threads, **options)
    return SimpleNamespace(title=f"{backend} {model.describe().version}", inputs=model.inputs, run=model.run)


def _timed(model: Any, feeds: Mapping[str, Array], seconds: float) -> list[float]:
    model.run(feeds)  # other candidates have used the caches of the processor
    times: list[float] = []
    end = time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        start = time.perf_counter()
        model.run(feeds)
        times.append((time.perf_counter() - start) * 1e3)
    return times


def _feeds(inputs: Sequence[TensorSpec], batch: int) -> dict[str, Array]:
    """The same inputs in every process: noise for pixels, and a mask that hides nothing."""
    rng = np.random.default_rng(0)
    feeds: dict[str, Array] = {}
    for spec in inputs:
        shape = (batch, *(size if isinstance(size, int) else 256 for size in spec.shape[1:]))
        if spec.dtype in ("uint8", "bool"):
            feeds[spec.name] = rng.integers(0, 256 if spec.dtype == "uint8" else 1, shape, dtype=spec.dtype)
        else:
            feeds[spec.name] = rng.standard_normal(shape, dtype=np.float32).astype(spec.dtype)
    return feeds


def peak_memory() -> int:
    """Return the most bytes that this process has held at once; 0 if the system does not report it."""
    with contextlib.suppress(OSError, StopIteration):
        # Neither psutil, which knows no peak on Linux, nor getrusage, which starts at the memory of the parent process.
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        return int(next(line for line in status.splitlines() if line.startswith("VmHWM:")).split()[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
