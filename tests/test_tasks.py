"""Options of an export: tasks, image sizes and frameworks; and bundles with several sizes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from cli.exported import one_block
from click.testing import CliRunner

import swin_deploy
from swin_deploy.bundle import Bundle
from swin_deploy.cli import cli
from swin_deploy.config import SwinConfig
from swin_deploy.errors import BundleError, CheckpointError, InputError, SwinDeployError, UsageError
from swin_deploy.exporters.typed_graphs import with_typed_graphs
from swin_deploy.models.checkpoints import checkpoint_from_path, random_checkpoint
from swin_deploy.models.swin import SwinNetwork
from swin_deploy.options import ExportSpec
from swin_deploy.runtimes.backends import runtime_from_onnx
from swin_deploy.tasks import MASK, PIXELS, TASKS, TaskSpec

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

FIELDS: dict[str, Any] = {"image_size": 32, "embed_dim": 16, "depths": [1, 2], "num_heads": [1, 2], "window_size": 4,
                          "num_labels": 3, "encoder_stride": 8}  # fmt: skip
SIZES = [(32, 32), (50, 66), (32, 64)]
CLASSIFIER, MASKED = "image-classification", "masked-image-modeling"


def config(version: int = 1, **changes: Any) -> SwinConfig:
    kind = "swin" if version == 1 else "swinv2"
    return SwinConfig.from_dict({"model_type": kind, **FIELDS, **changes})


def network(task: TaskSpec, size: tuple[int, int] = (32, 32), version: int = 1) -> SwinNetwork:
    checkpoint = random_checkpoint(config(version), task, 0)
    return SwinNetwork(checkpoint.config, size, checkpoint.tensors, task).eval()


def pixels(*shape: int) -> Any:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier saved by transformers."""
    folder = tmp_path_factory.mktemp("classifier")
    torch.manual_seed(0)
    transformers.SwinForImageClassification(transformers.SwinConfig(**FIELDS)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def several(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with fp32 and fp16 graphs of three image sizes. Copy it before changing it."""
    path = tmp_path_factory.mktemp("bundles") / "several"
    bundle = swin_deploy.export(weights=checkpoint, image_sizes=SIZES, output=path)
    with_typed_graphs(bundle, "fp16", runtime_from_onnx)
    return path


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (
            lambda: TaskSpec("segmentation"),
            'Unknown task "segmentation". Choose one of: image-classification, feature-extraction',
        ),
        (
            lambda: TaskSpec(CLASSIFIER, out_features=("stem",)),
            "image-classification has no output features.* choose the task backbone",
        ),
        (lambda: TaskSpec(MASKED, use_mask_token=True), "masked-image-modeling has no options for the mask token"),
        (lambda: TaskSpec("backbone", add_pooling_layer=False), "backbone has no options .* and the pooling layer"),
        (lambda: TaskSpec("backbone", out_features=("stage3",)).features(config()), "Choose one of: stem, stage1, stage2"),
        (lambda: TaskSpec("backbone", out_features=("3",)).features(config()), "Choose one of: stem, stage1, stage2"),
    ],
)
def test_what_no_task_is(make: Callable[[], Any], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        make()


@pytest.mark.parametrize(
    ("task", "names"),
    [
        (TaskSpec(), ["logits"]),
        (TaskSpec(MASKED), ["reconstruction"]),
        (TaskSpec("feature-extraction"), ["last_hidden_state", "pooler_output"]),
        (TaskSpec("feature-extraction", add_pooling_layer=False), ["last_hidden_state"]),
        (TaskSpec("backbone"), ["feature_maps.0"]),
        (TaskSpec("backbone", out_features=("stage2", "stem")), ["feature_maps.0", "feature_maps.1"]),
        (TaskSpec("backbone", output_hidden_states=True), ["feature_maps.0"] + [f"hidden_states.{i}" for i in range(3)]),
        (TaskSpec(output_attentions=True), ["logits", "attentions.0", "attentions.1"]),
        (
            TaskSpec(output_hidden_states=True),
            ["logits"] + [f"{kind}.{i}" for kind in ("hidden_states", "reshaped_hidden_states") for i in range(3)],
        ),
    ],
)
def test_names_of_the_outputs(task: TaskSpec, names: list[str]) -> None:
    assert list(task.output_names(config())) == names
    assert TaskSpec.from_dict(task.to_dict()) == task
    given = [pixels(2, 3, 32, 32)] + [torch.zeros(2, 64, dtype=torch.bool)] * task.masked
    assert list(network(task).named(*given)) == names
    assert [spec.name for spec in task.inputs(config(), (32, 32))] == [PIXELS] + [MASK] * task.masked


@pytest.mark.parametrize("text", ["", "0", "0x32", "-32", "32x", "x32", "32*32", "32x32x3", "32.5", "abc", "1000000x1"])
def test_invalid_image_sizes(text: str) -> None:
    with pytest.raises(UsageError, match=r"Invalid image size .* Expected HEIGHTxWIDTH"):
        ExportSpec(image_sizes=[text])
    assert ExportSpec(image_sizes=["256x320", "256X320", " 32 "]).image_sizes == ((256, 320), (256, 320), (32, 32))


def test_features_that_the_config_names(checkpoint: Path, tmp_path: Path) -> None:
    known = {"out_features": ["stem", "stage2"]}, {"out_indices": [0, 2]}
    for fields in known:
        assert TaskSpec("backbone").features(config(**fields)) == ("stem", "stage2")
    assert TaskSpec("backbone", out_features=("stage1",)).features(config(**known[0])) == ("stage1",)
    assert TaskSpec("backbone").features(config()) == ("stage2",)
    assert TaskSpec("backbone", out_features=("-1", "0")).features(config()) == ("stem", "stage2")
    model = transformers.SwinBackbone(transformers.SwinConfig(**FIELDS, out_indices=[0, 1])).eval()
    model.save_pretrained(tmp_path)
    read = checkpoint_from_path(tmp_path, TaskSpec("backbone"))
    found = SwinNetwork(read.config, (32, 32), read.tensors, TaskSpec("backbone"))(pixels(1, 3, 32, 32))
    with torch.no_grad():
        wanted = model(pixels(1, 3, 32, 32)).feature_maps
    assert len(found) == len(wanted) == 2
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(found, wanted, strict=True))


def test_the_mask_token(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = transformers.SwinForMaskedImageModeling(transformers.SwinConfig(**FIELDS)).eval()
    with torch.no_grad():
        model.swin.embeddings.mask_token.normal_()
    model.save_pretrained(tmp_path)
    mask = torch.rand(2, 64, generator=torch.Generator().manual_seed(1)) < 0.5
    with torch.no_grad():
        wanted = model(pixels(2, 3, 32, 32), bool_masked_pos=mask)
    read = checkpoint_from_path(tmp_path, TaskSpec(MASKED))
    ours = SwinNetwork(read.config, (32, 32), read.tensors, TaskSpec(MASKED))
    (found,) = ours(pixels(2, 3, 32, 32), mask)
    assert torch.allclose(found, wanted.reconstruction, atol=1e-5)
    (unmasked,) = ours(pixels(2, 3, 32, 32), torch.zeros_like(mask))
    assert not torch.allclose(found, unmasked, atol=1e-2)
    # The same token for a feature extractor that is asked to have it; without, the same weights take no mask.
    features = TaskSpec("feature-extraction", use_mask_token=True)
    read = checkpoint_from_path(tmp_path, features)
    hidden, _ = SwinNetwork(read.config, (32, 32), read.tensors, features)(pixels(2, 3, 32, 32), mask)
    with torch.no_grad():
        assert torch.allclose(hidden, model.swin(pixels(2, 3, 32, 32), bool_masked_pos=mask).last_hidden_state, atol=1e-5)


def test_masked_image_modelling_of_images_that_are_not_square() -> None:
    """transformers assumes square maps and fails. Ours keeps height and width of the image."""
    mask = torch.zeros(2, 128, dtype=torch.bool)
    mask[:, :10] = True
    ours = network(TaskSpec(MASKED), (32, 64))
    (found,) = ours(pixels(2, 3, 32, 64), mask)
    assert tuple(found.shape) == (2, 3, 32, 64)
    with pytest.raises(RuntimeError):
        transformers.SwinForMaskedImageModeling(transformers.SwinConfig(**FIELDS)).eval()(pixels(2, 3, 32, 64))


def test_every_size_is_verified_and_one_file_holds_each_tensor_once(several: Path, checkpoint: Path) -> None:
    import onnx

    bundle = Bundle.open(several)
    assert sorted(bundle.graphs) == sorted(
        f"onnx/model{size}{kind}.onnx" for size in ("", "_50x66", "_32x64") for kind in ("", "_fp16")
    )
    verdicts = swin_deploy.verify(several)
    assert [verdict.verified for verdict in verdicts] == [True] * 6
    model = (checkpoint / "model.safetensors").stat().st_size
    for kind, share in (("", 1.0), ("_fp16", 0.5)):
        shared = several / f"onnx/model{kind}.onnx_data"
        assert shared.stat().st_size < 2 * share * model + 200_000  # once, with biases, masks and gaps; thrice is more
        places: dict[str, set[tuple[str, str]]] = {}
        for size in ("", "_50x66", "_32x64"):
            graph = onnx.load(str(several / f"onnx/model{size}{kind}.onnx"), load_external_data=False).graph
            for tensor in graph.initializer:
                if tensor.data_location == onnx.TensorProto.EXTERNAL:
                    entry = {item.key: item.value for item in tensor.external_data}
                    assert entry["location"] == shared.name
                    if tensor.name.endswith("fc1.weight"):
                        places.setdefault(tensor.name, set()).add((entry["offset"], entry["length"]))
        assert all(len(found) == 1 for found in places.values())


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_graph_that_fits_is_taken(several: Path, checkpoint: Path, precision: str) -> None:
    allowed = 1e-4 if precision == "fp32" else 2e-2
    read = checkpoint_from_path(checkpoint, TaskSpec())
    with swin_deploy.load(several, backend="onnxruntime", precision=precision) as model:
        assert model.image_sizes == tuple(SIZES)
        for size in (SIZES[1], SIZES[0], SIZES[2], SIZES[1]):
            given = pixels(2, 3, *size)
            with torch.no_grad():
                (wanted,) = SwinNetwork(read.config, size, read.tensors)(given)
            assert np.allclose(model.run({PIXELS: given.numpy()})["logits"], wanted.numpy(), atol=allowed)
        with pytest.raises(InputError, match=r"images of 48x48 pixels.* graphs for 32x32, 50x66, 32x64\. Resize the images"):
            model.run({PIXELS: np.zeros((1, 3, 48, 48), np.float32)})


@pytest.mark.parametrize("file", ["onnx/model.onnx_data", "onnx/model_50x66.onnx", "reference_32x64.npz"])
def test_a_changed_file_is_refused(several: Path, tmp_path: Path, file: str) -> None:
    path = Path(shutil.copytree(several, tmp_path / "copy"))
    data = bytearray((path / file).read_bytes())
    data[len(data) // 2] ^= 1
    (path / file).write_bytes(data)
    with pytest.raises(BundleError, match=file):
        swin_deploy.verify(path)
    if file.endswith("_data"):
        with pytest.raises(BundleError, match=file):
            swin_deploy.load(path, precision="fp32")


def test_one_size_keeps_its_weights_inside(tmp_path: Path) -> None:
    bundle = swin_deploy.export(weights=one_block(), image_sizes=[(32, 32), (32, 32)], output=tmp_path / "one")
    assert list(bundle.graphs) == ["onnx/model.onnx"]
    assert not list(bundle.path.rglob("*_data"))


def run(*arguments: object) -> Any:
    """`swin-deploy *arguments`, in this process. An error is the exception of the result."""
    return CliRunner().invoke(cli, [*map(str, arguments)])


def test_options_of_the_command(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "backbone"
    done = run("export", "--weights", checkpoint, "--task", "backbone", "--out-features", "stem, stage2",
               "--image-size", "40x56", "--image-size", "32", "-o", out)  # fmt: skip
    assert done.exit_code == 0, done.output
    with swin_deploy.load(out, backend="onnxruntime", precision="fp32") as model:
        assert model.task == TaskSpec("backbone", out_features=("stem", "stage2"))
        assert model.image_sizes == ((40, 56), (32, 32))
        found = model.run({PIXELS: np.zeros((1, 3, 40, 56), np.float32)})
    assert {name: array.shape for name, array in found.items()} == {
        "feature_maps.0": (1, 16, 10, 14),
        "feature_maps.1": (1, 32, 5, 7),
    }


def test_other_options_of_the_command(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "features"
    done = run("export", "--weights", checkpoint, "--task", "feature-extraction", "--no-pooling-layer", "--output-attentions",
               "--framework", "timm", "-o", out)  # fmt: skip
    assert done.exit_code == 0, done.output
    with swin_deploy.load(out, backend="onnxruntime", precision="fp32") as model:
        assert [spec.name for spec in model.outputs] == ["last_hidden_state", "attentions.0", "attentions.1"]
        assert (model.config.framework, model.bundle.manifest["semantics"]) == ("timm", "timm")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--image-size", "0x32"], 'Invalid image size "0x32"'),
        (["--image-size", "32", "--image-size", "wide"], 'Invalid image size "wide"'),
        (["--image-size", "32x5000"], "image side of 5000 pixels"),
        (["--out-features", "stem"], "has no output features"),
        (["--task", "backbone", "--out-features", "stage9"], 'Unknown feature "stage9". Choose one of: stem, stage1'),
        (["--task", MASKED], "has no decoder"),
        (["--use-mask-token"], "has no options for the mask token"),
    ],
)
def test_refusals_are_one_sentence(checkpoint: Path, tmp_path: Path, arguments: list[str], sentence: str) -> None:
    done = run("export", "--weights", checkpoint, *arguments, "-o", tmp_path / "out")
    assert isinstance(done.exception, SwinDeployError), done.exception
    assert done.exception.exit_code == 2
    assert sentence in str(done.exception)
    assert "\n" not in str(done.exception)
    assert not (tmp_path / "out").exists()


def test_tasks_and_frameworks_are_listed_by_the_command(checkpoint: Path) -> None:
    for option in ("--task", "--framework"):
        error = run("export", "--weights", checkpoint, option, "other").exception
        assert isinstance(error, UsageError)
        assert f'Unknown {option[2:]} "other". Choose one of: ' in str(error)
    assert all(task in run("export", "--help").output.replace("\n", "") for task in TASKS)


def test_frameworks_compute_different_results(checkpoint: Path) -> None:
    """If a map is no multiple of the window, frameworks shift and pad in different orders."""
    answers = {}
    for framework in ("hf", "timm"):
        read = checkpoint_from_path(checkpoint, TaskSpec(), framework=framework)
        assert read.config.framework == framework
        with torch.no_grad():
            (answers[framework],) = SwinNetwork(read.config, (56, 72), read.tensors)(pixels(1, 3, 56, 72))
    assert not torch.allclose(answers["hf"], answers["timm"], rtol=1e-4)
    with pytest.raises(CheckpointError, match='framework is "jax"'):
        checkpoint_from_path(checkpoint, TaskSpec(), framework="jax")
