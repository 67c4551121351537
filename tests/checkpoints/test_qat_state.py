"""QAT ranges that checkpoints bring along: each system's names, each library's entries, and what is left out or refused."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_cases import DATA, refused, state_dict
from torch.ao import quantization as ao

from swin_deploy.exporters.quantization.gptq import quantized_activation
from swin_deploy.exporters.quantization.qdq import ActivationScale
from swin_deploy.models.checkpoints.recognise import RecognisedCheckpoint, recognise_checkpoint
from swin_deploy.qat_ranges import QatRanges

TIMM, MICROSOFT = "timm__SwinTransformer__bin_only", "ms__SwinTransformer__strip_32x96"
SYSTEMS = [TIMM, MICROSOFT, "tv__SwinTransformer__pad_52x68", "tv__SwinTransformerV2__pad_52x68", "ms__SimMIM__v1"]
LINEAR = re.compile(r"(.*(?:qkv|query|key|value|proj|fc1|fc2|mlp\.0|mlp\.3|dense|reduction|head|decoder\.0))\.weight")
NAMES = {"pytorch-quantization": "_{}_quantizer._amax", "modelopt": "{}_quantizer._amax"}


def written(folder: Path, case: str, state: dict[str, Any], **extras: Any) -> Path:
    """Write a checkpoint of `case` with another state dict."""
    folder.mkdir()
    if (DATA / case / "config.json").exists():
        shutil.copy(DATA / case / "config.json", folder)
    torch.save({"model": state, **extras} if extras else state, folder / "pytorch_model.bin")
    return folder


def linear(state: dict[str, Any]) -> list[str]:
    """The linear layers that are quantized: all but V2's position bias MLP."""
    matches = [LINEAR.fullmatch(name) for name, tensor in state.items() if tensor.ndim == 2 or name == "decoder.0.weight"]
    return [match[1] for match in matches if match and "cpb_mlp" not in match[1]]


def with_amax(state: dict[str, Any], library: str) -> dict[str, Any]:
    """Add amax values like those of max calibration: per output channel for weights, distinct values for inputs."""
    found = dict(state)
    for layer in linear(state):
        weight = state[f"{layer}.weight"]
        found[f"{layer}.{NAMES[library].format('weight')}"] = weight.abs().amax(dim=tuple(range(1, weight.ndim)), keepdim=True)
        found[f"{layer}.{NAMES[library].format('input')}"] = weight.abs().mean()
    return found


@pytest.mark.parametrize("library", NAMES)
@pytest.mark.parametrize("case", SYSTEMS)
def test_every_layer_gets_its_own(case: str, library: str, tmp_path: Path) -> None:
    """Under every framework's names, the scales of a layer are those of its own weights."""
    source = recognise_checkpoint(written(tmp_path / "c", case, with_amax(state_dict(case), library)))
    assert source.ranges is not None
    fused = 3 * sum(source.config.depths)
    assert len(source.ranges.layers) == len(linear(state_dict(case))) + fused * 2 // 3
    for name, layer in source.ranges.layers.items():
        weight = source.tensors[f"{name}.weight"]
        np.testing.assert_allclose(layer.weight, weight.flatten(1).abs().amax(1) / 127, rtol=1e-6)
        parts = [weight]
        if re.search(r"\.(query|key|value)$", name):
            stem = name.rpartition(".")[0]
            parts = [source.tensors[f"{stem}.{part}.weight"] for part in ("query", "key", "value")]
        assert layer.input is not None
        assert layer.input.amplitude == pytest.approx(float(torch.cat(parts).abs().mean()), rel=1e-6)
        assert layer.input.zero_point == 128
    assert set(source.tensors) == set(recognise_checkpoint(DATA / case).tensors)
    assert QatRanges.from_dict(json.loads(source.ranges.to_json())) == source.ranges


