"""Runs things: every back end behind one small interface. Imports neither torch nor onnx nor the exporters."""
