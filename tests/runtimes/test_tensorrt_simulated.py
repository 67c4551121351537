"""The TensorRT back ends on a simulated GPU: their own arithmetic of batches, memory, streams, graphs and threads.

This shows what our code asks of TensorRT and of the driver, not what these answer: that is tests/gpu/test_tensorrt_runtime.py.
"""

from __future__ import annotations

import ctypes
import gc
import shutil
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxruntime", reason="the simulated TensorRT computes with it")

from cli.exported import EXAMPLES, copied, exported, one_block
from fake_driver import LEGACY, OUT_OF_MEMORY, FakeDriver
from fake_tensorrt import session
from simulated import IMAGES, RELEASES, SIZES, alone, feed, loaded, simulated, two_sizes, with_engines

from swin_deploy.errors import BackendError
from swin_deploy.runtimes import base
from swin_deploy.runtimes.dlpack import DeviceTensor
from swin_deploy.runtimes.gpu import contexts as lanes
from swin_deploy.runtimes.gpu import driver as cuda
from swin_deploy.runtimes.gpu import tensorrt
from swin_deploy.runtimes.gpu.contexts import CAPTURES
from swin_deploy.runtimes.gpu.tensorrt import MOST_LANES

BACKENDS = list(RELEASES)
CHECKPOINTS = EXAMPLES.parent / "tests/checkpoints/data"


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with simulated(monkeypatch) as made:
        yield made


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_answers_to_the_bit(backend: str, precision: str, driver: FakeDriver, tmp_path: Path) -> None:
    """Every batch from 1 to 11, twice over, so that graphs are captured and launched; `out` as part of a larger array."""
    path = copied(2, tmp_path / "b")
    with_engines(path, backend, precision)
    graph = "onnx/model.onnx" if precision == "fp32" else "onnx/model_fp16.onnx"
    with loaded(path, backend, precision=precision) as model:
        told = model.describe()
        assert (told.backend, told.version, told.device, told.precision) == (backend, RELEASES[backend], "cuda:0", precision)
        for batch in (*range(1, 12), *range(11, 0, -1)):
            images = IMAGES[batch : 2 * batch] if batch < 12 else IMAGES[:batch]
            parts = [alone(path, images[i : i + 8], graph) for i in range(0, batch, 8)]
            wanted = np.concatenate(parts)
            for _ in range(3):
                assert model.run(feed(images))["logits"].tobytes() == wanted.tobytes()
            part = np.full((batch + 2, 10), np.nan, np.float32)
            out = {"logits": part[1:-1]}
            assert model.run(feed(images), out) is out
            assert part[1:-1].tobytes() == wanted.tobytes()
            assert np.isnan(part[[0, -1]]).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_batch_that_is_too_small_is_filled_up_with_its_last_image(backend: str, driver: FakeDriver, tmp_path: Path) -> None:
    path = copied(1, tmp_path / "b")
    with_engines(path, backend, profiles=((4, 4, 6),))
    with loaded(path, backend) as model:
        for batch in (1, 2, 3, 7, 8):
            found = model.run(feed(IMAGES[:batch]))["logits"]
            first = min(batch, 6)
            parts = [IMAGES[:first], IMAGES[first:batch]]
            filled = [np.concatenate([part, np.repeat(part[-1:], max(0, 4 - len(part)), 0)]) for part in parts if len(part)]
            wanted = [alone(path, whole)[: len(part)] for whole, part in zip(filled, parts, strict=False)]
            assert found.tobytes() == np.concatenate(wanted).tobytes()


def test_outputs_with_more_rows_than_images(driver: FakeDriver, tmp_path: Path) -> None:
    """Attentions have a row for each window of each image; they are split, filled up and cut as the images are."""
    options = ("--weights", str(one_block()), "--task", "feature-extraction", "--output-attentions")
    [source] = [path for path in exported(*options).iterdir() if path.is_dir()]
    shutil.copytree(source, tmp_path / "b")
    with_engines(tmp_path / "b", "tensorrt", profiles=((2, 2, 3),))
    with loaded(tmp_path / "b", "tensorrt") as model, loaded(tmp_path / "b", "onnxruntime") as other:
        for batch in (1, 3, 4):
            found, wanted = model.run(feed(IMAGES[:batch])), other.run(feed(IMAGES[:batch]))
            assert found["attentions.0"].shape == (4 * batch, 2, 16, 16)
            assert all(np.allclose(found[name], wanted[name], atol=1e-5) for name in wanted)


