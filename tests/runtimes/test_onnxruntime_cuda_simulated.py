"""ONNX Runtime on a simulated GPU: our own arithmetic of memory, streams, CUDA graphs and threads.

This shows what our code asks of ONNX Runtime and of the driver, not what these answer: that is
tests/gpu/test_onnxruntime_cuda.py.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import shutil
import signal
import sys
import threading
import time
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxruntime", reason="the simulated one computes with it")

from cli.exported import EXAMPLES, copied, digits, exported, one_block
from fake_driver import LEGACY, OUT_OF_MEMORY
from fake_onnxruntime import module
from simulated import IMAGES, SIZES, alone, feed, simulated, two_sizes

import swin_deploy
from swin_deploy.errors import BackendError, MissingDependencyError
from swin_deploy.runtimes import base
from swin_deploy.runtimes.dlpack import DeviceTensor
from swin_deploy.runtimes.gpu.gpu_thread import Job
from swin_deploy.runtimes.gpu.onnxruntime_cuda import MOST_CALLS, MOST_GRAPHS

CHECKPOINTS = EXAMPLES.parent / "tests/checkpoints/data"


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    with simulated(monkeypatch, "sm_89", "sm_89") as made:
        fake = module(made)
        monkeypatch.setitem(sys.modules, "onnxruntime", fake)
        made.ort = fake.world  # type: ignore[attr-defined]
        yield made
        gc.collect()
        assert len(fake.world.alive) == 0


def loaded(path: Path, **options: Any) -> Any:
    return swin_deploy.load(path, **{"backend": "onnxruntime", "precision": "fp32", "device": "cuda", **options})


def on_gpu(driver: Any, array: np.ndarray) -> DeviceTensor:
    """The array in memory of the simulated GPU, where it comes with what is in the default stream."""
    memory = (ctypes.c_uint8 * array.nbytes)()
    address = ctypes.addressof(memory)
    driver.device[address] = memory
    source = array.tobytes()
    driver.streams[LEGACY].work.append(lambda: ctypes.memmove(address, source, len(source)))
    return DeviceTensor("cuda:0", array.dtype, array.shape, address, memory)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_answers_to_the_bit(precision: str, driver: Any) -> None:
    """More batch sizes than there are graphs, up and down; `out` as part of a larger array; a GPU that is early and late."""
    path = digits(2)
    graph = "onnx/model.onnx" if precision == "fp32" else "onnx/model_fp16.onnx"
    with loaded(path, precision=precision) as model:
        told = model.describe()
        assert (told.backend, told.device, told.precision) == ("onnxruntime", "cuda:0", precision)
        for batch in (*range(1, 20), *range(19, 0, -1)):
            images = IMAGES[:batch]
            wanted = alone(path, images, graph)
            for driver.ort.hasty in (False, True):
                others = -images if driver.ort.hasty else images
                assert model.run(feed(others))["logits"].tobytes() == alone(path, others, graph).tobytes()
            part = np.full((batch + 2, 10), np.nan, np.float32)
            out = {"logits": part[1:-1]}
            assert model.run(feed(images), out) is out
            assert part[1:-1].tobytes() == wanted.tobytes()
            assert np.isnan(part[[0, -1]]).all()
        assert driver.ort.captured == MOST_GRAPHS
        [given] = driver.ort.opened
        assert given["CUDAExecutionProvider"]["enable_cuda_graph"] == "1"
        assert given["CUDAExecutionProvider"]["use_tf32"] == "0"


def test_more_inputs_and_outputs(driver: Any) -> None:
    options = ("--weights", str(CHECKPOINTS / "hf523__SwinForMaskedImageModeling__basic"), "--task", "masked-image-modeling")
    [path] = [path for path in exported(*options).iterdir() if path.is_dir()]
    with loaded(path, device="cpu") as cpu, loaded(path) as model:
        mask = np.random.default_rng(0).random((3, int(cpu.inputs[1].shape[1]))) < 0.5
        feeds = {"pixel_values": IMAGES[:3], "bool_masked_pos": mask}
        assert model.run(feeds)["reconstruction"].tobytes() == cpu.run(feeds)["reconstruction"].tobytes()


def test_tensors_on_the_gpu(driver: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read after what is in the default stream, and copied there and not through this side."""
    path = digits(2)
    monkeypatch.setattr(base, "from_dlpack", lambda spec, value, device: value)
    with loaded(path) as model:
        wanted = alone(path, IMAGES[:3]).tobytes()
        for _ in range(4):
            before = driver.counts["cuMemcpyHtoDAsync_v2"]
            tensor = on_gpu(driver, IMAGES[:3])
            assert model.run(feed(tensor))["logits"].tobytes() == wanted
            assert driver.counts["cuMemcpyHtoDAsync_v2"] == before
            del driver.device[tensor.pointer]


