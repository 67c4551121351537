"""Bundles of strangers: what is checked before native code reads a graph, and whose engines are run."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli.exported import THREE, cli_here, exported_bundle, one_block, refused
from engine_bundles import with_engines
from fake_gpu import simulated

import swin_deploy
import swin_deploy.bundle
import swin_deploy.graph_check
from swin_deploy.api.evaluate import _check_with_onnx
from swin_deploy.bench.worker import Process
from swin_deploy.bundle import Bundle, cache_folder, record, recorded
from swin_deploy.doctor.checks import InstalledGpu, run_engine
from swin_deploy.errors import BackendError, BundleError, UntrustedEngineError
from swin_deploy.exporters.engines.build import _has, layers_file
from swin_deploy.graph_check import ExternalData, check_structure
from swin_deploy.graph_shapes import OPERATORS

onnx = pytest.importorskip("onnx", reason="the graphs are changed with it")
Change = Callable[[Any], object]  # of a ModelProto


@pytest.fixture
def stranger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle on a machine that did not make it."""
    made = exported_bundle("--weights", str(one_block()))  # first, since it is recorded as made
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(swin_deploy.bundle, "_RECORDED", set())
    return Path(shutil.copytree(made, tmp_path / "b"))


def node(m: Any, kind: str) -> Any:
    return next(one for one in m.graph.node if one.op_type == kind)


def attribute(m: Any, kind: str, name: str) -> Any:
    return next(one for one in node(m, kind).attribute if one.name == name)


def tensor(m: Any, kind: str, position: int) -> Any:
    """A constant that the first node of a kind reads."""
    return next(one for one in m.graph.initializer if one.name == node(m, kind).input[position])


def external(m: Any, size: int, location: str = "model.onnx_data", **more: str) -> None:
    one = tensor(m, "Conv", 1)
    one.ClearField("raw_data")
    one.data_location = 1
    for key, value in {"location": location, "offset": "0", "length": str(size), **more}.items():
        one.external_data.add(key=key, value=value)


def integers(one: Any, *values: int) -> None:
    one.raw_data = np.array(values, np.int64).tobytes()


