"""A loaded bundle: from whatever stands for an image to named classes, the same on every back end."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from cli.exported import EXAMPLES, FLOWER, THREE, copied, digits, files
from PIL import Image

import swin_deploy
from swin_deploy.bundle import Bundle, create_bundle
from swin_deploy.errors import BackendError, BundleError, InputError, UsageError
from swin_deploy.parity import TOLERANCES, compare
from swin_deploy.runtimes.model import Model

BACKENDS = ("onnxruntime", "openvino", "torch")
FEED = np.random.default_rng(0).standard_normal((3, 3, 32, 32)).astype(np.float32)


@pytest.fixture(scope="module", params=BACKENDS)
def model(request: pytest.FixtureRequest) -> Iterator[Model]:
    pytest.importorskip(request.param, reason=f"{request.param} is not installed")
    with swin_deploy.load(digits(2), backend=request.param, precision="fp32") as loaded:
        yield loaded


def test_says_what_it_takes_and_gives(model: Model) -> None:
    assert [str(spec) for spec in model.inputs] == ["pixel_values: float32 [batch, 3, 32, 32]"]
    assert [str(spec) for spec in model.outputs] == ["logits: float32 [batch, 10]"]
    assert model.labels[3] == "three"
    assert len(model.labels) == 10


def test_everything_that_stands_for_an_image(model: Model) -> None:
    with Image.open(THREE) as opened:
        picture = opened.convert("RGB")
    one = model.classify(THREE)
    assert one[0][0].label == "three"
    for same in (str(THREE), picture, np.asarray(picture), [THREE], (picture,), iter([THREE]), (p for p in [picture])):
        assert model.classify(same) == one


def test_many_images_keep_their_order_whatever_the_batch(model: Model) -> None:
    paths = [EXAMPLES / f"digits/images/{digit}.png" for digit in (4, 2, 9, 9, 0, 1, 7)]
    wanted = model.classify(paths, batch_size=100)
    assert [best[0].index for best in wanted] == [4, 2, 9, 9, 0, 1, 7]
    for batch_size in (1, 2, 7):
        found = model.classify(iter(paths), batch_size=batch_size)
        assert [[p.index for p in best] for best in found] == [[p.index for p in best] for best in wanted]
        scores = [[[p.score for p in best] for best in answers] for answers in (found, wanted)]
        assert np.allclose(*scores, atol=1e-6)
    assert model.classify([]) == []


def test_a_stream_is_read_one_batch_at_a_time(model: Model) -> None:
    taken = []

    def stream() -> Iterator[Path]:
        for number in range(5):
            taken.append(number)
            yield THREE if number < 4 else Path("absent.png")

    with pytest.raises(InputError, match=r"absent\.png"):
        model.classify(stream(), batch_size=2)
    assert taken == [0, 1, 2, 3, 4]


def test_scores_are_probabilities_best_first(model: Model) -> None:
    [best] = model.classify(FLOWER, top_k=1000)
    assert sorted(p.index for p in best) == list(range(10))
    assert sum(p.score for p in best) == pytest.approx(1)
    assert [p.score for p in best] == sorted((p.score for p in best), reverse=True)
    assert model.classify(FLOWER, top_k=2) == [best[:2]]


def test_numbers_that_cannot_be_meant(model: Model) -> None:
    for number in (0, -1):
        calls = (partial(model.classify, THREE, top_k=number), partial(model.classify, THREE, batch_size=number))
        for call in (*calls, partial(model.warm_up, number)):
            with pytest.raises(UsageError, match="at least 1"):
                call()


@pytest.mark.parametrize("image", [None, 3, b"bytes", [None], [[1, 2]], np.zeros((8, 8, 3)), np.zeros((0, 0, 3), np.uint8)])
def test_what_is_no_image(model: Model, image: object) -> None:
    with pytest.raises(InputError):
        model.classify(image)  # type: ignore[arg-type]


def test_files_in_memory_and_tensors_are_images(model: Model) -> None:
    one, picture = model.classify(THREE), np.array(Image.open(THREE).convert("RGB"))
    with THREE.open("rb") as file, THREE.open("rb") as read:
        read.read()
        for same in (THREE.read_bytes(), bytearray(THREE.read_bytes()), io.BytesIO(THREE.read_bytes()), file, read):
            assert model.classify(same) == one  # type: ignore[arg-type]
        assert list(model.stream(torch.from_numpy(picture))) == model.classify([torch.from_numpy(picture)]) == one


@pytest.mark.parametrize(
    ("image", "said"),
    [
        ("https://example.org/a.png", "is a web address. Download the file"),
        ("images/*.png", r"is a pattern and not a file. Pass the files: sorted\(glob.glob\('images/\*.png'\)\)"),
        (b"no image", "^The image is not a valid image"),
        (np.zeros((3, 9, 8), np.uint8), r"channels first.*pass array.transpose\(1, 2, 0\), or tensor.permute"),
        (torch.zeros(3, 9, 8, dtype=torch.uint8), "channels first"),
        (np.ones((8, 8, 3)), r"float64 .* with values from 1 to 1.*pass \(array \* 255\).round\(\).clip\(0, 255\).astype\("),
        (torch.full((8, 8, 3), 200.0), r"float32 .* with values from 200 to 200.*pass array.round\(\).clip"),
        (torch.zeros(8, 8, 3, requires_grad=True), r"Pass tensor.detach\(\).cpu\(\).numpy\(\)"),
        (io.StringIO("text"), 'Open it with "rb"'),
    ],
)
def test_images_that_need_a_conversion_name_it(image: Any, said: str, model: Model) -> None:
    with pytest.raises(InputError, match=said):
        model.classify(image)


def test_arrays_prepared_as_run_takes_them(model: Model) -> None:
    logits = model.run({"pixel_values": model.preparation([THREE, FLOWER])})["logits"]
    assert list(logits.argmax(axis=1)) == [best[0].index for best in model.classify([THREE, FLOWER])]


@pytest.mark.parametrize(
    ("feeds", "sentence"),
    [
        ({"pixel_values": FEED.astype(np.uint8)}, r"uint8. Expected .*float32 .*with model\.preparation\(images\)"),
        ({"pixel_values": FEED.astype(np.float16)}, "float16"),
        ({"pixel_values": FEED[:, :, :, :31]}, "shape"),
    ],
)
def test_feeds_that_do_not_fit(model: Model, feeds: dict[str, np.ndarray], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        model.run(feeds)


def test_outputs_are_the_callers_own(model: Model) -> None:
    first = model.run({"pixel_values": FEED})["logits"]
    kept = first.copy()
    model.run({"pixel_values": -FEED})
    assert np.array_equal(first, kept)
    assert (first.shape, first.dtype) == ((3, 10), np.float32)


@pytest.mark.parametrize("version", [1, 2])
def test_back_ends_give_the_same_answers(version: int) -> None:
    pytest.importorskip("openvino", reason="OpenVINO is not installed")
    answers = {}
    for backend in BACKENDS:
        with swin_deploy.load(digits(version), backend=backend, threads=1, precision="fp32") as loaded:
            answers[backend] = loaded.run({"pixel_values": FEED})["logits"]
    for backend in BACKENDS[1:]:
        assert np.allclose(answers[backend], answers["onnxruntime"], atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"precision": "int4"}, 'Unknown precision "int4"'),
        ({"backend": "tensorflow"}, 'Unknown back end "tensorflow"'),
        ({"threads": -1}, "Invalid threads: -1"),
        ({"threads": 10**6}, "Invalid threads: 1000000"),
    ],
)
def test_arguments_that_cannot_be_meant(arguments: dict[str, object], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        swin_deploy.load(digits(2), **arguments)  # type: ignore[arg-type]


def test_a_precision_that_is_not_there_yet(tmp_path: Path) -> None:
    whole = Bundle.open(digits(2))
    with create_bundle(tmp_path / "b", replace=False, facts=whole.manifest) as draft:
        for file in whole.files.keys() - {"onnx/model_fp16.onnx"}:
            draft.add(file, whole.files[file], partial(shutil.copyfile, whole.path / file))
    with pytest.raises(UsageError, match=r"has no fp16 graph, only fp32.*build-engine"):
        swin_deploy.load(tmp_path / "b", precision="fp16")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_graph_that_the_back_end_refuses_is_one_line(backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(backend, reason=f"{backend} is not installed")
    monkeypatch.setattr(Bundle, "_known", lambda self, file: True)  # the structure check would refuse it first
    bundle = Bundle.open(copied(2, tmp_path / "b"))
    graph = onnx.helper.make_graph([onnx.helper.make_node("Unknown", ["pixel_values"], ["logits"])], "g", [], [])
    bundle.with_file("onnx/model.onnx", bundle.files["onnx/model.onnx"], onnx.helper.make_model(graph).SerializeToString())
    with pytest.raises(BackendError, match=r"cannot load|does not support the operator") as caught:
        swin_deploy.load(bundle.path, backend=backend, precision="fp32")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file", ["onnx/model.onnx", "config.json", "preprocessor_config.json", "manifest.json"])
def test_one_changed_byte_is_never_loaded(file: str, tmp_path: Path) -> None:
    bundle = copied(2, tmp_path / "b")
    assert file in files(bundle)
    whole = (bundle / file).read_bytes()
    for position in np.linspace(0, len(whole) - 1, 25).astype(int):
        (bundle / file).write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        with pytest.raises(BundleError, match=file):
            swin_deploy.load(bundle, precision="fp32")


def test_a_device_needs_neither_torch_nor_onnx(tmp_path: Path) -> None:
    """The bundle runs where nothing that made it is installed, and the import alone is light."""
    code = f"""