@pytest.mark.parametrize("kind", ["frames", "mask"])
def test_other_inputs_than_prepared_pixels(kind: str, driver: FakeDriver, tmp_path: Path) -> None:
    """Frames of bytes; and a second input, of bools."""
    masked = ("--weights", str(CHECKPOINTS / "hf523__SwinForMaskedImageModeling__basic"), "--task", "masked-image-modeling")
    options = masked if kind == "mask" else ("--weights", str(one_block()), "--embed-preprocess")
    [source] = [path for path in exported(*options).iterdir() if path.is_dir()]
    shutil.copytree(source, tmp_path / "b")
    with_engines(tmp_path / "b", "tensorrt", profiles=((2, 2, 4),))
    random = np.random.default_rng(2)
    with loaded(tmp_path / "b", "tensorrt") as model:
        for batch in (1, 3, 5):  # filled up, as it is, and split
            feeds = {}
            for spec in model.inputs:
                shape = (batch, *spec.shape[1:])
                feeds[spec.name] = {
                    "uint8": lambda shape=shape: random.integers(0, 256, shape, dtype=np.uint8),
                    "bool": lambda shape=shape: random.random(shape) < 0.5,
                    "float32": lambda shape=shape: random.standard_normal(shape).astype(np.float32),
                }[spec.dtype]()
            parts = [{name: array[i : i + 4] for name, array in feeds.items()} for i in range(0, batch, 4)]
            whole = [{n: np.concatenate([a, a[-1:]]) if len(a) == 1 else a for n, a in part.items()} for part in parts]
            name = model.outputs[0].name
            run = session(str(tmp_path / "b/onnx/model.onnx")).run
            wanted = np.concatenate([run([name], one)[0] for one in whole])[:batch]
            assert model.run(feeds)[name].tobytes() == wanted.tobytes()


@pytest.mark.parametrize("backend", BACKENDS)
def test_many_threads_get_the_answers_of_one(backend: str, driver: Any, tmp_path: Path) -> None:
    path, random = two_sizes(tmp_path / "b"), np.random.default_rng(1)
    with_engines(path, backend)
    files = dict(zip(SIZES, ("onnx/model.onnx", "onnx/model_16x24.onnx"), strict=True))
    feeds = [
        (files[size], random.standard_normal((batch, 3, *size)).astype(np.float32))
        for size in SIZES
        for batch in (1, 2, 3, 8, 9)
    ]
    wanted = [
        np.concatenate([alone(path, images[i : i + 8], graph) for i in range(0, len(images), 8)]) for graph, images in feeds
    ]
    order, wrong = random.integers(0, len(feeds), 640), []

    def client(number: int) -> int:
        mine = order[number::8]
        for which in mine:
            if model.run(feed(feeds[which][1]))["logits"].tobytes() != wanted[which].tobytes():
                wrong.append(int(which))
        return len(mine)

    with loaded(path, backend) as model, ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(client, range(8))) == len(order)
        assert driver.trt[backend].world.contexts_made <= 2 * MOST_LANES
    assert wrong == []


def test_nothing_is_allocated_once_warm_and_graphs_are_captured_once(driver: Any, tmp_path: Path) -> None:
    """The first call with a batch runs plainly, the second is captured, and those after it only launch the graph."""
    path, world = copied(2, tmp_path / "b"), driver.trt["tensorrt"].world
    with_engines(path, "tensorrt")
    with loaded(path, "tensorrt") as model:
        outs = {batch: dict(model.run(feed(IMAGES[:batch]))) for batch in range(1, 9)}
        assert (world.plain_runs, world.captured_runs) == (8, 0)
        for batch, out in outs.items():
            model.run(feed(IMAGES[:batch]), out)
        assert (world.plain_runs, world.captured_runs, world.contexts_made) == (8, 8, 8)
        before = dict(driver.counts)
        for _ in range(5):
            for batch, out in outs.items():
                model.run(feed(IMAGES[:batch]), out)
                assert out["logits"].tobytes() == alone(path, IMAGES[:batch]).tobytes()
        after = {name: n - before[name] for name, n in driver.counts.items() if n != before[name]}
        assert after == {
            "cuCtxPushCurrent_v2": 40,
            "cuThreadExchangeStreamCaptureMode": 80,  # to be left alone by the captures of others, and back
            "cuMemcpyHtoDAsync_v2": 40,
            "cuGraphLaunch": 40,
            "cuMemcpyDtoHAsync_v2": 40,
            "cuStreamSynchronize": 40,
            "cuCtxPopCurrent_v2": 40,
        }
        assert (world.plain_runs, world.captured_runs, world.contexts_made) == (8, 8, 8)


