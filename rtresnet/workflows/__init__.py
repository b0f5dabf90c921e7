"""One module for each step. Combines the other packages; knows no click and no console."""