# what is changed -> a part of the sentence
CHANGES: dict[str, tuple[Change, str]] = {
    "IR version": (lambda m: setattr(m, "ir_version", 99), "has IR version 99; expected 8 to 13"),
    "no IR version": (lambda m: m.ClearField("ir_version"), "has IR version None"),
    "opset": (lambda m: setattr(m.opset_import[0], "version", 7), "the operator sets ai.onnx 7; expected ai.onnx 17 to 26"),
    "two opsets": (lambda m: m.opset_import.add(domain="com.microsoft", version=1), "ai.onnx 20, com.microsoft 1"),
    "function": (lambda m: m.functions.add(name="f"), "ModelProto has field 25"),
    "training": (lambda m: m.training_info.add(), "ModelProto has field 20"),
    "metadata": (lambda m: m.graph.metadata_props.add(key="a", value="b"), "GraphProto has field 16"),
    "no graph": (lambda m: m.ClearField("graph"), "has no nodes"),
    "sparse": (lambda m: m.graph.sparse_initializer.add(), "GraphProto has field 15"),
    "operator": (lambda m: setattr(node(m, "Gemm"), "op_type", "Loop"), "has the operator Loop, which swin-deploy does not"),
    "domain": (lambda m: setattr(node(m, "Gemm"), "domain", "com.microsoft"), "has the operator com.microsoft.Gemm"),
    "overload": (lambda m: setattr(node(m, "Gemm"), "overload", "x"), "NodeProto has field 8"),
    "subgraph": (lambda m: node(m, "Gemm").attribute.add(name="body", type=5).g.SetInParent(), "AttributeProto has field 6"),
    "attribute": (lambda m: node(m, "Add").attribute.add(name="axis", i=0, type=2), "has the attribute axis"),
    "attribute type": (lambda m: setattr(attribute(m, "Softmax", "axis"), "type", 7), "has another type of attribute axis"),
    "attribute twice": (lambda m: node(m, "Softmax").attribute.append(attribute(m, "Softmax", "axis")), "attribute axis"),
    "group 0": (lambda m: setattr(attribute(m, "Conv", "group"), "i", 0), "has the attribute group 0"),
    "stride 0": (lambda m: attribute(m, "Conv", "strides").ints.__setitem__(0, 0), "has other pads or strides"),
    "axis": (lambda m: setattr(attribute(m, "Softmax", "axis"), "i", 6), "has the axis 6 of"),
    "order": (lambda m: attribute(m, "Transpose", "perm").ints.__setitem__(0, 1), "has the order"),
    "epsilon": (lambda m: setattr(attribute(m, "LayerNormalization", "epsilon"), "f", float("nan")), "attribute epsilon nan"),
    "inputs": (lambda m: node(m, "Conv").input.append("x"), "has another number of values"),
    "no input": (lambda m: node(m, "Conv").input.__setitem__(0, ""), "lacks an input"),
    "unknown input": (lambda m: node(m, "Conv").input.__setitem__(0, "\x1b[31m" + "x" * 999), "reads \\x1b[31mxxx"),
    "cycle": (lambda m: node(m, "Conv").input.__setitem__(0, m.graph.output[0].name), "which no earlier node computes"),
    "written twice": (lambda m: m.graph.node[1].output.__setitem__(0, m.graph.node[0].output[0]), "nodes compute the value"),
    "node names": (lambda m: setattr(m.graph.node[1], "name", m.graph.node[0].name), "two of its nodes have the same name"),
    "tensor names": (lambda m: m.graph.initializer.append(m.graph.initializer[0]), "has two tensors"),
    "tensor type": (lambda m: setattr(m.graph.initializer[0], "data_type", 8), "has the type 8"),
    "tensor size": (lambda m: tensor(m, "Conv", 1).dims.__setitem__(0, 65), "has 12288 bytes"),
    "no data": (lambda m: tensor(m, "Conv", 1).ClearField("raw_data"), "has no data, or two"),
    "negative size": (lambda m: tensor(m, "Conv", 1).dims.__setitem__(0, -1), "has the shape [-1"),
    "axes": (lambda m: tensor(m, "Conv", 1).dims.extend([1] * 9), "has the shape"),
    "segment": (lambda m: m.graph.initializer[0].segment.SetInParent(), "TensorProto has field 3"),
    "unlisted file": (lambda m: external(m, 12288, "/etc/passwd"), "in /etc/passwd, which the manifest does not list"),
    "beyond the file": (lambda m: external(m, 12288 * 2), "goes beyond the end of model.onnx_data"),
    "negative offset": (lambda m: external(m, 12288, offset="-1"), "has an invalid offset or length"),
    "checksum": (lambda m: external(m, 12288, checksum="x"), "does not state location, offset and length"),
    "size of external data": (lambda m: external(m, 12284), "has 12284 bytes"),
    "reads beyond": (lambda m: integers(tensor(m, "Gather", 1), *[1 << 40] * 64), "reads beyond the 64 elements of an axis"),
    "reshape": (lambda m: integers(tensor(m, "Reshape", 1), *[7] * tensor(m, "Reshape", 1).dims[0]), "reshapes"),
    "memory": (lambda m: integers(tensor(m, "Reshape", 1), *[-1] * tensor(m, "Reshape", 1).dims[0]), "reshapes to [-1, -1"),
    "weights": (lambda m: node(m, "Gemm").input.__setitem__(1, node(m, "Conv").input[1]), "(Gemm) "),
    "type": (lambda m: setattr(m.graph.input[0].type.tensor_type, "elem_type", 10), "its inputs are pixel_values: float16"),
    "input shape": (lambda m: setattr(m.graph.input[0].type.tensor_type.shape.dim[2], "dim_value", 64), "the manifest has"),
    "output": (lambda m: setattr(m.graph.output[0], "name", m.graph.node[0].output[0]), "its outputs are"),
    "no output": (lambda m: m.graph.ClearField("output"), "its outputs are none"),
    "sequence": (lambda m: m.graph.input[0].type.sequence_type.SetInParent(), "TypeProto has field 4"),
    "value": (lambda m: m.graph.value_info.add(name="x").type.tensor_type.__setattr__("elem_type", 1), "computes its value x"),
    "value type": (
        lambda m: m.graph.value_info.add(name=m.graph.node[0].output[0]).type.tensor_type.__setattr__("elem_type", 9),
        "is declared as bool",
    ),
}  # fmt: skip
BYTES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda data: b"", "has IR version None"),
    "cut": (lambda data: data[:-7], "its end"),
    "text": (lambda data: b"<html>" * 99, "wire type"),
    "long number": (lambda data: b"\x08" + b"\xff" * 20, "a number of more than 64 bits"),
    "cut number": (lambda data: b"\x08\xff", "damaged"),
    "no text": (lambda data: b"\x12\x02\xff\xfe", "damaged"),
    "two graphs": (lambda data: data + data, "has two"),
    "group": (lambda data: b"\x3b" + data, "wire type 3"),
}


