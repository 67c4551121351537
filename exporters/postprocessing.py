"""Answers as outputs of the graph, beside the logits: probabilities, or the best classes and their scores.

The nodes read the fp32 logits. Passes and quantization see the graph without them, so an answer is added to every graph last.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from swin_deploy.config import SwinConfig
from swin_deploy.errors import UsageError
from swin_deploy.manifest import EmbeddedAnswer
from swin_deploy.tasks import TaskSpec

if TYPE_CHECKING:
    import onnx

LOGITS = "logits"
PREFIX = "answer/"  # of the names of nodes and constants
ACTIVATIONS = {"softmax": "Softmax", "sigmoid": "Sigmoid"}


def answer_for(option: str, config: SwinConfig, task: TaskSpec) -> EmbeddedAnswer:
    """Return the answer that `--embed-postprocess` asks for. Raises UsageError if the network does not give it."""
    if task.name != "image-classification" or not config.has_classes:
        raise UsageError("--embed-postprocess applies to networks with classes, and this one has none. Leave it out.")
    kind, _, count = option.partition("=")
    activation = config.score_activation
    if kind in ACTIVATIONS and kind != activation:
        right = f" or pass --embed-postprocess {activation}" if activation in ACTIVATIONS else ""
        raise UsageError(
            f"The scores of this network are those of the activation {activation}, not {kind}. State another activation with "
            f"--activation {kind},{right or ' or pass --embed-postprocess top-k'}."
        )
    return EmbeddedAnswer.read({"activation": activation, "top_k": min(int(count), config.num_labels) if count else None})


def add_answer(model: onnx.ModelProto, answer: EmbeddedAnswer) -> None:
    """Add the outputs of `answer` to `model`: `probabilities`, or `indices` and `scores`, the best first."""
    import onnx
    from onnx import TensorProto, helper

    graph = model.graph
    logits = next(value for value in graph.output if value.name == LOGITS)
    batch, classes = logits.type.tensor_type.shape.dim

    def node(op: str, inputs: list[str], outputs: list[str], **attributes: Any) -> None:
        graph.node.append(helper.make_node(op, inputs, outputs, f"{PREFIX}{op}", **attributes))

    def output(name: str, kind: int, count: int) -> None:
        value = helper.make_tensor_value_info(name, kind, [1, count])
        value.type.tensor_type.shape.dim[0].CopyFrom(batch)
        graph.output.append(value)

    activation = ACTIVATIONS.get(answer.activation)
    options = {"axis": -1} if activation == "Softmax" else {}
    if answer.top_k is None:
        node(str(activation), [LOGITS], ["probabilities"], **options)
        output("probabilities", TensorProto.FLOAT, classes.dim_value)
        return
    count = onnx.numpy_helper.from_array(np.array([answer.top_k], np.int64), f"{PREFIX}k")
    graph.initializer.append(count)
    best = "scores" if activation is None else f"{PREFIX}logits"
    node("TopK", [LOGITS, count.name], [best, "indices"], axis=-1, largest=1, sorted=1)
    if activation == "Sigmoid":
        node(activation, [best], ["scores"])
    elif activation == "Softmax":
        node(activation, [LOGITS], [f"{PREFIX}probabilities"], **options)
        node("GatherElements", [f"{PREFIX}probabilities", "indices"], ["scores"], axis=-1)
    output("indices", TensorProto.INT64, answer.top_k)
    output("scores", TensorProto.FLOAT, answer.top_k)


def remove_answer(model: onnx.ModelProto) -> None:
    """Remove what `add_answer` added."""
    graph = model.graph
    written = {name for node in graph.node if node.name.startswith(PREFIX) for name in node.output}
    for values in (graph.node, graph.initializer):
        for value in [value for value in values if value.name.startswith(PREFIX)]:
            values.remove(value)
    for values in (graph.output, graph.value_info):
        for value in [value for value in values if value.name in written]:
            values.remove(value)


def answers_from_logits(logits: Any, answer: EmbeddedAnswer) -> dict[str, Any]:
    """Return the reference values of the outputs that have one: the probabilities, or the scores, best first."""
    from swin_deploy.tasks import scores_from_logits

    scores = scores_from_logits(logits, answer.activation).astype(np.float32)
    if answer.top_k is None:
        return {"probabilities": scores}
    return {"scores": -np.sort(-scores, axis=-1)[..., : answer.top_k]}
