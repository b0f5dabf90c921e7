"""Checkpoint in, folded FP32 ONNX file out."""
