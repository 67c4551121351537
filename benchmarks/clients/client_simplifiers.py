"""onnxslim and onnxsim, whose results run in ONNX Runtime."""

from client_onnxruntime import logits as run

ENVIRONMENTS = {"onnxslim": ["onnxruntime", "onnxslim"], "onnxsim": ["onnxruntime", "onnxsim"]}


def logits(folder, pixels):
    import onnx

    model, made = onnx.load(folder / "onnx/model.onnx"), folder / "simplified.onnx"
    try:
        import onnxslim

        simplified = onnxslim.slim(model)
    except ImportError:
        import onnxsim

        simplified, valid = onnxsim.simplify(model)
        if not valid:
            raise ValueError("onnxsim's own check failed") from None
    onnx.save(simplified, made)
    return run(folder, pixels, made)
