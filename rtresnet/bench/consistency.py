"""Whether a backend gives an image the same answer whatever batch it comes in.

`rtresnet check`, as far as it needs no file: pure over a callable. An image alone is the reference;
in a batch, at another place, at another batch size, after other batches and beside a broken image
it must get the same. What "the same" means follows from the precision, since another batch may
take another kernel, and that another order of summation.

Deliberately unaware of what runs the net.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from rtresnet.core.metrics import softmax
from rtresnet.runtime.backend import TopK

Infer = Callable[[np.ndarray], "np.ndarray | TopK"]
"""A batch of images to logits [N, classes], or to indices [N, K] and probabilities [N, K]."""

# Of the logits' range. Measured with ONNX Runtime on a CPU, ResNet-18, -50 and -20: from one batch
# to another nothing in FP32 and FP16, 2e-7 in INT8, and 5e-4 where a value fell on the other side
# of a rounding. GPUs choose a kernel by the batch, and only this much is known of those: two
# roundings of everything to FP16 are 9e-4 apart, TF32 rounds alike, and different photographs are
# 1.5e-2 apart or more, which a tolerance must stay below to tell rows apart.
BATCHES = {"fp32": 1e-4, "tf32": 2e-3, "fp16": 2e-3, "int8": 1e-2}
# Against the FP32 file. Measured likewise: FP16 9e-4, INT8 up to 5.2e-2 on noise, 1.7e-2 on images.
PARENT = {"fp32": 1e-4, "tf32": 4e-3, "fp16": 4e-3, "int8": 1e-1}
UNKNOWN = "int8"  # a file that does not say its precision is held to the widest bound
# A probability moves by half of what logits move by at most, and those range over some 20.
PROBABILITIES, WIDEST = 10.0, 0.5


@dataclass(frozen=True, kw_only=True)
class Check:
    """One comparison of many answers.

    Attributes:
        name: What must make no difference.
        compared: With what, in a few words.
        n: Answers compared.
        largest: Largest difference of a logit (of a probability, of a top-K file); NaN where an
            answer is none.
        tolerance: The largest that is allowed.
        moved: Images whose top-1 changed though it led by more than the tolerance.
        why: What is wrong, as the end of a sentence; None where nothing is.
    """

    name: str
    compared: str
    n: int
    largest: float
    tolerance: float
    moved: int
    why: str | None

    @property
    def ok(self) -> bool:
        """Whether it was held."""
        return self.why is None


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What a backend said of N images.

    Attributes:
        values: float64 [N, classes], logits; or [N, K], probabilities in descending order.
        classes: int64 [N, K], what the probabilities are of; None of logits.
    """

    values: np.ndarray
    classes: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: np.ndarray) -> Answers:
        classes = None if self.classes is None else self.classes[index]
        return Answers(values=self.values[index], classes=classes)

    @property
    def first(self) -> np.ndarray:
        """The top-1 class, int64 [N]."""
        found = self.values.argmax(axis=1) if self.classes is None else self.classes[:, 0]
        return np.asarray(found)

    @property
    def margin(self) -> np.ndarray:
        """By how much the first leads, [N]."""
        if self.values.shape[1] < 2:
            return np.full(len(self), np.inf)
        best = np.sort(self.values, axis=1)
        return np.asarray(best[:, -1] - best[:, -2])

    def allowed(self, share: float) -> float:
        """A share of the logits' range, in units of `values`."""
        if self.classes is not None:
            return min(share * PROBABILITIES, WIDEST)
        return share * float(np.ptp(self.values))

    def difference(self, other: Answers) -> np.ndarray:
        """Largest difference of any class, [N]; NaN where an answer holds one."""
        mine, theirs = self.values, other.values
        if self.classes is not None and other.classes is not None:
            known = np.unique(np.concatenate((self.classes, other.classes), axis=None))
            mine, theirs = self._of(known), other._of(known)
        return np.asarray(np.abs(mine - theirs).max(axis=1))

    def _of(self, known: np.ndarray) -> np.ndarray:
        """Probabilities of these classes. One that is not among the K best counts as the last of
        them: no sound pair of answers comes out further apart than it is."""
        assert self.classes is not None
        found = np.repeat(self.values.min(axis=1, keepdims=True), len(known), axis=1)
        np.put_along_axis(found, np.searchsorted(known, self.classes), self.values, axis=1)
        return found

    def top(self, k: int) -> Answers:
        """The answers a top-K file would give instead of these logits."""
        shares = softmax(self.values)
        best = np.argsort(-shares, axis=1)[:, :k]
        return Answers(values=np.take_along_axis(shares, best, axis=1), classes=best)


def answers(found: np.ndarray | TopK) -> Answers:
    """What a backend returned, copied."""
    if isinstance(found, tuple):
        return Answers(values=np.array(found[1], np.float64), classes=np.array(found[0]))
    return Answers(values=np.array(found, np.float64))


def alone(infer: Infer, images: np.ndarray) -> Answers:
    """Every image in a batch of its own: the reference of everything else here."""
    rows = [answers(infer(images[index : index + 1])) for index in range(len(images))]
    classes = [row.classes for row in rows if row.classes is not None]
    return Answers(
        values=np.concatenate([row.values for row in rows]),
        classes=np.concatenate(classes) if classes else None,
    )


