import numpy as np

ENVIRONMENTS = {"onnxruntime 1.17": ["numpy<2", "onnxruntime==1.17.3"], "onnxruntime": ["onnxruntime"]}


def logits(folder, pixels, model=None):
    import onnxruntime

    session = onnxruntime.InferenceSession(str(model or folder / "onnx/model.onnx"), providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(["logits"], {"pixel_values": image[None]})[0] for image in pixels])
