"""Data sets, decoding, augmentation and batches. Only augment.py uses torch."""

FORMS = (
    "digits", "fashion-mnist:DIR", "cifar10:DIR", "folder:DIR", "shards:DIR", "npz:FILE",
    "synthetic:N", "run:DIR",
)  # fmt: skip
"""The forms of a data set's name: `data/sources.py` describes them."""
DATA_HELP = (
    f"{', '.join(FORMS)} (images that a run held out); DIR alone is folder:DIR. "
    "Transparent images are composited on white."
)
