"""The TensorRT back ends on a simulated GPU: their own arithmetic of batches, memory, streams, graphs and threads.

This shows what our code asks of TensorRT and of the driver, not what these answer: that is tests/gpu/test_tensorrt_runtime.py.
"""

from __future__ import annotations

import ctypes
import gc
import re
import shutil
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxruntime", reason="the simulated TensorRT computes with it")

from cli.exported import copied, digits, exported, one_block
from fake_driver import HEADER, LEGACY, OUT_OF_MEMORY, TYPES, FakeDriver, arguments_of
from fake_tensorrt import EngineInvalidityDiagnostics, module, session
from simulated import PROFILES, RELEASES, simulated, with_engines

import swin_deploy
from swin_deploy.errors import BackendError, BundleError
from swin_deploy.runtimes import base, cuda, lanes, tensorrt
from swin_deploy.runtimes.cuda import PROTOTYPES
from swin_deploy.runtimes.lanes import Layout
from swin_deploy.runtimes.tensorrt import MOST_LANES, planned
from swin_deploy.runtimes.tensors import DeviceTensor
from swin_deploy.specs import TensorSpec

SIZES = ((32, 32), (16, 24))
BACKENDS = list(RELEASES)
IMAGES = np.random.default_rng(0).standard_normal((24, 3, 32, 32)).astype(np.float32)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with simulated(monkeypatch) as made:
        yield made


def two_sizes(target: Path) -> Path:
    """One block at two image sizes."""
    options = [part for height, width in SIZES for part in ("--image-size", f"{height}x{width}")]
    [path] = [path for path in exported("--weights", str(one_block()), *options).iterdir() if path.is_dir()]
    shutil.copytree(path, target)
    return target


def alone(path: Path, images: np.ndarray, graph: str = "onnx/model.onnx") -> np.ndarray:
    """What ONNX Runtime itself makes of a batch of exactly these images."""
    [answer] = session(str((path / graph).absolute())).run(["logits"], {"pixel_values": images})
    return np.asarray(answer)


def feed(images: np.ndarray) -> dict[str, Any]:
    return {"pixel_values": images}


def loaded(path: Path, backend: str, **options: Any) -> Any:
    return swin_deploy.load(path, backend=backend, **options)


def test_the_arguments_are_those_of_cuda_h() -> None:
    """As many, and as wide: an address that loses its upper half is what ctypes makes of one without a type."""
    assert set(PROTOTYPES) <= set(HEADER)
    for name, ours in PROTOTYPES.items():
        theirs = arguments_of(HEADER[name])
        assert [ctypes.sizeof(kind) for kind in ours] == [ctypes.sizeof(kind) for kind in theirs], name
        pointers = [kind is ctypes.c_void_p or hasattr(kind, "contents") for kind in ours]
        assert pointers == [kind is ctypes.c_void_p for kind in theirs], name


def test_the_declarations_are_those_of_the_header_itself() -> None:
    found = sorted(Path("/usr/local").glob("cuda*/include/cuda.h"))
    if not found:
        pytest.skip("there is no cuda.h here to compare our copy of its declarations with")
    text = " ".join(found[-1].read_text(encoding="utf-8", errors="replace").split())
    for name, declaration in HEADER.items():
        plain = next((m[1] for m in re.finditer(r"#define (\w+) (?:__CUDA_API_PTSZ\()?(\w+)", text) if m[2] == name), name)
        assert f"CUresult CUDAAPI {plain}({declaration});" in text, name
    for kind, ours in {"CUdeviceptr_v2": "unsigned long long", "CUdevice_v1": "int"}.items():
        assert f"typedef {ours} {kind};" in text
        assert ctypes.sizeof(TYPES[ours]) == ctypes.sizeof(TYPES[kind.partition("_")[0]])
    assert "CU_STREAM_NON_BLOCKING = 0x1" in text
    assert "CU_EVENT_DISABLE_TIMING = 0x2" in text
    assert "CU_STREAM_CAPTURE_MODE_THREAD_LOCAL = 1" in text
    assert "CU_STREAM_LEGACY ((CUstream)0x1)" in text