def test_more_batch_sizes_than_lanes(driver: Any, tmp_path: Path) -> None:
    """The lane that nobody has used for longest is made ready for another batch; its graph goes, and no answer is of it."""
    path, world = copied(1, tmp_path / "b"), driver.trt["tensorrt"].world
    with_engines(path, "tensorrt", profiles=((1, 8, 16),))
    with loaded(path, "tensorrt") as model:
        for _ in range(3):
            for batch in range(1, 13):
                for _ in range(3):
                    assert model.run(feed(IMAGES[:batch]))["logits"].tobytes() == alone(path, IMAGES[:batch]).tobytes()
        assert world.contexts_made == MOST_LANES
        assert len(driver.launchable) <= MOST_LANES


def test_warm_calls_keep_nothing(driver: FakeDriver, tmp_path: Path) -> None:
    path = copied(1, tmp_path / "b")
    with_engines(path, "tensorrt")
    with loaded(path, "tensorrt") as model:
        out = dict(model.run(feed(IMAGES[:3])))
        for _ in range(50):
            model.run(feed(IMAGES[:3]), out)
        tracemalloc.start()
        try:
            held = []
            for _ in range(2):
                for _ in range(300):
                    model.run(feed(IMAGES[:3]), out)
                gc.collect()
                ours = [tracemalloc.Filter(True, str(one.__file__)) for one in (base, cuda, lanes, tensorrt)]
                traces = tracemalloc.take_snapshot().filter_traces(ours).statistics("filename")
                held.append(sum(trace.size for trace in traces))
        finally:
            tracemalloc.stop()
        assert held[1] - held[0] < 1000  # three bytes a call; what the double keeps does not count


