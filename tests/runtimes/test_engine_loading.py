"""Loading and letting go of engines on a simulated GPU, and what of TensorRT and the driver can be checked without one."""

from __future__ import annotations

import ctypes
import gc
import os
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("onnxruntime", reason="the simulated TensorRT computes with it")

from cli.exported import copied
from fake_driver import HEADER, TYPES, FakeDriver, arguments_of
from fake_tensorrt import EngineInvalidityDiagnostics, module
from simulated import IMAGES, PROFILES, RELEASES, alone, feed, loaded, simulated, two_sizes, with_engines

from swin_deploy.bundle import Bundle
from swin_deploy.errors import BackendError, BundleError, EngineError, MissingDependencyError
from swin_deploy.runtimes.gpu.driver import CAPTURING, PROTOTYPES
from swin_deploy.runtimes.gpu.memory import Layout
from swin_deploy.runtimes.gpu.tensorrt import MOST_LANES, planned
from swin_deploy.specs import TensorSpec

BACKENDS = list(RELEASES)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with simulated(monkeypatch) as made:
        yield made


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


def test_nothing_is_allocated_while_onnxruntime_captures(driver: Any, tmp_path: Path) -> None:
    """CUDA would refuse it, and that could spoil the capture. A warm call goes on."""
    path, world = copied(1, tmp_path / "b"), driver.trt["tensorrt"].world
    with_engines(path, "tensorrt")
    with loaded(path, "tensorrt") as model, ThreadPoolExecutor(2) as pool:
        model.warm_up(1)
        with CAPTURING.alone():
            before = (world.contexts_made, driver.counts["cuMemAlloc_v2"])
            cold = pool.submit(lambda: model.run(feed(IMAGES[:5]))["logits"].tobytes())
            other = pool.submit(lambda: loaded(path, "tensorrt").close())
            assert model.run(feed(IMAGES[:1]))["logits"].tobytes() == alone(path, IMAGES[:1]).tobytes()
            assert wait([cold, other], 0.3).done == set()
            assert (world.contexts_made, driver.counts["cuMemAlloc_v2"]) == before
        assert cold.result(60) == alone(path, IMAGES[:5]).tobytes()
        other.result(60)


def test_what_is_not_an_engine_of_its_graph(driver: Any, tmp_path: Path) -> None:
    """Whatever the file holds, nothing is left behind, and the error holds on to nothing of TensorRT's."""
    path = copied(1, tmp_path / "b")
    [file] = with_engines(path, "tensorrt")
    command = rf'compile it again with "swin-deploy build-engine {path} --fp32 --backend tensorrt --batch 1 --batch 1:4:8"'
    bundle = Bundle.open(path)
    entry = dict(bundle.files[file])
    bundle.with_file(file, entry, lambda place: place.write_bytes(b"no plan"))
    for driver.trt["tensorrt"].world.raising in (True, False):
        with pytest.raises(BackendError, match=rf"magic tag does not match. Error Code 1: Serialization\. .*{command}"):
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
    command = f'"swin-deploy build-engine {path} --fp32 --backend tensorrt --batch 1 --batch 1:4:8 --force"'
    with pytest.raises(BundleError, match=f"not the file that was compiled.*{command}"):
        loaded(path, "tensorrt")


def test_only_engines_that_say_so_may_bring_a_runtime_of_their_own(driver: Any, tmp_path: Path) -> None:
    path = copied(1, tmp_path / "b")
    with_engines(path, "tensorrt", options={"version_compatible": True}, backend_version="10.13.0.35", gpu="sm_89")
    with loaded(path, "tensorrt") as model:  # an engine of 10 runs with 11
        assert model.run(feed(IMAGES[:2]))["logits"].tobytes() == alone(path, IMAGES[:2]).tobytes()
    bundle = Bundle.open(path)
    [file] = [file for file in bundle.files if file.endswith(".engine")]
    bundle.with_entry(file, {"options": {}, "backend_version": RELEASES["tensorrt"]})
    with pytest.raises(BackendError, match="host code, which is not allowed"):
        loaded(path, "tensorrt")


