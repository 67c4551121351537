"""Networks trained with fake quantization: their quantized graphs compute what was trained, with the trained scales."""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from cli.exported import cli_here, contents, refused, result
from qat_networks import answers, pixels, saved, trained, without_rounding

import swin_deploy
from swin_deploy.bundle import Bundle
from swin_deploy.dependencies import onnxruntime_session
from swin_deploy.exporters.quantization.qdq import linear_layers
from swin_deploy.models.checkpoints.state_dict_names import CanonicalStateDict
from swin_deploy.parity import sqnr
from swin_deploy.qat_ranges import RANGES, QatRanges, modules_of

ort = pytest.importorskip("onnxruntime", reason="ONNX Runtime runs the graphs")

INT8 = "onnx/model_int8.onnx"


@functools.cache
def scratch() -> Path:
    return Path(tempfile.mkdtemp(prefix="swin-own-"))


@functools.cache
def bundle(version: int, target: str, with_ranges: bool = True, outputs: bool = False) -> Path:
    """A bundle of the trained network, with its fake-quant modules or without them. Copy it before changing it."""
    model = trained(version, outputs=outputs)
    name = f"{version}-{target}-{with_ranges}-{outputs}"
    state = None if with_ranges else plain(model.state_dict())
    weights = saved(model, scratch() / f"{name}-checkpoint", state)
    swin_deploy.export(weights=weights, output=scratch() / name, target=target)
    return scratch() / name


def plain(state: dict[str, Any]) -> dict[str, Any]:
    """The weights alone, under the names that they had before training."""
    return {
        name.replace(".module.", "."): tensor
        for name, tensor in state.items()
        if "_post_process" not in name and "_fake_" not in name
    }


def copied(made: Path, folder: Path) -> Path:
    shutil.copytree(made, folder / "b")
    return folder / "b"


def run(path: Path, feed: Any, plainly: bool = False) -> Any:
    options = {"graph_optimization_level": ort.GraphOptimizationLevel.ORT_DISABLE_ALL} if plainly else {}
    return onnxruntime_session(path, threads=1, **options).run(None, {"pixel_values": feed.numpy()})[0]


def layer_of(model: Any, canonical: str) -> str:
    """The module's name in transformers, which differs by version."""
    [name] = [
        name
        for name, module in model.named_modules()
        if hasattr(module, "quant") and CanonicalStateDict("hf", {}, {}).layers(name) == (canonical,)
    ]
    return str(name)


def fake_quant(model: Any, canonical: str, part: str) -> Any:
    return model.state_dict()[f"{layer_of(model, canonical)}.{part}"]


def constants(path: Path) -> dict[str, Any]:
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


@pytest.mark.parametrize("version", [1, 2])
def test_the_graph_is_the_network_that_was_trained(version: int, tmp_path: Path) -> None:
    """Without a single sample, and as near to PyTorch's fake quantization as that is to itself when pixels move by 1e-4.

    Every rounding of an activation turns a difference far below its step into whole steps of some values.
    """
    model, path = trained(version), copied(bundle(version, "onnxruntime"), tmp_path)
    assert swin_deploy.quantize(path).scores == ()
    feed = pixels(32, 99)
    wanted = answers(model, feed)
    found, fp32 = sqnr(wanted, run(path / INT8, feed)), sqnr(wanted, answers(without_rounding(model), feed))
    itself = sqnr(wanted, answers(model, feed * (1 + 1e-4)))
    print(f"V{version}: {found:.1f} dB from the trained network, which is {fp32:.1f} dB from fp32, {itself:.1f} from itself")
    assert found > fp32 + 4
    assert found > itself - 3

    entry, values = Bundle.open(path).graphs[INT8], constants(path / INT8)
    weights = {layer.name: layer.weight for layer in linear_layers(onnx.load(path / "onnx/model.onnx"))}
    assert entry["calibration"]["samples"] == 0
    layers = {layer["name"]: layer for layer in entry["layers"]}
    assert "classifier" in layers
    for name, layer in layers.items():
        assert (layer["range_from"], layer["weight_from"]) == ("checkpoint", "checkpoint")
        [module] = modules_of(name)
        assert layer["zero_point"] == int(fake_quant(model, module, "quant.activation_post_process.zero_point"))
        assert layer["scale"] == float(fake_quant(model, module, "quant.activation_post_process.scale"))
        linear = model.get_submodule(f"{layer_of(model, module)}.module")
        factor = 1 / 4 if version == 1 and name.endswith(".query") else 1  # the softmax scale, of heads 16 wide
        weight = (linear.weight_fake_quant(linear.weight) * factor).detach().numpy()
        steps = linear.weight_fake_quant.scale.numpy() * factor
        codes = values[f"{weights[name]}/quantized"]
        np.testing.assert_array_equal(values[f"{weights[name]}/scale"], steps.astype(np.float32))
        np.testing.assert_allclose(codes * steps[:, None], weight, atol=1e-7)


