"""Small graphs, written in ONNX's text format."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx.parser


def model_from_text(text: str, opset: int = 20, **tensors: Any) -> onnx.ModelProto:
    """The model of a graph such as "g (float[n] x) => (float[n] y) { y = Mul(x, c) }"; `tensors` are its initializers."""
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": {opset}]>\n{text}')
    model.graph.initializer.extend(onnx.numpy_helper.from_array(np.asarray(array), name) for name, array in tensors.items())
    return model
