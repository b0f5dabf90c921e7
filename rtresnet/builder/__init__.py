"""Compile ONNX files into TensorRT plans. The file decides the precision; no option does."""
