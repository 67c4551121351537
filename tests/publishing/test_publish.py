"""`publish`: the files of each target, read by the parser of its program where that can be installed."""

from __future__ import annotations

import configparser
import importlib.util
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from cli.exported import cli_here, digits, exported_bundle, one_block, refused, result

import swin_deploy
from swin_deploy.bundle import Bundle, sha256_of
from swin_deploy.errors import BundleError, UsageError
from swin_deploy.options import PROGRAMS
from swin_deploy.preprocess import Preprocessor
from swin_deploy.publishing.consumers import CONSUMERS

RTX, TRT = "engines/rtx.engine", "engines/trt.engine"
PROFILES = ((1, 1, 1), (2, 4, 8))


def published(bundle: Path, target: str, folder: Path, **options: Any) -> dict[str, Path]:
    """The files that were written, by their path inside the folder, which is all that is left."""
    files = swin_deploy.publish(bundle, target=target, output=folder, **options)
    assert sorted(files) == sorted(path for path in folder.rglob("*") if path.is_file())
    assert [path.name for path in folder.parent.iterdir() if path.name.startswith(".")] == []
    return {path.relative_to(folder).as_posix(): path for path in files}


def sections(path: Path) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(strict=True, interpolation=None)
    parser.read_string(path.read_text(encoding="utf-8"))
    return parser


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with an engine of each compiler."""
    path = tmp_path_factory.mktemp("compiled") / "one-block"
    shutil.copytree(exported_bundle("--weights", str(one_block())), path)
    graph = Bundle.open(path).graphs["onnx/model.onnx"]
    for file, backend in ((RTX, "tensorrt-rtx"), (TRT, "tensorrt")):
        facts = {
            **{"precision": "fp16", "image_size": list(graph.image_size), "graph": "onnx/model.onnx", "parent": graph.sha256},
            **{"backend": backend, "backend_version": "11.2.0", "gpu": "sm_89", "options": {}},
            "profiles": [{"batch": list(batch)} for batch in PROFILES],
        }
        Bundle.open(path).with_file(file, facts, file.encode())
    return path


def test_every_program_has_a_writer() -> None:
    assert tuple(CONSUMERS) == PROGRAMS


def triton_config(path: Path) -> Any:
    """The configuration, parsed by the protobuf classes of tritonclient; its package itself would import gRPC."""
    from google.protobuf import text_format

    spec = importlib.util.find_spec("tritonclient")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    file = Path(spec.submodule_search_locations[0]) / "grpc/model_config_pb2.py"
    loader = importlib.util.spec_from_file_location("model_config_pb2", file)
    assert loader is not None
    assert loader.loader is not None
    classes = importlib.util.module_from_spec(loader)
    loader.loader.exec_module(classes)
    return text_format.Parse(path.read_text(encoding="utf-8"), classes.ModelConfig())


def test_triton_serves_a_graph(tmp_path: Path) -> None:
    files = published(digits(2), "triton", tmp_path / "repository", batch=16)
    assert sorted(files) == [f"swinv2-digits/{name}" for name in ("1/model.onnx", "config.pbtxt", "labels.txt")]
    config = triton_config(files["swinv2-digits/config.pbtxt"])
    assert (config.name, config.backend, config.max_batch_size) == ("swinv2-digits", "onnxruntime", 16)
    assert [(one.name, one.data_type, list(one.dims)) for one in config.input] == [("pixel_values", 11, [3, 32, 32])]
    [output] = config.output
    assert (output.name, list(output.dims), output.label_filename) == ("logits", [10], "labels.txt")
    assert config.WhichOneof("scheduling_choice") == "dynamic_batching"
    assert [(one.batch_size, list(one.inputs["pixel_values"].dims)) for one in config.model_warmup] == [
        (1, [3, 32, 32]),
        (16, [3, 32, 32]),
    ]
    assert files["swinv2-digits/labels.txt"].read_text().splitlines()[3] == "three"
    assert sha256_of(files["swinv2-digits/1/model.onnx"]) == Bundle.open(digits(2)).files["onnx/model.onnx"].sha256


def test_triton_serves_an_engine(compiled: Path, tmp_path: Path) -> None:
    files = published(compiled, "triton", tmp_path / "repository", engine=TRT)
    name = next(iter(files)).partition("/")[0]
    config = triton_config(files[f"{name}/config.pbtxt"])
    assert (config.backend, config.max_batch_size) == ("tensorrt", 8)
    [group] = config.instance_group
    assert list(group.profile) == ["0", "1"]
    cuda = config.optimization.cuda
    assert (cuda.graphs, [one.batch_size for one in cuda.graph_spec]) == (True, [1, 4])
    assert files[f"{name}/1/model.plan"].read_bytes() == TRT.encode()


@pytest.mark.parametrize("ir", [False, True])
def test_openvino_model_server(tmp_path: Path, ir: bool) -> None:
    openvino = pytest.importorskip("openvino")
    files = published(digits(1), "openvino-model-server", tmp_path / "repository", ir=ir)
    [entry] = json.loads(files["config.json"].read_text())["model_config_list"]
    assert entry["config"] == {"name": "swin-digits", "base_path": "/models/swin-digits"}
    pixels = np.random.default_rng(0).standard_normal((2, 3, 32, 32)).astype(np.float32)
    model = files[f"swin-digits/1/model.{'xml' if ir else 'onnx'}"]
    config = {"INFERENCE_PRECISION_HINT": "f32"}
    if ir:  # what Model API reads
        assert openvino.Core().read_model(model).get_rt_info(["model_info", "labels"]).astype(str).split(" ")[3] == "three"
    [found] = openvino.Core().compile_model(model, "CPU", config)([pixels]).values()
    session = onnxruntime.InferenceSession(digits(1) / "onnx/model.onnx")
    np.testing.assert_allclose(found, session.run(None, {"pixel_values": pixels})[0], rtol=0, atol=1e-4)


def test_gstreamer_normalizes_exactly(tmp_path: Path) -> None:
    files = published(digits(2), "gstreamer", tmp_path / "camera")
    assert sorted(files) == ["labels.txt", "swinv2-digits.onnx", "swinv2-digits.onnx.modelinfo"]
    found = sections(files["swinv2-digits.onnx.modelinfo"])
    assert dict(found["modelinfo"]) == {"version": "1.0", "group-id": "classification-generic-out"}
    assert found["logits"]["id"] == "classification-generic-out"
    assert (found["pixel_values"]["dims"], found["pixel_values"]["type"]) == ("-1,3,32,32", "float32")
    ranges = [tuple(map(float, pair.split(","))) for pair in found["pixel_values"]["ranges"].split(";")]
    values = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    expected = Bundle.open(digits(2)).preprocessor.for_frames()(values)[0].reshape(3, 256)
    computed = [np.arange(256) * (high - low) / 255 + low for low, high in ranges]
    np.testing.assert_allclose(computed, expected, rtol=0, atol=1e-6)


def test_deepstream_reports_the_error_of_its_factor(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copytree(digits(2), bundle := tmp_path / "imagenet")
    stated = json.dumps(Preprocessor.imagenet(32).to_dict()).encode()
    Bundle.open(bundle).with_file("preprocessor_config.json", {}, stated)
    with caplog.at_level(logging.WARNING, "swin_deploy"):
        files = published(bundle, "deepstream", tmp_path / "camera", batch=4)
    found = sections(files["config_infer.txt"])["property"]
    factor, offsets = float(found["net-scale-factor"]), [float(one) for one in found["offsets"].split(";")]
    values = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    expected = Bundle.open(bundle).preprocessor.for_frames()(values)[0].reshape(3, 256)
    error = np.abs([factor * (np.arange(256) - offset) for offset in offsets] - expected).max()
    assert f"up to {error:.3f} standard deviations off" in caplog.text
    assert error < 0.03
    assert (found["batch-size"], found["network-mode"], found["infer-dims"]) == ("4", "0", "3;32;32")
    assert files["labels.txt"].read_text() == "zero;one;two;three;four;five;six;seven;eight;nine\n"


def test_deepstream_passes_raw_frames(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = ("--embed-preprocess", "--input-layout", "nchw", "--input-order", "bgr", "--embed-postprocess", "softmax")
    bundle = exported_bundle("--weights", str(one_block()), *options)
    caplog.clear()
    with caplog.at_level(logging.WARNING, "swin_deploy"):
        found = sections(published(bundle, "deepstream", tmp_path / "camera")["config_infer.txt"])["property"]
    assert (found["net-scale-factor"], found["offsets"]) == ("1", "0;0;0")
    assert (found["model-color-format"], found["output-blob-names"]) == ("1", "probabilities")
    assert [record.message for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_deepstream_finds_the_engine(compiled: Path, tmp_path: Path) -> None:
    files = published(compiled, "deepstream", tmp_path / "camera", engine=TRT)
    found = sections(files["config_infer.txt"])["property"]
    assert found["model-engine-file"] == "model.onnx_b8_gpu0_fp16.engine"
    assert files[found["model-engine-file"]].read_bytes() == TRT.encode()
    assert (found["network-mode"], found["onnx-file"]) == ("2", "model.onnx")


def test_huggingface_is_a_bundle_without_engines(compiled: Path, tmp_path: Path) -> None:
    files = published(compiled, "huggingface", tmp_path / "repository")
    assert {"README.md", ".gitattributes", "config.json", "onnx/model.onnx", "manifest.json"} <= files.keys()
    assert "*.onnx filter=lfs" in files[".gitattributes"].read_text()
    bundle = Bundle.open(tmp_path / "repository")
    assert bundle.engines == {}
    assert all(bundle.verified_path(file).is_file() for file in bundle.files)
    assert bundle.graphs["onnx/model.onnx"].verified


@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt"])
def test_huggingface_names_int8_as_transformers_js_does(compiled: Path, tmp_path: Path, target: str) -> None:
    """Its default on a CPU is the file model_quantized.onnx. The weights are not stored twice."""
    path = shutil.copytree(compiled, tmp_path / "b")
    entry = {**Bundle.open(path).graphs["onnx/model.onnx"].to_dict(), "precision": "int8", "calibration": {"target": target}}
    Bundle.open(path).with_file("onnx/model_int8.onnx", entry, (path / "onnx/model.onnx").read_bytes())
    files = published(path, "huggingface", tmp_path / "repository")
    stated = json.loads(files["config.json"].read_text())["transformers.js_config"]
    assert ("onnx/model_quantized.onnx" in files, stated) == (
        (True, {}) if target == "onnxruntime" else (False, {"dtype": "fp32"})
    )
    if target == "onnxruntime":
        assert files["onnx/model_quantized.onnx"].samefile(files["onnx/model_int8.onnx"])
    assert Bundle.open(tmp_path / "repository").config == Bundle.open(path).config


def test_a_killed_process_leaves_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next run removes what is named after the target, so nothing else may be beside it."""
    seen, copy = set(), shutil.copyfile

    def copied(*paths: Path) -> Path:
        seen.update(path.name for path in tmp_path.iterdir())
        return copy(*paths)

    monkeypatch.setattr(shutil, "copyfile", copied)
    published(digits(1), "huggingface", tmp_path / "repository")
    assert {name.removesuffix(".lock")[:20] for name in seen} == {".repository.partial-"}
    assert len(seen) == 2


