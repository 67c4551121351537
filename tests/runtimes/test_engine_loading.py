"""Loading engines on a simulated GPU: files that do not fit, other releases, and kept kernels of TensorRT for RTX."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("onnxruntime", reason="the simulated TensorRT computes with it")

from cli.exported import copied
from engine_bundles import IMAGES, PROFILES, alone, feed, loaded, two_sizes, with_engines
from fake_gpu import RELEASES, FakeGpu, simulated, tensorrt_module

from swin_deploy.bundle import Bundle, TensorSpec
from swin_deploy.errors import BackendError, BundleError, EngineError, MissingDependencyError
from swin_deploy.runtimes.gpu.io_buffers import BufferLayout
from swin_deploy.runtimes.gpu.tensorrt import MAX_CONTEXTS, split_batch


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeGpu]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with simulated(monkeypatch) as made:
        yield made


@pytest.mark.parametrize(
    ("batch", "profiles", "calls"),
    [
        (1, PROFILES, [(0, 1, 0, 1)]),
        (2, PROFILES, [(0, 2, 1, 2)]),
        (8, PROFILES, [(0, 8, 1, 8)]),
        (11, PROFILES, [(0, 8, 1, 8), (8, 3, 1, 3)]),
        (17, PROFILES, [(0, 8, 1, 8), (8, 8, 1, 8), (16, 1, 0, 1)]),
        (3, ((1, 1, 1),), [(0, 1, 0, 1), (1, 1, 0, 1), (2, 1, 0, 1)]),
        (8, ((1, 8, 32), (1, 16, 32)), [(0, 8, 0, 8)]),  # the nearer optimum
        (16, ((1, 8, 32), (1, 16, 32)), [(0, 16, 1, 16)]),
        (40, ((1, 8, 32), (1, 16, 32)), [(0, 32, 1, 32), (32, 8, 0, 8)]),
        (4, ((1, 4, 32), (1, 4, 8)), [(0, 4, 1, 4)]),  # the smaller of equal ones
        (2, ((4, 4, 8),), [(0, 2, 0, 4)]),  # padded
        (5, ((1, 1, 2), (8, 8, 8)), [(0, 5, 1, 8)]),
        (19, ((8, 8, 8),), [(0, 8, 0, 8), (8, 8, 0, 8), (16, 3, 0, 8)]),
    ],
)
def test_how_a_batch_is_split(batch: int, profiles: Any, calls: list[tuple[int, int, int, int]]) -> None:
    assert list(split_batch(batch, profiles)) == calls


def test_a_shape_without_a_known_batch() -> None:
    with pytest.raises(BackendError, match="for each image is unknown"):
        BufferLayout.from_spec(TensorSpec("logits", "float32", ("boxes", 10)))


def test_a_file_that_is_not_an_engine_of_its_graph(gpu: FakeGpu, tmp_path: Path) -> None:
    """Nothing is left behind, and the error keeps nothing of TensorRT's alive."""
    path = copied(1, tmp_path / "b")
    [file] = with_engines(path, "tensorrt")
    command = f"swin-deploy build-engine {path} --fp32 --backend tensorrt --batch 1 --batch 1:4:8"
    bundle = Bundle.open(path)
    entry = dict(bundle.files[file])
    bundle.with_file(file, entry, lambda place: place.write_bytes(b"no plan"))
    for gpu.raising in (True, False):
        with pytest.raises(BackendError, match=rf'magic tag does not match. Error Code 1: Serialization\. .*"{command}"'):
            loaded(path, "tensorrt")
    other = two_sizes(tmp_path / "other")
    content = (other / with_engines(other, "tensorrt")[1]).read_bytes()
    bundle.with_file(file, entry, lambda place: place.write_bytes(content))
    with pytest.raises(BackendError, match=r"pixel_values is FLOAT .*16, 24.*in its graph") as caught:
        loaded(path, "tensorrt")
    assert isinstance(caught.value.__cause__, BackendError)
    assert gpu.left == []
    (path / file).write_bytes(b"changed")
    with pytest.raises(BundleError, match=f"not the file that was compiled.*{command} --force"):
        loaded(path, "tensorrt")


