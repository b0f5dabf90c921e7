"""The nets of the paper, the table of their names, and checkpoints."""