def exported_with_qdq(model: Any, path: Path) -> Path:
    class Logits(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, pixel_values: Any) -> Any:
            return self.model(pixel_values=pixel_values).logits

    torch.onnx.export(Logits().eval(), (pixels(1, 0),), str(path), input_names=["pixel_values"], opset_version=17, dynamo=False)
    return path


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("version", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_graph_with_qdq_says_what_the_checkpoint_says(version: int, tmp_path: Path) -> None:
    """torch.onnx.export's graph of the trained network, and a bundle of its weights alone: the same INT8 graph, bit for bit."""
    graph = exported_with_qdq(trained(version), tmp_path / "qat.onnx")
    assert any(node.op_type == "QuantizeLinear" for node in onnx.load(graph).graph.node)
    path = copied(bundle(version, "onnxruntime", with_ranges=False), tmp_path)
    assert RANGES not in Bundle.open(path).files
    swin_deploy.quantize(path, ranges=graph)
    swin_deploy.quantize(own := copied(bundle(version, "onnxruntime"), tmp_path / "own"))
    assert onnx.load(path / INT8).graph == onnx.load(own / INT8).graph  # their metadata name different checkpoints
    assert Bundle.open(path).graphs[INT8]["layers"][0]["range_from"] == "qat.onnx"


@pytest.mark.filterwarnings("ignore")
def test_graphs_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    path = copied(bundle(1, "onnxruntime"), tmp_path)
    exported_with_qdq(trained(1, symmetric=True), tmp_path / "other.onnx")  # trained from the same weights to others
    shutil.copy(path / "onnx/model.onnx", tmp_path / "plain.onnx")
    (tmp_path / "text.onnx").write_text("no graph")
    before = contents(path)
    for name, part in (
        ("other.onnx", "export the bundle from the checkpoint of this graph"),
        ("plain.onnx", "no QuantizeLinear and DequantizeLinear"),
        ("text.onnx", "cannot be read as an ONNX graph"),
        ("absent.onnx", "does not exist. Pass an ONNX file"),
    ):
        refused(cli_here("quantize", "b", "--ranges", name, cwd=tmp_path), name, part)
    assert contents(path) == before


def test_what_is_missing_is_measured(tmp_path: Path) -> None:
    """One layer without an input range: named without --data, measured with it; the others keep theirs."""
    model = trained(1)
    fc1 = layer_of(model, "encoder.layers.0.blocks.0.intermediate.dense")
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(f"{fc1}.quant.")}
    state = {name.replace(f"{fc1}.module.", f"{fc1}."): tensor for name, tensor in state.items()}
    swin_deploy.export(weights=saved(model, tmp_path / "c", state), output=tmp_path / "b", target="onnxruntime")
    before = contents(tmp_path / "b")
    refused(cli_here("quantize", "b", cwd=tmp_path), "the input of stages.0.steps.block0.fc1", "1 in all", "--data")
    refused(cli_here("quantize", "b", "--max-drop", "1", cwd=tmp_path), "--max-drop", "--data")
    assert contents(tmp_path / "b") == before
    np.save(tmp_path / "images.npy", pixels(8, 3).numpy())
    printed = result(cli_here("quantize", "b", "--data", "images.npy", "--json", cwd=tmp_path))
    layers = {layer["name"]: layer for layer in Bundle.open(tmp_path / "b").graphs[INT8]["layers"]}
    measured = layers.pop("stages.0.steps.block0.fc1")
    assert (measured["range_from"], measured["weight_from"]) == ("samples", "checkpoint")
    assert {layer["range_from"] for layer in layers.values()} == {"checkpoint"}
    ranges = QatRanges.from_dict(json.loads((tmp_path / "b" / RANGES).read_text()))
    for name, layer in layers.items():
        own = ranges.layers[modules_of(name)[0]].input
        assert own is not None
        assert (layer["scale"], layer["zero_point"]) == (own.scale, own.zero_point)
    wanted = answers(model, pixels(32, 99))
    assert sqnr(wanted, run(tmp_path / "b" / INT8, pixels(32, 99))) > sqnr(
        wanted, answers(without_rounding(model), pixels(32, 99))
    )
    assert printed["graphs"][0]["samples"] == 8
    result(cli_here("quantize", "b", "--data", "images.npy", "--ignore-ranges", "--json", cwd=tmp_path))
    assert {layer["range_from"] for layer in Bundle.open(tmp_path / "b").graphs[INT8]["layers"]} == {"samples"}


@pytest.mark.parametrize("version", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_for_tensorrt(version: int, tmp_path: Path) -> None:
    """Ranges of what layers read and write are the checkpoint's; torch.ao observes outputs as well."""
    model, path = trained(version, outputs=True), copied(bundle(version, "tensorrt", outputs=True), tmp_path)
    feed = pixels(32, 99)
    swin_deploy.quantize(path, feed.numpy())
    entry = Bundle.open(path).graphs[INT8]
    ranges = QatRanges.from_dict(Bundle.open(path).read_json(RANGES))
    checked = 0
    for layer in entry["layers"]:
        modules = modules_of(layer["name"])
        wanted = [ranges.input_of(modules), ranges.output_of(modules)] if modules else []
        for tensor, own in zip(layer["ranges_from"], wanted, strict=False):
            assert own is not None
            assert layer["ranges_from"][tensor] == "checkpoint"
            assert entry["amplitudes"][tensor] == own.amplitude
            checked += 1
    assert checked >= 4
    reference = answers(model, feed)
    found, fp32 = sqnr(reference, run(path / INT8, feed, True)), sqnr(reference, answers(without_rounding(model), feed))
    print(f"V{version}: {found:.1f} dB from the trained network, which is {fp32:.1f} dB from fp32")
    assert found > fp32 - 6  # PyTorch has neither the fp16 nor the joined steps of this form
