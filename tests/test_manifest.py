"""Odd values in a manifest whose digests are right: each is one sentence, and nothing outside of the bundle is touched."""

from __future__ import annotations

import functools
import json
import os
import pickle
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli.exported import contents, digits
from once import once

import swin_deploy
from swin_deploy.bundle import Bundle, _manifest_text, inside, load_graph
from swin_deploy.errors import BundleError, SwinDeployError
from swin_deploy.exporters.external_data import WeightFile
from swin_deploy.exporters.quantization.resume import ResumeState
from swin_deploy.runtimes.gpu.engine_fit import incompatibility, rebuild_command

GRAPH, FP16, ENGINE = "onnx/model.onnx", "onnx/model_fp16.onnx", "engines/fp16-stripped-sm_89.engine"
SHA, IMAGE = "0" * 64, np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)


@functools.cache
def source() -> Path:
    """A bundle with two graphs, and an engine without weights."""

    def make(path: Path) -> None:
        shutil.copytree(digits(2), path)
        bundle = Bundle.open(path)
        profile = {
            "batch": [1, 4, 8],
            "kernels": 9,
            "roles": {"move": {"kernels": 2, "bytes_read": None}},
            "types": {"Half": 9},
        }
        entry = {
            "precision": "fp16", "image_size": [32, 32], "graph": FP16, "parent": bundle.files[FP16].sha256, "gpu": "sm_89",
            "backend": "tensorrt-rtx", "backend_version": "1.3", "options": {"strip_weights": True}, "profiles": [profile],
            "fingerprint": "of a test", "seconds": 1.5, "agreement": "not verified",
        }  # fmt: skip
        bundle = bundle.with_file(ENGINE, entry, b"a plan")
        bundle = bundle.with_file("ranges.json", {}, json.dumps({"source": "test", "layers": {}}).encode())
        bundle.with_tuning({**TUNING, "candidates": [TUNED]})

    return once("odd manifests", make)


def manifest() -> dict[str, Any]:
    """The manifest of `source`, to change."""
    return Bundle.open(source()).manifest.to_dict()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return Path(shutil.copytree(source(), tmp_path / "b"))


def changed(*keys: Any, to: Any = ...) -> dict[str, Any]:
    """The manifest with another value at `keys`, or without one."""
    value: Any = manifest()
    part = functools.reduce(lambda part, key: part[key], keys[:-1], value)
    if to is ...:
        del part[keys[-1]]
    else:
        part[keys[-1]] = to
    return dict(value)


def rewrite(path: Path, value: Any) -> Path:
    """Write a manifest with a right digest."""
    (path / "manifest.json").write_text(_manifest_text(value))
    return path


def moved(old: str, new: str) -> dict[str, Any]:
    """The manifest with a file under another path."""
    value = manifest()
    value["files"][new] = value["files"].pop(old)
    return value


