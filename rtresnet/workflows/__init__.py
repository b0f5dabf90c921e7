"""One module for each step. Combines the other packages; independent of click and the console."""
