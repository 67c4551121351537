import numpy as np

ENVIRONMENTS = {"polygraphy": ["onnx", "onnxruntime", "polygraphy"]}


def logits(folder, pixels):
    from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx

    with OnnxrtRunner(SessionFromOnnx(str(folder / "onnx/model.onnx"))) as runner:
        return np.concatenate([np.array(runner.infer({"pixel_values": image[None]})["logits"]) for image in pixels])
