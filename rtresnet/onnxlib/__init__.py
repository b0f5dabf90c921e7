"""ONNX files: loading, graph queries, block names, and what is kept in metadata_props."""
