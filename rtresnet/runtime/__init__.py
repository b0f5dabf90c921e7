"""Run ONNX files and plans through one interface. Never imports torch."""