TUNED = {
    "backend": "openvino",
    "precision": "fp32",
    "device": "cpu",
    "libraries": {},
    "files": SHA,
    "milliseconds": 1,
    "verdict": "",
}
TUNING = {"measured": "2030-01-31T12:00:00+00:00", "machine": {}, "candidates": []}
G, E = ("files", GRAPH), ("files", ENGINE)
ODD: list[tuple[tuple[Any, ...], Any, str]] = [
    (("files",), [], "an object"), (("files",), ..., "missing"), (("files", GRAPH), None, "an object"),
    (("task",), {}, r'task\["name"\] is missing'), (("task", "name"), "detection", "one of image-classification"),
    (("task", "out_features"), "stage1", "a list"), (("task", "use_mask_token"), 0, "true or false"),
    (("name",), ["x"], "text"), (("name",), "x" * 2_000_000, "1,000,000 characters"), (("notes",), "note", "a list"),
    (("notes",), [1], r"notes\[0\] is 1"), (("created",), "now", "date"), (("created",), 5, "date"),
    (("semantics",), "mmdet", "one of hf"), (("target",), "cpu", "one of tensorrt"), (("tools",), {"torch": 2}, "text"),
    (("preprocessing",), {"assumed": 1}, "text"), (("weights_key",), {}, "text"), (("source",), None, "text"),
    ((*G, "sha256"), SHA[1:], "64 hexadecimal"), ((*G, "sha256"), "A" * 64, "64 hexadecimal"), ((*G, "sha256"), ..., "missing"),
    ((*G, "sha256"), SHA + "\n", "64 hexadecimal"), ((*G, "bytes"), -1, "whole number from 0"), ((*G, "bytes"), True, "whole"),
    ((*G, "bytes"), 1.5, "whole number"), ((*G, "bytes"), "9", "whole number"), ((*G, "bytes"), 2**63, "whole number"),
    ((*G, "parent"), 1, "64 hexadecimal"), ((*G, "precision"), "fp64", "one of fp32"), ((*G, "precision"), ["fp32"], "one of"),
    ((*G, "image_size"), [32], "two whole numbers"), ((*G, "image_size"), [0, 32], "from 1 to 4096"),
    ((*G, "image_size"), [32, 32.0], "two whole"), ((*G, "image_size"), [True, 32], "two whole"),
    ((*G, "image_size"), [32, 5000], "4096"), ((*G, "image_size"), "32", "two whole"), ((*G, "image_size"), [48, 48], "inputs"),
    ((*G, "inputs"), [], "inputs"), ((*G, "inputs"), {}, "a list"), ((*G, "inputs"), [5], "an object"),
    ((*G, "inputs", 0, "name"), "x", "pixel_values"), ((*G, "inputs", 0, "dtype"), "object", "one of float32"),
    ((*G, "inputs", 0, "dtype"), "uint8", "float32"), ((*G, "inputs", 0, "shape"), [], "inputs"),
    ((*G, "inputs", 0, "shape"), ["batch", 3, 32, None], "whole"), ((*G, "inputs", 0, "shape"), ["b", "c", 32, 32], "channels"),
    ((*G, "inputs", 0, "shape"), [0, 3, 32, 32], "whole"), ((*G, "inputs", 0, "shape"), ["batch", 3, -1, 32], "whole"),
    ((*G, "outputs", 0, "name"), "a\x1b[2Jb", r"\\x1b"), ((*G, "outputs", 0, "shape", 0), {}, "whole"),
    ((*G, "reference"), "other.npz", "a file of this manifest"), ((*G, "reference"), GRAPH, "not a graph or an engine"),
    ((*G, "reference"), ..., "missing"), ((*G, "reference"), "/etc/passwd", "relative path"),
    ((*G, "reference"), "../b/reference.npz", "relative path"), ((*G, "weights"), "onnx/none.onnx_data", "a file of this"),
    ((*G, "weights"), FP16, "not a graph"), ((*G, "weights"), "config.json", "in the folder of the graph"),
    ((*G, "weights"), 5, "relative path"), ((*G, "agreement"), "verified", "an object"), ((*G, "agreement"), {}, "verified"),
    ((*G, "agreement", "verified"), "yes", "true or false"), ((*G, "agreement", "relative_l2"), "0", "a number"),
    ((*G, "preprocessing"), {"frame_size": [1, 2]}, "steps"),
    ((*G, "preprocessing"), {"frame_size": None, "steps": {}}, "uint8"),
    ((*G, "calibration"), {"target": "gpu"}, "one of tensorrt"), ((*G, "calibration"), [], "an object"),
    ((*G, "passes"), "many", "a list"), ((*G, "layers"), [1], "an object"), ((*G, "gate"), "no", "an object"),
    ((*E, "graph"), "ranges.json", "a graph"), ((*E, "graph"), "onnx/../x.onnx", "relative path"),
    ((*E, "graph"), ..., "missing"), ((*E, "parent"), None, "64 hexadecimal"),
    ((*E, "backend"), "onnxruntime", "one of tensorrt"), ((*E, "backend_version"), "1; rm", "a version"),
    ((*E, "gpu"), "sm_89 ", "capability"), ((*E, "gpu"), 89, "capability"),
    ((*E, "options"), None, "an object"), ((*E, "options", "strip_weights"), 1, "true or false"),
    ((*E, "options"), {"workspace": 0}, "whole number"), ((*E, "options"), {"optimization_level": 6}, "0 to 5"),
    ((*E, "profiles"), {}, "a list"), ((*E, "profiles", 0, "batch"), [1, 1], "three"),
    ((*E, "profiles", 0, "batch"), [8, 1, 8], "ascending"), ((*E, "profiles", 0, "roles", "move"), 3, "an object"),
    ((*E, "profiles", 0, "kernels"), -1, "whole number"), ((*E, "seconds"), "1", "a number"), ((*E, "fingerprint"), 5, "text"),
    (("tuning",), {}, "a list"), (("tuning",), [{}], r"tuning\[0\]"), (("tuning",), [{**TUNING, "machine": 1}], "an object"),
    *((("tuning",), [{**TUNING, "candidates": [{**TUNED, **odd}]}], rf'\["candidates"\]\[0\]\["{key}"\].*{said}')
      for odd, said in (({"backend": 1}, "printable"), ({"verdict": "a\x1b[2J"}, "printable"), ({"verdict": "x" * 301}, "300"),
                        ({"files": SHA[1:]}, "hexadecimal"), ({"milliseconds": -1}, "number"), ({"libraries": []}, "object"))
      for key in odd),
]  # fmt: skip
PATHS = [
    "onnx/../../victim/v.onnx", "../x.npz", "/etc/x", "a//b", "./a", "a/", "a\\b", "a\0b", "a\nb", "C:x", "", ".", "a/./b", "é",
    ".hidden/x", "a.", "x" * 300, "onnx", "manifest.json", "MANIFEST.json", "ONNX/a.npz", "Config.json", "config.json/x",
]  # fmt: skip