def quantised(module: Any) -> Any:
    """Run a fake-quant module on some data."""
    torch.manual_seed(0)
    for _ in range(3):
        module(torch.randn(64, 16) * 2 + 0.7)
    return module


def with_layer(case: str, layer: str, part: str, module: Any) -> dict[str, Any]:
    """Return the state dict of `case` with the tensors of `module` in a layer."""
    return {**state_dict(case), **{f"{layer}.{part}.{name}": tensor for name, tensor in module.state_dict().items()}}


FC1, CANONICAL = "layers.0.blocks.0.mlp.fc1", "encoder.layers.0.blocks.0.intermediate.dense"
FAKE = partial(ao.FakeQuantize, observer=ao.MovingAverageMinMaxObserver)
MODULES = {
    "uint8": partial(FAKE, dtype=torch.quint8, quant_min=0, quant_max=255),
    "int8": partial(FAKE, dtype=torch.qint8, quant_min=-128, quant_max=127),
    "int8 symmetric": partial(FAKE, dtype=torch.qint8, quant_min=-128, quant_max=127, qscheme=torch.per_tensor_symmetric),
    "uint8 symmetric": partial(FAKE, dtype=torch.quint8, quant_min=0, quant_max=255, qscheme=torch.per_tensor_symmetric),
    "fbgemm, 7 bits": lambda: ao.get_default_qat_qconfig("fbgemm").activation(),
    "qnnpack": lambda: ao.get_default_qat_qconfig("qnnpack").activation(),
}


def read(path: Path) -> RecognisedCheckpoint:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return recognise_checkpoint(path)


@pytest.mark.filterwarnings("ignore:Please use quant_min:UserWarning")  # torch.ao warns of its own default
@pytest.mark.parametrize("kind", MODULES)
def test_codes_round_as_torch_does(kind: str, tmp_path: Path) -> None:
    """The integer type is not stored in the file, and still the input of a QuantWrapper is rounded as in torch.ao."""
    module = quantised(MODULES[kind]())
    state = with_layer(MICROSOFT, FC1, "quant.activation_post_process", module)
    state = {name.replace(f"{FC1}.weight", f"{FC1}.module.weight").replace(f"{FC1}.bias", f"{FC1}.module.bias"): tensor
             for name, tensor in state.items()}  # fmt: skip
    source = read(written(tmp_path / "c", MICROSOFT, state))
    assert source.ranges is not None
    found = source.ranges.layers[CANONICAL].input
    assert found is not None
    low, high = (float(getattr(module.activation_post_process, name)) for name in ("min_val", "max_val"))
    values = np.linspace(low, high, 4001, dtype=np.float32)
    module.eval().apply(ao.disable_observer)
    wanted = module(torch.from_numpy(values)).numpy()
    ours = quantized_activation(values, ActivationScale(found.scale, found.zero_point))
    np.testing.assert_allclose(ours, wanted, atol=1e-6)
    assert found.amplitude == pytest.approx(float(np.abs(wanted).max()), rel=0.01)
    assert f"{CANONICAL}.weight" in source.tensors


def test_what_a_norm_writes_is_what_the_next_layer_reads(tmp_path: Path) -> None:
    """torch.ao observes outputs. The norm of V1 comes before fc1, so its output is the input of fc1."""
    norm, fc1 = quantised(MODULES["int8 symmetric"]()), quantised(MODULES["uint8"]())
    state = with_layer(MICROSOFT, "layers.0.blocks.0.norm2", "activation_post_process", norm)
    state |= with_layer(MICROSOFT, FC1, "activation_post_process", fc1)
    source = read(written(tmp_path / "c", MICROSOFT, state))
    assert source.ranges is not None
    layer = source.ranges.layers[CANONICAL]
    assert layer.input is not None
    assert layer.output is not None
    assert layer.input.scale == float(norm.scale)
    assert layer.output.scale == float(fc1.scale)


