"""The GPU back ends on a simulated GPU: batches, memory, streams, CUDA graphs, errors and threads.

This shows what our code asks of TensorRT, ONNX Runtime and the driver, not what these answer: that is tests/gpu.
"""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxruntime", reason="the simulated libraries compute with it")

from cli.exported import EXAMPLES, copied
from engine_bundles import IMAGES, SIZES, alone, bundle_of, feed, loaded, two_sizes, with_engines
from fake_gpu import LEGACY, OUT_OF_MEMORY, FakeGpu, cpu_session, onnxruntime_module, simulated

from swin_deploy.errors import BackendError, MissingDependencyError
from swin_deploy.runtimes.dlpack import DeviceTensor
from swin_deploy.runtimes.gpu.capture_lock import CAPTURE_LOCK
from swin_deploy.runtimes.gpu.onnxruntime_cuda import MAX_GRAPHS, MAX_TRANSFERS
from swin_deploy.runtimes.gpu.tensorrt import MAX_CONTEXTS

ENGINES = ["tensorrt", "tensorrt-rtx"]
Opened = Callable[..., Any]
BACKENDS = [*ENGINES, "onnxruntime", "onnxruntime-tensorrt"]
CHECKPOINTS = EXAMPLES.parent / "tests/checkpoints/data"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeGpu]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with simulated(monkeypatch, "sm_89", "sm_86") as made:
        yield made