def test_only_version_compatible_engines_may_bring_host_code(gpu: FakeGpu, tmp_path: Path) -> None:
    path = copied(1, tmp_path / "b")
    [file] = with_engines(path, "tensorrt", options={"version_compatible": True}, backend_version="10.13.0.35")
    with loaded(path, "tensorrt") as model:  # an engine of TensorRT 10 runs with 11
        assert model.run(feed(IMAGES[:2]))["logits"].tobytes() == alone(path, IMAGES[:2])
    Bundle.open(path).with_entry(file, {"options": {}, "backend_version": RELEASES["tensorrt"]})
    with pytest.raises(BackendError, match="host code, which is not allowed"):
        loaded(path, "tensorrt")


def test_the_lean_runtime_runs_version_compatible_engines(
    gpu: FakeGpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = copied(1, tmp_path / "b")
    monkeypatch.setitem(sys.modules, "tensorrt_lean", tensorrt_module(gpu, "tensorrt-lean"))
    [file] = with_engines(path, "tensorrt")
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(EngineError, match=rf"{file} needs tensorrt\. Only tensorrt_lean is installed.* --version-compatible"):
        loaded(path, "tensorrt")
    Bundle.open(path).with_entry(file, {"options": {"version_compatible": True}})
    with loaded(path, "tensorrt") as model:
        assert model.run(feed(IMAGES[:2]))["logits"].tobytes() == alone(path, IMAGES[:2])
    monkeypatch.setitem(sys.modules, "tensorrt_lean", None)
    with pytest.raises(MissingDependencyError, match=r'"swin-deploy\[tensorrt\]"'):
        loaded(path, "tensorrt")


def test_without_the_bindings_for_cuda(gpu: FakeGpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = copied(1, tmp_path / "b")
    with_engines(path, "tensorrt")
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(MissingDependencyError, match=r"needed to run models on cuda:0.*pip install \"cuda-bindings>=12\.9\""):
        loaded(path, "tensorrt")


def test_kernels_of_tensorrt_for_rtx_are_kept(gpu: FakeGpu, tmp_path: Path) -> None:
    path, folder = copied(1, tmp_path / "b"), tmp_path / "cache/swin-deploy/tensorrt-rtx"
    with_engines(path, "tensorrt-rtx", profiles=((1, 8, 16),))

    def run(*batches: int) -> bytes:
        with loaded(path, "tensorrt-rtx") as model:
            for batch in batches:
                assert model.run(feed(IMAGES[:batch]))["logits"].tobytes() == alone(path, IMAGES[:batch])
        [file] = folder.iterdir()
        return file.read_bytes()

    assert run(1, 5) == b"CACHE 1 5"
    assert run(2) == b"CACHE 1 2 5"
    [file] = folder.iterdir()
    os.utime(file, (0, 0))
    assert run(5) == b"CACHE 1 2 5"
    assert file.stat().st_mtime > 1e9  # it counts as used
    file.write_bytes(b"damaged")
    assert run(3) == b"CACHE 3"
    batches = range(1, MAX_CONTEXTS + 5)
    assert run(*batches).split()[1:] == [b"%d" % batch for batch in batches]
    gpu.invalid = 5
    with pytest.raises(BackendError, match="version mismatch, old cuda driver"):
        loaded(path, "tensorrt-rtx")


def test_no_place_for_a_cache(gpu: FakeGpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = copied(1, tmp_path / "b")
    with_engines(path, "tensorrt-rtx")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with loaded(path, "tensorrt-rtx") as model:
        assert model.run(feed(IMAGES[:2]))["logits"].tobytes() == alone(path, IMAGES[:2])