def test_the_lean_runtime_runs_version_compatible_engines(driver: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where TensorRT itself is not installed; the full one comes first."""
    path, lean = copied(1, tmp_path / "b"), module("tensorrt_lean", RELEASES["tensorrt"], driver)
    monkeypatch.setitem(sys.modules, "tensorrt_lean", lean)
    [file] = with_engines(path, "tensorrt")
    with loaded(path, "tensorrt"):
        assert lean.world.contexts_made == 0
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(EngineError, match=rf"{file} needs tensorrt itself, and only tensorrt_lean .* --version-compatible"):
        loaded(path, "tensorrt")
    Bundle.open(path).with_entry(file, {"options": {"version_compatible": True}})
    with loaded(path, "tensorrt") as model:
        assert model.run(feed(IMAGES[:2]))["logits"].tobytes() == alone(path, IMAGES[:2]).tobytes()
        assert (model.describe().backend, lean.world.contexts_made) == ("tensorrt", 2)
    monkeypatch.setitem(sys.modules, "tensorrt_lean", None)
    with pytest.raises(MissingDependencyError, match=r'"swin-deploy\[tensorrt\]"'):
        loaded(path, "tensorrt")


def test_what_tensorrt_for_rtx_compiles_is_kept(driver: Any, tmp_path: Path) -> None:
    path, folder, world = (
        copied(1, tmp_path / "b"),
        tmp_path / "cache/swin-deploy/tensorrt-rtx",
        driver.trt["tensorrt-rtx"].world,
    )
    with_engines(path, "tensorrt-rtx")

    def run(*batches: int) -> bytes:
        with loaded(path, "tensorrt-rtx") as model:
            for batch in batches:
                assert model.run(feed(IMAGES[:batch]))["logits"].tobytes() == alone(path, IMAGES[:batch]).tobytes()
        [kept] = folder.iterdir()
        return kept.read_bytes()

    assert run(1, 5) == b"CACHE of a simulated GPU 1 5"
    assert run(2) == b"CACHE of a simulated GPU 1 2 5"  # it went on with what was kept
    [file] = folder.iterdir()
    os.utime(file, (0, 0))
    assert run(5) == b"CACHE of a simulated GPU 1 2 5"  # not written again, as nothing new was compiled; but in use
    assert file.stat().st_mtime > 1e9
    file.write_bytes(b"damaged")
    assert run(3) == b"CACHE of a simulated GPU 3"
    world.invalid = EngineInvalidityDiagnostics.VERSION_MISMATCH | EngineInvalidityDiagnostics.OLD_CUDA_DRIVER
    with pytest.raises(BackendError, match=r"version mismatch, old cuda driver"):
        loaded(path, "tensorrt-rtx")


def test_every_batch_that_kernels_were_compiled_for_is_kept(driver: Any, tmp_path: Path) -> None:
    """With more batch sizes than lanes; and a call that compiles nothing does not look at the cache."""
    path, world = copied(1, tmp_path / "b"), driver.trt["tensorrt-rtx"].world
    with_engines(path, "tensorrt-rtx", profiles=((1, 8, 16),))
    batches = range(1, MOST_LANES + 5)
    with loaded(path, "tensorrt-rtx") as model:
        for batch in batches:
            model.run(feed(IMAGES[:batch]))
        [kept] = (tmp_path / "cache/swin-deploy/tensorrt-rtx").iterdir()
        assert kept.read_bytes().split()[5:] == [b"%d" % batch for batch in batches]
        before = world.serialized
        with ThreadPoolExecutor(4) as pool:  # those that share a lane prepare it again
            list(pool.map(lambda batch: model.run(feed(IMAGES[:batch])), [*batches] * 3))
        assert world.serialized == before == len(batches)


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
