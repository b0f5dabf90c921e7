"""The report on a run's images: counts, broken and identical images, warnings. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rtresnet.core.reporter import escape_cell, plural

SPLITS = {"train": "training", "val": "validation", "test": "test"}
CHECKS = {
    "arrays": "the images are arrays, which cannot be broken",
    "decoded": "every image was decoded",
    "files": "the beginning and the end of every file was read; --decode-all decodes every image",
}
TABLE_CLASSES = 20  # up to so many classes have a row each
NAMED = 3  # classes that a warning names
SMALL_SPLIT = 100  # images; below this the 95 % interval of an accuracy is at least 10 points wide
SMALL_CLASS = 10  # training images
IMBALANCE = 10  # largest over smallest class


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

    def lines(self) -> list[str]:
        """Describe counts per class and split, how images were checked, and warnings."""
        lines = []
        if len(self.classes) <= TABLE_CLASSES:
            rows: list[tuple[str, Sequence[str]]] = [("images", list(SPLITS))]
            for label, name in enumerate(self.classes):
                rows.append((escape_cell(name), [f"{self.counts[s][label]:,}" for s in SPLITS]))
            rows.append(("all", [f"{sum(self.counts[split]):,}" for split in SPLITS]))
            width = max(len(name) for name, _ in rows)
            lines += [f"{name:{width}}" + "".join(f"  {c:>9}" for c in row) for name, row in rows]
        else:
            for split in SPLITS:
                ordered = sorted(self.counts[split])
                lines.append(
                    f"{split}: {plural(sum(ordered), 'image')}, {ordered[0]:,} to "
                    f"{ordered[-1]:,} per class, median {ordered[len(ordered) // 2]:,}"
                )
        lines.append(f"checked: {CHECKS[self.check]}")
        if any(self.broken.values()):
            counts = " and ".join(f"{len(e)} of {name}" for name, e in self.broken.items() if e)
            lines.append(f"ignored, because they cannot be decoded: {counts}")
        if self.transparent:
            lines.append(f"composited on white: {plural(self.transparent, 'transparent image')}")
        return lines + [f"warning: {escape_cell(line)}" for line in self.warnings()]

    def warnings(self) -> list[str]:
        """Describe causes of uncertainty in the run's accuracy, one sentence each."""
        lines = self._small_split("val") + self._small_split("test") + self._small_classes()
        for name, count in self.identical.items():
            if count:
                others = "trained on" if name == "val" else "trained on or held out"
                other, own = self.examples[name][0]
                lines.append(
                    f"{plural(count, f'{SPLITS[name]} image')} {'is' if count == 1 else 'are'} "
                    f"also {others}, such as {own} = {other}: the {SPLITS[name]} accuracy is too "
                    "high"
                )
        return lines

    def _small_split(self, name: str) -> list[str]:
        counts, lines, total = self.counts[name], [], sum(self.counts[name])
        if not total:  # the recipe holds nothing out
            return []
        if total < SMALL_SPLIT:
            selects = " and cannot select the best epoch reliably" if name == "val" else ""
            lines.append(
                f"the {SPLITS[name]} split has {plural(total, 'image')}: its accuracy is "
                f"uncertain by up to {98 / math.sqrt(total):.0f} points (95 %){selects}"
            )
        few = [self.classes[label] for label, count in enumerate(counts) if count < 2]
        if few:
            lines.append(f"the {SPLITS[name]} split has fewer than 2 images of {_named(few)}")
        return lines

    def _small_classes(self) -> list[str]:
        counts, lines = self.counts["train"], []
        missing = [self.classes[label] for label, count in enumerate(counts) if not count]
        few = [
            f"{self.classes[label]} ({count})"
            for label, count in enumerate(counts)
            if 0 < count < SMALL_CLASS
        ]
        if missing:
            lines.append(f"no training image of {_named(missing)}: it cannot be learned")
        if few:
            lines.append(f"fewer than {SMALL_CLASS} training images of {_named(few)}")
        largest, smallest = max(counts), min(count for count in counts if count)
        if largest >= IMBALANCE * smallest:
            lines.append(
                f"class imbalance {largest / smallest:.0f}:1 ("
                f"{self.classes[counts.index(largest)]} {largest}, "
                f"{self.classes[counts.index(smallest)]} {smallest} training images): the accuracy "
                "is mostly that of the large classes"
            )
        return lines


def _named(names: Sequence[str]) -> str:
    """ "class a", "3 classes (a, b, c)", "9 classes (a, b, c, ...)"."""
    if len(names) == 1:
        return f"class {names[0]}"
    more = ", ..." if len(names) > NAMED else ""
    return f"{len(names)} classes ({', '.join(names[:NAMED])}{more})"