@pytest.mark.parametrize(
    "refused", ["", "cuStreamBeginCapture_v2", "cuGraphInstantiateWithFlags"], ids=lambda name: name or "engine"
)
def test_what_cannot_be_captured_is_run_plainly(
    refused: str, driver: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, world = copied(1, tmp_path / "b"), driver.trt["tensorrt"].world
    with_engines(path, "tensorrt")
    if refused:
        driver.refuse[refused] = OUT_OF_MEMORY
    world.uncapturable = not refused
    with loaded(path, "tensorrt") as model:
        for _ in range(6):
            for batch in (1, 5):
                assert model.run(feed(IMAGES[:batch]))["logits"].tobytes() == alone(path, IMAGES[:batch]).tobytes()
        assert driver.counts["cuStreamBeginCapture_v2"] == 2 * CAPTURES  # for each batch, and not again
        assert (world.plain_runs, driver.counts["cuGraphLaunch"]) == (12, 0)
    said = [record.getMessage() for record in caplog.records if record.name == "swin_deploy"]
    assert [line for line in said if "cannot be captured" in line] == said
    assert len(said) == 2


def test_a_capture_that_somebody_else_spoils_is_tried_again(driver: Any, tmp_path: Path) -> None:
    path, world = copied(1, tmp_path / "b"), driver.trt["tensorrt"].world
    with_engines(path, "tensorrt")
    with loaded(path, "tensorrt") as model:
        for world.uncapturable in (False, True, False, False):
            assert model.run(feed(IMAGES[:4]))["logits"].tobytes() == alone(path, IMAGES[:4]).tobytes()
        assert (world.plain_runs, world.captured_runs, driver.counts["cuGraphLaunch"]) == (2, 1, 2)


def test_where_tensorrt_for_rtx_cannot_capture_it_runs_without_graphs(
    driver: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A context that fails in its first call is made once more without them, and all others are from then on."""
    path, world = copied(1, tmp_path / "b"), driver.trt["tensorrt-rtx"].world
    with_engines(path, "tensorrt-rtx")
    with loaded(path, "tensorrt-rtx") as model:
        wanted = {batch: alone(path, IMAGES[:batch]).tobytes() for batch in range(1, 9)}
        assert model.run(feed(IMAGES[:2]))["logits"].tobytes() == wanted[2]
        world.uncapturable = True  # other batch sizes than that
        with ThreadPoolExecutor(6) as pool:
            for _ in range(2):
                found = [*pool.map(lambda batch: (batch, model.run(feed(IMAGES[:batch]))["logits"]), [*range(3, 9)] * 4)]
                assert [batch for batch, answer in found if answer.tobytes() != wanted[batch]] == []
        before = (world.spoilt_captures, world.contexts_made)
        assert 1 <= before[0] <= 6  # those that came at the same time
        for batch in range(3, 9):
            assert model.run(feed(IMAGES[:batch]))["logits"].tobytes() == wanted[batch]
        assert (world.spoilt_captures, world.contexts_made) == before
        assert not world.capturing[-1]
    [line] = [record.getMessage() for record in caplog.records if record.name == "swin_deploy"]
    assert line.startswith("TensorRT for RTX captures no CUDA graph")


def test_an_engine_of_one_profile_has_its_memory_beforehand(driver: Any, tmp_path: Path) -> None:
    path, world = copied(1, tmp_path / "b"), driver.trt["tensorrt-rtx"].world
    for profiles in (((1, 4, 8),), ((1, 1, 1), (1, 4, 8))):
        with_engines(path, "tensorrt-rtx", profiles=profiles)
        loaded(path, "tensorrt-rtx").close()
    assert world.strategies == ["STATIC", "ON_PROFILE_CHANGE"]


def test_graphs_stay_where_they_are_not_what_fails(driver: Any, tmp_path: Path) -> None:
    path, world = copied(1, tmp_path / "b"), driver.trt["tensorrt-rtx"].world
    with_engines(path, "tensorrt-rtx")
    with loaded(path, "tensorrt-rtx") as model:
        world.fail = "out of memory"
        with pytest.raises(BackendError, match="it did not run: out of memory"):
            model.run(feed(IMAGES[:2]))
        world.fail = ""
        assert model.run(feed(IMAGES[:2]))["logits"].tobytes() == alone(path, IMAGES[:2]).tobytes()
        assert world.capturing == [True, True, False, True]  # when it was loaded, for the call, once more, and afterwards


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_call_that_fails_leaves_the_model_usable(backend: str, driver: Any, tmp_path: Path) -> None:
    path, world = copied(1, tmp_path / "b"), driver.trt[backend].world
    with_engines(path, backend)
    with loaded(path, backend) as model:
        wanted = model.run(feed(IMAGES[:9]))["logits"].tobytes()
        world.fail = "Error Code 2:\n  out of memory."
        for world.raising in (False, True):
            how = "" if world.raising else "it did not run: "
            for _ in range(MOST_LANES + 2):
                with pytest.raises(BackendError, match=f"failed while running the model: {how}Error Code 2: out of memory"):
                    model.run(feed(IMAGES[:9]))
        world.fail, world.raising = "", False
        for refused in ("cuMemcpyHtoDAsync_v2", "cuStreamSynchronize"):
            driver.refuse[refused] = OUT_OF_MEMORY
            said = f"refused {refused} on cuda:0: CUDA_ERROR_OUT_OF_MEMORY .out of memory"
            with pytest.raises(BackendError, match=said) as caught:
                model.run(feed(IMAGES[:9]))
            assert isinstance(caught.value.__cause__, BackendError)
            driver.refuse.clear()
        assert model.run(feed(IMAGES[:9]))["logits"].tobytes() == wanted
        assert len(driver.streams) - 1 == len(driver.events) <= MOST_LANES


def test_no_more_lanes_than_the_gpu_has_memory_for(driver: Any, tmp_path: Path) -> None:
    """Who comes when there is no memory for another lane waits for one that there is, or has it made ready for his batch."""
    path, world = copied(1, tmp_path / "b"), driver.trt["tensorrt"].world
    with_engines(path, "tensorrt", profiles=((1, 8, 8),))
    with loaded(path, "tensorrt") as model, ThreadPoolExecutor(6) as pool:
        model.run(feed(IMAGES[:8]))  # in the second lane
        driver.refuse["cuMemAlloc_v2"] = OUT_OF_MEMORY
        answers = pool.map(lambda batch: model.run(feed(IMAGES[:batch]))["logits"], [8, 8, 8, 1, 1, 8, 8, 1] * 4)
        assert [len(answer) for answer in answers] == [8, 8, 8, 1, 1, 8, 8, 1] * 4
        assert world.contexts_made <= 2 + 6  # those that did not come about are not tried again
        assert len(driver.streams) - 1 in (1, 2)  # the one for a single image goes when it cannot be made larger
        driver.refuse.clear()
        assert model.run(feed(IMAGES[:8]))["logits"].tobytes() == alone(path, IMAGES[:8]).tobytes()


def test_warmed_up_the_first_call_is_as_the_next_ones(driver: Any, tmp_path: Path) -> None:
    path, world = copied(1, tmp_path / "b"), driver.trt["tensorrt"].world
    with_engines(path, "tensorrt")
    with loaded(path, "tensorrt") as model:
        model.warm_up(4)
        before = (world.plain_runs, world.captured_runs, driver.counts["cuGraphLaunch"])
        assert model.run(feed(IMAGES[:4]))["logits"].tobytes() == alone(path, IMAGES[:4]).tobytes()
        assert (world.plain_runs, world.captured_runs, driver.counts["cuGraphLaunch"] - 1) == before


def placed(driver: FakeDriver, images: np.ndarray, offset: int = 0, owner: Any = None) -> DeviceTensor:
    """The images in the simulated GPU's memory, as an application's tensor, `offset` bytes after an aligned address."""
    memory = (ctypes.c_uint8 * (images.nbytes + 1024))()
    start = (ctypes.addressof(memory) + 255) // 256 * 256
    size = images.nbytes + offset
    driver.device[start] = (ctypes.c_uint8 * size).from_buffer(memory, start - ctypes.addressof(memory))
    ctypes.memmove(start + offset, images.ctypes.data, images.nbytes)
    return DeviceTensor("cuda:0", images.dtype, images.shape, start + offset, owner)


def test_tensors_on_the_gpu_are_read_where_they_are(driver: Any, tmp_path: Path) -> None:
    path, world = copied(1, tmp_path / "b"), driver.trt["tensorrt"].world
    with_engines(path, "tensorrt", profiles=((2, 4, 8),))
    with loaded(path, "tensorrt") as model:
        kept = []
        for batch in (2, 3, 8):
            tensor = placed(driver, IMAGES[:batch])
            kept.append(tensor.pointer)
            wanted = alone(path, IMAGES[:batch])
            for _ in range(3):
                assert model.run(feed(tensor))["logits"].tobytes() == wanted.tobytes()  # type: ignore[arg-type]
        assert driver.counts["cuMemcpyHtoDAsync_v2"] == driver.counts["cuMemcpyDtoDAsync_v2"] == 0
        assert world.captured_runs == 3
        odd = placed(driver, IMAGES[:4], offset=64)  # TensorRT wants addresses that are multiples of 256
        kept.append(odd.pointer - 64)
        few = placed(driver, IMAGES[:1])
        kept.append(few.pointer)
        assert model.run(feed(odd))["logits"].tobytes() == alone(path, IMAGES[:4]).tobytes()  # type: ignore[arg-type]
        filled = np.repeat(IMAGES[:1], 2, 0)
        assert model.run(feed(few))["logits"].tobytes() == alone(path, filled)[:1].tobytes()  # type: ignore[arg-type]
        assert model.run(feed(IMAGES[:2]))["logits"].tobytes() == alone(path, IMAGES[:2]).tobytes()  # its own memory again
        for address in kept:
            del driver.device[address]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tensor_that_is_somewhere_else_each_time_is_copied(backend: str, driver: Any, tmp_path: Path) -> None:
    """So that the engine is at the same address in each call, as a CUDA graph needs it."""
    path, world = copied(1, tmp_path / "b"), driver.trt[backend].world
    with_engines(path, backend)
    tensors = [placed(driver, np.ascontiguousarray(IMAGES[turn : turn + 4])) for turn in range(8)]
    with loaded(path, backend) as model:
        addressed = []
        for turn, tensor in enumerate(tensors):
            found = model.run(feed(tensor))["logits"]  # type: ignore[arg-type]
            assert found.tobytes() == alone(path, IMAGES[turn : turn + 4]).tobytes()
            addressed.append(world.addressed)
        assert addressed[1:] == [addressed[1]] * 7
        assert driver.counts["cuMemcpyDtoDAsync_v2"] == 7
        if backend == "tensorrt":
            assert (world.plain_runs, world.captured_runs, driver.counts["cuGraphLaunch"]) == (2, 1, 6)
        whole = placed(driver, IMAGES[:19])  # 8 + 8 + 3: the parts are each somewhere else
        wanted = np.concatenate([alone(path, IMAGES[i : min(i + 8, 19)]) for i in range(0, 19, 8)])
        for _ in range(3):
            assert model.run(feed(whole))["logits"].tobytes() == wanted.tobytes()  # type: ignore[arg-type]
    for tensor in [*tensors, whole]:
        del driver.device[tensor.pointer]


def test_a_tensor_is_read_after_its_library_has_written_it(driver: Any, tmp_path: Path) -> None:
    """The library has put that into the default stream, which our own streams do not wait for by themselves."""
    path = copied(1, tmp_path / "b")
    with_engines(path, "tensorrt")
    tensor = placed(driver, np.zeros_like(IMAGES[:4]))
    with loaded(path, "tensorrt") as model:
        for turn in range(4):
            images = np.ascontiguousarray(IMAGES[turn : turn + 4])
            driver.streams[LEGACY].work.append(
                lambda images=images: ctypes.memmove(tensor.pointer, images.ctypes.data, images.nbytes)
            )
            assert model.run(feed(tensor))["logits"].tobytes() == alone(path, images).tobytes()  # type: ignore[arg-type]
    del driver.device[tensor.pointer]
