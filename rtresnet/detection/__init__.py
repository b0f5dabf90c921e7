"""The paper's detector: Faster R-CNN on the convolutional maps of a residual net (appendix A)."""
