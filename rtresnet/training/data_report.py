"""The report on a run's images: counts, broken and identical images. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

SPLITS = {"train": "training", "val": "validation", "test": "test"}


@dataclass(frozen=True, kw_only=True)
class DataReport:
    """Checks of a run's images before its first step.

    Attributes:
        classes: Class names.
        counts: Split (train, val, test) to the number of images per class, without broken ones.
        check: "decoded": every image was; "files": the beginning and end of every file was read;
            "arrays": there are no files.
        broken: Indices of broken images: "train" (train and val), "test".
        identical: Split (val, test) to the number of its images that are also in a split trained
            on or held out, byte for byte.
        examples: Split to some of these: the other split's image, and the split's.
        transparent: Images with transparency, which are composited on white.
        max_broken: Share of broken images up to which the run continues without them.
    """

    classes: tuple[str, ...]
    counts: dict[str, list[int]]
    check: str
    broken: dict[str, list[int]]
    identical: dict[str, int]
    examples: dict[str, list[tuple[str, str]]]
    transparent: int
    max_broken: float
