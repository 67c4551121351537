"""Clients of ONNX files, each in an environment of its own: `python -m benchmarks.clients`."""
