import numpy as np

ENVIRONMENTS = {"MNN": ["numpy", "MNN"]}


def logits(folder, pixels):
    import _tools  # the converter, without the report to its vendor that the command mnnconvert sends
    import MNN.expr as F
    import MNN.nn as nn

    made = str(folder / "model.mnn")
    given = ["-f", "ONNX", "--modelFile", str(folder / "onnx/model.onnx"), "--MNNModel", made, "--bizCode", "biz"]
    _tools.mnnconvert(["mnnconvert", *given])
    network, found = nn.load_module_from_file(made, ["pixel_values"], ["logits"]), []
    for image in pixels:
        value = F.const(np.ascontiguousarray(image[None]), [1, *image.shape], F.NCHW)
        found.append(np.array(F.convert(network.forward([value])[0], F.NCHW).read()).reshape(-1))
    return np.stack(found)
