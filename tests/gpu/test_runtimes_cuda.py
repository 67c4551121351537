"""Models on a real GPU, in TensorRT, TensorRT for RTX and ONNX Runtime: what test_gpu_simulated.py can only simulate."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gpu.needs import BATCHES, bundle, copied, needs_cuda_provider, needs_rtx, needs_torch_cuda
from once import once

import swin_deploy
from swin_deploy.bundle import Bundle
from swin_deploy.errors import BackendError, InputError
from swin_deploy.gpus import cuda_devices
from swin_deploy.parity import TOLERANCES, compare
from swin_deploy.runtimes.gpu.cuda_context import CudaContext
from swin_deploy.runtimes.gpu.onnxruntime_cuda import MAX_GRAPHS

pytestmark = [pytest.mark.cuda]
IMAGES = np.random.default_rng(0).standard_normal((24, 3, 32, 32)).astype(np.float32)
ENGINES = [pytest.param("tensorrt", marks=pytest.mark.tensorrt), "tensorrt-rtx"]


def bundle_for(backend: str) -> Path:
    """A bundle of a trained model, with an fp16, an fp32 and an INT8 engine for this GPU if the back end runs engines."""
    if backend == "tensorrt-rtx":
        needs_rtx()
    if backend == "onnxruntime":
        needs_cuda_provider()

    def make(path: Path) -> None:
        copied(2, path)
        gpu = cuda_devices()[0].capability
        held = {one.precision for one in Bundle.open(path).engines.values() if (one.backend, one.gpu) == (backend, gpu)}
        for precision in ("fp16", "fp32", "int8") if backend != "onnxruntime" else ():
            if precision not in held:
                swin_deploy.build_engine(path, precision=precision, backend=backend, batches=BATCHES)

    return once(f"digits-on-gpu-{backend}", make)


@pytest.fixture(params=[*ENGINES, "onnxruntime"])
def on_gpu(request: pytest.FixtureRequest) -> tuple[Path, str]:
    return bundle_for(str(request.param)), str(request.param)


@pytest.fixture(params=ENGINES)
def engines(request: pytest.FixtureRequest) -> tuple[Path, str]:
    return bundle_for(str(request.param)), str(request.param)


def opened(bundle: tuple[Path, str], precision: str = "fp16") -> Any:
    return swin_deploy.load(bundle[0], backend=bundle[1], precision=precision, device="cuda", trust=True)


@pytest.fixture
def model(on_gpu: tuple[Path, str]) -> Iterator[Any]:
    with opened(on_gpu) as loaded:
        yield loaded


def feed(images: Any) -> dict[str, Any]:
    return {"pixel_values": images}


@pytest.fixture(scope="module")
def expected() -> np.ndarray:
    with swin_deploy.load(bundle(2), device="cpu", precision="fp32", trust=True) as cpu:
        return np.asarray(cpu.run(feed(IMAGES))["logits"])


def test_verified_against_pytorch(on_gpu: tuple[Path, str]) -> None:
    verdicts = swin_deploy.verify(on_gpu[0], backend=on_gpu[1], device="cuda", trust=True)
    assert {verdict.precision for verdict in verdicts} == {"fp16", "fp32", "int8"}
    assert all(verdict.verified for verdict in verdicts), [verdict.mismatch() for verdict in verdicts if not verdict.verified]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_every_batch_answers_as_the_cpu_does(precision: str, on_gpu: tuple[Path, str], expected: np.ndarray) -> None:
    """More batch sizes than CUDA graphs are kept for; the same answers to the bit whether captured, launched or run plainly."""
    with opened(on_gpu, precision) as model:
        for batch in (*range(1, MAX_GRAPHS + 4), 3, 1):
            first = model.run(feed(IMAGES[:batch]))["logits"]
            assert compare(first, expected[:batch]).within(TOLERANCES[precision])
            for _ in range(4):
                other = model.run(feed(-IMAGES[:batch]))["logits"]
                assert not np.array_equal(other, first)
                assert model.run(feed(IMAGES[:batch]))["logits"].tobytes() == first.tobytes()
            out = {"logits": np.full_like(first, np.nan)}
            assert model.run(feed(IMAGES[:batch]), out) is out
            assert out["logits"].tobytes() == first.tobytes()


@pytest.mark.tensorrt
def test_graphs_are_captured_and_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the inputs come from the host or from tensors that are at another address each time."""
    launched, launch = [], CudaContext.launch
    monkeypatch.setattr(CudaContext, "launch", lambda self, *arguments: launched.append(launch(self, *arguments)))
    with opened((bundle_for("tensorrt"), "tensorrt")) as model:
        for _ in range(10):
            model.run(feed(IMAGES[:3]))
        assert len(launched) > 5
        torch = needs_torch_cuda()
        launched.clear()
        for tensor in [torch.from_numpy(IMAGES[:3]).cuda() for _ in range(8)]:
            model.run(feed(tensor))
        assert len(launched) > 5


