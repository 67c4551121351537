"""All graph layouts compute the same: every task, with padding, in PyTorch and exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
import torch
from cli.exported import one_block
from small_graphs import model_from_text
from traced import CONFIGS, EVERYTHING, PADDED, WHOLE, traced_once

import swin_deploy
from swin_deploy.config import SwinConfig
from swin_deploy.errors import UsageError
from swin_deploy.exporters.passes.cosine_attention import l2_norm_as_rms_norm
from swin_deploy.machine import this_machine
from swin_deploy.models.blocks import shift_mask
from swin_deploy.models.checkpoints import random_checkpoint
from swin_deploy.models.swin import SwinNetwork
from swin_deploy.models.windows import WindowGrid
from swin_deploy.options import TARGETS
from swin_deploy.parity import compare, sample_inputs
from swin_deploy.runtimes.backends import runtime_from_onnx
from swin_deploy.runtimes.openvino import openvino_core
from swin_deploy.tasks import TASKS, TaskSpec

# Maps of 16 x 20, 8 x 10 and 4 x 5 tokens at the first size (shifted), of 13 x 18, 7 x 9 and 4 x 5 at the second (padded).
SIZES = [(64, 80), (52, 72)]
FIELDS: dict[str, Any] = {
    "image_size": (64, 64), "embed_dim": 16, "depths": (2, 2, 2), "num_heads": (1, 2, 4), "window_size": (4, 4, 4),
    "pretrained_window_sizes": (0, 0, 0), "id2label": {i: str(i) for i in range(5)}, "encoder_stride": 16,
}  # fmt: skip
CPU = TARGETS[1:]
BACKBONE = TaskSpec("backbone", output_hidden_states=True, output_attentions=True)


def network(version: int, task: str, size: tuple[int, int], target: str, **changes: Any) -> Any:
    config = SwinConfig(**{"version": version, **FIELDS, **changes})
    spec = TaskSpec(task, output_hidden_states=True, output_attentions=True)
    return SwinNetwork(config, size, random_checkpoint(config, spec).tensors, spec, target).eval()


def answers(made: Any, size: tuple[int, int]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the inputs and the outputs."""
    feeds = sample_inputs(made.task.inputs(made.config, size))
    with torch.no_grad():
        outputs = made.named(*map(torch.from_numpy, feeds.values()))
    return feeds, {name: value.numpy() for name, value in outputs.items()}


