"""Data sets, predictions and accuracy as text: results of `data`, `train`, `eval` and `predict`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rtresnet.core.reporter import escape_cell, plural
from rtresnet.reporting.tables import assumed

if TYPE_CHECKING:
    from rtresnet.detection.average_precision import DetectionAccuracy
    from rtresnet.workflows.compare import CompareResult
    from rtresnet.workflows.data import DataInspectResult
    from rtresnet.workflows.detect_compare import CompareDetectorsResult
    from rtresnet.workflows.detect_evaluate import EvaluateDetectorResult
    from rtresnet.workflows.detect_predict import DetectResult
    from rtresnet.workflows.evaluate import AccuracyResult, EvaluateResult
    from rtresnet.workflows.explain import ExplainResult
    from rtresnet.workflows.predict import PredictResult, PredictTableResult
    from rtresnet.workflows.train import TrainResult

MORE = "Export it again with more --nms-rounds (default 16)."
LISTED = 10  # number of pairs and files to print; --json has all


def prediction_lines(result: PredictResult) -> Iterator[str]:
    """Return the most probable classes of each image."""
    for entry in result.images:
        classes = (f"{best.name} ({100 * best.probability:.1f} %)" for best in entry.top)
        yield f"{entry.image}: {'  '.join(classes)}"
    yield from assumed(result.assumed)


def table_lines(result: PredictTableResult) -> Iterator[str]:
    """Return the size of a table, and how fast it was written."""
    broken = f", {result.broken:,} broken" if result.broken else ""
    predicted = result.images - result.resumed_at
    yield (
        f"{result.out}: {plural(result.images, 'image')}{broken}; {predicted:,} in "
        f"{result.seconds:,.1f} s, {result.images_per_second:,.0f} img/s  "
        f"[{result.artifact}, batch {result.batch}, {result.runtime.provider}, "
        f"{result.runtime.device}]"
    )
    yield from assumed(result.assumed)


def detection_lines(result: DetectResult) -> Iterator[str]:
    """Return the objects of each image, with their boxes."""
    for entry in result.images:
        yield f"{entry.image}: {plural(len(entry.objects), 'object')}"
        for item in entry.objects:
            corners = ", ".join(f"{value:.0f}" for value in item.box)
            yield f"  {item.label} {100 * item.score:.1f} %  [{corners}]"
    yield from assumed(result.assumed)
    if not any(entry.objects for entry in result.images):
        yield "No detections; --min-score 0.1 also lists those with low scores."
    unsettled = sum(entry.unsettled > 0 for entry in result.images)
    if unsettled:
        yield f"Non-maximum suppression did not converge in {plural(unsettled, 'image')}. {MORE}"


def explain_lines(result: ExplainResult) -> Iterator[str]:
    """Return the class of each image, and where its map is."""
    for entry in result.images:
        yield f"{entry.image}: {entry.label} ({100 * entry.probability:.1f} %), {entry.overlay}"


def accuracy_lines(result: EvaluateResult) -> Iterator[str]:
    """Return the accuracy of each artifact and of their ensemble, and its assumptions."""
    for member in result.members:
        yield _accuracy(member, f"{member.precision}, {member.runtime.provider}; {member.shown}")
    yield from sorted({note for member in result.members for note in member.runtime.notes})
    if len(result.members) > 1:
        yield _accuracy(result, f"mean of probabilities; {result.protocol}")
    yield from assumed(line for member in result.members for line in member.assumed)
    remarks = dict.fromkeys(line for member in result.members for line in member.labels.remarks)
    yield from (f"Note: {line}." for line in remarks)


def _accuracy(result: AccuracyResult, how: str) -> str:
    top5 = "" if result.top5 is None else f", top-5 {result.top5_percent:.2f} %"
    skipped = f", {len(result.skipped)} skipped" if result.skipped else ""
    return (
        f"{result.artifact}: top-1 {result.top1_percent:.2f} % ({result.top1} of {result.n})"
        f"{top5}{skipped}  [{how}]"
    )


def detector_lines(result: EvaluateDetectorResult) -> Iterator[str]:
    """Return a detector's average precision, and the excluded images."""
    yield (
        f"{result.artifact}: {average_precision(result)}  [{result.precision}, "
        f"{result.runtime.provider}]"
    )
    yield from result.runtime.notes
    if result.unsettled:
        yield f"Non-maximum suppression did not converge for {result.unsettled} boxes. {MORE}"
    if result.invalid:
        yield f"{result.invalid} boxes of the data have no area and were ignored."


