"""Measures things: the calibration data and activation ranges that INT8 and FP8 scales come from."""