@pytest.mark.parametrize("embed", [False, True])
def test_epcontext_holds_the_engine(compiled: Path, tmp_path: Path, embed: bool) -> None:
    files = published(compiled, "epcontext", tmp_path / "context", engine=RTX, embed_engine=embed)
    assert sorted(files) == ["model_ctx.onnx"] if embed else ["model.engine", "model_ctx.onnx"]
    model = onnx.load(files["model_ctx.onnx"])
    onnx.checker.check_model(model)
    [node] = model.graph.node
    found = {one.name: onnx.helper.get_attribute_value(one) for one in node.attribute}
    assert (node.op_type, node.domain, found["embed_mode"]) == ("EPContext", "com.microsoft", int(embed))
    assert found["ep_cache_context"] == (RTX.encode() if embed else b"model.engine")
    assert (found["hardware_architecture"], found["source"]) == (b"89", b"NvTensorRTRTXExecutionProvider")
    facts = {entry.key: entry.value for entry in model.metadata_props}
    assert facts["engine_sha256"] == Bundle.open(compiled).files[RTX].sha256
    assert facts["batches"] == "1:1:1,2:4:8"
    assert (json.loads(facts["labels"]), facts["graph_verdict"][:8]) == (["LABEL_0", "LABEL_1"], "verified")
    # ONNX Runtime accepts the graph and only lacks the provider.
    with pytest.raises(Exception, match="EPContext"):
        onnxruntime.InferenceSession(files["model_ctx.onnx"], providers=["CPUExecutionProvider"])


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A folder like that of the npm package onnxruntime-web."""
    dist = tmp_path / "node_modules/onnxruntime-web/dist"
    dist.mkdir(parents=True)
    (dist / "ort.webgpu.min.mjs").write_text('"ort-wasm-simd-threaded.asyncify.mjs" "ort-wasm-simd-threaded.asyncify.wasm"')
    for name in ("asyncify.mjs", "asyncify.wasm", "jsep.wasm"):
        (dist / f"ort-wasm-simd-threaded.{name}").write_text(name)
    return dist.parent


def test_web_page_has_what_it_needs(tmp_path: Path, package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    files = published(digits(2), "web", tmp_path / "page")
    wasm = [f"ort-wasm-simd-threaded.asyncify.{kind}" for kind in ("mjs", "wasm")]
    assert sorted(files) == ["index.html", "model.onnx", *wasm, "ort.webgpu.min.mjs"]
    page = files["index.html"].read_text(encoding="utf-8")
    settings = json.loads(page.partition('id="settings">')[2].partition("</script>")[0])
    assert settings["labels"][3] == "three"
    assert "{{" not in page
    assert not any(text in page for text in ("https://", "http://"))


# fmt: off
ODD = [
    "a, comma", 'quo"te', "semi;colon", "new\nline", "nul\x00", "line\u2028separator", "dup", "dup", "日本 😀", "", "", "\ud800"
]
# fmt: on


def with_labels(bundle: Path, target: Path, **stated: Any) -> Path:
    """A copy of a bundle with other labels, or other entries of config.json."""
    shutil.copytree(bundle, target)
    kept = Bundle.open(target)
    Bundle.open(target).with_file("config.json", {}, json.dumps({**kept.read_json("config.json"), **stated}).encode())
    return target


def test_labels_stay_in_their_lines(tmp_path: Path) -> None:
    """Each parser finds one label for each class."""
    bundle = with_labels(digits(1), tmp_path / "odd", id2label=dict(enumerate(ODD[-10:])))
    wanted = ["semi;colon", "new line", "nul", "line separator", "dup", "dup", "日本 😀", "", "", "?"]
    for target in ("triton", "gstreamer", "openvino-model-server"):
        [labels] = [path for path in published(bundle, target, tmp_path / target).values() if path.name == "labels.txt"]
        assert labels.read_text(encoding="utf-8").splitlines() == wanted
    [line] = published(bundle, "deepstream", tmp_path / "camera")["labels.txt"].read_text(encoding="utf-8").splitlines()
    assert line.split(";") == ["semi,colon", *wanted[1:7], "_", "_", "?"]


def test_a_graph_of_several_images_with_its_best_classes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As many best classes as there are: the output for clients is that of the logits."""
    bundle = exported_bundle(
        *("--weights", str(one_block()), "--static-batch", "3", "--embed-postprocess", "top-k", "--activation", "sigmoid")
    )
    files = published(bundle, "triton", tmp_path / "repository")
    config = triton_config(next(path for name, path in files.items() if name.endswith("config.pbtxt")))
    assert config.max_batch_size == 0
    assert [(one.name, list(one.dims), one.label_filename) for one in config.output] == [
        ("logits", [3, 2], "labels.txt"), ("indices", [3, 2], ""), ("scores", [3, 2], "")
    ]  # fmt: skip
    caplog.clear()
    found = sections(published(bundle, "deepstream", tmp_path / "camera")["config_infer.txt"])["property"]
    assert (found["output-blob-names"], found["batch-size"]) == ("logits", "3")
    assert "For scores, export with --embed-postprocess sigmoid" in caplog.text
    for target, batch, sentence in (
        ("deepstream", 4, "accepts exactly 3 images. Leave out --batch."),
        ("triton", 4, "accepts exactly 3 images. Leave out --batch."),
        ("gstreamer", None, "GStreamer passes one image, and onnx/model.onnx accepts 3."),
        ("web", None, "The page passes one image, and onnx/model.onnx accepts 3."),
    ):
        with pytest.raises(UsageError, match=sentence):
            swin_deploy.publish(bundle, target=target, output=tmp_path / "new", batch=batch)