@pytest.mark.parametrize(
    ("batch", "profiles", "wanted"),
    [
        (1, PROFILES, [(0, 1, 0, 1)]),
        (2, PROFILES, [(0, 2, 1, 2)]),
        (8, PROFILES, [(0, 8, 1, 8)]),
        (11, PROFILES, [(0, 8, 1, 8), (8, 3, 1, 3)]),
        (17, PROFILES, [(0, 8, 1, 8), (8, 8, 1, 8), (16, 1, 0, 1)]),
        (3, ((1, 1, 1),), [(0, 1, 0, 1), (1, 1, 0, 1), (2, 1, 0, 1)]),
        (8, ((1, 8, 32), (1, 16, 32)), [(0, 8, 0, 8)]),  # tuned nearer
        (16, ((1, 8, 32), (1, 16, 32)), [(0, 16, 1, 16)]),
        (40, ((1, 8, 32), (1, 16, 32)), [(0, 32, 1, 32), (32, 8, 0, 8)]),
        (4, ((1, 4, 32), (1, 4, 8)), [(0, 4, 1, 4)]),  # the smaller of equal ones
        (2, ((4, 4, 8),), [(0, 2, 0, 4)]),  # filled up
        (5, ((1, 1, 2), (8, 8, 8)), [(0, 5, 1, 8)]),
        (19, ((8, 8, 8),), [(0, 8, 0, 8), (8, 8, 0, 8), (16, 3, 0, 8)]),
    ],
)
def test_which_profiles_run_a_batch(batch: int, profiles: Any, wanted: list[tuple[int, int, int, int]]) -> None:
    assert list(planned(batch, profiles)) == wanted


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


