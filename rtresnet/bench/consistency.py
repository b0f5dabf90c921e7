"""Check whether a backend returns the same output for an image in every batch.

The part of `rtresnet check` that needs no file: it works on any callable. The output for an image
alone is the reference. In a batch, at another position, at another batch size, after other batches
and next to a broken image, the output must be the same. The tolerance depends on the precision,
because another batch size may use another kernel, with a different order of summation.

Independent of the backend.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from rtresnet.core.metrics import softmax
from rtresnet.runtime.backend import TopK

Infer = Callable[[np.ndarray], "np.ndarray | TopK"]
"""A batch of images to logits [N, classes], or to indices [N, K] and probabilities [N, K]."""

# As shares of the logits' range. Measured with ONNX Runtime on a CPU, ResNet-18, -50 and -20: from
# one batch to another, outputs do not differ in FP32 and FP16, and by 2e-7 in INT8, or 5e-4 if a
# value was rounded in the other direction. GPUs choose a kernel by the batch size. For GPUs,
# rounding everything to FP16 twice gives a difference of 9e-4, TF32 rounds in the same way, and
# outputs for different photographs differ by at least 1.5e-2; a tolerance must stay below that, or
# swapped rows would go undetected.
BATCHES = {"fp32": 1e-4, "tf32": 2e-3, "fp16": 2e-3, "bf16": 1e-2, "int8": 1e-2, "fp8": 1e-2}
# Compared with the FP32 file. Measured in the same way: FP16 9e-4, INT8 up to 5.2e-2 on noise and
# 1.7e-2 on images, FP8 8.1e-2 on noise (ResNet-20). BF16: 8 times FP16, for its three bits fewer.
PARENT = {"fp32": 1e-4, "tf32": 4e-3, "fp16": 4e-3, "bf16": 3.2e-2, "int8": 1e-1, "fp8": 2e-1}
UNKNOWN = "int8"  # a file with unknown precision is compared as INT8 is
# A probability changes by at most half of the change of the logits, which range over about 20.
PROBABILITIES, WIDEST = 10.0, 0.5


@dataclass(frozen=True, kw_only=True)
class Check:
    """One comparison of many outputs.

    Attributes:
        name: The condition that must not change the outputs.
        compared: Short description of the compared outputs.
        n: Number of outputs.
        largest: Largest difference of a logit (for a top-K file, of a probability); NaN if an
            output is not a number.
        tolerance: Largest allowed difference.
        moved: Images whose top-1 changed although it led by more than the tolerance.
        why: Description of the failure, or None.
        ok: Whether the check passed.
    """

    name: str
    compared: str
    n: int
    largest: float
    tolerance: float
    moved: int
    why: str | None
    ok: bool = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "ok", self.why is None)


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """A backend's outputs for N images.

    Attributes:
        values: float64 [N, classes], logits; or [N, K], probabilities in descending order.
        classes: int64 [N, K], the classes of the probabilities; None for logits.
    """

    values: np.ndarray
    classes: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: np.ndarray) -> Outputs:
        classes = None if self.classes is None else self.classes[index]
        return Outputs(values=self.values[index], classes=classes)

    @property
    def first(self) -> np.ndarray:
        """The top-1 class, int64 [N]."""
        best = self.values.argmax(axis=1) if self.classes is None else self.classes[:, 0]
        return np.asarray(best)

    @property
    def margin(self) -> np.ndarray:
        """Difference between the largest and the second largest value, [N]."""
        if self.values.shape[1] < 2:
            return np.full(len(self), np.inf)
        best = np.sort(self.values, axis=1)
        return np.asarray(best[:, -1] - best[:, -2])

    def allowed(self, share: float) -> float:
        """Convert a share of the logits' range to a difference of `values`."""
        if self.classes is not None:
            return min(share * PROBABILITIES, WIDEST)
        return share * float(np.ptp(self.values))

    def difference(self, other: Outputs) -> np.ndarray:
        """Return the largest difference of any class, [N]; NaN if an output contains one."""
        values, others = self.values, other.values
        if self.classes is not None and other.classes is not None:
            classes = np.unique(np.concatenate((self.classes, other.classes), axis=None))
            values, others = self._probabilities(classes), other._probabilities(classes)
        return np.asarray(np.abs(values - others).max(axis=1))

    def _probabilities(self, classes: np.ndarray) -> np.ndarray:
        """Return the probabilities of these classes, [N, len(classes)].

        A class that is not among the K best gets the smallest of their probabilities, so that the
        difference of two correct outputs is never overestimated.
        """
        assert self.classes is not None
        values = np.repeat(self.values.min(axis=1, keepdims=True), len(classes), axis=1)
        np.put_along_axis(values, np.searchsorted(classes, self.classes), self.values, axis=1)
        return values

    def top(self, k: int) -> Outputs:
        """Convert logits to the outputs of a top-K file."""
        probabilities = softmax(self.values)
        best = np.argsort(-probabilities, axis=1)[:, :k]
        return Outputs(values=np.take_along_axis(probabilities, best, axis=1), classes=best)


def answers(output: np.ndarray | TopK) -> Outputs:
    """Copy the outputs of a backend."""
    if isinstance(output, tuple):
        return Outputs(values=np.array(output[1], np.float64), classes=np.array(output[0]))
    return Outputs(values=np.array(output, np.float64))


