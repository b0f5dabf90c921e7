"""Where images come from and how they become batches. torch is in augment.py only."""