def test_threads(model: Any) -> None:
    """From the first call on, so that others run while one captures."""
    batches = np.random.default_rng(1).choice([1, 2, 5, 8, 11], 800)
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda batch: model.run(feed(IMAGES[:batch]))["logits"].tobytes(), batches))
    expected = {batch: model.run(feed(IMAGES[:batch]))["logits"].tobytes() for batch in set(batches)}
    assert all(answer == expected[batch] for answer, batch in zip(found, batches, strict=True))


def test_closing_waits_for_calls_in_flight(on_gpu: tuple[Path, str]) -> None:
    model, begun = opened(on_gpu), threading.Barrier(5)

    def client() -> str:
        begun.wait()
        try:
            while True:
                model.run(feed(IMAGES[:4]))
        except BackendError as error:
            return str(error)

    with ThreadPoolExecutor(4) as pool:
        ends = [pool.submit(client) for _ in range(4)]
        begun.wait()
        model.close()
        assert {end.result() for end in ends} == {"This model is closed. Load it again to run it."}


def test_tensors_of_pytorch_on_the_gpu(model: Any) -> None:
    torch = needs_torch_cuda()
    for batch in (1, 4, 11):
        expected = model.run(feed(IMAGES[:batch]))["logits"].tobytes()
        tensor = torch.from_numpy(IMAGES[:batch]).cuda()
        for stream in (torch.cuda.default_stream(), torch.cuda.Stream()):
            with torch.cuda.stream(stream):
                stream.wait_stream(torch.cuda.default_stream())
                for _ in range(20):  # written by torch just before; each time perhaps at another address
                    assert model.run(feed((tensor * 2) / 2))["logits"].tobytes() == expected
        odd = torch.empty(tensor.numel() + 1, device="cuda")[1:].reshape(tensor.shape).copy_(tensor)
        assert odd.data_ptr() % 256
        assert model.run(feed(odd))["logits"].tobytes() == expected
    with pytest.raises(InputError, match="not contiguous"):
        model.run(feed(tensor.transpose(2, 3)))
    cpu = swin_deploy.load(bundle(2), device="cpu", precision="fp32", trust=True)
    with cpu, pytest.raises(InputError, match="is on cuda:0"):
        cpu.run(feed(tensor))