def test_a_warm_call_makes_nothing_and_launches_a_graph(driver: Any) -> None:
    path = digits(2)
    with loaded(path) as model:
        out = {name: np.empty_like(array) for name, array in model.run(feed(IMAGES[:2])).items()}
        model.run(feed(IMAGES[:2]), out)
        names = ("cuMemAlloc_v2", "cuMemHostAlloc", "cuStreamCreate", "cuEventCreate", "cuMemFree_v2")
        before = [driver.counts[name] for name in names]
        seen = driver.ort.plain, driver.ort.captured, driver.ort.replayed
        tracemalloc.start()
        for _ in range(20):
            model.run(feed(IMAGES[:2]), out)
        gc.collect()
        first = tracemalloc.get_traced_memory()[0]
        for _ in range(200):
            model.run(feed(IMAGES[:2]), out)
        gc.collect()
        last = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        assert last - first < 20_000
        assert [driver.counts[name] for name in names] == before
        assert (driver.ort.plain, driver.ort.captured, driver.ort.replayed) == (seen[0], seen[1], seen[2] + 220)


def test_threads(driver: Any, tmp_path: Path) -> None:
    """Sizes and batches mixed, from the first call on, so that others run while one captures."""
    path = two_sizes(tmp_path / "b")
    images = {size: np.random.default_rng(0).standard_normal((6, 3, *size)).astype(np.float32) for size in SIZES}
    jobs = [(size, batch) for size in SIZES for batch in (1, 3, 6)] * 40
    with loaded(path, device="cpu", threads=1) as cpu:
        wanted = {job: cpu.run(feed(images[job[0]][: job[1]]))["logits"].tobytes() for job in set(jobs)}
    with loaded(path) as model, ThreadPoolExecutor(12) as threads:
        found = threads.map(lambda job: model.run(feed(images[job[0]][: job[1]]))["logits"].tobytes(), jobs)
        assert [one == wanted[job] for one, job in zip(found, jobs, strict=True)] == [True] * len(jobs)
        assert driver.ort.captured == 6
        assert len(driver.streams) - 1 <= 2 * (MOST_CALLS + 1)


def test_a_stream_of_frames(driver: Any) -> None:
    images = [EXAMPLES / f"digits/images/{digit}.png" for digit in (4, 2, 9, 0, 1, 7)]
    with loaded(digits(2)) as model:
        assert [best[0].index for best in model.stream(images * 5, batch=2)] == [4, 2, 9, 0, 1, 7] * 5


@pytest.mark.parametrize("wrong", ["graphs_allowed", "capture_fails", "stale"])
def test_without_graphs_where_they_are_of_no_use(wrong: str, driver: Any, caplog: pytest.LogCaptureFixture) -> None:
    """The same answers, from a session without graphs, and a line in the log that says why."""
    setattr(driver.ort, wrong, wrong != "graphs_allowed")
    path = digits(2)
    caplog.set_level(logging.INFO, "swin_deploy")
    with loaded(path) as model:
        for batch in (2, 1, 2, 3):
            assert model.run(feed(IMAGES[:batch]))["logits"].tobytes() == alone(path, IMAGES[:batch]).tobytes()
        assert len(driver.ort.alive) == 1
    [line] = [record.getMessage() for record in caplog.records if record.name == "swin_deploy"]
    expected = {"graphs_allowed": "cannot use the graph capture", "capture_fails": "failure 900", "stale": "other answers"}
    assert expected[wrong] in line
    assert "enable_cuda_graph" not in driver.ort.opened[-1]["CUDAExecutionProvider"]


