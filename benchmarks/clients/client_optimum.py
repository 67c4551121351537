import numpy as np

ENVIRONMENTS = {"optimum": ["torch", "pillow", "optimum[onnxruntime]"]}


def logits(folder, pixels):
    from optimum.onnxruntime import ORTModelForImageClassification

    network = ORTModelForImageClassification.from_pretrained(folder, subfolder="onnx", file_name="model.onnx")
    return np.concatenate([network(pixel_values=image[None]).logits for image in pixels])
