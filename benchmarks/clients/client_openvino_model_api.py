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
    # Model API 0.4.7 does not swap the channels, whatever reverse_input_channels says, so it is given RGB.
    pixels = (cv2.cvtColor(cv2.imread(str(image)), cv2.COLOR_BGR2RGB) for image in images)
    return np.stack([network(one).raw_scores.reshape(-1) for one in pixels])