@pytest.mark.parametrize("target", ["triton", "openvino-model-server"])
def test_the_answer_instead_of_logits(tmp_path: Path, target: str) -> None:
    bundle = exported_bundle("--weights", str(one_block()), "--embed-postprocess", "softmax")
    pixels = np.random.default_rng(1).standard_normal((2, 3, 32, 32)).astype(np.float32)
    ir = target != "triton"
    files = published(bundle, target, tmp_path / target, no_logits=True, ir=ir)
    [path] = [path for path in files.values() if path.name in ("model.onnx", "model.xml")]
    if ir:
        openvino = pytest.importorskip("openvino")
        outputs = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})([pixels])
        [(name, found)] = [(one.get_any_name(), array) for one, array in outputs.items()]
        assert name == "probabilities"
    else:
        onnx.checker.check_model(str(path), full_check=True)
        config = triton_config(path.parents[1] / "config.pbtxt")
        assert [(one.name, one.label_filename) for one in config.output] == [("probabilities", "labels.txt")]
        [found] = onnxruntime.InferenceSession(path).run(None, {"pixel_values": pixels})
    [wanted] = onnxruntime.InferenceSession(bundle / "onnx/model.onnx").run(["probabilities"], {"pixel_values": pixels})
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("program", ["deepstream", "gstreamer"])
def test_images_that_programs_do_not_have(tmp_path: Path, program: str) -> None:
    bundle = exported_bundle("--weights", str(one_block(channels=4)))
    with pytest.raises(UsageError, match=r"images with 1 or 3 channels, and this network expects 4\."):
        swin_deploy.publish(bundle, target=program, output=tmp_path / "new")