def weight_module(state: dict[str, Any], **options: Any) -> Any:
    defaults = {"dtype": torch.qint8, "quant_min": -128, "quant_max": 127, "qscheme": torch.per_tensor_symmetric}
    module = FAKE(**{**defaults, **options})
    module(state[f"{FC1}.weight"])
    return module


LEFT_OUT = {
    "4 bits": ("weight_fake_quant", {"quant_min": -8, "quant_max": 7}, "fewer than 6 bits"),
    "asymmetric": ("weight_fake_quant", {"qscheme": torch.per_tensor_affine}, "asymmetric"),
    "4 bits, input": ("quant.activation_post_process", {"quant_min": -8, "quant_max": 7}, "fewer than 6 bits"),
    "no layer": ("activation_post_process_3", {}, "do not identify a layer"),
}


@pytest.mark.parametrize("what", LEFT_OUT)
def test_what_cannot_be_used_is_left_out_with_a_note(what: str, tmp_path: Path) -> None:
    part, options, reason = LEFT_OUT[what]
    state = state_dict(MICROSOFT)
    module = weight_module({f"{FC1}.weight": state[f"{FC1}.weight"] + 0.1}, **options)
    source = read(written(tmp_path / "c", MICROSOFT, with_layer(MICROSOFT, FC1, part, module)))
    assert source.ranges is None
    [note] = [note for note in source.notes if "not used" in note]
    assert reason in note
    assert FC1 in note


def test_switched_off_or_never_run(tmp_path: Path) -> None:
    off = weight_module(state_dict(MICROSOFT))
    off.disable_fake_quant()
    for number, (module, reason) in enumerate(((off, "disabled"), (MODULES["int8"](), "never saw"))):
        state = with_layer(MICROSOFT, FC1, "weight_fake_quant", module)
        source = read(written(tmp_path / str(number), MICROSOFT, state))
        assert source.ranges is None
        assert reason in source.notes[-1]


def test_modelopt_tells_which_quantisers_are_off_or_of_other_bits(tmp_path: Path) -> None:
    """What modelopt.torch.opt.save writes beside the weights, as of 0.47."""
    state = with_amax(state_dict(MICROSOFT), "modelopt")
    settings = {f"{layer}.{role}_quantizer": {"_disabled": False, "_num_bits": 8, "_unsigned": False, "_block_sizes": None}
                for layer in linear(state_dict(MICROSOFT)) for role in ("input", "weight")}  # fmt: skip
    settings[f"{FC1}.weight_quantizer"]["_disabled"] = True
    settings[f"{FC1}.input_quantizer"]["_num_bits"] = 4
    settings["layers.0.blocks.0.mlp.fc2.input_quantizer"]["_unsigned"] = True
    modelopt = {
        "modelopt_state_dict": [("quantize", {"metadata": {"quantizer_state": settings}})],
        "modelopt_version": "0.47.0",
    }
    source = read(written(tmp_path / "c", MICROSOFT, state, modelopt_state=modelopt))
    assert source.ranges is not None
    assert CANONICAL not in source.ranges.layers
    assert {"it is disabled", "it has 4 bits, and only 8 are supported"} <= {n.rpartition(": ")[2] for n in source.notes}
    fc2 = source.ranges.layers["encoder.layers.0.blocks.0.output.dense"].input
    assert fc2 is not None
    assert fc2.zero_point == 0
    assert 255 * fc2.scale == pytest.approx(fc2.amplitude)


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("_amax", float("nan"), "fc1.input_quantizer._amax holds NaN"),
        ("_amax", -1.0, "a negative number. Expected a quantization range"),
        ("_pre_quant_scale", 2.0, "SmoothQuant or AWQ"),
    ],
)
def test_refusals(field: str, value: float, sentence: str, tmp_path: Path) -> None:
    state = with_amax(state_dict(MICROSOFT), "modelopt") | {f"{FC1}.input_quantizer.{field}": torch.tensor(value)}
    refused(written(tmp_path / "c", MICROSOFT, state), sentence)
