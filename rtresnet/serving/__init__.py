"""An inference server for the Open Inference Protocol."""