@pytest.mark.parametrize(
    ("problem", "way"), [("regression", "Use another"), ("multi_label_classification", "postprocess sigmoid")]
)
def test_gstreamer_has_only_softmax(tmp_path: Path, problem: str, way: str) -> None:
    bundle = with_labels(digits(1), tmp_path / "b", problem_type=problem)
    with pytest.raises(UsageError, match=f"GStreamer computes the softmax of logits.*{way}"):
        swin_deploy.publish(bundle, target="gstreamer", output=tmp_path / "new")


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"target": "tritn"}, 'Unknown target "tritn". Choose one of: triton, '),
    ({"target": "web", "ir": True}, "--ir is for openvino-model-server, not for web. Leave out --ir."),
    ({"target": "huggingface", "precision": "fp32"}, "--precision is for triton, "),
    ({"target": "triton", "precision": "int8"}, "has no int8 graph. Choose one of: fp32"),
    ({"target": "triton", "image_size": 64}, "has no graph for images of 64x64. It has: 32x32"),
    ({"target": "triton", "engine": "engines/none.engine"}, 'Unknown engine "engines/none.engine". Choose one of: engines/'),
    ({"target": "triton", "engine": RTX}, "is one of TensorRT for RTX. Compile one with `swin-deploy build-engine"),
    ({"target": "triton", "engine": TRT, "batch": 9}, "The engine runs batches of up to 8. Pass --batch 8 or less."),
    ({"target": "deepstream", "engine": RTX}, "is one of TensorRT for RTX. Leave out --engine"),
    ({"target": "triton", "no_logits": True}, "onnx/model.onnx has no outputs beside logits. Export with --embed-postprocess."),
    ({"target": "triton", "engine": TRT, "no_logits": True}, "An engine keeps its outputs. Leave out --no-logits"),
    ({"target": "epcontext"}, "has several engines. Choose one with --engine: engines/rtx.engine, engines/trt.engine."),
    ({"target": "epcontext", "precision": "int8"}, "has no such engine. Compile one: swin-deploy build-engine"),
    ({"target": "web", "onnxruntime_web": "nowhere"}, "there is no dist/ort.webgpu.min.mjs in nowhere"),
]


