"""Agreement figures, the reference outputs in a bundle, and the comparison of graphs with them."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli.exported import copied, digits

import swin_deploy
from swin_deploy.bundle import Bundle, TensorSpec, reference_file
from swin_deploy.errors import BackendError, BundleError, MissingDependencyError, UsageError
from swin_deploy.parity import TOLERANCES, Agreement, Reference, check_graph, compare, sample_inputs, verdict_text
from swin_deploy.runtimes.base import Runtime

REFERENCE = reference_file()


def test_equal_arrays_agree_exactly() -> None:
    logits = np.random.default_rng(0).standard_normal((4, 10)).astype(np.float32)
    assert compare(logits, logits.copy()) == Agreement(4, True, 0.0, 0.0, pytest.approx(1.0), 1.0)


def test_figures_describe_the_worst_sample() -> None:
    reference = np.array([[3.0, 4.0], [3.0, 4.0]])
    found = compare(np.array([[3.0, 4.0], [4.0, 3.0]]), reference)
    assert found.max_abs == 1
    assert found.relative_l2 == pytest.approx(math.sqrt(2) / 5)
    assert found.cosine == pytest.approx(24 / 25)
    assert found.top1 == 0.5
    assert found.within(0.3)
    assert not found.within(0.28)
    reference = np.random.default_rng(0).standard_normal((1000, 10))
    test = reference.copy()
    test[500] *= 1.1
    assert compare(test, reference).relative_l2 == pytest.approx(0.1)
    with pytest.raises(ValueError, match="shape"):
        compare(np.zeros((2, 3)), np.zeros((3, 2)))


def test_zeros_divide_by_nothing_and_half_precision_does_not_overflow() -> None:
    zeros, large = np.zeros((1, 3)), np.full((1, 1000), 60000, np.float16)
    assert compare(zeros, zeros).within(0)
    assert not compare(zeros + 1e-6, zeros).within(1)
    assert compare(large, large).relative_l2 == 0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", ["test", "reference"])
def test_nan_and_infinity_never_agree(value: float, side: str) -> None:
    arrays = {name: np.ones((2, 3)) for name in ("test", "reference")}
    arrays[side][1, 2] = value
    found = compare(**arrays)
    assert not found.finite
    assert not found.within(math.inf)
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["relative_l2"] is None


def inputs_for(height: int, width: int) -> dict[str, Any]:
    """Return sample inputs for images with three channels."""
    return sample_inputs((TensorSpec("x", "float32", ("batch", 3, height, width)),))


class Answers(Runtime):
    """A graph with the outputs `y` and `z`; `z` has the relative error `alone` in batches of one sample."""

    def __init__(self, reference: Reference, alone: float = 0.0) -> None:
        spec = TensorSpec("x", "float32", ("batch", *reference.feeds["x"].shape[1:]))
        outputs = tuple(TensorSpec(name, "float32", ("batch", 3)) for name in reference.outputs)
        super().__init__("answers 1.0", (spec,), outputs)
        self.reference, self.alone = reference, alone

    def _run(self, feeds: dict[str, Any], out: Mapping[str, Any] | None) -> Mapping[str, Any]:
        assert out is not None
        for name, answers in self.reference.outputs.items():
            if len(feeds["x"]) > 1:
                out[name][:] = answers
                continue
            [index] = [i for i, sample in enumerate(self.reference.feeds["x"]) if np.array_equal(sample, feeds["x"][0])]
            out[name][:] = answers[index] * (1 + self.alone if name == "z" else 1)
        return out


@pytest.fixture
def reference() -> Reference:
    answers = np.array([[1, 2, 3], [3, 2, 1]], np.float32)
    return Reference(inputs_for(8, 6), {"y": answers, "z": answers[:, ::-1].copy()})


def test_inputs_are_the_same_everywhere_and_differ_from_each_other() -> None:
    inputs = inputs_for(32, 48)["x"]
    assert (inputs.shape, inputs.dtype) == ((2, 3, 32, 48), np.float32)
    assert np.array_equal(inputs, inputs_for(32, 48)["x"])
    assert np.array_equal(inputs, inputs.astype(np.float16))
    roughness = np.abs(np.diff(inputs, axis=-1)).mean(axis=(1, 2, 3))
    assert roughness[0] > 3 * roughness[1]


def test_each_sample_is_also_run_alone(reference: Reference) -> None:
    path = Path("unused.onnx")
    assert check_graph(reference, lambda path: Answers(reference), path, "g", "fp32").verified
    verdict = check_graph(reference, lambda path: Answers(reference, alone=1e-3), path, "g", "fp32")
    assert not verdict.verified
    assert verdict.worst == "z"
    assert verdict.agreement is verdict.agreements["z"]
    assert verdict.agreement.relative_l2 == pytest.approx(1e-3, rel=1e-2)
    assert verdict.agreements["y"].relative_l2 == 0
    assert verdict.to_dict()["backend"] == "answers 1.0"
    assert {name: one["relative_l2"] for name, one in verdict.to_dict()["outputs"].items()} == {
        name: agreement.relative_l2 for name, agreement in verdict.agreements.items()
    }
    assert check_graph(reference, lambda path: Answers(reference, alone=1e-3), path, "g", "fp16").verified


def test_noise_only_widens_the_tolerance(reference: Reference) -> None:
    noisy = Reference(reference.feeds, reference.outputs, noise={"y": 1e-4})
    assert noisy.tolerance("fp32", "y") == pytest.approx(4e-4)
    assert noisy.tolerance("fp16", "y") == TOLERANCES["fp16"]
    for one in (noisy.tolerance("fp32", "z"), reference.tolerance("fp32", "y")):
        assert one == TOLERANCES["fp32"]


def test_a_reference_is_stored_without_loss(tmp_path: Path) -> None:
    bundle = Bundle.open(copied(2, tmp_path / "b"))
    kept = Reference.load(bundle, REFERENCE)
    assert (list(kept.feeds), list(kept.outputs), kept.samples) == (["pixel_values"], ["logits"], 2)
    masks = {"mask": np.array([[True, False], [False, False]])}
    changed = Reference(
        {**kept.feeds, **masks}, {**kept.outputs, "attentions.0": np.ones((8, 1), np.float32)}, {"logits": 0.25}
    )
    again = Reference.load(bundle.with_file(REFERENCE, {}, changed.save), REFERENCE)
    assert np.array_equal(again.feeds["pixel_values"], inputs_for(32, 32)["x"])
    for found, wanted in ((again.feeds, changed.feeds), (again.outputs, changed.outputs)):
        assert found.keys() == wanted.keys()
        for name in wanted:
            assert found[name].dtype == wanted[name].dtype, name
            assert np.array_equal(found[name], wanted[name]), name
    assert again.feeds["pixel_values"].dtype == again.outputs["logits"].dtype == np.float32
    assert again.noise == {"logits": 0.25}


def test_an_invalid_reference_file_is_refused(tmp_path: Path) -> None:
    bundle = Bundle.open(copied(2, tmp_path / "b"))
    three = {"input/x": np.ones((2, 1)), "output/y": np.ones((3, 1))}
    for write in (
        lambda path: np.savez(path.open("wb"), x=1),
        lambda path: path.write_bytes(b"PK") and None,
        lambda path: np.savez(path.open("wb"), **three),
    ):
        with pytest.raises(BundleError, match=r"reference\.npz (cannot be read|has an array x|does not have inputs and)"):
            Reference.load(bundle.with_file(REFERENCE, {}, write), REFERENCE)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_trained_bundles_are_verified(version: int, backend: str) -> None:
    if backend == "openvino":
        pytest.importorskip("openvino", reason="OpenVINO is not installed")
    verdicts = swin_deploy.verify(digits(version), backend=backend)
    assert [(v.file, v.verified) for v in verdicts] == [("onnx/model.onnx", True), ("onnx/model_fp16.onnx", True)]
    assert all(v.agreement.top1 == 1 and v.backend.startswith(backend) for v in verdicts)
    assert verdicts[0].agreement.relative_l2 < verdicts[1].agreement.relative_l2 < TOLERANCES["fp16"]


def test_a_graph_of_other_weights_is_not_verified(tmp_path: Path) -> None:
    """Every sha256 is valid, but the outputs differ."""
    bundle = Bundle.open(copied(2, tmp_path / "b"))
    kept = Reference.load(bundle, REFERENCE)
    swapped = Reference(kept.feeds, {"logits": kept.outputs["logits"][::-1].copy()})
    bundle.with_file(REFERENCE, {}, swapped.save)
    assert [v.verified for v in swin_deploy.verify(bundle.path)] == [False, False]


def test_a_manifest_that_cannot_be_updated_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = copied(2, tmp_path / "b")
    Bundle.open(path).with_entry("onnx/model.onnx", {"agreement": "not verified"})

    def refuse(folder: Path, manifest: object) -> None:
        raise OSError(30, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr("swin_deploy.bundle._write_manifest", refuse)
        assert all(verdict.verified for verdict in swin_deploy.verify(path))
    [record] = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert record.getMessage().startswith("onnx/model.onnx is verified, but the manifest cannot be updated. ")
    assert "Read-only file system" in record.getMessage()
    caplog.clear()
    swin_deploy.verify(path)
    assert Bundle.open(path).files["onnx/model.onnx"]["agreement"]["verified"]
    assert not caplog.records


def test_verify_checks_every_file_before_it_runs_any(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Bundle.open(copied(1, tmp_path / "b"))
    (bundle.path / "config.json").write_text("{}")
    monkeypatch.setattr("swin_deploy.runtimes.backends.runtime_to_check", lambda *_: pytest.fail("a graph was opened"))
    with pytest.raises(BundleError, match=r"config\.json"):
        swin_deploy.verify(bundle.path)


def test_an_unknown_back_end_is_named() -> None:
    with pytest.raises(UsageError, match="tensorflow"):
        swin_deploy.verify(digits(2), backend="tensorflow")


def test_errors_of_a_back_end_are_not_hidden(reference: Reference) -> None:
    closed = Answers(reference)
    closed.close()
    with pytest.raises(BackendError, match="closed"):
        check_graph(reference, lambda path: closed, Path("g"), "g", "fp32")

    def missing(path: Path) -> Any:
        raise MissingDependencyError("no back end")

    with pytest.raises(MissingDependencyError):
        check_graph(reference, missing, Path("g"), "g", "fp32")


def test_verdict_text() -> None:
    assert verdict_text(3.14e-7) == "verified (relative L2 3.1e-07)"
    assert verdict_text(None) == "not verified"
