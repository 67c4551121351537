"""Make models: trace, rewrite and quantize ONNX graphs, and compile them into TensorRT engines."""