@pytest.mark.parametrize(("keys", "to", "sentence"), ODD)
def test_an_odd_value_is_one_sentence(keys: tuple[Any, ...], to: Any, sentence: str) -> None:
    with pytest.raises(BundleError, match=sentence) as caught:
        Bundle.with_manifest(source(), changed(*keys, to=to))
    text = str(caught.value)
    assert text.startswith(f"{source()}/manifest.json: {keys[0]}")
    assert text.endswith(" Export the bundle again.")
    assert len(text) < len(str(source())) + 900
    assert text.isprintable()


@pytest.mark.parametrize("file", PATHS)
def test_a_path_is_relative_and_normal(file: str) -> None:
    with pytest.raises(BundleError, match=r"relative path|in more than case") as caught:
        Bundle.with_manifest(source(), moved("ranges.json", file))
    assert str(caught.value).isprintable()


VERBS: dict[str, Callable[[Path], object]] = {
    "load": lambda path: swin_deploy.load(path, backend="onnxruntime", precision="fp32").close(),
    "verify": swin_deploy.verify,
    "inspect": swin_deploy.inspect,
    "evaluate": lambda path: swin_deploy.evaluate(path, [IMAGE]),
    "quantize": lambda path: swin_deploy.quantize(path, [IMAGE]),
    "refit": swin_deploy.refit,
    "build_engine": lambda path: swin_deploy.build_engine(path, precision="fp32", backend="tensorrt-rtx", gpus=["sm_89"]),
}


@pytest.mark.parametrize("verb", VERBS)
def test_no_verb_leaves_the_bundle(verb: str, path: Path) -> None:
    """A path of the manifest, and folders that are links, lead to a victim; nobody reads or changes it."""
    victim = path.parent / "victim"
    shutil.copytree(path, victim)
    (victim / "v.sensitivity.svg").write_text("mine")
    before = contents(victim)
    for old in (GRAPH, FP16, ENGINE):
        rewrite(path, moved(old, f"onnx/../../victim/v{Path(old).suffix}"))
        with pytest.raises(BundleError, match="relative path"):
            VERBS[verb](path)
    rewrite(path, manifest())
    for folder in ("onnx", "engines"):
        shutil.rmtree(path / folder)
        (path / folder).symlink_to(victim / folder)
    (path / ".calibration").symlink_to(victim)
    with pytest.raises(SwinDeployError, match=r"leads out of|no usable"):
        VERBS[verb](path)
    assert contents(victim) == before


