import numpy as np

ENVIRONMENTS = {"NNCF (PTQ)": ["openvino", "nncf"]}
QUANTIZED = True  # the error is that of 8 bits


def logits(folder, pixels):
    import nncf
    import openvino

    model = openvino.Core().read_model(folder / "onnx/model.onnx")
    made = nncf.quantize(model, nncf.Dataset([image[None] for image in pixels]), model_type=nncf.ModelType.TRANSFORMER)
    compiled = openvino.Core().compile_model(made, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return np.concatenate([compiled([image[None]])["logits"] for image in pixels])