def alone(infer: Infer, images: np.ndarray) -> Outputs:
    """Run every image in a separate batch: the reference of all comparisons."""
    rows = [answers(infer(images[index : index + 1])) for index in range(len(images))]
    classes = [row.classes for row in rows if row.classes is not None]
    return Outputs(
        values=np.concatenate([row.values for row in rows]),
        classes=np.concatenate(classes) if classes else None,
    )


def check(
    infer: Infer, images: np.ndarray, single: Outputs, *, sizes: Sequence[int], share: float
) -> list[Check]:
    """Compare batches of every kind with the same images alone.

    Args:
        infer: The backend.
        images: At least two different images, as the backend's input; batches repeat them.
        single: `alone(infer, images)`.
        sizes: Batch sizes to try; for a plan the smallest, best and largest of each profile.
        share: Largest allowed difference, as a share of the logits' range.

    Returns:
        One entry for each comparison. All run, even after one has failed, unless an output
        for a single image is not finite.
    """
    many, tolerance = len(images), single.allowed(share)
    usual, largest = max(2, sorted(sizes)[len(sizes) // 2]), max(sizes)
    offset = 0

    def batch(size: int) -> np.ndarray:
        # Two consecutive batches never have the same image at the same position: an output left
        # over from the first would be correct by chance.
        nonlocal offset
        offset += 1
        return (offset + np.arange(size)) % many

    def same(name: str, compared: str, rows: np.ndarray, output: np.ndarray | TopK) -> Check:
        return compare(name, compared, answers(output), single[rows], tolerance)

    if not np.isfinite(single.values).all():
        bad = int((~np.isfinite(single.values).all(axis=1)).sum())
        return [_failed("alone", "each image", many, tolerance, f"{bad} outputs are not finite")]
    first, second = batch(usual), batch(usual)
    order = np.random.default_rng(0).permutation(usual)
    checks = [
        same("in a batch", f"{usual} with alone", first, infer(images[first])),
        same("permuted", f"{usual} with alone", second[order], infer(images[second[order]])),
    ]
    for size in sorted(set(sizes)):
        rows = batch(size)
        checks.append(same("batch size", f"{size} with alone", rows, infer(images[rows])))
    odd = [
        same("odd batch", f"{size} with alone", rows, infer(images[rows]))
        for size in sorted({1, 3, 7, largest + 1} - set(sizes))
        for rows in (batch(size),)
    ]
    return [
        *checks,
        *odd,
        _repeated(infer, images, first, second, tolerance),
        _next_to_broken(infer, images, single, first, tolerance),
    ]


def compare(
    name: str, compared: str, actual: Outputs, expected: Outputs, tolerance: float
) -> Check:
    """Compare outputs with the reference outputs of the same images."""
    if actual.values.shape != expected.values.shape:
        shapes = (
            f"{list(actual.values.shape)} was returned instead of {list(expected.values.shape)}"
        )
        return _failed(name, compared, len(expected), tolerance, shapes)
    difference = actual.difference(expected)
    moved = (actual.first != expected.first) & (expected.margin > tolerance)
    wrong = ~(difference <= tolerance)  # also if it is not a number
    why = None
    if wrong.any():
        worst = int(np.argmax(np.where(np.isnan(difference), np.inf, difference)))
        why = f"{int(wrong.sum())} of {len(expected)} outputs differ, most in row {worst}"
    elif moved.any():
        why = f"top-1 of {int(moved.sum())} of {len(expected)} images changed"
    return Check(
        name=name,
        compared=compared,
        n=len(expected),
        largest=float(difference.max()),
        tolerance=tolerance,
        moved=int(moved.sum()),
        why=why,
    )


def discriminability(single: Outputs, tolerance: float) -> float:
    """Return the share of image pairs, in [0, 1], whose exchange would be detected."""
    ones, others = np.tril_indices(len(single), -1)
    return float((single[ones].difference(single[others]) > tolerance).mean())


def _repeated(
    infer: Infer, images: np.ndarray, first: np.ndarray, second: np.ndarray, tolerance: float
) -> Check:
    name, compared = "repeated", f"{len(first)}, with others in between"
    output = infer(images[first])
    before = answers(output)
    infer(images[second])
    after = answers(output)
    same = np.array_equal(after.values, before.values, equal_nan=True)
    if before.classes is not None and after.classes is not None:
        same = same and np.array_equal(after.classes, before.classes)
    if not same:
        why = "the returned array changed when the next batch ran"
        return _failed(name, compared, len(first), tolerance, why)
    return compare(name, compared, answers(infer(images[first])), before, tolerance)


def _next_to_broken(
    infer: Infer, images: np.ndarray, single: Outputs, rows: np.ndarray, tolerance: float
) -> Check:
    """Run a batch with NaN in one image (white, for integer pixels), then a valid batch."""
    floating = np.issubdtype(images.dtype, np.floating)
    broken, at = images[rows], len(rows) // 2
    broken[at] = np.nan if floating else 255
    others = np.delete(np.arange(len(rows)), at)
    name = f"{'NaN' if floating else 'white'} in one row"
    output = answers(infer(broken))
    if len(output) != len(rows):
        return _failed(
            name, "the others", len(rows), tolerance, f"{len(output)} rows were returned"
        )
    during = compare(name, "the others", output[others], single[rows[others]], tolerance)
    after = compare(name, "the batch after", answers(infer(images[rows])), single[rows], tolerance)
    return after if during.ok and not after.ok else during


def _failed(name: str, compared: str, n: int, tolerance: float, why: str) -> Check:
    return Check(
        name=name, compared=compared, n=n, largest=float("nan"), tolerance=tolerance, moved=0,
        why=why,
    )  # fmt: skip