def test_each_change_of_a_graph_has_its_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No native code reads these files: the structure is checked in Python, and without onnx."""
    bundle = Bundle.open(exported_bundle("--weights", str(one_block())))
    entry, data = bundle.graphs["onnx/model.onnx"], (bundle.path / "onnx/model.onnx").read_bytes()
    file, weights = tmp_path / "m.onnx", ExternalData("model.onnx_data", tmp_path / "weights")
    weights.path.write_bytes(bytes(12288))

    def sentence(content: bytes) -> str:
        file.write_bytes(content)
        with pytest.raises(BundleError) as caught:
            check_structure(file, entry.inputs, entry.outputs, weights)
        return str(caught.value)

    for what, (change, part) in CHANGES.items():
        model = onnx.load_from_string(data)
        change(model)
        said = sentence(model.SerializeToString())
        assert part in said, f"{what}: {said}"
        assert said.startswith(f"{file} is not a graph as swin-deploy writes it: "), what
        assert len(said) < 600
        assert said.isprintable()
    for what, (spoil, part) in BYTES.items():
        assert part in (said := sentence(spoil(data))), f"{what}: {said}"
    model = onnx.load_from_string(data)
    external(model, 12288)
    file.write_bytes(model.SerializeToString())
    check_structure(file, entry.inputs, entry.outputs, weights)
    monkeypatch.setattr(swin_deploy.graph_check, "MOST", 50)
    assert "it has more than 50 fields" in sentence(data)
    monkeypatch.undo()
    file.write_bytes(model.SerializeToString())
    with pytest.raises(BundleError, match="which the manifest does not list for it"):
        check_structure(file, entry.inputs, entry.outputs)


def test_the_operators_are_those_that_are_written() -> None:
    """conftest.py checks every graph that the tests write, so none is missing; and the back end torch runs each of them."""
    from swin_deploy.exporters import onnx_from_torch as exporter
    from swin_deploy.runtimes import torch_operators

    later = {"DequantizeLinear", "QuantizeLinear", "ReduceMax", "ReduceL2"}  # written by quantization, and by earlier releases
    later |= {"GatherElements", "TopK"}  # of answers
    assert set(OPERATORS) == exporter.OPERATORS | exporter.OF_OPENVINO | exporter.OF_POOLS | later
    assert set(OPERATORS) == set(torch_operators.OPERATORS) - {"Identity"}


def changed(path: Path, change: Change) -> None:
    """Change the fp32 graph of a bundle as a stranger would: its digests are right."""
    file, manifest = path / "onnx/model.onnx", json.loads((path / "manifest.json").read_text())
    model = onnx.load(file)
    change(model)
    file.write_bytes(model.SerializeToString())
    manifest["files"]["onnx/model.onnx"]["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
    del manifest["sha256"]
    (path / "manifest.json").write_text(swin_deploy.bundle._manifest_text(manifest))


def test_no_verb_hands_a_changed_graph_to_a_library(stranger: Path, tmp_path: Path) -> None:
    changed(stranger, CHANGES["reads beyond"][0])
    options = {"predict": [THREE], "quantize": ["--data", THREE.parent]}
    for verb in ("verify", "inspect", "predict", "bench", "build-engine", "quantize"):
        done = cli_here(verb, "b", *options.get(verb, ()), cwd=tmp_path)
        assert (done.returncode, done.stdout) == (2, ""), verb
        assert "onnx/model.onnx is not a graph as swin-deploy writes it: " in done.stderr.splitlines()[-1], verb


def test_a_graph_from_elsewhere_is_checked_once(stranger: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[Path] = []
    monkeypatch.setattr(swin_deploy.graph_check, "check_structure", lambda path, *rest: checked.append(path))
    for _ in range(2):
        swin_deploy.bundle._RECORDED.clear()  # as in another process
        assert Bundle.open(stranger).foreign("onnx/model.onnx")
        with swin_deploy.load(stranger, backend="onnxruntime") as model:
            assert model.run({"pixel_values": np.zeros((1, 3, 32, 32), np.float32)})
    assert checked == [stranger / "onnx/model.onnx"]
    folder = cache_folder("known")
    assert folder is not None
    assert (folder.stat().st_mode & 0o777, (folder / "checked").stat().st_mode & 0o777) == (0o700, 0o600)


def test_a_record_that_others_can_write_is_not_believed(stranger: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key, folder = "a" * 64 + " -\n", cache_folder("known")
    record("made", key)
    assert folder is not None
    swin_deploy.bundle._RECORDED.clear()
    assert recorded("made", key)
    assert not recorded("checked", key)
    (folder / "made").chmod(0o622)
    assert not recorded("made", key)
    (folder / "made").rename(folder / "moved").chmod(0o600)
    (folder / "made").symlink_to(folder / "moved")
    assert not recorded("made", key)
    monkeypatch.setattr(swin_deploy.bundle, "RECORD_BYTES", 600)
    keys = [f"{number:064x} -\n" for number in range(30)]
    for one in keys:
        record("checked", one)
    swin_deploy.bundle._RECORDED.clear()
    assert (folder / "checked").stat().st_size < 700
    assert [recorded("checked", one) for one in keys[::29]] == [False, True]
    monkeypatch.setenv("HOME", "")
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/none")
    record("made", key)
    assert recorded("made", key)  # in this process


LOGS = """
import logging
from swin_deploy.bench.worker import answers, forward_log
with answers() as answer:
    forward_log(answer, {"swin_deploy.tensorrt": 10})
    for name in ("swin_deploy", "swin_deploy.tensorrt"):
        logging.getLogger(name).debug("of %s", name)
    answer(done=True)
