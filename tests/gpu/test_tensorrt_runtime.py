"""Engines on a real GPU: what tests/runtimes/test_tensorrt_simulated.py can only simulate."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli.exported import copied

import swin_deploy
from swin_deploy.bundle import Bundle
from swin_deploy.errors import BackendError, InputError
from swin_deploy.exporters.engines.targets import rtx_gpus
from swin_deploy.gpus import cuda_devices
from swin_deploy.parity import TOLERANCES, compare
from swin_deploy.runtimes.gpu.contexts import Lane
from swin_deploy.runtimes.gpu.tensorrt import MOST_LANES

pytestmark = [pytest.mark.cuda]
IMAGES = np.random.default_rng(0).standard_normal((24, 3, 32, 32)).astype(np.float32)
BATCHES = [(1, 1, 1), (1, 4, 8)]


@pytest.fixture(scope="module", params=[pytest.param("tensorrt", marks=pytest.mark.tensorrt), "tensorrt-rtx"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A bundle of a trained model with an fp16 and an fp32 engine for this GPU, and the back end that they are for."""
    backend = str(request.param)
    if backend == "tensorrt-rtx":
        pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
        if cuda_devices()[0].capability not in rtx_gpus():
            pytest.skip(f"TensorRT for RTX does not compile for {cuda_devices()[0].capability}")
    path = copied(2, tmp_path_factory.mktemp(backend) / "b")
    for precision in ("fp16", "fp32"):
        swin_deploy.build_engine(path, precision=precision, backend=backend, batches=BATCHES)
    return path, backend


@pytest.fixture
def model(made: tuple[Path, str]) -> Iterator[Any]:
    path, backend = made
    with swin_deploy.load(path, backend=backend, precision="fp16") as loaded:
        yield loaded


def feed(images: Any) -> dict[str, Any]:
    return {"pixel_values": images}


def test_verified_against_pytorch(made: tuple[Path, str]) -> None:
    """Both precisions, within what verify allows for them."""
    path, backend = made
    verdicts = swin_deploy.verify(path, backend=backend, device="cuda")
    assert {verdict.precision for verdict in verdicts} == {"fp16", "fp32"}
    assert all(verdict.verified for verdict in verdicts), [verdict.mismatch() for verdict in verdicts if not verdict.verified]


@pytest.mark.parametrize("batch", range(1, 12))
def test_every_batch_answers_as_the_cpu_does(batch: int, made: tuple[Path, str], model: Any) -> None:
    path, _ = made
    with swin_deploy.load(path, backend="onnxruntime", precision="fp32", device="cpu") as other:
        wanted = other.run(feed(IMAGES[:batch]))["logits"]
    first = model.run(feed(IMAGES[:batch]))["logits"]
    assert compare(first, wanted).within(TOLERANCES["fp16"])
    for _ in range(4):  # captured, and launched as a graph
        assert model.run(feed(IMAGES[:batch]))["logits"].tobytes() == first.tobytes()
    out = {"logits": np.full_like(first, np.nan)}
    assert model.run(feed(IMAGES[:batch]), out) is out
    assert out["logits"].tobytes() == first.tobytes()