def test_an_engine_that_cannot_be_captured_is_run_plainly(driver: Any, tmp_path: Path) -> None:
    path, world = copied(1, tmp_path / "b"), driver.trt["tensorrt"].world
    with_engines(path, "tensorrt")
    world.uncapturable = True
    with loaded(path, "tensorrt") as model:
        for _ in range(6):
            for batch in (1, 5):
                assert model.run(feed(IMAGES[:batch]))["logits"].tobytes() == alone(path, IMAGES[:batch]).tobytes()
        assert driver.counts["cuStreamBeginCapture_v2"] == 2  # once for each batch, and not again
        assert (world.plain_runs, driver.counts["cuGraphLaunch"]) == (12, 0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_call_that_fails_leaves_the_model_usable(backend: str, driver: Any, tmp_path: Path) -> None:
    path, world = copied(1, tmp_path / "b"), driver.trt[backend].world
    with_engines(path, backend)
    with loaded(path, backend) as model:
        wanted = model.run(feed(IMAGES[:9]))["logits"].tobytes()
        world.fail = "Error Code 2:\n  out of memory."
        for _ in range(MOST_LANES + 2):
            with pytest.raises(
                BackendError, match="failed while running the model: it did not run: Error Code 2: out of memory"
            ):
                model.run(feed(IMAGES[:9]))
        world.fail = ""
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
        for batch in (2, 8, 11):  # 11 = 8 + 3: the second part begins within the tensor
            tensor = placed(driver, IMAGES[:batch])
            kept.append(tensor.pointer)
            wanted = np.concatenate([alone(path, IMAGES[i : min(i + 8, batch)]) for i in range(0, batch, 8)])
            for _ in range(3):
                assert model.run(feed(tensor))["logits"].tobytes() == wanted.tobytes()  # type: ignore[arg-type]
        assert driver.counts["cuMemcpyHtoDAsync_v2"] == driver.counts["cuMemcpyDtoDAsync_v2"] == 0
        assert world.captured_runs == 4  # 2 and 8 images, and the 8 and 3 of 11, which are in other memory
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


@pytest.mark.parametrize("backend", BACKENDS)
def test_everything_is_freed_in_order(backend: str, driver: Any, tmp_path: Path) -> None:
    path, world = copied(1, tmp_path / "b"), driver.trt[backend].world
    with_engines(path, backend)
    model = loaded(path, backend)
    for batch in (1, 3, 5, 3, 3):
        model.run(feed(IMAGES[:batch]))
    assert driver.device
    model.close()
    model.close()
    assert world.ended == ["IExecutionContext"] * 3 + ["ICudaEngine", "Runtime"]
    assert driver.left == []
    with pytest.raises(BackendError, match="closed"):
        model.run(feed(IMAGES[:1]))


def test_a_model_that_nobody_closes_is_freed_with_its_last_reference(driver: Any, tmp_path: Path) -> None:
    path = copied(1, tmp_path / "b")
    with_engines(path, "tensorrt")
    model = loaded(path, "tensorrt")
    model.run(feed(IMAGES[:2]))
    del model
    gc.collect()
    assert driver.left == []


def test_the_second_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = copied(1, tmp_path / "b")
    with_engines(path, "tensorrt", gpu="sm_86")
    with simulated(monkeypatch, "sm_89", "sm_86") as driver, loaded(path, "tensorrt", device="cuda:1") as model:
        assert model.describe().device == "cuda:1"
        assert driver.retained == [0, 1]
        assert model.run(feed(IMAGES[:2]))["logits"].tobytes() == alone(path, IMAGES[:2]).tobytes()


def test_what_is_not_an_engine_of_its_graph(driver: Any, tmp_path: Path) -> None:
    """Whatever the file holds, nothing is left behind, and the error holds on to nothing of TensorRT's."""
    path = copied(1, tmp_path / "b")
    [file] = with_engines(path, "tensorrt")
    command = rf'Compile it again with "swin-deploy build-engine {path} --fp32 --backend tensorrt --batch 1 --batch 1:4:8"'
    bundle = swin_deploy.bundle.Bundle.open(path)
    entry = dict(bundle.files[file])
    bundle.with_file(file, entry, lambda place: place.write_bytes(b"no plan"))
    with pytest.raises(BackendError, match=rf"magic tag does not match. Error Code 1: Serialization\. {command}") as caught:
        loaded(path, "tensorrt")
    assert driver.left == []
    other = two_sizes(tmp_path / "other")
    content = (other / with_engines(other, "tensorrt")[1]).read_bytes()
    bundle.with_file(file, entry, lambda place: place.write_bytes(content))
    with pytest.raises(BackendError, match=r"pixel_values is FLOAT .*16, 24.*in its graph") as caught:
        loaded(path, "tensorrt")
    assert isinstance(caught.value.__cause__, BackendError)
    assert [*driver.trt["tensorrt"].world.alive] == driver.left == []
    (path / file).write_bytes(b"changed")
    with pytest.raises(BundleError, match="not the file that was compiled"):
        loaded(path, "tensorrt")


def test_only_engines_that_say_so_may_bring_a_runtime_of_their_own(driver: Any, tmp_path: Path) -> None:
    path = copied(1, tmp_path / "b")
    with_engines(path, "tensorrt", options={"version_compatible": True}, backend_version="10.13.0.35", gpu="sm_89")
    with loaded(path, "tensorrt") as model:  # an engine of 10 runs with 11
        assert model.run(feed(IMAGES[:2]))["logits"].tobytes() == alone(path, IMAGES[:2]).tobytes()
    bundle = swin_deploy.bundle.Bundle.open(path)
    [file] = [file for file in bundle.files if file.endswith(".engine")]
    bundle.with_entry(file, {"options": {}, "backend_version": RELEASES["tensorrt"]})
    with pytest.raises(BackendError, match="host code, which is not allowed"):
        loaded(path, "tensorrt")


def test_what_tensorrt_for_rtx_compiles_is_kept(driver: Any, tmp_path: Path) -> None:
    path, folder, world = (
        copied(1, tmp_path / "b"),
        tmp_path / "cache/swin-deploy/tensorrt-rtx",
        driver.trt["tensorrt-rtx"].world,
    )
    with_engines(path, "tensorrt-rtx")

    def run() -> bytes:
        with loaded(path, "tensorrt-rtx") as model:
            model.run(feed(IMAGES[:1]))
            [kept] = folder.iterdir()
            assert model.run(feed(IMAGES[:5]))["logits"].tobytes() == alone(path, IMAGES[:5]).tobytes()
        return kept.read_bytes()

    first = run()
    assert first.startswith(b"CACHE of a simulated GPU")
    assert run().startswith(first)  # it went on with what was kept
    [file] = folder.iterdir()
    file.write_bytes(b"damaged")
    assert run().startswith(b"CACHE of a simulated GPU")
    world.invalid = EngineInvalidityDiagnostics.VERSION_MISMATCH | EngineInvalidityDiagnostics.OLD_CUDA_DRIVER
    with pytest.raises(BackendError, match=r"version mismatch, old cuda driver\. Compile it again"):
        loaded(path, "tensorrt-rtx")


def test_no_place_for_a_cache(driver: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = copied(1, tmp_path / "b")
    with_engines(path, "tensorrt-rtx")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with loaded(path, "tensorrt-rtx") as model:
        assert model.run(feed(IMAGES[:2]))["logits"].tobytes() == alone(path, IMAGES[:2]).tobytes()


def test_a_shape_that_says_nothing_of_the_batch() -> None:
    with pytest.raises(BackendError, match="does not say how large it is"):
        Layout.of(TensorSpec("logits", "float32", ("boxes", 10)))


def test_the_double_has_nothing_that_the_real_one_lacks() -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="the double of TensorRT for RTX is compared with it")
    made = module("tensorrt_rtx", "1", FakeDriver())
    kinds = {name: kind for name, kind in vars(made).items() if isinstance(kind, type)}
    assert kinds.keys() >= {"Runtime", "ICudaEngine", "IExecutionContext", "IRuntimeConfig", "IRuntimeCache", "EngineValidity"}
    own = {"version", "inputs", "outputs"}  # what the tests ask it
    for name, kind in kinds.items():
        public = {attribute for attribute in dir(kind) if not attribute.startswith("_")} - own - set(dir(int))
        assert public <= set(dir(getattr(trt, name))), name


def test_the_digits_bundle_has_the_graphs_that_are_compared() -> None:
    assert {"onnx/model.onnx", "onnx/model_fp16.onnx"} <= set(swin_deploy.bundle.Bundle.open(digits(2)).graphs)
