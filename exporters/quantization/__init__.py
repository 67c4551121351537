"""Make INT8 and FP8 graphs, for TensorRT and for CPU back ends."""
