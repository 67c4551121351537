"""Compile ONNX graphs into TensorRT engines."""