def comparison_lines(result: CompareResult | CompareDetectorsResult) -> Iterator[str]:
    """Return the agreement of two artifacts, and the images it was counted on."""
    from rtresnet.workflows.compare import CompareResult

    both = (result.reference, result.candidate)
    if isinstance(result, CompareResult):
        difference = "logits unknown"
        if result.largest is not None:
            difference = f"largest difference {result.largest:.3g}, relative {result.relative:.2e}"
        yield (
            f"{result.candidate.artifact} against {result.reference.artifact}: agreement "
            f"{100 * result.agreement:.2f} % of {plural(result.n, 'image')}, {difference}"
        )
    else:
        yield from _detector_comparison_lines(result)
    yield from sorted({note for entry in both for note in entry.runtime.notes})
    for entry in both:
        yield from assumed(entry.assumed, of=entry.artifact)
    if isinstance(result, CompareResult):
        yield from assumed(result.assumed)


def _detector_comparison_lines(result: CompareDetectorsResult) -> Iterator[str]:
    both = (result.reference, result.candidate)
    for entry in both:
        if entry.accuracy is not None:
            yield f"{entry.artifact}: {average_precision(entry.accuracy)}"
    change = "" if result.ap_change is None else f"AP {result.ap_change:+.2f} points, "
    counts = (
        f"{result.both} detections in both, {result.only_reference} only in the reference, "
        f"{result.only_candidate} only in the candidate; {result.changed} of "
        f"{plural(result.n, 'image')} differ; scores of the same detection differ by up to "
        f"{result.largest_score:.3g}, boxes by {result.largest_box:.3g} pixels"
    )
    if not result.both + result.only_reference + result.only_candidate:
        counts = f"neither has a detection to compare in {plural(result.n, 'image')}"
    yield f"{result.candidate.artifact} against {result.reference.artifact}: {change}{counts}"
    for entry in both:
        if entry.unsettled:
            yield (
                f"{entry.artifact}: non-maximum suppression did not converge for "
                f"{entry.unsettled} boxes. {MORE}"
            )
    yield "Counted: detections with a score of 50 % or more; the same: one class, IoU 0.5."


def average_precision(measured: DetectionAccuracy | EvaluateDetectorResult) -> str:
    """Format the average precision by COCO's and VOC's definitions."""

    def percent(value: float | None) -> str:
        return "-" if value is None else f"{value:.1f} %"

    return (
        f"AP50 {percent(measured.ap50)}, AP {percent(measured.ap)}, VOC 2007 "
        f"{percent(measured.voc07)} of {measured.objects:,} objects in {measured.n:,} images"
    )


def train_line(result: TrainResult) -> str:
    """Return the accuracy of a finished run."""
    measured = result.measured
    held_out = ""
    if measured.val_top1 is not None:
        held_out = f", val {measured.val_top1:.2f} % of {measured.val_n}"
    rounded = f"in {result.recipe.qat_format.upper()}, " if result.recipe.qat else ""
    return (
        f"{result.checkpoint}: {rounded}test top-1 {measured.test_top1:.2f} % of "
        f"{measured.test_n} images (epoch {measured.epoch}{held_out})"
    )


def data_lines(result: DataInspectResult) -> list[str]:
    """Describe a data set, a line for each fact."""
    shown = []
    for split in result.splits:
        present = [count for count in split.counts if count]
        shown.append(
            f"{split.name}: {plural(split.images, 'image')}, {plural(len(present), 'class')}, "
            f"{min(present, default=0):,} to {max(present, default=0):,} per class"
        )
        if split.images:
            shown.append(
                f"  width {split.widths[0]} to {split.widths[-1]} (median {split.widths[2]}), "
                f"height {split.heights[0]} to {split.heights[-1]} (median {split.heights[2]}) px"
            )
        if split.transparent:
            shown.append(f"  {plural(split.transparent, 'image')} with transparency")
        if split.coarse:
            shown.append(
                f"  {plural(split.coarse, 'image')} with no more detail than 16x16 pixels: two of "
                "them are near-duplicates only if they are almost equal"
            )
        shown += [f"  broken: {escape_cell(line)}" for line in split.broken[:LISTED]]
        if len(split.broken) > LISTED:
            shown.append(f"  broken: {len(split.broken) - LISTED} more (see --json)")
        shown += [f"  {escape_cell(line)}" for line in split.ignored]
    across = len(result.across())
    shown.append(
        f"{plural(len(result.duplicates), 'duplicate pair')}, {across} of them across splits"
    )
    for pair in sorted(result.duplicates, key=lambda p: p.first.split == p.second.split)[:LISTED]:
        kind = "identical" if pair.exact else "near-duplicate"
        first, second = (escape_cell(image.place) for image in (pair.first, pair.second))
        shown.append(f"  {kind}: {pair.first.split} {first} = {pair.second.split} {second}")
    return shown
