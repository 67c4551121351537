from client_onnxruntime import logits as run

ENVIRONMENTS = {
    "ModelOpt (ONNX PTQ)": [
        *("torch", "onnx", "onnxconverter-common", "onnxruntime", "onnxscript", "onnx-graphsurgeon", "onnxslim", "polygraphy"),
        *("cppimport", "lief", "nvidia-modelopt"),
    ]
}
QUANTIZED = True


def logits(folder, pixels):
    from modelopt.onnx.quantization import quantize

    made = folder / "quantized.onnx"
    quantize(
        str(folder / "onnx/model.onnx"),
        quantize_mode="int8",
        calibration_data={"pixel_values": pixels},
        calibration_eps=["cpu"],
        output_path=str(made),
    )
    return run(folder, pixels, made)
