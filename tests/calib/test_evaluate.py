"""`evaluate`: its figures equal those of scikit-learn and numpy, and labels are matched to classes by rules."""

from __future__ import annotations

import contextlib
import csv
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from cli.exported import WEIGHTS, cli_here, digits, refused, result
from PIL import Image
from small_graphs import model_from_text
from tiny_network import SIDE, folder, images
from torch import from_numpy, inference_mode
from transformers import AutoModelForImageClassification

import swin_deploy
from swin_deploy.bundle import CONFIG, PREPROCESSOR, create_bundle, graph_file
from swin_deploy.calib.accuracy_gate import AccuracyGate
from swin_deploy.calib.labels import class_numbers, labels_from_file
from swin_deploy.errors import InputError, UsageError
from swin_deploy.evaluation import Evaluation, Score, Targets, _average_precision
from swin_deploy.preprocess import Preprocessor
from swin_deploy.tasks import TaskSpec

sklearn = pytest.importorskip("sklearn.metrics", reason="scikit-learn counts the right answers again")


CLASSES = ("ant", "bee", "crane, bird", "dog", "emu", "fox", "crane, machine")
NOISE = {"fp32": 0.0, "fp16": 0.02, "bf16": 0.3}


def weights(precision: str) -> np.ndarray:
    """float32 [3, 7], from mean colours to logits, with noise for other precisions than fp32."""
    exact, noise = np.random.default_rng(0).standard_normal((2, 3, len(CLASSES)))
    return (exact * 4 + noise * NOISE[precision]).astype(np.float32)


def graph(precision: str, side: int, output: str = "logits") -> onnx.ModelProto:
    """pixel_values [batch, 3, side, side] -> mean colours [batch, 3] -> logits [batch, 7]."""
    text = f"""colours (float[batch, 3, {side}, {side}] pixel_values)
        => (float[batch, {len(CLASSES)}] {output}, float[batch, 3] mean) {{
        mean = ReduceMean <keepdims = 0> (pixel_values, axes)
        {output} = MatMul(mean, weights)
    }}"""
    return model_from_text(text, axes=np.array([2, 3]), weights=weights(precision))


def bundle(path: Path, task: str = "image-classification", **more: Any) -> Path:
    """Create a bundle of graphs that use colours only: three precisions at 8 pixels and two at 16."""
    config = json.loads((WEIGHTS[1] / "config.json").read_text())
    config |= {"id2label": dict(enumerate(CLASSES)), "label2id": {name: i for i, name in enumerate(CLASSES)}}
    config |= more
    output = "logits" if task == "image-classification" else "last_hidden_state"
    with create_bundle(path, replace=False, facts={"name": "colours", "task": TaskSpec(task).to_dict()}) as draft:
        draft.add_json(CONFIG, config)
        draft.add_json(PREPROCESSOR, Preprocessor.imagenet(SIDE).to_dict())
        for side, precisions in ((SIDE, ("fp32", "bf16", "fp16")), (2 * SIDE, ("fp32", "fp16"))):
            inputs = [{"name": "pixel_values", "dtype": "float32", "shape": ["batch", 3, side, side]}]
            for precision in precisions:
                entry: dict[str, Any] = {"precision": precision, "image_size": [side, side], "inputs": inputs, "outputs": []}
                entry["reference"] = CONFIG  # there are no outputs of PyTorch
                file = graph_file(precision, None if side == SIDE else (side, side))
                model = graph(precision, side, output)
                draft.add(file, entry, lambda path, model=model: onnx.save(model, str(path)))  # type: ignore[misc]
    return path


def logits(precision: str, pixels: np.ndarray) -> np.ndarray:
    return np.asarray(pixels.mean(axis=(2, 3), dtype=np.float64) @ weights(precision))


