"""run() with `out`, with tensors of other libraries, and what it leaves behind: nothing."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from cli.exported import digits, exported_bundle, one_block

import swin_deploy
from swin_deploy.errors import InputError
from swin_deploy.runtimes.base import resolved
from swin_deploy.runtimes.model import Model

BACKENDS = ("onnxruntime", "openvino", "torch")
FEED = np.random.default_rng(0).standard_normal((3, 3, 32, 32)).astype(np.float32)


@pytest.fixture(scope="module", params=BACKENDS)
def model(request: pytest.FixtureRequest) -> Iterator[Model]:
    pytest.importorskip(request.param, reason=f"{request.param} is not installed")
    with swin_deploy.load(digits(2), backend=request.param, threads=1, precision="fp32") as loaded:
        yield loaded


@contextmanager
def traced_memory() -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
    finally:
        tracemalloc.stop()


def test_out_is_filled_and_returned(model: Model) -> None:
    for batch in (1, 3):
        wanted = model.run({"pixel_values": FEED[:batch]})
        out = {"logits": np.full((batch, 10), np.nan, np.float32)}
        assert model.run({"pixel_values": FEED[:batch]}, out) is out
        assert out["logits"].tobytes() == wanted["logits"].tobytes()
    part = np.full((5, 10), np.nan, np.float32)  # one's own array may be part of a larger one
    model.run({"pixel_values": FEED}, {"logits": part[1:4]})
    assert part[1:4].tobytes() == wanted["logits"].tobytes()
    assert np.isnan(part[[0, 4]]).all()


def test_feeds_in_any_memory(model: Model) -> None:
    """Read-only, as from a mapped file or a message; not aligned; in another order; backwards."""
    shifted = np.zeros(FEED.nbytes + 1, np.uint8)[1:].view(np.float32).reshape(FEED.shape)
    shifted[:] = FEED
    others = [np.frombuffer(FEED.tobytes(), np.float32).reshape(FEED.shape), shifted, np.asfortranarray(FEED)]
    others.append(np.ascontiguousarray(FEED[::-1])[::-1])
    for batch in (1, 3):
        wanted = model.run({"pixel_values": FEED[:batch]})["logits"].tobytes()
        assert [model.run({"pixel_values": one[:batch]})["logits"].tobytes() == wanted for one in others] == [True] * 4


@pytest.mark.parametrize(
    ("out", "sentence"),
    [
        ({}, r"out has no arrays\. Expected an array for each of logits: float32"),
        ({"logit": np.empty((3, 10), np.float32)}, "out has logit"),
        ({"logits": np.empty((3, 10), np.float32), "more": np.empty(1)}, "out has logits, more"),
        ({"logits": np.empty((3, 10))}, 'array for the output "logits" has dtype float64'),
        ({"logits": np.empty((2, 10), np.float32)}, r'output "logits" has shape \[2, 10\]\. Expected .*\[3, 10\]'),
        ({"logits": np.empty((10, 3), np.float32).T}, "writeable, contiguous"),
        ({"logits": np.broadcast_to(np.float32(0), (3, 10))}, "writeable, contiguous"),
        ({"logits": [0.0] * 10}, r"is a list\. Expected a numpy array"),
    ],
)
def test_an_out_that_does_not_fit(model: Model, out: dict[str, np.ndarray], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        model.run({"pixel_values": FEED}, out)


def test_outputs_with_more_rows_than_images(tmp_path: Path) -> None:
    """Attentions have a row for each window of each image."""
    options = ("--weights", str(one_block()), "--task", "feature-extraction", "--output-attentions")
    path = exported_bundle(*options)
    answers = {}
    for backend in BACKENDS:
        pytest.importorskip(backend, reason=f"{backend} is not installed")
        with swin_deploy.load(path, backend=backend, precision="fp32") as model:
            for batch in (1, 3):
                found = model.run({"pixel_values": FEED[:batch]})
                out = {name: np.full_like(array, np.nan) for name, array in found.items()}
                with traced_memory():
                    model.run({"pixel_values": FEED[:batch]}, out)
                    _, peak = tracemalloc.get_traced_memory()
                assert peak < sum(array.nbytes for array in out.values()) / 2  # the answers are written once, into `out`
                assert all(out[name].tobytes() == found[name].tobytes() for name in found)
                assert found["attentions.0"].shape == (4 * batch, 2, 16, 16)
            answers[backend] = found
    for answer in answers.values():
        assert all(np.allclose(answer[name], found[name], atol=1e-4) for name in found)


def test_sizes_of_outputs() -> None:
    assert resolved(("batch", 10), {"batch": 3}) == (3, 10)
    assert resolved(("16*batch", 2), {"batch": 3}) == (48, 2)
    assert resolved((4, 2), {}) == (4, 2)
    assert resolved(("other", 2), {"batch": 3}) is None


def test_ready_tensors_of_other_libraries(model: Model) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch makes the tensors")
    wanted = model.run({"pixel_values": FEED})["logits"]
    tensor = torch.from_numpy(FEED)
    negated = torch.complex(torch.zeros(FEED.shape), -tensor).conj().imag  # its signs are still to be changed
    assert negated.is_neg()
    for same in (tensor, tensor.to(memory_format=torch.channels_last), negated):
        assert model.run({"pixel_values": same})["logits"].tobytes() == wanted.tobytes()
    with pytest.raises(InputError, match="dtype float64"):
        model.run({"pixel_values": tensor.double()})
    with pytest.raises(InputError, match=r"cannot be read through DLPack: .*grad"):
        model.run({"pixel_values": tensor.clone().requires_grad_()})
    with pytest.raises(InputError, match="cannot be read through DLPack: Unknown device"):
        model.run({"pixel_values": tensor.to("meta")})


@pytest.mark.parametrize("backend", BACKENDS)
def test_warm_calls_keep_nothing(backend: str) -> None:
    pytest.importorskip(backend, reason=f"{backend} is not installed")
    model = swin_deploy.load(exported_bundle("--weights", str(one_block())), backend=backend, threads=1, precision="fp32")
    pixels = np.concatenate([FEED, FEED])
    feeds = {"pixel_values": pixels}
    out = dict(model.run(feeds))
    model.warm_up(6)
    for _ in range(50):
        model.run(feeds, out)
    gc.collect()
    kept, used = [], []
    with traced_memory():
        for _ in range(50):
            model.run(feeds, out)
        for _ in range(20):  # other threads of the process allocate, too: the least of all rounds is what the calls need
            gc.collect()
            before, _ = tracemalloc.get_traced_memory()
            tracemalloc.reset_peak()
            for _ in range(100):
                model.run(feeds, out)
            used.append(tracemalloc.get_traced_memory()[1] - before)
            gc.collect()
            kept.append(tracemalloc.get_traced_memory()[0] - before)
            if min(kept) < 400 and min(used) < pixels.nbytes / 4:
                break
    model.close()
    assert min(kept) < 400  # four bytes a call: less than any object that would stay
    assert min(used) < pixels.nbytes / 4  # no call copies its input
