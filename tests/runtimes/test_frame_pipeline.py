"""model.stream gives the results of classify, in order, and reads a bounded number of frames ahead."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from cli.exported import EXAMPLES, digits, exported

import swin_deploy
from swin_deploy.errors import BackendError, InputError, UsageError
from swin_deploy.runtimes.model import Model

CHECKPOINTS = EXAMPLES.parent / "tests/checkpoints/data"
DIGITS = [EXAMPLES / f"digits/images/{digit}.png" for digit in (4, 2, 9, 9, 0, 1, 7)]


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    with swin_deploy.load(digits(2), backend="onnxruntime", threads=1, precision="fp32") as loaded:
        yield loaded


def workers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("swin-deploy ")]


@pytest.mark.parametrize("batch", [1, 3, 7, 100])
def test_the_results_of_classify_in_order(model: Model, batch: int) -> None:
    found = list(model.stream(iter(DIGITS), batch=batch, top_k=2))
    assert found == model.classify(DIGITS, top_k=2, batch_size=batch)
    assert list(model.stream([], batch=batch)) == []
    assert workers() == []


def test_a_camera_that_reuses_its_memory(model: Model) -> None:
    grey = [np.full((32, 32, 3), 40 * step, np.uint8) for step in range(6)]

    def frames() -> Iterator[np.ndarray]:
        memory = np.empty((32, 32, 3), np.uint8)
        for frame in grey:
            memory[:] = frame
            yield memory

    wanted = model.classify(grey, batch_size=3)
    assert list(model.stream(frames(), batch=3, top_k=5)) == wanted
    assert model.classify(frames(), batch_size=3) == wanted


@pytest.mark.parametrize(("batch", "prefetch"), [(1, 1), (1, 2), (3, 2)])
def test_a_slow_consumer_holds_up_the_frames(model: Model, batch: int, prefetch: int) -> None:
    consumed = ahead = 0
    read = threading.Semaphore(0)

    def frames() -> Iterator[Path]:
        nonlocal ahead
        for number in range(1000):
            ahead = max(ahead, number + 1 - consumed)
            read.release()
            yield DIGITS[0]

    stream = model.stream(frames(), batch=batch, prefetch=prefetch)
    # The batch of the consumer, one that is being prepared, and `prefetch` before and after the network.
    most = batch * (2 * prefetch + 2)
    for step in range(5):
        for _ in range(batch):
            next(stream)
        for _ in range(batch if step else most):
            read.acquire()
        consumed += batch
    assert ahead <= most
    assert len(workers()) == 2
    stream.close()  # type: ignore[attr-defined]
    assert workers() == []


@pytest.mark.parametrize("batch", [1, 2, 4])
def test_an_error_comes_where_its_frame_would(model: Model, batch: int) -> None:
    def broken() -> Iterator[Path]:
        yield from DIGITS[:3]
        raise OSError("the camera is gone")

    for frames, error in ((broken(), OSError), ([*DIGITS[:3], Path("absent.png"), *DIGITS[3:]], InputError)):
        found = []
        stream = model.stream(frames, batch=batch)
        with pytest.raises(error, match=r"gone|absent"):
            found.extend(best[0].index for best in stream)
        assert found == [4, 2, 9]
        assert workers() == []


def test_a_model_that_is_closed_meanwhile() -> None:
    model = swin_deploy.load(digits(2), backend="onnxruntime", threads=1, precision="fp32")
    stream = model.stream(DIGITS * 100)
    next(stream)
    model.close()
    with pytest.raises(BackendError, match="closed"):
        list(stream)
    assert workers() == []


@pytest.mark.parametrize("arguments", [{"batch": 0}, {"prefetch": 0}, {"top_k": 0}])
def test_invalid_numbers_of_a_stream(model: Model, arguments: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="at least 1"):
        model.stream(DIGITS, **arguments)  # before anything is asked of it


def test_reconstruct_and_the_stream_of_another_task() -> None:
    options = ("--weights", str(CHECKPOINTS / "hf523__SwinForMaskedImageModeling__basic"), "--task", "masked-image-modeling")
    [path] = [path for path in exported(*options).iterdir() if path.is_dir()]
    with swin_deploy.load(path, backend="onnxruntime", threads=1, precision="fp32") as model:
        patches = model.inputs[1].shape[1]
        assert isinstance(patches, int)
        mask = np.random.default_rng(0).random((3, patches)) < 0.5
        images = [np.asarray(np.random.default_rng(i).integers(0, 256, (32, 32, 3)), np.uint8) for i in range(3)]
        feeds = {"pixel_values": model.preprocessor(images), "bool_masked_pos": mask}
        wanted = model.run(feeds)["reconstruction"]
        assert np.allclose(model.reconstruct(images, mask, batch_size=2), wanted, atol=1e-5)
        plain = model.run({**feeds, "bool_masked_pos": np.zeros_like(mask)})["reconstruction"]
        assert np.allclose(model.reconstruct(iter(images)), plain, atol=1e-5)
        assert not np.allclose(wanted, plain, atol=1e-3)
        alike = model.run({**feeds, "bool_masked_pos": mask[[0] * 3]})["reconstruction"]
        assert np.allclose(model.reconstruct(images, mask[0]), alike, atol=1e-5)
        streamed = [one["reconstruction"] for one in model.stream(images, batch=2)]
        assert np.allclose(np.concatenate(streamed), plain, atol=1e-5)
        with pytest.raises(InputError, match='"bool_masked_pos" has a batch of 2, and "pixel_values" one of 3'):
            model.run({**feeds, "bool_masked_pos": mask[:2]})
        for wrong in (mask[:2], mask[[0] * 4], mask[:, 1:], mask.astype(np.float32), [True]):
            with pytest.raises(InputError, match="mask"):
                model.reconstruct(images, wrong)  # type: ignore[arg-type]
        with pytest.raises(UsageError, match="classify"):
            model.classify(images)
    with (
        swin_deploy.load(digits(2), backend="onnxruntime", precision="fp32") as other,
        pytest.raises(UsageError, match=r"reconstruct\(\) needs"),
    ):
        other.reconstruct(images)


def test_no_thread_can_be_started(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def submit(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(ThreadPoolExecutor, "submit", submit)
    with pytest.raises(RuntimeError, match="start new thread"):
        list(model.stream(DIGITS))
    assert workers() == []


def test_one_frame_and_an_invalid_one(model: Model) -> None:
    assert list(model.stream(DIGITS[0])) == list(model.stream(str(DIGITS[0]))) == model.classify(DIGITS[0])
    with pytest.raises(InputError):
        list(model.stream(3))  # type: ignore[arg-type]
    assert workers() == []