def test_figures_equal_those_of_scikit_learn_and_numpy(tmp_path: Path) -> None:
    path, raw = bundle(tmp_path / "b"), images(50)
    wanted = np.random.default_rng(1).integers(0, len(CLASSES), 50)
    told: list[tuple[int, int]] = []
    found = swin_deploy.evaluate(
        path, list(zip(raw, wanted, strict=True)), batch=8, progress=lambda phase, done, total: told.append((done, total))
    )
    assert (found.samples, found.rule, told[0], told[-1]) == (50, "class numbers", (8, 50), (50, 50))
    assert [(s.file, s.precision, s.image_size) for s in found.scores] == [
        ("onnx/model.onnx", "fp32", (8, 8)),
        ("onnx/model_16x16.onnx", "fp32", (16, 16)),
        ("onnx/model_bf16.onnx", "bf16", (8, 8)),
        ("onnx/model_fp16.onnx", "fp16", (8, 8)),
        ("onnx/model_16x16_fp16.onnx", "fp16", (16, 16)),
    ]
    for score in found.scores:
        pixels = Preprocessor.imagenet(score.image_size)(list(raw))
        test, fp32 = logits(score.precision, pixels), logits("fp32", pixels)
        everyone = list(range(len(CLASSES)))
        assert score.top1 == pytest.approx(sklearn.accuracy_score(wanted, test.argmax(1)))
        assert score.top5 == pytest.approx(sklearn.top_k_accuracy_score(wanted, test, k=5, labels=everyone))
        if score.precision == "fp32":
            assert (score.top1_agreement, score.relative_l2, score.sqnr_db) == (None, None, None)
            continue
        assert score.top1_agreement == pytest.approx((test.argmax(1) == fp32.argmax(1)).mean())
        distances = np.linalg.norm(test - fp32, axis=1) / np.linalg.norm(fp32, axis=1)
        assert score.relative_l2 == pytest.approx(distances.mean(), rel=1e-4)
        assert score.sqnr_db == pytest.approx(10 * np.log10((fp32**2).sum() / ((test - fp32) ** 2).sum()), rel=1e-4)
    assert found.score("bf16").sqnr_db < found.score("fp16").sqnr_db


def figures(path: Path, data: Any, **options: Any) -> tuple[Evaluation, Score, Score]:
    """What `evaluate` returns, and the scores of two graphs for 8 pixels."""
    found = swin_deploy.evaluate(path, data, **options)
    return found, found.score("fp32"), found.score("bf16")


@pytest.mark.parametrize("threshold", [0.5, 0.9])
def test_several_labels_equal_scikit_learn(threshold: float, tmp_path: Path) -> None:
    path, raw = bundle(tmp_path / "b", problem_type="multi_label_classification"), images(40)
    wanted = np.random.default_rng(1).random((40, len(CLASSES))) < 0.3
    wanted[:, 2] = False  # a label that no image has
    forms = {
        "0 or 1 for each label": [list(map(int, row)) for row in wanted],
        "class numbers": [set(np.flatnonzero(row).tolist()) for row in wanted],
        "names of classes": [tuple(CLASSES[i] for i in np.flatnonzero(row)) for row in wanted],
    }
    for rule, labels in forms.items():
        found, fp32, bf16 = figures(path, list(zip(raw, labels, strict=True)), threshold=threshold)
        assert (found.rule, fp32.top1, fp32.top5, fp32.mae) == (rule, None, None, None)
        predicted = {}
        for score in (fp32, bf16):
            test = logits(score.precision, Preprocessor.imagenet(SIDE)(list(raw)))
            precisions = [sklearn.average_precision_score(wanted[:, i], test[:, i]) for i in range(len(CLASSES)) if i != 2]
            assert score.mean_average_precision == pytest.approx(np.mean(precisions))
            predicted[score.precision] = 1 / (1 + np.exp(-test)) > threshold
            assert score.f1 == pytest.approx(sklearn.f1_score(wanted, predicted[score.precision], average="micro"))
        assert bf16.top1_agreement == pytest.approx((predicted["bf16"] == predicted["fp32"]).mean())


def test_equal_scores_rank_together() -> None:
    wanted, scores = np.random.default_rng(0).integers(0, 2, 60).astype(bool), np.random.default_rng(1).integers(0, 6, 60)
    expected = sklearn.average_precision_score(wanted, scores)
    assert _average_precision(scores.astype(np.float32), wanted) == pytest.approx(expected)
    assert _average_precision(np.array([np.nan, 0.0]), np.array([True, False])) == 0.5


def test_a_regression_has_a_mean_absolute_error(tmp_path: Path) -> None:
    path, raw = bundle(tmp_path / "b", problem_type="regression"), images(20)
    wanted = np.random.default_rng(1).standard_normal((20, len(CLASSES)))
    np.savez(tmp_path / "data.npz", images=raw, labels=wanted)
    done = cli_here("evaluate", path, "--data", "data.npz", "--precision", "fp16", cwd=tmp_path)
    assert done.stdout.split()[:4] == ["graph", "precision", "MAE", "agreement"]
    found, fp32, bf16 = figures(path, tmp_path / "data.npz")
    for score in (fp32, bf16):
        test = logits(score.precision, Preprocessor.imagenet(SIDE)(list(raw)))
        assert score.mae == pytest.approx(sklearn.mean_absolute_error(wanted, test), rel=1e-5)
    assert (found.rule, fp32.top1, fp32.f1, bf16.top1_agreement) == ("values", None, None, None)
    with pytest.raises(InputError, match="are not 7 numbers for each image"):
        swin_deploy.evaluate(path, [(image, "ant") for image in raw])


