"""One loaded model used from many threads: the answers of one thread, to the bit, and none lost."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli.exported import digits, exported_bundle, one_block

import swin_deploy
from swin_deploy.errors import BackendError, InputError

THREADS, REQUESTS = 32, {"onnxruntime": 10_000, "openvino": 400, "torch": 400}
SIZES = ((32, 32), (16, 24))


@pytest.fixture(scope="module")
def two_sizes() -> str:
    """One block at two image sizes."""
    options = [part for height, width in SIZES for part in ("--image-size", f"{height}x{width}")]
    return str(exported_bundle("--weights", str(one_block()), *options))


def same(found: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray]) -> bool:
    return found.keys() == wanted.keys() and all(found[name].tobytes() == wanted[name].tobytes() for name in wanted)


@pytest.mark.parametrize("backend", REQUESTS)
def test_many_threads_get_the_answers_of_one(backend: str, two_sizes: str) -> None:
    """Graphs that nobody has opened yet, two sizes, three batches, a quarter with `out`."""
    pytest.importorskip(backend, reason=f"{backend} is not installed")
    random = np.random.default_rng(0)
    feeds = [
        {"pixel_values": random.standard_normal((batch, 3, *size)).astype(np.float32)}
        for size in SIZES
        for batch in (1, 2, 3, 5)
    ]
    with swin_deploy.load(two_sizes, backend=backend, threads=1, precision="fp32") as alone:
        wanted = [alone.run(feed) for feed in feeds]
    count = REQUESTS[backend]
    order = random.integers(0, len(feeds), count)

    def client(number: int) -> int:
        outs = [{name: np.empty_like(array) for name, array in answer.items()} for answer in wanted]
        right = 0
        for request in range(number, count, THREADS):
            which = int(order[request])
            right += same(shared.run(feeds[which], outs[which] if request % 4 == 0 else None), wanted[which])
        return right

    with (
        swin_deploy.load(two_sizes, backend=backend, threads=1, precision="fp32") as shared,
        ThreadPoolExecutor(THREADS) as pool,
    ):
        assert sum(pool.map(client, range(THREADS))) == count


@pytest.mark.parametrize("backend", REQUESTS)
def test_closing_waits_for_those_inside_and_refuses_the_others(backend: str) -> None:
    pytest.importorskip(backend, reason=f"{backend} is not installed")
    feed = {"pixel_values": np.random.default_rng(0).standard_normal((4, 3, 32, 32)).astype(np.float32)}
    model = swin_deploy.load(digits(2), backend=backend, threads=1, precision="fp32")
    wanted = model.run(feed)
    begun, ends = threading.Barrier(9), []

    def client() -> None:
        begun.wait()
        try:
            while True:
                assert same(model.run(feed), wanted)
        except BackendError as error:
            ends.append(str(error))

    threads = [threading.Thread(target=client) for _ in range(8)]
    for thread in threads:
        thread.start()
    begun.wait()
    model.close()
    for thread in threads:
        thread.join(60)
    assert ends == ["This model is closed. Load it again to run it."] * 8


@pytest.mark.parametrize("backend", REQUESTS)
def test_a_call_that_fails_leaves_the_model_usable(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = pytest.importorskip(backend, reason=f"{backend} is not installed")
    feed = {"pixel_values": np.random.default_rng(0).standard_normal((1, 3, 32, 32)).astype(np.float32)}

    def fails(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("out of\nmemory")

    with swin_deploy.load(digits(1), backend=backend, precision="fp32") as model:
        wanted = model.run(feed)
        with pytest.raises(InputError):
            model.run({"pixel_values": feed["pixel_values"][:, :1]})
        with monkeypatch.context() as patch:
            owner, name = {
                "onnxruntime": ("InferenceSession", "run_with_iobinding"),
                "openvino": ("InferRequest", "infer"),
                "torch": ("Tensor", "reshape"),
            }[backend]
            patch.setattr(getattr(module, owner), name, fails)
            for _ in range(300):  # more than any pool holds
                with pytest.raises(BackendError, match="failed while running the model: out of memory") as caught:
                    model.run(feed)
        assert isinstance(caught.value.__cause__, RuntimeError)
        assert same(model.run(feed), wanted)


@pytest.mark.parametrize("backend", REQUESTS)
def test_what_is_opened_late_is_found_from_any_folder(
    backend: str, two_sizes: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(backend, reason=f"{backend} is not installed")
    monkeypatch.chdir(Path(two_sizes).parent)
    with swin_deploy.load(Path(two_sizes).name, backend=backend, precision="fp32") as model:
        monkeypatch.chdir(tmp_path)
        for size in SIZES:
            assert model.run({"pixel_values": np.zeros((3, 3, *size), np.float32)})["logits"].shape[0] == 3


def test_a_bundle_that_is_replaced_under_openvino(two_sizes: str, tmp_path: Path) -> None:
    """It compiles once more for the first larger batch, and must not take another network for that."""
    pytest.importorskip("openvino", reason="openvino is not installed")
    images = np.zeros((2, 3, *SIZES[0]), np.float32)
    shutil.copytree(two_sizes, tmp_path / "bundle")
    with swin_deploy.load(tmp_path / "bundle", backend="openvino", precision="fp32") as model:
        shutil.rmtree(tmp_path / "bundle")
        shutil.copytree(two_sizes, tmp_path / "bundle")
        assert len(model.run({"pixel_values": images[:1]})["logits"]) == 1
        with pytest.raises(BackendError, match=r"model\.onnx was changed.*Load the bundle again"):
            model.run({"pixel_values": images})
        assert len(model.run({"pixel_values": images[:1]})["logits"]) == 1
