"""Rewrite models for the kernels that OpenVINO has for a processor. The results stay the same, up to rounding.

docs/design/cpu-graphs.md has what each rewrite gains.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import numpy as np

from swin_deploy.dependencies import require
from swin_deploy.machine import PAIR_LIMIT, processor_features, saturates

DEQUANTIZING = ("Convert", "Subtract", "Multiply")  # OpenVINO's DequantizeLinear
ELEMENTWISE = ("Add", "Convert", "FakeQuantize", "Gelu", "Multiply", "Subtract")  # what may follow a linear layer
LARGE_WINDOW = 256  # tokens, 16x16
MANY_ROWS = 100  # tokens of a linear layer that a convolution computes faster in fp32
VECTOR_LENGTH = 16  # fp32 values in a register of AVX-512
FAR_BELOW = -3e38  # a score whose exponential is zero
EXCLUDED = {  # by ONEDNN_MAX_CPU_ISA: how the names of features begin
    **dict.fromkeys(("SSE41", "AVX", "AVX2"), ("AVX-512", "AMX", "AVX-VNNI")),
    **dict.fromkeys(("AVX2_VNNI", "AVX2_VNNI_2"), ("AVX-512", "AMX")),
    "AVX512_CORE": ("AVX-512 bf16", "AMX", "AVX-512 VNNI", "AVX-VNNI"),
    "AVX512_CORE_VNNI": ("AVX-512 bf16", "AMX"),
}


def excluded_features() -> tuple[str, ...]:
    """Return how the names of features begin that ONEDNN_MAX_CPU_ISA forbids. OpenVINO reports bf16 even then."""
    return EXCLUDED.get(os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper(), ())


def usable_features() -> tuple[str, ...]:
    """Return the features of the processor that OpenVINO may use."""
    return tuple(feature for feature in processor_features() if not feature.startswith(excluded_features()))


def rewrite_for_kernels(model: Any, batch: int, bf16: bool, quantized: bool) -> None:
    """Rewrite a model of fixed shapes for the fastest kernels that OpenVINO has for these types on this processor."""
    if quantized and saturates(usable_features()):
        keep_saturating_weights_in_fp32(model)
    if model.is_dynamic():
        return
    least_rows = 1 if bf16 or quantized else MANY_ROWS if "AVX-512" in usable_features() else None
    rewrites: list[Callable[[Any], int]] = [
        flatten_channels_last,
        *([] if quantized else [fold_norms]),
        norms_beside_residuals,
        residuals_after_reshape,
        partial(transpose_keys_in_matmul, bf16=bf16),
        *([pad_odd_windows] if bf16 else []),
        *([partial(convolve_linear_layers, batch=batch, least_rows=least_rows)] if least_rows else []),
    ]
    for rewrite in rewrites:
        rewrite(model)
        model.validate_nodes_and_infer_types()


def keep_saturating_weights_in_fp32(model: Any) -> int:
    """Compute layers in fp32 for whose 8-bit weights sums of two products do not fit into 16 bits. Returns how many layers.

    Such sums saturate on x86 processors without VNNI. `quantize` writes no such weights, but QAT does.
    """
    changed = 0
    for layer in model.get_ops():
        if not _is_layer(layer) or (whole := _integers(weight := layer.input_value(1))) is None or len(whole.shape) != 2:
            continue
        pairs = whole[:, : whole.shape[1] // 2 * 2].reshape(len(whole), -1, 2).astype(np.int32)
        largest = max(np.maximum(pairs, 0).sum(axis=2).max(initial=0), -np.minimum(pairs, 0).sum(axis=2).min(initial=0))
        if largest > PAIR_LIMIT and (array := _evaluated(weight)) is not None:
            layer.input(1).replace_source_output(_operators().constant(array).output(0))
            changed += 1
    return changed


def flatten_channels_last(model: Any) -> int:
    """Flatten the map of the patches after its channels are last, as the convolution writes them. Returns how many maps.

    If it is flattened first, OpenVINO needs two passes over memory for [height * width, images, channels].
    """
    op, changed = _operators(), 0
    for transpose in model.get_ordered_ops():
        if transpose.get_type_name() != "Transpose" or _vector(transpose.input_value(1)) != [2, 0, 1]:
            continue
        flat, readers = transpose.input_value(0), transpose.output(0).get_target_inputs()
        if flat.get_node().get_type_name() != "Reshape" or _only_reader(flat) is None:
            continue
        whole, (images, channels, tokens) = flat.get_node().input_value(0), flat.get_shape()
        if len(whole.get_shape()) == 4 and list(whole.get_shape())[:2] == [images, channels]:
            rows = _reshaped(op.transpose(whole, np.array([0, 2, 3, 1])), images, tokens, channels)
            _move(transpose.output(0), readers, op.transpose(rows, np.array([1, 0, 2])).output(0))
            changed += 1
    return changed


def fold_norms(model: Any) -> int:
    """Fold scale and shift of norms into the linear layers that read them, which saves a pass over memory. Returns how many."""
    op, changed = _operators(), 0
    for norm in model.get_ordered_ops():
        if norm.get_type_name() != "MVN" or len(after := _chain(norm, "Multiply", "Add")) < 2:
            continue
        readers = after[1].output(0).get_target_inputs()
        layers = [reader.get_node() for reader in readers]
        scale, shift = (_array(one.input_value(1)) for one in after)
        channels = (norm.get_input_shape(0)[-1],)
        if any(one is None or one.shape != channels for one in (scale, shift)) or any(reader.get_index() for reader in readers):
            continue
        if not all(_is_layer(layer) and _array(layer.input_value(1)) is not None for layer in layers):
            continue
        for layer in layers:
            weight, readers = _array(layer.input_value(1)), layer.output(0).get_target_inputs()
            layer.input(0).replace_source_output(norm.output(0))
            layer.input(1).replace_source_output(op.constant(weight * scale).output(0))
            _move(layer.output(0), readers, op.add(layer, op.constant(weight @ shift)).output(0))
        changed += 1
    return changed


def norms_beside_residuals(model: Any) -> int:
    """Let one kernel compute scale and shift of a norm and the residual that follows (Swin V2). Returns of how many norms.

    With two axes, OpenVINO leaves scale and shift to the norm, whose kernel cannot compute them.
    """
    changed = 0
    for norm in model.get_ordered_ops():
        if norm.get_type_name() != "MVN" or len(norm.get_input_shape(0)) != 2:
            continue
        if len(after := _chain(norm, "Multiply", "Add", "Add")) < 3:
            continue
        residual = next(link for link in after[2].inputs() if link.get_source_output() != after[1].output(0))
        shape = list(norm.get_input_shape(0))
        if list(residual.get_shape()) != shape:
            continue
        for link in (norm.input(0), residual):
            link.replace_source_output(_reshaped(link.get_source_output(), 1, *shape))
        norm.input(1).replace_source_output(_operators().constant(np.array([-1])).output(0))
        for one in (norm, *after):
            one.validate_and_infer_types()
        total = after[2].output(0)
        readers = total.get_target_inputs()
        _move(total, readers, _reshaped(total, *shape))
        changed += 1
    return changed


def residuals_after_reshape(model: Any) -> int:
    """Let residuals read what a norm reads, if that is reshaped (Swin V1 in INT8). Returns how many Reshapes they share.

    A norm overwrites an input that nothing else reads: OpenVINO would copy the tokens before the Reshape for it.
    """
    changed = 0
    for reshape in model.get_ordered_ops():
        if reshape.get_type_name() != "Reshape" or (reader := _only_reader(reshape.output(0))) is None:
            continue
        tokens = reshape.input_value(0)
        shape = list(reshape.get_input_shape(0))
        if reader.get_node().get_type_name() != "MVN" or list(reshape.get_output_shape(0)) != [1, *shape]:
            continue
        others = [link for link in tokens.get_target_inputs() if link.get_node() not in (reshape, *model.get_results())]
        if others:
            back = _reshaped(reshape.output(0), *shape)
            for link in others:
                link.replace_source_output(back)
            changed += 1
    return changed


def transpose_keys_in_matmul(model: Any, bf16: bool) -> int:
    """Let the MatMuls of attention transpose the keys, which saves a pass over memory. Returns how many do.

    In fp32, it gains nothing for scaled cosines (Swin V2) of small windows.
    """
    changed = 0
    for matmul in model.get_ops():
        if matmul.get_type_name() != "MatMul" or matmul.get_attributes()["transpose_b"]:
            continue
        keys, readers = matmul.input_value(1).get_node(), matmul.output(0).get_target_inputs()
        if keys.get_type_name() != "Transpose" or _vector(keys.input_value(1)) != [0, 2, 3, 1]:
            continue
        scaled = any(reader.get_node().get_type_name() == "Multiply" for reader in readers)
        large = matmul.get_output_partial_shape(0)[-1].get_max_length() >= LARGE_WINDOW
        if _only_reader(keys.output(0)) is not None and (bf16 or large or not scaled):
            keys.input(1).replace_source_output(_operators().constant(np.array([0, 2, 1, 3])).output(0))
            matmul.set_attribute("transpose_b", True)
            changed += 1
    return changed


def pad_odd_windows(model: Any) -> int:
    """Pad keys and values of windows with an odd number of tokens, 7x7 for example. Returns in how many attentions.

    In bf16, attention then takes 13 to 20 % less time. The scores of the added keys are masked, so that the result is the same.
    """
    op, changed = _operators(), 0

    def padded(value: Any, axis: int, size: int, filling: float) -> Any:
        ends = np.zeros(len(value.get_shape()), np.int64)
        ends[axis] = size - value.get_shape()[axis]
        return op.pad(value, np.zeros_like(ends), ends, "constant", np.float32(filling)).output(0)

    for softmax in model.get_ordered_ops():
        if softmax.get_type_name() != "Softmax" or (found := _attention_of(softmax)) is None:
            continue
        addends, sources = found
        tokens = softmax.get_output_shape(0)[-1]
        size = -(-tokens // VECTOR_LENGTH) * VECTOR_LENGTH
        for link, axis in sources:
            link.replace_source_output(padded(link.get_source_output(), axis, size, 0))
        for number, link in enumerate(addends):
            link.replace_source_output(padded(link.get_source_output(), -1, size, 0 if number else FAR_BELOW))
        changed += 1
    return changed


def _attention_of(softmax: Any) -> tuple[list[Any], list[tuple[Any, int]]] | None:
    """Return what depends on the number of keys: inputs that are added to the scores, and inputs with the axis of the keys.

    None if it is another kind of attention, or if its number of tokens is even.
    """
    shape, reader = softmax.get_output_partial_shape(0), _only_reader(softmax.output(0))
    if shape.is_dynamic or reader is None or reader.get_index() or softmax.get_attributes()["axis"] not in (-1, len(shape) - 1):
        return None
    tokens = shape[-1].get_length()
    if tokens < VECTOR_LENGTH or tokens % 2 == 0:
        return None
    addends, scores = [], softmax.input_value(0).get_node()
    while scores.get_type_name() in ("Add", "Multiply"):
        score, other = scores.inputs()
        if other.get_shape()[-1:] not in ([], [1]):
            addends.append(other)
            if scores.get_type_name() == "Multiply" or other.get_shape()[-1] != tokens:
                return None
        scores = score.get_source_output().get_node()
    sources = []
    for matmul, transposed in ((scores, True), (reader.get_node(), False)):
        if matmul.get_type_name() != "MatMul" or matmul.get_attributes()["transpose_b"] != transposed:
            return None
        tensor = matmul.input_value(1).get_node()
        order = _vector(tensor.input_value(1)) if tensor.get_type_name() == "Transpose" else None
        if order is None or _only_reader(tensor.output(0)) is None:
            return None
        sources.append((tensor.input(0), order[-2]))
    return (addends, sources) if addends else None


def convolve_linear_layers(model: Any, batch: int, least_rows: int = 1) -> int:
    """Let convolutions compute the linear layers of tokens. Returns how many do.

    In bf16 and INT8 it is 3 to 11 % faster; in fp32 1 to 2 %, but only with AVX-512 and at least `MANY_ROWS` tokens.

    Bias, GELU and quantization become part of the convolution, which rounds its result once, as the linear layer does.
    """
    op, changed = _operators(), 0

    def kernel(weight: Any) -> Any:
        """[outputs, inputs] -> [outputs, inputs, 1, 1]; of 8-bit weights, what dequantizes them has these axes, too."""
        node = weight.get_node()
        if node.get_type_name() not in DEQUANTIZING:
            return _reshaped(weight, *weight.get_shape(), 1, 1)
        for link in node.inputs():
            link.replace_source_output(kernel(link.get_source_output()))
        node.validate_and_infer_types()
        return weight

    for matmul in model.get_ordered_ops():
        if not _is_layer(matmul):
            continue
        (rows, weight), last = matmul.input_values(), matmul
        shapes = [value.get_partial_shape() for value in (rows, weight)]
        if any(len(shape) != 2 or shape.is_dynamic for shape in shapes) or not _is_constant(weight):
            continue
        if shapes[0][0].get_length() == batch or shapes[0][0].get_length() < least_rows:
            continue
        outputs, inputs = weight.get_shape()
        image = op.transpose(_reshaped(rows, 1, -1, 1, inputs), np.array([0, 3, 1, 2]))
        made = op.convolution(image, kernel(weight), [1, 1], [0, 0], [0, 0], [1, 1]).output(0)
        while (after := _elementwise_reader(last, outputs)) is not None:
            after.input(0).replace_source_output(made)
            for link in after.inputs()[1:]:
                if link.get_shape() == [outputs]:
                    link.replace_source_output(_reshaped(link.get_source_output(), 1, outputs, 1, 1))
            after.validate_and_infer_types()
            made, last = after.output(0), after
        readers = last.output(0).get_target_inputs()
        _move(last.output(0), readers, _reshaped(op.transpose(made, np.array([0, 2, 3, 1])), -1, outputs))
        changed += 1
    return changed


def _operators() -> Any:
    return require("openvino", "run models with the openvino back end").opset13


def _reshaped(value: Any, *shape: int) -> Any:
    return _operators().reshape(value, np.array(shape), False).output(0)


def _array(value: Any) -> Any:
    """Return the array of a constant; None for another value."""
    node = value.get_node()
    return np.array(node.data) if node.get_type_name() == "Constant" else None


def _evaluated(value: Any) -> Any:
    """Return the array of a constant, or of one that is dequantized; None for another value."""
    node = value.get_node()
    kind = node.get_type_name()
    if kind == "Constant":
        return np.array(node.data)
    if kind not in (*DEQUANTIZING, "Reshape") or (array := _evaluated(node.input_value(0))) is None:
        return None
    if kind == "Convert":
        return array.astype(node.get_output_element_type(0).to_dtype())
    if kind == "Reshape":
        return array.reshape(node.get_output_shape(0))
    other = _evaluated(node.input_value(1))
    return None if other is None else array * other if kind == "Multiply" else array - other


def _integers(value: Any) -> Any:
    """Return the INT8 array that is dequantized to `value`; None if there is none."""
    while (node := value.get_node()).get_type_name() in (*DEQUANTIZING, "Reshape"):
        value = node.input_value(0)
    array = _array(value)
    return array if array is not None and array.dtype == np.int8 else None


def _vector(value: Any) -> list[int] | None:
    """Return the integers of a constant; None for another value."""
    return list(value.get_node().get_vector()) if value.get_node().get_type_name() == "Constant" else None


def _only_reader(value: Any) -> Any:
    """Return the only input that reads a value; None if there are several."""
    readers = list(value.get_target_inputs())
    return readers[0] if len(readers) == 1 else None


def _chain(node: Any, *types: str) -> list[Any]:
    """Return the nodes of these types that follow one after the other, each the only reader of the one before it."""
    found: list[Any] = []
    for kind in types:
        reader = _only_reader(node.output(0))
        if reader is None or reader.get_node().get_type_name() != kind:
            break
        node = reader.get_node()
        found.append(node)
    return found


def _move(value: Any, readers: Collection[Any], to: Any) -> None:
    """Let inputs that read `value` read another value, which takes its names: those of outputs are among them."""
    names = value.get_names()
    value.set_names(set())
    to.set_names(names)
    for reader in readers:
        reader.replace_source_output(to)


def _is_layer(node: Any) -> bool:
    """Return whether a node is the MatMul of a linear layer."""
    return bool(node.get_type_name() == "MatMul" and node.get_attributes()["transpose_b"])


def _is_constant(value: Any) -> bool:
    """Return whether a value is a constant, or one that only one node dequantizes."""
    node = value.get_node()
    if node.get_type_name() in DEQUANTIZING and len(value.get_target_inputs()) == 1:
        return all(map(_is_constant, node.input_values()))
    return node.get_type_name() == "Constant" or (node.get_type_name() == "Reshape" and _is_constant(node.input_value(0)))


def _elementwise_reader(node: Any, channels: int) -> Any:
    """Return the only node that reads `node`, if it works on each value and its other inputs are channels; otherwise None."""
    reader = _only_reader(node.output(0))
    if reader is None or reader.get_index() or reader.get_node().get_type_name() not in ELEMENTWISE:
        return None
    after = reader.get_node()
    shapes = [link.get_partial_shape() for link in after.inputs()[1:]]
    of_channels = all(shape.is_static and list(shape.to_shape()) in ([], [1], [channels]) for shape in shapes)
    return after if of_channels else None