def test_links_to_files_and_folders_inside_work(path: Path) -> None:
    (path / GRAPH).rename(path.parent / "blob")
    (path / GRAPH).symlink_to("../../blob")
    (path / "engines").rename(path / "compiled")
    (path / "engines").symlink_to("compiled")
    assert all(Bundle.open(path).verified_path(file) for file in manifest()["files"])
    (path / "ranges.json").unlink()
    os.mkfifo(path / "ranges.json")
    with pytest.raises(BundleError, match="not a regular file"):
        swin_deploy.verify(path)


@pytest.mark.parametrize("file", ["", "..", "a/../b", "/a", "a\\b", "a\0", "../b/onnx/model.onnx"])
def test_a_path_that_leaves_a_folder(file: str, path: Path) -> None:
    with pytest.raises(BundleError, match="not a path inside"):
        inside(path, file)


def test_the_resume_state_stays_in_its_folder(tmp_path: Path) -> None:
    from swin_deploy.exporters.quantization.qdq import LinearLayer

    layer: Any = LinearLayer.__new__(LinearLayer)
    object.__setattr__(layer, "name", "../../../stolen")
    with pytest.raises(BundleError, match="not a path inside"):
        ResumeState(tmp_path, "key").read([layer])


def test_unknown_keys_are_kept_and_old_values_cannot_be_changed(path: Path) -> None:
    value = changed("later", to={"a": [1]})
    value["files"][GRAPH]["later"] = "b"
    found = Bundle.open(rewrite(path, value)).with_entry(GRAPH, {"agreement": "not verified"})
    assert (found.manifest["later"], found.files[GRAPH]["later"], found.graphs[GRAPH].verified) == ({"a": [1]}, "b", False)
    assert json.loads((path / "manifest.json").read_text())["later"] == {"a": [1]}
    found.files[GRAPH]["inputs"].clear()
    assert found.files[GRAPH]["inputs"] == manifest()["files"][GRAPH]["inputs"]
    with pytest.raises(AttributeError):
        found.graphs[GRAPH].precision = "fp16"
    again = pickle.loads(pickle.dumps(found))
    assert (again, again.graphs[GRAPH].inputs) == (found, found.graphs[GRAPH].inputs)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"schema": 1', '"schema": 1, "schema": 1'), ('"schema": 1', '"schema": true'),
        ('"schema": 1', '"schema": ' + "9" * 5000),
        ('"schema": 1', '"later": ' + "[" * 900 + "]" * 900 + ', "schema": 1'), ('"bytes"', '"later": NaN, "bytes"'),
        ('"bytes"', '"later": 1e999, "bytes"'), ('"schema": 1', '"schema": 2'), ('"seconds": 1.5', '"seconds": -Infinity'),
    ],
)  # fmt: skip
def test_odd_json(old: str, new: str, path: Path) -> None:
    text = (path / "manifest.json").read_text()
    assert old in text
    (path / "manifest.json").write_text(text.replace(old, new, 1))
    with pytest.raises(BundleError, match=r"damaged|schema 2") as caught:
        Bundle.open(path)
    assert len(str(caught.value)) < len(str(path)) + 400


VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2**31, 2**63, 2**64, -(2**64), 1e308, 0.5, -0.0, "", "x", "../x", "/dev/zero",
    "\x1b[31m", "\ud800", "x" * 5000, [], [[]], [None], {}, {"x": 1}, [1, 2, 3], ["a"], GRAPH, ENGINE, "config.json", SHA,
]  # fmt: skip


