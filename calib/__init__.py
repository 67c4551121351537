"""Measure models on images: calibration data, activation ranges, and the accuracy of quantized graphs."""
