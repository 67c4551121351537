"""Interrupts at every point where Python handles signals: later calls answer, and nothing stays taken, locked or running."""

from __future__ import annotations

import importlib.util
import itertools
import multiprocessing
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import pytest
from cli.exported import digits
from interrupted import interrupts

import swin_deploy
from swin_deploy.bundle import TensorSpec
from swin_deploy.errors import BackendError
from swin_deploy.runtimes.base import Pool, Runtime
from swin_deploy.runtimes.gpu.capture_lock import ReadersWriterLock
from swin_deploy.runtimes.gpu.contexts import ContextPool
from swin_deploy.runtimes.pipeline import pipelined

FEED = {"x": np.ones((2, 3), np.float32)}


class Doubler(Runtime):
    """A back end in Python with a pool of one object."""

    def __init__(self) -> None:
        specs = [TensorSpec(name, "float32", ("batch", 3)) for name in ("x", "y")]
        super().__init__("doubler 1.0", (specs[0],), (specs[1],))
        self.pool: Any = Pool(list, 1)
        self.on_run: Any = lambda: None

    def _run(self, feeds: dict[str, Any], out: Mapping[str, Any] | None) -> Mapping[str, Any]:
        assert out is not None
        self.pool.use(self._double, feeds["x"], out["y"])
        return out

    def _double(self, item: list[int], x: np.ndarray, y: np.ndarray) -> None:
        assert not item  # nobody else uses it
        item.append(0)
        self.on_run()
        np.multiply(x, 2, out=y)
        item.clear()

    def _close(self) -> None:
        self.pool = None


def test_a_call_at_every_point() -> None:
    runtime = Doubler()
    with interrupts() as interrupt:
        for point in itertools.count(1):
            reached = interrupt(lambda: runtime.run(FEED), point)
            assert not runtime._calls
            assert runtime.pool._places.count_free() == 1
            assert np.array_equal(runtime.run(FEED)["y"], 2 * FEED["x"])
            if not reached:
                break
    assert point > 20


def test_closing_at_every_point() -> None:
    """After an interrupted close, a call is refused or answers, and another close frees everything."""
    with interrupts() as interrupt:
        for point in itertools.count(1):
            runtime = Doubler()
            reached = interrupt(runtime.close, point)
            try:
                runtime.run(FEED)
            except BackendError as error:
                assert "closed" in str(error)  # noqa: PT017
            runtime.close()
            assert runtime.pool is None
            if not reached:
                break


def test_closed_by_a_handler_inside_a_call() -> None:
    """It cannot wait for the call that it interrupted, whose end frees the resources; others wait as usual."""
    runtime = Doubler()
    runtime.on_run = runtime.close
    assert np.array_equal(runtime.run(FEED)["y"], 2 * FEED["x"])
    assert runtime.pool is None
    with pytest.raises(BackendError, match="This model is closed"):
        runtime.run(FEED)


class Camera(Iterator[int]):
    """Four frames."""

    def __init__(self) -> None:
        self.left = 4

    def __next__(self) -> int:
        if not self.left:
            raise StopIteration
        self.left -= 1
        return self.left


def end_threads() -> None:
    """Wait for the threads of what was interrupted."""
    for thread in threading.enumerate():
        if thread.name.startswith("swin-deploy"):
            thread.join()


def test_a_stream_at_every_point() -> None:
    """Its threads end, which frees the camera."""
    runtime, made = Doubler(), []

    def consume(freed: Any) -> None:
        camera = Camera()
        made.append(weakref.ref(camera, freed))
        stream = pipelined(camera, 1, 1, list, lambda feeds, count: [runtime.run(FEED)] * count)
        del camera
        for _ in stream:
            pass

    with interrupts() as interrupt:
        for point in itertools.count(1):
            freed: SimpleQueue[object] = SimpleQueue()
            reached = interrupt(partial(consume, freed.put), point)
            if made:
                freed.get()
            made.clear()
            end_threads()
            assert np.array_equal(runtime.run(FEED)["y"], 2 * FEED["x"])
            if not reached:
                break
    assert point > 20


@pytest.mark.parametrize(("backend", "step"), [("onnxruntime", 499), ("openvino", 1499)])
def test_loading_at_many_points(backend: str, step: int) -> None:
    """A later load answers. The handler runs at several thousand points of a load."""
    pytest.importorskip(backend, reason=f"{backend} is not installed")
    feeds = {"pixel_values": np.ones((1, 3, 32, 32), np.float32)}

    def load() -> np.ndarray:
        with swin_deploy.load(digits(2), backend=backend, precision="fp32", threads=1, device="cpu") as model:
            return np.asarray(model.run(feeds)["logits"])

    right, before = load(), set(threading.enumerate())
    with interrupts() as interrupt:
        for point in itertools.count(1, step):
            reached = interrupt(load, point)
            assert np.array_equal(load(), right)
            end_threads()
            assert set(threading.enumerate()) <= before
            if not reached:
                break
    assert point > 3 * step


class Slot:
    """A GPU's execution context, of which one exists at a time."""

    prepared: Any = None

    def __init__(self) -> None:
        SLOTS.append(self)

    def prepare(self, profile: int, batch: int) -> None:
        self.prepared = (profile, batch)

    def free(self) -> None:
        SLOTS.remove(self)