@pytest.fixture
def opened(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> Opened:
    """Open a bundle on the simulated GPU, with an engine where the back end runs engines."""

    def open_on_gpu(backend: str, path: Path, **options: Any) -> Any:
        profiles = options.pop("profiles", ((1, 1, 1), (1, 4, 8)))
        device = options.setdefault("device", "cuda")
        if backend in ENGINES:
            of_gpu = "sm_86" if device == "cuda:1" else "sm_89"
            with_engines(path, backend, options.get("precision", "fp32"), profiles, gpu=of_gpu)
        else:
            monkeypatch.setitem(sys.modules, "onnxruntime", onnxruntime_module(gpu))
        return loaded(path, backend, **options)

    return open_on_gpu


def split(path: Path, images: np.ndarray, most: int, graph: str = "onnx/model.onnx") -> bytes:
    return b"".join(alone(path, images[start : start + most], graph) for start in range(0, len(images), most))


@pytest.mark.parametrize("precision", [pytest.param("fp32", marks=pytest.mark.slow), "fp16"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_answers_to_the_bit(backend: str, precision: str, gpu: FakeGpu, tmp_path: Path, opened: Opened) -> None:
    """Many batch sizes, up and down, so that graphs are captured, launched and evicted; `out` is part of a larger array."""
    path, graph = copied(2, tmp_path / "b"), "onnx/model.onnx" if precision == "fp32" else "onnx/model_fp16.onnx"
    most = 8 if backend in ENGINES else 24
    with opened(backend, path, precision=precision) as model:
        told = model.describe()
        assert (told.backend, told.device, told.precision) == (backend, "cuda:0", precision)
        for batch in (*range(1, 20), *range(19, 0, -3)):
            images = IMAGES[24 - batch :]
            expected = split(path, images, most, graph)
            for _ in range(2):
                assert model.run(feed(images))["logits"].tobytes() == expected
            part = np.full((batch + 2, 10), np.nan, np.float32)
            out = {"logits": part[1:-1]}
            assert model.run(feed(images), out) is out
            assert part[1:-1].tobytes() == expected
            assert np.isnan(part[[0, -1]]).all()
    if backend == "onnxruntime":
        assert gpu.runs["captured"] == MAX_GRAPHS
        assert gpu.sessions[0]["CUDAExecutionProvider"]["use_tf32"] == "0"
    if backend in ("tensorrt", "onnxruntime"):
        assert gpu.runs["launched"] > gpu.runs["plain"]
    if backend == "onnxruntime-tensorrt":
        assert list(gpu.sessions[0]) == ["TensorrtExecutionProvider", "CUDAExecutionProvider"]


@pytest.mark.parametrize("backend", ENGINES)
def test_a_small_batch_is_padded_with_its_last_image(backend: str, gpu: FakeGpu, tmp_path: Path, opened: Opened) -> None:
    path = copied(1, tmp_path / "b")
    with opened(backend, path, profiles=((4, 4, 6),)) as model:
        for batch in (1, 3, 7, 8):
            expected = b""
            for part in (IMAGES[: min(batch, 6)], IMAGES[6:batch]):
                padded = np.concatenate([part, *[part[-1:]] * max(0, 4 - len(part))]) if len(part) else part
                expected += alone(path, padded)[: len(part) * 40] if len(part) else b""
            assert model.run(feed(IMAGES[:batch]))["logits"].tobytes() == expected


@pytest.mark.parametrize("kind", ["attentions", "frames", "mask"])
@pytest.mark.parametrize("backend", ["tensorrt", "onnxruntime"])
def test_other_inputs_and_outputs(backend: str, kind: str, gpu: FakeGpu, tmp_path: Path, opened: Opened) -> None:
    """Outputs with a row for each window, frames of bytes, a second input of bools, padded, exact and split; the second GPU."""
    masked = ("--weights", str(CHECKPOINTS / "hf523__SwinForMaskedImageModeling__basic"), "--task", "masked-image-modeling")
    attentions = ("--task", "feature-extraction", "--output-attentions")
    options = {"attentions": attentions, "frames": ("--embed-preprocess",), "mask": masked}[kind]
    path, random = bundle_of(tmp_path / "b", *options), np.random.default_rng(2)
    with opened(backend, path, profiles=((2, 2, 4),), device="cuda:1") as model:
        assert model.describe().device == "cuda:1"
        assert [*gpu.retained.elements()] == [1]
        assert {given["CUDAExecutionProvider"]["device_id"] for given in gpu.sessions} <= {"1"}
        for batch in (1, 2, 5):
            feeds = {}
            for spec in model.inputs:
                values = random.integers(0, 256, (batch, *spec.shape[1:])).astype(np.uint8)
                feeds[spec.name] = values % 2 == 0 if spec.dtype == "bool" else values.astype(spec.dtype)
            names = [spec.name for spec in model.outputs]
            found = model.run(feeds)
            for name, array in zip(names, cpu_session(str(path / "onnx/model.onnx")).run(names, feeds), strict=True):
                assert np.allclose(found[name], array, atol=1e-4), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_many_threads_get_the_answers_of_one(backend: str, gpu: FakeGpu, tmp_path: Path, opened: Opened) -> None:
    """Two image sizes and four batch sizes, from the first call on, so that others run while one captures."""
    path, random = two_sizes(tmp_path / "b"), np.random.default_rng(1)
    graphs = dict(zip(SIZES, ("onnx/model.onnx", "onnx/model_16x24.onnx"), strict=True))
    jobs = [
        (images := random.standard_normal((batch, 3, *size)).astype(np.float32), split(path, images, 8, graphs[size]))
        for size in SIZES
        for batch in (1, 2, 3, 8)
    ] * 20
    with opened(backend, path) as model, ThreadPoolExecutor(8) as threads:
        found = threads.map(lambda job: model.run(feed(job[0]))["logits"].tobytes() == job[1], jobs)
        assert all(found)


@pytest.mark.parametrize("backend", ["tensorrt", "onnxruntime"])
def test_warm_calls_allocate_nothing(backend: str, gpu: FakeGpu, tmp_path: Path, opened: Opened) -> None:
    path = copied(2, tmp_path / "b")
    with opened(backend, path) as model:
        model.warm_up(4)
        plain = gpu.runs["plain"]
        gpu.refuse = dict.fromkeys(("cuMemAlloc", "cuMemHostAlloc", "cuStreamCreate", "cuEventCreate"), OUT_OF_MEMORY)
        for turn in range(5):
            images = IMAGES[turn : turn + 4]
            assert model.run(feed(images))["logits"].tobytes() == alone(path, images)
        assert gpu.runs["plain"] == plain


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_failed_call_leaves_the_model_usable(backend: str, gpu: FakeGpu, tmp_path: Path, opened: Opened) -> None:
    """Whether the library or the driver fails; what the call used is freed."""
    path, images = copied(1, tmp_path / "b"), IMAGES[:9]
    with opened(backend, path) as model:
        expected = model.run(feed(images))["logits"].tobytes()
        gpu.fail = "Error Code 2:\n  out of memory."
        for gpu.raising in (False, True):
            for _ in range(MAX_CONTEXTS + 2):
                with pytest.raises(BackendError, match=r"failed while running the model: .*Error Code 2: out of memory"):
                    model.run(feed(images))
        gpu.fail = ""
        for function in ("cuMemcpyAsync", "cuStreamSynchronize"):
            gpu.refuse[function] = OUT_OF_MEMORY
            with pytest.raises(BackendError, match=rf"{function} failed on cuda:0: CUDA_ERROR_OUT_OF_MEMORY \(out of memory\)"):
                model.run(feed(images))
            gpu.refuse.clear()
        assert model.run(feed(images))["logits"].tobytes() == expected


def test_a_gpu_without_memory_for_more_contexts(gpu: FakeGpu, tmp_path: Path, opened: Opened) -> None:
    """A thread that finds no memory for another context waits for one of those that exist."""
    path, batches = copied(1, tmp_path / "b"), [8, 8, 8, 1, 1, 8, 8, 1] * 4
    with opened("tensorrt", path, profiles=((1, 8, 8),)) as model, ThreadPoolExecutor(6) as threads:
        model.run(feed(IMAGES[:8]))
        gpu.refuse["cuMemAlloc"] = OUT_OF_MEMORY
        answers = threads.map(lambda batch: model.run(feed(IMAGES[:batch]))["logits"].tobytes(), batches)
        assert [*answers] == [alone(path, IMAGES[:batch]) for batch in batches]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_refused_capture_falls_back_to_plain_runs(
    backend: str, gpu: FakeGpu, tmp_path: Path, opened: Opened, caplog: pytest.LogCaptureFixture
) -> None:
    """A call that fails for another reason before does not count."""
    path = copied(1, tmp_path / "b")
    with opened(backend, path) as model:
        gpu.fail = "out of memory"
        with pytest.raises(BackendError, match="out of memory"):
            model.run(feed(IMAGES[:2]))
        gpu.fail, gpu.uncapturable = "", True
        for _ in range(6):
            for batch in (2, 5):
                assert model.run(feed(IMAGES[:batch]))["logits"].tobytes() == alone(path, IMAGES[:batch])
        assert gpu.runs["launched"] == 0
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    expected = {
        "tensorrt": ["CUDA graph cannot be captured for a batch of 2", "CUDA graph cannot be captured for a batch of 5"],
        "tensorrt-rtx": ["without CUDA graphs from now on: it did not run: the graph could not be captured"],
        "onnxruntime": ["without CUDA graphs from now on: CUDA failure 900"],
        "onnxruntime-tensorrt": [],
    }[backend]
    assert len(warnings) == len(expected)
    assert all(part in line for part, line in zip(expected, warnings, strict=True))


def test_a_capture_that_another_thread_spoils_is_tried_again(gpu: FakeGpu, tmp_path: Path, opened: Opened) -> None:
    path = copied(1, tmp_path / "b")
    with opened("tensorrt", path) as model:
        for refused, calls in (("cuStreamBeginCapture", 2), ("cuGraphInstantiate", 1), ("", 2)):
            gpu.refuse = {refused: OUT_OF_MEMORY}
            for _ in range(calls):
                assert model.run(feed(IMAGES[:4]))["logits"].tobytes() == alone(path, IMAGES[:4])
        assert gpu.runs["launched"] == 2


@pytest.mark.parametrize("wrong", ["graphs_allowed", "wrong_graphs", "an old release"])
def test_onnxruntime_without_usable_graphs(
    wrong: str, gpu: FakeGpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = copied(2, tmp_path / "b")
    caplog.clear()  # of what the export said
    caplog.set_level("INFO", "swin_deploy")
    monkeypatch.setitem(sys.modules, "onnxruntime", onnxruntime_module(gpu))
    if wrong == "an old release":  # whose graphs read memory that another batch size has replaced
        monkeypatch.setattr(sys.modules["onnxruntime"], "__version__", "1.30.2")
    else:
        setattr(gpu, wrong, wrong == "wrong_graphs")
    with loaded(path, "onnxruntime", device="cuda") as model:
        for batch in (2, 1, 2, 3):
            assert model.run(feed(IMAGES[:batch]))["logits"].tobytes() == alone(path, IMAGES[:batch])
    assert "enable_cuda_graph" not in gpu.sessions[-1]["CUDAExecutionProvider"]
    expected = {"graphs_allowed": "cannot use the graph capture", "wrong_graphs": "different outputs"}.get(wrong, "")
    assert expected in " ".join(caplog.messages)
    assert len(caplog.messages) == bool(expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_closing_waits_for_calls_in_flight(backend: str, gpu: FakeGpu, tmp_path: Path, opened: Opened) -> None:
    path, inside, closing = copied(1, tmp_path / "b"), threading.Event(), threading.Event()
    model = opened(backend, path)
    model.run(feed(IMAGES[:4]))

    def hold(name: str) -> None:
        if name == "cuStreamSynchronize":
            inside.set()
            closing.wait()

    gpu.on_call = hold
    with ThreadPoolExecutor(2) as threads:
        running = threads.submit(model.run, feed(IMAGES[:4]))
        inside.wait()
        closed = threads.submit(model.close)
        assert not closed.done()
        closing.set()
        assert running.result()["logits"].tobytes() == alone(path, IMAGES[:4])
        closed.result()
    model.close()
    assert gpu.left == []
    with pytest.raises(BackendError, match="This model is closed"):
        model.run(feed(IMAGES[:4]))


@pytest.mark.parametrize("where", ["cuMemcpyAsync", "cuStreamSynchronize", "the computing thread"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_interrupted_call_leaves_the_model_usable(
    backend: str, where: str, gpu: FakeGpu, tmp_path: Path, opened: Opened
) -> None:
    """Ctrl-C arrives in a call of the driver, or while the caller waits for the thread that computes."""
    path, caller = copied(2, tmp_path / "b"), threading.current_thread()
    model = opened(backend, path)
    model.run(feed(IMAGES[:3]))

    def interrupt(*arguments: Any) -> None:
        if threading.current_thread() is caller and arguments[0] in (where, waited):
            gpu.on_call = lambda name: None
            patch.undo()
            raise KeyboardInterrupt

    for _ in range(2):
        waited: Any = None
        with pytest.MonkeyPatch.context() as patch:
            gpu.on_call = interrupt
            if where == "the computing thread":
                if backend in ENGINES:
                    break

                def result(future: Future[Any]) -> None:
                    nonlocal waited
                    waited = future
                    interrupt(future)

                patch.setattr(Future, "result", result)
            with pytest.raises(KeyboardInterrupt):
                model.run(feed(IMAGES[:3]))
        assert model.run(feed(IMAGES[:2]))["logits"].tobytes() == alone(path, IMAGES[:2])
    model.close()
    assert gpu.left == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_model_that_nobody_closes_is_freed(
    backend: str, gpu: FakeGpu, tmp_path: Path, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its last reference; ONNX Runtime's in the thread that computes."""
    driver, released = sys.modules["cuda.bindings"].driver, threading.Event()
    model = opened(backend, copied(1, tmp_path / "b"))
    model.run(feed(IMAGES[:2]))
    release = driver.cuDevicePrimaryCtxRelease

    def releasing(device: int) -> Any:
        found = release(device)
        released.set()
        return found

    monkeypatch.setattr(driver, "cuDevicePrimaryCtxRelease", releasing)
    del model
    gc.collect()
    released.wait()
    assert gpu.left == []


def test_nothing_is_allocated_while_onnxruntime_captures(gpu: FakeGpu, tmp_path: Path, opened: Opened) -> None:
    """A warm call goes on; a call that allocates waits."""
    path, waiting = copied(1, tmp_path / "b"), threading.Event()
    with opened("tensorrt", path) as model, ThreadPoolExecutor(1) as threads:
        model.warm_up(1)
        with CAPTURE_LOCK.exclusive():
            held = list(gpu.held)
            cold = threads.submit(lambda: (waiting.set(), model.run(feed(IMAGES[:5]))["logits"].tobytes())[1])
            waiting.wait()
            assert model.run(feed(IMAGES[:1]))["logits"].tobytes() == alone(path, IMAGES[:1])
            assert list(gpu.held) == held
        assert cold.result() == alone(path, IMAGES[:5])


def test_nobody_waits_for_a_session_that_is_created(gpu: FakeGpu, tmp_path: Path, opened: Opened) -> None:
    """A batch size that is new meanwhile runs without a graph, and gets one later."""
    path = copied(2, tmp_path / "b")
    with opened("onnxruntime", path) as model:
        with CAPTURE_LOCK.shared(long=True):
            assert model.run(feed(IMAGES[:2]))["logits"].tobytes() == alone(path, IMAGES[:2])
            assert gpu.runs["captured"] == 0
        assert model.run(feed(IMAGES[:2]))["logits"].tobytes() == alone(path, IMAGES[:2])
        assert gpu.runs["captured"] == 1


def tensor(gpu: FakeGpu, images: np.ndarray, offset: int = 0) -> tuple[DeviceTensor, int]:
    """A tensor of the application's in GPU memory, `offset` bytes after an aligned address; and what to free."""
    start = gpu.allocate(images.nbytes + offset)
    gpu.array(start + offset, images.shape, images.dtype)[...] = images
    return DeviceTensor("cuda:0", images.dtype, images.shape, start + offset, None), start


@pytest.mark.parametrize("backend", BACKENDS)
def test_tensors_on_the_gpu(backend: str, gpu: FakeGpu, tmp_path: Path, opened: Opened) -> None:
    """In place, unaligned, padded, at another address each time, and written just before by the default stream."""
    path = copied(1, tmp_path / "b")
    with opened(backend, path, profiles=((2, 4, 8),)) as model:
        held = []
        for images, offset in [(IMAGES[:4], 0), (IMAGES[:4], 64), *((IMAGES[turn : turn + 4], 0) for turn in range(5))]:
            found, start = tensor(gpu, np.zeros_like(images), offset)
            write = lambda found=found, images=images: np.copyto(gpu.array(found.pointer, images.shape, np.float32), images)  # noqa: E731
            gpu.held[LEGACY].work.append(write)
            for _ in range(2):
                assert model.run(feed(found))["logits"].tobytes() == alone(path, np.ascontiguousarray(images))
            held.append(start)
        if backend in ENGINES:
            single, start = tensor(gpu, IMAGES[:1])
            held.append(start)
            assert model.run(feed(single))["logits"].tobytes() == alone(path, np.repeat(IMAGES[:1], 2, 0))[:40]
        assert model.run(feed(IMAGES[:4]))["logits"].tobytes() == alone(path, IMAGES[:4])
    for start in held:
        del gpu.held[start]


def test_a_tensor_at_a_fixed_address_is_read_in_place(gpu: FakeGpu, tmp_path: Path, opened: Opened) -> None:
    path, called = copied(1, tmp_path / "b"), []
    with opened("tensorrt", path) as model:
        found, start = tensor(gpu, IMAGES[:4])
        gpu.on_call = called.append
        for _ in range(4):
            assert model.run(feed(found))["logits"].tobytes() == alone(path, IMAGES[:4])
    assert called.count("cuMemcpyAsync") == 4  # the outputs
    del gpu.held[start]


def test_what_onnxruntime_lacks(gpu: FakeGpu, tmp_path: Path, opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    path = copied(2, tmp_path / "b")
    gpu.starts = False
    with pytest.raises(BackendError, match=r"could not start its CUDAExecutionProvider.*libcudnn\.so\.9.*pip install"):
        opened("onnxruntime", path)
    gpu.fail = "Protobuf parsing failed."
    with pytest.raises(BackendError, match=r"cannot load .*model\.onnx: Protobuf parsing failed"):
        opened("onnxruntime", path)
    monkeypatch.setattr(sys.modules["onnxruntime"], "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(MissingDependencyError, match=r'has no CUDAExecutionProvider.*pip install "swin-deploy\[gpu\]"'):
        loaded(path, "onnxruntime", device="cuda")


def test_more_calls_than_buffers(gpu: FakeGpu, tmp_path: Path, opened: Opened) -> None:
    """Memory for larger batches comes after the calls that use what there is; and two models capture in turn."""
    first, second = copied(1, tmp_path / "a"), copied(2, tmp_path / "b")
    with opened("onnxruntime", first) as one, loaded(second, "onnxruntime", device="cuda") as two:
        jobs = [(model, path, 1 + number % 12) for number in range(48) for model, path in ((one, first), (two, second))]
        with ThreadPoolExecutor(2 * MAX_TRANSFERS + 2) as threads:
            found = threads.map(lambda job: job[0].run(feed(IMAGES[: job[2]]))["logits"].tobytes(), jobs)
            assert [*found] == [alone(path, IMAGES[:batch]) for _, path, batch in jobs]
