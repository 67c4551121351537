"""Which batch sizes OpenVINO compiles a graph for, and how it runs the others."""

from __future__ import annotations

import logging
import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from cli.exported import exported_bundle, one_block

import swin_deploy
from swin_deploy.bundle import TensorSpec
from swin_deploy.errors import UsageError
from swin_deploy.options import LoadSpec

pytest.importorskip("openvino", reason="compiles the graphs")

from swin_deploy.runtimes.openvino import OpenVino, batches_for
from swin_deploy.runtimes.user_cache import file_identity


@pytest.mark.parametrize(
    ("count", "sizes", "wanted"),
    [
        (8, (1, 8), (8,)),
        (7, (1, 8), (8,)),  # padding one image takes less than six more calls
        (6, (1, 8), (1,) * 6),
        (11, (1, 8), (8, 1, 1, 1)),
        (40, (1, 8, 32), (32, 8)),
        (5, (2,), (2, 2, 2)),
        (3, (8,), (8,)),
        (9, (2, 3), (3, 3, 3)),
    ],
)
def test_other_sizes_are_split_or_padded(count: int, sizes: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    assert batches_for(count, sizes) == wanted


@pytest.mark.parametrize(
    ("batches", "counts", "compiled"),
    [
        ((), (1, 8, 3, 8, 3, 3, 5, 5), [1, 8, 3]),  # 3 when it comes again, 5 never: three sizes are enough
        ((), (2, 1, 3), [1, 2]),
        ((4, 1), (1, 5, 5, 9), [4, 1]),
        (4, (1, 2, 2), [4]),
    ],
)
def test_compiled_sizes(
    batches: object, counts: tuple[int, ...], compiled: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    """The results are those of ONNX Runtime, and of each image alone to the bit, whatever sizes are compiled."""
    bundle = exported_bundle("--weights", str(one_block()))
    images = np.random.default_rng(0).standard_normal((9, 3, 32, 32)).astype(np.float32)
    with swin_deploy.load(bundle, backend="onnxruntime", precision="fp32") as model:
        wanted = model.run({"pixel_values": images})["logits"]
    caplog.set_level(logging.DEBUG, "swin_deploy")
    with swin_deploy.load(bundle, backend="openvino", precision="fp32", batches=batches) as model:
        first = model.run({"pixel_values": images[:1]})["logits"]
        for count in counts:
            found = model.run({"pixel_values": images[:count]})["logits"]
            assert np.array_equal(found[:1], first)
            np.testing.assert_allclose(found, wanted[:count], atol=1e-5)
        with pickle.loads(pickle.dumps(model)) as again:
            assert again.describe().batches == model.describe().batches
    sizes = [record.args[1] for record in caplog.records if record.msg.startswith("Compiled")]  # type: ignore[index]
    assert sizes[: len(compiled)] == compiled
    assert len(sizes) == len(compiled) + len(model.describe().batches or (1,))


def test_batches_of_8_bit_layers_are_not_cut_into_single_images() -> None:
    """One image is rounded differently, so the results would depend on the batches that came before."""
    runtime, file = object.__new__(OpenVino), Path(__file__)
    vars(runtime).update(_named=(), _fixed=dict.fromkeys((1, 8, 5)), _path=file, _file=file_identity(file))
    runtime._facts = SimpleNamespace(any_batch=True, quantized=True)
    runtime.inputs = (TensorSpec("x", "float32", ("batch", 4)),)
    parts = {count: runtime._parts({"x": np.zeros((count, 4))}) for count in (1, 2, 3, 7, 8, 10)}
    assert parts == {1: (), 2: (2,), 3: (2, 2), 7: (5, 2), 8: (), 10: (8, 2)}
    runtime._named = (1, 8)
    assert runtime._parts({"x": np.zeros((3, 4))}) == (1, 1, 1)


def test_batches_of_another_back_end_are_refused() -> None:
    with pytest.raises(UsageError, match=r"onnxruntime runs every size with one graph"):
        LoadSpec(backend="onnxruntime", batches=(1, 8))
    assert LoadSpec(batches="8").batches == (8,)