def assert_agree(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert found[name].shape == wanted[name].shape
        assert compare(wanted[name], found[name]).relative_l2 < limit(name), name


def limit(name: str) -> float:
    """Random weights make sharp attention, which amplifies rounding in every layout."""
    return 5e-5 if name.startswith("attentions.") else 1e-5


@pytest.mark.parametrize("target", CPU)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("version", [1, 2])
def test_network(version: int, task: str, size: tuple[int, int], target: str) -> None:
    _, wanted = answers(network(version, task, size, TARGETS[0]), size)
    _, found = answers(network(version, task, size, target), size)
    assert_agree(found, wanted)


@pytest.mark.parametrize("target", CPU)
def test_without_biases(target: str) -> None:
    for version in (1, 2):
        made = [network(version, TASKS[0], SIZES[1], t, qkv_bias=False) for t in (TARGETS[0], target)]
        assert_agree(answers(made[1], SIZES[1])[1], answers(made[0], SIZES[1])[1])


@pytest.mark.parametrize(
    ("version", "task", "target", "size"),
    [
        (2, EVERYTHING, CPU[0], PADDED),
        (1, EVERYTHING, CPU[1], PADDED),
        pytest.param(1, EVERYTHING, CPU[0], PADDED, marks=pytest.mark.slow),
        pytest.param(2, EVERYTHING, CPU[1], PADDED, marks=pytest.mark.slow),
        pytest.param(1, BACKBONE, CPU[1], WHOLE, marks=pytest.mark.slow),
        pytest.param(2, BACKBONE, CPU[0], WHOLE, marks=pytest.mark.slow),
    ],
)
def test_exported(version: int, task: TaskSpec, target: str, size: tuple[int, int], tmp_path: Path) -> None:
    pytest.importorskip(target, reason="runs the graph")
    checkpoint = random_checkpoint(CONFIGS[version], task)
    feeds, wanted = answers(SwinNetwork(checkpoint.config, size, checkpoint.tensors, task).eval(), size)
    model = traced_once(CONFIGS[version], size, task, target)
    lengths = [node.op_type for node in model.graph.node].count("ReduceSum")
    assert lengths == (2 * CONFIGS[version].blocks if (version, target) == (2, "onnxruntime") else 0)
    assert not any(node.attribute for node in model.graph.node if node.op_type == "Shape"), "OpenCV 4 ignores them"
    del model.graph.value_info[:]
    onnx.save(model, str(tmp_path / "model.onnx"))
    with runtime_from_onnx(tmp_path / "model.onnx", target, threads=1) as runtime:
        assert_agree(runtime.run(feeds), wanted)
        single = runtime.run({name: feed[:1] for name, feed in feeds.items()})
        assert runtime.inputs[0].shape[0] == "batch"
    for name, value in single.items():
        part = len(wanted[name]) // len(feeds["pixel_values"])  # attentions have the windows in their first axis
        assert compare(wanted[name][:part], value).relative_l2 < limit(name), name


def test_vectors_of_length_zero_stay_zero(tmp_path: Path) -> None:
    """As in `x / max(length, 1e-12)`; an RMS norm without its epsilon makes NaN of them."""
    pytest.importorskip("openvino", reason="runs the graph")

    text = """lengths (float[6, 8] x) => (float[6, 8] y) {
        ["square"] squares = Mul(x, x)
        ["sum"] total = ReduceSum <keepdims = 1> (squares, axes)
        ["root"] length = Sqrt(total)
        ["clip"] held = Clip(length, least)
        ["div"] y = Div(x, held)
    }"""
    x = np.random.default_rng(0).standard_normal((6, 8)).astype(np.float32) * np.float32([[1], [1e4], [1e-4], [1e-9], [0], [3]])
    answers = []
    for rms in (False, True):
        made = gs.import_onnx(model_from_text(text, axes=np.array([-1]), least=np.float32(1e-12)))
        assert not rms or l2_norm_as_rms_norm(made) == 1
        onnx.save(gs.export_onnx(made.cleanup().toposort()), str(tmp_path / "n.onnx"))
        compiled = openvino_core().compile_model(str(tmp_path / "n.onnx"), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        answers.append(np.array(compiled(x)[0]))
        assert (
            "RMS" in {node.get_rt_info()["layerType"].astype(str) for node in compiled.get_runtime_model().get_ops()}
        ) == rms
    np.testing.assert_allclose(answers[1], answers[0], rtol=1e-5)
    assert not answers[1][4].any()


@pytest.mark.parametrize("version", [1, 2])
def test_openvino_computes_attention_as_one_kernel(version: int, tmp_path: Path) -> None:
    """As OpenVINO reports for the compiled model. In the layout for ONNX Runtime every block has its own softmax."""
    pytest.importorskip("openvino", reason="runs the graph")
    if "AVX-512" not in this_machine().features:
        pytest.skip("OpenVINO has this kernel for processors with AVX-512 only")
    found = {}
    for target in CPU:
        graph = gs.import_onnx(traced_once(CONFIGS[version], PADDED, EVERYTHING, target))
        del graph.outputs[1:]  # of the attentions, which no kernel would give
        onnx.save(gs.export_onnx(graph.cleanup()), str(tmp_path / "model.onnx"))
        model = openvino_core().read_model(str(tmp_path / "model.onnx"))
        model.reshape([1, 3, *PADDED])
        compiled = openvino_core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        kinds = [node.get_rt_info()["layerType"].astype(str) for node in compiled.get_runtime_model().get_ops()]
        found[target] = {kind: kinds.count(kind) for kind in ("Softmax", "Reduce", "RMS")}
    assert found["onnxruntime"] == {"Softmax": 3, "Reduce": 6 * (version == 2), "RMS": 0}
    assert found["openvino"] == {"Softmax": 0, "Reduce": 0, "RMS": 6 * (version == 2)}


def test_masked_scores_leave_no_denormal_numbers() -> None:
    for version, framework in ((1, "hf"), (1, "timm"), (2, "hf")):
        mask = shift_mask(
            SwinConfig(**{"version": version, **FIELDS, "framework": framework}), WindowGrid(8, 8, (4, 4), (2, 2))
        )
        assert mask is not None
        assert np.exp(mask.min().numpy()) == 0
    assert 0 < np.exp(np.float32(-100)) < np.finfo(np.float32).tiny


def test_bundle_says_its_target_and_tensorrt_refuses_it(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="verifies the graphs")
    folder = one_block()
    bundle = swin_deploy.export(weights=folder, output=tmp_path / "one", target="onnxruntime")
    assert bundle.manifest["target"] == "onnxruntime"
    assert all(verdict.verified for verdict in swin_deploy.verify(bundle.path))
    with pytest.raises(UsageError, match=r"was exported for onnxruntime.*--target tensorrt"):
        swin_deploy.build_engine(bundle.path)
    with pytest.raises(UsageError, match=r'target.*"tpu"\. .*: tensorrt, onnxruntime, openvino'):
        swin_deploy.export(weights=folder, output=tmp_path / "other", target="tpu")
