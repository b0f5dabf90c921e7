"""ONNX files: loading, graph queries, block names, and metadata_props."""
