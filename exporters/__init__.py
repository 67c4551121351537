"""Makes things: torch -> ONNX -> rewritten, typed ONNX -> TensorRT engine. Imports the core, never runtimes or calib."""
