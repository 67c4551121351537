"""The torch network against transformers, on the same weights and images; every parameter is random.

A model of transformers is made anew for every image size, because its Swin V1 keeps the window of the last size it saw.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch as safetensors
import torch
import transformers
from models.random_weights import randomize

import swin_deploy
from swin_deploy.errors import CheckpointError
from swin_deploy.exporters.typed_graphs import with_typed_graphs
from swin_deploy.models.checkpoints import checkpoint_from_hub, checkpoint_from_path
from swin_deploy.models.swin import SwinNetwork
from swin_deploy.parity import compare
from swin_deploy.runtimes.backends import runtime_from_onnx
from swin_deploy.tasks import TaskSpec
from swin_deploy.variants import find_variant

TASK = TaskSpec()
BATCHES = (1, 2, 5)
FAMILIES = {1: (transformers.SwinConfig, transformers.SwinForImageClassification),
            2: (transformers.Swinv2Config, transformers.Swinv2ForImageClassification)}  # fmt: skip
TINY = {"image_size": 32, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "num_labels": 7}
THREE = {"embed_dim": 16, "depths": [2, 2, 2], "num_heads": [1, 2, 4], "window_size": 4, "num_labels": 5}

# What is special about it -> (the config's fields, the image's height and width where they are not the config's).
Case = tuple[dict[str, Any], tuple[int, int] | None]
BOTH: dict[str, Case] = {
    "plain": ({**THREE, "image_size": 64}, None),
    "one stage": ({"image_size": 32, "embed_dim": 32, "depths": [3], "num_heads": [4], "window_size": 4}, None),
    "heads of two widths": ({**TINY, "embed_dim": 24, "num_heads": [3, 2]}, None),
    "no bias in the attention": ({**TINY, "qkv_bias": False}, None),
    "gelu_new": ({**TINY, "hidden_act": "gelu_new"}, None),
    "gelu_pytorch_tanh": ({**TINY, "hidden_act": "gelu_pytorch_tanh"}, None),
    "quick_gelu": ({**TINY, "hidden_act": "quick_gelu"}, None),
    "relu": ({**TINY, "hidden_act": "relu"}, None),
    "silu": ({**TINY, "hidden_act": "silu"}, None),
    "swish": ({**TINY, "hidden_act": "swish"}, None),
    "a wide MLP": ({**TINY, "mlp_ratio": 3.3}, None),
    "a large epsilon": ({**TINY, "layer_norm_eps": 0.05}, None),
    "one label": ({**TINY, "num_labels": 1}, None),
    "no labels": ({**TINY, "num_labels": 0}, None),
    "one channel": ({**TINY, "num_channels": 1}, None),
    "a patch with two sides": ({**TINY, "patch_size": [4, 2], "image_size": [32, 16]}, None),
    "padded windows": ({**THREE, "image_size": 56}, None),
    "odd maps at merging": ({**THREE, "image_size": 60}, None),
    "an odd window": ({**THREE, "image_size": 56, "window_size": 3}, None),
    "a wide image": ({**TINY, "image_size": [48, 80]}, None),
    "a tall image, padded and odd": ({**TINY, "image_size": [92, 44]}, None),
    "no whole patches": ({**TINY, "image_size": [50, 61]}, None),
    "one window in the last stage": ({**TINY, "image_size": 64, "window_size": 8}, None),
    "larger than the config's image": ({**TINY}, (64, 52)),
}  # fmt: skip
V1: dict[str, Case] = {
    "one window in a wide last stage": ({**TINY, "image_size": [32, 64]}, None),
    "smaller than the config's image": ({**TINY, "image_size": 96}, (40, 32)),
    "position embeddings": ({**TINY, "use_absolute_embeddings": True}, None),
    "position embeddings, padded windows": ({**TINY, "image_size": 40, "use_absolute_embeddings": True}, None),
}
V2: dict[str, Case] = {
    "pretrained windows": ({**TINY, "pretrained_window_sizes": [6, 3]}, None),
    "pretrained windows in one stage": ({**TINY, "pretrained_window_sizes": [0, 2]}, None),
    "windows cut to the image": ({**THREE, "image_size": 32, "window_size": 7}, None),
    "windows cut to the image's height": ({**TINY, "image_size": [24, 64], "window_size": 7}, None),
    "windows cut to one token": ({**TINY, "image_size": 8}, None),
    "smaller than one window": ({**THREE, "image_size": 64}, (28, 20)),
    "windows cut to the config's image, run larger": ({**TINY, "image_size": 24, "window_size": 8}, (72, 56)),
}
CASES = [
    pytest.param(version, fields, size, id=f"V{version} {name}")
    for version, own in ((1, V1), (2, V2))
    for name, (fields, size) in {**BOTH, **own}.items()
]


def reference_model(version: int, fields: dict[str, Any], seed: int = 0) -> Any:
    """A model of transformers with random weights."""
    fields = dict(fields)
    if version == 2:
        fields.setdefault("pretrained_window_sizes", [0] * len(fields["depths"]))
    make_config, make_model = FAMILIES[version]
    return randomize(make_model(make_config(**fields)).eval(), seed)


def images(model: Any, batch: int, size: tuple[int, int] | None = None) -> Any:
    configured = model.config.image_size
    height, width = size or (configured if isinstance(configured, list | tuple) else (configured, configured))
    generator = torch.Generator().manual_seed(batch)
    return torch.randn(batch, model.config.num_channels, height, width, generator=generator)


def assert_equal_logits(model: Any, folder: Path, size: tuple[int, int] | None = None) -> None:
    """Assert that the network of the checkpoint in `folder` computes the same as `model`."""
    checkpoint = checkpoint_from_path(folder, TASK)
    network = SwinNetwork(checkpoint.config, tuple(images(model, 1, size).shape[2:]), checkpoint.tensors)
    for batch in BATCHES:
        pixels = images(model, batch, size)
        with torch.no_grad():
            expected, found = model(pixels).logits.numpy(), network.eval().named(pixels)["logits"].numpy()
        agreement = compare(found, expected)
        assert agreement.within(1e-5), agreement


@pytest.mark.parametrize(("version", "fields", "size"), CASES)
def test_network(version: int, fields: dict[str, Any], size: tuple[int, int] | None, tmp_path: Path) -> None:
    model = reference_model(version, fields)
    model.save_pretrained(tmp_path)
    assert_equal_logits(model, tmp_path, size)


def test_what_transformers_cannot_run_is_padded_up_to_a_window(tmp_path: Path) -> None:
    """Swin V1 below its window, where the table does not fit the reduced window."""
    model = reference_model(1, TINY)
    model.save_pretrained(tmp_path)
    pixels = images(model, 1, (12, 32))
    with pytest.raises(RuntimeError, match="must match"):
        model(pixels)
    # Kept from making its window smaller, transformers pads the map up to one; the shift is dropped by our rule.
    model = reference_model(1, TINY)
    for layer in model.swin.encoder.layers:
        for block in layer.blocks:
            block.set_shift_and_window_size = lambda size: None
    model.swin.encoder.layers[0].blocks[1].shift_size = model.swin.encoder.layers[1].blocks[1].shift_size = 0
    assert_equal_logits(model, tmp_path, (12, 32))


def test_position_embeddings_at_another_size_are_interpolated(tmp_path: Path) -> None:
    model = reference_model(1, {**TINY, "use_absolute_embeddings": True})
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="must match"):
        model(images(model, 1, (48, 48)))
    # transformers can do it when it is asked, but takes the first row for a class token: the table is resized here.
    table = model.swin.embeddings.position_embeddings
    square = table.detach().reshape(1, 8, 8, -1).permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(square, size=(12, 12), mode="bicubic", align_corners=False)
    model.swin.embeddings.position_embeddings = torch.nn.Parameter(resized.permute(0, 2, 3, 1).reshape(1, 144, -1))
    assert_equal_logits(model, tmp_path, (48, 48))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("version", [1, 2])
def test_stored_types(version: int, dtype: Any, tmp_path: Path) -> None:
    reference_model(version, TINY).to(dtype).save_pretrained(tmp_path)
    assert {tensor.dtype for tensor in safetensors.load_file(tmp_path / "model.safetensors").values()} == {dtype}
    # Loaded anew: .to(dtype) also rounded the table of coordinates, which is no parameter and not stored.
    _, make_model = FAMILIES[version]
    assert_equal_logits(make_model.from_pretrained(tmp_path, dtype=torch.float32).eval(), tmp_path)


@pytest.mark.parametrize("version", [1, 2])
def test_buffers_of_older_files_are_ignored(version: int, tmp_path: Path) -> None:
    """transformers 4 also stored buffers that follow from the config."""
    model = reference_model(version, TINY)
    model.save_pretrained(tmp_path)
    prefix = f"{model.config.model_type}.encoder.layers.0.blocks.1"

    def add(tensors: dict[str, Any]) -> None:
        tensors[f"{prefix}.attention.self.relative_position_index"] = torch.zeros(16, 16, dtype=torch.int64)
        tensors[f"{prefix}.attention.self.relative_coords_table"] = torch.zeros(1, 7, 7, 2)
        tensors[f"{prefix}.attn_mask"] = torch.zeros(4, 16, 16)
        tensors[f"{model.config.model_type}.embeddings.mask_token"] = torch.zeros(1, 1, 16)

    edit_tensors(tmp_path, add)
    assert_equal_logits(model, tmp_path)


# The whole chain, with the networks that are published: save_pretrained -> bundle -> ONNX Runtime.


@pytest.mark.slow  # tests/cli/test_pipeline.py exports both sizes; the tests above compare small networks with transformers
@pytest.mark.parametrize(("version", "name"), [(1, "swin-tiny"), (2, "swinv2-tiny")])
def test_published_size_through_the_whole_chain(version: int, name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="ONNX Runtime runs the exported graphs")
    """With as many blocks as each kind of block needs: the others only repeat them."""
    fields = {**find_variant(name).config().to_dict(), "depths": [1, 1, 2, 1]}
    model = reference_model(
        version, {key: value for key, value in fields.items() if key not in ("model_type", "architectures")}
    )
    model.save_pretrained(tmp_path / "checkpoint")
    batches = {batch: images(model, batch) for batch in (1, 2)}  # more of them in tests/exporters
    with torch.no_grad():
        expected = {batch: model(pixels).logits.numpy() for batch, pixels in batches.items()}
    bundle = swin_deploy.export(weights=tmp_path / "checkpoint", output=tmp_path / "bundle")
    with_typed_graphs(bundle, "fp16", runtime_from_onnx)
    for precision, allowed in (("fp32", 1e-5), ("fp16", 5e-3)):
        with swin_deploy.load(bundle.path, backend="onnxruntime", precision=precision, threads=1) as loaded:
            for batch, pixels in batches.items():
                agreement = compare(loaded.run({"pixel_values": pixels.numpy()})["logits"], expected[batch])
                assert agreement.within(allowed), (precision, batch, agreement)
                assert agreement.top1 == 1.0


# Checkpoints that cannot be used, each with the sentence that says why.


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pristine")
    reference_model(1, TINY).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    """An intact checkpoint, to be damaged."""
    return Path(shutil.copytree(pristine, tmp_path / "checkpoint"))


def edit_tensors(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    tensors = safetensors.load_file(folder / "model.safetensors")
    change(tensors)
    safetensors.save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refusal(folder: Path) -> str:
    """Return the error message for a checkpoint, raised at the latest when its tensors are read."""
    with pytest.raises(CheckpointError) as caught:
        dict(checkpoint_from_path(folder, TASK).tensors)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message


def test_intact_checkpoint_is_read_whole(folder: Path) -> None:
    checkpoint = checkpoint_from_path(folder, TASK)
    assert len(dict(checkpoint.tensors)) == len(checkpoint.tensors) > 40
    assert checkpoint.source == str(folder)
    assert checkpoint.raw_config == json.loads((folder / "config.json").read_text())
    assert checkpoint.preprocessor is None
    with pytest.raises(KeyError):
        checkpoint.tensors["no.such.tensor"]


def test_wrong_shape(folder: Path) -> None:
    edit_config(folder, mlp_ratio=3.0)
    assert "intermediate.dense.weight has shape [64, 16], but the config asks for [48, 16] (" in (message := refusal(folder))
    assert "more differ)" in message


def test_weights_of_the_other_version(folder: Path) -> None:
    edit_config(folder, model_type="swinv2", pretrained_window_sizes=[0, 0])
    assert "attention.self.logit_scale" in refusal(folder)


@pytest.mark.parametrize("content", [b"{", b"", b"\xff\xfe\x00", b"[1, 2]"])
def test_config_that_is_no_json_object(folder: Path, content: bytes) -> None:
    (folder / "config.json").write_bytes(content)
    assert "config.json " in (message := refusal(folder))
    assert "cannot be read as JSON" in message or "does not hold a JSON object" in message


# The cache of the hub, laid out as huggingface_hub lays it out; nothing here may reach for the network.


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    hub = pytest.importorskip("huggingface_hub", reason="checkpoints come from the hub through it")
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


def put_into_cache(cache: Path, repository: str) -> Path:
    entry = cache / f"models--{repository.replace('/', '--')}"
    revision = "0123456789abcdef0123456789abcdef01234567"
    (entry / "refs").mkdir(parents=True)
    (entry / "refs" / "main").write_text(revision)
    (entry / "blobs").mkdir()
    snapshot = entry / "snapshots" / revision
    snapshot.mkdir(parents=True)
    return snapshot


def test_hub_cache_without_a_network(cache: Path, pristine: Path) -> None:
    snapshot = put_into_cache(cache, "someone/tiny")
    shutil.copytree(pristine, snapshot, dirs_exist_ok=True)
    (snapshot / "preprocessor_config.json").write_text('{"do_resize": false}')
    checkpoint = checkpoint_from_hub("someone/tiny", TASK)
    assert checkpoint.source == "someone/tiny"
    assert checkpoint.preprocessor == {"do_resize": False}
    assert len(dict(checkpoint.tensors)) > 40


@pytest.mark.parametrize("cached", ["nothing", "the config alone"])
def test_hub_without_cache_and_network(cache: Path, pristine: Path, cached: str) -> None:
    if cached != "nothing":
        shutil.copy(pristine / "config.json", put_into_cache(cache, "someone/tiny"))
    with pytest.raises(CheckpointError) as caught:
        checkpoint_from_hub("someone/tiny", TASK)
    message = str(caught.value)
    assert "\n" not in message
    assert "someone/tiny" in message
    assert "--weights FOLDER" in message
    assert "--random-weights" in message


def test_variant_given_weights_of_another_architecture(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"not a swin-tiny-patch4-window7-224: its embed_dim is 16, not 96"):
        swin_deploy.export("swin-tiny", weights=folder, output=tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_reference_has_no_parameter_at_rest() -> None:
    """A comparison would not see parameters that are 0 or 1."""
    for version in FAMILIES:
        for name, parameter in reference_model(version, TINY).named_parameters():
            values = parameter.detach().numpy()
            assert np.abs(values).min() > 0, name
            assert np.abs(values - 1).min() > 0, name