def test_a_failed_call_leaves_the_model_usable(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = model.run(feed(IMAGES[:9]))["logits"].tobytes()

    def fails(*arguments: Any) -> None:
        raise RuntimeError("out of\nmemory")

    with monkeypatch.context() as patch:
        patch.setattr(CudaContext, "synchronize", fails)
        with pytest.raises(BackendError, match="failed while running the model: out of memory"):
            model.run(feed(IMAGES[:9]))
    assert model.run(feed(IMAGES[:9]))["logits"].tobytes() == expected


def free_memory() -> int:
    """The GPU's free memory in bytes."""
    from cuda.bindings import driver

    cuda = CudaContext(0)
    with cuda.current():
        _, free, _ = driver.cuMemGetInfo()
    cuda.close()
    return int(free)


def grows(measure: Callable[[], int]) -> bool:
    """Whether `measure()` is more than 0 in each of several attempts: a leak is, but not what other programs allocate."""
    return all(measure() > 0 for _ in range(6))


def test_memory_stays_flat(on_gpu: tuple[Path, str]) -> None:
    """Warm calls keep no memory."""
    with opened(on_gpu) as model:
        outs = {batch: dict(model.run(feed(IMAGES[:batch]))) for batch in (1, 4, 8)}

        def kept() -> int:
            before = free_memory()
            for _ in range(200):
                for batch, out in outs.items():
                    model.run(feed(IMAGES[:batch]), out)
            return before - free_memory()

        kept()
        assert not grows(kept)


def test_models_that_come_and_go(on_gpu: tuple[Path, str]) -> None:
    """Closed, or left to the garbage collector: four models that stayed would take more than is allowed."""

    def kept() -> int:
        before = free_memory()
        for turn in range(4):
            model = opened(on_gpu)
            model.run(feed(IMAGES[:8]))
            if turn % 2:
                model.close()
            del model
            gc.collect()
        return before - free_memory() - (32 << 20)  # one that is being freed, in a thread of its own, may still be there

    kept()
    assert not grows(kept)


def test_a_stream_of_frames(model: Any) -> None:
    images = [Path(__file__).parents[2] / f"examples/digits/images/{digit}.png" for digit in (4, 2, 9, 0, 1, 7)]
    assert [best[0].index for best in model.stream(images * 20, batch=2)] == [4, 2, 9, 0, 1, 7] * 20


def test_a_runtime_after_a_compiler_reports_why_it_fails(engines: tuple[Path, str], tmp_path: Path) -> None:
    """Both use the one logger that TensorRT keeps."""
    copy = copied(2, tmp_path / "b")
    built = swin_deploy.build_engine(copy, precision="fp16", backend=engines[1])[0]
    bundle = Bundle.open(copy)
    bundle.with_file(built.file, dict(bundle.files[built.file]), lambda place: place.write_bytes(b"no plan" * 100))
    with pytest.raises(BackendError, match=r"cannot run .*\.engine: (?!it gave no reason).{10,}compile it again"):
        opened((copy, engines[1]))


def test_the_kernel_cache_of_tensorrt_for_rtx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = bundle_for("tensorrt-rtx")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for content in (None, b"", b"damaged"):
        files = [*tmp_path.glob("swin-deploy/tensorrt-rtx/*.cache")]
        assert len(files) == (content is not None)
        for file in files:
            file.write_bytes(content or b"")
        with opened((path, "tensorrt-rtx")) as model:
            assert np.isfinite(model.run(feed(IMAGES[:2]))["logits"]).all()
        [kept] = tmp_path.glob("swin-deploy/tensorrt-rtx/*.cache")
        assert kept.stat().st_size > 100


@pytest.mark.parametrize("version", [1, 2])
def test_int8_in_onnxruntime(version: int) -> None:
    """Whether or not every node of a quantised graph has a kernel on the GPU, it answers as on the CPU."""
    needs_cuda_provider()
    path = bundle(version)
    with swin_deploy.load(path, backend="onnxruntime", device="cpu", precision="int8", trust=True) as cpu:
        expected = cpu.run(feed(IMAGES[:3]))["logits"]
    with opened((path, "onnxruntime"), "int8") as model:
        for _ in range(3):
            assert compare(model.run(feed(IMAGES[:3]))["logits"], expected).within(TOLERANCES["int8"])


def test_both_sizes(on_gpu: tuple[Path, str]) -> None:
    images = np.random.default_rng(2).standard_normal((3, 3, 48, 48)).astype(np.float32)
    with swin_deploy.load(bundle(2), device="cpu", precision="fp32", trust=True) as cpu:
        expected = cpu.run(feed(images))["logits"]
    with opened(on_gpu) as model:
        assert compare(model.run(feed(images))["logits"], expected).within(TOLERANCES["fp16"])


def test_tensorrt_for_rtx_captures(caplog: pytest.LogCaptureFixture) -> None:
    """It captures by itself. Nothing falls back to calls without graphs, whose answers are the same to the bit."""
    path = bundle_for("tensorrt-rtx")
    with opened((path, "tensorrt-rtx")) as model:
        answers = {model.run(feed(IMAGES[:4]))["logits"].tobytes() for _ in range(8)}
    assert len(answers) == 1
    assert "without CUDA graphs" not in caplog.text


@pytest.mark.tensorrt
def test_the_tensorrt_provider_of_onnxruntime(expected: np.ndarray) -> None:
    if "TensorrtExecutionProvider" not in needs_cuda_provider().get_available_providers():
        pytest.skip("this ONNX Runtime has no TensorRT provider")
    with swin_deploy.load(bundle_for("onnxruntime"), backend="onnxruntime-tensorrt", precision="fp16") as model:
        for _ in range(3):
            assert compare(model.run(feed(IMAGES[:3]))["logits"], expected[:3]).within(TOLERANCES["fp16"])
