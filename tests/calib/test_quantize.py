"""Whole networks in 8 bits: the trained digits keep their answers, and what cannot be quantised is refused."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from cli.exported import EXAMPLES, digits
from tiny_graphs import mlp_model, run, samples

from swin_deploy.bundle import PREPROCESSOR, Bundle
from swin_deploy.errors import InputError, UsageError
from swin_deploy.exporters.quantization import for_cpu as steps
from swin_deploy.exporters.quantization.for_cpu import Options, balanced, quantize
from swin_deploy.exporters.quantization.qdq import linear_layers
from swin_deploy.exporters.quantization.resume import Stopped
from swin_deploy.parity import sqnr
from swin_deploy.preprocess import Preprocessor

Array = np.ndarray[Any, Any]


@functools.cache
def digit_pixels() -> tuple[Array, Array, Array]:
    """Pixels of 64 digits to calibrate with and of the 450 held out, and the digits of these."""
    pytest.importorskip("sklearn", reason="scikit-learn brings the images of the digits")
    names: dict[str, Any] = {}
    exec((EXAMPLES / "digits/digits.py").read_text(), names)
    data = names["split"]()
    prepare = Preprocessor.from_dict(Bundle.open(digits(1)).read_json(PREPROCESSOR))
    return prepare(list(data.train_images[:64])), prepare(list(data.test_images)), data.test_digits


def test_a_layer_that_there_is_not_is_refused_before_a_sample_is_read() -> None:
    def unread() -> Iterator[dict[str, Array]]:
        pytest.fail("samples were read")

    with pytest.raises(UsageError, match='no linear layer "fc3"'):
        quantize(mlp_model(), unread, Options(keep=frozenset({"fc3"})))


@pytest.mark.parametrize(("kind", "least", "drop"), [("int8", 44, 0.003), ("fp8", 33, 0.0015)])
@pytest.mark.parametrize("version", [1, 2])
def test_digits_keep_their_answers(version: int, kind: str, least: float, drop: float) -> None:
    """Of the rivals with their defaults the best comes to 36 dB (INT8) and 31 dB (FP8): benchmarks/quantization.py."""
    calibration, test, wanted = digit_pixels()

    def feeds() -> Iterator[dict[str, Array]]:
        return ({"pixel_values": calibration[i : i + 32]} for i in (0, 32))

    model = onnx.load(digits(version) / "onnx/model.onnx")
    quantized = quantize(model, feeds, Options(kind=kind, threads=1))
    assert set(quantized.layers) == {layer.name for layer in linear_layers(model)} - {"classifier"}
    assert [record["name"] for record in quantized.records] == list(quantized.layers)
    reference = run(model, {"pixel_values": test})
    found = run(quantized.model, {"pixel_values": test}, exact=kind == "fp8")
    assert sqnr(reference, found) > least
    right = [(answers.argmax(1) == wanted).mean() for answers in (reference, found)]
    assert right[1] >= right[0] - drop


def test_balancing_changes_no_answer_and_gains(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two channels are 20 times as large as the others: fc1 takes what LayerNormalization gives up."""
    feed = next(iter(samples()()))
    large = mlp_model(large=20)
    wanted = run(large, feed)
    model = balanced(large, samples(), Options(keep={"fc2"}))
    assert [node.op_type for node in model.graph.node] == [node.op_type for node in large.graph.node]
    assert sqnr(wanted, run(model, feed)) > 110
    found = sqnr(wanted, run(quantize(large, samples(), Options(keep={"fc2"})).model, feed))
    monkeypatch.setattr("swin_deploy.exporters.quantization.for_cpu.balanced", lambda model, feeds, options, own: model)
    assert found > 3 + sqnr(wanted, run(quantize(large, samples(), Options(keep={"fc2"})).model, feed))


def test_ranges_may_come_from_outside() -> None:
    asked = []

    def ranges(name: str, values: Any) -> tuple[float, float]:
        asked.append(name)
        low, high = min(v.min() for v in values()), max(v.max() for v in values())  # it may look twice
        return float(low), float(high)

    quantized = quantize(mlp_model(), samples(), Options(symmetric=True), ranges)
    assert asked == ["normed", "gelu"]
    assert {scale.zero_point for scale in quantized.scales.values()} == {128}


@pytest.mark.parametrize(
    ("feeds", "options", "error", "part"),
    [
        (lambda: iter(()), Options(), InputError, "no samples"),
        (lambda: iter([{"x": np.full((4, 16), np.nan, np.float32)}]), Options(), InputError, "not finite"),
        (samples(), Options(kind="int4"), UsageError, "int8, fp8"),
        (samples(), Options(keep={"fc3"}), UsageError, "fc1, fc2"),
    ],
)
def test_refusals(feeds: Any, options: Options, error: type[Exception], part: str) -> None:
    with pytest.raises(error, match=part):
        quantize(mlp_model(), feeds, options)


def test_what_was_stopped_goes_on_where_it_was_and_ends_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibration, _, _ = digit_pixels()
    model, options = onnx.load(digits(2) / "onnx/model.onnx"), Options(threads=1)

    def feeds() -> Iterator[dict[str, Array]]:
        return ({"pixel_values": calibration[i : i + 16]} for i in (0, 16))

    rounded: list[int] = []
    real = steps.rounded_linear
    monkeypatch.setattr(steps, "rounded_linear", lambda *given: (rounded.append(1), real(*given))[1])
    whole = quantize(model, feeds, options)
    layers, stopped = len(rounded), Stopped.of(tmp_path, model, "a")

    def stop(line: str) -> None:
        if "(layer 9 of" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(model, feeds, options, say=stop, stopped=stopped)
    [folder] = tmp_path.iterdir()
    kept = sorted(folder.iterdir())
    assert 8 <= len(kept) < layers
    kept[0].write_bytes(kept[0].read_bytes()[:-40])  # damaged: its layer is made again, and no other
    rounded.clear()
    resumed = quantize(model, feeds, options, stopped=Stopped.of(tmp_path, model, "a"))
    assert 0 < len(rounded) <= layers - len(kept) + 3  # up to three layers read one tensor
    assert resumed.model.SerializeToString(deterministic=True) == whole.model.SerializeToString(deterministic=True)
    assert resumed.records == whole.records
    assert not folder.exists()
    layer = linear_layers(model)[0]
    Stopped.of(tmp_path, model, "a").keep(whole.layers[layer.name])
    assert Stopped.of(tmp_path, model, "b").read([layer]) is None
