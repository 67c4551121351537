"""Both sides of a measuring process: `Child` starts one and asks it, `serve` is what it runs."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import numpy as np

from swin_deploy.bundle import TensorSpec
from swin_deploy.dependencies import require
from swin_deploy.errors import BackendError
from swin_deploy.options import Array

# Not with -m, which would search the current folder for modules first, and that may be a checkout of this package.
START = "import sys; sys.path[:] = filter(None, sys.path); from swin_deploy.bench.worker import serve; serve()"


class Child(contextlib.AbstractContextManager["Child"]):
    """A process that has loaded a model and run it once; use it as a context manager, which ends the process.

    `cold_start` is in seconds, `peak_memory` in bytes. Raises BackendError with the message of a process that cannot load it.
    """

    def __init__(self, request: Mapping[str, Any]) -> None:
        begin = time.perf_counter()
        self.peak_memory = 0
        self._stderr: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - close() does
        # In a session of its own, so that Ctrl-C on the terminal only reaches this process, which then ends the others.
        self._process = subprocess.Popen(
            [sys.executable, "-c", START], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._stderr, text=True,
            start_new_session=True,
        )  # fmt: skip
        self.pid = self._process.pid
        try:
            loaded = self._ask(request)
            self.title, self.inputs = str(loaded["title"]), loaded["inputs"]
        except BaseException:
            self.close()
            raise
        self.cold_start = time.perf_counter() - begin

    def milliseconds(self, seconds: float) -> list[float]:
        """Run the model for `seconds`, at least once after a warm-up, and return the time of each call."""
        return list(self._ask({"seconds": seconds})["ms"])

    def close(self) -> None:
        """End the process, whatever it does."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._stderr):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()

    def _ask(self, question: Mapping[str, Any]) -> dict[str, Any]:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdout is not None
        with contextlib.suppress(BrokenPipeError):  # the process has ended; reading shows that
            print(json.dumps(question), file=stdin, flush=True)
        if not (line := stdout.readline()):
            raise BackendError(f"The measuring process {self._end()}.")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise BackendError(str(answer["error"]))
        self.peak_memory = int(answer["peak_memory"])
        return answer

    def _end(self) -> str:
        code = self._process.wait()
        if code == -9:  # SIGKILL
            return "was killed by the system, most likely because memory ran out"
        self._stderr.seek(0)
        lines = self._stderr.read().decode("utf-8", "replace").splitlines()
        last = next((line.strip() for line in reversed(lines) if line.strip()), "no message")
        return f"died (exit code {code}): {last}"

    def __exit__(self, *error: object) -> None:
        self.close()


def serve() -> None:
    """Run the measuring process: the first line on stdin is its request, each further one the seconds to run for.

    Every line is answered with one on stdout. What libraries print goes to stderr.
    """
    stdout = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(**values: Any) -> None:
        print(json.dumps(values), file=stdout, flush=True)

    try:
        request = json.loads(sys.stdin.readline())
        model = open_request(request)
        feeds = _feeds(model.inputs, int(request["batch"]))
        np.savez(request["answer"], **model.run(feeds))
        answer(title=model.title, inputs={spec.name: spec.dtype for spec in model.inputs}, peak_memory=peak_memory())
        while line := sys.stdin.readline():
            answer(ms=_timed(model, feeds, float(json.loads(line)["seconds"])), peak_memory=peak_memory())
    except MemoryError:
        answer(error="Memory ran out. Use a smaller batch.")
    except Exception as error:  # noqa: BLE001 - the process that asked reports it
        answer(error=" ".join(str(error).split()) or type(error).__name__)


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
    if "onnx" in request:
        return runtime_from_onnx(Path(request["onnx"]), backend, threads, request["bf16"], device)
    from swin_deploy.api.load import load

    model = load(request["bundle"], precision=request["precision"], backend=backend, device=device, threads=threads)
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
