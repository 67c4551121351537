"""OpenVINO Model API, which reads labels and preprocessing from the metadata of the ONNX file."""

import numpy as np

ENVIRONMENTS = {"openvino-model-api": ["opencv-python-headless", "onnx", "openvino-model-api"]}


def scores(folder, images):
    import cv2
    from model_api.adapters import OpenvinoAdapter, create_core
    from model_api.models import Model

    # Without the hint, OpenVINO computes in bf16 on processors that support it.
    hint = {"INFERENCE_PRECISION_HINT": "f32"}
    adapter = OpenvinoAdapter(create_core(), str(folder / "onnx/model.onnx"), device="CPU", plugin_config=hint)
    network = Model.create_model(adapter, configuration={"output_raw_scores": True})
    return np.stack([network(cv2.imread(str(image))).raw_scores.reshape(-1) for image in images])