def test_graphs_are_captured_and_launched(made: tuple[Path, str], model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One capture for a batch, which is taken; TensorRT for RTX captures by itself."""
    from swin_deploy.runtimes.gpu.driver import Gpu

    _, backend = made
    launched, captured, plain = [], [], Gpu.captured
    monkeypatch.setattr(Gpu, "captured", lambda self, *a: captured.append(plain(self, *a)) or captured[-1])
    launch = Gpu.launch
    monkeypatch.setattr(Gpu, "launch", lambda self, *a: launched.append(launch(self, *a)))
    for _ in range(10):
        model.run(feed(IMAGES[:3]))
    if backend == "tensorrt":
        assert len(captured) == 1
        assert captured[0] is not None
        assert len(launched) == 9
    else:
        assert captured == launched == []


def test_threads(model: Any) -> None:
    wanted = {batch: model.run(feed(IMAGES[:batch]))["logits"].tobytes() for batch in (1, 2, 5, 8, 11)}
    order = np.random.default_rng(1).choice(list(wanted), 800)
    wrong = []

    def client(number: int) -> None:
        for batch in order[number::16]:
            if model.run(feed(IMAGES[:batch]))["logits"].tobytes() != wanted[int(batch)]:
                wrong.append(int(batch))

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(client, range(16)))
    assert wrong == []


def test_closing_waits_for_those_inside(made: tuple[Path, str]) -> None:
    path, backend = made
    model = swin_deploy.load(path, backend=backend, precision="fp16")
    begun, ends = threading.Barrier(5), []

    def client() -> None:
        begun.wait()
        try:
            while True:
                model.run(feed(IMAGES[:4]))
        except BackendError as error:
            ends.append(str(error))

    threads = [threading.Thread(target=client) for _ in range(4)]
    for thread in threads:
        thread.start()
    begun.wait()
    model.close()
    for thread in threads:
        thread.join(60)
    assert ends == ["This model is closed. Load it again to run it."] * 4


def test_tensors_of_pytorch_on_the_gpu(model: Any) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch makes the tensors")
    if not torch.cuda.is_available():
        pytest.skip("this PyTorch has no CUDA")
    for batch in (1, 4, 11):
        wanted = model.run(feed(IMAGES[:batch]))["logits"]
        tensor = torch.from_numpy(IMAGES[:batch]).cuda()
        for stream in (torch.cuda.default_stream(), torch.cuda.Stream()):
            with torch.cuda.stream(stream):
                stream.wait_stream(torch.cuda.default_stream())
                for _ in range(20):  # written by torch just before; each time perhaps somewhere else
                    found = model.run(feed((tensor * 2) / 2))["logits"]
                    assert found.tobytes() == wanted.tobytes()
        odd = torch.empty(tensor.numel() + 1, device="cuda")[1:].reshape(tensor.shape).copy_(tensor)
        assert odd.data_ptr() % 256
        assert model.run(feed(odd))["logits"].tobytes() == wanted.tobytes()
    with pytest.raises(InputError, match="not contiguous"):
        model.run(feed(tensor.transpose(2, 3)))


def test_tensors_that_are_somewhere_else_each_time(made: tuple[Path, str], model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are copied from the second on, and the graph stays."""
    torch = pytest.importorskip("torch", reason="PyTorch makes the tensors")
    if not torch.cuda.is_available():
        pytest.skip("this PyTorch has no CUDA")
    from swin_deploy.runtimes.gpu.driver import Gpu

    captured, launched, capture, launch = [], [], Gpu.captured, Gpu.launch
    monkeypatch.setattr(Gpu, "captured", lambda self, *a: captured.append(capture(self, *a)) or captured[-1])
    monkeypatch.setattr(Gpu, "launch", lambda self, *a: launched.append(launch(self, *a)))
    wanted = model.run(feed(IMAGES[:3]))["logits"].tobytes()
    tensors = [torch.from_numpy(IMAGES[:3]).cuda() for _ in range(8)]
    assert len({tensor.data_ptr() for tensor in tensors}) == 8
    for tensor in tensors:
        assert model.run(feed(tensor))["logits"].tobytes() == wanted
    if made[1] == "tensorrt":
        assert len(captured) == 1
        assert len(launched) == 8


def test_a_runtime_after_a_compiler_says_why_it_fails(made: tuple[Path, str], tmp_path: Path) -> None:
    """Both have the one logger that TensorRT keeps."""
    _, backend = made
    copy = copied(2, tmp_path / "b")
    [built] = swin_deploy.build_engine(copy, precision="fp16", backend=backend)
    bundle = Bundle.open(copy)
    bundle.with_file(built.file, dict(bundle.files[built.file]), lambda place: place.write_bytes(b"no plan" * 100))
    with pytest.raises(BackendError, match=r"cannot run .*\.engine: (?!it gave no reason).{10,}compile it again"):
        swin_deploy.load(copy, backend=backend, precision="fp16")


def test_a_call_that_fails_leaves_the_model_usable(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = model.run(feed(IMAGES[:9]))["logits"].tobytes()

    def fails(self: Lane) -> None:
        raise RuntimeError("out of\nmemory")

    with monkeypatch.context() as patch:
        patch.setattr(Lane, "_execute", fails)
        for _ in range(MOST_LANES + 2):
            with pytest.raises(BackendError, match="failed while running the model: out of memory"):
                model.run(feed(IMAGES[:9]))
    assert model.run(feed(IMAGES[:9]))["logits"].tobytes() == wanted


def free_memory() -> int:
    """The GPU's free memory in bytes, as the driver says."""
    import ctypes

    from swin_deploy.gpus import cuda_driver
    from swin_deploy.runtimes.gpu.driver import Gpu

    driver, gpu = cuda_driver(), Gpu(0)
    assert driver is not None
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    with gpu.current():
        assert driver.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total)) == 0
    gpu.close()
    return free.value


def test_memory_stays_flat(made: tuple[Path, str]) -> None:
    """2000 calls keep none of the GPU's memory, and loading and closing ten times over no more than the first time."""
    path, backend = made
    with swin_deploy.load(path, backend=backend, precision="fp16") as model:
        outs = {batch: dict(model.run(feed(IMAGES[:batch]))) for batch in (1, 4, 8)}
        for _ in range(5):
            for batch, out in outs.items():
                model.run(feed(IMAGES[:batch]), out)
        before = free_memory()
        for _ in range(2000 // len(outs)):
            for batch, out in outs.items():
                model.run(feed(IMAGES[:batch]), out)
        assert before - free_memory() <= 0
    held = []
    for _ in range(10):
        with swin_deploy.load(path, backend=backend, precision="fp16") as model:
            model.run(feed(IMAGES[:8]))
        gc.collect()
        held.append(free_memory())
    assert held[0] - held[-1] < 32 << 20  # one lane left behind in each of the ten would be more


def test_the_jit_cache_of_tensorrt_for_rtx(made: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, backend = made
    if backend == "tensorrt":
        pytest.skip("TensorRT compiles everything beforehand")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for content in (None, b"", b"damaged"):
        files = [*tmp_path.glob("swin-deploy/tensorrt-rtx/*.cache")]
        assert len(files) == (content is not None)
        for file in files:
            file.write_bytes(content or b"")
        with swin_deploy.load(path, backend=backend, precision="fp16") as model:
            assert np.isfinite(model.run(feed(IMAGES[:2]))["logits"]).all()
        [kept] = tmp_path.glob("swin-deploy/tensorrt-rtx/*.cache")
        assert kept.stat().st_size > 100