"""


def test_the_log_of_another_process(caplog: pytest.LogCaptureFixture) -> None:
    with Process(f"exec({LOGS!r})") as process, caplog.at_level(logging.DEBUG):
        assert process.ask({}) == {"done": True}
    assert caplog.record_tuples == [("swin_deploy.tensorrt", logging.DEBUG, "of swin_deploy.tensorrt")]


def test_verify_runs_a_bundle_from_elsewhere_in_another_process(
    stranger: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Process] = []
    begin = Process.__init__
    monkeypatch.setattr(Process, "__init__", lambda self, start: started.append(self) or begin(self, start))
    [apart] = swin_deploy.verify(stranger)
    assert len(started) == 1
    [here] = swin_deploy.verify(stranger, trust=True)
    assert len(started) == 1
    assert (apart.file, apart.backend, apart.verified) == (here.file, here.backend, True)
    with Process("import sys; sys.exit('out of luck')") as process, pytest.raises(BackendError, match="out of luck"):
        process.ask({})
    monkeypatch.setattr(Process, "__init__", lambda self, start: begin(self, "import os; os.kill(os.getpid(), 11)"))
    refused(cli_here("verify", "b", cwd=tmp_path), "The process that ran b/onnx/model.onnx died with SIGSEGV", code=2)


def test_onnx_checks_a_graph_whose_weights_are_a_link(stranger: Path) -> None:
    """The cache of Hugging Face contains links, and onnx refuses them."""
    file, data = stranger / "onnx/model.onnx", stranger / "onnx/model.onnx_data"
    onnx.save(onnx.load(file), file, save_as_external_data=True, location=data.name, size_threshold=0)
    data.rename(stranger.parent / "blob")
    data.symlink_to(stranger.parent / "blob")
    _check_with_onnx(file)
    model = onnx.load(file, load_external_data=False)
    node(model, "Conv").attribute.add(name="pads", type=7, ints=[-1])
    file.write_bytes(model.SerializeToString())
    with pytest.raises(BundleError, match="is not a valid ONNX graph"):
        _check_with_onnx(file)


def test_engines_from_elsewhere(stranger: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    with simulated(monkeypatch, "sm_89"):
        [file] = with_engines(stranger, "tensorrt-rtx", options={"version_compatible": True})
        bundle = Bundle.open(stranger).with_file(
            layers_file(file), {"parent": Bundle.open(stranger).files[file]["sha256"]}, b""
        )
        bundle = bundle.with_entry(file, {"fingerprint": "x"})
        named: dict[str, Any] = {"backend": "tensorrt-rtx", "precision": "fp32"}
        with swin_deploy.load(stranger, **named) as model:  # compiled on this machine
            assert model.describe().backend == "tensorrt-rtx"
        assert _has(bundle, file, "x")
        shutil.rmtree(Path(str(cache_folder("known"))))
        swin_deploy.bundle._RECORDED.clear()
        assert not _has(bundle, file, "x")  # build-engine compiles it again
        why = (
            f"There is no record that you compiled {file} on this machine, and an engine is code. If you trust its author, pass"
        )
        for call in (swin_deploy.load, swin_deploy.verify):
            options = named if call is swin_deploy.load else {"backend": "tensorrt-rtx", "device": "cuda"}
            with pytest.raises(UntrustedEngineError, match=why):
                call(stranger, **options)
        row = run_engine(Bundle.open(stranger), file, Bundle.open(stranger).files[file], (InstalledGpu("", "sm_89", None),))
        assert (row.works, row.message[: len(why)]) == (False, why)
        with caplog.at_level(logging.WARNING), swin_deploy.load(stranger, precision="fp32") as model:
            assert model.describe().backend != "tensorrt-rtx"
        assert f"Not used: {why}" in caplog.text
        for rebuild in (False, True):  # an engine that is trusted is not compiled again
            with swin_deploy.load(stranger, **named, trust=True, rebuild=rebuild) as model:
                assert model.describe().backend == "tensorrt-rtx"
        assert Bundle.open(stranger).foreign(file)
        [verdict] = swin_deploy.verify(stranger, backend="tensorrt-rtx", device="cuda", trust=True)
        assert verdict.verified
        with_engines(stranger, "tensorrt", options={"strip_weights": True})
        swin_deploy.bundle._RECORDED.clear()
        shutil.rmtree(Path(str(cache_folder("known"))))
        with pytest.raises(UntrustedEngineError, match="an engine is code"):
            swin_deploy.refit(stranger)