def test_the_gate_measures_what_the_network_predicts() -> None:
    """The loss of a graph against the fp32 graph, with labels and without."""
    fp32, test = np.random.default_rng(0).standard_normal((2, 12, 4)).astype(np.float32)
    held = np.random.default_rng(1).random((12, 4)) < 0.5

    @contextlib.contextmanager
    def opened(outputs: np.ndarray) -> Iterator[Any]:
        yield SimpleNamespace(title="t", outputs=[SimpleNamespace(name="logits")], run=lambda f: {"logits": outputs[f["rows"]]})

    def loss(prediction: str, activation: str, values: Any) -> tuple[float, str]:
        targets = Targets(prediction, 4, values, None, activation)
        batches = lambda: ({"rows": np.arange(first, first + 4)} for first in (0, 4, 8))  # noqa: E731
        gate = AccuracyGate(fp32, batches, 12, (8, 8), targets, opened)
        return gate.loss(test), gate.unit

    mean = [np.mean([sklearn.average_precision_score(held[:, i], x[:, i]) for i in range(4)]) for x in (fp32, test)]
    errors = [np.abs(x - 1).mean() for x in (fp32, test)]
    assert loss("labels", "sigmoid", held) == (pytest.approx(100 * (mean[0] - mean[1])), "points of mAP")
    assert loss("labels", "sigmoid", None)[0] == pytest.approx(100 * ((fp32 > 0) != (test > 0)).mean())
    assert loss("values", "none", np.ones((12, 4)))[0] == pytest.approx(100 * (errors[1] / errors[0] - 1), rel=1e-5)
    assert loss("values", "none", None)[1] == "% relative L2 distance from fp32"
    assert loss("classes", "softmax", fp32.argmax(1))[0] == pytest.approx(100 * (fp32.argmax(1) != test.argmax(1)).mean())


def test_images_that_cannot_be_read_are_left_out(tmp_path: Path) -> None:
    path = bundle(tmp_path / "b")
    data = folder(tmp_path / "data", {"ant": 30, "bee": 30})
    whole = result(cli_here("evaluate", path, "--data", data, "--json", cwd=tmp_path))
    damaged = ["ant/3.png", "bee/0.png", "bee/7.png"]
    for name in damaged:
        (data / name).rename(data / name.replace("/", "/spare"))
        (data / name).write_bytes((data / name.replace("/", "/spare")).read_bytes()[:60])
    done = cli_here("evaluate", path, "--data", data, "--batch", 4, "--json", cwd=tmp_path)
    found = json.loads(done.stdout)
    assert (done.returncode, found["samples"], [one["image"] for one in found["failed"]]) == (1, 60, damaged)
    for one, other in zip(found["graphs"], whole["graphs"], strict=True):  # in batches of other sizes
        assert one["sqnr_db"] == pytest.approx(other["sqnr_db"])
        assert all(one[key] == other[key] for key in ("samples", "top1", "top5", "top1_agreement"))
    assert all("is damaged" in one["error"] for one in found["failed"])
    told = cli_here("evaluate", path, "--data", data, cwd=tmp_path)
    assert (told.returncode, [line.split()[0] for line in told.stdout.splitlines()[-3:]]) == (1, damaged)
    refused(cli_here("evaluate", path, "--data", data, "--on-error", "stop", cwd=tmp_path), "ant/3.png", "is damaged")
    stream = (image if number % 9 else "absent.png" for number, image in enumerate(images(30)))
    failed = swin_deploy.evaluate(path, stream).failed
    assert list(failed) == ["sample 0", "sample 9", "sample 18", "sample 27"]
    assert swin_deploy.evaluate(path, ["absent.png", images(1)[0]]).samples == 1
    with pytest.raises(InputError, match="is a web address"):
        swin_deploy.evaluate(path, "https://example.org/images")
    with pytest.raises(InputError, match=r"None of the samples in the samples can be used. The first one: .*a.png"):
        swin_deploy.evaluate(path, ["a.png", "b.png"])


