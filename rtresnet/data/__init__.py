"""Data sets, decoding, augmentation and batches. Only augment.py uses torch."""
