"""Answers in the graph against those of transformers' pipeline, in every runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from transformers.pipelines.image_classification import sigmoid, softmax

from swin_deploy.bundle import specs_from_onnx
from swin_deploy.config import SwinConfig
from swin_deploy.errors import BundleError, UsageError, VerificationError
from swin_deploy.exporters.postprocessing import add_answer, answer_for, answers_from_logits, remove_answer
from swin_deploy.graph_check import check_structure
from swin_deploy.manifest import EmbeddedAnswer
from swin_deploy.options import ExportSpec
from swin_deploy.parity import Reference, check_runtime
from swin_deploy.runtimes.backends import runtime_from_onnx
from swin_deploy.tasks import TaskSpec

CLASSES = 6
PIPELINE: dict[str, Any] = {"softmax": softmax, "sigmoid": sigmoid, "none": lambda logits: logits}
LOGITS = np.random.default_rng(0).normal(0, 4, (3, CLASSES)).astype(np.float32)
LOGITS[1, :3] = LOGITS[1, 3]  # equal ones
LOGITS[2, 0] = 90  # whose exponential is beyond fp32


def network() -> onnx.ModelProto:
    """pixel_values -> logits, which are equal."""
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", CLASSES]) for name in ("pixel_values", "logits")]
    one = onnx.numpy_helper.from_array(np.ones((1, 1), np.float32), "one")
    graph = helper.make_graph(
        [helper.make_node("Mul", ["pixel_values", "one"], ["logits"], "Mul")], "g", values[:1], values[1:], [one]
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


@pytest.mark.parametrize(
    ("activation", "top_k"), [("softmax", None), ("sigmoid", None), ("softmax", 3), ("sigmoid", 6), ("none", 2)]
)
def test_scores_are_those_of_the_pipeline(activation: str, top_k: int | None, tmp_path: Path) -> None:
    model, answer = network(), EmbeddedAnswer.read({"activation": activation, "top_k": top_k})
    before = model.SerializeToString()
    add_answer(model, answer)
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    onnx.checker.check_model(str(path), full_check=True)
    check_structure(path, *(specs_from_onnx(side) for side in (model.graph.input, model.graph.output)))
    scores = np.stack([PIPELINE[activation](row) for row in LOGITS])
    order = np.argsort(-LOGITS, axis=1, kind="stable")[:, :top_k]
    wanted = {"probabilities": scores} if top_k is None else {"scores": np.take_along_axis(scores, order, 1), "indices": order}
    reference = Reference({"pixel_values": LOGITS}, {"logits": LOGITS, **answers_from_logits(LOGITS, answer)})
    for backend in ("onnxruntime", "openvino", "torch"):
        with runtime_from_onnx(path, backend) as runtime:
            found = runtime.run({"pixel_values": LOGITS})
            assert check_runtime(reference, runtime, "model.onnx", "fp32").verified
        for name, array in wanted.items():
            if name == "indices" and backend == "openvino":  # of equal logits, any may come first
                found = {**found, name: np.where(np.arange(3)[:, None] == 1, array, found[name])}
            np.testing.assert_allclose(found[name], array, rtol=1e-5, atol=1e-30, err_msg=f"{name} of {backend}")
    remove_answer(model)
    assert model.SerializeToString() == before


def test_wrong_indices_are_found(tmp_path: Path) -> None:
    model = network()
    add_answer(model, EmbeddedAnswer.read({"activation": "none", "top_k": 2}))
    next(node for node in model.graph.node if node.op_type == "TopK").attribute[1].i = 0  # the smallest
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    with runtime_from_onnx(path, "onnxruntime") as runtime, pytest.raises(VerificationError, match="not those of the largest"):
        check_runtime(Reference({"pixel_values": LOGITS}, {"logits": LOGITS}), runtime, "model.onnx", "fp32")
    with pytest.raises(BundleError, match="largest 0"):
        check_structure(path, *(specs_from_onnx(side) for side in (model.graph.input, model.graph.output)))


def test_an_index_that_is_not_of_top_k_is_refused(tmp_path: Path) -> None:
    model = network()
    add_answer(model, EmbeddedAnswer.read({"activation": "softmax", "top_k": 2}))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.full((1, 2), 1 << 40), "far"))
    model.graph.node[-1].input[1] = "far"
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    with pytest.raises(BundleError, match="GatherElements"):
        check_structure(path, *(specs_from_onnx(side) for side in (model.graph.input, model.graph.output)))


@pytest.mark.parametrize(
    ("option", "classes", "problem", "answer"),
    [
        ("softmax", 3, None, ("softmax", None)),
        ("sigmoid", 3, "multi_label_classification", ("sigmoid", None)),
        ("top-k", 3, None, ("softmax", 3)),
        ("top-k=2", 3, "regression", ("none", 2)),
        ("softmax", 3, "multi_label_classification", "--activation softmax"),
        ("sigmoid", 3, "regression", "--activation sigmoid"),
        ("top-k", 0, None, "has none"),
    ],
)
def test_the_activation_is_that_of_classify(option: str, classes: int, problem: str | None, answer: Any) -> None:
    config = SwinConfig(1, id2label={i: str(i) for i in range(classes)}, problem_type=problem)
    option = str(ExportSpec("swin-tiny", embed_postprocess=option).embed_postprocess)
    if isinstance(answer, str):
        with pytest.raises(UsageError, match=answer):
            answer_for(option, config, TaskSpec())
    else:
        found = answer_for(option, config, TaskSpec())
        assert (found.activation, found.top_k) == answer