SLOTS: list[Slot] = []


def test_execution_contexts_at_every_point() -> None:
    pool, batches = ContextPool(Slot, 1), itertools.cycle((1, 2, 2))  # type: ignore[arg-type]
    with interrupts() as interrupt:
        for point in itertools.count(1):
            batch = next(batches)
            reached = interrupt(lambda batch=batch: pool.use(0, batch, lambda slot: None), point)  # type: ignore[misc]
            assert not pool._used
            assert pool._places.count_free() == 1
            pool.use(0, batch, lambda slot: None)
            if not reached:
                break


def test_the_lock_of_captures_at_every_point() -> None:
    lock, inside = ReadersWriterLock(), []

    def write() -> None:
        with lock.exclusive() as alone:
            inside.append(alone)

    def read(long: bool) -> None:
        with lock.shared(long):
            pass

    with interrupts() as interrupt:
        for point in itertools.count(1):
            reached = interrupt(lambda point=point: read(point % 2 == 0), point)  # type: ignore[misc]
            writer = threading.Thread(target=write)
            writer.start()
            writer.join()
            if not reached:
                break
    assert inside == [True] * point


FORKS = """
import gc, os, sys
from pathlib import Path
from swin_deploy.errors import BackendError
from swin_deploy.runtimes.backends import runtime_from_onnx
import numpy as np

feed = {"x": np.ones((1, 4), np.float32)}
def loaded(backend):
    runtime = runtime_from_onnx(Path(sys.argv[1]), backend, threads)
    runtime.run(feed)
    return runtime

def closes(runtime): runtime.close()
def exits(runtime): pass
def drops(runtime): del runtime; gc.collect()
def runs(runtime):
    try:
        runtime.run(feed)
    except BackendError as error:
        assert "in its fork" in str(error) and 'Load it in each process' in str(error), error
    else:
        raise AssertionError
def loads(runtime):
    if backend == "torch":
        try:
            loaded(backend)
        except BackendError as error:
            assert "Call torch.set_num_threads(1) first" in str(error)
        import torch
        torch.set_num_threads(1)
    loaded(backend).close()

for name in sys.argv[2:]:
    backend, _, threads = name.partition(":")
    threads = int(threads)
    runtime = loaded(backend)
    for act in (closes, exits, drops, runs, loads):
        child = os.fork()
        if not child:
            act(runtime)
            if act is drops:
                del runtime
                gc.collect()
            sys.exit(0)
        print(name, act.__name__, os.waitpid(child, 0)[1], flush=True)
    runtime.run(feed)
    runtime.close()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_forks_of_loaded_models(tmp_path: Path) -> None:
    """Every back end with several threads and with one: the fork closes, exits, drops, runs, or loads again."""
    onnx = pytest.importorskip("onnx", reason="writes the graph")
    ends = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", 4]) for name in ("x", "y")]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "relu", ends[:1], ends[1:])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=9)
    onnx.save(model, tmp_path / "relu.onnx")
    cases = [f"onnxruntime:{threads}" for threads in (0, 1, 2)]
    cases += [case for case in ("openvino:2", "torch:0") if importlib.util.find_spec(case.partition(":")[0])]
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, "-c", FORKS, tmp_path / "relu.onnx", *cases],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    acts = ("closes", "exits", "drops", "runs", "loads")
    assert done.stdout.splitlines() == [f"{case} {act} 0" for case in cases for act in acts], done.stderr


PROCESSES = """
import multiprocessing, sys
from concurrent.futures import ProcessPoolExecutor
import numpy as np
import swin_deploy
from swin_deploy.errors import BackendError

def load(bundle):
    return swin_deploy.load(bundle, backend="onnxruntime", precision="fp32", threads=2)

def begin(bundle):
    global model
    model = load(bundle)

def answer(feeds, given=None):
    return (given or model).run(feeds)["logits"]

def answer_into(queue, *arguments):
    try:
        queue.put(answer(*arguments))
    except BackendError as error:
        queue.put(str(error))

if __name__ == "__main__":
    method, bundle = sys.argv[1:]
    context = multiprocessing.get_context(method)
    with load(bundle) as loaded:
        feeds = {"pixel_values": np.ones((1, 3, 32, 32), np.float32)}
        right = loaded.run(feeds)["logits"]
        with ProcessPoolExecutor(1, context, begin, (bundle,)) as pool:
            print("initializer", np.array_equal(pool.submit(answer, feeds).result(), right))
            print("pickled", np.array_equal(pool.submit(answer, feeds, loaded).result(), right))
        queue = context.SimpleQueue()
        process = context.Process(target=answer_into, args=(queue, feeds, loaded))
        process.start()
        found = queue.get()
        process.join()
        print("argument", "in its fork" in found if method == "fork" else np.array_equal(found, right), process.exitcode)
        print("parent", np.array_equal(loaded.run(feeds)["logits"], right))
"""


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_processes_of_multiprocessing(method: str, tmp_path: Path) -> None:
    """Each loads the model in its initializer, receives it pickled, or as an argument, which only a fork must not run."""
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system has no {method}")
    (tmp_path / "processes.py").write_text(PROCESSES)
    command = [sys.executable, tmp_path / "processes.py", method, digits(2)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["initializer True", "pickled True", "argument True 0", "parent True"], done.stderr
