"""Export checkpoints to FP32 ONNX files with batch norm folded."""
