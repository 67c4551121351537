"""Outputs of every framework with its own checkpoints, compared with the network and with exported graphs.

Each case's reference.npz holds the inputs and outputs of the framework that wrote it. Plain names are its main run, `name/...`
further runs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_cases import CASES, DATA

import swin_deploy
from swin_deploy.models.checkpoints import checkpoint_from_path
from swin_deploy.models.swin import SwinNetwork
from swin_deploy.parity import TOLERANCES
from swin_deploy.tasks import MASK, PIXELS, TaskSpec

Arrays = dict[str, np.ndarray[Any, Any]]

# The same network in another kind of file -> the one that is exported.
EXPORTED_AS = {
    "hf523__SwinForImageClassification__sharded": "tf434__TFSwinForImageClassification__sharded_h5",
    "hf523__SwinForMaskedImageModeling__basic": "tf434__TFSwinForMaskedImageModeling__basic",
    "timm0613__SwinTransformer__v06_layout": "timm__SwinTransformer__bin_only",
}


@cache
def runs(name: str) -> Mapping[str, Arrays]:
    """Run -> its inputs and outputs. The image size is that of the run, not of the checkpoint."""
    with np.load(DATA / name / "reference.npz") as file:
        arrays = {key: file[key] for key in file}
    found: dict[str, Arrays] = {}
    for key, array in arrays.items():
        run, _, rest = key.rpartition("/")
        found.setdefault(run, {})[rest] = array
    for arrays in found.values():
        arrays.setdefault(PIXELS, found.get("", {}).get(PIXELS, np.empty(0)))
    # A run in a half type is an observation of one machine's arithmetic, and no reference for float32.
    return {run: arrays for run, arrays in found.items() if run != "half"}


def weights(name: str) -> Path:
    """What a user passes to --weights: the folder if it has a config.json, else the file."""
    folder = DATA / name
    return folder if (folder / "config.json").is_file() else folder / "model.pth"


def task_of(name: str) -> TaskSpec:
    """The task of the checkpoint, with all optional outputs."""
    return TaskSpec(CASES[name].task, output_hidden_states=True, output_attentions=True)


def feeds_of(task: TaskSpec, arrays: Arrays, patches: int) -> Arrays:
    feeds = {PIXELS: arrays[PIXELS]}
    if task.masked:  # no mask is a mask that hides nothing
        feeds[MASK] = arrays.get(MASK, np.zeros((len(arrays[PIXELS]), patches), dtype=bool))
    return feeds


def distance(found: np.ndarray[Any, Any], wanted: np.ndarray[Any, Any]) -> float:
    """Return the relative L2 distance."""
    assert found.shape == wanted.shape
    a, b = found.astype(np.float64), wanted.astype(np.float64)
    return float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30))


def agree(found: Mapping[str, np.ndarray[Any, Any]], wanted: Arrays) -> None:
    """Assert that every recorded output agrees with ours."""
    compared = [name for name in wanted if name in found]
    assert compared
    # Other systems name their intermediate results otherwise; those of transformers must all be among ours.
    assert not [
        name for name in wanted if name.startswith(("hidden_", "reshaped_", "attentions", "feature_")) and name not in found
    ]
    distances = {name: distance(found[name], wanted[name]) for name in compared}
    assert {name: value for name, value in distances.items() if not value <= TOLERANCES["fp32"]} == {}


@pytest.mark.parametrize(("name", "run"), [(name, run) for name in sorted(CASES) for run in runs(name)])
def test_the_network_computes_what_the_system_that_wrote_it_computed(name: str, run: str) -> None:
    arrays, task = runs(name)[run], task_of(name)
    height, width = arrays[PIXELS].shape[2:]
    checkpoint = checkpoint_from_path(weights(name), task, image_size=(height, width))
    network = SwinNetwork(checkpoint.config, (height, width), checkpoint.tensors, task).eval()
    feeds = feeds_of(task, arrays, network.stem_rows.height * network.stem_rows.width)
    with torch.no_grad():
        outputs = network.named(*map(torch.from_numpy, feeds.values()))
    agree({key: output.numpy() for key, output in outputs.items()}, arrays)


@pytest.mark.parametrize(("name", "other"), EXPORTED_AS.items())
def test_the_same_network_is_exported_only_once(name: str, other: str) -> None:
    """The same config, tensors, task and size make the same graph, whatever the file format."""
    size = runs(name)[""][PIXELS].shape[2:]
    assert size == runs(other)[""][PIXELS].shape[2:]
    assert task_of(name) == task_of(other)
    first, second = (checkpoint_from_path(weights(which), task_of(which), image_size=size) for which in (name, other))
    maps = second.config.backbone_maps  # of a backbone, which none of these is
    assert dataclasses.replace(first.config, backbone_maps=maps) == second.config
    assert sorted(first.tensors) == sorted(second.tensors)
    assert all(torch.equal(tensor, second.tensors[key]) for key, tensor in first.tensors.items())


# All of them: pytest -m "slow or not slow" -k exported_graph, or benchmarks/checkpoints.py. Two that pad and
# resize are run always; the graph follows from the network, which is compared above.
ALWAYS = ("timm__SwinTransformer__dynamic_72x56", "tv__SwinTransformer__pad_52x68")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ALWAYS else pytest.mark.slow)
        for name in sorted(CASES.keys() - EXPORTED_AS.keys())
    ],
)
def test_so_does_the_exported_graph_in_onnx_runtime(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    run = next(iter(runs(name)))
    arrays, task = runs(name)[run], task_of(name)
    height, width = arrays[PIXELS].shape[2:]
    bundle = swin_deploy.export(weights=weights(name), task=task, image_sizes=[(height, width)], output=tmp_path / "bundle")
    assert (bundle.path / "onnx/model.onnx").is_file()
    with swin_deploy.load(bundle.path, backend="onnxruntime", precision="fp32") as model:
        patches = int(model.inputs[-1].shape[-1]) if task.masked else 0
        found = model.run(feeds_of(task, arrays, patches))
    agree(found, arrays)
