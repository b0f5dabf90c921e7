"""Text about a run's recipe and its images. Imports no torch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from rtresnet.core.reporter import escape_cell, plural
from rtresnet.training.config import Recipe, text
from rtresnet.training.data_report import SPLITS, DataReport

CHECKS = {
    "arrays": "the images are arrays in memory, nothing to decode",
    "decoded": "every image was decoded",
    "files": "the beginning and the end of every file was read; --decode-all decodes every image",
}
TABLE_CLASSES = 20  # with up to this many classes, each has a row
NAMED = 3  # classes that a warning names
SMALL_SPLIT = 100  # images; below this the 95 % interval of an accuracy is at least 10 points wide
SMALL_CLASS = 10  # training images
IMBALANCE = 10  # largest over smallest class


def recipe_lines(recipe: Recipe) -> list[str]:
    """Describe the recipe as lines of `field=value`, without unused fields; 78 columns."""
    used = {
        "name": False,
        "epochs": not recipe.steps,
        "milestones": recipe.schedule == "steps",
        "plateau_epochs": recipe.schedule == "plateau",
        "warmup_shape": recipe.warmup > 0,
        "warmup_from": recipe.warmup > 0 or recipe.warmup_until > 0,
        "layer_decay": recipe.layer_decay != 1,
        "balance": recipe.balance != "none",
        "temperature": recipe.distill > 0,
        "area": recipe.crop == "area",
        "qat_format": recipe.qat,
    }
    entries = [
        f"{field}={text(value)}"
        for field, value in dataclasses.asdict(recipe).items()
        if field == "seed" or (used.get(field, True) and value not in (0, 0.0, (), False))
    ]
    lines = [f"recipe {recipe.name}:"]
    for entry in entries:
        if len(lines[-1]) + 1 + len(entry) > 78:
            lines.append(" ")
        lines[-1] += " " + entry
    return lines


def data_lines(report: DataReport) -> list[str]:
    """Describe counts per class and split, how images were checked, and warnings."""
    lines = []
    if len(report.classes) <= TABLE_CLASSES:
        rows: list[tuple[str, Sequence[str]]] = [("images", list(SPLITS))]
        for label, name in enumerate(report.classes):
            rows.append((escape_cell(name), [f"{report.counts[s][label]:,}" for s in SPLITS]))
        rows.append(("all", [f"{sum(report.counts[split]):,}" for split in SPLITS]))
        width = max(len(name) for name, _ in rows)
        lines += [f"{name:{width}}" + "".join(f"  {c:>9}" for c in row) for name, row in rows]
    else:
        for split in SPLITS:
            ordered = sorted(report.counts[split])
            lines.append(
                f"{split}: {plural(sum(ordered), 'image')}, {ordered[0]:,} to "
                f"{ordered[-1]:,} per class, median {ordered[len(ordered) // 2]:,}"
            )
    lines.append(f"checked: {CHECKS[report.check]}")
    if any(report.broken.values()):
        counts = " and ".join(f"{len(e)} of {name}" for name, e in report.broken.items() if e)
        lines.append(f"ignored, because they cannot be decoded: {counts}")
    if report.transparent:
        lines.append(f"composited on white: {plural(report.transparent, 'transparent image')}")
    return lines + [f"warning: {escape_cell(line)}" for line in data_warnings(report)]


def data_warnings(report: DataReport) -> list[str]:
    """Describe causes of uncertainty in the run's accuracy, one sentence each."""
    lines = [*_small_split(report, "val"), *_small_split(report, "test"), *_small_classes(report)]
    for name, count in report.identical.items():
        if count:
            others = "trained on" if name == "val" else "trained on or held out"
            other, own = report.examples[name][0]
            lines.append(
                f"{plural(count, f'{SPLITS[name]} image')} {'is' if count == 1 else 'are'} "
                f"also {others}, such as {own} = {other}: the {SPLITS[name]} accuracy is too "
                "high"
            )
    return lines


def _small_split(report: DataReport, name: str) -> list[str]:
    counts, lines, total = report.counts[name], [], sum(report.counts[name])
    if not total:  # the recipe holds nothing out
        return []
    if total < SMALL_SPLIT:
        selects = " and cannot select the best epoch reliably" if name == "val" else ""
        lines.append(
            f"the {SPLITS[name]} split has {plural(total, 'image')}: its accuracy is "
            f"uncertain by up to {98 / math.sqrt(total):.0f} points (95 %){selects}"
        )
    few = [report.classes[label] for label, count in enumerate(counts) if count < 2]
    if few:
        lines.append(f"the {SPLITS[name]} split has fewer than 2 images of {_named(few)}")
    return lines


def _small_classes(report: DataReport) -> list[str]:
    counts, lines = report.counts["train"], []
    missing = [report.classes[label] for label, count in enumerate(counts) if not count]
    few = [
        f"{report.classes[label]} ({count})"
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
            f"{report.classes[counts.index(largest)]} {largest}, "
            f"{report.classes[counts.index(smallest)]} {smallest} training images): the accuracy "
            "is mostly that of the large classes"
        )
    return lines


def _named(names: Sequence[str]) -> str:
    """Return "class a", "3 classes (a, b, c)" or "9 classes (a, b, c, ...)"."""
    if len(names) == 1:
        return f"class {names[0]}"
    more = ", ..." if len(names) > NAMED else ""
    return f"{len(names)} classes ({', '.join(names[:NAMED])}{more})"