def test_a_call_that_fails_leaves_the_model_usable(driver: Any) -> None:
    path = digits(2)
    wanted = alone(path, IMAGES[:2]).tobytes()
    with loaded(path) as model:
        for warm in (False, True):
            driver.ort.fail = "CUBLAS failure 14"
            with pytest.raises(BackendError, match=r"failed while running the model: CUBLAS failure 14"):
                model.run(feed(IMAGES[:2]))
            driver.ort.fail = ""
            if warm:
                assert model.run(feed(IMAGES[:2]))["logits"].tobytes() == wanted
        # What carried a call that failed is freed, so that each of these is called for the next one. A driver that no longer
        # waits for a stream is beyond help.
        functions = (
            "cuMemcpyHtoDAsync_v2",
            "cuMemAlloc_v2",
            "cuMemHostAlloc",
            "cuStreamCreate",
            "cuEventCreate",
            "cuStreamWaitEvent",
        )
        for function in (*functions, "cuMemcpyDtoDAsync_v2", "cuMemcpyDtoHAsync_v2"):
            driver.refuse[function] = OUT_OF_MEMORY
            with pytest.raises(BackendError, match=rf"{function}.*OUT_OF_MEMORY"):
                model.run(feed(IMAGES[:2]))
            driver.refuse.clear()
            if function not in functions:
                assert model.run(feed(IMAGES[:2]))["logits"].tobytes() == wanted
        assert model.run(feed(IMAGES[:3]))["logits"].tobytes() == alone(path, IMAGES[:3]).tobytes()


def test_a_session_that_cannot_be_opened_again(driver: Any) -> None:
    """After a capture that failed; the next call tries once more."""
    path = digits(2)
    with loaded(path) as model:
        driver.ort.capture_fails = True
        driver.refuse["cuStreamCreate"] = 0  # counted, and taken for done, with no stream
        with pytest.raises(BackendError):
            model.run(feed(IMAGES[:2]))
        driver.refuse.clear()
        assert model.run(feed(IMAGES[:2]))["logits"].tobytes() == alone(path, IMAGES[:2]).tobytes()


def test_the_second_gpu(driver: Any) -> None:
    path = digits(2)
    with loaded(path) as first, loaded(path, device="cuda:1") as second:
        assert second.describe().device == "cuda:1"
        assert [given["CUDAExecutionProvider"]["device_id"] for given in driver.ort.opened] == ["0", "1"]
        for model in (first, second):
            assert model.run(feed(IMAGES[:2]))["logits"].tobytes() == alone(path, IMAGES[:2]).tobytes()


