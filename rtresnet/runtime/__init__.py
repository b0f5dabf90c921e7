"""Running artifacts: ONNX files and plans behind one call. Never imports torch."""
