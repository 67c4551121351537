import numpy as np

ENVIRONMENTS = {"tract": ["numpy", "tract"]}


def logits(folder, pixels):
    import tract

    model = tract.onnx().load(str(folder / "onnx/model.onnx"))
    model.set_input_fact(0, ",".join(map(str, (1, *pixels.shape[1:]))) + ",f32")
    model.analyse()
    runnable = model.into_model().into_runnable()
    return np.concatenate([runnable.run([image[None]])[0].to_numpy() for image in pixels])
