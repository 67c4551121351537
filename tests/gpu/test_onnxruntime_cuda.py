"""ONNX Runtime's CUDA provider on a real GPU: what tests/runtimes/test_onnxruntime_cuda_simulated.py can only simulate."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli.exported import copied, digits

import swin_deploy
from swin_deploy.errors import BackendError, InputError
from swin_deploy.parity import TOLERANCES, compare
from swin_deploy.runtimes.gpu.onnxruntime_cuda import MOST_GRAPHS

pytestmark = [pytest.mark.cuda]
IMAGES = np.random.default_rng(0).standard_normal((24, 3, 32, 32)).astype(np.float32)
FEED = IMAGES[:3]


@pytest.fixture(autouse=True)
def provider() -> None:
    ort = pytest.importorskip("onnxruntime", reason="the back end under test")
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        pytest.skip('this ONNX Runtime has no CUDA provider (pip install "swin-deploy[gpu]")')


@pytest.fixture
def model(provider: None) -> Iterator[Any]:
    with swin_deploy.load(digits(2), backend="onnxruntime", device="cuda", precision="fp32") as loaded:
        yield loaded


def feed(images: Any) -> dict[str, Any]:
    return {"pixel_values": images}


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_answers_as_the_cpu_does(version: int, precision: str) -> None:
    with swin_deploy.load(digits(version), backend="onnxruntime", device="cpu", precision="fp32") as cpu:
        wanted = cpu.run(feed(FEED))["logits"]
    with swin_deploy.load(digits(version), backend="onnxruntime", device="cuda", precision=precision) as model:
        assert model.describe().device == "cuda:0"
        found = model.run(feed(FEED))["logits"]
        assert compare(found, wanted).within(TOLERANCES[precision])
        out = {"logits": np.full_like(found, np.nan)}
        assert model.run(feed(FEED), out) is out
        assert np.array_equal(out["logits"], found)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_graph_for_each_batch(precision: str, caplog: pytest.LogCaptureFixture) -> None:
    """More batch sizes than there are graphs: up and down, the same answers to the bit, and nothing in the log."""
    caplog.set_level(logging.INFO, "swin_deploy")
    with swin_deploy.load(digits(2), backend="onnxruntime", device="cuda", precision=precision) as model:
        computing = model._runtimes[model.image_sizes[0]]._computing
        batches = range(1, MOST_GRAPHS + 4)
        first = {batch: model.run(feed(IMAGES[:batch]))["logits"] for batch in batches}
        assert len(computing._rooms) == MOST_GRAPHS
        for batch in (*reversed(batches), *batches):
            other = model.run(feed(-IMAGES[:batch]))["logits"]
            assert not np.array_equal(other, first[batch])
            assert model.run(feed(IMAGES[:batch]))["logits"].tobytes() == first[batch].tobytes()
        for batch in batches:
            assert compare(first[batch], first[batches[-1]][:batch]).within(TOLERANCES[precision])
    assert [record for record in caplog.records if record.name == "swin_deploy"] == []


@pytest.mark.parametrize("precision", ["int8"])
def test_without_graphs_where_nodes_run_on_the_cpu(precision: str, tmp_path: Path) -> None:
    """Whether or not every node of a quantised graph has a kernel there, it answers as on the CPU."""
    path = copied(1, tmp_path / "b")
    swin_deploy.quantize(path, IMAGES, quantization=precision)
    with swin_deploy.load(path, backend="onnxruntime", device="cpu", precision=precision) as cpu:
        wanted = cpu.run(feed(FEED))["logits"]
    with swin_deploy.load(path, backend="onnxruntime", device="cuda", precision=precision) as model:
        for _ in range(3):
            assert compare(model.run(feed(FEED))["logits"], wanted).within(TOLERANCES[precision])


def test_threads(model: Any) -> None:
    """32 of them, from the first call on, so that others run while one captures."""
    jobs = [1, 3, 8, 2] * 500
    with swin_deploy.load(digits(2), backend="onnxruntime", device="cuda", precision="fp32") as other:
        wanted = {batch: other.run(feed(IMAGES[:batch]))["logits"] for batch in set(jobs)}
    with ThreadPoolExecutor(32) as threads:
        found = list(threads.map(lambda batch: model.run(feed(IMAGES[:batch]))["logits"], jobs))
    assert all(np.array_equal(one, wanted[batch]) for one, batch in zip(found, jobs, strict=True))


def test_models_that_come_and_go() -> None:
    """Nothing is left behind on the GPU by models that are closed, and that nobody closed."""
    torch = pytest.importorskip("torch", reason="PyTorch says how much memory is free")
    if not torch.cuda.is_available():
        pytest.skip("this PyTorch has no CUDA")
    free = []
    for step in range(12):
        model = swin_deploy.load(digits(2), backend="onnxruntime", device="cuda", precision="fp32")
        model.run(feed(FEED))
        thread = model._runtimes[model.image_sizes[0]]._thread
        if step % 2:
            model.close()
            with pytest.raises(BackendError, match="closed"):
                model.run(feed(FEED))
        del model
        gc.collect()
        thread.join()
        free.append(torch.cuda.mem_get_info()[0])
    assert free[-1] > free[3] - 32 * 2**20


def test_a_stream_of_frames(model: Any) -> None:
    images = [Path(__file__).parents[2] / f"examples/digits/images/{digit}.png" for digit in (4, 2, 9, 0, 1, 7)]
    assert [best[0].index for best in model.stream(images * 20, batch=2)] == [4, 2, 9, 0, 1, 7] * 20


def test_the_tensorrt_provider() -> None:
    import onnxruntime as ort

    pytest.importorskip("tensorrt", reason="the provider needs its libraries")
    if "TensorrtExecutionProvider" not in ort.get_available_providers():
        pytest.skip("this ONNX Runtime has no TensorRT provider")
    with swin_deploy.load(digits(2), backend="onnxruntime", device="cpu", precision="fp32") as cpu:
        wanted = cpu.run(feed(FEED))["logits"]
    with swin_deploy.load(digits(2), backend="onnxruntime-tensorrt", precision="fp16") as model:
        for _ in range(3):
            assert compare(model.run(feed(FEED))["logits"], wanted).within(TOLERANCES["fp16"])


def test_verified_on_the_gpu(tmp_path: Path) -> None:
    assert all(verdict.verified for verdict in swin_deploy.verify(copied(2, tmp_path / "b"), device="cuda"))


def test_a_tensor_on_the_gpu_is_not_copied_to_the_host(model: Any) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch makes the tensor")
    if not torch.cuda.is_available():
        pytest.skip("this PyTorch has no CUDA")
    tensor = torch.from_numpy(FEED).cuda()
    wanted = model.run(feed(FEED))["logits"]
    for _ in range(20):  # written by torch's stream just before
        found = model.run(feed((tensor * 2) / 2))["logits"]
        assert np.allclose(found, wanted, atol=1e-5)
    with pytest.raises(InputError, match="not contiguous"):
        model.run(feed(tensor.transpose(2, 3)))
    with swin_deploy.load(digits(2), device="cpu", precision="fp32") as cpu, pytest.raises(InputError, match="is on cuda:0"):
        cpu.run(feed(tensor))
