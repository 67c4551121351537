"""A measuring process, seen from both sides: Child starts one and asks it, `answering` is what it does."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from swin_deploy.errors import BackendError
from swin_deploy.specs import TensorSpec

if TYPE_CHECKING:
    from typing_extensions import Self

# Not with -m: the folder it is started in would come first in the search for modules, a checkout of this very package.
START = "import sys; sys.path[:] = filter(None, sys.path); from swin_deploy.bench.run import serve; serve()"


class Child:
    """A process that has loaded what `request` says and has run it once; use it as a context manager, which ends it.

    `title` is what it runs with, `inputs` the types of what it takes by name, `cold_start` the seconds from its start to its
    first answer, `peak_memory` the most bytes it has held so far. Raises BackendError, with the child's own
    reason, where it cannot load.
    """

    def __init__(self, request: Mapping[str, Any]) -> None:
        begin = time.perf_counter()
        self.peak_memory = 0
        self._said: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - close() does
        # A session of its own: Ctrl-C on the terminal reaches this process alone, which then ends the others.
        self._process = subprocess.Popen(
            [sys.executable, "-c", START], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, text=True,
            start_new_session=True,
        )  # fmt: skip
        try:
            loaded = self._ask(request)
            self.title, self.inputs = str(loaded["title"]), loaded["inputs"]
        except BaseException:
            self.close()
            raise
        self.cold_start = time.perf_counter() - begin

    def milliseconds(self, seconds: float) -> list[float]:
        """How long each call took while it ran for so many seconds: one call at least, after one that does not count."""
        times: list[float] = self._ask({"seconds": seconds})["ms"]
        return times

    def close(self) -> None:
        """Ends the process, whatever it does."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._said):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()

    def _ask(self, question: Mapping[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it is dead, and reading tells
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
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
        self._said.seek(0)
        lines = self._said.read().decode("utf-8", "replace").splitlines()
        last = next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
        return f"died (exit code {code}): {last}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def answering(open_model: Callable[[dict[str, Any]], Any]) -> None:
    """The measuring process: the first line on stdin is its request, each further one the seconds to run for.

    `open_model` makes of the request what has `title`, `inputs` and `run`. Every line is answered with one. What libraries
    print goes to stderr.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(**answer: Any) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    try:
        request = json.loads(sys.stdin.readline())
        model = open_model(request)
        feeds = _feeds(model.inputs, int(request["batch"]))
        np.savez(request["answer"], **model.run(feeds))
        inputs = {spec.name: spec.dtype for spec in model.inputs}
        say(title=model.title, inputs=inputs, peak_memory=peak_memory())
        while line := sys.stdin.readline():
            say(ms=_timed(model, feeds, float(json.loads(line)["seconds"])), peak_memory=peak_memory())
    except MemoryError:
        say(error="Memory ran out. Take a smaller batch.")
    except Exception as error:  # noqa: BLE001 - whatever it is, it is told to the process that asked
        say(error=" ".join(str(error).split()) or type(error).__name__)


def _timed(model: Any, feeds: Mapping[str, NDArray[Any]], seconds: float) -> list[float]:
    model.run(feeds)  # the caches are another candidate's
    times: list[float] = []
    end = time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        start = time.perf_counter()
        model.run(feeds)
        times.append((time.perf_counter() - start) * 1e3)
    return times


def _feeds(inputs: Sequence[TensorSpec], batch: int) -> dict[str, NDArray[Any]]:
    """The same arrays in every process: noise for pixels, a mask that hides nothing."""
    rng = np.random.default_rng(0)
    feeds: dict[str, NDArray[Any]] = {}
    for spec in inputs:
        shape = (batch, *(size if isinstance(size, int) else 256 for size in spec.shape[1:]))
        if spec.dtype == "uint8":
            feeds[spec.name] = rng.integers(0, 256, shape, dtype=np.uint8)
        elif spec.dtype == "bool":
            feeds[spec.name] = np.zeros(shape, dtype=bool)
        else:
            feeds[spec.name] = rng.standard_normal(shape, dtype=np.float32).astype(spec.dtype)
    return feeds


def peak_memory() -> int:
    """The most bytes that this process has held at once; 0 where the system does not tell."""
    try:
        # Not getrusage: on Linux its peak starts at what the process that started this one held at that moment.
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        return int(next(line for line in status.splitlines() if line.startswith("VmHWM:")).split()[1]) * 1024
    except (OSError, StopIteration):
        pass
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
