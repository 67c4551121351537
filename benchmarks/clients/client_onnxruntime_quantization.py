from client_onnxruntime import logits as run

ENVIRONMENTS = {"onnxruntime.quantization": ["onnx", "sympy", "onnxruntime"]}
QUANTIZED = True


def logits(folder, pixels):
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quant_pre_process, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self):
            self.images = iter(pixels)

        def get_next(self):
            image = next(self.images, None)
            return None if image is None else {"pixel_values": image[None]}

    prepared, made = folder / "prepared.onnx", folder / "quantized.onnx"
    quant_pre_process(str(folder / "onnx/model.onnx"), str(prepared), skip_symbolic_shape=True)
    quantize_static(str(prepared), str(made), Reader(), quant_format=QuantFormat.QDQ, per_channel=True)
    return run(folder, pixels, made)
