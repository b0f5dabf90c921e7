"""FP32 ONNX in, FP16 or INT8 ONNX out: precision lives in the file."""