def check(
    infer: Infer, images: np.ndarray, single: Answers, *, sizes: Sequence[int], share: float
) -> list[Check]:
    """Holds batches of every kind against the same images alone.

    Args:
        infer: The backend.
        images: At least two different ones, as the backend takes them; batches repeat them.
        single: `alone(infer, images)`.
        sizes: The batches to try: of a plan every smallest, best and largest.
        share: What differences are allowed, of the logits' range.

    Returns:
        One entry a comparison; the first to fail is not the last to be made.
    """
    many, tolerance = len(images), single.allowed(share)
    usual, largest = max(2, sorted(sizes)[len(sizes) // 2]), max(sizes)
    offset = 0

    def batch(size: int) -> np.ndarray:
        # Never the same image at the same place in two batches that follow each other: an answer
        # left over from the last one would be right by chance.
        nonlocal offset
        offset += 1
        return (offset + np.arange(size)) % many

    def same(name: str, compared: str, rows: np.ndarray, found: np.ndarray | TopK) -> Check:
        return compare(name, compared, answers(found), single[rows], tolerance)

    if not np.isfinite(single.values).all():
        bad = int((~np.isfinite(single.values).all(axis=1)).sum())
        return [_broken("alone", "each image", many, tolerance, f"{bad} answers are not finite")]
    first, second = batch(usual), batch(usual)
    order = np.random.default_rng(0).permutation(usual)
    found = [
        same("in a batch", f"{usual} with alone", first, infer(images[first])),
        same("permuted", f"{usual} with alone", second[order], infer(images[second[order]])),
    ]
    for size in sorted(set(sizes)):
        rows = batch(size)
        found.append(same("batch size", f"{size} with alone", rows, infer(images[rows])))
    odd = [
        same("odd batch", f"{size} with alone", rows, infer(images[rows]))
        for size in sorted({1, 3, 7, largest + 1} - set(sizes))
        for rows in (batch(size),)
    ]
    return [
        *found,
        *odd,
        _repeated(infer, images, first, second, tolerance),
        _beside_a_broken_one(infer, images, single, first, tolerance),
    ]


def compare(name: str, compared: str, got: Answers, want: Answers, tolerance: float) -> Check:
    """Holds answers to images against the reference answers to the same images."""
    if got.values.shape != want.values.shape:
        shapes = f"{list(got.values.shape)} came back for {list(want.values.shape)}"
        return _broken(name, compared, len(want), tolerance, shapes)
    difference = got.difference(want)
    moved = (got.first != want.first) & (want.margin > tolerance)
    wrong = ~(difference <= tolerance)  # not a number is wrong too
    why = None
    if wrong.any():
        worst = int(np.argmax(np.where(np.isnan(difference), np.inf, difference)))
        why = f"{int(wrong.sum())} of {len(want)} answers differ, most in row {worst}"
    elif moved.any():
        why = f"top-1 of {int(moved.sum())} of {len(want)} images changed"
    return Check(
        name=name,
        compared=compared,
        n=len(want),
        largest=float(difference.max()),
        tolerance=tolerance,
        moved=int(moved.sum()),
        why=why,
    )


def discriminability(single: Answers, tolerance: float) -> float:
    """The share of pairs of images, in [0, 1], that would be noticed if they changed places."""
    ones, others = np.tril_indices(len(single), -1)
    return float((single[ones].difference(single[others]) > tolerance).mean())


def _repeated(
    infer: Infer, images: np.ndarray, first: np.ndarray, second: np.ndarray, tolerance: float
) -> Check:
    name, compared = "repeated", f"{len(first)}, others between"
    given = infer(images[first])
    before = answers(given)
    infer(images[second])
    if not np.array_equal(answers(given).values, before.values, equal_nan=True):
        why = "an answer changed in the caller's hands when the next batch ran"
        return _broken(name, compared, len(first), tolerance, why)
    return compare(name, compared, answers(infer(images[first])), before, tolerance)


def _beside_a_broken_one(
    infer: Infer, images: np.ndarray, single: Answers, rows: np.ndarray, tolerance: float
) -> Check:
    """Not a number in one image (white, where pixels are integers), then all sound again."""
    floating = np.issubdtype(images.dtype, np.floating)
    broken, at = images[rows], len(rows) // 2
    broken[at] = np.nan if floating else 255
    others = np.delete(np.arange(len(rows)), at)
    name = f"{'NaN' if floating else 'white'} in one row"
    beside = answers(infer(broken))
    if len(beside) != len(rows):
        return _broken(name, "the others", len(rows), tolerance, f"{len(beside)} rows came back")
    found = compare(name, "the others", beside[others], single[rows[others]], tolerance)
    after = compare(name, "the batch after", answers(infer(images[rows])), single[rows], tolerance)
    return after if found.ok and not after.ok else found


def _broken(name: str, compared: str, n: int, tolerance: float, why: str) -> Check:
    return Check(
        name=name, compared=compared, n=n, largest=float("nan"), tolerance=tolerance, moved=0,
        why=why,
    )  # fmt: skip