def test_quantize_leaves_out_what_it_cannot_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads the samples several times, so that they are checked before it begins anew."""
    path, runs = bundle(tmp_path / "b"), []

    def quantized(found: Any, spec: Any, data: Any) -> Any:
        runs.append(len(data))
        return SimpleNamespace(
            samples=sum(len(one["pixel_values"]) for one in data.batches(4)), failed=data.failures, scores=[]
        )

    monkeypatch.setattr("swin_deploy.api.quantize._quantized", quantized)
    data = [*images(30), "absent.png", *images(30, seed=1), "gone.png"]
    found = swin_deploy.quantize(path, data)
    assert (found.samples, runs, list(found.failed)) == (60, [62, 60], ["absent.png", "gone.png"])
    assert swin_deploy.quantize(path, images(20)).samples == 20
    with pytest.raises(InputError, match=r"absent\.png"):
        swin_deploy.quantize(path, data, on_error="stop")
    folder(tmp_path / "data", {"": 20})
    (tmp_path / "data/3.png").write_text("damaged")
    done = cli_here("quantize", path, "--data", "data", "--json", cwd=tmp_path)
    assert (done.returncode, [one["image"] for one in json.loads(done.stdout)["failed"]]) == (1, ["3.png"])


def test_other_tasks_have_distances_only(tmp_path: Path) -> None:
    found = swin_deploy.evaluate(bundle(tmp_path / "b", "feature-extraction"), [(image, 0) for image in images(9)])
    score = found.score("fp16")
    assert (found.rule, score.top1, score.top5, score.top1_agreement) == (None, None, None, None)
    assert score.output == "last_hidden_state"  # the means are exact
    assert score.relative_l2 is not None
    assert 0 < score.relative_l2 < 0.05
    assert score.outputs["last_hidden_state"] == {"relative_l2": score.relative_l2, "sqnr_db": score.sqnr_db}
    assert list(score.to_dict()["outputs"]) == ["last_hidden_state", "mean"]


def test_the_gate_limits_the_worst_feature_map() -> None:
    """Each map counts equally, although the first one has most values; the loss is that of the worst."""
    maps = {"feature_maps.0": np.full((8, 100), 100.0, np.float32), "feature_maps.1": np.ones((8, 1), np.float32)}
    worse = {name: array * np.float32(1.001 if name.endswith("0") else 1.2) for name, array in maps.items()}

    @contextlib.contextmanager
    def opened(outputs: dict[str, np.ndarray]) -> Iterator[Any]:
        specs = [SimpleNamespace(name=name) for name in outputs]
        yield SimpleNamespace(title="t", outputs=specs, run=lambda f: {n: a[f["rows"]] for n, a in outputs.items()})

    gate = AccuracyGate(maps, lambda: iter([{"rows": np.arange(8)}]), 8, (8, 8), Targets(), opened)
    assert gate.loss(worse) == pytest.approx(20, rel=1e-4)
    chosen = gate.select_layers("INT8", list(maps), lambda keep: {n: (maps if n in keep else worse)[n] for n in maps}, 1.0)
    assert (chosen.ranking[0].name, chosen.kept) == ("feature_maps.1", {"feature_maps.1"})


def test_prepared_data_is_of_one_size(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", pixel_values=Preprocessor.imagenet(SIDE)(list(images(12))), labels=np.arange(12) % 7)
    found = result(cli_here("evaluate", bundle(tmp_path / "b"), "--data", "data.npz", "--json", cwd=tmp_path))
    assert found["against"] == "the fp32 graph"
    assert [one["file"] for one in found["graphs"]] == ["onnx/model.onnx", "onnx/model_bf16.onnx", "onnx/model_fp16.onnx"]
    assert found["not_evaluated"] == ["onnx/model_16x16.onnx", "onnx/model_16x16_fp16.onnx"]
    assert (found["samples"], found["labels"]) == (12, "class numbers")


def test_an_output_that_is_not_finite(tmp_path: Path) -> None:
    path = bundle(tmp_path / "b")
    file = path / "onnx/model_fp16.onnx"
    broken = onnx.load(str(file))
    broken.graph.initializer[1].CopyFrom(onnx.numpy_helper.from_array(np.full((3, 7), np.nan, np.float32), "weights"))
    held = swin_deploy.bundle.Bundle.open(path)
    held.with_file("onnx/model_fp16.onnx", dict(held.files["onnx/model_fp16.onnx"]), lambda p: onnx.save(broken, str(p)))
    done = cli_here("evaluate", path, "--data", folder(tmp_path / "d", {"ant": 3, "bee": 3}), "--json", cwd=tmp_path)
    found = result(done)
    score = next(one for one in found["graphs"] if one["file"] == "onnx/model_fp16.onnx")
    assert (score["top1"], score["top5"], score["top1_agreement"], score["not_finite"]) == (0, 0, 0, 6)
    assert (score["relative_l2"], score["sqnr_db"]) == (None, None)


def test_the_digits_from_a_folder(tmp_path: Path) -> None:
    """Class folders with names, class folders with numbers, and a label file give the same accuracy."""
    names = list(json.loads((WEIGHTS[2] / "config.json").read_text())["id2label"].values())
    rows = []
    for number, name in enumerate(names):
        picture = Image.open(WEIGHTS[2].parent / f"images/{number}.png")
        for root, kind in (("words", name), ("numbers", str(number)), ("flat", ".")):
            (tmp_path / root / kind).mkdir(parents=True, exist_ok=True)
            picture.save(tmp_path / root / kind / f"image{number}.png")
        rows.append((f"image{number}.png", name))
    with (tmp_path / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("file", "label"), *rows])
    found = result(cli_here("evaluate", digits(2), "--data", "words", "--batch", 4, "--json", cwd=tmp_path))
    assert (found["labels"], found["samples"]) == ("names of classes", 10)
    assert "verified" in found["fp32_against_pytorch"]["onnx/model.onnx"]
    shares = [("fp32", 1.0, 1.0, None), ("fp16", 1.0, 1.0, 1.0)]
    assert [(s["precision"], s["top1"], s["top5"], s["top1_agreement"]) for s in found["graphs"]] == shares
    for root, labels, rule in (("numbers", None, "class numbers"), ("flat", tmp_path / "labels.csv", "names of classes")):
        again = swin_deploy.evaluate(digits(2), tmp_path / root, labels=labels)
        assert [(s.precision, s.top1, s.top5, s.top1_agreement) for s in again.scores] == shares
        assert again.rule == rule
    told = cli_here("evaluate", digits(2), "--data", "flat", "--samples", 4, cwd=tmp_path)
    assert told.returncode == 0
    assert "4 samples; no labels" in told.stderr
    assert [line.split()[2:5] for line in told.stdout.splitlines()[1:]] == [["-", "-", "-"], ["-", "-", "100.00%"]]


def test_pytorch_as_the_reference() -> None:
    """With `weights`, every graph is compared with PyTorch."""
    paths = [(WEIGHTS[1].parent / f"images/{number}.png", number) for number in range(10)]
    found = swin_deploy.evaluate(digits(1), paths, weights=WEIGHTS[1])
    torch, fp32, fp16 = found.scores
    assert (found.against, torch.file, torch.sqnr_db) == ("PyTorch fp32", "", None)
    assert torch.backend.startswith("PyTorch 2.")
    assert (torch.top1, fp32.top1, fp16.top1, fp32.top1_agreement, fp16.top1_agreement) == (1, 1, 1, 1, 1)
    assert found.score("fp32") is fp32
    assert fp32.relative_l2 is not None
    assert 0 < fp32.relative_l2 < 1e-5
    with swin_deploy.load(digits(1), precision="fp16", backend="onnxruntime") as model:
        pixels = model.preprocessor([path for path, _ in paths])
        logits = model.run({"pixel_values": pixels})["logits"].astype(np.float64)
    network = AutoModelForImageClassification.from_pretrained(WEIGHTS[1]).eval()
    with inference_mode():
        exact = network(pixel_values=from_numpy(pixels)).logits.numpy().astype(np.float64)
    assert fp16.sqnr_db == pytest.approx(10 * np.log10((exact**2).sum() / ((logits - exact) ** 2).sum()), abs=0.1)


NETWORK = dict(enumerate(CLASSES))


@pytest.mark.parametrize(
    ("labels", "numbers", "rule"),
    [
        ([6, 0, 3], [6, 0, 3], "class numbers"),
        (list(np.array([6, 0])), [6, 0], "class numbers"),
        (["4", "00"], [4, 0], "class numbers"),
        (["Bee", "DOG", "crane,_bird", "machine"], [1, 3, 2, 6], "names of classes"),
        (["n01", "n03", "n02", "n07", "n04", "n06", "n05"], [0, 2, 1, 6, 3, 5, 4], "the 7 labels in sorted order"),
        ([f"n0000000{i}" for i in (3, 1, 2, 9, 4, 5, 6)], [2, 0, 1, 6, 3, 4, 5], "the 7 WordNet ids in sorted order"),
    ],
)
def test_rules_from_labels_to_classes(labels: list[Any], numbers: list[int], rule: str) -> None:
    found, used = class_numbers([*labels, *labels], NETWORK)
    assert ([found[label] for label in labels], used) == (numbers, rule)


@pytest.mark.parametrize("count", [1000, 21841])
def test_imagenet_folders_are_in_the_order_of_its_classes(count: int) -> None:
    folders = [f"n{1440764 + 7 * place:08d}" for place in range(count)]
    found, rule = class_numbers(folders[::-1], {place: f"name {place}" for place in range(count)})
    assert [found[name] for name in folders] == list(range(count))
    assert rule == f"the {count} WordNet ids in sorted order"


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ([7], "Invalid label 7"),
        ([-1], "Invalid label -1"),
        (["crane", "ant"], '"crane" is not a class'),  # the bird, or the machine?
        (["n01440764", "ant"], '"n01440764" is not a class'),
        (["1", "7"], '"7" is not a class'),
        (["1", "dog", "zebra"], '"zebra" is not a class'),
        ([str(number) for number in range(1, 8)], '"7" is not a class'),  # numbers from 1, or sorted names?
    ],
)
def test_labels_that_fit_no_rule(labels: list[Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        class_numbers(labels, NETWORK)


def test_labels_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "labels"
    file.write_text("cat/a.jpg,0\n./dog/a.jpg,1\nb.jpg, bee\n\n")
    assert labels_from_file(file, ["dog/a.jpg", "cat/a.jpg", "deep/b.jpg"]) == ("1", "0", "bee")
    file.write_text("ILSVRC2012_val_00000001.JPEG 65\nwith space.JPEG 970\n")
    assert labels_from_file(file, ["with space.JPEG", "ILSVRC2012_val_00000001.JPEG"]) == ("970", "65")
    for text, said in (("cat/a.jpg,0\ndog/a.jpg,1\n", "no line for a.jpg"), ("", "no line for"), ("x,1\ny\n", "a line 'y'")):
        file.write_text(text)
        with pytest.raises(InputError, match=said):
            labels_from_file(file, ["a.jpg"])


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("l.csv", "image,labels\na.jpg,cat,dog\nb.jpg,\n", (("cat", "dog"), ("",))),
        ("l.csv", "a.jpg,cat;dog\nb.jpg,bee\na.jpg,ant\n", (("cat;dog", "ant"), ("bee",))),
        ("l.csv", "image,cat,dog\na.jpg,1,1\nb.jpg,0,0\n", (("cat", "dog"), ())),
        ("l.csv", "a.jpg,1,1\nb.jpg,0,0\n", (("1", "1"), ("0", "0"))),
        ("l.json", '{"a.jpg": ["cat", "dog"], "b.jpg": []}', (("cat", "dog"), ())),
    ],
)
def test_several_labels_from_a_file(name: str, text: str, found: tuple[Any, ...], tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    assert labels_from_file(tmp_path / name, ["a.jpg", "b.jpg"], "labels") == found


def test_refusals(tmp_path: Path) -> None:
    path = bundle(tmp_path / "b")
    data = folder(tmp_path / "data", {"ant": 2, "zebra": 2})
    refused(cli_here("evaluate", path, "--data", data, cwd=tmp_path), '"zebra" is not a class', "--labels")
    refused(cli_here("evaluate", path, "--data", "absent", cwd=tmp_path), "absent does not exist")
    refused(cli_here("evaluate", path, "--data", data, "--labels", "absent.csv", cwd=tmp_path), "absent.csv does not exist")
    assert cli_here("evaluate", path, "--data", data, "--ignore-labels", cwd=tmp_path).returncode == 0
    with pytest.raises(UsageError, match="has no int8 graph"):
        swin_deploy.evaluate(path, data, precisions=["int8"])
    with pytest.raises(UsageError, match='Unknown back end "tvm"'):
        swin_deploy.evaluate(path, data, backend="tvm")
    with pytest.raises(UsageError, match="a folder of images only"):
        swin_deploy.evaluate(path, images(4), labels="labels.csv")