@pytest.mark.parametrize(("options", "sentence"), REFUSED, ids=[sentence[:40] for _, sentence in REFUSED])
def test_refusals(compiled: Path, tmp_path: Path, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError) as refusal:
        swin_deploy.publish(compiled, output=tmp_path / "new/folder", **options)
    assert sentence in str(refusal.value)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_files_is_kept(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("mine")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="is inside the bundle"):
        swin_deploy.publish(digits(2), target="triton", output=digits(2) / "new")
    said = refused(cli_here("publish", digits(2), "--for", "triton", "-o", "full", cwd=tmp_path))
    assert "full exists and is not an empty folder. Choose another folder with -o, or remove it." in said
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine.txt"]
    found = result(cli_here("publish", digits(2), "--for", "triton", "-o", "empty", "--json", cwd=tmp_path))
    assert "empty/swinv2-digits/config.pbtxt" in found["files"]


def test_a_damaged_file_is_not_published(compiled: Path, tmp_path: Path) -> None:
    shutil.copytree(compiled, bundle := tmp_path / "bundle")
    (bundle / TRT).write_bytes(b"changed")
    with pytest.raises(BundleError, match="is not the file that was compiled"):
        swin_deploy.publish(bundle, target="triton", output=tmp_path / "new", engine=TRT)
    assert not (tmp_path / "new").exists()
