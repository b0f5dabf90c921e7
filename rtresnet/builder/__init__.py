"""A typed ONNX file in, a TensorRT plan out. No precision flags: precision lives in the file."""