def leaves(value: Any, keys: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The keys of every value in JSON values; of a list, the first."""
    yield keys
    for key in value if isinstance(value, dict) else range(len(value[:1])) if isinstance(value, list) else ():
        yield from leaves(value[key], (*keys, key))


def use(bundle: Bundle) -> None:
    """What verbs do with a manifest before they run anything."""
    _ = bundle.task, bundle.image_size, bundle.name, bundle.manifest.created
    for file in bundle.files:
        bundle.verified_path(file)
    for file, engine in bundle.engines.items():
        for release in ("1.3", "1.4"):
            incompatibility(bundle, file, [engine.gpu, "sm_89"], release)
        rebuild_command(bundle, file, [])
    for entry in bundle.graphs.values():
        _ = entry.verified, entry.relative_l2, entry.target, [spec.image_size for spec in entry.inputs[:1]]


def test_any_value_is_a_sentence_or_works(path: Path) -> None:
    """Every value of the manifest, replaced by odd ones, and some of the bundles that still open in the verbs."""
    chance, accepted, refused, text = random.Random(0), [], list[str](), json.dumps(manifest())
    for keys in list(leaves(manifest()))[1:]:
        for odd in chance.sample(VALUES, 8):
            value: Any = json.loads(text)
            functools.reduce(lambda part, key: part[key], keys[:-1], value)[keys[-1]] = odd
            try:
                use(Bundle.with_manifest(path, value))
                accepted.append(value)
            except BundleError as error:
                refused.append(str(error))
    assert min(len(refused), len(accepted)) > 200
    before = contents(path.parent)
    for value in chance.sample(accepted, 12):
        for verb in ("load", "refit"):
            try:
                VERBS[verb](rewrite(path, value))
            except SwinDeployError as error:
                refused.append(str(error))
    assert all(map(str.isprintable, refused))
    assert contents(rewrite(path, manifest()).parent) == before


LISTED = {"location": "model.onnx_data", "offset": "0"}
PLACES: list[tuple[dict[str, str], dict[str, Any], str]] = [
    (LISTED, {"weights": None}, r"its data is in model\.onnx_data, which the manifest does not list for it"),
    ({"location": "../secret"}, {}, r"its data is in \.\./secret, which"), ({"location": "/etc/passwd"}, {}, "in /etc/passwd"),
    ({"location": "./model.onnx_data"}, {}, r"in \./model"), ({"location": "\x1b[2J"}, {}, r"in \\x1b"),
    ({"location": ""}, {}, "in , "), ({"location": "*/_ORT_MEM_ADDR_/*"}, {}, "_ORT_MEM_ADDR_"),
    ({"offset": "-8"}, {}, "invalid offset"),
    ({"offset": "x"}, {}, "invalid offset"), ({"length": "9" * 30}, {}, "invalid offset or length"),
    ({"offset": "99999999"}, {}, "beyond the end"), (LISTED, {"weights": "onnx/other.onnx_data"}, "in model"),
]  # fmt: skip


@pytest.mark.parametrize(("place", "entry", "sentence"), PLACES)
def test_a_graph_reads_only_the_weights_that_are_listed(place: Any, entry: Any, sentence: str, path: Path) -> None:
    """Before a runtime reads it, and whatever is beside it."""
    model, weights = load_graph(path / GRAPH), "onnx/model.onnx_data"
    bundle = Bundle.open(path).with_file(weights, {}, lambda target: WeightFile(target, "model.onnx_data").take(model))
    bundle = bundle.with_file("onnx/other.onnx_data", {}, b"other")
    whole = bundle.with_file(GRAPH, {**bundle.files[GRAPH], "weights": weights}, model.SerializeToString())
    assert whole.verified_path(GRAPH) == path / GRAPH
    for one in next(one for one in model.graph.initializer if one.external_data).external_data:
        one.value = place.get(one.key, one.value)
    whole.with_file(GRAPH, {**whole.files[GRAPH], **entry}, model.SerializeToString())
    for verb in ("load", "verify", "evaluate"):
        with pytest.raises(BundleError, match=sentence):
            VERBS[verb](path)