def test_a_release_whose_graphs_are_not_safe(driver: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before 1.31 a graph may read what another batch size has replaced."""
    path = digits(2)
    monkeypatch.setattr(sys.modules["onnxruntime"], "__version__", "1.30.2")
    with loaded(path) as model:
        for batch in (1, 2, 1):
            assert model.run(feed(IMAGES[:batch]))["logits"].tobytes() == alone(path, IMAGES[:batch]).tobytes()
    assert driver.ort.captured == 0
    assert "enable_cuda_graph" not in driver.ort.opened[0]["CUDAExecutionProvider"]


def test_memory_for_larger_batches_comes_after_the_calls_that_use_what_there_is(driver: Any) -> None:
    path = digits(2)
    wanted = {batch: alone(path, IMAGES[:batch]).tobytes() for batch in range(1, 13)}
    driver.ort.graphs_allowed = False
    with loaded(path) as model, ThreadPoolExecutor(4) as threads:
        jobs = [1 + number % 12 for number in range(96)]
        found = threads.map(lambda batch: model.run(feed(IMAGES[:batch]))["logits"].tobytes(), jobs)
        assert [one == wanted[batch] for one, batch in zip(found, jobs, strict=True)] == [True] * len(jobs)


def test_nobody_waits_for_a_session_that_opens(driver: Any) -> None:
    """A batch size that is new meanwhile runs without a graph, and has one later."""
    path = digits(2)
    with loaded(path) as model:
        driver.ort.seconds_to_open = 5.0
        opening = threading.Thread(target=lambda: loaded(digits(1)).close())
        opening.start()
        while len(driver.ort.opened) < 2:
            time.sleep(0.01)
        for captured, batch in ((0, 2), (0, 2)):
            assert model.run(feed(IMAGES[:batch]))["logits"].tobytes() == alone(path, IMAGES[:batch]).tobytes()
            assert driver.ort.captured == captured
        assert opening.is_alive()
        opening.join()
        assert model.run(feed(IMAGES[:2]))["logits"].tobytes() == alone(path, IMAGES[:2]).tobytes()
        assert driver.ort.captured == 1


def test_a_call_that_is_interrupted(driver: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its memory is freed when nothing uses it any more."""
    path = digits(2)
    with loaded(path) as model:
        for _ in range(3):
            with monkeypatch.context() as patch:
                patch.setattr(Job, "wait", lambda self: signal.raise_signal(signal.SIGINT))
                with pytest.raises(KeyboardInterrupt):
                    model.run(feed(IMAGES[:3]))
            assert model.run(feed(IMAGES[:2]))["logits"].tobytes() == alone(path, IMAGES[:2]).tobytes()
        assert len(driver.streams) == 1 + 2  # the default one, the session's, and that of one call


def test_a_model_that_nobody_closed(driver: Any) -> None:
    model = loaded(digits(2))
    model.run(feed(IMAGES[:2]))
    thread = model._runtimes[model.image_sizes[0]]._thread
    del model
    gc.collect()
    thread.join()  # waits for it
    assert driver.left == []


def test_what_is_missing(driver: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    driver.ort.starts = False
    with pytest.raises(BackendError, match=r"could not start its CUDAExecutionProvider.*libcudnn\.so\.9.*pip install"):
        loaded(digits(2))
    monkeypatch.setattr(sys.modules["onnxruntime"], "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(MissingDependencyError, match=r'has no CUDAExecutionProvider.*pip install "swin-deploy\[gpu\]"'):
        loaded(digits(2))
    assert driver.left == []


def test_a_graph_that_is_none(driver: Any, tmp_path: Path) -> None:
    path = copied(2, tmp_path / "b")
    driver.ort.fail = "Protobuf parsing failed."
    with pytest.raises(BackendError, match=r"cannot load .*model\.onnx: Protobuf parsing failed"):
        loaded(path)
    driver.ort.fail = ""
    with loaded(path):
        pass
    shutil.rmtree(path)


def test_the_tensorrt_provider(driver: Any) -> None:
    """On the same stream as the CUDA provider, which takes what it does not; without graphs."""
    path = digits(1)
    with loaded(path, backend="onnxruntime-tensorrt") as model:
        for batch in (1, 3, 1):
            assert model.run(feed(IMAGES[:batch]))["logits"].tobytes() == alone(path, IMAGES[:batch]).tobytes()
        [given] = driver.ort.opened
        assert list(given) == ["TensorrtExecutionProvider", "CUDAExecutionProvider"]
        assert len({chosen["user_compute_stream"] for chosen in given.values()}) == 1
        assert driver.ort.captured == 0


def test_two_models_at_a_time(driver: Any) -> None:
    """Whichever captures does so while nobody else calls the driver."""
    one = one_block()
    [path] = [path for path in exported("--weights", str(one)).iterdir() if path.is_dir()]
    models = [loaded(digits(1)), loaded(digits(2)), loaded(path)]

    def work(number: int) -> bool:
        model, images = models[number % 3], IMAGES[: 1 + number % 4]
        size = model.image_sizes[0]
        images = np.ascontiguousarray(images[:, :, : size[0], : size[1]])
        return bool(np.isfinite(model.run(feed(images))["logits"]).all())

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(work, range(96)))
    assert driver.ort.captured == 12
    for model in models:
        model.close()
