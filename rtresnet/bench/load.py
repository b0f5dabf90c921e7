"""One request after another, timed from outside: the single-stream load.

Several artifacts are measured in turn, a slice of the time each, round after round, so that a
drift of the machine meets all of them; their speeds are compared round by round. Input is made
before the clock starts. Warm-up ends when three windows in a row agree within 5 %, or at its cap,
and the result says which.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from rtresnet.bench import stats
from rtresnet.errors import InputError

WINDOW, STEADY, CAP_SECONDS = 3, 0.05, 2.0
ROUNDS = 5

Infer = Callable[[np.ndarray], object]
"""Takes float32 [batch, 3, size, size] and returns when the result is there."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Latency of one artifact at one batch.

    Attributes:
        batch: Images a request.
        latency: The summary.
        speed: Times as fast as the first artifact of the same call: the median over rounds of
            the ratio of medians.
        steady: Whether warm-up ended by itself.
        samples: Milliseconds, one a request, in order of time.
    """

    batch: int
    latency: stats.Latency
    speed: float
    steady: bool
    samples: tuple[float, ...]


def measure(
    candidates: Sequence[Infer],
    *,
    batch: int,
    size: int,
    seconds: float,
    rounds: int = ROUNDS,
    on_progress: Callable[[float], None] = lambda elapsed: None,
) -> list[Measurement]:
    """Times every candidate on the same random images, in turn.

    Args:
        candidates: What to time.
        batch: Images a request.
        size: Side of an image, in pixels.
        seconds: Spent on each candidate after warm-up; at least three requests a round are made.
        rounds: Slices of that time.
        on_progress: Called between slices with the seconds spent on measuring, all candidates
            together.

    Raises:
        InputError: Batch or seconds out of range.
    """
    if batch < 1:
        raise InputError(f"--batch {batch}: a batch holds at least one image")
    if not 0 < seconds < float("inf"):
        raise InputError(f"--seconds {seconds:g}: must be above 0")
    rng = np.random.default_rng(0)
    images = rng.standard_normal((batch, 3, size, size)).astype(np.float32)
    steady = [warm_up(lambda infer=infer: infer(images)) for infer in candidates]  # type: ignore[misc]
    slices: list[list[list[float]]] = [[] for _ in candidates]
    for round_number in range(rounds):
        for position in range(len(candidates)):
            index = (position + round_number) % len(candidates)
            slices[index].append(_slice(candidates[index], images, seconds / rounds))
            on_progress(sum(sum(part) for parts in slices for part in parts) / 1e3)
    medians = [[float(np.median(part)) for part in parts] for parts in slices]
    results = []
    for index, parts in enumerate(slices):
        samples = np.concatenate(parts)
        ratios = np.divide(medians[0], medians[index])
        results.append(
            Measurement(
                batch=batch,
                latency=stats.summarize(samples, batch=batch, wall_seconds=samples.sum() / 1e3),
                speed=float(np.median(ratios)),
                steady=steady[index],
                samples=tuple(samples),
            )
        )
    return results


def _slice(infer: Infer, images: np.ndarray, seconds: float) -> list[float]:
    samples: list[float] = []
    begin = before = time.perf_counter_ns()
    while before - begin < seconds * 1e9 or len(samples) < 3:
        infer(images)
        after = time.perf_counter_ns()
        samples.append((after - before) / 1e6)
        before = after
    return samples


def warm_up(call: Callable[[], object]) -> bool:
    """Calls until three windows of three calls have medians within 5 %, or for two seconds.

    Returns:
        Whether it became steady.
    """
    medians: list[float] = []
    deadline = time.perf_counter() + CAP_SECONDS
    while True:
        window = []
        for _ in range(WINDOW):
            start = time.perf_counter()
            call()
            window.append(time.perf_counter() - start)
        medians.append(float(np.median(window)))
        last = medians[-3:]
        if len(last) == 3 and max(last) <= min(last) * (1 + STEADY):
            return True
        if time.perf_counter() > deadline:
            return False