import sys
absent = ("torch", "onnx", "transformers", "safetensors", "onnx_graphsurgeon", "tensorrt_rtx", "sklearn",
          "huggingface_hub", "openvino")
sys.modules.update(dict.fromkeys(absent))
import swin_deploy
for precision in ("fp32", "fp16"):
    with swin_deploy.load({str(digits(2))!r}, precision=precision) as model:
        print(model.classify({str(THREE)!r}, top_k=1)[0][0].label)
assert all(verdict.verified for verdict in swin_deploy.verify({str(digits(2))!r}))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "three\nthree\n", "")


def test_openvino_computes_the_fp32_graph_in_bf16() -> None:
    """Where the processor does; elsewhere it is refused rather than answered in fp32."""
    pytest.importorskip("openvino", reason="the back end under test")
    from swin_deploy.runtimes.openvino import openvino_core

    if "BF16" not in openvino_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        with pytest.raises(UsageError, match="does not compute in bf16"):
            swin_deploy.load(digits(2), precision="bf16", backend="openvino")
        return
    answers = []
    for precision in ("fp32", "bf16"):
        with swin_deploy.load(digits(2), precision=precision, backend="openvino") as loaded:
            answers.append(loaded.run({"pixel_values": FEED})["logits"])
    assert 1e-4 < compare(answers[1], answers[0]).relative_l2 < TOLERANCES["bf16"]
